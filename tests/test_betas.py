"""Discrete-time diffusion as a path, its grids, and the step of a learnt variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import betas, guidance, marginals, paths, sampling, targets, times
from fmjax.sampling import variance

TABLES = {"linear": betas.linear(), "cosine": betas.cosine(), "short": betas.Betas((0.1, 0.3, 0.2, 0.9)), "one": betas.Betas((0.5,))}


@pytest.mark.parametrize("path", TABLES.values(), ids=TABLES)
def test_steps_are_the_products_of_the_table(path):
    kept = np.cumprod(1 - np.asarray(path.betas, np.float64))
    t = 1 - np.arange(1, len(path.betas) + 1) / len(path.betas)
    with jax.enable_x64(True):
        np.testing.assert_allclose(path.alpha(t), np.sqrt(kept), rtol=1e-9)
        np.testing.assert_allclose(path.beta(t), np.sqrt(1 - kept), rtol=1e-9)
    np.testing.assert_allclose(path.alpha(t.astype(np.float32)), np.sqrt(kept), rtol=1e-4, atol=1e-7)
    assert path.alpha(1.0) == 1
    assert path.beta(1.0) == 0


@given(st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=30))
@settings(max_examples=10, deadline=None)
def test_data_grow_between_any_steps_and_their_slope_is_continuous(table):
    path = betas.Betas(tuple(table))
    with jax.enable_x64(True):
        t = np.linspace(0, 1, 20 * len(table) + 1)
        signal = np.asarray(path._log_signal(t))
        assert (np.diff(signal) > 0).all()
        slope = jax.jvp(path._log_signal, (t,), (np.ones_like(t),))[1]
        near = 1e-9
        for knot in np.arange(1, len(table)) / len(table):
            before, after = (jax.jvp(path._log_signal, (knot + side,), (1.0,))[1] for side in (-near, near))
            np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
        assert np.isfinite(slope).all()


def test_many_betas_are_the_variance_preserving_path():
    path, limit = betas.linear(20_000), paths.VariancePreserving(0.1, 20.0)
    with jax.enable_x64(True):
        t = np.linspace(0.01, 0.99, 50)
        np.testing.assert_allclose(path.alpha(t), limit.alpha(t), rtol=2e-3, atol=1e-4)


def test_grids_are_those_of_respaced_diffusion():
    path = betas.linear()
    grid = betas.grid(path, 250)
    k = np.rint(1000 * (1 - np.asarray(grid, np.float64))).astype(int)
    # 999 / 249 = 4.012 per step.
    assert list(k[:3]) == [1000, 996, 992]
    assert list(k[-4:]) == [9, 5, 1, 0]
    assert len(k) == 251
    np.testing.assert_array_equal(betas.step_index(path, grid[:-1]), k[:-1] - 1)
    assert list(np.rint(1000 * (1 - betas.grid(path, range(0, 1000, 40))))[:2]) == [961, 921]
    np.testing.assert_array_equal(betas.step_index(path, betas.grid(path, 1000))[:-1], np.arange(999, -1, -1))
    assert betas.step_index(path, 1.0) == 0
    np.testing.assert_allclose(betas.step_index(path, 0.12345), 875.55, atol=1e-3)


@pytest.mark.parametrize("count", [21, 1000, 4000, 50_000])
def test_indices_of_whole_steps_are_whole(count):
    path = betas.linear(count)
    t = betas.grid(path, count)[:-1]
    for same in (t, jnp.asarray(t), jnp.asarray(1 - np.arange(count, 0, -1) / count)):
        np.testing.assert_array_equal(jax.jit(lambda t: betas.step_index(path, t))(same), np.arange(count - 1, -1, -1))
    between = 1 - (np.arange(1, count) + 0.5) / count
    np.testing.assert_allclose(betas.step_index(path, between), np.arange(1, count) - 0.5, atol=count * 2.0**-22)
    # Their derivatives are those of the time, which a flow map needs.
    slope = jax.jvp(lambda t: betas.step_index(path, t), (jnp.float32(1 - 5 / count),), (jnp.float32(1),))[1]
    assert slope == -count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_times_of_few_bits_are_no_steps(dtype):
    with pytest.raises(TypeError, match=r"t has dtype \w+, whose numbers are up to .* apart, but steps 0.001: give times as float32"):
        betas.step_index(betas.linear(), jnp.asarray(0.5, dtype))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: betas.Betas((0.1, 1.2)), "each above 0 and below 1"),
        (lambda: betas.Betas(()), "a table"),
        (lambda: betas.linear(10), "21"),
        (lambda: betas.grid(paths.Linear(), 10), "uniform_grid"),
        (lambda: betas.grid(betas.linear(), 1001), "at most as many"),
        (lambda: betas.grid(betas.linear(), [3, 2]), "increase"),
        (
            lambda: sampling.learned_variance(lambda x, t: x).step(paths.Cosine(), None, None, None, jnp.ones((1, 2)), 0.2, 0.1),
            "two arrays",
        ),
        (lambda: sampling.clip_data(paths.Linear(), lambda x, t: x, 1.0, 1.0), "above"),
        (lambda: guidance.channels(0), "count"),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_the_least_variance_is_that_of_the_ancestral_step():
    """v = -1 is the posterior's variance; v = 1 is larger by the squared ratio of the noise."""
    path, x = betas.linear(), jax.random.normal(jax.random.key(0), (4, 3))
    velocity = marginals.velocity(path, marginals.GaussianMixture(jnp.ones(2), jnp.array([[1.0, 0, 2], [0, -1, 0.5]]), 0.3))
    t, dt, key = jnp.float32(0.4), jnp.float32(0.004), jax.random.key(1)

    def step(v):
        made = sampling.learned_variance(lambda x, t: (velocity(x, t), jnp.full_like(x, v)))
        return made.step(path, velocity, None, key, x, t, dt)

    ancestral = sampling.ancestral.step(path, velocity, sampling.sigma_sbdm(path), key, x, t, dt)
    np.testing.assert_allclose(step(-1.0), ancestral, atol=2e-5)
    noise = sampling.noise(key, x.shape)
    rho = float(path.beta(t + dt) / path.alpha(t + dt) * path.alpha(t) / path.beta(t))
    for v, scale in ((-1.0, path.beta(t + dt)), (1.0, path.beta(t)), (0.0, jnp.sqrt(path.beta(t) * path.beta(t + dt)))):
        np.testing.assert_allclose(step(v) - step(-1.0), np.sqrt(1 - rho**2) * (scale - path.beta(t + dt)) * noise, atol=2e-6)


