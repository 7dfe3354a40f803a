"""The exact flow map, against the equations that define it, the velocity's own flow and the distributions it joins."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATHS, name
from jax.test_util import check_grads
from scipy.special import log_ndtr, ndtr, ndtri

from fmjax import betas, marginals, paths, sampling

each_path = pytest.mark.parametrize("path", PATHS, ids=name)
LINEAR = paths.Linear()


def line(scales: Any = (0.5, 0.7, 0.4)):
    """Three unlike components of one coordinate."""
    return marginals.GaussianMixture(jnp.array([0.2, 0.5, 0.3]), jnp.array([[2.0], [-1.5], [0.3]]), jnp.asarray(scales))


def normal():
    """One component in the plane, with a scale per coordinate."""
    return marginals.GaussianMixture(jnp.ones(1), jnp.array([[1.0, -0.5]]), jnp.array([[0.4, 1.5]]))


def states_and_times(key, n=24):
    """Of `line` and `normal` side by side, with a time each."""
    return 1.5 * jax.random.normal(key, (n, 3)), *jax.random.uniform(jax.random.fold_in(key, 1), (3, n), minval=0.05, maxval=0.95)


def velocity(path, x, t):
    return jnp.concatenate([marginals.velocity(path, line())(x[:, :1], t), marginals.velocity(path, normal())(x[:, 1:], t)], axis=1)


def log_mass(path, data, x, t, side=1):
    """The logarithm of the mass of p_t below x, or above it where `side` is -1, of one coordinate and by SciPy."""
    alpha, beta, weights, means, scales = map(np.asarray, (path.alpha(t), path.beta(t), data.weights, data.means[:, 0], data.scales))
    z = side * (x - alpha * means) / np.sqrt(alpha**2 * scales**2 + beta**2)
    return np.logaddexp.reduce(log_ndtr(z) + np.log(weights)[None], axis=1)


@each_path
def test_maps_compose(path, key, x64):
    flow = jax.jit(marginals.flow_map(path, (line(), normal())))
    x, s, t, u = states_and_times(key)
    # Earlier, later and back, to the ends too.
    t, u = t.at[:4].set(jnp.array([0.0, 1.0, 0.0, 1.0])), u.at[2:6].set(jnp.array([1.0, 0.0, 1.0, 0.0]))
    np.testing.assert_allclose(flow(flow(x, s, t), t, u), flow(x, s, u), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(flow(flow(x, s, t), t, s), x, rtol=1e-11, atol=1e-11)


@each_path
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_time_changes_no_bit(path, dtype, key):
    flow = marginals.flow_map(path, (line(), normal()))
    x, s, *_ = states_and_times(key)
    x, s = x.astype(dtype), s.at[:2].set(jnp.array([0.0, 1.0]))
    for each in (flow, jax.jit(flow)):
        value = each(x, s, s)
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, x)


@each_path
def test_derivatives_are_those_of_the_flow(path, key, x64):
    """In t the velocity where it ends; and none along the flow, d/ds X + (dX / dx) u_s = 0; at equal times and in far tails too."""
    flow = marginals.flow_map(path, (line(), normal()))
    x, s, t, _ = states_and_times(key)
    t, x = t.at[:3].set(s[:3]), x.at[-4:, 0].set(jnp.array([-40.0, -20.0, 15.0, 30.0]))

    @jax.jit
    def derivatives():
        y, lagrangian = jax.jvp(lambda t: flow(x, s, t), (t,), (jnp.ones_like(t),))
        eulerian = jax.jvp(lambda x, s: flow(x, s, t), (x, s), (velocity(path, x, s), jnp.ones_like(s)))[1]
        return lagrangian, velocity(path, y, t), eulerian

    lagrangian, expected, eulerian = derivatives()
    np.testing.assert_allclose(lagrangian, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_less(jnp.abs(eulerian), 1e-11 * (1 + jnp.abs(x)))


@each_path
def test_the_velocity_leads_there(path, key, x64, optimized):
    x, *_ = states_and_times(key)
    grid = jnp.linspace(0.2, 0.8, 401)
    followed = jax.jit(lambda x: sampling.sample_ode(lambda x, t: velocity(path, x, t), x, grid, step=sampling.rk4)[0])(x)
    # A table's third derivative jumps at each of its steps.
    tolerance = 1e-6 if isinstance(path, betas.Betas) else 1e-8
    np.testing.assert_allclose(marginals.flow_map(path, (line(), normal()))(x, 0.2, 0.8), followed, rtol=tolerance, atol=tolerance)


@each_path
def test_samples_go_to_samples(path, key):
    """Of both distributions at any time; the mass below them is uniform, to the quantile of Kolmogorov's law at 1 / 1000."""
    n = 4000
    keys = jax.random.split(key, 3)
    ends = jax.random.normal(keys[0], (n, 3)), jnp.concatenate([line().sample(keys[1], n), normal().sample(keys[2], n)], axis=1)
    flow = jax.jit(marginals.flow_map(path, (line(), normal())))
    for s, t in ((0.0, 1.0), (0.6, 0.0), (0.3, 0.7), (1.0, 0.5)):
        y = flow(paths.interpolate(path, *ends, s), s, t)
        mass = np.sort(np.exp(log_mass(path, line(), np.asarray(y[:, :1]), t)))
        assert np.abs(mass - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)
        mean, variance = path.alpha(t) * normal().means[0], path.alpha(t) ** 2 * normal().scales[0] ** 2 + path.beta(t) ** 2
        whitened = (y[:, 1:] - mean[None]) / jnp.sqrt(variance)[None]
        np.testing.assert_allclose(whitened.mean(0), 0, atol=4 / np.sqrt(n))
        np.testing.assert_allclose(np.cov(whitened.T), np.eye(2), atol=6 / np.sqrt(n))


