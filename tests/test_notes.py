"""The course notes: formulas of docs/formulas.md that no chapter's tests hold, and its translations of letters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import BOUNDED, PATHS, VarianceExploding, name

from fmjax import losses, marginals, paths, sampling, targets

each_path = pytest.mark.parametrize("path", PATHS, ids=name)
each_bounded = pytest.mark.parametrize("path", BOUNDED, ids=name)
WEIGHTS, MEANS, SCALES = np.array([0.2, 0.5, 0.3]), np.array([1.5, -1.2, 0.2]), np.array([0.4, 0.6, 0.3])


def line():
    """A mixture on the line, where distribution functions and integrals are known."""
    return marginals.GaussianMixture(jnp.array(WEIGHTS), jnp.array(MEANS)[:, None], jnp.array(SCALES))


def normals(path, t):
    """Means and standard deviations of the components at time t, (1, K)."""
    alpha, beta = float(path.alpha(t)), float(path.beta(t))
    return (alpha * MEANS)[None], np.sqrt(alpha**2 * SCALES**2 + beta**2)[None]


# ODEs and flows


def test_noise_is_standard_normal(key):
    """X_0 ~ p_init = N(0, I)."""
    x_0 = np.asarray(sampling.noise(key, (10_000, 2)))
    assert scipy.stats.kstest(x_0.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x_0.T)[0, 1]) < 4 / np.sqrt(10_000)


@each_path
def test_conditional_flow_is_the_path_to_its_point(path, key, x64):
    """psi_t(x_0 | z) = alpha_t z + beta_t x_0 solves d/dt X = u_t(X | z)."""
    x_0, z = jax.random.normal(key, (2, 5, 2))
    times = jnp.linspace(0, 0.95, 401)

    @jax.jit
    def follow(x_0, z):
        field = lambda x, t: paths.conditional_velocity(path, x, z, t)
        start = paths.interpolate(path, x_0, z, 0.0)
        states = sampling.sample_ode(field, start, times, step=sampling.rk4, save=lambda x, t: x)[1]
        return states, jax.vmap(lambda t: paths.interpolate(path, x_0, z, t))(times)

    np.testing.assert_allclose(*follow(x_0, z), atol=1e-6)


def test_euler_on_the_linear_path_ends_at_the_point_in_n_steps(key, x64):
    """The conditional flow is a line; a loop of n - 1 steps, as the notes print it, ends at time 1 - h."""
    x_0, z = jax.random.normal(key, (2, 5, 2))
    field = lambda x, t: paths.conditional_velocity(paths.Linear(), x, z, t)
    end, saved = sampling.sample_ode(field, x_0, jnp.linspace(0, 1, 5), step=sampling.euler, save=lambda x, t: x)
    np.testing.assert_allclose(end, z, atol=1e-14)
    np.testing.assert_allclose(saved[-2], z + (x_0 - z) / 4, atol=1e-14)
    # The field x_1 - x, as 001 may be read, never arrives.
    short = sampling.sample_ode(lambda x, t: z - x, x_0, jnp.linspace(0, 1, 101), step=sampling.rk4)[0]
    np.testing.assert_allclose(short, z + (x_0 - z) / np.e, atol=1e-8)


@each_bounded
def test_marginal_flow_has_the_law_of_the_path(path, x64):
    """X_0 ~ p_init and d/dt X = u_t(X) give X_t ~ p_t: on the line the flow keeps F_t(X_t), at every time up to the data."""
    u = np.linspace(0.01, 0.99, 33)
    x_0, times = path.beta(0.0) * jnp.array(scipy.stats.norm.ppf(u))[:, None], jnp.linspace(0, 1, 401)
    field = marginals.velocity(path, line())
    saved = jax.jit(lambda x_0: sampling.sample_ode(field, x_0, times, step=sampling.rk4, save=lambda x, t: x)[1])(x_0)
    np.testing.assert_array_equal(saved[0], x_0)
    for i in (100, 200, 300, 400):
        mean, std = normals(path, times[i])
        np.testing.assert_allclose(scipy.stats.norm.cdf(np.asarray(saved[i]), mean, std) @ WEIGHTS, u, atol=1e-6)


@each_bounded
def test_remainder_of_an_euler_step_vanishes(path, x64):
    """X_{t+h} = X_t + h u_t(X_t) + h R_t(h): halving h halves R, on the flow alpha_t m + sqrt(v_t) x_0 to one normal."""
    t, mean, scale, x_0 = 0.3, 0.7, 0.4, jnp.array([[-1.0], [0.5]])
    flow = lambda t: path.alpha(t) * mean + jnp.sqrt(path.alpha(t) ** 2 * scale**2 + path.beta(t) ** 2) * x_0
    field = marginals.velocity(path, marginals.GaussianMixture(jnp.ones(1), jnp.array([[mean]]), jnp.array(scale)))
    remainder = jax.jit(lambda h: (flow(t + h) - sampling.euler(field, flow(t), t, h)) / h)
    remainders = np.array([remainder(h) for h in (1e-2, 5e-3, 2.5e-3)])
    np.testing.assert_allclose(remainders[1:] / remainders[:-1], 0.5, atol=0.02)


def test_an_sde_without_noise_is_its_ode(key, x64):
    """dX = u_t(X) dt + sigma_t dW with sigma_t = 0, step for step."""
    x_0, times, field = jax.random.normal(key, (5, 2)), jnp.linspace(0, 1, 11), lambda x, t: jnp.sin(x) - t
    ode = sampling.sample_ode(field, x_0, times, step=sampling.euler)[0]
    np.testing.assert_allclose(sampling.sample_sde(field, 0.0, key, x_0, times)[0], ode, rtol=1e-14)


# Conditional and marginal paths


@each_bounded
def test_a_point_of_the_path_has_the_marginal_law(path, key):
    """x_1 ~ p_data and x_t ~ p_t(. | x_1) give x_t ~ p_t."""
    key_0, key_1 = jax.random.split(key)
    x_1 = line().sample(key_1, 10_000)
    x_t = np.asarray(paths.interpolate(path, sampling.noise(key_0, x_1.shape), x_1, 0.6))
    mean, std = normals(path, 0.6)
    assert scipy.stats.kstest(x_t[:, 0], lambda x: scipy.stats.norm.cdf(x[:, None], mean, std) @ WEIGHTS).pvalue > 1e-3


@each_bounded
def test_marginal_path_joins_noise_to_data(path, x64):
    """p_0 = p_init, p_1 = p_data."""
    x = np.linspace(-3, 3, 13)[:, None]
    log_density = jax.jit(lambda x, t: marginals.log_density(path, line())(x, t))
    np.testing.assert_allclose(log_density(x, 0.0), scipy.stats.norm.logpdf(x[:, 0], scale=path.beta(0.0)), rtol=1e-12)
    np.testing.assert_allclose(log_density(x, 1.0), np.log(scipy.stats.norm.pdf(x, MEANS[None], SCALES[None]) @ WEIGHTS), rtol=1e-10)


@each_bounded
def test_density_velocity_and_score_are_integrals_over_the_data(path, x64):
    """The notes' three integrals over z, of continuous data, by the trapezium rule."""
    z = np.linspace(-6, 6, 2001)
    prior = scipy.stats.norm.pdf(z[:, None], MEANS[None], SCALES[None]) @ WEIGHTS * (z[1] - z[0])
    x, t = (grid.ravel() for grid in np.meshgrid(np.linspace(-2, 2, 5), [0.2, 0.5, 0.8]))

    @jax.jit
    def compare(x, t, z):
        conditional = jax.scipy.stats.norm.pdf(x[:, None], path.alpha(t)[:, None] * z[None], path.beta(t)[:, None])
        joint = conditional * prior[None]
        density = joint.sum(1)
        pairs = [jnp.broadcast_to(a, joint.shape).reshape(-1, 1) for a in (x[:, None], z[None])]
        pair_times = jnp.broadcast_to(t[:, None], joint.shape).ravel()
        velocity, score = (
            (given_z(path, *pairs, pair_times).reshape(joint.shape) * joint).sum(1) / density
            for given_z in (paths.conditional_velocity, paths.conditional_score)
        )
        exact = [quantity(path, line())(x[:, None], t) for quantity in (marginals.log_density, marginals.velocity, marginals.score)]
        return [a.ravel() for a in exact], [jnp.log(density), velocity, score]

    for exact, integral in zip(*compare(x, t, z), strict=True):
        np.testing.assert_allclose(exact, integral, rtol=1e-8, atol=1e-9)


