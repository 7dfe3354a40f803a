"""Paths: the notes' closed forms, the ends, and what a path may be used for."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, PATHS, VarianceExploding, name
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import betas, losses, paths

each_path = pytest.mark.parametrize("path", PATHS, ids=name)


def draws(key, shape=(5, 4, 4, 3), dtype=None):
    key_0, key_1, key_t = jax.random.split(key, 3)
    t = jax.random.uniform(key_t, shape[:1], minval=0.05, maxval=0.95)
    return jax.random.normal(key_0, shape, dtype), jax.random.normal(key_1, shape, dtype), t


@pytest.mark.parametrize("path", [path for path in PATHS if not isinstance(path, VarianceExploding)], ids=name)
def test_ends_are_noise_and_data(path):
    zero, one = jnp.zeros(()), jnp.ones(())
    trace_of_data = {paths.VariancePreserving: 0.0066, betas.Betas: 0.00635}.get(type(path), 0)
    np.testing.assert_allclose(path.alpha(zero), trace_of_data, atol=1e-4)
    np.testing.assert_allclose(path.beta(zero), getattr(path, "scale", 1), atol=1e-4)
    assert path.alpha(one) == 1
    assert path.beta(one) == 0


@each_path
def test_schedules_are_monotonic(path):
    t = jnp.linspace(0, 1, 101)
    assert (jnp.diff(path.alpha(t)) >= 0).all()
    assert (jnp.diff(path.beta(t)) <= 0).all()


@each_path
def test_interpolate_is_alpha_data_plus_beta_noise(path, key, x64):
    x_0, x_1, t = draws(key)
    expected = np.stack([path.alpha(t[i]) * x_1[i] + path.beta(t[i]) * x_0[i] for i in range(5)])
    np.testing.assert_allclose(paths.interpolate(path, x_0, x_1, t), expected, rtol=1e-14)
    np.testing.assert_allclose(paths.interpolate(path, x_0, x_1, 0.3)[1], path.alpha(0.3) * x_1[1] + path.beta(0.3) * x_0[1], rtol=1e-14)


@each_path
def test_flow_is_the_time_derivative(path, key, x64):
    x_0, x_1, t = draws(key)
    x_t, u_t = paths.flow(path, x_0, x_1, t)
    h = 1e-5
    difference = (paths.interpolate(path, x_0, x_1, t + h) - paths.interpolate(path, x_0, x_1, t - h)) / (2 * h)
    np.testing.assert_array_equal(x_t, paths.interpolate(path, x_0, x_1, t))
    np.testing.assert_allclose(u_t, difference, rtol=1e-6, atol=1e-6)


CLOSED_FORMS = {
    "Linear": lambda t: (t, 1 - t, 1.0, -1.0),
    "Cosine": lambda t: (
        np.sin(np.pi * t / 2),
        np.cos(np.pi * t / 2),
        np.pi / 2 * np.cos(np.pi * t / 2),
        -np.pi / 2 * np.sin(np.pi * t / 2),
    ),
    "Polynomial": lambda t: (t**3, 1 - t**3, 3 * t**2, -3 * t**2),
    "SquareRoot": lambda t: (t, np.sqrt(1 - t), 1.0, -0.5 / np.sqrt(1 - t)),
}


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine(), paths.Polynomial(3.0), paths.SquareRoot()], ids=name)
def test_conditional_velocity_and_score_are_the_notes(path, key, x64):
    x, z, t = draws(key)
    alpha, beta, d_alpha, d_beta = (
        np.reshape(np.broadcast_to(value, t.shape), (-1, 1, 1, 1)) for value in CLOSED_FORMS[type(path).__name__](np.asarray(t))
    )
    velocity = (d_alpha - d_beta / beta * alpha) * z + d_beta / beta * x
    score = -(x - alpha * z) / beta**2
    np.testing.assert_allclose(paths.conditional_velocity(path, x, z, t), velocity, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(paths.conditional_score(path, x, z, t), score, rtol=1e-12, atol=1e-12)


@each_path
def test_conditional_velocity_follows_the_path(path, key, x64):
    x_0, x_1, t = draws(key)
    x_t, u_t = paths.flow(path, x_0, x_1, t)
    np.testing.assert_allclose(paths.conditional_velocity(path, x_t, x_1, t), u_t, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(paths.conditional_score(path, x_t, x_1, t), -x_0 / path.beta(paths.lift(t, x_0)), rtol=1e-9, atol=1e-9)


@each_path
def test_conditional_score_is_the_gradient_of_the_log_density(path, key, x64):
    x, z, t = draws(key, (3, 2))

    def log_density(x, z, t):
        alpha, beta = path.alpha(t), path.beta(t)
        return jax.scipy.stats.norm.logpdf(x, alpha * z, beta).sum()

    np.testing.assert_allclose(paths.conditional_score(path, x, z, t), jax.vmap(jax.grad(log_density))(x, z, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("path", BOUNDED, ids=name)
def test_velocity_and_loss_are_finite_at_both_ends(path, dtype, key):
    x_0, x_1, _ = draws(key, (4, 3), dtype)
    for t in (0, 1.0, jnp.array([0.0, 1.0, 0.0, 1.0])):
        x_t, u_t = paths.flow(path, x_0, x_1, t)
        loss = losses.flow_matching(lambda x, t: x, path, x_0, x_1, t)
        assert x_t.dtype == u_t.dtype == dtype
        assert loss.dtype == jnp.float32
        chex.assert_tree_all_finite((x_t, u_t, loss))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("path", [paths.VariancePreserving(), paths.SquareRoot()], ids=name)
def test_velocity_of_a_path_with_an_infinite_end_is_finite_before_it(path, dtype, key):
    x_0, x_1, _ = draws(key, (4, 3), dtype)
    chex.assert_tree_all_finite(
        (paths.flow(path, x_0, x_1, 0.0), paths.flow(path, x_0, x_1, 1 - 1e-3), paths.interpolate(path, x_0, x_1, 1.0))
    )
    assert not jnp.isfinite(paths.flow(path, x_0, x_1, 1.0)[1]).any()


def test_half_precision_is_interpolated_in_float32(key):
    x_0, x_1, t = draws(key, (64, 8), jnp.bfloat16)
    exact = paths.interpolate(paths.Linear(), x_0.astype(jnp.float32), x_1.astype(jnp.float32), t)
    np.testing.assert_array_equal(paths.interpolate(paths.Linear(), x_0, x_1, t), exact.astype(jnp.bfloat16))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batched=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@settings(deadline=None, max_examples=30)
def test_lift_multiplies_any_example(shape, batched, dtype):
    x = np.ones(shape, dtype)
    t = np.linspace(0, 1, shape[0], dtype=np.float32) if batched else 0.5
    lifted = np.asarray(paths.lift(t, jnp.asarray(x)))
    assert lifted.dtype == jnp.float32
    assert (lifted * x).shape == x.shape
    np.testing.assert_allclose((lifted * x).reshape(shape[0], -1)[:, 0], t if batched else [0.5] * shape[0])


@each_path
def test_a_path_is_a_value(path):
    again = type(path)(**vars(path))
    assert again == path
    assert hash(again) == hash(path)
    assert pickle.loads(pickle.dumps(path)) == path
    assert jax.tree.unflatten(jax.tree.structure(path), jax.tree.leaves(path)) == path


@pytest.mark.parametrize("path", [each for each in PATHS if "VarianceExploding" not in name(each)], ids=name)
def test_numbers_of_numpy_are_numbers(path):
    """They leave the times their dtype, and the path what it is."""
    again = type(path)(**{key: np.float64(value) if isinstance(value, float) else value for key, value in vars(path).items()})
    assert again == path
    for schedule in (again.alpha, again.beta):
        assert schedule(jnp.bfloat16(0.3)).dtype == jnp.bfloat16


def test_more_noise_is_of_a_path():
    for wrong in (3, "linear", None, paths.Linear, [paths.Linear()]):
        with pytest.raises(TypeError, match=r"path is .*(a path is an object with alpha|a pytree)"):
            paths.ScaledNoise(wrong, 2.0)
    x = {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 1))}
    with pytest.raises(TypeError, match="path is joint, of several leaves: scale the noise of each"):
        paths.ScaledNoise(paths.joint(paths.Linear(), x), 2.0)


def test_a_rebuilt_path_costs_no_trace(key):
    x_0, x_1, t = draws(key, (4, 2))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def velocity(path):
        return paths.flow(path, x_0, x_1, t)[1]

    for rate in (10.0, 15.0, 20.0):
        velocity(paths.VariancePreserving(0.1, rate))


def test_a_path_maps_and_differentiates_over_its_numbers(key, x64):
    x_0, x_1, t = draws(key, (4, 2))
    powers = jnp.array([1.0, 2.0, 3.0])
    mapped = jax.vmap(lambda power: paths.interpolate(paths.Polynomial(power), x_0, x_1, t))(powers)
    for i, power in enumerate(powers):
        np.testing.assert_allclose(mapped[i], paths.interpolate(paths.Polynomial(float(power)), x_0, x_1, t), rtol=1e-12)
    gradient = jax.grad(lambda path: paths.interpolate(path, x_0, x_1, t).sum())(paths.Polynomial(2.0))
    expected = ((x_1 - x_0).sum(1) * t**2 * jnp.log(t)).sum()
    np.testing.assert_allclose(gradient.power, expected, rtol=1e-12)


x = jnp.zeros((4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x, x, jnp.zeros(3)), ValueError, r"t has shape \(3,\).*one time per example, \(4,\)"),
        ((x, x, jnp.zeros((4, 1))), ValueError, r"t has shape \(4, 1\)"),
        ((x, x, jnp.arange(4)), TypeError, "t has dtype int32.*not step numbers"),
        ((x, x, 1j), TypeError, "t has dtype complex"),
        ((x, jnp.zeros((4, 2)), 0.5), ValueError, r"x_0 has shape \(4, 3\).*like x, \(4, 2\)"),
        ((jnp.zeros((1, 3)), x, 0.5), ValueError, r"x_0 has shape \(1, 3\)"),
        ((x, jnp.zeros((4, 3), jnp.uint8), 0.5), TypeError, r"x_1 has dtype uint8.*floats in \[-1, 1\]"),
        ((jnp.zeros((4, 3), int), x, 0.5), TypeError, "x_0 has dtype int32"),
        ((x, jnp.zeros((4, 3), complex), 0.5), TypeError, "x_1 has dtype complex64"),
    ],
)
@pytest.mark.parametrize("function", [paths.interpolate, paths.flow])
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(paths.Linear(), *arguments)


@pytest.mark.parametrize("function", [paths.conditional_velocity, paths.conditional_score])
def test_bad_state_is_named(function):
    with pytest.raises(ValueError, match=r"x has shape \(4, 1\)"):
        function(paths.Linear(), jnp.zeros((4, 1)), x, 0.5)
    with pytest.raises(TypeError, match="x has dtype int32"):
        function(paths.Linear(), jnp.zeros((4, 3), int), x, 0.5)


@each_path
def test_time_from_signal_fraction_inverts_it(path, key, x64):
    t = jnp.concatenate([jax.random.uniform(key, (50,), minval=1e-4, maxval=1 - 1e-4), jnp.array([1.0])])
    signal = path.alpha(t) / (path.alpha(t) + path.beta(t))
    found = paths.time_from_signal_fraction(path, signal)
    np.testing.assert_allclose(path.alpha(found) / (path.alpha(found) + path.beta(found)), signal, atol=1e-12)
    np.testing.assert_allclose(found, t, atol=1e-9)
    # Its derivatives are the inverse's.
    fraction, inverse = lambda t: path.alpha(t) / (path.alpha(t) + path.beta(t)), lambda s: paths.time_from_signal_fraction(path, s)
    both = lambda f: jax.vmap(lambda t: (jax.grad(f)(t), jax.grad(jax.grad(f))(t)))
    (slope, bend), (found_slope, found_bend) = jax.jit(lambda t, s: (both(fraction)(t), both(inverse)(s)))(t[:-1], signal[:-1])
    np.testing.assert_allclose(found_slope, 1 / slope, rtol=1e-6)
    np.testing.assert_allclose(found_bend, -bend / slope**3, rtol=1e-6, atol=1e-9)


@each_path
def test_time_at_keeps_to_the_path_and_to_single_precision(path):
    assert paths.time_from_signal_fraction(path, 1.0) == 1
    assert 0 <= paths.time_from_signal_fraction(path, 0.0) < 1e-3
    t = jnp.linspace(0.05, 0.95, 31)
    np.testing.assert_allclose(paths.time_from_signal_fraction(path, path.alpha(t) / (path.alpha(t) + path.beta(t))), t, atol=3e-5)


def test_lipmans_path_keeps_its_noise_at_data():
    path = paths.Lipman(0.1)
    np.testing.assert_allclose((path.alpha(1.0), path.beta(1.0), path.alpha(0.0), path.beta(0.0)), (1, 0.1, 0, 1), rtol=1e-6)
    t = jnp.array([0.3, 1.0])
    x_0, x_1 = jnp.ones((2, 1)), jnp.full((2, 1), 3.0)
    # u_t(x | x_1) = (x_1 - (1 - sigma) x) / (1 - (1 - sigma) t), eq. 21 of Lipman et al. 2023.
    x = paths.interpolate(path, x_0, x_1, t)
    np.testing.assert_allclose(paths.conditional_velocity(path, x, x_1, t), (x_1 - 0.9 * x) / (1 - 0.9 * t[:, None]), rtol=1e-5)
    np.testing.assert_allclose(paths.interpolate(paths.Lipman(0.0), x_0, x_1, t), paths.interpolate(paths.Linear(), x_0, x_1, t), rtol=1e-6)
