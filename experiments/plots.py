"""Plots of a run, written to files: its loss, its samples, and noise becoming data.

They need matplotlib (`pip install fmjax[experiments]`).
"""

import numpy as np

DPI = 120


def loss(file, history, label="loss"):
    """Draws the loss over the steps.

    Args:
      file: where to write, a path that ends in the format's name, as .png does.
      history: metrics with `step` and `loss`, as `training.fit` gives them.
      label: what the loss is.
    """
    figure = _figure(6, 3.5)
    axes = figure.add_subplot()
    axes.plot([metrics["step"] for metrics in history], [metrics["loss"] for metrics in history], linewidth=1)
    positive = all(metrics["loss"] > 0 for metrics in history)
    axes.set(xlabel="step", ylabel=label, yscale="log" if positive else "linear")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=DPI)


def samples(file, blocks, rows, columns=10, row_height=0.39):
    """Draws blocks of images side by side, whose rows are classes.

    Args:
      file: where to write.
      blocks: the title of each block and its images, (classes, n, H, W, C) in [-1, 1]: in colours where C is 3, else the first
        channel in grey, dark on light.
      rows: the classes' names.
      columns: images of a class that are drawn.
      row_height: height of each row, in inches; more where its pixels need more.
    """
    shown = {title: _tile(images[:, :columns]) for title, images in blocks.items()}
    first = next(iter(shown.values()))
    height = max(row_height * len(rows), first.shape[0] / DPI, 1.0)
    width = height * first.shape[1] / first.shape[0]
    figure = _figure(max(width, 1.2) * len(shown) + 0.6, height + 0.2)
    for i, (title, image) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), i)
        _show(axes, image)
        axes.set(title=title, xticks=[], yticks=[])
        if i == 1:
            axes.set(**_ticks("y", rows, image.shape[0]))
    figure.savefig(file, dpi=DPI)


def trajectories(file, states, times, rows, columns=11):
    """Draws images on their way from noise to data: one in each row, time from left to right.

    Args:
      file: where to write.
      states: (times, n, H, W, C), as a sampler saves them.
      times: the grid, (times,).
      rows: the images' names.
      columns: times that are drawn.
    """
    states, times = np.asarray(states), np.asarray(times)
    chosen = np.linspace(0, len(times) - 1, columns).round().astype(int)
    image = _tile(states[chosen].swapaxes(0, 1))
    height = max(0.54 * len(rows), image.shape[0] / DPI)
    figure = _figure(0.6 + height * image.shape[1] / image.shape[0], height + 0.4)
    axes = figure.add_subplot()
    _show(axes, image)
    axes.set(xlabel="t", **_ticks("x", [f"{times[i]:.1f}" for i in chosen], image.shape[1]), **_ticks("y", rows, image.shape[0]))
    figure.savefig(file, dpi=DPI)


def show_images(axes, images):
    """Draws images (rows, columns, H, W, C) in [-1, 1] side by side, in a panel of one's own."""
    _show(axes, _tile(images))


def _figure(width, height):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'fmjax[experiments]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _tile(images):
    """(rows, columns, H, W, C) to one image of 1 or 3 channels, with a line between."""
    images = np.asarray(images) if images.shape[-1] == 3 else np.asarray(images)[..., :1]
    rows, columns, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-1 if channels == 1 else 1)
    return padded.swapaxes(1, 2).reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def _show(axes, image):
    if image.shape[-1] == 1:
        axes.imshow(image[..., 0], cmap="gray_r", vmin=-1, vmax=1)
    else:
        axes.imshow(np.clip(0.5 + 0.5 * image, 0, 1))


def _ticks(axis, names, pixels):
    """A name in the middle of each of equal parts."""
    size = (pixels + 1) / len(names)
    return {f"{axis}ticks": (np.arange(len(names)) + 0.5) * size - 1, f"{axis}ticklabels": list(names)}