# Losses

POINTS, LABELS, NULL, TIMES = np.array([1.5, -1.2, 0.2]), np.array([0, 1, 1]), 2, np.array([0.2, 0.5, 0.8])
QUANTITIES = [(targets.velocity, marginals.velocity), (targets.score, marginals.score)]
each_quantity = pytest.mark.parametrize(("target", "marginal"), QUANTITIES, ids=["velocity", "score"])


def every_example(path):
    """All (t, z, x) of a grid with their probabilities: x_0, x_1, x, t, label, weight, the sums to be one a time."""
    t, z, x = np.meshgrid(TIMES, np.arange(3), np.linspace(-9, 9, 721), indexing="ij")
    t, label, x_1, x = (a.ravel() for a in (t, LABELS[z], POINTS[z], x))
    alpha, beta = np.asarray(path.alpha(jnp.array(t))), np.asarray(path.beta(jnp.array(t)))
    weight = scipy.stats.norm.pdf(x, alpha * x_1, beta) * (18 / 720) / 3
    return *(jnp.array(a)[:, None] for a in ((x - alpha * x_1) / beta, x_1, x)), jnp.array(t), jnp.array(label), weight


def at_each_time(weight, values):
    return (weight * values).reshape(3, -1).sum(1)


@each_quantity
@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_marginal_and_conditional_losses_differ_by_a_constant(path, target, marginal, x64):
    """L_FM - L_CFM = E|u|^2 - E|u(. | z)|^2 whatever the network, and so for scores, at each time."""
    x_0, x_1, x, t, _, weight = every_example(path)

    @jax.jit
    def all_losses(x_0, x_1, x, t):
        exact = marginal(path, marginals.Empirical(jnp.array(POINTS)[:, None]))(x, t)
        networks = [lambda x, t: jnp.zeros_like(x), lambda x, t: jnp.sin(x), lambda x, t: x - paths.lift(t, x), lambda x, t: exact]
        conditional = [at_each_time(weight, losses.denoising(f, path, x_0, x_1, t, target=target)) for f in networks]
        marginalised = [at_each_time(weight, losses.regression(f, x, t, exact)) for f in networks]
        return conditional, marginalised

    conditional, marginalised = (np.array(values) for values in all_losses(x_0, x_1, x, t))
    np.testing.assert_allclose(at_each_time(weight, np.ones_like(weight)), 1, rtol=1e-10)
    # The network that is zero leaves the constant itself.
    np.testing.assert_allclose(marginalised - conditional, np.tile(marginalised[0] - conditional[0], (4, 1)), rtol=1e-9)
    np.testing.assert_allclose(marginalised[-1], 0, atol=1e-20)
    if target is targets.score:
        # E|grad log p_t(x | z)|^2 = d / beta^2, whose integral over t up to 1 is infinite.
        np.testing.assert_allclose(conditional[0], 1 / np.asarray(path.beta(jnp.array(TIMES))) ** 2, rtol=1e-9)


