"""Metrics of features against closed forms, formulas written anew, and what the libraries that papers quote gave (official/metrics.py)."""

import functools
import itertools
import pickle
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from official import metrics as official_metrics
from scipy import linalg, spatial

from fmjax import metrics
from fmjax.metrics import neighbours

KEY = jax.random.key(0)
few = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31 - 1)
OFFICIAL = official.load("metrics")[1]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def theirs(case, metric):
    return [(name, value) for name, value in OFFICIAL.items() if name.startswith(f"{case}/{metric}/")]


def assert_alike(a, b, rtol=1e-12):
    """Equal but for rounding, of the largest number."""
    assert a.count == b.count
    for one, other in ((a.mean, b.mean), (a.covariance, b.covariance)):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("case", official_metrics.CASES)
def test_frechet_is_the_official_one(case):
    n, m, d = official_metrics.CASES[case]
    (x, y), found = official_metrics.features(case), theirs(case, "fid")
    assert len(found) == 3
    distance = metrics.frechet(metrics.moments(x), metrics.moments(y))
    assert distance == metrics.frechet_distance(x, y)
    for name, value in found:
        # They take roots of eigenvalues that are 0 but for rounding where there are fewer samples than dimensions.
        np.testing.assert_allclose(distance, value, rtol=1e-10 if min(n, m) > d + 1 else 1e-7, err_msg=name)


@pytest.mark.parametrize("case", official_metrics.CASES)
def test_kernel_distance_is_the_official_one(case):
    (x, y), ((_, value),) = official_metrics.features(case), theirs(case, "kid")
    size = min(len(x), len(y))
    mean, deviation = metrics.kernel_distance(KEY, x[:size], y[:size], subsets=1, subset_size=size)
    np.testing.assert_allclose(mean, value, rtol=1e-9)
    assert deviation == 0


