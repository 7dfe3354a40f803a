"""Likelihood: the exact density of a mixture's flow, estimates within their standard errors, gradients by differences."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, mixture, name

from fmjax import likelihood, marginals, paths, sampling, times

GRID = np.linspace(0, 1, 201)


def images():
    """A mixture of two images and its noise's density."""
    means = jax.random.normal(jax.random.key(7), (2, 8, 8, 1))
    return marginals.GaussianMixture(jnp.array([0.3, 0.7]), means, jnp.array([0.6, 0.9]))


def rademacher(key, *shape):
    return jax.random.rademacher(key, shape, float)


@pytest.mark.parametrize("path", BOUNDED, ids=name)
@pytest.mark.parametrize("data", [mixture, images], ids=["(2,)", "(8, 8, 1)"])
def test_density_of_a_mixture(path, data, key, x64):
    data = data()
    x_1 = data.sample(key, 8)
    field = marginals.velocity(path, data)
    scale = path.beta(0.0)
    noise = lambda x: likelihood.normal(x / scale) - x[0].size * np.log(scale)
    found = jax.jit(lambda x: likelihood.log_density(field, noise, x, GRID))(x_1)
    np.testing.assert_allclose(found.log_p, marginals.log_density(path, data)(x_1, 1.0), atol=1e-4)
    np.testing.assert_array_equal(found.standard_error, 0.0)


@pytest.mark.parametrize("data", [mixture, images], ids=["(2,)", "(8, 8, 1)"])
@pytest.mark.parametrize("sketched", [False, True], ids=["hutchinson", "hutch++"])
def test_estimates_lie_within_their_standard_errors(data, sketched, key, x64):
    data, path = data(), paths.Linear()
    x_1 = data.sample(key, 6)
    probes = rademacher(jax.random.key(1), 6, 64, *x_1.shape[1:])
    sketch = rademacher(jax.random.key(2), 6, 1, *x_1.shape[1:])
    divergence = likelihood.hutch_plus_plus(sketch, probes) if sketched else likelihood.hutchinson(probes)
    field = marginals.velocity(path, data)
    found = jax.jit(lambda x: likelihood.log_density(field, likelihood.normal, x, times.uniform_grid(100), divergence=divergence))(x_1)
    assert np.all(found.standard_error > 0)
    truth = marginals.log_density(path, data)(x_1, 1.0)
    np.testing.assert_array_less(np.abs(found.log_p - truth), 4 * found.standard_error + 1e-3)


def linear(matrix):
    """A field with that Jacobian in every example."""
    return lambda x, t: (x.reshape(len(x), -1) @ matrix.T).reshape(x.shape)


def test_divergences_of_a_linear_field(key, x64):
    matrix, x = jax.random.normal(key, (12, 12)), jnp.ones((3, 2, 3, 2))
    trace = jnp.trace(matrix)
    u, exact = likelihood.exact_divergence(linear(matrix), x, 0.5)
    np.testing.assert_allclose(exact, trace, rtol=1e-12)
    np.testing.assert_allclose(u, linear(matrix)(x, 0.5), rtol=1e-12)
    np.testing.assert_allclose(likelihood.exact_divergence(linear(matrix), x, 0.5, block=5)[1], trace, rtol=1e-12)
    probes = rademacher(key, 3, 400, 2, 3, 2)
    for divergence in (likelihood.hutchinson(probes), likelihood.hutch_plus_plus(probes[:, :4], probes[:, 4:])):
        u, each = divergence(linear(matrix), x, 0.5)
        np.testing.assert_allclose(u, linear(matrix)(x, 0.5), rtol=1e-12)
        error = np.std(each, axis=1, ddof=1) / np.sqrt(each.shape[1])
        np.testing.assert_array_less(np.abs(each.mean(1) - trace), 4 * error)


