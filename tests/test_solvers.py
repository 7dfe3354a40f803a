"""Solvers: measured orders, polynomials that they must integrate exactly, published formulas, and marginals for any noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, NOISY_STEPS, PATH_ORDERS, PATHS, SIGMAS, errors_and_orders, mixture, name

from fmjax import marginals, paths, sampling, targets, times
from fmjax.sampling import reparametrisation, steps


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_orders(path, x64):
    """On grids whose steps shrink towards noise and data."""
    makers = {solver: make(path) for solver, (make, _) in PATH_ORDERS.items()}
    errors, orders = errors_and_orders(path, lambda n: times.cosine(jnp.linspace(0, 1, n + 1)), makers.values())
    expected = {solver: order for solver, (_, order) in PATH_ORDERS.items()}
    assert dict(zip(makers, orders, strict=True)) == pytest.approx(expected, abs=0.15), errors


def test_orders_on_equal_steps(x64):
    """Kept to the last step, where the expected data come to rest; polynomials in c lose there."""
    path = paths.Linear()
    makers = [(sampling.dpm_solver_pp, 2), (sampling.dpm_solver_pp, 3), (sampling.deis, 2)]
    steps = [make(path, values) for make, values in makers]
    in_c = [make(path, values, variable=reparametrisation.linear_time) for make, values in makers]
    errors, orders = errors_and_orders(path, times.uniform_grid, [*steps, *in_c])
    assert list(orders[:3]) == pytest.approx([2, 3, 2], abs=0.15), errors
    assert (errors[:3, 1] < errors[3:, 1] / 1.5).all(), errors


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_order_of_edm_heun(path, x64):
    grid = lambda n: times.karras(path, n, sigma_min=0.02, sigma_max=20.0)[:-1]
    errors, orders = errors_and_orders(path, grid, [sampling.edm_heun(path)])
    assert list(orders) == pytest.approx([2], abs=0.15), errors


def counted(calls):
    def field(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x * t

    return field


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        *[(PATH_ORDERS[solver][0](paths.Linear()), 8) for solver in PATH_ORDERS if solver != "adams_bashforth 4"],
        (sampling.adams_bashforth(4), 12),
        (sampling.edm_heun(paths.Linear()), 15),
    ],
    ids=[*[solver for solver in PATH_ORDERS if solver != "adams_bashforth 4"], "adams_bashforth 4", "edm_heun"],
)
def test_evaluations(step, expected):
    calls = []
    sampling.sample_ode(counted(calls), jnp.ones((1, 2)), jnp.linspace(0.1, 1, 9), step=step)[0].block_until_ready()
    jax.effects_barrier()
    assert len(calls) == expected
    assert max(calls) < 1 or step is None


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda path, order: sampling.adams_bashforth(order), "slope"),
        (sampling.dpm_solver_pp, "data"),
        (sampling.unipc, "data"),
        (sampling.deis, "noise"),
        (functools.partial(sampling.dpm_solver_pp, variable=sampling.log_snr), "data, log_ratio"),
    ],
    ids=["adams_bashforth", "dpm_solver_pp", "unipc", "deis", "dpm_solver_pp log_ratio"],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_are_integrated_exactly(make, held, order, x64):
    """Where what a method holds is a polynomial of lower degree in its variable, the only error is that of the first steps."""
    path = paths.Linear()
    variables = {
        "slope": lambda t: t,
        "data": lambda t: (1 - t) ** 2,
        "noise": lambda t: t**2,
        "data, log_ratio": lambda t: jnp.log(t / (1 - t)),
    }
    variable = variables[held]
    first = variable(jnp.asarray(0.1))
    value = lambda t: 1.5 + 0.7 * (variable(t) - first) ** (order - 1) if order > 1 else 1.5 + 0 * t

    def field(x, t):
        if held == "slope":
            return value(t) + 0 * x
        return (x - value(t)) / t if held == "noise" else (value(t) - x) / (1 - t)

    grid = 0.1 + 0.8 * jnp.linspace(0, 1, 9) ** 1.3
    x = jnp.array([[0.3, -2.0]])
    saved = sampling.sample_ode(field, x, grid, step=make(path, order), save=lambda x, t: x)[1]
    # From a state after the start, the rest is exact: the memory is of exact values, which depend on t alone.
    begin = order + 1
    exact = jax.jit(lambda x, times: sampling.sample_ode(field, x, times, step=sampling.rk4)[0])
    for i in range(begin, 8):
        fine = grid[i] + (grid[i + 1] - grid[i]) * jnp.linspace(0, 1, 201)
        np.testing.assert_allclose(saved[i + 1], exact(saved[i], fine), rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_without_memory_they_are_ddim(path, key, x64):
    """Order 1 of every exponential method, and the ancestral step without noise, hold data and noise; on the linear path so does Euler."""
    field, x_0 = marginals.velocity(path, mixture()), jax.random.normal(key, (5, 2))
    grid = jnp.linspace(0.05, 0.95, 7)

    @jax.jit
    def found():
        ours = [sampling.sample_ode(field, x_0, grid, step=make(path, 1))[0] for make in (sampling.dpm_solver_pp, sampling.deis)]
        for step in (sampling.ancestral, sampling.churn(sampling.ddim)):
            ours.append(sampling.sample_diffusion(path, field, 0.0, key, x_0, grid, step=step)[0])
        expected, euler = (sampling.sample_ode(field, x_0, grid, step=step)[0] for step in (sampling.ddim(path), sampling.euler))
        return expected, euler, ours

    expected, euler, ours = found()
    for x in ours:
        np.testing.assert_allclose(x, expected, rtol=1e-8)
    if path == paths.Linear():
        np.testing.assert_allclose(euler, expected, rtol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_ddim_is_its_formula(path, key, x64):
    x, t, s = jax.random.normal(key, (5, 2)), 0.3, 0.45
    data = marginals.GaussianMixture(jnp.ones(1), jnp.full((1, 2), 0.4), jnp.full(1, 0.8))
    field = marginals.velocity(path, data)
    noise = targets.convert(path, field(x, t), x, t, source=targets.velocity, target=targets.noise)
    printed = path.alpha(s) / path.alpha(t) * x + (path.beta(s) - path.alpha(s) / path.alpha(t) * path.beta(t)) * noise
    np.testing.assert_allclose(sampling.ddim(path)(field, x, t, s - t), printed, rtol=1e-9)


def test_two_steps_of_dpm_solver_pp_against_the_paper(key, x64):
    """2M as printed replaces h - 1 + exp(-h) by h (1 - exp(-h)) / 2; for small h the steps agree to third order."""
    path, x = paths.Cosine(), jax.random.normal(key, (5, 2))
    field = marginals.velocity(path, mixture())
    data = targets.convert_field(path, field, source=targets.velocity, target=targets.data)
    ratio = lambda t: jnp.log(path.alpha(t) / path.beta(t))
    differences = []
    for h in (0.02, 0.01):
        grid = 0.4 + h * jnp.arange(4)
        states = sampling.sample_ode(field, x, grid, step=sampling.dpm_solver_pp(path, 2, variable=sampling.log_snr), save=lambda x, t: x)[
            1
        ]
        t_0, t_1, t_2 = grid[1], grid[2], grid[3]
        h_0, h_1 = ratio(t_1) - ratio(t_0), ratio(t_2) - ratio(t_1)
        d_0, d_1 = data(states[1], t_0), data(states[2], t_1)
        slope = (1 + h_1 / (2 * h_0)) * d_1 - h_1 / (2 * h_0) * d_0
        printed = path.beta(t_2) / path.beta(t_1) * states[2] - path.alpha(t_2) * jnp.expm1(-h_1) * slope
        differences.append(float(jnp.abs(printed - states[3]).max()))
    assert differences[0] < 1e-3
    assert 7 < differences[0] / differences[1] < 9.5


def test_ancestral_is_the_posterior_of_ddpm(key, x64):
    """q(x_s | x_t, x_1) of the noising chain, Ho et al. 2020, eq. 7, where the data are one point."""
    path, point = paths.VariancePreserving(), jnp.array([[0.7, -1.1]])
    t, s, x, n = 0.4, 0.45, jnp.array([[0.2, 0.9]]), 200_000
    field = lambda x, t: paths.conditional_velocity(path, x, jnp.broadcast_to(point, x.shape), t)
    many, sigma = jnp.broadcast_to(x, (n, 2)), sampling.sigma_sbdm(path)
    drawn = sampling.ancestral.step(path, field, sigma, key, many, jnp.asarray(t), jnp.asarray(s - t))
    # Their letters: a step from t to the less noisy s, abar the squared alphas.
    abar_t, abar_s = path.alpha(t) ** 2, path.alpha(s) ** 2
    a, b = abar_t / abar_s, 1 - abar_t / abar_s
    mean = jnp.sqrt(abar_s) * b / (1 - abar_t) * point + jnp.sqrt(a) * (1 - abar_s) / (1 - abar_t) * x
    variance = (1 - abar_s) / (1 - abar_t) * b
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean[0]), 4 * np.sqrt(variance / n))
    np.testing.assert_array_less(np.abs(drawn.var(0) / variance - 1), 4 * np.sqrt(2 / n))


def test_ancestral_starts_at_noise_and_ends_at_data(key):
    """At alpha = 0 the sbdm sigma is infinite, at beta = 0 the score is; the step needs neither."""
    path = paths.Linear()
    field = marginals.velocity(path, mixture())
    for sigma in (sampling.sigma_sbdm(path), 1.0, 0.0):
        x, _ = sampling.sample_diffusion(path, field, sigma, key, jnp.ones((3, 2)), times.uniform_grid(4))
        assert jnp.isfinite(x).all()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("solver", NOISY_STEPS)
def test_marginals(solver, fast_key):
    """Mean and covariance of 20,000 samples within 4 standard errors of the data's, for every step; other sigmas are in test_orders.py."""
    n, path, data = 20_000, paths.Linear(), mixture()
    velocity, step = marginals.velocity(path, data), NOISY_STEPS[solver]
    key_0, key_noise = jax.random.split(fast_key)
    # Euler-Maruyama and the ancestral step err in proportion to their size, the others less.
    steps = 300 if step is sampling.euler_maruyama or solver == "ancestral" else 100
    last = sampling.euler_maruyama_noiseless if step is sampling.stochastic_heun else None

    # All sigmas are one program, which compiles the field's part of it once.
    @jax.jit
    def sample(key, x_0):
        ends = {}
        for sigma in ("2", "beta", "sbdm"):
            coefficient = SIGMAS[sigma](path)
            # Drifts are infinite at data, and the sbdm sigma at noise.
            start = 1e-3 if sigma == "sbdm" else 0.0
            grid = start + (1 - start) * jnp.sin(jnp.linspace(0, jnp.pi / 2, steps + 1))
            ends[sigma] = sampling.sample_diffusion(path, velocity, coefficient, key, x_0, grid, step=step, last=last)[0]
        return ends

    mean = np.asarray(data.weights @ data.means, np.float64)
    centred = np.asarray(data.means) - mean
    covariance = np.einsum("k,ki,kj->ij", data.weights, centred, centred) + float(data.weights @ data.scales**2) * np.eye(2)
    for sigma, x in sample(key_noise, jax.random.normal(key_0, (n, 2))).items():
        x = np.asarray(x, np.float64)
        np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4 * np.sqrt(np.diag(covariance) / n), err_msg=sigma)
        products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
        np.testing.assert_array_less(np.abs(products.mean(0) - covariance), 4 * products.std(0) / np.sqrt(n), err_msg=sigma)


