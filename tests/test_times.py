"""Times: densities by their distribution functions, grids by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import paths, times


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (times.uniform, scipy.stats.uniform.cdf),
        (times.stratified, scipy.stats.uniform.cdf),
        (times.logit_normal, lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)))),
        (lambda key, n: times.logit_normal(key, n, -0.5, 1.3), lambda t: scipy.stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 1.3)),
    ],
    ids=["uniform", "stratified", "logit_normal", "logit_normal moved"],
)
def test_densities(draw, distribution, key):
    t = np.asarray(draw(key, 20_000))
    assert t.shape == (20_000,)
    assert ((t >= 0) & (t < 1)).all()
    assert scipy.stats.kstest(t, distribution).pvalue > 1e-3
    assert abs(np.corrcoef(t[:-1], t[1:])[0, 1]) < 4 / np.sqrt(20_000)


@given(n=st.sampled_from([1, 2, 7, 100, 257]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_stratified_times_fill_every_interval(n, seed):
    place = np.sort(times.stratified(jax.random.key(seed), n)).astype(np.float64) * n - np.arange(n)
    assert (place > -1e-4).all()
    assert (place < 1 + 1e-4).all()


@given(steps=st.integers(1, 100), start=st.floats(0, 0.4), end=st.floats(0.6, 1))
@settings(deadline=None, max_examples=20)
def test_grid_is_uniform(steps, start, end):
    grid = times.grid(steps, start, end)
    np.testing.assert_allclose(grid, np.linspace(start, end, steps + 1), atol=1e-6)


def test_shift_multiplies_noise_over_data():
    t, path = jnp.linspace(0, 1, 11), paths.Linear()
    shifted = times.shift(t, 3.0)
    np.testing.assert_allclose(
        path.beta(shifted[1:]) / path.alpha(shifted[1:]), 3 * path.beta(t[1:]) / path.alpha(t[1:]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(shifted[jnp.array([0, -1])], [0, 1])
    assert (jnp.diff(shifted) > 0).all()
    np.testing.assert_array_equal(times.shift(t, 1.0), t)


@pytest.mark.parametrize("arguments", [(0,), (10, 1.0, 0.0), (10, 0.5, 0.5)])
def test_bad_grids_are_named(arguments):
    with pytest.raises(ValueError, match="A grid has at least one step and ends after it starts"):
        times.grid(*arguments)