def test_hutch_plus_plus_is_exact_on_what_its_sketch_spans(key, x64):
    left, right = jax.random.normal(key, (2, 3, 12))
    x, probes = jnp.ones((2, 12)), rademacher(key, 2, 4, 12)
    each = likelihood.hutch_plus_plus(probes[:, :3], probes[:, 3:])(linear(left.T @ right), x, 0.5)[1]
    np.testing.assert_allclose(each, jnp.trace(left.T @ right), rtol=1e-10)


def test_derivatives_of_hutch_plus_plus(key, x64):
    """Over all signs, whose mean is the expectation, those of the trace: of any rank, though Q has no derivative below the full one."""
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=3)))
    x, probes = jax.random.normal(key, (2, 3)), jnp.broadcast_to(signs, (2, 8, 3))
    estimate = likelihood.hutch_plus_plus(probes[:, :2], probes)
    trace = lambda matrix, divergence: divergence(lambda x, t: jnp.tanh(x @ matrix.T), x, 0.5)[1].reshape(2, -1).mean(1).sum()
    slopes = jax.jit(lambda matrix: [jax.grad(trace)(matrix, divergence) for divergence in (estimate, likelihood.exact_divergence)])
    for matrix in (jnp.zeros((3, 3)), jnp.ones((3, 3)), jax.random.normal(key, (3, 3))):
        estimated, exact = slopes(matrix)
        np.testing.assert_allclose(estimated, exact, rtol=1e-10, atol=1e-12)


def test_sampling_and_its_way_back_agree(key, x64):
    data, path = mixture(), paths.Cosine()
    field, x_0 = marginals.velocity(path, data), sampling.noise(key, (16, 2), float)
    there = likelihood.sample(field, likelihood.normal, x_0, GRID)
    np.testing.assert_allclose(there.x, sampling.sample_ode(field, x_0, GRID, step=sampling.rk4)[0], rtol=1e-12)
    np.testing.assert_allclose(there.log_p, marginals.log_density(path, data)(there.x, 1.0), atol=2e-4)
    back = likelihood.log_density(field, likelihood.normal, there.x, GRID)
    np.testing.assert_allclose(back.x, x_0, atol=2e-4)
    np.testing.assert_allclose(back.log_p, there.log_p, atol=2e-4)