@pytest.mark.parametrize("case", official_metrics.CASES)
def test_neighbours_are_the_official_ones(case):
    x, y = official_metrics.features(case)
    for k in official_metrics.NEIGHBOURS:
        for metric, function in (("precision_recall", metrics.precision_recall), ("density_coverage", metrics.density_coverage)):
            found = [(name, value) for name, value in theirs(case, metric) if name.endswith(f"/{k}")]
            assert len(found) == {"precision_recall": 3, "density_coverage": 1}[metric]
            for name, value in found:
                np.testing.assert_allclose(function(x, y, k), value, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", official_metrics.LOGITS)
def test_inception_score_is_the_official_one(case):
    score = metrics.inception_score(official_metrics.logits(case), splits=official_metrics.LOGITS[case][2])
    for name, value in theirs(case, "inception_score"):
        np.testing.assert_allclose(score[: value.size], value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", [(9, 4), (3, 7), (2, 1), (6, 2, 3)])
def test_moments_are_numpys(shape):
    x = draw(0, *shape)
    found, vectors = metrics.moments(x), x.reshape(len(x), -1)
    assert found.count == len(x)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, vectors.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.atleast_2d(np.cov(vectors, rowvar=False)), rtol=1e-12, atol=1e-15)


@few
@given(seed=seeds, cuts=st.sets(st.integers(1, 59)), far=st.sampled_from([0.0, 1e4]))
def test_batches_in_any_order_are_the_whole(seed, cuts, far):
    """Batches of one sample too, and features far from the origin, whose sums of squares alone would keep eight digits fewer."""
    x = far + draw(seed, 60, 5)
    whole = metrics.moments(x)
    batches = np.split(x, sorted(cuts))
    rng = np.random.default_rng(seed)
    streamed = functools.reduce(metrics.update, batches, None)
    parts = [metrics.moments(batches[i]) for i in rng.permutation(len(batches))]
    while len(parts) > 1:
        # Any two of them, as the nodes of a tree.
        i, j = rng.permutation(len(parts))[:2]
        parts = [each for n, each in enumerate(parts) if n not in (i, j)] + [metrics.merge(parts[i], parts[j])]
    for found in (streamed, parts[0]):
        assert_alike(found, whole, rtol=1e-12 if not far else 1e-11)
    np.testing.assert_allclose(whole.covariance, np.cov(x - far, rowvar=False), atol=1e-11)


def test_a_long_stream_keeps_its_digits():
    x = 1e4 + draw(0, 5000, 3)
    streamed = functools.reduce(metrics.update, np.split(x, 1000), None)
    np.testing.assert_allclose(streamed.covariance, np.cov(x - 1e4, rowvar=False), rtol=0, atol=1e-10)
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-14)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_features_on_a_mesh(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    x, y = (draw(seed, 16, 3).astype(np.float32) for seed in (0, 1))
    sharded = [jax.device_put(each, NamedSharding(mesh, PartitionSpec("data"))) for each in (x, y)]
    assert_alike(metrics.moments(sharded[0]), metrics.moments(x), rtol=1e-15)
    for metric in (
        functools.partial(metrics.kernel_distance, KEY, subsets=2, subset_size=4),
        metrics.precision_recall,
        metrics.density_coverage,
    ):
        assert metric(*sharded) == metric(x, y)
    assert metrics.inception_score(sharded[0], splits=2) == metrics.inception_score(x, splits=2)


def test_frechet_of_normal_distributions():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 5, 5))
    covariances, means = roots @ np.moveaxis(roots, 1, 2), rng.normal(size=(2, 5))
    a, b = (metrics.Moments(mean, covariance) for mean, covariance in zip(means, covariances, strict=True))
    cross = np.trace(linalg.sqrtm(covariances[0] @ covariances[1])).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances.sum(0)) - 2 * cross
    np.testing.assert_allclose(metrics.frechet(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet(b, a), expected, rtol=1e-10)
    # On the line, (m - m')^2 + (s - s')^2; and the distance does not depend on the axes.
    line = metrics.Moments(np.array([1.0]), np.array([[4.0]])), metrics.Moments(np.array([3.0]), np.array([[9.0]]))
    np.testing.assert_allclose(metrics.frechet(*line), 5, rtol=1e-14)
    turn = linalg.qr(rng.normal(size=(5, 5)))[0]
    turned = [metrics.Moments(turn @ each.mean, turn @ each.covariance @ turn.T) for each in (a, b)]
    np.testing.assert_allclose(metrics.frechet(*turned), expected, rtol=1e-10)


@few
@given(seed=seeds, n=st.sampled_from([2, 5, 12]), m=st.sampled_from([3, 12, 40]))
def test_frechet_of_fewer_samples_than_dimensions(seed, n, m):
    """The sum of the singular values of the product of the centred sets, which are no squares and lose no digits."""
    x, y = draw(seed, n, 12) @ draw(seed + 1, 12, 12), draw(seed + 2, m, 12)
    left, right = ((each - each.mean(0, keepdims=True)) / np.sqrt(len(each) - 1) for each in (x, y))
    cross = linalg.svdvals(left @ right.T).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * cross
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-8)
    np.testing.assert_allclose(metrics.frechet_distance(y, x), expected, rtol=1e-8)
    assert 0 <= metrics.frechet_distance(x, x) < 1e-6
    # In directions that have nothing in common, where the product is 0 but for rounding.
    turn = linalg.qr(draw(seed, 12, 12))[0]
    x, y = draw(seed, n, 4) @ turn[:4], draw(seed + 1, m, 5) @ turn[4:9]
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-6)


