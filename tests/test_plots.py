"""Plots: every image at its place, pictures of what was given, and what is said where matplotlib is not."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from fmjax import plots

BLOCK = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4, 1))


@pytest.fixture
def axes():
    return Figure(figsize=(3, 3), dpi=80).add_subplot()


def drawn(figure):
    """The pixels of a figure, (H, W, 3) in [0, 1]."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return pyplot.imread(file)[..., :3]


def test_every_image_is_at_its_place_with_a_line_between():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 3)).astype(np.float32)
    tiled = plots._tile(images)
    assert tiled.shape == (2 * 5 - 1, 3 * 6 - 1, 3)
    for row in range(2):
        for column in range(3):
            np.testing.assert_array_equal(tiled[5 * row : 5 * row + 4, 6 * column : 6 * column + 5], images[row, column])
    assert (tiled[4] == 1).all()
    assert (tiled[:, 5] == 1).all()
    # Names stand in the middle of their rows: pixels 0 to 3 and 5 to 8.
    np.testing.assert_allclose(plots._ticks("y", "ab", 9)["yticks"], [1.5, 6.5])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_drawn(axes, channels):
    states = np.random.default_rng(0).normal(size=(7, 2, 8, 8, channels))
    plots.images(axes, states)
    shown = plots.samples({"one": states.swapaxes(0, 1), "two": states.swapaxes(0, 1)}, ["a", "b"])
    way = plots.trajectories(states, np.linspace(0, 1, 7), ["a", "b"], columns=5)
    for figure in (axes.figure, shown, way):
        assert drawn(figure).std() > 0.05


def test_the_loss_is_drawn_on_the_axis_that_fits_it(axes):
    plots.loss(axes, [{"step": i, "loss": 1 / i} for i in range(1, 9)], "a loss")
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "a loss")
    plots.loss(axes, [{"step": i, "loss": -i} for i in range(9)])
    assert axes.get_yscale() == "linear"


def test_few_rows_make_a_low_plot():
    images = np.zeros((2, 10, 64, 64, 3))
    shown = plots.samples({"one": images, "two": images}, ["a", "b"])
    way = plots.trajectories(images.swapaxes(0, 1), np.linspace(0, 1, 10), ["a", "b"])
    for figure in (shown, way):
        height, width = drawn(figure).shape[:2]
        assert 130 < height < 250
        assert width < 2000


def test_colours_are_those_of_the_images():
    red = np.full((1, 1, 8, 8, 3), -1.0)
    red[..., 0] = 1.0
    seen = drawn(plots.samples({"red": red}, ["r"]))
    assert ((seen == [1, 0, 0]).all(-1)).mean() > 0.1


def test_a_density_is_dark_where_it_is_high(axes):
    """The peak of a normal at (1, -2) is where the picture says, in its own coordinates."""
    plots.density(axes, lambda x: -((x - jnp.array([[1.0, -2.0]])) ** 2).sum(-1), extent=(-3, 3, -4, 2), count=61)
    (image,) = axes.get_images()
    row, column = np.unravel_index(image.get_array().argmax(), (61, 61))
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower"
    # In the middle of its cell.
    at = left + (column + 0.5) / 61 * (right - left), bottom + (row + 0.5) / 61 * (top - bottom)
    np.testing.assert_allclose(at, (1, -2), atol=1e-6)
    # The corner of the peak is darker than the other corners.
    seen = drawn(axes.figure).mean(-1)
    assert seen.min() < 0.4


def test_arrows_are_the_field_at_its_points(axes):
    plots.arrows(axes, lambda x, t: t * jnp.stack([-x[:, 1], x[:, 0]], axis=-1), 0.5, extent=2, count=5)
    (quiver,) = axes.collections
    np.testing.assert_allclose(quiver.U, -quiver.XY[:, 1] / 2, atol=1e-6)
    np.testing.assert_allclose(quiver.V, quiver.XY[:, 0] / 2, atol=1e-6)
    assert quiver.XY.min() == -2


def test_lines_and_points_are_where_the_states_are(axes):
    states = np.random.default_rng(0).normal(size=(6, 4, 2))
    plots.lines(axes, states)
    np.testing.assert_allclose([line.get_xydata() for line in axes.lines], states.swapaxes(0, 1))
    np.testing.assert_allclose(axes.collections[0].get_offsets(), states[-1])
    plots.points(axes, states[0])
    np.testing.assert_allclose(axes.collections[1].get_offsets(), states[0])
    plots.lines(other := Figure().add_subplot(), states[..., :1], np.linspace(0, 1, 6))
    np.testing.assert_allclose(other.lines[2].get_ydata(), states[:, 2, 0])