@pytest.mark.parametrize("estimated", [False, True])
def test_gradients_agree_with_differences(estimated, key, x64):
    probes = rademacher(key, 3, 2, 2)
    divergence = likelihood.hutchinson(probes) if estimated else likelihood.exact_divergence
    x_1 = mixture().sample(key, 3)

    @jax.jit
    def total(weights):
        def field(x, t):
            return jnp.tanh(x @ weights) * (1 + t)

        return likelihood.log_density(field, likelihood.normal, x_1, times.uniform_grid(10), divergence=divergence).log_p.sum()

    weights, direction = jax.random.normal(key, (2, 2, 2))
    slope = jnp.vdot(jax.grad(total)(weights), direction)
    difference = (total(weights + 1e-5 * direction) - total(weights - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_probes_are_drawn_once(key):
    """The compiled loop holds no random bits, and its body one evaluation of the field and its products a stage."""
    x_1, calls = mixture().sample(key, 3), []

    def field(x, t):
        calls.append(t)
        return -x

    probes = rademacher(key, 3, 2, 2)
    jaxpr = jax.make_jaxpr(
        functools.partial(
            likelihood.log_density, field, likelihood.normal, times=times.uniform_grid(50), divergence=likelihood.hutchinson(probes)
        )
    )(x_1)
    assert not any(word in str(jaxpr) for word in ("random_bits", "threefry", "random_wrap"))
    # Four stages of rk4; once for the shape of the divergence and thrice for the checks at the grid's ends.
    assert len(calls) == 8


def test_bits_per_dimension_of_noise(key):
    """Levels that are all equally likely need log_2 of their number."""
    levels, shape = 16, (4, 4, 1)
    width = 2 / (levels - 1)
    x = jax.random.randint(key, (5, *shape), 0, levels) * width - 1
    spread = likelihood.dequantize(key, x, width)
    assert np.abs(spread - x).max() <= width / 2
    log_p = jnp.full(5, -np.prod(shape) * np.log(levels * width))
    np.testing.assert_allclose(likelihood.bits_per_dimension(log_p, shape, width), 4.0, rtol=1e-5)


def test_one_probe_cannot_tell_its_error(key):
    x = jnp.ones((3, 2))
    found = likelihood.log_density(
        lambda x, t: x, likelihood.normal, x, times.uniform_grid(2), divergence=likelihood.hutchinson(rademacher(key, 3, 1, 2))
    )
    assert np.isnan(found.standard_error).all()
    assert np.isfinite(found.log_p).all()


def test_wrong_probes_say_so(key):
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"probes has shape \(4, 3, 2\), but for x of shape \(3, 2\) it must be \(3, k, 2\)"):
        likelihood.hutchinson(jnp.ones((4, 3, 2)))(lambda x, t: x, x, 0.5)
    with pytest.raises(ValueError, match=r"sketch has 5 probes per example, but x of shape \(3, 2\) has only 2 dimensions"):
        likelihood.hutch_plus_plus(jnp.ones((3, 5, 2)), jnp.ones((3, 1, 2)))(lambda x, t: x, x, 0.5)
    with pytest.raises(TypeError, match="x has dtype int32"):
        likelihood.log_density(lambda x, t: x, likelihood.normal, jnp.ones((3, 2), int), times.uniform_grid(2))


def test_half_precision_keeps_the_density_in_float32(key):
    """And a grid may be a list."""
    data, path = mixture(), paths.Linear()
    x_1 = data.sample(key, 4).astype(jnp.bfloat16)
    field = marginals.velocity(path, data)
    found = likelihood.log_density(field, likelihood.normal, x_1, np.linspace(0, 1, 51).tolist())
    assert found.x.dtype == jnp.bfloat16
    assert found.log_p.dtype == jnp.float32
    np.testing.assert_allclose(found.log_p, marginals.log_density(path, data)(x_1.astype(jnp.float32), 1.0), atol=0.05)
    # The noise at the other end is not rounded before its density is taken: a thousand numbers of it would be far off.
    many = jax.random.normal(key, (2, 1000)).astype(jnp.bfloat16)
    halved, single = (
        likelihood.log_density(
            lambda x, t: -x / 3, likelihood.normal, x, GRID[::50], divergence=likelihood.hutchinson(jnp.ones((2, 1, 1000)))
        )
        for x in (many, many.astype(jnp.float32))
    )
    np.testing.assert_array_equal(halved.log_p, single.log_p)


def times_two(x, t):
    return 2 * x


def divergence_of(*shape):
    return lambda field, x, t: (field(x, t), jnp.ones(shape))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 3), (4, 1), (3, 0), (3, 2, 1)])
def test_a_trace_is_one_per_example_or_per_probe(shape):
    for function in (likelihood.log_density, likelihood.sample):
        with pytest.raises(
            ValueError, match=rf"trace of shape {re.escape(str(shape))}, but it is one number per example, \(3,\), or .*\(3, k\)"
        ):
            function(times_two, likelihood.normal, jnp.ones((3, 2)), times.uniform_grid(2), divergence=divergence_of(*shape))


def test_a_column_of_traces_is_one_probe():
    x = jnp.ones((3, 2))
    one, column = (
        likelihood.log_density(times_two, likelihood.normal, x, times.uniform_grid(2), divergence=divergence_of(*shape))
        for shape in ((3,), (3, 1))
    )
    np.testing.assert_allclose(column.log_p, one.log_p, rtol=1e-6)
    assert np.isnan(column.standard_error).all()


@pytest.mark.parametrize("shape", [(3, 1), (), (1,), (3, 2)])
def test_the_density_of_noise_is_one_per_example(shape):
    for function in (likelihood.log_density, likelihood.sample):
        with pytest.raises(ValueError, match=rf"log_density_0 gives shape {re.escape(str(shape))}, .* \(3,\): .*\.sum\(-1\).*\[:, 0\]"):
            function(times_two, lambda x: jnp.ones(shape), jnp.ones((3, 2)), times.uniform_grid(2))
        listed = function(times_two, lambda x: [0.0, 1.0, 2.0], jnp.ones((3, 2)), times.uniform_grid(2)).log_p
        np.testing.assert_allclose(np.diff(listed), 1, rtol=1e-5)


