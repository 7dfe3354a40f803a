"""Marginals: the oracle itself, against brute force, automatic derivatives and the equations it must solve."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, PATHS, mixture, name

from fmjax import marginals, paths, sampling

each_path = pytest.mark.parametrize("path", PATHS, ids=name)


def diagonal():
    """Three dimensions, a scale per coordinate."""
    means = jnp.array([[1.0, -0.5, 0.2], [-1.0, 0.7, 0.4]])
    return marginals.GaussianMixture(jnp.array([0.4, 0.6]), means, jnp.array([[0.5, 0.8, 0.3], [0.6, 0.4, 0.9]]))


def points_and_times(key, n=20, d=3):
    return 1.5 * jax.random.normal(key, (n, d)), jnp.linspace(0.05, 0.95, n)


@each_path
def test_log_density_is_the_sum_of_normals(path, key, x64):
    x, t = points_and_times(key)
    alpha, beta = (np.asarray(schedule(t))[:, None] for schedule in (path.alpha, path.beta))
    data = diagonal()
    density = sum(
        w * np.prod(np.exp(-0.5 * (x - alpha * m) ** 2 / v) / np.sqrt(2 * np.pi * v), axis=1)
        for w, m, v in (
            (w, m, alpha**2 * s**2 + beta**2) for w, m, s in zip(*map(np.asarray, (data.weights, data.means, data.scales)), strict=True)
        )
    )
    np.testing.assert_allclose(marginals.log_density(path, data)(x, t), np.log(density), rtol=1e-11)


@each_path
def test_score_is_the_gradient_of_the_log_density(path, key, x64):
    x, t = points_and_times(key)
    for data in (diagonal(), marginals.Empirical(jax.random.normal(key, (5, 3)))):
        log_density = marginals.log_density(path, data)
        gradient = jax.grad(lambda x, log_density=log_density: log_density(x, t).sum())(x)
        np.testing.assert_allclose(marginals.score(path, data)(x, t), gradient, rtol=1e-10, atol=1e-10)


@each_path
def test_continuity_and_fokker_planck_equations(path, key, x64):
    """The notes' two equations divided by p, at random points.

    d/dt log p = -div u - u . s,    d/dt log p = -div f - f . s + sigma^2 / 2 (div s + |s|^2),    f the drift of the SDE extension
    """
    data = diagonal()

    @jax.jit
    @jax.vmap
    def terms(x, t, sigma):
        def balance(field, diffusion):
            divergence = jnp.trace(jax.jacfwd(lambda x: field(x[None], t)[0])(x))
            return jnp.stack([d_time, divergence, field(x[None], t)[0] @ score, diffusion])

        d_time = jax.grad(lambda t: marginals.log_density(path, data)(x[None], t)[0])(t)
        score_field = marginals.score(path, data)
        score = score_field(x[None], t)[0]
        laplacian = jnp.trace(jax.jacfwd(lambda x: score_field(x[None], t)[0])(x))
        velocity = marginals.velocity(path, data)
        drift = sampling.sde_drift(path, velocity, sigma)
        return balance(velocity, jnp.zeros(())), balance(drift, -(sigma**2) / 2 * (laplacian + score @ score))

    x, t = points_and_times(key)
    continuity, fokker_planck = terms(x, t, jnp.linspace(0.5, 2.0, len(t)))
    for balances in (continuity, fokker_planck):
        assert (np.abs(balances.sum(1)) < 1e-8 * np.abs(balances).max(1)).all()
    assert (np.abs(fokker_planck[:, 3]) > 1e-6).all()
    assert (np.abs(continuity[:, :3]).max(1) > 1e-3).all()


@each_path
def test_velocity_and_score_marginalise_the_conditional_ones(path, key, x64):
    """The notes' integrals over z, which are sums for a finite data set."""
    z = jax.random.normal(key, (6, 3))
    x, t = points_and_times(jax.random.fold_in(key, 1))
    alpha, beta = (np.asarray(schedule(t))[:, None] for schedule in (path.alpha, path.beta))
    exponents = -0.5 * ((x[:, None] - alpha[..., None] * z[None]) ** 2).sum(-1) / beta**2
    posterior = jax.nn.softmax(exponents, axis=1)
    for marginal, conditional in ((marginals.velocity, paths.conditional_velocity), (marginals.score, paths.conditional_score)):
        each = jnp.stack([conditional(path, x, jnp.broadcast_to(point, x.shape), t) for point in z], axis=1)
        expected = (posterior[..., None] * each).sum(1)
        np.testing.assert_allclose(marginal(path, marginals.Empirical(z))(x, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", BOUNDED, ids=name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mixture_is_finite_at_both_ends(path, dtype, key):
    x = jax.random.normal(key, (5, 2), dtype)
    for t in (0.0, 1.0, jnp.linspace(0, 1, 5)):
        for field in (marginals.velocity(path, mixture()), marginals.score(path, mixture())):
            value = field(x, t)
            assert value.dtype == dtype
            assert jnp.isfinite(value).all()
    at_noise = marginals.score(path, mixture())(x, 0.0)
    np.testing.assert_allclose(at_noise, -x / path.beta(0.0) ** 2, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_blocks_do_not_change_the_answer(key, monkeypatch):
    points, x = jax.random.normal(key, (103, 4)), jax.random.normal(jax.random.fold_in(key, 1), (7, 4))
    quantities = [
        quantity(paths.Linear(), marginals.Empirical(points)) for quantity in (marginals.velocity, marginals.score, marginals.log_density)
    ]
    whole = [quantity(x, 0.7) for quantity in quantities]
    monkeypatch.setattr(marginals, "_BLOCK_NUMBERS", 10 * x.size)
    for quantity, expected in zip(quantities, whole, strict=True):
        np.testing.assert_allclose(quantity(x, 0.7), expected, rtol=1e-5, atol=1e-5)


def test_sixty_thousand_images_fit_in_two_gigabytes():
    """What the compiled program allocates for Fashion-MNIST's training set and a batch of 256."""
    field = jax.jit(lambda points, x, t: marginals.velocity(paths.Linear(), marginals.Empirical(points))(x, t))
    shapes = (
        jax.ShapeDtypeStruct((60_000, 784), jnp.float32),
        jax.ShapeDtypeStruct((256, 784), jnp.float32),
        jax.ShapeDtypeStruct((256,), jnp.float32),
    )
    memory = field.lower(*shapes).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes < 2e9


def test_images_keep_their_shape(key):
    points = jax.random.normal(key, (9, 4, 4, 1))
    assert marginals.velocity(paths.Linear(), marginals.Empirical(points))(points[:3], jnp.full(3, 0.5)).shape == (3, 4, 4, 1)


def test_samples_have_the_moments(key):
    data = mixture()
    draws = data.sample(key, 100_000)
    mean, covariance = moments(data)
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * float(jnp.sqrt(covariance.max() / 1e5)))
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05)
    points = jnp.arange(5.0)[:, None]
    counts = np.bincount(np.asarray(marginals.Empirical(points).sample(key, 50_000)[:, 0], int))
    np.testing.assert_allclose(counts / 50_000, 0.2, atol=0.01)


def moments(data):
    mean = data.weights @ data.means
    centred = data.means - mean[None]
    return mean, jnp.einsum("k,ki,kj->ij", data.weights, centred, centred) + (data.weights @ data.scales**2) * jnp.eye(2)


def test_scales_of_every_shape_agree(key):
    x, means, weights = jax.random.normal(key, (5, 2)), jnp.ones((3, 2)) * jnp.arange(3.0)[:, None], jnp.full(3, 1 / 3)
    shapes = [jnp.array(0.5), jnp.full(3, 0.5), jnp.full((3, 2), 0.5)]
    values = [marginals.velocity(paths.Linear(), marginals.GaussianMixture(weights, means, scales))(x, 0.5) for scales in shapes]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-6)