def test_weak_order_of_stochastic_heun(x64, monkeypatch):
    """Moments of an Ornstein-Uhlenbeck process whose noise changes in time: the map of a step is affine, so they are sums."""
    rate, sigma = 1.3, lambda t: 1 + 0.5 * t
    exact_variance = float(jnp.trapezoid((sigma(s := jnp.linspace(0, 1, 200_001))) ** 2 * jnp.exp(-2 * rate * (1 - s)), s))

    def errors(step, n):
        mean, variance, dt = 1.0, 0.0, 1 / n
        for t in np.arange(n) * dt:
            value = {}
            for draw in (0.0, 1.0):
                monkeypatch.setattr(steps, "noise", lambda key, shape, dtype, draw=draw: jnp.full(shape, draw, dtype))
                value[draw] = step(lambda x, t: -rate * x, sigma, None, jnp.array([0.0, 1.0]), t, dt)
            kept, added = float(value[0.0][1] - value[0.0][0]), float(value[1.0][0] - value[0.0][0])
            mean, variance = kept * mean, kept**2 * variance + added**2
        return abs(mean - np.exp(-rate)), abs(variance - exact_variance)

    for step, order in ((sampling.stochastic_heun, 2), (sampling.euler_maruyama, 1)):
        for coarse, fine in zip(errors(step, 20), errors(step, 40), strict=True):
            assert abs(np.log2(coarse / fine) - order) < 0.15


