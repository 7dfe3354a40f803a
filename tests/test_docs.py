"""The documents: the page of letters names what exists, and links lead somewhere."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import fmjax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

import reference

PAGE = ROOT / "docs" / "formulas.md"
CHAPTERS = sorted(module.name for module in pkgutil.iter_modules(fmjax.__path__))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def without_code(text):
    """The text less its blocks and spans of code, where brackets are not links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def library_names(text):
    """Every `chapter.name` inside a span of code."""
    pattern = re.compile(rf"(?<![\w./])(?:{'|'.join(CHAPTERS)})(?:\.[A-Za-z_]\w*)+")
    return sorted({name for span in re.findall(r"`([^`\n]+)`", text) for name in pattern.findall(span) if not name.endswith(".py")})


def cells(*columns):
    """What the page's tables have in columns of these names, cell by cell."""
    found, head = [], None
    for line in PAGE.read_text().splitlines():
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else None
        if row and head:
            found += [cell for name, cell in zip(head, row, strict=True) if name in columns]
        head = row and (head or row)
    return found


def cases_in(file):
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_library_has_what_the_page_names():
    names = library_names(PAGE.read_text())
    assert len(names) > 40
    missing = []
    for name in names:
        try:
            pkgutil.resolve_name(f"fmjax.{name}")
        except (AttributeError, ImportError):
            missing.append(name)
    assert not missing, f"docs/formulas.md names what fmjax has not: {missing}"


def test_functions_of_the_page_are_of_the_library():
    """Every span of code in their columns: a name of fmjax or of jax, or a parameter of one beside it."""
    unknown = []
    for cell in cells("fmjax", "function"):
        parameters = set()
        for span in re.findall(r"`([^`]+)`", cell):
            try:
                value = pkgutil.resolve_name(span if span.startswith("jax.") else f"fmjax.{span}")
                parameters |= set(inspect.signature(value).parameters) if callable(value) else set()
            except (AttributeError, ImportError, ValueError):
                unknown += [span] if span not in parameters else []
    assert not unknown, f"docs/formulas.md has {unknown} for functions: write each as `chapter.name`"


def test_the_tests_that_the_page_names_exist():
    spans = [span for cell in cells("test", "decided by", "held by") for span in re.findall(r"`([^`]+)`", cell)]
    wrong = [span for span in spans if not re.fullmatch(r"test_\w+\.py::test_\w+", span)]
    assert not wrong, f"docs/formulas.md has {wrong} for tests: write each as `test_file.py::test_name`"
    cited = sorted(set(re.findall(r"(\w+\.py)::(\w+)", PAGE.read_text())))
    assert len(cited) > 40
    tests = {file.name: cases_in(file) for file in (ROOT / "tests").glob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in cited if test not in tests.get(file, ())]
    assert not missing, f"docs/formulas.md names tests that are not there: {missing}"


@pytest.mark.parametrize("chapter", ["paths", "targets", "marginals", "losses", "sampling", "guidance", "inverse", "likelihood"])
def test_the_page_names_every_function(chapter):
    module = importlib.import_module(f"fmjax.{chapter}")
    public = {
        f"{chapter}.{name}"
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__.startswith(module.__name__) and not name.startswith("_")
    }
    missing = sorted(public - set(library_names(PAGE.read_text())))
    assert not missing, f"docs/formulas.md has no row for {missing}: add one, with the formula and its test"


def has_equation(module, value):
    """Whether a docstring has a line that the reference sets as an equation, with two sides."""
    doc = re.split(r"^(?:Args|Returns|Raises):$", inspect.getdoc(value) or "", flags=re.MULTILINE)[0]
    names = {name for name in vars(module) if name[0] != "_"} | set(getattr(value, "__annotations__", ()))
    names |= set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()
    return any(" = " in line and reference._equation(line, names) for line in doc.splitlines())


@pytest.mark.parametrize("chapter", sorted(name for name, kind in reference.documented().items() if kind == "module"))
def test_the_page_has_every_equation_of_a_docstring(chapter):
    module = importlib.import_module(chapter)
    short = chapter.removeprefix("fmjax.")
    with_one = {f"{short}.{name}" for name, value in reference.public_names(module) if has_equation(module, value)}
    missing = sorted(with_one - set(library_names(PAGE.read_text())))
    assert not missing, f"docs/formulas.md has no row for {missing}, which have equations: add one, with the formula and its test"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_to_files(document):
    text = without_code(document.read_text())
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", text)
    references = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", text, re.MULTILINE)
    attributes = re.findall(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=[\"']([^\"'\s]+)", text)
    broken = []
    for link in (*inline, *references, *attributes):
        place = link.split("#")[0]
        if not place or re.match(r"[a-z][a-z0-9+.-]*:|//", place, re.IGNORECASE):
            continue
        target = (document.parent / place).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            broken.append(link)
    assert not broken, f"{document.relative_to(ROOT)} links to what is not in the repository: {broken}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`paths.flow(path, x_0, x_1, t)`", ["paths.flow"]),
        ("`f(source=targets.score)` and `models.mlp.MLP`", ["models.mlp.MLP", "targets.score"]),
        ("paths.flow, `my.paths.flow`, `test_paths.py::test_x`, `paths.py`", []),
    ],
)
def test_names_are_found_in_code_alone(text, found):
    assert library_names(text) == found