def test_points_that_are_not_finite_are_counted_in_the_picture(axes):
    plots.points(axes, np.array([[0.0, 1.0], [np.nan, 0.0]]))
    assert axes.get_title() == "1 of 2 points are not finite"


def test_the_loss_by_time_is_the_mean_of_each_bin(axes):
    t = np.linspace(0, 1, 1000, endpoint=False)
    plots.loss_by_time(axes, t**2, t, bins=4, label="a network")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [(t[i : i + 250] ** 2).mean() for i in range(0, 1000, 250)])


def test_an_animation_has_a_picture_for_each_frame(tmp_path):
    states = np.stack([np.full((1, 2), x) for x in (-0.5, 0.0, 0.5)])
    animation = plots.animate(lambda axes, x: plots.points(axes, x, size=200), states, limits=1)
    animation.save(tmp_path / "states.gif")
    assert (tmp_path / "states.gif").read_bytes() == animation.gif
    gif = Image.open(io.BytesIO(animation.gif))
    places = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        dark = np.asarray(gif.convert("RGB")).astype(int)
        blue = (dark[..., 2] - dark[..., 0]) > 80
        places.append(np.argwhere(blue).mean(0))
    assert gif.n_frames == 3
    # To the right and upwards, by as much each time.
    (up, right) = np.diff(np.array(places), axis=0).T
    assert (right > 10).all()
    assert (up < -10).all()
    np.testing.assert_allclose(right, right[0], atol=1)
    assert animation._repr_html_().startswith("<img")


