"""Toy distributions against their supports and moments in closed form, and the digits' split."""

import functools
import sys

import jax
import numpy as np
import pytest

from fmjax.data import digits, toy

KEY = jax.random.key(0)
N = 40_000
SETS = {
    "gaussian": toy.gaussian,
    "mixture": toy.mixture,
    "eight_gaussians": toy.eight_gaussians,
    "moons": toy.moons,
    "circles": toy.circles,
    "checkerboard": toy.checkerboard,
    "s_curve": toy.s_curve,
    "pinwheel": toy.pinwheel,
    "spirals": toy.spirals,
}
every_set = pytest.mark.parametrize("name", SETS)


@functools.partial(jax.jit, static_argnums=1)
def draw_all(key, n):
    return {name: draw(key, n) for name, draw in SETS.items()}


@pytest.fixture(scope="module")
def samples():
    return {name: np.asarray(x) for name, x in draw_all(KEY, N).items()}


def ring(modes, radius):
    angles = 2 * np.pi * np.arange(modes) / modes
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def assert_share(inside, share):
    """A share of the samples, within five standard errors."""
    assert abs(np.mean(inside) - share) < 5 * np.sqrt(share * (1 - share) / len(inside))


def assert_mean(values, mean):
    """The mean of each column, within five standard errors."""
    error = np.std(values, axis=0) / np.sqrt(len(values))
    assert (np.abs(np.mean(values, axis=0) - mean) < 5 * error).all()


def test_every_set_is_tested():
    public = {name for name, value in vars(toy).items() if callable(value) and not name.startswith("_")}
    assert public == set(SETS)


@every_set
def test_shape_dtype_and_size(samples, name):
    x = samples[name]
    assert x.shape == (N, 2)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert 0.3 < x.std() < 10


@every_set
def test_the_key_is_all(samples, name):
    x, other = samples[name], draw_all(jax.random.key(1), N)[name]
    np.testing.assert_array_equal(x, draw_all(KEY, N)[name])
    assert (np.isclose(x, other).all(axis=1)).mean() < 0.001
    # No point twice.
    assert len(np.unique(x, axis=0)) > 0.999 * N


@pytest.mark.parametrize("name", ["gaussian", "checkerboard"])
def test_uncompiled_is_the_same(samples, name):
    np.testing.assert_allclose(SETS[name](KEY, N), samples[name], rtol=1e-4, atol=1e-4)


def test_gaussian(samples):
    x = samples["gaussian"]
    assert_mean(x, 0.0)
    assert_mean(x**2, 1.0)
    assert_mean(x[:, 0] * x[:, 1], 0.0)
    assert_mean(x**4, 3.0)


@pytest.mark.parametrize(("name", "modes", "radius"), [("mixture", 5, 10.0), ("eight_gaussians", 8, 5.0)])
def test_modes_on_a_circle(samples, name, modes, radius):
    x, means = samples[name], ring(modes, radius)
    assert_mean(x, 0.0)
    # E |x|^2 = radius^2 + 2 for standard deviation 1, and every direction has half.
    assert_mean(x**2, radius**2 / 2 + 1)
    nearest = np.linalg.norm(x[:, None] - means[None], axis=-1).argmin(1)
    for mode in range(modes):
        assert_share(nearest == mode, 1 / modes)
    if name == "mixture":
        # Modes 11 standard deviations apart: what is nearest to one belongs to it.
        residual = x - means[nearest]
        assert_mean(residual, 0.0)
        assert_mean(residual**2, 1.0)


def test_eight_gaussians_by_their_fourier_transform(samples):
    # E exp(i w x) = exp(-|w|^2 / 2) mean over modes of exp(i w m), also where modes overlap.
    x, means = samples["eight_gaussians"], ring(8, 5.0)
    for w in np.array([[0.3, 0.0], [0.0, 0.7], [1.0, -0.5], [-0.8, 0.8]]):
        expected = np.exp(-(w @ w) / 2) * np.exp(1j * means @ w).mean()
        np.testing.assert_allclose(np.exp(1j * x @ w).mean(), expected, atol=5 / np.sqrt(N))


def test_moons(samples):
    x = (samples["moons"] + 1) / 2
    # The upper half of the unit circle, and the lower half of the one about (1, 1/2).
    upper = np.abs(np.linalg.norm(x, axis=1) - 1)
    lower = np.abs(np.linalg.norm(x - np.array([[1.0, 0.5]]), axis=1) - 1)
    is_upper = upper < lower
    assert (np.minimum(upper, lower) < 6 * 0.05).all()
    assert (x[is_upper & (lower > 0.3), 1] > -0.3).all()
    assert (x[~is_upper & (upper > 0.3), 1] < 0.8).all()
    # The mean of half a circle is 2 / pi above its centre; the moons are each other turned about (1/2, 1/4).
    assert_mean(x, np.array([0.5, 0.25]))
    # E y^2 = E sin^2 for the upper, E (1/2 - sin)^2 for the lower: 1/2 + 1/8 - 1/pi on average, and the noise.
    assert_mean(x[:, 1] ** 2, 0.5 + 0.125 - 1 / np.pi + 0.05**2)
    assert_share(is_upper, 0.5)


def test_circles(samples):
    x = samples["circles"]
    radius = np.linalg.norm(x, axis=1)
    inner = radius < 0.75
    assert_share(inner, 0.5)
    assert_mean(x, 0.0)
    for side, r in ((inner, 0.5), (~inner, 1.0)):
        assert_mean(radius[side] ** 2, r**2 + 2 * 0.05**2)
        np.testing.assert_allclose(radius[side].std(), 0.05, rtol=0.05)
        angle = np.arctan2(x[side, 1], x[side, 0])
        assert_mean(np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], axis=-1), 0.0)


