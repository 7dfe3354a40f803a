"""The site's own machinery: pages that are notebooks, docstrings that become a reference, and what a built site must be."""

import importlib
import inspect
import re
import sys
from pathlib import Path

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


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_every_block_of_python_is_run(page):
    """A block that is indented, or spelt otherwise, would be shown and not run."""
    fences = re.findall(r"^( *)(?:`{3,}|~{3,})\{?(?:code-cell|code-block|python|py|ipython3?)\b.*$", page.read_text(), re.MULTILINE)
    theirs = len(re.findall(r"^```\{code-block\} python\n:class: theirs$", page.read_text(), re.MULTILINE))
    run = sum(found["shown"] is not None for found in pages.CELL.finditer(page.read_text()))
    assert len(fences) == run + theirs
    assert page.read_text().count("<!-- check") == sum(found["hidden"] is not None for found in pages.CELL.finditer(page.read_text()))


BROKEN = {
    "a script of another host": ('<script src="https://cdn.example.org/a.js"></script>', "asks https://cdn.example.org/a.js"),
    "a style of another host": ('<link rel="stylesheet" href="//fonts.example.org/a.css">', "asks //fonts.example.org/a.css"),
    "a picture of another host": ('<img src="http://example.org/a.png">', "asks http://example.org/a.png"),
    "a page that is not there": ('<a href="other.html">', "links to other.html, which is not there"),
    "a place that is not there": ('<a href="#there">', "links to #there, which has no such place"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_site_that_is_broken_is_refused(tmp_path, what):
    html, said = BROKEN[what]
    (tmp_path / "index.html").write_text(f'<p id="here"><a href="#here">x</a> <a href="https://arxiv.org/abs/1">y</a>{html}</p>')
    (wrong,) = verify.verify(tmp_path, tmp_path)
    assert said in wrong


def test_a_page_without_its_picture_is_refused(tmp_path):
    source, built = tmp_path / "source", tmp_path / "built"
    for folder in (source, built):
        (folder / "lessons").mkdir(parents=True)
    (source / "lessons" / "1.md").write_text("```python\nfigure, axes = plt.subplots()\n```\n")
    (source / "page.md").write_text("```python\nplots.images(axes, x)\n```\n")
    (source / "text.md").write_text("text\n")
    for name in ("lessons/1", "page", "text"):
        (built / f"{name}.html").write_text("<p>text</p>")
    (built / "a.css").write_text("p { background: url(https://example.org/a.png) }")
    wrong = "\n".join(verify.verify(built, source))
    assert "lessons/1.html draws, but has no picture" in wrong
    assert "lessons/1.html is a lesson without a picture" in wrong
    assert "page.html draws, but has no picture" in wrong
    assert "a.css asks https://example.org/a.png" in wrong
    assert "text.html" not in wrong


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