def test_choices_of_sigma(x64):
    """Each by its formula on the linear path, where the notes' b_t is (1 - t) / t."""
    path, t = paths.Linear(), jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(sampling.sigma_sbdm(path, 0.5)(t) ** 2, (1 - t) / t, rtol=1e-10)
    np.testing.assert_allclose(sampling.sigma_beta(path, 3.0)(t), 3 * (1 - t), rtol=1e-12)
    np.testing.assert_allclose(sampling.sigma_sqrt_beta(path, 3.0)(t) ** 2, 3 * (1 - t), rtol=1e-12)
    np.testing.assert_allclose(sampling.sigma_decreasing(2.0)(t) ** 2, 2 * (1 + jnp.cos(jnp.pi * t)) ** 2 / 4, rtol=1e-10)
    np.testing.assert_allclose(sampling.sigma_increasing_decreasing(2.0)(t) ** 2, 2 * jnp.sin(jnp.pi * t) ** 2, rtol=1e-10)


def test_churn_without_noise_is_its_step(key, x64):
    path = paths.Cosine()
    field, x_0 = marginals.velocity(path, mixture()), jax.random.normal(key, (5, 2))
    churned = sampling.sample_diffusion(path, field, 0.0, key, x_0, times.uniform_grid(9), step=sampling.churn(lambda path: sampling.heun))[
        0
    ]
    np.testing.assert_allclose(churned, sampling.sample_ode(field, x_0, times.uniform_grid(9))[0], rtol=1e-6)


