"""Sampling: measured orders, distributions against the closed form, and draws that do not depend on the batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ORDERS, FlatEnds, errors_and_orders, mixture, name
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fmjax import marginals, paths, sampling, targets, times


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_orders(path, x64):
    errors, orders = errors_and_orders(path, lambda n: jnp.linspace(0, 1, n + 1), [step for step, _ in ORDERS])
    expected = {name(step): order for step, order in ORDERS}
    assert dict(zip(expected, orders, strict=True)) == pytest.approx(expected, abs=0.1), errors


def weighted_moments(data):
    mean = data.weights @ data.means
    centred = data.means - mean[None]
    return mean, jnp.einsum("k,ki,kj->ij", data.weights, centred, centred) + (data.weights @ data.scales**2) * jnp.eye(2)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "sigma",
    [0.0, 0.5, 1.0, 2.0, lambda t: 2 * paths.Linear().beta(t)],
    ids=["0", "0.5", "1", "2", "2 beta_t"],
)
def test_every_sigma_has_the_marginals_of_the_flow(sigma, fast_key):
    """Mean and covariance of 40,000 samples within 4 standard errors of the data's, from the velocity alone."""
    n, path, data = 40_000, paths.Linear(), mixture()
    drift = sampling.sde_drift(path, marginals.velocity(path, data), sigma)
    key_0, key_noise = jax.random.split(fast_key)
    # Steps shrink towards the data, where the score is steep.
    times = jnp.sin(jnp.linspace(0, jnp.pi / 2, 401))
    x = jax.jit(lambda key, x_0: sampling.sample_sde(drift, sigma, key, x_0, times)[0])(key_noise, jax.random.normal(key_0, (n, 2)))
    mean, covariance = weighted_moments(data)
    x, mean, covariance = (np.asarray(a, np.float64) for a in (x, mean, covariance))
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4 * np.sqrt(np.diag(covariance) / n))
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    np.testing.assert_array_less(np.abs(products.mean(0) - covariance), 4 * products.std(0) / np.sqrt(n))


def test_drifts_from_velocity_score_and_both_agree(key, x64):
    """The SDE extension from a velocity alone, a score alone and both, is one drift on the exact fields."""
    path, data, sigma = paths.Cosine(), mixture(), lambda t: 1 + t
    x, t = jax.random.normal(key, (9, 2)), jnp.linspace(0.1, 0.9, 9)
    u, s = marginals.velocity(path, data), marginals.score(path, data)
    both = sampling.sde_extension(u, s, sigma)(x, t)
    np.testing.assert_allclose(both, u(x, t) + (1 + t[:, None]) ** 2 / 2 * s(x, t), rtol=1e-12)
    np.testing.assert_allclose(sampling.sde_drift(path, u, sigma)(x, t), both, rtol=1e-9, atol=1e-9)
    from_score = targets.convert_field(path, s, source=targets.score, target=targets.velocity)
    np.testing.assert_allclose(sampling.sde_drift(path, from_score, sigma)(x, t), both, rtol=1e-9, atol=1e-9)
    # The notes' drift from a score alone, (beta^2 alpha' / alpha - beta' beta + sigma^2 / 2) s + alpha' / alpha x.
    alpha, beta, (d_alpha, d_beta) = path.alpha(t), path.beta(t), targets.velocity(path, t)
    printed = (beta**2 * d_alpha / alpha - d_beta * beta + (1 + t) ** 2 / 2)[:, None] * s(x, t) + (d_alpha / alpha)[:, None] * x
    np.testing.assert_allclose(both, printed, rtol=1e-9, atol=1e-9)


def test_sde_drift_evaluates_once_and_starts_at_noise(key):
    calls = []

    def field(x, t):
        calls.append(t)
        return -x

    drift = sampling.sde_drift(paths.Linear(), field, 1.0)(jax.random.normal(key, (3, 2)), 0.0)
    assert len(calls) == 1
    assert jnp.isfinite(drift).all()