def test_a_learned_variance_samples_a_mixture():
    path = betas.linear()
    mixture = marginals.GaussianMixture(jnp.ones(2), jnp.array([[2.0], [-2.0]]), 0.5)
    velocity = marginals.velocity(path, mixture)
    step = sampling.learned_variance(lambda x, t: (velocity(x, t), jnp.zeros_like(x)))
    x_0 = jax.random.normal(jax.random.key(0), (4000, 1))

    @jax.jit
    def sample(key):
        return sampling.sample_diffusion(path, velocity, sampling.sigma_sbdm(path), key, x_0, betas.grid(path, 250), step=step)[0]

    x = np.asarray(sample(jax.random.key(1)))
    assert abs(np.abs(x).mean() - 2) < 0.03
    assert abs(np.std(np.abs(x)) - 0.5) < 0.03


def test_clipped_data_stay_in_range():
    path = paths.Cosine()
    velocity = targets.convert_field(path, lambda x, t: 3 * x, source=targets.data, target=targets.velocity)
    clipped = targets.convert_field(path, sampling.clip_data(path, velocity), source=targets.velocity, target=targets.data)
    x = jnp.linspace(-1, 1, 9)[:, None]
    np.testing.assert_allclose(clipped(x, 0.3), jnp.clip(3 * x, -1, 1), atol=1e-5)
    x_1, _ = sampling.sample_ode(sampling.clip_data(path, velocity), x, times.uniform_grid(20), step=sampling.ddim(path))
    np.testing.assert_allclose(x_1, jnp.sign(x), atol=1e-5)


def test_guided_channels_are_the_first_ones():
    guided, unguided = jnp.arange(8.0).reshape(2, 4), jnp.ones((2, 4))
    value = guidance.channels(3)(guided, unguided, 4.0)
    np.testing.assert_allclose(value[:, :3], guidance.extrapolate(guided, unguided, 4.0)[:, :3])
    np.testing.assert_array_equal(value[:, 3], guided[:, 3])
    with pytest.raises(ValueError, match="4 channels"):
        guidance.channels(5)(guided, unguided, 4.0)
    with pytest.raises(ValueError, match=r"scale has shape .*3\), but it multiplies x of shape .*4\)"):
        guidance.channels(2)(guided, unguided, jnp.ones((*(1,) * (guided.ndim - 1), 3)))


def test_a_step_to_data_adds_no_noise():
    path, x = betas.linear(), jnp.ones((2, 3))
    predict = lambda x, t: (jnp.zeros_like(x), jnp.ones_like(x))
    step = sampling.learned_variance(predict)
    ends = [step.step(path, None, None, jax.random.key(seed), x, jnp.float32(0.999), jnp.float32(0.001)) for seed in range(2)]
    np.testing.assert_array_equal(*ends)
    assert np.isfinite(ends[0]).all()
    assert variance.noise is sampling.noise
