"""The site's own machinery: pages that are notebooks, docstrings that become a reference, and what a built site must be."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fmjax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

import equations
import pages
import reference
import verify

CHAPTERS = re.findall(r"chapter:: (\S+)", "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md"))))


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("x_t = alpha_t x_1 + beta_t x_0", r"x_{t} = \alpha_{t} x_{1} + \beta_{t} x_{0}"),
        ("u_t = d x_t / dt", r"u_{t} = \frac{d x_{t}}{dt}"),
        ("(beta'_t / beta_t) x", r"\left( \frac{\dot{\beta}_{t}}{\beta_{t}} \right) x"),
        ("p(x | z) = N(alpha_t z, beta_t^2 I)", r"p (x \mid z) = N (\alpha_{t} z , \beta_{t}^{2} I)"),
        ("E |f(x, t) - u|^2 / d", r"\mathrm{E} \frac{\lVert f (x , t) - u \rVert^{2}}{d}"),
        ("sqrt(1 - k^2) epsilon", r"\sqrt{1 - k^{2}} \epsilon"),
        ("u~(x | y) = (1 - w) u(x | null) + w u(x | y)", r"\tilde{u} (x \mid y) = (1 - w) u (x \mid \varnothing) + w u (x \mid y)"),
        ("a = 1,   b = 2", r"a = 1 , \qquad  b = 2"),
        ("sum_j w_j e_j^2 / sum_j w_j", r"\frac{\sum_{j} w_{j} e_{j}^{2}}{\sum_{j} w_{j}}"),
        ("int_0^1 div u_t(X_t) dt", r"\int_{0}^{1} \operatorname{div} u_{t} (X_{t}) dt"),
        ("sigma_min^(1/rho)", r"\sigma_{\min}^{\frac{1}{\rho}}"),
        ("X_{i+1} = X_i", r"X_{i + 1} = X_{i}"),
        ("x <- x + 1 / n", r"x \leftarrow x + \frac{1}{n}"),
        ("s <= 1e-3", r"s \le 1 \cdot 10^{-3}"),
        ("w N(x; m) / p(x)", r"w \frac{N (x ; m)}{p (x)}"),
    ],
)
def test_equations_become_latex(text, latex):
    assert equations.latex(text).replace("  ", " ") == latex.replace("  ", " ")


@pytest.mark.parametrize("text", ["the score = what it is", "x = (1 + 2", "x = 1 + |y", "/ 2 = x", 'x = "a"', "x = y)"])
def test_prose_and_open_brackets_are_no_equations(text):
    with pytest.raises(equations.NotAnEquation):
        equations.latex(text)


def test_a_parameter_is_a_name():
    with pytest.raises(equations.NotAnEquation, match="rate"):
        equations.latex("rate_max - 1")
    assert equations.latex("rate_max - 1", ["rate_max"]) == r"\mathrm{rate}_{\max} - 1"


def test_a_bracket_with_a_number_is_a_number_alone():
    assert reference._equation("u = (1 - w) v (1) (MIT)", set()) == ("u = (1 - w) v", "(1) (MIT)")
    assert reference._equation("1 / (1 + x)    (MIT)", set()) == (r"\frac{1}{1 + x}", "(MIT)")


def test_every_public_module_has_its_page():
    listed = {name for name in fmjax.__all__ if not hasattr(getattr(fmjax, name), "__path__")}
    for name in set(fmjax.__all__) - listed:
        package = getattr(fmjax, name)
        listed |= {f"{name}.{each}" for each in package.__all__} if name in ("models", "data") else {name}
    assert {chapter.removeprefix("fmjax.") for chapter in CHAPTERS} == listed
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert sorted(re.findall(r"fmjax\.[\w.]*\w", "".join(re.findall(r"chapters::(.*)", index)))) == sorted(CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_equation_of_a_docstring_is_rendered(chapter):
    """A line of its own that has an equals sign between spaces and little else than mathematics."""
    module, left = importlib.import_module(chapter), []
    documented = [(chapter, module), *((f"{chapter}.{name}", value) for name, value in reference.public_names(module))]
    for name, value in documented:
        made = (inspect.getdoc(value) or "").splitlines()
        reference.process(None, "module" if value is module else "function", name, value, None, made)
        in_code = False
        for line in made:
            in_code = line.startswith(".. code-block") or (in_code and (not line or line.startswith("   ")))
            words = re.findall(r"[^\W\d_]{3,}", re.sub(r"``.*?``|:py:\w+:`.*?`", "", line))
            prose = [word for word in words if word.lower() not in equations.WORDS and word not in ("sqrt", "sum", "int")]
            if re.search(r"\S = \S", line) and not in_code and not line.startswith("   ") and len(prose) < 2:
                left.append(f"{name}: {line.strip()}")
    assert not left, "not rendered as equations:\n" + "\n".join(left)


def test_what_is_no_function_has_its_words_too():
    training = importlib.import_module("fmjax.training")
    assert reference.under("PREEMPTED", training).startswith("The exit status")
    with pytest.raises(ValueError, match="no string under it"):
        reference.under("fit", training)
    lines = ["Of x, (B,): 0 without probes."]
    reference.process(None, "attribute", "fmjax.training.Mean.count", training.Mean.count, None, lines)
    assert lines[:2] == ["..", ""]


def test_a_docstring_becomes_a_page():
    made = reference.convert(
        """One sentence of `paths.flow` and of `jax.jvp`s.

