"""Docstrings: chapters list what is public, Args are the parameters, fields are documented, and programs run."""

import ast
import builtins
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmjax
from fmjax import (
    bridges,
    checkpoints,
    couplings,
    export,
    guidance,
    losses,
    marginals,
    metrics,
    parallel,
    paths,
    plots,
    pretrained,
    sampling,
    times,
    training,
)
from fmjax.data import images, latents, pipeline
from fmjax.models import dit, mlp, unet

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

import equations

FOLDERS = {"models": importlib.import_module("fmjax.models"), "data": importlib.import_module("fmjax.data")}
CHAPTERS = [name for name in fmjax.__all__ if name not in FOLDERS]
CHAPTERS += [f"{folder}.{name}" for folder, package in FOLDERS.items() for name in package.__all__]
# Names without an underscore that no chapter lists.
UNLISTED = {
    # Helpers that several chapters share.
    "parallel": {"anywhere"},
    "paths": {"fits", "on_states"},
    "states": {"example_shape"},
    "models.conditions": {"embed"},
    "models.layers": {"as_matrix", "batch_times", "both_times", "by", "check_labels", "described", "embed_times", "require_images"},
    # Parts of a network, after which flax names parameters.
    "models.autoencoder": {"Attention", "Decoder", "Encoder", "Residual"},
    "models.dit": {"Attention", "Block", "ContextTokens", "Patches"},
    "models.unet": {"Conv", "PixelAttention", "Residual"},
}
# The page of formulas has rows for helpers, too.
DOCUMENTS = [ROOT / "README.md", *(page for page in (ROOT / "docs").rglob("*.md") if page.name != "formulas.md")]


def chapter_of(name):
    return importlib.import_module(f"fmjax.{name}")