@pytest.mark.parametrize("path", [LINEAR, paths.VariancePreserving(), betas.linear()], ids=name)
def test_tails_keep_their_digits(path):
    """Twenty standard deviations out, where mass is far below the least number of float32: against float64, and that against SciPy."""
    x = np.concatenate([np.linspace(-20, -10, 41), np.linspace(-10, 10, 81)[1:-1], np.linspace(10, 20, 41)])[:, None]
    for s, t in ((0.0, 1.0), (0.0, 0.5), (0.5, 0.9), (0.9, 0.3), (1.0, 0.0)):
        y = np.asarray(marginals.flow_map(path, line())(jnp.asarray(x, jnp.float32), s, t))
        with jax.enable_x64(True):
            expected = np.asarray(marginals.flow_map(path, line())(jnp.asarray(x, jnp.float64), s, t))
            for side, half in ((1, x[:, 0] <= 0), (-1, x[:, 0] >= 0)):
                masses = log_mass(path, line(), expected[half], np.float64(t), side), log_mass(path, line(), x[half], np.float64(s), side)
                np.testing.assert_allclose(*masses, rtol=1e-12)
        assert (np.diff(y[:, 0]) > 0).all()
        np.testing.assert_allclose(y, expected, rtol=3e-6, atol=1e-5)


def test_gaps_keep_their_digits():
    """Between narrow components nearly all mass is on one side or the other, and what is left says where x is."""
    x, data = (
        np.linspace(-1.9, 1.9, 21)[:, None],
        marginals.GaussianMixture(jnp.ones(2), jnp.array([[2.0], [-2.0]]), jnp.array([0.05, 0.1])),
    )
    time, one = jnp.float32(0.95), jnp.ones((), jnp.float32)
    y, dy = jax.jvp(lambda t: marginals.flow_map(LINEAR, data)(jnp.asarray(x, jnp.float32), 0.9, t), (time,), (one,))
    with jax.enable_x64(True):
        expected = marginals.flow_map(LINEAR, data)(jnp.asarray(x), np.float64(np.float32(0.9)), np.float64(time))
        slope = marginals.velocity(LINEAR, data)(expected, np.float64(time))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dy, slope, rtol=1e-4, atol=1e-4)


