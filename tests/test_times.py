"""Times: densities by their distribution functions, grids by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import PATHS, VarianceExploding, mixture, name
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import marginals, paths, sampling, times


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
    assert abs(np.corrcoef(t[:-1], t[1:])[0, 1]) < 4 / np.sqrt(4_000)


@given(n=st.sampled_from([1, 2, 7, 100, 257]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_stratified_times_fill_every_interval(n, seed):
    place = np.sort(times.stratified(jax.random.key(seed), n)).astype(np.float64) * n - np.arange(n)
    assert (place > -1e-4).all()
    assert (place < 1 + 1e-4).all()


@given(steps=st.integers(1, 100), start=st.floats(0, 0.4), end=st.floats(0.6, 1))
@settings(deadline=None, max_examples=20)
def test_grid_is_uniform(steps, start, end):
    grid = times.uniform_grid(steps, start, end)
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
    with pytest.raises(ValueError, match=r"steps=0, but the grid has at least one step|A grid ends after it starts"):
        times.uniform_grid(*arguments)


@pytest.mark.parametrize("warp", [times.cosine, times.quadratic])
def test_warps_keep_ends_and_order(warp):
    t = warp(jnp.linspace(0, 1, 101))
    np.testing.assert_allclose(t[jnp.array([0, -1])], [0, 1], atol=1e-7)
    assert (jnp.diff(t) > 0).all()
    # Steps shrink towards data by the square.
    np.testing.assert_allclose((1 - t[-2]) / (1 - t[-3]), 0.25, rtol=1e-2)


def test_cosine_is_symmetric_and_quadratic_is_its_formula():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(times.cosine(t) + times.cosine(1 - t), 1, atol=1e-6)
    np.testing.assert_allclose(times.quadratic(t), t * (2 - t), atol=1e-6)
    assert times.resolution_factor(512**2, 256**2) == 2


@pytest.mark.parametrize("path", [*PATHS[:4], paths.VariancePreserving(0.1, 40.0)], ids=name)
def test_karras_levels(path, x64):
    """EDM's formula for the noise levels, at the path's own times, and data at the end."""
    grid, n = times.karras(path, 10), 10
    assert grid.shape == (11,)
    assert (jnp.diff(grid) > 0).all()
    levels = path.beta(grid) / path.alpha(grid)
    i = np.arange(n)
    printed = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels[:-1], printed, rtol=1e-6)
    np.testing.assert_allclose(grid[-1], 1, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_log_snr_steps_are_equal(path, x64):
    grid = times.log_snr_grid(path, 12, 0.05, 0.98)
    np.testing.assert_array_equal(grid[jnp.array([0, -1])], [0.05, 0.98])
    steps = jnp.diff(jnp.log(path.alpha(grid) / path.beta(grid)))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_an_optimized_grid_errs_less(key):
    """On a mixture's field, with eight steps of Euler and of a multistep method."""
    path = paths.Linear()
    field, x_0 = marginals.velocity(path, mixture()), jax.random.normal(key, (256, 2))
    fine = sampling.sample_ode(field, x_0, times.uniform_grid(200), step=sampling.rk4)[0]
    for step in (sampling.euler, sampling.adams_bashforth(2)):
        error = lambda grid, step=step: ((sampling.sample_ode(field, x_0, grid, step=step)[0] - fine) ** 2).mean()
        grid = times.optimize_grid(error, times.uniform_grid(8), iterations=50)
        assert grid.shape == (9,)
        np.testing.assert_allclose(grid[jnp.array([0, -1])], [0, 1])
        assert (jnp.diff(grid) > 0).all()
        assert error(grid) < error(times.uniform_grid(8))