BAD_WIDTHS = [np.ones(2), [0.1], 0, -0.1, np.nan, np.inf, None, True, "0.1", np.str_("0.1"), 1j, np.complex64(1), jnp.complex64(1)]


@pytest.mark.parametrize("width", BAD_WIDTHS, ids=repr)
def test_a_width_is_one_positive_number(width, key):
    for function in (
        lambda: likelihood.dequantize(key, jnp.ones((2, 2)), width),
        lambda: likelihood.bits_per_dimension(jnp.ones(2), (2,), width),
    ):
        with pytest.raises(
            (ValueError, TypeError), match=r"width is .*, but it is (a real number|the step between two levels, .*: one finite number)"
        ):
            function()


@pytest.mark.parametrize("width", [0.5, np.float64(0.5), jnp.bfloat16(0.5), jnp.array(0.5)], ids=repr)
def test_dequantized_data_are_like_x(width, key):
    x = jnp.ones((4, 2), jnp.bfloat16)
    spread = jax.jit(likelihood.dequantize)(key, x, width)
    np.testing.assert_array_equal(spread, likelihood.dequantize(key, x, width))
    # Half precision has no numbers between the levels of images.
    assert spread.dtype == jnp.float32
    assert np.abs(spread - x).max() <= 0.25
    with pytest.raises(TypeError, match="x has dtype uint8"):
        likelihood.dequantize(key, jnp.ones((4, 2), jnp.uint8), width)


@pytest.mark.parametrize("shape", [(0, 2), (-1,), (2.0,), 5, None, "28"], ids=repr)
def test_the_shape_of_an_example_is_of_whole_numbers(shape):
    with pytest.raises(ValueError, match=r"shape is .*, but it is the shape of one example, .* give x\.shape\[1:\]"):
        likelihood.bits_per_dimension(jnp.ones(2), shape, 0.1)


def test_probes_are_at_least_one_of_floats():
    x = jnp.ones((3, 2))
    for divergence in (likelihood.hutchinson, lambda probes: likelihood.hutch_plus_plus(probes, jnp.ones((3, 1, 2)))):
        name = "probes" if divergence is likelihood.hutchinson else "sketch"
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 0, 2\), but an estimate needs at least one probe"):
            divergence(jnp.ones((3, 0, 2)))(times_two, x, 0.5)
        with pytest.raises(TypeError, match=f"{name} has dtype int32"):
            divergence(jnp.ones((3, 4, 2), int))(times_two, x, 0.5)
        with pytest.raises(ValueError, match=rf"{name} has shape \(\), but for x of shape \(3, 2\)"):
            divergence(1.0)(times_two, x, 0.5)
    np.testing.assert_allclose(likelihood.hutchinson(np.ones((3, 1, 2)).tolist())(times_two, x, 0.5)[1], 4.0)


def test_the_normal_density_is_of_examples_of_floats():
    np.testing.assert_allclose(likelihood.normal(np.array([[0.0], [1.0]])), np.array([0.0, -0.5]) - np.log(2 * np.pi) / 2, rtol=1e-6)
    with pytest.raises(TypeError, match="x has dtype int32"):
        likelihood.normal(jnp.ones((3, 2), int))
    with pytest.raises(ValueError, match=r"x has shape \(2,\), .* x\[:, None\]"):
        likelihood.normal(np.array([0.0, 1.0]))
    for function in (likelihood.normal, lambda x: likelihood.log_density(times_two, likelihood.normal, x, times.uniform_grid(2))):
        with pytest.raises(ValueError, match=r"x has shape \(\), but arrays are batch first, .* x\[None\]"):
            function(1.0)
