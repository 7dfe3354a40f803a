"""The house: imports run downwards in the list of chapters, and every public name is found from `import fmjax`."""

import ast
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fmjax

ROOT = Path(__file__).parents[1]
# A chapter imports those before it. The first ones stand on JAX alone, the next on Flax too, the last on Optax and Orbax.
JAX = [
    "checks",
    "files",
    "states",
    "paths",
    "betas",
    "targets",
    "marginals",
    "times",
    "losses",
    "bridges",
    "sampling",
    "guidance",
    "inverse",
    "likelihood",
    "flow_maps",
]
CHAPTERS = [*JAX, *["models", "pretrained", "data", "training", "parallel", "metrics", "couplings", "checkpoints", "export", "plots"]]
APART = "experiments", "benchmarks", "tests"


def imported(file):
    """The modules that a file imports, those of its package by their full names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import: give the full name."
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_imports_run_downwards(chapter):
    file = ROOT / "fmjax" / f"{chapter}.py"
    files = [file] if file.exists() else sorted((ROOT / "fmjax" / chapter).rglob("*.py"))
    seen = {name for file in files for name in imported(file)}
    upwards = [name for name in seen if name.startswith("fmjax.") and name.split(".")[1] not in CHAPTERS[: CHAPTERS.index(chapter) + 1]]
    assert not upwards, f"{chapter} imports what is below it in the list: {upwards}"
    heavy = {name.split(".")[0] for name in seen} & {"flax", "optax", "orbax"}
    assert chapter not in JAX or not heavy, f"{chapter} stands on JAX alone, but imports {heavy}"


def test_every_chapter_is_in_the_list():
    there = {path.stem for path in (ROOT / "fmjax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == set(CHAPTERS)


@pytest.mark.parametrize("folder", APART)
def test_experiments_benchmarks_and_tests_stand_apart(folder):
    """Tests import what they test."""
    for file in (ROOT / folder).rglob("*.py"):
        others = [name for name in imported(file) if name.split(".")[0] in set(APART) - {folder}]
        assert folder == "tests" or not others, f"{file.relative_to(ROOT)} imports {others}"


def test_every_public_name_is_found_by_completion():
    assert set(CHAPTERS) - {"checks", "files"} == set(fmjax.__all__) <= set(dir(fmjax))
    for chapter in fmjax.__all__:
        module = getattr(fmjax, chapter)
        assert module is importlib.import_module(f"fmjax.{chapter}")
        listed = getattr(module, "__all__", None)
        if hasattr(module, "__path__"):
            assert listed is not None, f"fmjax/{chapter}/__init__.py lists its public names"
            assert set(listed) <= set(dir(module))
    with pytest.raises(AttributeError, match="fmjax has no chapter 'solvers': the chapters are betas, bridges, checkpoints, "):
        assert fmjax.solvers


def test_flax_and_orbax_are_imported_when_they_are_asked_for():
    program = "import sys, fmjax; assert not {'flax', 'optax', 'orbax'} & set(sys.modules); fmjax.models.dit.DiT_S; fmjax.checkpoints.save"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_version_has_one_source():
    assert metadata.version("fmjax") == fmjax.__version__
