"""Metrics against closed forms and brute force."""

import functools
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import linalg

from fmjax import metrics

KEY = jax.random.key(0)
# Compiled where they can be: one program a shape.
sliced_wasserstein = jax.jit(functools.partial(metrics.sliced_wasserstein, projections=64))
METRICS = {
    "wasserstein": metrics.wasserstein,
    "sliced_wasserstein": functools.partial(sliced_wasserstein, KEY),
    "energy_distance": jax.jit(metrics.energy_distance),
    "frechet_distance": metrics.frechet_distance,
    "nearest_distance": jax.jit(metrics.nearest_distance),
}
UNCOMPILED = {
    "wasserstein": metrics.wasserstein,
    "sliced_wasserstein": functools.partial(metrics.sliced_wasserstein, KEY, projections=64),
    "energy_distance": metrics.energy_distance,
    "frechet_distance": metrics.frechet_distance,
    "nearest_distance": metrics.nearest_distance,
}
COMPILED = ["sliced_wasserstein", "energy_distance", "nearest_distance"]
DISTANCES = ["wasserstein", "sliced_wasserstein", "energy_distance", "frechet_distance"]

# Few sizes, so that few programs are compiled; the numbers vary with the seed.
seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([(6, 6), (4, 6)])
few = settings(deadline=None, max_examples=12)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantile_w2(x, y):
    """W_2 of two sets of numbers: the quantile functions' difference, integrated over a common refinement."""
    refined = np.lcm(len(x), len(y))
    x, y = (np.repeat(np.sort(np.asarray(points, np.float64)), refined // len(points)) for points in (x, y))
    return np.sqrt(((x - y) ** 2).mean())


def spd(rng, size):
    root = rng.normal(size=(size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


def with_moments(rng, n, mean, cov):
    """A set whose mean and covariance are exactly these."""
    x = rng.normal(size=(n, len(mean)))
    x = x - x.mean(0, keepdims=True)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean[None]


@few
@given(seeds, sizes)
def test_wasserstein_of_numbers_is_sorting(seed, size):
    x, y = draw(seed, size[0], 1), 2 * draw(seed + 1, size[1], 1) - 1
    np.testing.assert_allclose(metrics.wasserstein(x, y), quantile_w2(x[:, 0], y[:, 0]), rtol=1e-5)


def test_wasserstein_of_points_is_the_best_permutation():
    x, y = draw(0, 5, 3), draw(1, 5, 3)
    best = min(((x - y[list(order)]) ** 2).sum(-1).mean() for order in itertools.permutations(range(5)))
    np.testing.assert_allclose(metrics.wasserstein(x, y), np.sqrt(best), rtol=1e-5)


@few
@given(seeds, sizes)
def test_sliced_wasserstein_of_numbers_is_sorting(seed, size):
    # On the line every direction is 1 or -1, so the slices are the sets themselves.
    x, y = draw(seed, size[0], 1), 2 * draw(seed + 1, size[1], 1) - 1
    np.testing.assert_allclose(METRICS["sliced_wasserstein"](x, y), quantile_w2(x[:, 0], y[:, 0]), rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 3)])
def test_sliced_wasserstein_in_the_plane_is_an_integral_over_angles(n, m):
    x, y = draw(2, n, 2), draw(3, m, 2) + np.array([[1.0, 0.0]], np.float32)
    angles = np.pi * (np.arange(400) + 0.5) / 400
    sliced = jax.jit(functools.partial(metrics.sliced_wasserstein, projections=8192))
    exact = np.sqrt(np.mean([quantile_w2(*(points @ np.array([np.cos(a), np.sin(a)]) for points in (x, y))) ** 2 for a in angles]))
    # The mean over 8,192 random directions is within about one percent.
    np.testing.assert_allclose(sliced(KEY, x, y), exact, rtol=0.03)


@few
@given(seeds)
def test_a_shift_is_its_length(seed):
    x, v = draw(seed, 6, 3), 3 * draw(seed + 1, 1, 3)
    length = np.linalg.norm(v)
    np.testing.assert_allclose(metrics.wasserstein(x, x + v), length, rtol=1e-4)
    np.testing.assert_allclose(metrics.frechet_distance(x, x + v), length**2, rtol=1e-3, atol=1e-5)


@few
@given(seeds, sizes)
def test_energy_distance_is_the_double_sum(seed, size):
    x, y = draw(seed, size[0], 3), draw(seed + 1, size[1], 3) + 1

    def mean_distance(x, y):
        return np.mean([[np.linalg.norm(a - b) for b in y] for a in x])

    square = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    np.testing.assert_allclose(METRICS["energy_distance"](x, y), np.sqrt(square), rtol=1e-4)


@few
@given(seeds, sizes)
def test_nearest_distance_is_the_smallest(seed, size):
    x, y = draw(seed, size[0], 3), draw(seed + 1, size[1], 3)
    expected = [min(np.linalg.norm(a - b) for b in y) for a in x]
    nearest = METRICS["nearest_distance"](x, y)
    assert nearest.shape == (size[0],)
    np.testing.assert_allclose(nearest, expected, rtol=1e-5)


def test_more_points_than_a_block_of_the_map():
    x, y = draw(0, 130, 2), draw(1, 70, 2)
    distances = np.linalg.norm(x[:, None] - y[None], axis=-1)
    within = [np.linalg.norm(points[:, None] - points[None], axis=-1).mean() for points in (x, y)]
    np.testing.assert_allclose(METRICS["nearest_distance"](x, y), distances.min(1), rtol=1e-5)
    np.testing.assert_allclose(METRICS["energy_distance"](x, y), np.sqrt(2 * distances.mean() - sum(within)), rtol=1e-3)


def test_frechet_of_known_gaussians(x64):
    # Diagonal covariances commute: the distance is |m_x - m_y|^2 + sum (s_x - s_y)^2.
    rng = np.random.default_rng(0)
    s_x, s_y, m_x, m_y = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5]), np.zeros(3), np.array([1.0, -2.0, 0.0])
    x, y = with_moments(rng, 9, m_x, np.diag(s_x**2)), with_moments(rng, 12, m_y, np.diag(s_y**2))
    expected = ((m_x - m_y) ** 2).sum() + ((s_x - s_y) ** 2).sum()
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-6)