def test_checkerboard(samples):
    x = samples["checkerboard"]
    assert (np.abs(x) <= 2).all()
    square = np.floor(x + 2).clip(0, 3).astype(int)
    black = square.sum(1) % 2 == 0
    assert black.all()
    squares, counts = np.unique(square, axis=0, return_counts=True)
    assert len(squares) == 8
    for count in counts:
        assert_share(np.arange(N) < count, 1 / 8)
    within = x + 2 - square
    assert_mean(within, 0.5)
    assert_mean(within**2, 1 / 3)
    assert_mean(within[:, 0] * within[:, 1], 0.25)


def test_s_curve(samples):
    x = samples["s_curve"] / 1.5
    # Two circles of radius 1, about (0, -1) for the upper half of the angles and (0, 1) for the lower.
    centre = np.where(x[:, 1] > 0, 1.0, -1.0)
    off = np.abs(np.hypot(x[:, 0], x[:, 1] - centre) - 1)
    near = np.hypot(x[:, 0], x[:, 1]) < 0.3
    assert (off[~near] < 6 * 0.05).all()
    assert_mean(x, 0.0)
    # Over an angle uniform on (-3 pi / 2, 3 pi / 2): E sin^2 = 1/2; E (cos - 1)^2 = 3/2 - 2 E cos, E cos = -2 / (3 pi).
    assert_mean(x[:, 0] ** 2, 0.5 + 0.05**2)
    assert_mean(x[:, 1] ** 2, 1.5 + 4 / (3 * np.pi) + 0.05**2)
    # E sin sign (cos - 1) = (2 / (3 pi)) * the integral of sin cos - sin over (0, 3 pi / 2), which is 1/2 - 1.
    assert_mean(x[:, 0] * x[:, 1], -1 / (3 * np.pi))


def test_pinwheel(samples):
    x = samples["pinwheel"] / 2
    # Rotations keep lengths: |x|^2 = r^2 + s^2 with r ~ N(1, 0.3^2), s ~ N(0, 0.1^2).
    assert_mean((x**2).sum(1), 1 + 0.3**2 + 0.1**2)
    assert_mean(x, 0.0)
    # Undone, the arms are at multiples of a fifth of the circle; the radius is r but for s^2 / 2r.
    z = x[:, 0] + 1j * x[:, 1]
    usual = (np.abs(z) > 0.5) & (np.abs(z) < 1.5)
    straight = (z * np.exp(-0.25j * np.exp(np.abs(z))))[usual]
    arm = np.round(np.angle(straight) / (2 * np.pi / 5)).astype(int) % 5
    for index in range(5):
        assert abs(np.mean(arm == index) - 0.2) < 0.015
    tangential = (straight * np.exp(-2j * np.pi * arm / 5)).imag
    np.testing.assert_allclose(tangential.std(), 0.1, rtol=0.1)


def test_spirals(samples):
    x = samples["spirals"]
    assert_mean(x, 0.0)
    # The radius is 3 sqrt(u): E r^2 = 9 / 2, and the noise in two directions.
    assert_mean((x**2).sum(1), 4.5 + 2 * 0.1**2)
    radius = np.linalg.norm(x, axis=1)
    assert (radius < 3 + 6 * 0.1).all()
    # At radius r an arm is at the angle pi - pi r, and the other opposite: twice the angle is -2 pi r for both.
    outer = radius > 1
    phase = np.exp(2j * (np.arctan2(x[:, 1], x[:, 0]) + np.pi * radius))[outer]
    assert np.abs(phase.mean() - 1) < 0.2
    arm = (x[:, 0] * -np.cos(np.pi * radius) + x[:, 1] * np.sin(np.pi * radius))[outer] > 0
    assert_share(arm, 0.5)


@pytest.fixture(scope="module")
def loaded():
    return digits.load()


def rows(images):
    return {image.tobytes() for image in images}


def test_digits(loaded):
    (images, labels), (held, held_labels) = loaded
    assert images.shape == (1437, 8, 8, 1)
    assert held.shape == (360, 8, 8, 1)
    assert labels.shape == (1437,)
    assert held_labels.shape == (360,)
    for part in (images, held):
        assert part.dtype == np.float32
        assert part.min() == -1
        assert part.max() == 1
        # Sixteen grey levels above nothing.
        np.testing.assert_array_equal(8 * (part + 1), np.round(8 * (part + 1)))
    for part in (labels, held_labels):
        assert part.dtype == np.int32
        np.testing.assert_array_equal(np.unique(part), np.arange(digits.CLASSES))


def test_digits_are_split_by_class_and_apart(loaded):
    (images, labels), (held, held_labels) = loaded
    share = np.bincount(labels, minlength=10) / (np.bincount(labels, minlength=10) + np.bincount(held_labels, minlength=10))
    np.testing.assert_allclose(share, 0.8, atol=0.01)
    assert len(rows(images) | rows(held)) == 1797
    assert not rows(images) & rows(held)


def test_digits_keep_their_labels(loaded):
    from sklearn.datasets import load_digits

    original = load_digits()
    label = {(image.astype(np.float32) / 8 - 1).tobytes(): target for image, target in zip(original.images, original.target, strict=True)}
    for images, labels in loaded:
        assert [label[image.tobytes()] for image in images[..., 0]] == list(labels)


def test_digits_depend_on_the_seed_alone(loaded):
    for part, again in zip(jax.tree.leaves(loaded), jax.tree.leaves(digits.load()), strict=True):
        np.testing.assert_array_equal(part, again)
    (other, _), _ = digits.load(seed=1)
    assert rows(other) != rows(loaded[0][0])
    (most, _), (few, _) = digits.load(held_out=0.1)
    assert (len(most), len(few)) == (1617, 180)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"fmjax\[data\]"):
        digits.load()
