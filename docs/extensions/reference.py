"""The API reference: one page per chapter, from the names in `__all__` and their docstrings.

    .. chapter:: fmjax.paths

gives the chapter's docstring, a table of its names, and each in full. Docstrings are plain text, for `help()`; here their equations become
LaTeX (`equations`), names in backticks become links, arXiv numbers too, and programs are shown as programs.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import equations
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
# An equation, and behind it its number, what it is, or who found it.
EQUATION = re.compile(r"^(?P<equation>.+?)(?:(?: {4,}| (?=\((?:\d|MIT|[A-Z][^()]+ (?:19|20)\d\d)))(?P<rest>.*))?$")


class Chapter(Directive):
    required_arguments = 1

    def run(self):
        module = importlib.import_module(self.arguments[0])
        public = [(name, getattr(module, name)) for name in getattr(module, "__all__", [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"])]
        public = [(name, value) for name, value in public if not inspect.ismodule(value)]
        lines = [f".. automodule:: {module.__name__}", "", ".. list-table::", "   :widths: 30 70", "   :class: names", ""]
        for name, value in public:
            lines += [f"   * - :py:obj:`{name} <{module.__name__}.{name}>`", f"     - {markup(summary(value), module)}"]
        lines.append("")
        for name, value in public:
            kind = "autoclass" if inspect.isclass(value) else "autofunction" if inspect.isroutine(value) else "autodata"
            lines += [f".. {kind}:: {module.__name__}.{name}", *(["   :members:"] if kind == "autoclass" else []), ""]
        section = nodes.section()
        section.document = self.state.document
        self.state.nested_parse(StringList(lines, source=module.__name__), 0, section)
        return section.children


def summary(value):
    """The first sentence of a docstring, without its source."""
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r" {4,}|(?<=[.:]) (?=[A-Z(])", paragraph)[0].rstrip(":").strip()


def markup(text, module):
    """Prose with its names in backticks and its arXiv numbers as links, and nothing else that reStructuredText would read."""
    parts = re.split(r"(`[^`\n]+`)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = _name(part[1:-1], module)
        else:
            escaped = re.sub(r"([\\*|])", r"\\\1", part)
            escaped = re.sub(r"(?<=\w)_(?!\w)", r"\\_", escaped)
            # A number of an equation that begins a line is no list.
            escaped = re.sub(r"^( *)\((\d+)\)", r"\1\\(\2)", escaped) if i == 0 else escaped
            parts[i] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", escaped)
    return "".join(parts)


def _name(name, module):
    """A link where the library has the name, else code."""
    bare = name.removesuffix("()")
    if re.fullmatch(r"[\w.]+", bare):
        package = module.__name__.rpartition(".")[0]
        for full in (bare, f"{module.__name__}.{bare}", f"{package}.{bare}", f"fmjax.{bare}", f"fmjax.models.{bare}", f"fmjax.data.{bare}"):
            if full.startswith("fmjax."):
                try:
                    value = pkgutil.resolve_name(full)
                except (AttributeError, ImportError, ValueError):
                    continue
                kind = "mod" if inspect.ismodule(value) else "obj"
                return f":py:{kind}:`{name} <{full}>`"
    return f"``{name}``"


def convert(lines, module, names):
    """The lines of a docstring as reStructuredText for napoleon."""
    made, at = [], 0
    while at < len(lines):
        line = lines[at]
        block = at
        while block < len(lines) and lines[block].startswith("    ") and not _in_section(lines, at):
            block += 1
            while block + 1 < len(lines) and not lines[block] and lines[block + 1].startswith("    "):
                block += 1
        if block > at:
            made += ["", *_block(textwrap.dedent("\n".join(lines[at:block])).split("\n"), module, names), ""]
            at = block
            continue
        found = _equation(line, names)
        if found and not _in_section(lines, at):
            run = []
            while at < len(lines) and (found := _equation(lines[at], names)):
                run.append(found)
                at += 1
            made += ["", *_display(run, module), ""]
            continue
        made.append(line if re.fullmatch(r"(Args|Returns|Raises|Yields):", line) else _argument(line, module) or markup(line, module))
        at += 1
    return made


def _in_section(lines, at):
    """Whether a line is in Args, Returns or Raises, whose lines are indented for another reason."""
    for line in reversed(lines[: at + 1]):
        if re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            return True
    return False


def _argument(line, module):
    """`  name: what it is`, whose name stays as it is."""
    found = re.match(r"^( +)([\w, *.]+|[A-Z]\w+):( .*)$", line)
    return found and f"{found[1]}{found[2]}:{markup(found[3], module)}"


def _equation(line, names):
    if not line.strip() or line.rstrip().endswith(":"):
        return None
    found = EQUATION.match(line.strip())
    equation, rest = found["equation"].rstrip().rstrip("."), (found["rest"] or "").strip()
    if not re.search(r"[=~^/()]|<-|->", equation):
        return None
    try:
        return equations.latex(equation, names), rest
    except equations.NotAnEquation:
        return None


def _display(run, module):
    """Equations one below the other, each with what stands behind it."""
    rows, prose = [], []
    for written, rest in run:
        number = re.match(r"^(.*?)\s*\((\d+)\)(?:\s+(.*))?$", rest)
        words, said = (number[1], number[3]) if number else ("", rest)
        if number and words.startswith("("):
            words, said = "", f"{words} {said or ''}".strip()
        left, sign, right = written.partition(" = ")
        row = rf"{left} &{sign.strip()} {right}" if sign else f"& {written}"
        rows.append(row + (rf" && \text{{{words}}}" if words else " &&") + (rf" && ({number[2]})" if number else ""))
        if said:
            prose.append(said)
    shown = [".. math::", "", r"   \begin{aligned}", *[rf"   {row} \\" for row in rows], r"   \end{aligned}"]
    return [*shown, "", *[markup(each, module) for each in prose]]


def _block(lines, module, names):
    """An indented block: equations, a program, or text as it stands."""
    found = [_equation(line, names) for line in lines if line.strip()]
    if all(found):
        return _display(found, module)
    try:
        ast.parse("\n".join(lines))
        language = "python"
    except SyntaxError:
        language = "text"
    return [f".. code-block:: {language}", "", *[f"   {line}" for line in lines]]


def process(app, what, name, obj, options, lines):
    owner = obj if what == "module" else inspect.getmodule(obj) if not isinstance(obj, property) else None
    module = owner or importlib.import_module(".".join(name.split(".")[:2]))
    try:
        names = set(inspect.signature(obj).parameters) if callable(obj) else set()
    except (TypeError, ValueError):
        names = set()
    if inspect.isclass(obj):
        names |= set(getattr(obj, "__annotations__", ()))
    lines[:] = convert(list(lines), module, names | {name for name in vars(module) if name[0] != "_"})


def setup(app):
    app.add_directive("chapter", Chapter)
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