def test_an_optimized_grid_is_the_best(x64):
    """Of Euler's method for a velocity of time alone: the left Riemann sum is stationary in every inner time."""
    x_0, u, slope = jnp.zeros((1, 1)), lambda t: 3 * t**2, lambda t: 6 * t
    error = lambda grid: (sampling.sample_ode(lambda x, t: u(t) + 0 * x, x_0, grid, step=sampling.euler)[0][0, 0] - 1) ** 2
    t = times.optimize_grid(error, times.uniform_grid(6))
    np.testing.assert_allclose(slope(t[1:-1]) * jnp.diff(t)[1:], u(t[1:-1]) - u(t[:-2]), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: times.karras(paths.Linear(), 1), "steps=1, but the grid has at least 2 steps"),
        (lambda: times.karras(paths.Linear(), 5, 2.0, 1.0), "sigma_min is 2.0 and sigma_max 1.0, but"),
        (lambda: times.karras(paths.VariancePreserving(), 5, sigma_max=1e6), r"The first noise level is 1e\+06, but the path starts at 1"),
        (lambda: times.log_snr_grid(paths.Linear(), 5, 0.0, 1.0), r"log\(alpha / beta\) is -inf at t = 0.0 and inf at t = 1.0"),
        (lambda: times.optimize_grid(lambda grid: grid.sum(), [0.0, 1.0, 0.5]), "first must increase"),
        (lambda: times.optimize_grid(lambda grid: 0 * grid.sum(), [0.0, 0.5, 1.0]), "is not a positive finite number"),
    ],
)
def test_bad_grids_of_a_path_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_path_reaches_its_own_first_level():
    """Rounded otherwise as a noise level than as a signal, whatever the level."""
    for scale in (80.0, 3.0, 0.7, 12.3, 1e3):
        path = VarianceExploding(scale)
        grid = times.karras(path, 12, sigma_max=scale)
        assert grid[0] == 0
        assert grid[-1] == 1
        assert (jnp.diff(grid) > 0).all()


def test_logit_normal_times_lie_inside():
    t = times.logit_normal(jax.random.key(0), 10_000, mean=0.0, std=40.0)
    assert t.min() > 0
    assert t.max() < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: times.uniform_grid(10, end=jnp.nan), "end is nan, but it is the last time: one finite number"),
        (lambda: times.uniform_grid(10, start=-jnp.inf), "start is -inf, but"),
        (lambda: times.uniform_grid(2.5), "steps=2.5, but the grid has at least one step, a whole number"),
        (lambda: times.karras(paths.Linear(), 10, sigma_max=jnp.inf), "sigma_max is inf, but it is a noise level"),
        (lambda: times.karras(paths.Linear(), 10, sigma_min=jnp.nan), "sigma_min is nan"),
        (lambda: times.karras(paths.Linear(), 10, rho=0.0), "rho is 0.0, but"),
        (lambda: times.shift(jnp.linspace(0, 1, 3), 0.0), "factor is 0.0, but .* one finite number above 0"),
        (lambda: times.shift(jnp.linspace(0, 1, 3), jnp.nan), "factor is nan"),
        (lambda: times.resolution_factor(0, 4), "size is 0, but it is a count of numbers in an image"),
        (lambda: times.logit_normal(jax.random.key(0), 4, std=jnp.nan), "std is nan, but it is the standard deviation"),
        (lambda: paths.time_from_signal_fraction(paths.Linear(), jnp.nan), "The signal is nan, but"),
        (lambda: paths.time_from_signal_fraction(paths.Linear(), 1.5), "The signal is 1.5, but"),
    ],
)
def test_numbers_that_make_no_grid_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine(), paths.VariancePreserving(0.1, 30.0)], ids=repr)
def test_log_normal_is_edms_density(path, key):
    """Of ln sigma = ln(beta / alpha), N(-1.2, 1.2^2)."""
    t = times.log_normal(key, 4_000, path)
    level = np.log(np.asarray(path.beta(t)) / np.asarray(path.alpha(t)))
    assert abs(level.mean() + 1.2) < 4 * 1.2 / np.sqrt(4_000)
    assert abs(level.std() - 1.2) < 4 * 1.2 / np.sqrt(8_000)
    assert abs(np.mean(level < 0) - 0.8413) < 0.025