def test_brownian_motion_has_independent_gaussian_increments(key):
    n = 20_000
    still = lambda x, t: jnp.zeros_like(x)
    times = jnp.linspace(0, 2, 41)
    _, states = jax.jit(lambda key: sampling.sample_sde(still, 1.0, key, jnp.zeros((n, 1)), times, save=lambda x, t: x))(key)
    w = np.asarray(states[:, :, 0])
    assert (w[0] == 0).all()
    variance = (w**2).mean(1)
    np.testing.assert_array_less(np.abs(variance[1:] - times[1:]), 4 * np.sqrt(2 / n) * times[1:])
    early, late = w[20] - w[0], w[40] - w[20]
    assert abs((early * late).mean()) < 4 * early.std() * late.std() / np.sqrt(n)
    assert abs((late**4).mean() / (late**2).mean() ** 2 - 3) < 4 * np.sqrt(24 / n)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_ornstein_uhlenbeck_reaches_its_variance(sigma, fast_key):
    n, theta = 20_000, 0.25
    times = jnp.linspace(0, 20, 1001)
    x = jax.jit(lambda key, x_0: sampling.sample_sde(lambda x, t: -theta * x, sigma, key, x_0, times)[0])(fast_key, jnp.full((n, 1), 3.0))
    # Its own, and what Euler-Maruyama with this step adds to first order.
    variance = sigma**2 / (2 * theta) * (1 - np.exp(-2 * theta * 20)) * (1 + theta * 0.02 / 2)
    assert abs(float(x.var()) - variance) < 4 * np.sqrt(2 / n) * variance
    assert abs(float(x.mean()) - 3 * np.exp(-theta * 20)) < 4 * np.sqrt(variance / n) + 1e-3


@pytest.mark.usefixtures("optimized")
def test_langevin_dynamics_reach_and_keep_their_mixture(fast_key):
    n, sigma = 20_000, 1.4
    data = marginals.GaussianMixture(jnp.array([0.3, 0.7]), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), jnp.array([0.7, 0.8]))
    score = marginals.score(paths.Linear(), data)
    drift = sampling.langevin(lambda x, t: score(x, 1.0), sigma)
    run = jax.jit(lambda key, x_0: sampling.sample_sde(drift, sigma, key, x_0, jnp.linspace(0, 12, 1201))[0])
    mean, covariance = weighted_moments(data)
    for key, x_0 in zip(jax.random.split(fast_key), (3 * jax.random.normal(fast_key, (n, 2)), data.sample(fast_key, n)), strict=True):
        x = np.asarray(run(key, x_0), np.float64)
        np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4 * np.sqrt(np.diag(covariance) / n))
        np.testing.assert_array_less(np.abs(np.cov(x.T) - covariance), 0.04)


def test_the_draws_of_an_example_do_not_depend_on_its_batch(key):
    shape = (64, 8, 8, 1)
    whole = sampling.noise(key, shape)
    np.testing.assert_array_equal(sampling.noise(key, (1, *shape[1:])), whole[:1])
    keys = jax.random.split(key, 64)
    np.testing.assert_array_equal(sampling.noise(keys[40:50], (10, *shape[1:])), sampling.noise(keys, shape)[40:50])

    def draw(drift, sigma, key, x, t, dt):
        return sampling.noise(key, x.shape)

    run = jax.jit(lambda key, x: sampling.sample_sde(lambda x, t: x, 1.0, key, x, jnp.linspace(0, 1, 4), step=draw, save=lambda x, t: x)[1])
    draws, draws_each = run(key, whole), run(keys, whole)
    np.testing.assert_array_equal(run(key, whole[:1]), draws[:, :1])
    np.testing.assert_array_equal(run(keys[7:8], whole[7:8]), draws_each[:, 7:8])
    for some in (draws[1:], draws_each[1:]):
        # No two of 12,288 draws were made from the same bits, up to the few that 23 random bits let coincide.
        assert len(np.unique(np.asarray(some))) > 0.998 * some.size


