"""The programs of the README and of the documents, run as printed."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fmjax import checkpoints, metrics
from fmjax.data import toy

ROOT = Path(__file__).parents[1]


def run(document, index=0, count=1):
    """The names that one of the programs of a document leaves."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(programs) == count
    program, names = programs[index], {}
    with jax.numpy_rank_promotion("allow"):
        exec(compile(program, document, "exec"), names)
    return names


@pytest.mark.usefixtures("optimized")
def test_the_readme_program_learns_the_moons():
    names = run("README.md")
    other = toy.moons(jax.random.key(2), 2_000)
    distance, floor = (float(metrics.sliced_wasserstein(jax.random.key(1), x, names["data"])) for x in (names["x_1"], other))
    print(f"sliced Wasserstein of samples {distance:.4f}, of other data {floor:.4f}")
    assert distance <= 0.06


def assert_by_two_points(x, within=0.2):
    """Nearly all samples lie by one of the two points of the data, and by each of them half."""
    distances = np.linalg.norm(np.asarray(x)[:, None] - np.array([[2.0, 0.0], [-2.0, 1.0]])[None], axis=-1)
    assert np.median(distances.min(1)) < within
    assert 0.3 < (distances.argmin(1) == 0).mean() < 0.7


def test_an_nnx_module_is_a_field(tmp_path):
    names = run("docs/nnx.md", 0, 2)
    state, field, x = names["state"], names["field"], names["x_1"]
    assert_by_two_points(x)
    # The state is a pytree like any other, and what was learnt goes back into a module.
    checkpoints.save(tmp_path / "checkpoint", state)
    restored = checkpoints.restore(tmp_path / "checkpoint", state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    model = names["Network"](64, nnx.Rngs(1))
    nnx.update(model, restored.ema)
    np.testing.assert_allclose(model(x, 0.5), field(state.ema)(x, 0.5), rtol=1e-6)


def test_an_nnx_module_with_dropout_and_statistics_is_a_field():
    names = run("docs/nnx.md", 1, 2)
    assert_by_two_points(names["x_1"], within=0.3)
    assert all(module.deterministic for _, module in nnx.iter_modules(names["model"]) if isinstance(module, nnx.Dropout))
