"""The API reference: one page per chapter, from the names in `__all__` and their docstrings.

    .. chapter:: fmjax.paths

gives the chapter's docstring, a table of its names, and each in full. Docstrings are plain text, for `help()`; here their equations become
LaTeX (`equations`), names in backticks become links, arXiv numbers too, and programs are shown as programs.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import equations
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.pycode import ModuleAnalyzer

API = Path(__file__).parents[1] / "api"
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
# An equation, and behind it its number, what it is, or who found it.
EQUATION = re.compile(r"^(?P<equation>.+?)(?:(?: {4,}| (?=\((?:\d+\)|MIT|[A-Z][^()]+ (?:19|20)\d\d)))(?P<rest>.*))?$")


def public_names(module):
    """What a chapter lists, without modules, which have pages of their own."""
    listed = [(name, getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in listed if not inspect.ismodule(value)]


class Reader(Directive):
    """A directive that is written in reStructuredText."""

    has_content = False

    def read(self, lines):
        section = nodes.section()
        section.document = self.state.document
        self.state.nested_parse(StringList(lines, source=" ".join(self.arguments)), 0, section)
        return section.children


class Chapters(Reader):
    """Chapters with all their names, each a link: the reference on one page."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        lines = []
        for chapter in self.arguments[0].split():
            module = importlib.import_module(chapter)
            short = chapter.removeprefix("fmjax.")
            names = ", ".join(f":py:obj:`{name} <{chapter}.{name}>`" for name, _ in public_names(module))
            lines += [f":doc:`{short} <{short.replace('.', '_')}>`", f"   {markup(summary(module), module)}", "", f"   {names}", ""]
        return self.read(lines)


class Chapter(Reader):
    """One chapter in full."""

    required_arguments = 1

    def run(self):
        module = importlib.import_module(self.arguments[0])
        public = public_names(module)
        lines = [f".. automodule:: {module.__name__}", "", ".. list-table::", "   :widths: 30 70", "   :class: names", ""]
        for name, value in public:
            words = under(name, module) if isinstance(value, int | str | tuple) else value
            lines += [f"   * - :py:obj:`{name} <{module.__name__}.{name}>`", f"     - {markup(summary(words), module)}"]
        lines.append("")
        for name, value in public:
            full = f"{module.__name__}.{name}"
            if isinstance(value, int | str | tuple):
                lines += [f".. py:data:: {name}", f"   :module: {module.__name__}", f"   :value: {value!r}", ""]
                lines += [f"   {markup(under(name, module), module)}", ""]
            elif inspect.isclass(value):
                lines += [f".. autoclass:: {full}", "   :members:", ""]
            elif inspect.isroutine(value):
                lines += [f".. autofunction:: {full}", ""]
            else:
                # A function in an object, such as a step of a sampler.
                lines += [f".. autofunction:: {full}({', '.join(inspect.signature(value.step).parameters)})", ""]
        return self.read(lines)


def under(name, module):
    """The string under a constant, in a module or in what that takes it from."""
    for source in sorted(each for each in sys.modules if each == module.__name__ or each.startswith(f"{module.__name__}.")):
        if found := ModuleAnalyzer.for_module(source).find_attr_docs().get(("", name)):
            return " ".join(found).strip()
    raise ValueError(f"{module.__name__}.{name} has no string under it.")


def summary(value):
    """The first sentence of a docstring, or of a text, without its source."""
    paragraph = ((value if isinstance(value, str) else inspect.getdoc(value)) or "").split("\n\n")[0].replace("\n", " ")
    # A full stop or a colon in code ends nothing.
    plain = re.sub(r"`[^`]*`", lambda code: "x" * len(code[0]), paragraph)
    end = re.search(r" {4,}|(?<=[.:]) (?=[A-Z(])", plain)
    return paragraph[: end.start() if end else None].rstrip(":").strip()


def markup(text, module):
    """Prose with its names in backticks and its arXiv numbers as links, and nothing else that reStructuredText would read."""
    parts = re.split(r"(`[^`\n]+`)", text)
    for i, part in enumerate(parts):
        if i % 2:
            # A letter that follows at once, as the s of a plural, would keep the span from ending.
            parts[i] = _name(part[1:-1], module) + ("\\ " if re.match(r"\w", parts[i + 1]) else "")
        else:
            escaped = re.sub(r"([\\*|])", r"\\\1", part)
            escaped = re.sub(r"(?<=\w)_(?!\w)", r"\\_", escaped)
            # A number of an equation that begins a line is no list.
            escaped = re.sub(r"^( *)\((\d+)\)", r"\1\\(\2)", escaped) if i == 0 else escaped
            parts[i] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", escaped)
    return "".join(parts)


def _name(name, module):
    """A link where the reference has the name, else code."""
    bare = name.removesuffix("()")
    if re.fullmatch(r"\w+(\.\w+)*", bare):
        package = module.__name__.rpartition(".")[0]
        for full in (bare, *(f"{start}.{bare}" for start in (module.__name__, package, "fmjax", "fmjax.models", "fmjax.data"))):
            # A field or a method stands with its class.
            for target in (full, full.rpartition(".")[0]):
                if (kind := documented().get(target)) and (target == full or kind == "class"):
                    return f":py:{'mod' if kind == 'module' else 'obj'}:`{name} <{target}>`"
    return f"``{name}``"


@functools.cache
def documented():
    """What the pages of the reference have, by full name."""
    found = {}
    for page in sorted(API.glob("*.md")):
        for chapter in re.findall(r"^\.\. chapter:: (\S+)", page.read_text(), re.MULTILINE):
            module = importlib.import_module(chapter)
            found[chapter] = "module"
            found |= {f"{chapter}.{name}": "class" if inspect.isclass(value) else "function" for name, value in public_names(module)}
    return found


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
    return any(re.fullmatch(r"(Args|Returns|Raises|Yields):", line) for line in lines[: at + 1])


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
        words, said = (number[1].replace("`", ""), number[3]) if number else ("", rest)
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
    if what in ("attribute", "property"):
        # An empty comment, since napoleon takes what stands before a colon in the first line for a type.
        lines[:0] = ["..", ""]


def setup(app):
    app.add_directive("chapter", Chapter)
    app.add_directive("chapters", Chapters)
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
