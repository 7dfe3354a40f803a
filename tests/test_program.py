"""The program that the README opens with, run as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_moons

from fmjax import metrics

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_program_learns_the_moons():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    with jax.numpy_rank_promotion("allow"):
        exec(compile(program, str(README), "exec"), names)
    data = np.asarray(names["data"])
    fresh = jnp.asarray(make_moons(10_000, noise=0.05, random_state=0)[0], jnp.float32)
    scale = fresh.std(0, keepdims=True)
    other = (jnp.asarray(make_moons(2_000, noise=0.05, random_state=1)[0], jnp.float32) - fresh.mean(0, keepdims=True)) / scale
    distance = float(metrics.sliced_wasserstein(jax.random.key(1), names["x_1"], jnp.asarray(data)))
    floor = float(metrics.sliced_wasserstein(jax.random.key(1), other, jnp.asarray(data)))
    print(f"sliced Wasserstein of samples {distance:.4f}, of other data {floor:.4f}")
    assert distance <= 0.06
