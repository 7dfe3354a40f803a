"""The programs of the README, run as printed."""

import re
from pathlib import Path

import jax
import pytest

from fmjax import metrics
from fmjax.data import toy

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("optimized")
def test_the_readme_programs_learn_the_moons():
    names = {}
    with jax.numpy_rank_promotion("allow"):
        for program in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(compile(program, "README.md", "exec"), names)
    other = toy.moons(jax.random.key(2), 2_000)
    distance, floor = (float(metrics.sliced_wasserstein(jax.random.key(1), x, names["data"])) for x in (names["x_1"], other))
    print(f"sliced Wasserstein of samples {distance:.4f}, of other data {floor:.4f}")
    assert distance <= 0.06
    # Noise of 0.1 about curves of length 4 pi in all has the entropy log(4 pi) + log(2 pi e 0.01) / 2 = 1.65 nats.
    assert -2.1 < float(names["log_p"].mean()) < -1.6