def test_moments_that_do_not_compare():
    a, b, one = metrics.moments(draw(0, 9, 3)), metrics.moments(draw(1, 9, 4)), metrics.moments(draw(2, 1, 3))
    unknown = metrics.Moments(a.mean, a.covariance)
    for function in (metrics.frechet, metrics.merge):
        with pytest.raises(ValueError, match="of features of 3 and 4 dimensions, but those of one network and layer"):
            function(a, b)
        with pytest.raises(TypeError, match=r"b is a ndarray, but it is Moments: make them by metrics.moments\(features\)"):
            function(a, draw(0, 9, 3))
    with pytest.raises(TypeError, match="a is a ndarray"):
        metrics.update(draw(0, 9, 3), draw(0, 9, 3))
    with pytest.raises(ValueError, match="of features of 3 and 4 dimensions"):
        metrics.update(a, draw(0, 9, 4))
    with pytest.raises(ValueError, match="at least two samples, got 9 and 1"):
        metrics.frechet(a, one)
    with pytest.raises(ValueError, match="without a count cannot be merged"):
        metrics.merge(a, unknown)
    assert metrics.frechet(a, unknown) < 1e-12
    for count in (5, 50):
        with pytest.raises(ValueError, match="The covariance of b is none: it has eigenvalues below 0"):
            metrics.frechet(a, metrics.Moments(a.mean, np.eye(3) + 6 * (1 - np.eye(3)), count))


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "error", "said"),
    [
        (np.zeros((2, 1)), np.eye(2), None, ValueError, r"mean has shape \(2, 1\) and covariance \(2, 2\)"),
        (np.zeros(3), np.eye(2), None, ValueError, r"mean has shape \(3,\) and covariance \(2, 2\), but they are \(D,\) and \(D, D\)"),
        (np.zeros(0), np.zeros((0, 0)), None, ValueError, r"mean has shape \(0,\)"),
        (np.zeros(2), np.array([[1, 0.5], [0.4, 1]]), None, ValueError, "covariance is not symmetric"),
        (np.zeros(2), np.diag([1.0, -1e-3]), None, ValueError, "a variance below 0"),
        (np.array([0, np.nan]), np.eye(2), None, ValueError, "mean has 1 of 2 numbers that are not finite"),
        (np.zeros(2), np.full((2, 2), np.inf), None, ValueError, "covariance has 4 of 4 numbers that are not finite"),
        (np.zeros(2), np.eye(2) + 0j, None, TypeError, "covariance has dtype complex128"),
        (np.array([None, None]), np.eye(2), None, TypeError, "mean has dtype object"),
        (np.zeros(2), np.eye(2), 0, ValueError, "count is 0, but it is how many samples the moments are of"),
        (np.zeros(2), np.eye(2), 2.0, ValueError, "count is 2.0"),
    ],
)
def test_what_are_no_moments(mean, covariance, count, error, said, tmp_path):
    with pytest.raises(error, match=said):
        metrics.Moments(mean, covariance, count)
    if mean.dtype != object:
        file = tmp_path / "statistics.npz"
        np.savez(file, mu=mean, sigma=covariance, **({} if count is None else {"count": count}))
        with pytest.raises(ValueError, match=rf"statistics.npz has no moments as mu and sigma: .*{said}"):
            metrics.load_moments(file)


def test_moments_are_saved_and_read_bit_for_bit(tmp_path):
    file = tmp_path / "reference"
    for saved in (metrics.moments(draw(0, 9, 3)), metrics.Moments(np.zeros(2), np.eye(2))):
        metrics.save_moments(file, saved)
        read = metrics.load_moments(file)
        assert read.count == saved.count
        assert (read.mean == saved.mean).all()
        assert (read.covariance == saved.covariance).all()
    with np.load(file) as arrays:
        assert arrays.files == ["mu", "sigma"], "as other libraries read it"
    with pytest.raises(TypeError, match="moments is a ndarray, but it is Moments"):
        metrics.save_moments(file, np.zeros(3))
    assert [each.name for each in tmp_path.iterdir()] == ["reference"]


def test_reference_statistics_of_other_libraries_are_read(tmp_path):
    """ADM's have images and the statistics of spatial features beside those of pooled ones; float32 ones are symmetric to rounding."""
    x, spatial_x = draw(0, 9, 3), draw(1, 9, 5)
    names = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False), "mu_s": spatial_x.mean(0), "sigma_s": np.cov(spatial_x, rowvar=False)}
    file = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(file, arr_0=np.zeros((2, 4, 4, 3), np.uint8), **names)
    for read, features in ((metrics.load_moments(file), x), (metrics.load_moments(file, mean="mu_s", covariance="sigma_s"), spatial_x)):
        assert read.count is None
        assert metrics.frechet(read, metrics.moments(features)) < 1e-12
    with pytest.raises(ValueError, match="of features of 3 and 5 dimensions"):
        metrics.frechet(metrics.load_moments(file), metrics.load_moments(file, "mu_s", "sigma_s"))
    rounded = names["sigma"].astype(np.float32)
    rounded[0, 1] = np.nextafter(rounded[0, 1], np.float32(9))
    np.savez_compressed(file, mu=names["mu"].astype(np.float32), sigma=rounded)
    assert metrics.load_moments(file).covariance.dtype == np.float64