def test_last_steps(key, x64):
    path, data = paths.Linear(), mixture()
    velocity = marginals.velocity(path, data)
    drift, x_0, grid = sampling.sde_drift(path, velocity, 1.0), jax.random.normal(key, (5, 2)), times.uniform_grid(10)

    def sample(last, times=grid):
        em = sampling.euler_maruyama
        return sampling.sample_diffusion(path, velocity, 1.0, key, x_0, times, step=em, last=last, save=lambda x, t: x)

    before = sampling.sample_sde(drift, 1.0, key, x_0, grid[:-1])[0]
    plain = sampling.sample_sde(drift, 1.0, key, x_0, grid)[0]
    for last, expected in (
        (sampling.euler_maruyama, plain),
        (sampling.euler_maruyama_noiseless, before + (grid[-1] - grid[-2]) * drift(before, grid[-2])),
        (sampling.tweedie, before + (1 - grid[-2]) * velocity(before, grid[-2])),
    ):
        x_1, saved = sample(last)
        np.testing.assert_allclose(x_1, expected, rtol=1e-12)
        assert saved.shape == (11, 5, 2)
        np.testing.assert_array_equal(saved[-1], x_1)
        np.testing.assert_array_equal(saved[-2], before)
    with pytest.raises(ValueError, match="times has one step, but there is another last step"):
        sample(sampling.euler_maruyama_noiseless, grid[:2])


@pytest.mark.parametrize("path", BOUNDED, ids=name)
def test_the_way_back(path, key, x64):
    """Data to noise and noise to data undo each other, within the error of the steps."""
    field, x_0 = marginals.velocity(path, mixture()), jax.random.normal(key, (16, 2))
    grid = times.uniform_grid(400)
    x_1 = sampling.sample_ode(field, x_0, grid, step=sampling.rk4)[0]
    back, grid_back = sampling.reverse(field, grid)
    np.testing.assert_allclose(sampling.sample_ode(back, x_1, grid_back, step=sampling.rk4)[0], x_0, atol=1e-6)