def test_panels_of_an_animation_are_side_by_side():
    seen = []
    plots.animate(lambda panels, frame: seen.append((len(panels), frame)), [0, 1], columns=2)
    assert seen == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda axes: plots.points(axes, np.zeros((5, 3))), r"x has shape \(5, 3\), but it is in the plane"),
        (lambda axes: plots.lines(axes, np.zeros((5, 3))), r"states has shape \(5, 3\), but it is in the plane"),
        (lambda axes: plots.lines(axes, np.zeros((5, 3)), np.zeros(4)), r"states have shape \(5, 3\) and times \(4,\)"),
        (lambda axes: plots.density(axes, lambda x: x), r"log_density gives shape \(40000, 2\)"),
        (lambda axes: plots.density(axes, jnp.sum, extent=(0, 1)), r"extent is \(0, 1\)"),
        (lambda axes: plots.density(axes, jnp.sum, extent=-1), r"left is less than right"),
        (lambda axes: plots.arrows(axes, lambda x, t: x[:, 0], 0.5), r"field gives shape \(289,\) for \(289, 2\)"),
        (lambda axes: plots.images(axes, np.zeros((2, 8, 8, 1))), r"shown has shape \(2, 8, 8, 1\), but images are"),
        (lambda axes: plots.images(axes, np.zeros((2, 2, 8, 8, 3), np.uint8)), "shown has dtype uint8, .* x / 127.5 - 1"),
        (lambda axes: plots.samples({"a": BLOCK}, ["x"]), "rows has 1 names, but block 'a' has 2 rows"),
        (lambda axes: plots.samples({"a": BLOCK, "b": BLOCK[:1]}, ["x", "y"]), "rows has 2 names, but block 'b' has 1 rows"),
        (lambda axes: plots.samples({}, []), "blocks is empty"),
        (lambda axes: plots.samples({"a": BLOCK}, ["x", "y"], columns=0), "columns is 0"),
        (lambda axes: plots.trajectories(BLOCK, np.linspace(0, 1, 3), "abc"), r"times have shape \(3,\), but there are 2 states"),
        (lambda axes: plots.trajectories(BLOCK, np.linspace(0, 1, 2), "ab"), "rows has 2 names, but states has 3 rows"),
        (lambda axes: plots.histogram(axes, np.zeros((0, 2))), "x has 0 of 0 points that are not finite"),
        (lambda axes: plots.histogram(axes, np.full((3, 2), np.nan)), "x has 3 of 3 points that are not finite"),
        (lambda axes: plots.histogram(axes, np.zeros((3, 2)), bins=[3, 4]), r"bins is \[3, 4\]"),
        (lambda axes: plots.histogram(axes, np.zeros((3, 2)), blur=-1), "blur is -1"),
        (lambda axes: plots.density(axes, lambda x: x[:, 0] * jnp.nan), "log_density is nan at 40000 of 40000 points"),
        (lambda axes: plots.density(axes, lambda x: x[:, 0] - jnp.inf), "log_density is -inf everywhere"),
        (lambda axes: plots.density(axes, lambda x, t: x[:, 0], jnp.zeros(2)), r"t has shape \(2,\), but it is one time"),
        (lambda axes: plots.density(axes, jnp.sum, count=1), "count is 1"),
        (lambda axes: plots.density(axes, jnp.sum, extent=np.inf), "extent is inf"),
        (lambda axes: plots.density(axes, jnp.sum, extent="4"), "extent is '4'"),
        (lambda axes: plots.arrows(axes, lambda x, t: x * jnp.nan, 0.5), "field gives no finite number at t = 0.5"),
        (lambda axes: plots.streamlines(axes, lambda x, t: x, 0.5, count=1), "count is 1"),
        (lambda axes: plots.lines(axes, np.zeros((0, 3, 2))), r"states have shape \(0, 3, 2\)"),
        (lambda axes: plots.lines(axes, np.zeros((5, 3)), np.zeros((5, 1))), r"times \(5, 1\)"),
        (lambda axes: plots.loss(axes, [{"step": 1}]), r"history\[0\] has the keys \['step'\]"),
        (lambda axes: plots.animate(lambda axes, x: None, [0], columns=0), "columns is 0"),
        (lambda axes: plots.animate(lambda axes, x: None, [0], seconds=0), "seconds is 0"),
        (lambda axes: plots.animate(lambda axes, x: None, [0], limits=(0, 1)), r"limits is \(0, 1\)"),
        (lambda axes: plots.animate(lambda axes, x: None, [0]).save("samples.mp4"), "file is 'samples.mp4', but the animation is a GIF"),
        (lambda axes: plots.points([axes, axes], np.zeros((3, 2))), "axes is a list, but it is one panel"),
        (lambda axes: plots.density(axes.figure, jnp.sum), "axes is a Figure, but it is one panel"),
        (lambda axes: plots.animate(lambda axes, x: None, []), r"frames is empty"),
    ],
)
def test_what_cannot_be_drawn_is_named(axes, call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call(axes)


def test_what_is_not_finite_is_seen(axes):
    plots.images(axes, np.full((1, 1, 8, 8, 1), np.nan))
    red = drawn(axes.figure).reshape(-1, 3)
    assert ((red[:, 0] > 0.8) & (red[:, 1] < 0.2)).mean() > 0.2
    axes.clear()
    for losses in ([1, 0.1, np.nan], [np.nan, 1, 0.1], [1, np.nan, 0.1]):
        plots.loss(axes, ({"step": i, "loss": loss} for i, loss in enumerate(losses)))
        assert (axes.get_yscale(), axes.get_title()) == ("log", "1 of 3 losses are not finite")


def test_each_time_on_the_way_is_drawn_once():
    states = np.random.default_rng(0).uniform(-1, 1, (7, 1, 4, 4, 1))
    (axes,) = plots.trajectories(states, np.linspace(0, 0.1, 7), ["a"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.0167", "0.0333", "0.05", "0.0667", "0.0833", "0.1"]


def test_a_colour_of_one_frame_is_kept():
    def draw(axes, color):
        plots.points(axes, np.zeros((1, 2)), color=color, size=3000)

    gif = Image.open(io.BytesIO(plots.animate(draw, ["k", "r", "k", "g", "k"]).gif))
    for frame, color in ((1, (255, 0, 0)), (3, (0, 128, 0))):
        gif.seek(frame)
        pixels = np.asarray(gif.convert("RGB")).reshape(-1, 3).astype(int)
        assert (np.abs(pixels - color).max(1) < 12).mean() > 0.01, color


def test_matplotlib_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'fmjax\[plots\]'"):
        plots.samples({"one": jax.numpy.zeros((1, 1, 8, 8, 1))}, ["a"])


def test_a_histogram_is_the_density_of_its_points(axes):
    """Of a normal about (1, 0): its highest value is 1 / (2 pi), less what blurring takes."""
    x = np.array([[1.0, 0.0]]) + np.random.default_rng(0).normal(size=(200_000, 2))
    top = plots.histogram(axes, x, extent=(-3, 5, -4, 4), bins=80)
    assert abs(top * 2 * np.pi - 1) < 0.1
    (image,) = axes.get_images()
    shown = image.get_array()
    np.testing.assert_allclose(shown.sum() * 0.1**2, 1, atol=0.01)
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    np.testing.assert_allclose((-3 + 0.1 * column, -4 + 0.1 * row), (1, 0), atol=0.6)


def test_streamlines_are_coloured_by_speed(axes):
    drawn = plots.streamlines(axes, lambda x, t: jnp.stack([2 * t + 0 * x[:, 0], x[:, 0]], axis=-1), 1.5, extent=(-1, 1, -2, 2))
    speeds = drawn.get_array()
    assert speeds.min() > 2.9
    assert abs(speeds.max() - np.hypot(3, 1)) < 0.05