def test_files_that_hold_no_moments(tmp_path):
    file = tmp_path / "file"
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"images.npz has arr_0, but not mu and sigma: name the mean .* or make the moments of features of its"
    ):
        metrics.load_moments(tmp_path / "images.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([None, None]), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"objects.npz is no .npz file, or a damaged one .*Object arrays cannot be loaded"):
        metrics.load_moments(tmp_path / "objects.npz")
    file.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}))
    with pytest.raises(ValueError, match=r"file is no \.npz file, or a damaged one"):
        metrics.load_moments(file)
    np.save(tmp_path / "array.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        metrics.load_moments(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        metrics.load_moments(tmp_path / "nowhere.npz")
    metrics.save_moments(file, metrics.moments(draw(0, 9, 30)))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        metrics.load_moments(file)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a damaged one .*Bad CRC-32"):
        metrics.load_moments(file)


@settings(max_examples=200, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), change=st.integers(0, 255), compressed=st.booleans())
def test_a_damaged_file_is_refused_or_right(tmp_path_factory, at, change, compressed):
    file, x = tmp_path_factory.getbasetemp() / "damaged.npz", draw(0, 9, 3)
    saved = metrics.moments(x)
    (np.savez_compressed if compressed else np.savez)(file, mu=saved.mean, sigma=saved.covariance)
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= change
    file.write_bytes(data if change else data[: int(at * len(data))])
    try:
        found = metrics.load_moments(file)
    except ValueError:
        return
    assert (found.mean == saved.mean).all()
    assert (found.covariance == saved.covariance).all()


def test_shapes_are_known_before_numbers_are_read(tmp_path):
    """A small file of many zeros is not unpacked."""
    np.savez_compressed(tmp_path / "zeros.npz", mu=np.zeros(2), sigma=np.zeros((1000, 1000, 10)))
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"zeros.npz has no moments as mu and sigma: mean has shape \(2,\) and covariance \(1000, 1000, 10\)"
    ):
        metrics.load_moments(tmp_path / "zeros.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7


def test_moments_are_a_copy():
    mean, covariance = np.zeros(2), np.eye(2)
    found = metrics.Moments(mean, covariance)
    mean[:], covariance[:] = 5, 5
    assert (found.mean == 0).all()
    assert (found.covariance == np.eye(2)).all()


def test_features_beyond_float64_say_so():
    """Their products have no numbers, where a distance would be nan or inf."""
    x, y = 1e200 * draw(0, 9, 3), 1e200 * draw(1, 9, 3)
    for function in (metrics.frechet_distance, lambda x, y: metrics.kernel_distance(jax.random.key(0), x, y, 2, 5)):
        with pytest.raises(ValueError, match=r"Features are up to .*e\+200, whose products float64 does not hold: scale them"):
            function(x, y)
    large = metrics.Moments(np.full(3, 1e200), np.eye(3))
    with pytest.raises(ValueError, match="whose products float64 does not hold"):
        metrics.frechet(large, metrics.moments(draw(0, 9, 3)))
    wide = metrics.Moments(np.zeros(3), 1e200 * np.eye(3))
    with pytest.raises(ValueError, match="whose products float64 does not hold"):
        metrics.frechet(wide, metrics.Moments(np.zeros(3), 1e250 * np.eye(3)))


def test_inception_score_of_known_classifiers():
    np.testing.assert_allclose(metrics.inception_score(np.zeros((20, 7))), (1, 0), atol=1e-14)
    certain = 1e3 * np.tile(np.eye(5), (8, 1))
    np.testing.assert_allclose(metrics.inception_score(certain, splits=4), (5, 0), rtol=1e-12, atol=1e-12)
    # Sorted by class, each part has but one of them.
    np.testing.assert_allclose(metrics.inception_score(np.repeat(1e3 * np.eye(5), 8, axis=0), splits=5), (1, 0), atol=1e-12)
    logits = draw(0, 60, 6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [np.exp((part * np.log(part / part.mean(0, keepdims=True))).sum(1).mean()) for part in np.split(p, 3)]
    for same in (logits, logits + 100 * draw(1, 60, 1), np.log(p)):
        np.testing.assert_allclose(metrics.inception_score(same, splits=3), (np.mean(parts), np.std(parts)), rtol=1e-10)
    assert metrics.inception_score(jnp.asarray(logits, jnp.bfloat16), splits=np.int64(3))[0] == pytest.approx(np.mean(parts), rel=1e-2)


@pytest.mark.parametrize(
    ("logits", "splits", "said"),
    [
        (np.zeros((4, 3)), 5, "logits are of 4 samples, which cannot be cut into splits=5 parts"),
        (np.zeros((4, 3)), 0, "splits is 0, but it is into how many parts"),
        (np.zeros(4), 2, r"logits has shape \(4,\)"),
        (np.zeros((4, 1)), 2, r"logits has shape \(4, 1\), but they are \(N, classes\)"),
        (np.zeros((4, 3, 1)), 2, r"logits has shape \(4, 3, 1\)"),
        (np.full((4, 4), 0.25, np.float16), 2, "logits are probabilities, whose rows sum to 1"),
        (np.eye(4), 2, "logits are probabilities"),
    ],
)
def test_what_are_no_logits(logits, splits, said):
    with pytest.raises(ValueError, match=said):
        metrics.inception_score(logits, splits)


def test_kernel_distance_is_its_formula_over_each_subset():
    x, y = 1 + draw(0, 5, 4), draw(1, 7, 4)

    def square(x, y):
        kernel = lambda a, b: (a @ b / 4 + 1) ** 3
        within = [np.mean([kernel(a, b) for a, b in itertools.permutations(points, 2)]) for points in (x, y)]
        return sum(within) - 2 * np.mean([[kernel(a, b) for b in y] for a in x])

    possible = [square(x[list(i)], y[list(j)]) for i in itertools.combinations(range(5), 3) for j in itertools.combinations(range(7), 3)]
    found = [metrics.kernel_distance(jax.random.key(seed), x, y, subsets=1, subset_size=3)[0] for seed in range(10)]
    assert np.abs(np.subtract.outer(found, possible)).min(1).max() < 1e-12
    assert len(set(found)) > 5, "other keys draw other subsets"
    mean, deviation = metrics.kernel_distance(KEY, x, y, subsets=400, subset_size=3)
    np.testing.assert_allclose(mean, np.mean(possible), atol=4 * np.std(possible) / 20)
    np.testing.assert_allclose(deviation, np.std(possible), rtol=0.3)
    assert metrics.kernel_distance(KEY, x, y, subsets=400, subset_size=3) == (mean, deviation)


def test_kernel_distance_of_equal_distributions_has_no_bias():
    x, y = draw(0, 4000, 6), draw(1, 4000, 6)
    for size in (5, 40):
        mean, deviation = metrics.kernel_distance(KEY, x, y, subsets=100, subset_size=size)
        assert abs(mean) < 4 * deviation / 10
    assert metrics.kernel_distance(KEY, x, y + 1, subsets=10, subset_size=400)[0] > 1


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"subset_size": 6}, ValueError, "subset_size is 6, but x has 5 samples and y has 7"),
        ({"subset_size": 1}, ValueError, "subset_size is 1, but it is how many .*: a whole number, at least 2"),
        ({"subsets": 0}, ValueError, "subsets is 0"),
        ({"key": 0}, TypeError, "keys are typed"),
    ],
)
def test_subsets_that_cannot_be_drawn(changes, error, said):
    with pytest.raises(error, match=said):
        metrics.kernel_distance(**{"key": KEY, "x": draw(0, 5, 2), "y": draw(1, 7, 2), "subset_size": 3, **changes})