def test_noise_is_that_of_its_shape(key):
    """Drawn in rows, it is bit for bit what JAX draws for the shape."""
    for shape in ((3, 4, 5, 2), (4,), (2, 3)):
        np.testing.assert_array_equal(sampling.noise(key, shape), jax.random.normal(key, shape))
        keys = jax.random.split(key, shape[0])
        np.testing.assert_array_equal(sampling.noise(keys, shape), jax.vmap(lambda key, s=shape: jax.random.normal(key, s[1:]))(keys))


def test_draws_do_not_depend_on_the_number_of_devices(key):
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    shared = jax.jit(lambda key: sampling.noise(key, (64, 3)), out_shardings=sharding)(key)
    assert len(shared.sharding.device_set) == 8
    np.testing.assert_array_equal(shared, sampling.noise(key, (64, 3)))


def test_a_sample_agrees_within_rounding_in_any_batch(key):
    path, data = paths.Linear(), mixture()
    drift = sampling.sde_drift(path, marginals.velocity(path, data), 1.0)
    sample = jax.jit(lambda key, x_0: sampling.sample_sde(drift, 1.0, key, x_0, jnp.linspace(0, 1, 51))[0])
    x_0 = sampling.noise(jax.random.fold_in(key, 1), (64, 2))
    whole = sample(key, x_0)
    np.testing.assert_allclose(sample(key, x_0[:1]), whole[:1], rtol=1e-4, atol=1e-5)
    keys = jax.random.split(key, 64)
    np.testing.assert_allclose(sample(keys[32:], x_0[32:]), sample(keys, x_0)[32:], rtol=1e-4, atol=1e-5)


@given(steps=st.integers(1, 5), power=st.floats(0.5, 3.0))
@settings(deadline=None, max_examples=10)
def test_euler_on_any_grid_is_its_loop(steps, power):
    """Notes 003's algorithm, with the step that its loop leaves out."""
    times = np.linspace(0, 1, steps + 1) ** power
    x = np.array([[1.0, -2.0]], np.float32)
    x_1, saved = sampling.sample_ode(lambda x, t: -x * (1 + t), x, times, step=sampling.euler, save=lambda x, t: (x, t))
    for t, dt in zip(times[:-1], np.diff(times), strict=True):
        x = x + dt * (-x * (1 + t))
    np.testing.assert_allclose(x_1, x, rtol=1e-5)
    np.testing.assert_allclose(saved[1], times, atol=1e-6)
    assert saved[0].shape == (steps + 1, 1, 2)
    np.testing.assert_array_equal(saved[0][-1], x_1)
    np.testing.assert_array_equal(saved[0][0], [[1.0, -2.0]])


def test_one_trace_and_one_size_for_any_grid():
    """Steps are static, grids dynamic: ten times the steps, or another spacing, are the same program."""

    # Once for the checks and once in the scan, of each of three programs.
    @chex.assert_max_traces(n=6)
    def field(x, t):
        return -x

    @jax.jit
    def sample(x_0, times):
        return sampling.sample_ode(field, x_0, times, step=sampling.euler)[0]

    for spaced in (jnp.linspace(0, 1, 11), jnp.linspace(0, 1, 11) ** 2):
        sample(jnp.ones((2, 3)), spaced)
    sizes = [len(sample.lower(jnp.ones((2, 3)), jnp.linspace(0, 1, n + 1)).as_text()) for n in (10, 1000)]
    assert abs(sizes[1] - sizes[0]) < 50


def test_a_sampler_is_differentiable(key, x64):
    """The derivative of the whole scan with respect to a parameter of the field and to the start."""
    sample = lambda rate, x_0: sampling.sample_ode(lambda x, t: -rate * x, x_0, jnp.linspace(0, 1, 201), step=sampling.rk4)[0]
    x_0 = jax.random.normal(key, (3, 2))
    np.testing.assert_allclose(jax.jacfwd(sample)(0.7, x_0), -np.exp(-0.7) * x_0, rtol=1e-8)
    np.testing.assert_allclose(jax.grad(lambda x: sample(0.7, x).sum())(x_0), np.exp(-0.7), rtol=1e-8)