@each_quantity
def test_guided_losses_regress_each_class_and_the_null_on_all(target, marginal, x64):
    """With (z, y) drawn together and y dropped at a rate, the loss is, up to a constant,

    (1 - eta) E|f(x | y) - u(x | y)|^2 + eta E|f(x | null) - u(x)|^2.
    """
    path = paths.Linear()
    x_0, x_1, x, t, y, weight = every_example(path)

    @jax.jit
    def all_losses(x_0, x_1, x, t, y):
        of = lambda points: marginal(path, marginals.Empirical(jnp.array(points)[:, None]))(x, t)
        of_class = jnp.where(y[:, None] == 0, of(POINTS[:1]), of(POINTS[1:]))
        rows = []
        for label, exact in ((y, of_class), (jnp.full_like(y, NULL), of(POINTS))):
            for amount in (0.0, 1.0, -2.0):
                field = lambda x, t, amount=amount, label=label: jnp.sin(amount * x) + amount * label[:, None] * paths.lift(t, x)
                rows.append(
                    (
                        at_each_time(weight, losses.denoising(field, path, x_0, x_1, t, target=target)),
                        at_each_time(weight, losses.regression(field, x, t, exact)),
                    )
                )
        return rows

    (kept, kept_exact), (dropped, dropped_exact) = np.array(all_losses(x_0, x_1, x, t, y)).reshape(2, 3, 2, 3).swapaxes(1, 2)
    for rate in (0.0, 0.35):
        gap = (1 - rate) * (kept - kept_exact) + rate * (dropped - dropped_exact)
        np.testing.assert_allclose(gap, np.tile(gap[0], (3, 1)), rtol=1e-8)
        assert (gap > 0).all()


