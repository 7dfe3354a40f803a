"""Plots: every image at its place, files that can be read, and what is said where matplotlib is not."""

import sys

import numpy as np
import pytest
from matplotlib import pyplot

from experiments import plots


def test_every_image_is_at_its_place_with_a_line_between():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 3))
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
def test_plots_are_written(tmp_path, channels):
    states = np.random.default_rng(0).normal(size=(7, 2, 8, 8, channels))
    plots.loss(tmp_path / "loss.png", [{"step": i, "loss": 1 / i} for i in range(1, 9)], "a loss")
    plots.loss(tmp_path / "below.png", [{"step": i, "loss": -i} for i in range(9)])
    plots.samples(tmp_path / "samples.png", {"one": states.swapaxes(0, 1), "two": states.swapaxes(0, 1)}, ["a", "b"])
    plots.trajectories(tmp_path / "trajectories.png", states, np.linspace(0, 1, 7), ["a", "b"], columns=5)
    for name in ("loss", "below", "samples", "trajectories"):
        seen = pyplot.imread(tmp_path / f"{name}.png")
        assert seen[..., :3].std() > 0.05, name


def test_few_rows_make_a_low_plot(tmp_path):
    images = np.zeros((2, 10, 64, 64, 3))
    plots.samples(tmp_path / "samples.png", {"one": images, "two": images}, ["a", "b"])
    plots.trajectories(tmp_path / "trajectories.png", images.swapaxes(0, 1), np.linspace(0, 1, 10), ["a", "b"])
    for name in ("samples", "trajectories"):
        height, width = pyplot.imread(tmp_path / f"{name}.png").shape[:2]
        assert 130 < height < 250, name
        assert width < 2000, name


def test_colours_are_those_of_the_images(tmp_path):
    red = np.full((1, 1, 8, 8, 3), -1.0)
    red[..., 0] = 1.0
    plots.samples(tmp_path / "red.png", {"red": red}, ["r"])
    seen = pyplot.imread(tmp_path / "red.png")[..., :3]
    assert ((seen == [1, 0, 0]).all(-1)).mean() > 0.1


def test_matplotlib_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'fmjax\[experiments\]'"):
        plots.loss(tmp_path / "loss.png", [])