def test_state_is_float32_under_half_precision(key):
    x_0 = jax.random.normal(key, (4, 2), jnp.bfloat16)
    seen = []
    x_1, _ = sampling.sample_ode(lambda x, t: seen.append((x.dtype, t.dtype)) or (-x).astype(jnp.bfloat16), x_0, jnp.linspace(0, 1, 5))
    assert set(seen) == {(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))}
    assert x_1.dtype == jnp.bfloat16


def test_the_last_step_of_a_flow_may_be_another(key):
    """Heun's ended by Euler's evaluates nothing at data, where this path's velocity is infinite; the state stays in float32."""
    path, x_0, grid = paths.VariancePreserving(), jax.random.normal(key, (4, 2), jnp.bfloat16), jnp.linspace(0, 1, 6)
    field = marginals.velocity(path, mixture())
    with pytest.raises(ValueError, match=r"The velocity of VariancePreserving.* is infinite at t = 1: .*last=sampling.euler"):
        sampling.sample_ode(field, x_0, grid)
    save = lambda x, t: (x, t)
    x_1, (states, ts) = sampling.sample_ode(field, x_0, grid, last=sampling.euler, save=save, save_every=2)
    single = x_0.astype(jnp.float32)
    before = sampling.sample_ode(field, single, grid[:-1])[0]
    np.testing.assert_allclose(states[2], before, rtol=1e-5)
    np.testing.assert_allclose(states[3], before + (grid[5] - grid[4]) * field(before, grid[4]), rtol=1e-5)
    np.testing.assert_array_equal(x_1, states[3].astype(jnp.bfloat16))
    np.testing.assert_allclose(ts, grid[jnp.array([0, 2, 4, 5])], rtol=1e-6)

    drift = lambda x, t: -x
    whole = sampling.sample_sde(drift, 1.0, key, x_0, grid)[0]
    np.testing.assert_array_equal(sampling.sample_sde(drift, 1.0, key, x_0, grid, last=sampling.euler_maruyama)[0], whole)
    with pytest.raises(ValueError, match="times has one step, but there is another last step"):
        sampling.sample_ode(drift, x_0, grid[:2], last=sampling.euler)


