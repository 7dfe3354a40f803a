"""The programs of the README and of the documents, run as printed."""

import re
from pathlib import Path

import jax
import pytest

from fmjax import metrics
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
