"""Bridges: each velocity is the derivative of its point, each score that of its law, and Gaussians meet as Schrödinger's do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import bridges, couplings, losses, paths, sampling, times

KEY = jax.random.key(0)
BRIDGES = {
    "Brownian": bridges.Brownian(0.7),
    "Constant": bridges.Constant(0.3),
    "variance-preserving": bridges.Constant(0.1, paths.Cosine()),
    "any": bridges.Interpolant(paths.Polynomial(2.0), lambda t: jnp.sqrt(2 * t * (1 - t))),
}
X_0, X_1, Z = (jax.random.normal(jax.random.fold_in(KEY, i), (4, 3)) + i for i in range(3))
T = jnp.array([0.1, 0.4, 0.5, 0.95])


@pytest.mark.parametrize("name", BRIDGES)
def test_velocity_and_score_are_derivatives(name, x64):
    bridge = BRIDGES[name]
    x_0, x_1, z, t = (jnp.asarray(np.asarray(value), jnp.float64) for value in (X_0, X_1, Z, T))
    x_t, u_t = bridges.flow(bridge, x_0, x_1, z, t)
    np.testing.assert_allclose(x_t, bridges.interpolate(bridge, x_0, x_1, z, t))
    h = 1e-6
    ahead, behind = (bridges.interpolate(bridge, x_0, x_1, z, t + step) for step in (h, -h))
    np.testing.assert_allclose(u_t, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)
    # At the same place, from the place alone.
    np.testing.assert_allclose(bridges.conditional_velocity(bridge, x_t, x_0, x_1, t), u_t, rtol=1e-9)

    def log_p(x):
        wide = t[:, None]
        mean = bridge.path.alpha(wide) * x_1 + bridge.path.beta(wide) * x_0
        return (-0.5 * ((x - mean) / bridge.gamma(wide)) ** 2).sum()

    np.testing.assert_allclose(bridges.conditional_score(bridge, x_t, x_0, x_1, t), jax.grad(log_p)(x_t), rtol=1e-9)
    np.testing.assert_allclose(bridges.score(bridge, lambda x, t: z)(x_t, t), jax.grad(log_p)(x_t), rtol=1e-9)


def test_the_brownian_bridge_is_the_papers():
    """u_t = (1 - 2t) / (2 t (1 - t)) (x - mean) + x_1 - x_0, and the noise is sigma^2 t (1 - t)."""
    x_t, u_t = bridges.flow(BRIDGES["Brownian"], X_0, X_1, Z, T)
    t = T[:, None]
    mean = t * X_1 + (1 - t) * X_0
    np.testing.assert_allclose(u_t, (1 - 2 * t) / (2 * t * (1 - t)) * (x_t - mean) + X_1 - X_0, rtol=1e-4)
    np.testing.assert_allclose((x_t - mean) ** 2, 0.49 * t * (1 - t) * Z**2, rtol=1e-4)


def test_any_state_and_precision():
    bridge, tree = BRIDGES["Brownian"], lambda x: {"a": x[:, :1], "b": x[:, 1:]}
    whole = bridges.flow(bridge, X_0, X_1, Z, T)
    for part, one in zip(bridges.flow(bridge, tree(X_0), tree(X_1), tree(Z), T), whole, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), part, tree(one))
    small = bridges.flow(bridge, *(x.astype(jnp.bfloat16) for x in (X_0, X_1, Z)), T)
    assert {value.dtype for value in small} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(small[1].astype(jnp.float32), whole[1], rtol=0.02, atol=0.02)
    # A pytree of numbers: jitted, differentiated in sigma.
    slope = jax.jit(jax.grad(lambda bridge: bridges.interpolate(bridge, X_0, X_1, Z, T).sum()))(bridge)
    np.testing.assert_allclose(slope.sigma, (jnp.sqrt(T * (1 - T))[:, None] * Z).sum(), rtol=1e-5)
    assert jnp.isinf(bridges.flow(bridge, X_0, X_1, Z, 0.0)[1]).all()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_mixed_over_the_entropic_plan_it_is_the_schroedinger_bridge_of_gaussians(sigma):
    """Of N(m, s^2) and N(n, r^2): by the bridge's own numbers, against potentials that Sinkhorn's iterations on the line give."""
    m, s, n, r = -1.0, 0.8, 2.0, 1.5
    # p_t = phi_t psi_t, each a normal density up to a factor: phi runs forward by the heat equation from phi_0 psi_0 = p_0, psi backward
    # from phi_1 psi_1 = p_1. Precisions and precisions times means, iterated to their fixed point.
    heat = lambda a, b, time: (a / (1 + a * sigma**2 * time), b / (1 + a * sigma**2 * time))
    p_0, p_1 = np.array([1 / s**2, m / s**2]), np.array([1 / r**2, n / r**2])
    psi_1 = np.array([0.01, 0.0])
    for _ in range(10_000):
        phi_0 = p_0 - heat(*psi_1, 1)
        psi_1 = p_1 - heat(*phi_0, 1)
    bridge = bridges.Brownian(sigma)
    # The plan's covariance (Bunne et al. 2023, arXiv:2202.05722).
    shared = (np.sqrt(4 * s**2 * r**2 + sigma**4) - sigma**2) / 2
    for t in (0.2, 0.5, 0.9):
        precision, weighted = np.add(heat(*phi_0, t), heat(*psi_1, 1 - t))
        alpha, beta, gamma = bridge.path.alpha(t), bridge.path.beta(t), float(bridge.gamma(jnp.float32(t)))
        variance = alpha**2 * r**2 + beta**2 * s**2 + 2 * alpha * beta * shared + gamma**2
        np.testing.assert_allclose((alpha * n + beta * m, variance), (weighted / precision, 1 / precision), rtol=1e-5)


SCALE_0, SCALE_1, SHIFT = 0.8, 1.5, 2.0


def learnt(x, t, values):
    """The field of least squares in x times, and plus, polynomials in t: the minimiser of `losses.regression` among them."""
    basis = lambda t: jnp.stack([jnp.cos(k * jnp.arccos(2 * t - 1)) for k in range(8)], axis=-1)
    features = jnp.concatenate([basis(t), x * basis(t)], axis=-1)
    weights = jnp.linalg.lstsq(features, values)[0]

    def field(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        return jnp.concatenate([basis(t), x * basis(t)], axis=-1) @ weights

    return field


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_what_is_learnt_has_the_bridges_marginals_both_ways(sigma):
    """Velocity and noise of Gaussians are linear in x; learnt from a plan's pairs, as ODE and SDE, forwards and back."""
    count = 200_000
    keys = jax.random.split(KEY, 6)
    shared = (np.sqrt(4 * SCALE_0**2 * SCALE_1**2 + sigma**4) - sigma**2) / 2
    x_0 = SCALE_0 * jax.random.normal(keys[0], (count, 1))
    left = np.sqrt(SCALE_1**2 - (shared / SCALE_0) ** 2)
    x_1 = SHIFT + shared / SCALE_0**2 * x_0 + left * jax.random.normal(keys[1], (count, 1))
    z, t = jax.random.normal(keys[2], (count, 1)), jax.random.uniform(keys[3], (count,), minval=0.01, maxval=0.99)
    bridge = bridges.Brownian(sigma)
    x_t, u_t = bridges.flow(bridge, x_0, x_1, z, t)
    velocity, noise = learnt(x_t, t, u_t), learnt(x_t, t, z)
    assert losses.regression(velocity, x_t, t, u_t).mean() < losses.regression(lambda x, t: 0 * x, x_t, t, u_t).mean()
    score, grid = bridges.score(bridge, noise), times.uniform_grid(200, 0.01, 0.99)

    def law(t):
        gamma = float(bridge.gamma(jnp.float32(t)))
        return t * SHIFT, np.sqrt((1 - t) ** 2 * SCALE_0**2 + t**2 * SCALE_1**2 + 2 * t * (1 - t) * shared + gamma**2)

    def at(t, key):
        mean, scale = law(t)
        return mean + scale * jax.random.normal(key, (20_000, 1))

    forward = sampling.sde_extension(velocity, score, sigma)
    back, reversed_grid = sampling.reverse(sampling.sde_extension(velocity, lambda x, t: -score(x, t), sigma), grid)
    ways = {
        "ODE": (sampling.sample_ode(velocity, at(0.01, keys[4]), grid)[0], 0.99),
        "SDE": (sampling.sample_sde(forward, sigma, keys[5], at(0.01, keys[4]), grid)[0], 0.99),
        "ODE back": (
            sampling.sample_ode(*(lambda field, grid: (field, at(0.99, keys[4]), grid))(*sampling.reverse(velocity, grid)))[0],
            0.01,
        ),
        "SDE back": (sampling.sample_sde(back, sigma, keys[5], at(0.99, keys[4]), reversed_grid)[0], 0.01),
    }
    for name, (x, t_end) in ways.items():
        mean, scale = law(t_end)
        np.testing.assert_allclose((x.mean(), x.std()), (mean, scale), atol=0.05, err_msg=name)