x = jnp.zeros((4, 3))
grid = jnp.linspace(0, 1, 5)
same = lambda x, t: x


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (jnp.array([0.0, 0.5, 0.5, 1.0]), r"times must increase, but times\[1\] is 0.5 and times\[2\] is 0.5"),
        (np.array([0.0, 0.5, 0.5 + 1e-9, 1.0]), r"times\[1\] is 0.5 and times\[2\] is 0.5 in float32"),
        (jnp.linspace(1, 0, 5), r"times must increase, but times\[0\] is 1 and times\[1\] is 0.75"),
        (jnp.array([0.0, jnp.nan]), r"times must increase, but times\[0\] is 0 and times\[1\] is nan"),
        (jnp.array([0.0]), r"times has shape \(1,\), but a grid is one-dimensional with at least two times"),
        (jnp.zeros((2, 2)), r"times has shape \(2, 2\)"),
    ],
)
def test_bad_grids_are_named(times, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample_ode(same, x, times)
    with pytest.raises(ValueError, match=message):
        sampling.sample_sde(same, 1.0, jax.random.key(0), x, times)


def test_bad_input_is_named(key):
    with pytest.raises(ValueError, match=r"The field's output has shape \(4, 1\), but must be like x, \(4, 3\)"):
        sampling.sample_ode(lambda x, t: x[:, :1], x, grid)
    with pytest.raises(ValueError, match=r"The field's output has shape \(4, 1\)"):
        sampling.sample_sde(lambda x, t: x[:, :1], 1.0, key, x, grid)
    with pytest.raises(TypeError, match="x_0 has dtype int32"):
        sampling.sample_ode(same, jnp.zeros((4, 3), int), grid)
    with pytest.raises(TypeError, match=r"key has dtype int, but keys are typed: make one with jax\.random\.key"):
        sampling.sample_sde(same, 1.0, 0, x, grid)
    with pytest.raises(TypeError, match=r"keys are typed: make one with jax\.random\.key"):
        sampling.sample_sde(same, 1.0, jax.random.PRNGKey(0), x, grid)
    with pytest.raises(ValueError, match=r"key has shape \(3,\), but it must be one key, \(\), or one per example, \(4,\)"):
        sampling.sample_sde(same, 1.0, jax.random.split(key, 3), x, grid)
    with pytest.raises(TypeError, match="steps"):
        sampling.sample_ode(same, x, grid, steps=5)


def test_a_wide_sigma_does_not_widen_the_state(key, x64):
    for step in (sampling.euler_maruyama, sampling.stochastic_heun):
        for sigma in (np.float64(0.5), lambda t: jnp.float64(0.5)):
            end, _ = sampling.sample_sde(same, sigma, key, x.astype(jnp.float32), jnp.linspace(0, 1, 3, dtype=jnp.float32), step=step)
            assert end.dtype == jnp.float32


def test_keys_of_any_generator_draw_alone_what_they_draw_together():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    np.testing.assert_array_equal(sampling.noise(keys, (4, 3))[2:], sampling.noise(keys[2:], (2, 3)))


def test_steps_of_another_kind_and_makers_that_were_not_called_are_named(key):
    path = paths.Linear()
    flow = lambda step: sampling.sample_ode(same, x, grid, step=step)
    sde = lambda step: sampling.sample_sde(same, 1.0, key, x, grid, step=step)
    diffusion = lambda step: sampling.sample_diffusion(path, same, 1.0, key, x, grid, step=step)
    for follow, step, message in (
        (flow, sampling.unipc, r"step is unipc\(path, order.*a function that makes a step is called first"),
        (flow, "heun", r"step is 'heun', but it is a function \(field, x, t, dt\) -> x, such as sampling.heun"),
        (flow, sampling.euler_maruyama, r"step is euler_maruyama\(drift.*steps with noise are for sample_diffusion and sample_sde"),
        (sde, sampling.heun, r"step is heun\(field, x, t, dt\)"),
        (sde, sampling.ancestral, r"DiffusionStep\(ancestral\), which knows a path: give it to sample_diffusion"),
        (sde, sampling.churn(), r"DiffusionStep\(churn\), which knows a path"),
        (diffusion, sampling.churn, "a function that makes a step is called first"),
        (diffusion, sampling.heun, r"step is heun\(field, x, t, dt\)"),
    ):
        with pytest.raises(TypeError, match=message):
            follow(step)
    with pytest.raises(TypeError, match=r"path is .*Linear.* which is a class: make one with Linear\(\)"):
        sampling.sample_diffusion(paths.Linear, same, 1.0, key, x, grid)


def test_a_sigma_that_is_none_is_named(key):
    for sigma, error, message in (
        ("by_noise", TypeError, "sigma is 'by_noise', but it is a number or a function of t"),
        (-1.0, ValueError, "sigma is -1.0, but it is at least 0"),
        (jnp.nan, ValueError, "sigma is nan"),
        (jnp.ones(4), ValueError, r"sigma has shape \(4,\), but it is one number for the whole batch"),
        (lambda t: jnp.ones(4), ValueError, r"sigma has shape \(4,\)"),
    ):
        with pytest.raises(error, match=message):
            sampling.sample_sde(same, sigma, key, jnp.zeros((4, 4)), grid)
        with pytest.raises(error, match=message):
            sampling.sample_diffusion(paths.Linear(), same, sigma, key, jnp.zeros((4, 4)), grid)


def test_a_drift_that_multiplies_errors_is_warned_of(key):
    """On a path that comes to rest at data, where a learnt velocity's samples are lost (results/orders.json); its cures are silent."""
    follow = lambda sigma, **more: sampling.sample_diffusion(FlatEnds(), same, sigma, key, x, times.uniform_grid(100, 0.01), **more)[0]
    with pytest.warns(UserWarning, match=r"At t = 0.9901 one step .* multiplies .* by 4\.2e\+02, since sigma is 1 .*sampling.ancestral"):
        follow(1.0, step=sampling.euler_maruyama)
    with pytest.warns(UserWarning, match="one step of the drift multiplies"):
        jax.jit(lambda: follow(1.0, step=sampling.predictor_corrector(sampling.euler_maruyama)))()
    follow(1.0)
    follow(sampling.sigma_beta(FlatEnds()), step=sampling.euler_maruyama)


def test_a_field_of_a_time_per_example_is_told_the_cure():
    """As a network trained on times (B,) may be, that indexes t[:, None]."""

    def network(x, t):
        return x * t[:, None]

    with pytest.raises(TypeError, match=r"one time per example, \(B,\), but samplers give one time .* jnp.broadcast_to\(t, x.shape"):
        sampling.sample_ode(network, x, grid)
    cured = lambda x, t: network(x, jnp.broadcast_to(t, x.shape[:1]))
    assert jnp.isfinite(sampling.sample_ode(cured, x, grid)[0]).all()
    with pytest.raises(ZeroDivisionError):
        sampling.sample_ode(lambda x, t: 1 // 0, x, grid)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine(), paths.SquareRoot(), paths.VariancePreserving()], ids=name)
@pytest.mark.parametrize("source", [targets.noise, targets.score, targets.data], ids=name)
def test_default_calls_are_finite_or_say_why(path, source, compiled, key):
    """Predictions that say nothing of the velocity at an end of the path, where the default step evaluates."""
    exact = targets.convert_field(path, marginals.velocity(path, mixture()), source=targets.velocity, target=source)
    field = targets.convert_field(path, exact, source=source, target=targets.velocity)
    follow = lambda x_0, times, **how: sampling.sample_ode(field, x_0, times, **how)[0]
    x_0 = sampling.noise(key, (8, 2))
    whole = times.uniform_grid(20)
    run = (lambda **how: jax.jit(lambda x_0: follow(x_0, whole, **how))(x_0)) if compiled else (lambda **how: follow(x_0, whole, **how))
    with pytest.raises(ValueError, match=r"at t = [01]\b.*(let the grid|evaluate nothing)"):
        run()
    if compiled:
        return
    inner = times.uniform_grid(20, start=1e-3, end=0.999)
    assert jnp.isfinite(follow(x_0, inner)).all()
    assert jnp.isfinite(follow(x_0, times.uniform_grid(20, start=1e-3), last=sampling.euler)).all()


def test_sde_steps_that_would_meet_what_is_infinite_say_so(key):
    path = paths.Linear()
    velocity = marginals.velocity(path, mixture())
    follow = lambda sigma, **how: sampling.sample_diffusion(path, velocity, sigma, key, jnp.zeros((3, 2)), times.uniform_grid(9), **how)[0]
    with pytest.raises(ValueError, match=r"the score does not follow from the velocity at t = 1"):
        follow(1.0, step=sampling.stochastic_heun)
    with pytest.raises(ValueError, match=r"sigma is inf at t = 0.*take a step that knows the path, such as sampling.ancestral"):
        follow(sampling.sigma_sbdm(path), step=sampling.euler_maruyama)
    assert jnp.isfinite(follow(1.0, step=sampling.stochastic_heun, last=sampling.euler_maruyama_noiseless)).all()
    assert jnp.isfinite(follow(sampling.sigma_sbdm(path))).all()
    points = marginals.velocity(path, marginals.Empirical(jnp.ones((2, 2))))
    with pytest.raises(ValueError, match=r"The velocity of Linear.* to these data is infinite at t = 1"):
        sampling.sample_ode(points, jnp.zeros((3, 2)), times.uniform_grid(9))


def test_states_are_batches(key):
    for bad in (jnp.zeros(3), jnp.zeros(()), jnp.zeros((0, 2)), jnp.zeros((3, 0))):
        with pytest.raises(ValueError, match=r"x_0 has shape .*, but arrays are batch first, \(B, ...\): for one example give x_0\[None\]"):
            sampling.sample_ode(same, bad, grid)
        with pytest.raises(ValueError, match="x_0 has shape"):
            sampling.sample_sde(same, 1.0, key, bad, grid)