x_t = alpha_t x_1 + beta_t x_0        (1) (Lipman et al. 2023, arXiv:2210.02747)

    program = 1
    call(program)

Args:
  x_0: noise * 2, like `x_1`.
""".splitlines(),
        importlib.import_module("fmjax.paths"),
        set(),
    )
    text = "\n".join(made)
    assert ":py:obj:`paths.flow <fmjax.paths.flow>` and of ``jax.jvp``\\ s." in text
    assert r"x_{t} &= \alpha_{t} x_{1} + \beta_{t} x_{0} && && (1) \\" in text
    assert "`arXiv:2210.02747 <https://arxiv.org/abs/2210.02747>`__" in text
    assert ".. code-block:: python\n\n   program = 1\n   call(program)" in text
    assert r"  x_0: noise \* 2, like ``x_1``." in text


def test_a_page_is_a_notebook_whose_checks_are_hidden():
    notebook = pages.read("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```bash\nmake\n```\n\n<!-- check\nassert x == 1\n-->\n")
    kinds = [(cell.cell_type, cell.metadata.get("tags", [])) for cell in notebook.cells]
    hidden = ("code", ["remove-cell"])
    assert kinds == [hidden, ("markdown", []), ("code", []), ("markdown", []), hidden]
    assert notebook.cells[2].source == "x = 1"
    assert notebook.cells[4].source == "assert x == 1"
    assert [cell.cell_type for cell in pages.read("# Title\n\n```bash\nmake\n```\n").cells] == ["markdown"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *pages.sources(ROOT / "docs")], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_python_is_run(page):
    assert not pages.complaints(page.read_text())


CODE = "x = 1\n```\n"
UNRUN = [
    *(f"{fence}\nx = 1\n{end}\n" for fence, end in [("~~~ python", "~~~"), (":::{code-block} python", ":::"), ("````python", "````")]),
    *(f"{fence}\n{CODE}" for fence in ["```Python", "```python3", "```py", "```pycon", "``` python", "```python ", "```{.python}", "```"]),
    *(f"```{{{name}}} python\n{CODE}" for name in ["code", "code-block", "code-cell", "sourcecode"]),
    *(f"{margin}```python\n{margin}x = 1\n{margin}```\n" for margin in ["  ", "\t", "> ", ">", "- ", "1. ", "> - "]),
    *(f"```python\nx = 1\n{end}\n" for end in ["", "``` ", " ```", "````", "~~~"]),
    *(f"{begin}\nassert x\n-->\n" for begin in ["<!-- Check", "<!--check", "<!--  check", "<!--\ncheck", "<!-- check:", " <!-- check"]),
    *(f"<!-- check\nassert x\n{end}\n" for end in ["", " -->", "--> "]),
    *(f"{begin}\n```python\n{CODE}{end}\n" for begin, end in [("```text", "```"), ("::::{grid} 1", "::::"), ("<!--", "-->")]),
    *(f"{begin}\n<!-- check\nassert x\n-->\n{end}\n" for begin, end in [("```text", "```"), ("::::{grid} 1", "::::"), ("~~~", "~~~")]),
    "```{eval-rst}\n.. code-block:: python\n\n   x = 1\n```\n",
    "```{include} other.md\n```\n",
    ":::{note}\ntext\n:::\n",
]


@pytest.mark.parametrize("text", UNRUN)
def test_a_block_that_would_not_run_is_refused(text):
    assert pages.complaints(f"# Title\n\n```python\n{CODE}\n{text}\n```python\n{CODE}\n<!-- check\nassert x\n-->\n")


def test_a_complaint_names_its_line():
    (wrong,) = pages.complaints("# Title\n\n```Python\nx = 1\n```\n")
    assert wrong.startswith("line 3, '```Python': begins none of the blocks that a page may have; write ```python at the margin")
    (wrong,) = pages.complaints("::::{grid} 1\n```python\nx = 1\n```\n::::\n")
    assert wrong == "line 2, '```python': a cell in another block; close that one before, with ::::"


# Files, and what is said of them: nothing, or one complaint each.
SITES = [
    # Files that a page loads.
    ({"a.html": '<img src="other.png">'}, "a.html links to other.png, which is not there"),
    ({"a.html": '<img srcset="here.png 1x, other.png 2x">'}, "links to other.png"),
    ({"a.html": '<script src="other.js"></script>'}, "links to other.js"),
    ({"a.html": '<link rel="stylesheet" href="other.css?v=1">'}, "links to other.css?v=1"),
    ({"a.html": '<iframe src="other.html"></iframe>'}, "links to other.html"),
    ({"a.html": '<video poster="here.png"><source src="other.mp4"></video>'}, "links to other.mp4"),
    ({"a.html": '<p style="background: url(other.png)">'}, "links to other.png"),
    ({"a.html": "<style>p { background: url('other.png') }</style>"}, "links to other.png"),
    ({"in/a.css": "p { background: url(here.png) }"}, "in/a.css links to here.png"),
    ({"a.css": '@import "other.css";'}, "links to other.css"),
    ({"a.css": 'p { background: url( "here.png" ), url(here.png?x#y), url(\'data:a,<b c="url(d)">\') } /* url(other.png) */'}, None),
    ({"a.html": '<img src="here.png"><img src="data:image/gif;base64,R0//a+//b="><img srcset="here.png, here.png 2x">'}, None),
    # Requests.
    ({"a.html": '<script src="https://cdn.org/a.js"></script>'}, "a.html asks https://cdn.org of another host"),
    ({"a.html": '<img src=" HTTP://cdn.org/a.png">'}, "asks HTTP://cdn.org"),
    ({"a.html": '<img srcset="here.png 1x, //cdn.org/a.png 2x">'}, "asks //cdn.org"),
    ({"a.html": '<img srcset="data:image/gif;base64,R0 1x, //cdn.org/a.png 2x">'}, "asks //cdn.org"),
    ({"a.html": '<link rel="preload" imagesrcset="here.png 1x, //cdn.org/a.png 2x">'}, "asks //cdn.org"),
    ({"a.html": '<link rel="Stylesheet" href="//cdn.org/a.css">'}, "asks //cdn.org"),
    ({"a.html": '<link rel="alternate stylesheet" href="//cdn.org/a.css">'}, "asks //cdn.org"),
    ({"a.html": '<link rel="modulepreload" href="https://cdn.org/a.js">'}, "asks https://cdn.org"),
    ({"a.html": '<link rel="apple-touch-icon" href="https://cdn.org/a.png">'}, "asks https://cdn.org"),
    ({"a.html": '<object data="https://cdn.org/a.svg"></object>'}, "asks https://cdn.org"),
    ({"a.html": '<base href="https://cdn.org/">'}, "asks https://cdn.org"),
    ({"a.html": '<meta http-equiv="refresh" content="0; url=https://cdn.org/">'}, "asks https://cdn.org"),
    ({"a.html": '<video poster="https://cdn.org/a.png"></video>'}, "asks https://cdn.org"),
    ({"a.html": '<form action="https://cdn.org/"></form>'}, "asks https://cdn.org"),
    ({"a.html": '<svg><use href="https://cdn.org/a.svg#b"/></svg>'}, "asks https://cdn.org"),
    ({"a.html": '<svg><image xlink:href="https://cdn.org/a.png"/></svg>'}, "asks https://cdn.org"),
    ({"a.html": '<p style="background: url(//cdn.org/a.png)">'}, "asks //cdn.org"),
    ({"a.html": "<style>@import url('https://cdn.org/a.css')</style>"}, "asks https://cdn.org"),
    ({"a.html": "<script>fetch('https://cdn.org/a.json')</script>"}, "asks https://cdn.org"),
    ({"a.html": "<script>new WebSocket(`wss://cdn.org`)</script>"}, "asks wss://cdn.org"),
    ({"a.js": 'import "//cdn.org/a.js"'}, "a.js asks //cdn.org"),
    ({"a.css": '@import"https://cdn.org/a.css";'}, "a.css asks https://cdn.org"),
    ({"a.css": "p { background: URL(HTTPS://cdn.org/a.png) }"}, "asks HTTPS://cdn.org"),
    ({"a.css": 'p { background: image-set("//cdn.org/a.png" 1x) }'}, "asks //cdn.org"),
    ({"a.html": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"></svg>'}, None),
    ({"a.html": '<link rel="canonical" href="https://cdn.org/"><link rel="license" href="https://cdn.org/">'}, None),
    ({"a.html": '<img src="here.png" alt="of https://cdn.org"><meta name="description" content="of https://cdn.org">'}, None),
    ({"a.html": '<script src="a.js"></script><script>// x\n//y\na = "http://www.w3.org/2000/svg"</script>', "a.js": "//y"}, None),
    ({"a.css": "/* https://cdn.org */ p { background: url('data:image/svg+xml,<svg xmlns=\"http://www.w3.org/2000/svg\">') }"}, None),
    # Links.
    ({"a.html": '<a href="other.html">x</a>'}, "links to other.html, which is not there"),
    ({"a.html": '<a href="../a.html">x</a>'}, "links to ../a.html, which is not there"),
    ({"a.html": '<a href="#there">x</a>'}, "links to #there, which has no such place"),
    ({"a.html": '<area href="other.html">'}, "links to other.html"),
    ({"a.html": '<svg><a xlink:href="other.html">x</a></svg>'}, "links to other.html"),
    ({"a.html": '<a href="file:///tmp/a.html">x</a>'}, "links to file:///tmp/a.html, which only the machine has that wrote it"),
    ({"a.html": '<a href="http://localhost:8000/">x</a>'}, "links to http://localhost:8000/, which only the machine has"),
    ({"a.html": '<a href="//127.0.0.1/">x</a>'}, "links to //127.0.0.1/, which only"),
    ({"a.html": '<meta name="there"><input name="there"><a href="#there">x</a>'}, "links to #there"),
    ({"a.html": '<a name="there">x</a><a href="#there">x</a><a href="#top">x</a><a href="#">x</a><a href="">x</a>'}, None),
    ({"a.html": '<a href="index.html?x=1#here">x</a><a href="?x=1">x</a><a href="index.html#:~:text=x">x</a><a href=".">x</a>'}, None),
    ({"a.html": '<a href="//arxiv.org/abs/1">x</a><a href="https://localhost.org">x</a><a href="mailto:a@b.org">x</a>'}, None),
    ({"a.html": '<a href="%61%23.html#b%20c">x</a>', "a#.html": '<p id="b c">'}, None),
    # Pictures.
    ({"a.md": "```python\nfigure, axes = subplots()\n```\n", "a.html": ""}, "a.md draws, or is a lesson, and its cells made no picture"),
    ({"a.md": "```python\nfigure, axes = plt.subplots()\n```\n", "a.html": '<img src="here.png">'}, "a.md draws"),
    ({"a.md": "```python\nimport matplotlib.pyplot\n```\n", "a.html": '<div class="cell_output"></div><img src="here.png">'}, "a.md draws"),
    ({"a.md": "```python\nplots.images(x)\n```\n", "a.html": '<div class="cell_input"><img src="here.png"></div>'}, "a.md draws"),
    ({"a.md": "```python\nfrom fmjax.plots import images\n```\n", "a.html": ""}, "a.md draws"),
    ({"a.md": "```python\nfigure = Figure()\n```\n", "a.html": ""}, "a.md draws"),
    ({"lessons/a.md": "text\n", "lessons/a.html": '<img src="../here.png">'}, "lessons/a.md draws, or is a lesson"),
    ({"a.md": "text\n"}, "a.md is a page that was not built"),
    ({"a.md": "```python\nplt.plot(x)\n```\n", "a.html": '<div class="b cell_output"><div></div><img src="here.png"></div>'}, None),
    ({"a.md": "plots.\n\n```bash\nplots.\n```\n\n<!-- check\nplots.images\n-->\n", "a.html": ""}, None),
    ({"lessons/index.md": "text\n", "lessons/index.html": "", "_build/a.md": "text\n"}, None),
]


@pytest.mark.parametrize(("files", "said"), SITES)
def test_a_site_that_is_broken_is_refused(tmp_path, files, said):
    index = '<p id="here"><a href="#here">x</a> <a href="https://arxiv.org/abs/1">y</a></p>'
    for name, text in {"index.html": index, "here.png": "", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    wrong = verify.verify(tmp_path, tmp_path)
    assert len(wrong) == (said is not None), wrong
    assert (said or "") in "".join(wrong)


def test_a_build_of_a_page_that_would_not_run_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("```Python\nx = 1\n```\n")
    with pytest.raises(verify.ExtensionError, match=r"page\.md, line 1, '```Python'"):
        verify.before(SimpleNamespace(srcdir=tmp_path))


def commands():
    """Every command that a document names: a module and its flags, or a target of make."""
    # The changelog names what has been, too.
    for document in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]):
        for line in document.read_text().splitlines():
            for found in re.finditer(r"python -m ((?:experiments|benchmarks)\.\w+)([^`|#\n)]*)", line):
                yield document.name, found[1], found[2]
            for found in re.finditer(r"(?:^|`)make ([a-z][\w-]*)", line):
                yield document.name, "make", found[1]


@pytest.mark.parametrize(("document", "module", "given"), sorted(set(commands())))
def test_commands_of_the_documents_exist(document, module, given):
    if module == "make":
        assert re.search(rf"^{given}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{document}: make {given}"
        return
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.exists(), f"{document}: {module}"
    source = file.read_text() + (ROOT / "benchmarks" / "harness.py").read_text() * module.startswith("benchmarks")
    for flag in re.findall(r"--([a-z][\w.-]*)", given):
        name = flag.split(".")[-1].replace("-", "_")
        assert flag == "help" or re.search(rf"\b{name}\b|--{flag}\b", source), f"{document}: {module} has no --{flag}"