@few
@given(seeds, st.integers(2, 5))
def test_frechet_is_the_matrix_square_root(seed, size):
    rng = np.random.default_rng(seed)
    cov_x, cov_y, mean_x, mean_y = spd(rng, size), spd(rng, size), rng.normal(size=size), rng.normal(size=size)
    x, y = with_moments(rng, 3 * size, mean_x, cov_x), with_moments(rng, 4 * size, mean_y, cov_y)
    cross = np.trace(linalg.sqrtm(cov_x @ cov_y)).real
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-3, atol=1e-4)


def test_frechet_of_one_feature_and_of_singular_covariances():
    x, y = draw(0, 8, 1), 3 * draw(1, 8, 1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-5)
    # Three points in five dimensions: covariances of rank two, and of rank 0.
    few_points = draw(2, 3, 5)
    np.testing.assert_allclose(metrics.frechet_distance(few_points, few_points), 0, atol=1e-4)
    constant = np.ones((3, 5), np.float32)
    expected = ((few_points.mean(0) - 1) ** 2).sum() + few_points.var(0, ddof=1).sum()
    np.testing.assert_allclose(metrics.frechet_distance(few_points, constant), expected, rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@few
@given(seed=seeds)
def test_zero_on_equal_sets_symmetric_and_positive(name, seed):
    distance = METRICS[name]
    x, y = draw(seed, 6, 2), draw(seed + 1, 6, 2) + 0.5
    shuffled = np.random.default_rng(seed).permutation(x)
    # The energy distance is a root of a difference of float32 means.
    np.testing.assert_allclose(distance(x, shuffled), 0, atol=2e-3)
    np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-3)
    assert distance(x, y) > 0.01


@pytest.mark.parametrize("name", METRICS)
def test_images_are_vectors(name):
    x, y = draw(0, 6, 2, 1), draw(1, 6, 2, 1)
    np.testing.assert_allclose(METRICS[name](x, y), METRICS[name](x[..., 0], y[..., 0]), rtol=1e-6)


def test_uncompiled_is_the_same():
    x, y = draw(0, 6, 2), draw(1, 6, 2)
    np.testing.assert_allclose(metrics.sliced_wasserstein(KEY, x, y, projections=64), METRICS["sliced_wasserstein"](x, y), rtol=1e-5)
    np.testing.assert_allclose(metrics.energy_distance(x, y), METRICS["energy_distance"](x, y), rtol=1e-5)
    np.testing.assert_allclose(metrics.nearest_distance(x, y), METRICS["nearest_distance"](x, y), rtol=1e-5)


def test_directions_depend_on_the_key_alone():
    x, y = draw(0, 6, 2), draw(1, 6, 2)
    one, again, other = (sliced_wasserstein(jax.random.key(seed), x, y) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("shape_x", "shape_y"),
    [((4, 2), (4, 3)), ((0, 2), (4, 2)), ((4, 2), (0, 2)), ((4,), (4,)), ((4, 2, 1), (4, 2)), ((), ()), ((4, 0), (4, 0))],
    ids=["dimensions", "empty x", "empty y", "no dimension", "ranks", "numbers", "empty vectors"],
)
def test_sets_that_do_not_compare(name, shape_x, shape_y):
    with pytest.raises(ValueError, match="Two sets of samples") as caught:
        METRICS[name](np.zeros(shape_x, np.float32), np.zeros(shape_y, np.float32))
    assert str(shape_x) in str(caught.value)
    assert str(shape_y) in str(caught.value)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1)])