def test_coupled_flow_matching_learns_the_optimal_map_of_gaussians():
    """Between N(0, 0.8^2) and N(2, 1.5^2) it is linear, 2 + 1.5 / 0.8 x; by couplings of 4096 points, followed as an ODE."""
    pairs = []
    for i in range(8):
        key_0, key_1 = jax.random.split(jax.random.fold_in(KEY, i))
        x_0 = SCALE_0 * jax.random.normal(key_0, (2048, 1))
        x_1 = SHIFT + SCALE_1 * jax.random.normal(key_1, (2048, 1))
        pairs.append((x_0, x_1[couplings.optimal(x_0, x_1)]))
    x_0, x_1 = (jnp.concatenate(side) for side in zip(*pairs, strict=True))
    t = jax.random.uniform(KEY, x_0.shape[:1])
    field = learnt(*(paths.interpolate(paths.Linear(), x_0, x_1, t), t), x_1 - x_0)
    start = jnp.linspace(-2, 2, 9)[:, None] * SCALE_0
    end = sampling.sample_ode(field, start, times.uniform_grid(50))[0]
    np.testing.assert_allclose(end, SHIFT + SCALE_1 / SCALE_0 * start, atol=0.12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bridges.flow(paths.Linear(), X_0, X_1, Z, T), r"bridge is Linear\(\); a bridge has a path and gamma\(t\)"),
        (lambda: bridges.flow(bridges.Brownian, X_0, X_1, Z, T), r"which is a class: make one with Brownian\(\)"),
        (lambda: paths.flow(bridges.Brownian(1.0), X_0, X_1, T), "path is Brownian"),
        (lambda: losses.flow_matching(lambda x, t: x, bridges.Constant(0.1), X_0, X_1, T), "path is Constant"),
        (lambda: bridges.flow(bridges.Brownian(1.0), X_0, X_1, Z[:2], T), r"z has shape \(2, 3\)"),
        (lambda: bridges.flow(bridges.Brownian(1.0), X_0, X_1, Z, T[:2]), r"t has shape \(2,\)"),
        (lambda: bridges.flow(bridges.Brownian(1.0), X_0, X_1, Z, 5.0), "t is 5.0, but times go from 0"),
        (lambda: bridges.flow(bridges.Brownian(1.0), X_0[:, :1], X_1, Z, T), r"x_0 has shape \(4, 1\)"),
        (lambda: bridges.conditional_score(bridges.Brownian(1.0), X_0[:, :1], X_0, X_1, T), r"x has shape \(4, 1\)"),
        (lambda: bridges.flow(bridges.Interpolant(paths.Linear(), lambda t: jnp.ones(3)), X_0, X_1, Z, T), r"gamma\(t\) .* shape \(3,\)"),
        (lambda: bridges.score(bridges.Brownian(1.0), lambda x, t: x[:, :1])(X_0, 0.5), r"The noise has shape \(4, 1\)"),
        (lambda: bridges.score(bridges.Brownian(1.0), lambda x, t: x)(X_0, 2.0), "t is 2.0, but times go from 0"),
        (lambda: bridges.Brownian(0.0), "sigma is 0.0"),
        (lambda: bridges.Constant(-1.0), "sigma is -1.0"),
        (lambda: bridges.Interpolant(paths.Linear(), 0.1), "noise is 0.1, but it is a function"),
        (lambda: bridges.score(bridges.Brownian(1.0), X_0), "noise_field is a ArrayImpl, but it is a function"),
    ],
)
def test_wrong_calls_are_named(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call()