def test_derivatives_of_derivatives(key, x64):
    """Forwards and in reverse, in all that the map depends on, against finite differences: a grad of a jvp is among them."""
    x, s, t, _ = states_and_times(key, 3)

    @jax.jit
    def total(x, s, t, weights, means, scales, power):
        data = marginals.GaussianMixture(weights, means, scales), marginals.GaussianMixture(jnp.ones(1), means[:2].T, scales[0])
        return jnp.sin(marginals.flow_map(paths.Polynomial(power), data)(x, s, t)).sum()

    data = line()
    check_grads(total, (x, s, t, data.weights, data.means, data.scales, 1.5), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_a_mean_velocity_is_its_own_target(key, x64):
    """u = (X_{s,t}(x) - x) / (t - s) solves (t - s) (du/ds + u_s . grad u) = u - u_s (Geng et al. 2025, arXiv:2505.13447), and so does its
    gradient."""
    flow = marginals.flow_map(LINEAR, line())
    x, s, t, _ = states_and_times(key)
    x = x[:, :1]

    def residual(x, s):
        mean = lambda x, s: (flow(x, s, t) - x) / (t - s)[:, None]
        u_s = marginals.velocity(LINEAR, line())(x, s)
        u, du = jax.jvp(mean, (x, s), (u_s, jnp.ones_like(s)))
        return (t - s)[:, None] * du - (u - u_s)

    assert jnp.abs(residual(x, s)).max() < 1e-10
    gradient = jax.jit(jax.grad(lambda x: (residual(x, s) ** 2 + residual(x, s)).sum()))(x)
    assert jnp.abs(gradient).max() < 1e-8


@pytest.mark.parametrize("path", [paths.VariancePreserving(), paths.SquareRoot(), betas.linear()], ids=name)
def test_space_has_derivatives_where_time_has_none(path, key):
    x, *_ = states_and_times(key)
    flow = marginals.flow_map(path, (line(), normal()))
    for s, t in ((0.5, 1.0), (1.0, 0.5), (1.0, 0.0)):
        gradient = jax.grad(lambda x, s=s, t=t: flow(x, s, t).sum())(x)
        assert jnp.isfinite(gradient).all()
        assert (gradient > 0).all()


def test_one_component_is_a_closed_form(key):
    """In any shape, and as one component among others without weight."""
    means, x = jax.random.normal(key, (1, 4, 4, 1)), jax.random.normal(jax.random.fold_in(key, 1), (5, 4, 4, 1))
    value = marginals.flow_map(LINEAR, marginals.GaussianMixture(jnp.ones(1), means, 0.5))(x, jnp.linspace(0, 1, 5), 0.75)
    s = jnp.linspace(0, 1, 5).reshape(-1, 1, 1, 1)
    ratio = jnp.sqrt((0.75**2 * 0.25 + 0.25**2) / (s**2 * 0.25 + (1 - s) ** 2))
    np.testing.assert_allclose(value, 0.75 * means + ratio * (x - s * means), rtol=1e-5, atol=1e-6)
    alone = marginals.GaussianMixture(jnp.ones(1), jnp.ones((1, 1)), 0.5)
    among = marginals.GaussianMixture(jnp.array([0.0, 1.0]), jnp.array([[-1.0], [1.0]]), jnp.array([0.3, 0.5]))
    x = x.reshape(-1, 1)
    np.testing.assert_allclose(
        marginals.flow_map(LINEAR, among)(x, 0.2, 0.8), marginals.flow_map(LINEAR, alone)(x, 0.2, 0.8), rtol=1e-5, atol=1e-5
    )


def test_a_tuple_is_a_product(key):
    x, s, t, _ = states_and_times(key)
    whole = marginals.flow_map(LINEAR, (normal(), line()))(x, s, t)
    parts = marginals.flow_map(LINEAR, normal())(x[:, :2], s, t), marginals.flow_map(LINEAR, line())(x[:, 2:], s, t)
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-6, atol=1e-6)