@pytest.mark.parametrize("seed", range(10))
def test_neighbours_on_the_edge_of_a_ball_are_in_it(seed):
    """Whole numbers have equal distances, which the products of centred vectors would tell apart."""
    rng = np.random.default_rng(seed)
    for real, fake in (rng.integers(0, 4, (2, 21, 3)), rng.integers(0, 2, (2, 30, 16))):
        real, fake = real.astype(float), fake.astype(float)
        between = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)
        radii = [np.sort(between(each, each), axis=1)[:, 2] for each in (real, fake)]
        inside = between(real, fake)
        expected = (inside <= radii[0][:, None]).any(0).mean(), (inside <= radii[1][None]).any(1).mean()
        # Of bytes as pixels from 0 to 1, which float64 rounds.
        pixels = real / 255, fake / 255
        assert metrics.precision_recall(*pixels, 2) == pytest.approx(expected)
        balls = (inside <= radii[0][:, None]).sum(0).mean() / 2, (inside.min(1) <= radii[0]).mean()
        assert metrics.density_coverage(*pixels, 2) == pytest.approx(balls)


def test_one_far_vector_does_not_change_the_others():
    real, fake = draw(0, 50, 3), draw(1, 50, 3)
    found = metrics.precision_recall(real, fake)
    real = np.concatenate([real, np.full((1, 3), 1e9)])
    np.testing.assert_allclose(metrics.precision_recall(real, fake), (found[0], found[1] * 50 / 51))


def test_neighbours_of_equal_and_of_far_sets():
    x, y = draw(0, 30, 4), draw(1, 20, 4)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, y + 100) == (0, 0)
    # Far from the origin, where products lose the digits of distances.
    for metric in (metrics.precision_recall, metrics.density_coverage):
        assert metric(x + 1e8, y + 1e8) == metric(x, y)
    assert metrics.density_coverage(x, y + 100) == (0, 0)
    assert metrics.density_coverage(x, x, k=2)[1] == 1
    # Samples of one of two modes are right, and show half of the data.
    modes = np.concatenate([x, x[::-1] + 100])
    precision, recall = metrics.precision_recall(modes, x)
    assert (precision, recall) == (1, 0.5)
    assert metrics.density_coverage(modes, x)[1] == 0.5