def test_a_covariance_needs_two(n, m):
    with pytest.raises(ValueError, match="at least two"):
        metrics.frechet_distance(jnp.zeros((n, 2)), jnp.zeros((m, 2)))


def test_without_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"fmjax\[metrics\]"):
        metrics.wasserstein(draw(0, 3, 2), draw(1, 3, 2))


def test_integers_are_measured_as_floats():
    x, y = np.array([[250], [3]], np.uint8), np.array([[5], [3]], np.uint8)
    np.testing.assert_allclose(metrics.nearest_distance(x, y), [245, 0])
    floats = x.astype(np.float32), y.astype(np.float32)
    np.testing.assert_allclose(metrics.energy_distance(x, y), metrics.energy_distance(*floats))
    np.testing.assert_allclose(metrics.sliced_wasserstein(jax.random.key(0), x, y), metrics.sliced_wasserstein(jax.random.key(0), *floats))


def test_the_host_keeps_float64():
    x = 1e5 + np.random.default_rng(0).normal(size=(50, 2))
    assert abs(metrics.frechet_distance(x, x + np.array([[1e-3, 0]])) - 1e-6) < 1e-8
    assert abs(metrics.wasserstein(x, x + np.array([[1e-3, 0]])) - 1e-3) < 1e-5


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_counted(name, bad):
    """Also in float16, and beside a set whose values are not known inside `jit`: POT alone gives 0.0 for a NaN."""
    x, y = draw(0, 6, 2, 1), draw(1, 5, 2, 1)
    y[[2, 4], 0] = bad
    function = UNCOMPILED[name]
    message = " has 2 of 5 samples that are not finite, the first at index 2, .* find what made them"
    with pytest.raises(ValueError, match="y" + message):
        function(x, y)
    with pytest.raises(ValueError, match="x" + message):
        function(jnp.asarray(y, jnp.float16), x)
    if name in COMPILED:
        with pytest.raises(ValueError, match="y" + message):
            jax.jit(lambda x: function(x, y))(x)
        assert np.shape(jax.jit(function)(x, y)) == np.shape(function(x, x))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "bad",
    [np.ones((3, 2), np.complex64), np.full((3, 2), "a"), np.full((3, 2), None), jax.random.split(KEY, (3, 2))],
    ids=["complex", "strings", "objects", "keys"],
)
def test_samples_that_are_no_real_numbers(name, bad):
    with pytest.raises(TypeError, match=f"y has dtype {re.escape(str(bad.dtype))}, but samples are real numbers"):
        UNCOMPILED[name](draw(0, 3, 2), bad)
    with pytest.raises(TypeError, match="x has dtype"):
        UNCOMPILED[name](bad, draw(0, 3, 2))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_sets_on_a_mesh(name, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    x, y = draw(0, 16, 3), draw(1, 8, 3)
    sharded = [jax.device_put(points, NamedSharding(mesh, PartitionSpec("data"))) for points in (x, y)]
    functions = [UNCOMPILED[name], METRICS[name]] if name in COMPILED else [UNCOMPILED[name]]
    for function in functions:
        for pair in (sharded, (sharded[0], y), (x, sharded[1])):
            np.testing.assert_allclose(function(*pair), function(x, y), rtol=1e-5)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(METRICS[name](*sharded), METRICS[name](x, y), rtol=1e-5)
    x[5, 1] = np.nan
    spoiled = jax.device_put(x, sharded[0].sharding)
    with pytest.raises(ValueError, match="x has 1 of 16 samples that are not finite, the first at index 5"):
        UNCOMPILED[name](spoiled, y)


def test_inside_shard_map_the_sets_are_those_of_a_device():
    mesh, spec = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    x, y = draw(0, 16, 3), draw(1, 16, 3)
    each = jax.shard_map(metrics.nearest_distance, mesh=mesh, in_specs=spec, out_specs=spec)(x, y)
    np.testing.assert_allclose(each[:2], metrics.nearest_distance(x[:2], y[:2]), rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_no_distance_is_below_zero_from_rounding(name):
    """Equal sets far from the origin, of equal points, of one point twice, and with fewer points than dimensions."""
    for x in (1e4 + draw(0, 6, 2), np.full((4, 3), 0.1, np.float32), draw(1, 2, 5), *(draw(seed, 3, 4) for seed in range(2, 12))):
        assert UNCOMPILED[name](x, x) >= 0
        assert UNCOMPILED[name](x, x[::-1] + 0) >= 0


def test_wasserstein_of_a_cost_below_zero_is_zero(monkeypatch):
    monkeypatch.setattr("ot.emd2", lambda *_, **__: -1e-17)
    assert metrics.wasserstein(draw(0, 3, 2), draw(0, 3, 2)) == 0


@pytest.mark.parametrize("projections", [-1, 0, 2.5, True, None, "8"])
def test_projections_are_counted(projections):
    with pytest.raises(ValueError, match=f"projections is {projections!r}, but it is how many directions are drawn: a whole number"):
        metrics.sliced_wasserstein(KEY, draw(0, 3, 2), draw(1, 3, 2), projections=projections)
    assert np.isfinite(metrics.sliced_wasserstein(KEY, draw(0, 3, 2), draw(1, 3, 2), projections=np.int64(3)))


@pytest.mark.parametrize(("key", "given"), [(jax.random.PRNGKey(0), "uint32"), (0, "int")], ids=["uint32", "int"])
def test_keys_are_typed(key, given):
    with pytest.raises(TypeError, match=rf"key has dtype {given}, but keys are typed: make one with jax.random.key\(seed\)"):
        metrics.sliced_wasserstein(key, draw(0, 3, 2), draw(1, 3, 2))


def circle(turns, n=400):
    angle = 2 * np.pi * turns * np.linspace(0, 1, n + 1)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]


def test_the_way_of_a_circle_and_of_a_line():
    grid = np.linspace(0, 1, 401)
    line = grid[:, None, None] * np.array([[3.0, 4.0]])
    np.testing.assert_allclose(metrics.path_length(circle(1)), 2 * np.pi, rtol=1e-4)
    np.testing.assert_allclose(metrics.path_energy(circle(1), grid), (2 * np.pi) ** 2, rtol=1e-4)
    # |v - 0|^2, since it ends where it began.
    np.testing.assert_allclose(metrics.straightness(circle(1), grid), (2 * np.pi) ** 2, rtol=1e-4)
    np.testing.assert_allclose(metrics.curvature(circle(1)), 2 * np.pi, rtol=5e-3)
    for metric, value in ((metrics.path_length, 5), (metrics.curvature, 0)):
        np.testing.assert_allclose(metric(line), value, atol=1e-2)
    np.testing.assert_allclose(metrics.path_energy(line, grid), 25, rtol=1e-4)
    np.testing.assert_allclose(metrics.straightness(line, grid), 0, atol=1e-5)
    # At another speed it is as long, but takes more energy: int (2 t 5)^2 dt = 100 / 3.
    late = grid[:, None, None] ** 2 * np.array([[3.0, 4.0]])
    np.testing.assert_allclose(metrics.path_energy(late, grid), 100 / 3, rtol=1e-3)
    np.testing.assert_allclose(metrics.straightness(late, grid), 25 / 3, rtol=1e-3)
    np.testing.assert_allclose(metrics.normalized_path_energy(late, grid, 5.0), 1 / 3, rtol=1e-3)
    np.testing.assert_allclose(metrics.normalized_path_energy(line, grid, 5.0), 0, atol=1e-4)
    # Two in a batch, of images, one of which stays.
    both = np.stack([np.zeros((401, 2)), line[:, 0]], axis=1).reshape(401, 2, 1, 2, 1)
    np.testing.assert_allclose(metrics.path_length(both), [0, 5], atol=1e-3)
    np.testing.assert_allclose(metrics.curvature(both), 0, atol=1e-2)


def test_a_way_that_is_lost_is_nan():
    lost = circle(1).copy()
    lost[5, 0, 0] = np.nan
    grid = np.linspace(0, 1, 401)
    for value in (
        metrics.path_length(lost),
        metrics.path_energy(lost, grid),
        metrics.straightness(lost, grid),
        metrics.curvature(lost),
        metrics.normalized_path_energy(lost, grid, 1.0),
        jax.jit(metrics.energy_distance)(lost[:, 0], circle(1)[:, 0]),
    ):
        assert jnp.isnan(value).all()


def test_ways_of_other_shapes_are_named():
    for call, said in (
        (lambda: metrics.path_length(np.zeros((5, 2))), r"trajectory has shape \(5, 2\), but it is of states on the way"),
        (lambda: metrics.path_length(np.zeros((1, 5, 2))), r"trajectory has shape \(1, 5, 2\)"),
        (lambda: metrics.path_energy(np.zeros((3, 5, 2)), np.linspace(0, 1, 4)), r"times has shape \(4,\), .* the 3 states"),
        (lambda: metrics.straightness(np.zeros((3, 5, 2)), np.zeros(3)), "times"),
        (lambda: metrics.normalized_path_energy(np.zeros((3, 5, 2)), np.linspace(0, 1, 3), 0.0), "distance is 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="trajectory has dtype bfloat16, whose rounding may be longer than a step"):
        metrics.path_length(jnp.zeros((4001, 1, 2), jnp.bfloat16))