def test_steps_agree_in_any_batch_and_under_jit_traces(key):
    """Memory is carried in the scan: one trace, and no example in another's memory."""
    path, grid = paths.Linear(), times.uniform_grid(12)
    field, x_0, keys = marginals.velocity(path, mixture()), sampling.noise(key, (8, 2)), jax.random.split(key, 8)

    @jax.jit
    def follow(keys, x):
        steps = sampling.unipc(path, 3), sampling.deis(path, 2), sampling.adams_bashforth(4)
        ends = [sampling.sample_ode(field, x, grid, step=step)[0] for step in steps]
        noisy = sampling.sde_dpm_solver_pp, sampling.predictor_corrector(sampling.churn())
        return ends + [sampling.sample_diffusion(path, field, 1.0, keys, x, grid, step=step)[0] for step in noisy]

    *some, corrected = follow(keys[2:5], x_0[2:5])
    *every, every_corrected = follow(keys, x_0)
    for a, b in zip(some, every, strict=True):
        np.testing.assert_allclose(a, b[2:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(corrected, every_corrected[2:5], rtol=1e-3, atol=1e-4)


def test_a_multistep_sampler_is_differentiable(key, x64):
    """Masked weights of the first steps must not turn gradients to NaN."""
    path = paths.Linear()
    steps = sampling.unipc(path, 3), sampling.deis(path, 3), sampling.dpm_solver_pp(path, 2, variable=sampling.log_snr)

    def sample(step):
        return lambda rate, grid: sampling.sample_ode(lambda x, t: -rate * t * x, jnp.ones((1, 1)), grid, step=step)[0][0, 0]

    there = jax.jit(lambda rate, grid: jnp.stack([sample(step)(rate, grid) for step in steps]))
    gradients = jax.jit(lambda rate, grid: [jax.grad(sample(step), (0, 1))(rate, grid) for step in steps])
    grid, h = times.uniform_grid(20), 1e-5
    by_rate, by_grid = (jnp.stack(each) for each in zip(*gradients(0.7, grid), strict=True))
    np.testing.assert_allclose(by_rate, (there(0.7 + h, grid) - there(0.7 - h, grid)) / (2 * h), rtol=1e-6)
    difference = (there(0.7, grid.at[7].add(h)) - there(0.7, grid.at[7].add(-h))) / (2 * h)
    np.testing.assert_allclose(by_grid[:, 7], difference, rtol=1e-5, atol=1e-9)
    assert jnp.isfinite(by_grid).all()


def test_a_sampler_with_noise_is_differentiable(fast_key, x64):
    """In its grid's inner times too, as `times.optimize_grid` needs: at noise and data what is kept of the noise has an infinite slope."""
    path = paths.Linear()
    ancestral, second, field = sampling.ancestral, sampling.sde_dpm_solver_pp, lambda x, t: -t * x
    cases = (ancestral, sampling.sigma_beta(path)), (ancestral, 0.0), (second, sampling.sigma_beta(path))

    def sample(step, sigma, grid):
        return sampling.sample_diffusion(path, field, sigma, fast_key, jnp.ones((1, 1)), grid, step=step)[0][0, 0]

    samples = jax.jit(lambda grid: jnp.stack([sample(*case, grid) for case in cases]))

    grid, h = times.uniform_grid(4).astype(float), 1e-6
    gradients = jax.jit(jax.jacrev(samples))(grid)
    for i in (1, 2, 3):
        difference = (samples(grid.at[i].add(h)) - samples(grid.at[i].add(-h))) / (2 * h)
        np.testing.assert_allclose(gradients[:, i], difference, rtol=1e-5, atol=1e-6)

    # To the second order too.
    curved = jax.jit(lambda grid: jax.jvp(jax.grad(lambda grid: sample(*cases[2], grid)), (grid,), (jnp.eye(5)[2],)))
    ahead, behind = (curved(grid.at[2].add(change))[0] for change in (h, -h))
    np.testing.assert_allclose(curved(grid)[1][1:-1], ((ahead - behind) / (2 * h))[1:-1], rtol=1e-4, atol=1e-6)


def test_thinned_trajectories(key):
    field = lambda x, t: -x * t
    x_0, grid = jax.random.normal(key, (4, 2)), times.uniform_grid(12)
    for step in (sampling.euler, sampling.adams_bashforth(3)):
        every = sampling.sample_ode(field, x_0, grid, step=step, save=lambda x, t: (x, t))
        some = sampling.sample_ode(field, x_0, grid, step=step, save=lambda x, t: (x, t), save_every=4)
        jax.tree.map(np.testing.assert_array_equal, some, (every[0], jax.tree.map(lambda a: a[::4], every[1])))
    with pytest.raises(ValueError, match="every is 5, but a grid of 12 steps"):
        sampling.sample_ode(field, x_0, grid, save=lambda x, t: x, save_every=5)


def test_a_grid_that_leaves_the_path_is_named():
    for grid in (jnp.linspace(-0.5, 1, 5), jnp.linspace(0, 1.5, 5)):
        with pytest.raises(ValueError, match=r"times go from .* but a path goes from 0, noise, to 1, data"):
            sampling.sample_ode(lambda x, t: -x, jnp.zeros((2, 2)), grid, step=sampling.unipc(paths.Cosine(), 2))
        step = sampling.sde_dpm_solver_pp
        with pytest.raises(ValueError, match=r"times go from .* but a path goes from 0, noise, to 1, data"):
            sampling.sample_diffusion(paths.Linear(), lambda x, t: -x, 1.0, jax.random.key(0), jnp.zeros((2, 2)), grid, step=step)
    # Inside a compiled function too, where the grid is a constant there; and a good one passes.
    follow = jax.jit(lambda x, grid=grid: sampling.sample_ode(lambda x, t: -x, x, grid, step=sampling.unipc(paths.Cosine(), 2))[0])
    with pytest.raises(ValueError, match=r"times go from"):
        follow(jnp.zeros((2, 2)))
    follow(jnp.zeros((2, 2)), times.uniform_grid(4))
    jax.jit(lambda x: sampling.sample_ode(lambda x, t: -x, x, times.uniform_grid(4), step=sampling.deis(paths.Cosine(), 2))[0])(
        jnp.zeros((2, 2))
    )
    # A velocity that is 0 says nothing of the data.
    vanishing = sampling.unipc(paths.Polynomial(2.0), 2)
    with pytest.raises(
        ValueError,
        match=r"The velocity of Polynomial\(power=2.0\) is 0 or in proportion to the state at t = 0 and says nothing .* start=0.001",
    ):
        sampling.sample_ode(lambda x, t: -t * x, jnp.zeros((2, 2)), times.uniform_grid(4), step=vanishing)
    assert jnp.isfinite(
        sampling.sample_ode(lambda x, t: -t * x, jnp.zeros((2, 2)), times.uniform_grid(4, start=0.01), step=vanishing)[0]
    ).all()
    # Any field on any grid is Adams and Bashforth's business.
    sampling.sample_ode(lambda x, t: -x, jnp.zeros((2, 2)), jnp.linspace(0, 5, 9), step=sampling.adams_bashforth(2))


def test_too_few_steps_say_so():
    path, x = paths.Linear(), jnp.zeros((2, 2))
    field = lambda x, t: -x
    for step in (sampling.adams_bashforth(3), sampling.unipc(path, 3)):
        with pytest.raises(ValueError, match="The method has order 3 and needs as many steps, but the grid has 2"):
            sampling.sample_ode(field, x, times.uniform_grid(2), step=step)
    with pytest.raises(ValueError, match="The method has order 2 and needs as many steps, but the grid has 1"):
        sampling.sample_diffusion(path, field, 1.0, jax.random.key(0), x, times.uniform_grid(1), step=sampling.sde_dpm_solver_pp)
    with pytest.raises(ValueError, match="order is 0"):
        sampling.deis(path, 0)