@pytest.mark.parametrize("block", [40, neighbours._BLOCK])
def test_neighbours_are_all_pairs(block, monkeypatch):
    """In blocks of any size, and of modes so far apart that float32 would hold no distance within them."""
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    for each in (neighbours._radii, neighbours._balls, neighbours._nearest):
        each.clear_cache()

    def radii(points):
        return np.sort(spatial.distance.cdist(points, points), axis=1)[:, k]

    for seed, k, far in itertools.product(range(5), (1, 4), (0.0, 1e4)):
        real, fake = draw(seed, 13, 3), draw(seed + 1, 9, 3) + 0.3
        real[::2] += far
        fake[::3] += far
        between = spatial.distance.cdist(real, fake)
        in_real, in_fake = between <= radii(real)[:, None], between <= radii(fake)[None]
        found = metrics.precision_recall(real, fake, k)
        np.testing.assert_allclose(found, (in_real.any(0).mean(), in_fake.any(1).mean()), rtol=1e-12)
        found = metrics.density_coverage(real, fake, np.int64(k))
        np.testing.assert_allclose(found, (in_real.sum(0).mean() / k, in_real.any(1).mean()), rtol=1e-12)


def test_density_and_coverage_of_equal_distributions():
    for k in (1, 3):
        found = np.mean([metrics.density_coverage(draw(seed, 200, 3), draw(100 + seed, 200, 3), k) for seed in range(10)], axis=0)
        np.testing.assert_allclose(found, (1, 1 - 0.5**k), atol=0.05)


@pytest.mark.parametrize("metric", [metrics.precision_recall, metrics.density_coverage])
def test_neighbours_that_are_not_there(metric):
    with pytest.raises(ValueError, match="k is 5, but real has 9 samples and fake has 5, and each needs k others in its set"):
        metric(draw(0, 9, 2), draw(1, 5, 2), 5)
    with pytest.raises(ValueError, match="k is 0, but it is which neighbour"):
        metric(draw(0, 9, 2), draw(1, 5, 2), 0)


PAIRS = {
    "frechet_distance": metrics.frechet_distance,
    "kernel_distance": functools.partial(metrics.kernel_distance, KEY, subsets=2, subset_size=3),
    "precision_recall": metrics.precision_recall,
    "density_coverage": functools.partial(metrics.density_coverage, k=2),
}
METRICS = {
    "moments": ("features", metrics.moments),
    "update": ("features", functools.partial(metrics.update, metrics.moments(draw(0, 9, 3)))),
    "inception_score": ("logits", functools.partial(metrics.inception_score, splits=2)),
    **{f"{name}, first": (None, functools.partial(lambda metric, x: metric(x, draw(1, 6, 3)), metric)) for name, metric in PAIRS.items()},
    **{f"{name}, second": (None, functools.partial(lambda metric, y: metric(draw(1, 6, 3), y), metric)) for name, metric in PAIRS.items()},
}


@pytest.mark.parametrize("name", METRICS)
def test_features_that_are_none(name):
    """Not finite, no real numbers, of another shape, none at all, or not known inside `jit`."""
    argument, metric = METRICS[name]
    metric(draw(0, 6, 3))
    metric(jnp.asarray(draw(0, 6, 3), jnp.bfloat16))
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = draw(0, 6, 3)
        spoiled[[2, 4], 0] = bad
        with pytest.raises(ValueError, match=rf"{argument or ''} has 2 of 6 samples that are not finite, the first at index 2"):
            metric(spoiled)
        with pytest.raises(ValueError, match="the first at index 2"):
            metric(jnp.asarray(spoiled, jnp.float16))
    for wrong in (np.zeros(6), np.zeros((0, 3)), np.zeros((6, 0)), np.float64(1)):
        with pytest.raises(ValueError, match=argument or "Two sets of samples"):
            metric(wrong)
    for wrong in (draw(0, 6, 3) + 1j, np.full((6, 3), "a"), np.full((6, 3), None), None):
        with pytest.raises(TypeError, match=r"has dtype .*, but samples are real numbers"):
            metric(wrong)
    with pytest.raises(TypeError, match=rf"{argument or ''} has no values inside jax.jit.*: call it outside"):
        jax.jit(metric)(draw(0, 6, 3))