# The SDE extension


@each_path
def test_conditional_sde_keeps_the_conditional_path(path, x64):
    """The extension holds given z too: with drift A X + B the mean obeys m' = A m + B, the variance v' = 2 A v + sigma^2."""

    @jax.jit
    def balances(t, z):
        alpha, beta, (d_alpha, d_beta) = path.alpha(t), path.beta(t), targets.velocity(path, t)
        rows = []
        for sigma in (0.0, 0.7, lambda t: 2 - t):
            velocity, score = (
                lambda x, t, given_z=given_z: given_z(path, x, z, t) for given_z in (paths.conditional_velocity, paths.conditional_score)
            )
            drift = sampling.sde_extension(velocity, score, sigma)
            at_mean, slope = jax.jvp(lambda x, drift=drift: drift(x, t), (alpha[:, None] * z,), (jnp.ones_like(z),))
            square = (sigma(t) if callable(sigma) else sigma) ** 2
            rows.append((at_mean[:, 0], d_alpha * z[:, 0], 2 * slope[:, 0] * beta**2 + square, 2 * beta * d_beta))
        return rows

    for mean, expected_mean, variance, expected_variance in balances(jnp.linspace(0.1, 0.9, 9), jnp.full((9, 1), 0.8)):
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(variance, expected_variance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_a_score_has_no_velocity_at_time_zero(path):
    """The notes' drift from a score alone holds alpha'_t / alpha_t, so grids for it start after 0; from a velocity they need not."""
    both = jax.jit(
        lambda t: [
            jnp.stack(targets.coefficients(path, t, source=source, target=target))
            for source, target in ((targets.score, targets.velocity), (targets.velocity, targets.score))
        ]
    )
    from_score, from_velocity = both(0.0)
    assert not np.isfinite(from_score).any()
    assert np.isfinite(from_velocity).all()
    assert np.isfinite(both(1e-3)).all()


# Other papers' letters


def test_letters_of_ddpm(x64):
    """alpha_t = sqrt(alpha-bar_k) at t = 1 - k / n, as the n steps become fine: betas from 1e-4 to 0.02 for n = 1,000."""
    schedules = jax.jit(lambda t: (paths.VariancePreserving().alpha(t), paths.VariancePreserving().beta(t)))
    for n, tolerance in ((1_000, 2e-3), (10_000, 2e-4)):
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, n) * 1_000 / n)
        alpha, beta = schedules(1 - np.arange(1, n + 1) / n)
        np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), atol=tolerance)
        np.testing.assert_allclose(np.asarray(beta) ** 2, 1 - alpha_bar, atol=2 * tolerance)