def test_pytrees_go_along_their_paths(key):
    means = {"a": jnp.array([[1.0, -0.5]]), "b": jnp.array([[0.3]])}
    x, s, t, _ = states_and_times(key)
    x, each = {"a": x[:, :2], "b": x[:, 2:]}, {"a": LINEAR, "b": paths.Cosine()}
    value = marginals.flow_map(paths.joint(each, x), marginals.GaussianMixture(jnp.ones(1), means, 0.6))(x, s, t)
    for leaf, path in each.items():
        alone = marginals.flow_map(path, marginals.GaussianMixture(jnp.ones(1), means[leaf], 0.6))(x[leaf], s, t)
        np.testing.assert_allclose(value[leaf], alone, rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_single(key):
    x, s, t, _ = states_and_times(key)
    x, flow = x.astype(jnp.bfloat16), marginals.flow_map(LINEAR, (line(), normal()))
    np.testing.assert_array_equal(flow(x, s, t), flow(x.astype(jnp.float32), s, t).astype(jnp.bfloat16))


def test_mixtures_are_mapped_over(key):
    x, s, t, _ = states_and_times(key)
    x, scales = x[:, :1], jnp.array([[0.5, 0.7, 0.4], [0.1, 0.3, 0.9]])
    together = jax.vmap(lambda scales: marginals.flow_map(LINEAR, line(scales))(x, s, t))(scales)
    for value, each in zip(together, scales, strict=True):
        np.testing.assert_allclose(value, marginals.flow_map(LINEAR, line(each))(x, s, t), rtol=1e-5, atol=1e-6)


def test_times_and_numbers_are_traced_once(key):
    traces, (x, s, t, _) = [], states_and_times(key)

    @jax.jit
    def carried(data, x, s, t):
        traces.append(t)
        return marginals.flow_map(LINEAR, data)(x, s, t)

    for scale in (0.3, 0.5):
        for start, end in ((s, t), (t, s), (s, s)):
            assert jnp.isfinite(carried(line(jnp.full(3, scale)), x[:, :1], start, end)).all()
    assert len(traces) == 1


def test_points_are_reached_and_not_left():
    points = line(0.0)
    x = jnp.array([-3.0, -0.1, 0.1, 0.8, 0.9, 3.0])[:, None]
    np.testing.assert_allclose(marginals.flow_map(LINEAR, points)(x, 0.0, 1.0)[:, 0], [-1.5, -1.5, 0.3, 0.3, 2.0, 2.0], atol=1e-5)
    one = marginals.GaussianMixture(jnp.ones(1), jnp.array([[0.7]]), 0.0)
    np.testing.assert_allclose(marginals.flow_map(LINEAR, one)(x, 0.0, 1.0), 0.7, rtol=1e-6)
    for data in (points, one, (line(), one)):
        with pytest.raises(ValueError, match=r"s has a time of Linear\(\) at which no noise is left, .* start the map earlier"):
            marginals.flow_map(LINEAR, data)(jnp.zeros((2, 2 if isinstance(data, tuple) else 1)), jnp.array([0.5, 1.0]), 0.5)
    assert not jnp.isfinite(jax.jit(marginals.flow_map(LINEAR, one))(x, 1.0, 0.5)).any()


def test_derivatives_where_points_are_reached(x64):
    """0 in space, where all nearby goes to one point, beside a component that has a width too; in time the limit's."""
    x = jnp.array([-3.0, -0.1, 0.1, 0.8, 3.0])[:, None]
    around = marginals.GaussianMixture(jnp.ones(3), jnp.array([[-1.0], [0.0], [1.0]]), 0.0)
    for data in (line(0.0), line(jnp.array([0.0, 0.7, 0.0])), around, marginals.GaussianMixture(jnp.ones(1), jnp.array([[0.7]]), 0.0)):
        flow = marginals.flow_map(LINEAR, data)
        arrived = np.isclose(flow(x, 0.0, 1.0), np.asarray(data.means)[np.broadcast_to(data.scales, len(data.means)) == 0].T).any(1)
        assert arrived.any()
        gradient = jax.grad(lambda x, t, flow=flow: flow(x, 0.0, t).sum())
        np.testing.assert_allclose(gradient(x, 1.0)[:, 0], np.where(arrived, 0, gradient(x, 1 - 1e-7)[:, 0]), rtol=1e-5, atol=1e-12)
        slope = lambda t, flow=flow: jax.jvp(lambda t: flow(x, 0.0, t), (t,), (1.0,))[1]
        np.testing.assert_allclose(slope(1.0), slope(1 - 1e-7), rtol=1e-5)


@pytest.mark.parametrize("far", [1e12, 1e20, 1e30])
def test_states_whose_squares_float32_does_not_hold(far):
    x = far * np.array([-1.0, -0.3, 0.3, 1.0])[:, None]
    for s, t in ((0.0, 1.0), (0.0, 0.5), (0.9, 0.3)):
        flow = lambda x, s=s, t=t: marginals.flow_map(LINEAR, line())(x, s, t)
        y, gradient = flow(jnp.asarray(x, jnp.float32)), jax.grad(lambda x, flow=flow: flow(x).sum())(jnp.asarray(x, jnp.float32))
        with jax.enable_x64(True):
            np.testing.assert_allclose(y, flow(jnp.asarray(x)), rtol=1e-5)
        np.testing.assert_allclose(gradient, y / x, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e-10, 1e-15, 1e-18])