def test_bad_input_is_named():
    field = marginals.velocity(paths.Linear(), mixture())
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), that is 3 numbers per example, but the distribution has 2"):
        field(jnp.zeros((4, 3)), 0.5)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        field(jnp.zeros((4, 2)), jnp.zeros(3))
    with pytest.raises(TypeError, match="x has dtype int32"):
        field(jnp.zeros((4, 2), int), 0.5)


def gaussians(weights: Any = (0.5, 0.5), means: Any = ((1.0, 0.0), (-1.0, 0.5)), scales: Any = 0.7):
    return marginals.GaussianMixture(*map(jnp.asarray, (weights, means, scales)))


BAD_DATA = {
    "three weights": (
        lambda: gaussians(np.ones(3)),
        ValueError,
        r"weights has shape \(3,\), means \(2, 2\) and scales \(\), but .* K weights",
    ),
    "no axis of weights": (lambda: gaussians(1.0), ValueError, r"weights has shape \(\)"),
    "three scales": (lambda: gaussians(scales=np.ones(3)), ValueError, r"scales \(3,\), but .* one per component"),
    "scales of other coordinates": (lambda: gaussians(scales=np.ones((2, 3))), ValueError, r"scales \(2, 3\)"),
    "numbers": (lambda: gaussians(np.ones(3), np.ones(2), np.ones(2)), ValueError, r"weights has shape \(3,\), means \(2,\)"),
    "negative weight": (lambda: gaussians((-1.0, 2.0)), ValueError, "weights has negative numbers, the least -1, .* at least 0"),
    "NaN weight": (lambda: gaussians((np.nan, 2.0)), ValueError, "weights has numbers that are not finite"),
    "no weight": (lambda: gaussians((0.0, 0.0)), ValueError, "weights sum to 0, .* at least one above 0"),
    "weights too large": (lambda: gaussians((3e38, 3e38)), ValueError, "weights sum to inf, .* whose sum is finite"),
    "complex weights": (lambda: gaussians((1j, 1.0)), TypeError, "weights has dtype complex64, but they are real numbers"),
    "complex scale": (lambda: gaussians(scales=0.1 + 0j), TypeError, "scales has dtype complex64"),
    "no components": (lambda: gaussians(np.ones(0), np.ones((0, 2))), ValueError, r"weights has shape \(0,\), .* at least one"),
    "no coordinates": (lambda: gaussians(means=np.ones((2, 0))), ValueError, r"weights has shape \(2,\), means \(2, 0\)"),
    "negative scale": (lambda: gaussians(scales=-0.1), ValueError, "scales has negative numbers, the least -0.1"),
    "infinite scale": (lambda: gaussians(scales=np.inf), ValueError, "scales has numbers that are not finite"),
    "NaN mean": (lambda: gaussians(means=np.full((2, 2), np.nan)), ValueError, "means has numbers that are not finite"),
    "whole means": (lambda: gaussians(means=np.ones((2, 2), int)), TypeError, "means has dtype int32"),
    "no points": (lambda: marginals.Empirical(jnp.ones((0, 2))), ValueError, r"points has shape \(0, 2\), but .* at least one point"),
    "one number": (lambda: marginals.Empirical(jnp.array(1.0)), ValueError, r"points has shape \(\)"),
    "NaN point": (lambda: marginals.Empirical(jnp.array([[1.0, np.nan]])), ValueError, "points has numbers that are not finite"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_named(make, error, message, key):
    data, x = make(), jnp.zeros((3, 2))
    with pytest.raises(error, match=message):
        data.sample(key, 2)
    for quantity in (marginals.velocity, marginals.score, marginals.log_density):
        with pytest.raises(error, match=message):
            quantity(paths.Linear(), data)(x, 0.5)
        # Known inside `jit` too; where they are not, shapes are.
        with pytest.raises(error, match=message):
            jax.jit(quantity(paths.Linear(), data))(x, 0.5)
        if "shape" in message:
            with pytest.raises(error, match=message):
                jax.jit(lambda data, quantity=quantity: quantity(paths.Linear(), data)(x, 0.5))(data)


def test_whole_points_are_named():
    with pytest.raises(TypeError, match="points has dtype int32"):
        marginals.score(paths.Linear(), marginals.Empirical(jnp.ones((3, 2), int)))(jnp.zeros((3, 2)), 0.5)


@pytest.mark.parametrize("n", [0, -1, 2.5, None, True])
def test_draws_are_counted(n, key):
    for data in (mixture(), marginals.Empirical(jnp.ones((3, 2)))):
        with pytest.raises(ValueError, match=f"n is {n!r}, but it is how many draws are made: a whole number, at least 1"):
            data.sample(key, n)


def test_weights_are_proportions(key):
    x, whole, parts = jax.random.normal(key, (5, 2)), gaussians((3.0, 1.0)), gaussians((0.75, 0.25))
    np.testing.assert_array_equal(whole.sample(key, 100), parts.sample(key, 100))
    for quantity in (marginals.velocity, marginals.score, marginals.log_density):
        np.testing.assert_allclose(quantity(paths.Linear(), whole)(x, 0.5), quantity(paths.Linear(), parts)(x, 0.5), rtol=1e-6)


def test_scales_of_zero_are_points(key):
    x, means, points = jax.random.normal(key, (5, 2)), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), gaussians(scales=0.0)
    assert (points.sample(key, 20)[:, None] == means[None]).all(-1).any(1).all()
    for quantity in (marginals.velocity, marginals.score, marginals.log_density):
        expected = quantity(paths.Linear(), marginals.Empirical(means))(x, 0.5)
        np.testing.assert_allclose(quantity(paths.Linear(), points)(x, 0.5), expected, rtol=1e-5)


def test_numbers_that_are_not_known_make_a_mixture():
    """Mapped, differentiated and compiled, alone and beside numbers that are known, of NumPy or in lists."""
    x = jnp.zeros((3, 2))

    def total(weight):
        parts: list[Any] = [[weight, 1 - weight], np.array([[1.0, 0.0], [-1.0, 0.5]], np.float32), [0.5, weight]]
        data = marginals.GaussianMixture(*parts)
        return marginals.velocity(paths.Linear(), data)(x, 0.5).sum()

    expected, slope = jax.value_and_grad(total)(0.3)
    np.testing.assert_allclose(jax.jit(total)(0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(total)(jnp.array([0.3])), [expected], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.3), slope, rtol=1e-5)