SONG = {
    # f(x, s) / x and g(s)^2 with s = 1 - t.
    "VP": (paths.VariancePreserving(), lambda s: -(0.1 + 19.9 * s) / 2, lambda s: 0.1 + 19.9 * s),
    "VE": (VarianceExploding(), lambda s: 0 * s, lambda s: 18 * s),
}


@pytest.mark.parametrize(("path", "rate", "g_squared"), SONG.values(), ids=SONG)
def test_letters_of_song(path, rate, g_squared, x64):
    """The reverse SDE, dX = (-f + g^2 score) dt + g dW in our time, is the extension with sigma_t = g = sqrt(2 b_t)."""

    @jax.jit
    def ours(x, t):
        drift = sampling.sde_drift(path, marginals.velocity(path, line()), lambda t: jnp.sqrt(g_squared(1 - t)))
        coefficients = targets.coefficients(path, t, source=targets.score, target=targets.velocity)
        return *coefficients, marginals.score(path, line())(x, t), drift(x, t)

    x, t = np.linspace(-2, 2, 9)[:, None], np.linspace(0.1, 0.9, 9)
    a, b, score, drift = ours(x, t)
    f, g2 = rate(1 - t)[:, None] * x, g_squared(1 - t)
    np.testing.assert_allclose(a, -rate(1 - t), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(b, g2 / 2, rtol=1e-9)
    np.testing.assert_allclose(drift, -f + g2[:, None] * np.asarray(score), rtol=1e-8, atol=1e-8)


@each_bounded
def test_letters_of_edm(path, x64):
    """With sigma = beta / alpha and y = x / alpha: dy / dsigma = (y - D) / sigma, D = E[x_1 | x], and (D - y) / sigma^2 is y's score."""

    @jax.jit
    def compare(x, t):
        u, score = marginals.velocity(path, line())(x, t), marginals.score(path, line())(x, t)
        denoised = targets.convert(path, u, x, t, source=targets.velocity, target=targets.data)
        t = t[:, None]
        scaled = lambda x, t: (x / path.alpha(t), path.beta(t) / path.alpha(t))
        (y, sigma), (dy, d_sigma) = jax.jvp(scaled, (x, t), (u, jnp.ones_like(t)))
        return (dy, (y - denoised) / sigma * d_sigma), ((denoised - y) / sigma**2, path.alpha(t) * score)

    for one, other in compare(np.linspace(-2, 2, 9)[:, None], np.linspace(0.1, 0.9, 9)):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lipman:
    """The path of the paper that 001 reads, which ends at N(x_1, sigma_min^2 I)."""

    sigma_min: float = 0.1

    def alpha(self, t):
        return t

    def beta(self, t):
        return 1 - (1 - self.sigma_min) * t


def test_letters_of_lipman(key, x64):
    """u_t(x | x_1) = (x_1 - (1 - sigma_min) x) / (1 - (1 - sigma_min) t), and on the path x_1 - (1 - sigma_min) x_0."""

    @jax.jit
    def ours(x_0, x_1, t):
        x, u = paths.flow(Lipman(), x_0, x_1, t)
        return x, u, paths.conditional_velocity(Lipman(), x, x_1, t)

    x_0, x_1 = np.asarray(jax.random.normal(key, (2, 6, 2)))
    t, keep = np.linspace(0, 1, 6), 1 - Lipman().sigma_min
    x, u, conditional = map(np.asarray, ours(x_0, x_1, t))
    np.testing.assert_allclose(u, x_1 - keep * x_0, rtol=1e-12)
    np.testing.assert_allclose(conditional, (x_1 - keep * x) / (1 - keep * t[:, None]), rtol=1e-10)