def test_components_that_are_narrow_where_a_map_starts(scale):
    """They send a state far away, each alone, and matter little: here what is left is the other's share of the mass."""
    data = marginals.GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[0.0], [3.0]]), jnp.array([1.0, scale]))
    expected = ndtri(0.5 * ndtr(0.7))
    np.testing.assert_allclose(marginals.flow_map(LINEAR, data)(jnp.array([[0.7]]), 1.0, 0.0), expected, rtol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(marginals.flow_map(LINEAR, data)(jnp.array([[0.7]]), 1.0, 0.0), expected, rtol=1e-12)


def test_scales_whose_squares_are_zero():
    one = marginals.GaussianMixture(jnp.ones(1), jnp.ones((1, 1)), 1e-25)
    np.testing.assert_allclose(marginals.flow_map(LINEAR, one)(jnp.ones((1, 1)), 1.0, 0.5), 0.5)


def test_a_component_far_away_changes_no_digit():
    means = jnp.array([[0.0], [1.0], [1e8]])
    data = marginals.GaussianMixture(jnp.array([0.5, 0.5, 1e-4]), means, jnp.array([0.1, 0.1, 0.1]))
    found = marginals.flow_map(LINEAR, data)(jnp.array([[-0.7]]), 0.0, 1.0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(found, marginals.flow_map(LINEAR, data)(jnp.array([[-0.7]]), 0.0, 1.0), rtol=1e-4)


@pytest.mark.parametrize("path", [paths.SquareRoot(), paths.VariancePreserving(), betas.linear(), paths.Polynomial(1.5)], ids=name)
def test_times_are_held_to_the_path(path):
    """Sums of steps end beside it by rounding, where its numbers are none."""
    flow, x = marginals.flow_map(path, line()), jnp.array([[0.3]])
    np.testing.assert_array_equal(flow(x, -1e-5, 1 + 1e-5), flow(x, 0.0, 1.0))


PLANE = marginals.GaussianMixture(jnp.ones(2), jnp.eye(2), 1.0)
LEAVES = marginals.GaussianMixture(jnp.ones(1), {"a": jnp.zeros((1, 2))}, 1.0)


@pytest.mark.parametrize(
    ("path", "distribution", "error", "message"),
    [
        (LINEAR, PLANE, ValueError, "distribution has 2 components of 2 coordinates, .* a tuple of distributions .* sampling.sample_ode"),
        (LINEAR, (line(), PLANE), ValueError, "distribution has 2 components of 2 coordinates"),
        (
            LINEAR,
            marginals.Empirical(jnp.zeros((3, 1))),
            TypeError,
            "distribution, or a part of it, is of the type Empirical, but an exact",
        ),
        (LINEAR, (line(), LINEAR), TypeError, "a part of it, is of the type Linear"),
        (LINEAR, [line()], TypeError, "is of the type list"),
        (LINEAR, None, TypeError, "is of the type NoneType"),
        (LINEAR, (), ValueError, "distribution is a tuple, but not of distributions of one array each: give one at least"),
        (LINEAR, (LEAVES,), ValueError, "distribution is a tuple, but not of distributions of one array each"),
        (LINEAR, line(-1.0), ValueError, "scales has negative numbers"),
        (LINEAR, line(jnp.ones(2)), ValueError, r"scales \(2,\), but"),
        (paths.Linear, line(), TypeError, r"path is .* which is a class: make one with Linear\(\)"),
        (line(), LINEAR, TypeError, "path is GaussianMixture"),
    ],
)
def test_maps_that_are_not_known_are_named(path, distribution, error, message):
    with pytest.raises(error, match=message):
        marginals.flow_map(path, distribution)


@pytest.mark.parametrize(
    ("distribution", "change", "error", "message"),
    [
        (line(), {"x": jnp.zeros((4, 2))}, ValueError, r"x has shape \(4, 2\), but the distribution is one of 1 numbers .* x as \(B, 1\)"),
        (line(), {"x": jnp.zeros(4)}, ValueError, r"x has shape \(4,\), but arrays are batch first"),
        (line(), {"x": jnp.zeros((4, 1), int)}, TypeError, "x has dtype int32"),
        (line(), {"x": {"a": jnp.zeros((4, 1))}}, ValueError, "but the distribution is of one array"),
        (
            (line(), normal()),
            {"x": jnp.zeros((4, 2))},
            ValueError,
            r"x has shape \(4, 2\), .* \(B, 3\), the parts of the tuple side by side",
        ),
        ((line(), normal()), {"x": jnp.zeros((4, 3, 1))}, ValueError, r"x has shape \(4, 3, 1\), .* the parts of the tuple side by side"),
        (line(), {"s": jnp.zeros(3)}, ValueError, r"^s has shape \(3,\), but it must be \(\) or one time per example"),
        (line(), {"s": jnp.zeros((4, 1))}, ValueError, r"^s has shape \(4, 1\)"),
        (line(), {"t": jnp.zeros(3)}, ValueError, r"^t has shape \(3,\)"),
        (line(), {"s": -0.5}, ValueError, "^s is -0.5, but times go from 0"),
        (line(), {"t": 2}, ValueError, "^t is 2, but times go from 0"),
        (line(), {"s": jnp.zeros(4, int)}, TypeError, "^s has dtype int32, but times are floats"),
        (line(), {"s": None}, TypeError, "^s has dtype object"),
    ],
)
def test_states_and_times_that_do_not_fit_are_named(distribution, change, error, message):
    size = 3 if isinstance(distribution, tuple) else 1
    with pytest.raises(error, match=message):
        marginals.flow_map(LINEAR, distribution)(**{"x": jnp.zeros((4, size)), "s": 0.2, "t": 0.7} | change)