PUBLIC = {f"{name}.{each}": getattr(chapter_of(name), each) for name in CHAPTERS for each in chapter_of(name).__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def functions():
    """(name, function, its docstring): functions, steps that are objects, what makes a class, and methods."""
    for name, value in PUBLIC.items():
        if inspect.isfunction(value) or isinstance(value, sampling.DiffusionStep):
            yield name, inspect.unwrap(getattr(value, "step", value)), inspect.getdoc(value)
    for name, value in CLASSES.items():
        # A field may be a function, too.
        fields = inspect.get_annotations(value)
        own = {each: method for each, method in vars(value).items() if inspect.isfunction(method) and each not in fields}
        if value in (sampling.DiffusionStep, checkpoints.Checkpointer):
            yield name, own["__init__"], inspect.getdoc(value)
        for each, method in own.items():
            # What the methods of a path or a bridge take, the protocols say.
            if each[0] != "_" and (each not in ("alpha", "beta", "gamma") or value in (paths.Path, paths.Joint, bridges.Bridge)):
                yield f"{name}.{each}", method, inspect.getdoc(method)


FUNCTIONS = list(functions())


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_lists_its_public_names(name):
    chapter = chapter_of(name)
    assert len(set(chapter.__all__)) == len(chapter.__all__)
    assert set(chapter.__all__) <= set(vars(chapter))
    used = {each for page in DOCUMENTS for each in re.findall(rf"(?<![\w/]){name.split('.')[-1]}\.(\w+)", page.read_text())}
    ours = {each for each in used if getattr(getattr(chapter, each, None), "__module__", "").startswith(chapter.__name__)}
    assert ours <= set(chapter.__all__)
    own = {each for each, value in vars(chapter).items() if str(getattr(value, "__module__", "")).startswith(chapter.__name__)}
    unlisted = {each for each in own - set(chapter.__all__) if each[0] != "_"}
    assert unlisted == UNLISTED.get(name, set()), "list them in `__all__`, or let them begin with an underscore"


def test_names_that_no_chapter_lists_are_shared_between_files():
    """Else a new function could stand in a file of a chapter, neither public nor private. A chapter in one file has the test above."""
    trees = {file: ast.parse(file.read_text()) for folder in ("fmjax", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    users = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            # `from fmjax.sampling.checks import takes`, or `checks.takes`.
            if isinstance(node, ast.ImportFrom) and node.module:
                for each in node.names:
                    users.setdefault((node.module.split(".")[-1], each.name), set()).add(file)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                users.setdefault((node.value.id, node.attr), set()).add(file)
    alone = []
    for file, tree in trees.items():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not module.startswith("fmjax.") or module.removeprefix("fmjax.") in CHAPTERS or file.stem == "__init__":
            continue
        listed = importlib.import_module(module.rpartition(".")[0]).__all__
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and node.name not in listed:
                elsewhere = users.get((file.stem, node.name), set()) - {file}
                alone += [] if elsewhere else [f"{module}.{node.name}"]
    assert not alone, f"only their own files use {alone}: list them in their chapter's `__all__`, or let them begin with an underscore"


def gives(function):
    """Whether a function gives anything: as annotated, else as its own returns say."""
    annotation = inspect.signature(function).return_annotation
    if annotation is not inspect.Signature.empty:
        return annotation is not None and annotation != "None"
    inner = list(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)
    while inner:
        node = inner.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            return True
        inner += [] if isinstance(node, ast.FunctionDef | ast.Lambda) else ast.iter_child_nodes(node)
    return False


def sections(doc):
    """The head of each section -> what is in it."""
    _, *parts = re.split(r"^(Args|Returns|Raises):$", doc or "", flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def raised(function):
    """The errors that a function's own statements raise by name; those of functions in it are raised later."""
    found, inner = set(), list(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)
    while inner:
        node = inner.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            named = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            error = function.__globals__.get(named, getattr(builtins, named, None))
            found |= {error} if inspect.isclass(error) and issubclass(error, BaseException) else set()
        inner += [] if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef) else ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(("name", "function", "doc"), FUNCTIONS, ids=[name for name, *_ in FUNCTIONS])
def test_raises_are_errors_and_all_that_a_function_raises(name, function, doc):
    own = {full.rpartition(".")[2]: value for full, value in CLASSES.items()}
    lines = re.findall(r"^ {2}(?! )(.*)$", sections(doc).get("Raises", ""), re.MULTILINE)
    named = [each for line in lines for each in line.partition(":")[0].split(", ")]
    errors = [own.get(each, getattr(builtins, each, None)) for each in named]
    wrong = [each for each, error in zip(named, errors, strict=True) if not (inspect.isclass(error) and issubclass(error, BaseException))]
    assert not wrong, f"Raises of {name} names {wrong}, which are neither Python's errors nor the library's"
    missing = [error.__name__ for error in raised(function) if not issubclass(error, tuple(errors))]
    assert not missing, f"{name} raises {missing}: list them in Raises"


@pytest.mark.parametrize(("name", "function", "doc"), FUNCTIONS, ids=[name for name, *_ in FUNCTIONS])
def test_args_are_the_parameters(name, function, doc):
    parts = sections(doc)
    first = (doc or "").partition("\n\n")[0]
    assert re.search(r"\S[.:)]$", first), "a docstring begins with a sentence"
    assert not re.search(r"\w (=|~|<-) \w", re.sub(r"`[^`]*`|\([^()]*\)", "", first)), "an equation has a line of its own"
    named = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", parts.get("Args", ""), re.MULTILINE)
    documented = [each.lstrip("*") for line in named for each in line.split(", ")]
    assert documented == [each for each in inspect.signature(function).parameters if each != "self"]
    assert ("Returns" in parts) == (function.__name__ != "__init__" and gives(function))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_their_fields_are_documented(name):
    value = CLASSES[name]
    assert value.__doc__, "a class has a docstring"
    if not dataclasses.is_dataclass(value) and not hasattr(value, "_fields"):
        return
    fields = set(inspect.get_annotations(value)) - {"parent", "name"}
    for base in value.__mro__:
        if base.__module__.startswith("fmjax."):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
            for node, after in itertools.pairwise(body):
                if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    fields.discard(node.target.id)
    assert not fields, "a field has a string under it"


def indented(doc):
    """Paragraphs that are indented by four, with those below that are indented by more."""
    blocks = []
    for paragraph in re.split(r"\n{2,}", inspect.cleandoc(doc)):
        if blocks and re.match(" {5}", paragraph):
            blocks[-1] += f"\n\n{paragraph}"
        else:
            blocks.append(paragraph)
    return [textwrap.dedent(block) for block in blocks if block.startswith("    ")]


def is_program(block):
    try:
        nodes = list(ast.walk(ast.parse(block)))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign | ast.ClassDef | ast.Import) for node in nodes) and not is_equation(block)


def is_equation(block):
    try:
        return all(equations.latex(line) for line in block.splitlines())
    except equations.NotAnEquation:
        return False


def programs():
    """The programs of every docstring, by the name of what has it."""
    found = {}
    for file in sorted((ROOT / "fmjax").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / "fmjax").with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                for block in filter(is_program, indented(doc)):
                    found.setdefault(name, []).append(block)
    return found


PROGRAMS, KEY = programs(), jax.random.key(0)
MODEL, X, T = mlp.MLP(hidden_size=8, depth=1), jnp.ones((8, 2)), jnp.ones(8)


def network(num_classes=None):
    return mlp.MLP(hidden_size=8, depth=1, num_classes=num_classes).init(KEY, X, T, None if num_classes is None else jnp.zeros(8, int))


def examples(count):
    return [(np.full(2, i, np.float32), np.int32(i % 2)) for i in range(count)]


def loss_fn(params, key, batch):
    return (MODEL.apply(params, batch[0], jnp.float32(0.5)) ** 2).mean()


def trained():
    optimizer = optax.adam(1e-3)
    names = {"key": KEY, "model": MODEL, "params": network(), "optimizer": optimizer, "loss_fn": loss_fn, "steps": 2, "training": training}
    return names | {"state": training.init(names["params"], optimizer), "step": training.make_step(loss_fn, optimizer), "x": X, "t": T}


def with_checkpoint(folder):
    names = trained() | {"checkpoints": checkpoints, "folder": folder / "saved", "params": network(3)}
    checkpoints.save(names["folder"], training.init(network(2), names["optimizer"]))
    return names


def with_photos(folder):
    from PIL import Image

    (folder / "photos" / "bee").mkdir(parents=True)
    for i in range(128):
        Image.new("RGB", (2, 2)).save(folder / "photos" / "bee" / f"{i}.png")
    return {"images": images, "pipeline": pipeline}


def with_latents(folder):
    (folder / "latents").mkdir()
    return {"Path": Path, "latents": latents, "arrays": np.ones((2, 3)), "labels": [0, 1]}


def with_network(folder):
    network = dit.DiT(patch_size=2, hidden_size=384, depth=1, num_heads=6, num_classes=1000)
    params, x_0 = network.init(KEY, jnp.ones((2, 4, 4, 4)), 0.5, jnp.zeros(2, int)), jnp.ones((2, 4, 4, 4))
    pretrained.write(folder / "SiT-XL-2-256x256.pt", pretrained.sit_tensors(params, network, (4, 4, 4)))
    names = {"pretrained": pretrained, "guidance": guidance, "sampling": sampling, "times": times}
    return names | {"x_0": x_0, "y": jnp.array([207, 360])}


def with_data_sets(_):
    record = {"image": np.zeros((28, 28), np.uint8), "label": 1}
    datasets = types.SimpleNamespace(load_dataset=lambda name, split: [record])
    return {"images": images, "datasets": datasets, "tfds": types.SimpleNamespace(data_source=datasets.load_dataset)}


def plotted(_):
    distribution = marginals.GaussianMixture(jnp.ones(2), 2 * jnp.eye(2), 0.5)
    return {"plots": plots, "marginals": marginals, "path": paths.Linear(), "distribution": distribution, "saved": jnp.ones((3, 4, 2))}


def bridged():
    names = {"x_0": X, "x_1": X[::-1], "z": jnp.ones_like(X), "t": 0.5, "sigma": 1.0, "key": KEY, "times": times.uniform_grid(2)}
    fields = {"velocity": lambda x, t: -x, "noise": lambda x, t: x, "score": lambda x, t: -x}
    return names | fields | {"bridge": bridges.Brownian(1.0), "bridges": bridges, "losses": losses, "sampling": sampling}


NAMESPACES = {
    "bridges": lambda _: bridged(),
    "couplings": lambda _: {"jax": jax, "couplings": couplings, "x_0": X, "x_1": X[::-1], "y": jnp.arange(len(X))},
    "checkpoints": lambda _: trained() | {"checkpoints": checkpoints, "stream": pipeline.batches(examples(8), 4)},
    "checkpoints.parts.restore_matching": with_checkpoint,
    "data.images.records": with_data_sets,
    "data.latents": with_latents,
    "data.pipeline": with_photos,
    "export": lambda _: trained() | {"export": export, "sampling": sampling, "grid": times.uniform_grid(2), "x_0": X},
    "models.dit": lambda _: dict(vars(dit)),
    "models.unet": lambda _: dict(vars(unet)),
    "parallel": lambda _: trained() | {"parallel": parallel, "pipeline": pipeline, "source": examples(256)},
    "paths": lambda _: {"dataclasses": dataclasses, "jax": jax},
    "plots": plotted,
    "pretrained": with_network,
    "times.optimize_grid": lambda _: {"sampling": sampling, "times": times, "field": lambda x, t: jnp.cos(6 * t) * x, "x_0": X},
    "training.ema": lambda _: trained(),
    "training.evaluation.watch": lambda _: (
        trained()
        | {"run": training.Run(trained()["state"], KEY), "x_0": X, "grid": times.uniform_grid(2), "batches": lambda n: (X, T)}
        | {"field": lambda params: lambda x, t: -x, "sampling": sampling, "metrics": metrics}
    ),
    "training.evaluation": lambda _: (
        trained()
        | {"run": training.Run(trained()["state"], KEY), "source": examples(300), "path": paths.Linear()}
        | {"jax": jax, "losses": losses, "pipeline": pipeline, "sampling": sampling}
    ),
}


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() | NAMESPACES.keys()))
def test_programs_run(name, tmp_path, monkeypatch):
    """Each in names of its own and a folder of its own; a name without a program, or a program without names, fails."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = NAMESPACES[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Of the checkpoint at .* is new")
        for program in PROGRAMS[name]:
            exec(program, names)
