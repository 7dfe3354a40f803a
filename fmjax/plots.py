"""Plots: densities, fields, trajectories and samples, as matplotlib draws them; noise that becomes data, as an animation.

A function that fills one panel takes it first, `plots.density(axes, ...)`, so it stands beside whatever else a figure shows; one that
lays out several gives a Figure, for `savefig` or a notebook. States are in the plane, (B, 2), or images, (B, H, W, C) in [-1, 1].

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    plots.density(axes, marginals.log_density(path, distribution), 1.0, extent=6)
    plots.lines(axes, saved)

They need matplotlib (`pip install 'fmjax[plots]'`).
"""

import base64
import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from fmjax import checks
from fmjax.training import evaluation

__all__ = [
    "density",
    "histogram",
    "points",
    "arrows",
    "streamlines",
    "lines",
    "loss",
    "loss_by_time",
    "images",
    "samples",
    "trajectories",
    "animate",
    "Animation",
]

DPI = 120


def _panel(axes):
    """Raises unless axes is one panel."""
    if not hasattr(axes, "imshow"):
        raise TypeError(f"axes is a {type(axes).__name__}, but it is one panel: plt.subplots()[1], or one of several, axes[0].")


def _sides(extent, name="extent"):
    """(left, right, bottom, top)."""
    sides = np.asarray(extent, float)
    if sides.shape not in [(), (4,)] or not np.isfinite(sides).all() or isinstance(extent, str):
        raise ValueError(f"{name} is {extent!r}, but it is one number, for a square about 0, or (left, right, bottom, top).")
    left, right, bottom, top = sides if sides.ndim else (-sides, sides, -sides, sides)
    if not (left < right and bottom < top):
        raise ValueError(f"{name} is {extent!r}, but left is less than right and bottom less than top.")
    return left, right, bottom, top


def _grid(extent, count):
    """Points of a square or a rectangle, (count^2, 2), row by row from below, and its sides."""
    sides = _sides(extent)
    checks.whole("count", count, "how many points there are along each side", least=2)
    x, y = np.meshgrid(np.linspace(*sides[:2], count), np.linspace(*sides[2:], count))
    return jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=-1), jnp.float32), sides


def _time(t):
    if np.ndim(t):
        raise ValueError(f"t has shape {np.shape(t)}, but it is one time for all points.")
    checks.number("t", t, "the time")
    return jnp.float32(t)


def _values(field, x, t):
    values = np.asarray(jax.jit(field)(x, _time(t)))
    if values.shape != x.shape:
        raise ValueError(f"field gives shape {values.shape} for {x.shape}, but a field gives values like x.")
    if not np.isfinite(values).any():
        raise ValueError(f"field gives no finite number at t = {t}: there is nothing to draw.")
    return values


def _plane(name, x):
    x = np.asarray(x)
    checks.real(name, x)
    if x.ndim < 2 or x.shape[-1] != 2:
        raise ValueError(f"{name} has shape {x.shape}, but it is in the plane, (..., 2).")
    return x


def density(axes, log_density, t=None, *, extent=4.0, count=200, cmap="Blues"):
    """Draws a density of the plane, dark where it is high.

    Args:
      axes: the panel.
      log_density: (x, t) -> log p_t(x), (B,), for x (B, 2), as `marginals.log_density(path, distribution)`; without `t` a function of x.
        It is compiled, so it is a function of JAX's arrays.
      t: the time, one number, or None.
      extent: half the side of a square about 0, or (left, right, bottom, top).
      count: points along each side at which it is evaluated.
      cmap: a colour map of matplotlib.
    Raises:
      TypeError: if axes is not one panel.
      ValueError: if the extent is neither one positive number nor four, in their order, count is below 2, t is not one number, or the
        density is not one number per point, nan, or 0 everywhere.
    """
    _panel(axes)
    x, sides = _grid(extent, count)
    log_p = np.asarray(jax.jit(log_density)(x) if t is None else jax.jit(log_density)(x, _time(t)))
    if log_p.shape != (count**2,):
        raise ValueError(f"log_density gives shape {log_p.shape} for {count**2} points, but it gives one number per point.")
    if np.isnan(log_p).any() or not (log_p > -np.inf).any():
        lost = f"nan at {np.isnan(log_p).sum()} of {len(log_p)} points" if np.isnan(log_p).any() else "-inf everywhere"
        raise ValueError(f"log_density is {lost} of the extent {extent!r}: there is nothing to draw.")
    # Points are in the middle of their cells.
    across, up = (sides[1] - sides[0]) / (count - 1) / 2, (sides[3] - sides[2]) / (count - 1) / 2
    around = (sides[0] - across, sides[1] + across, sides[2] - up, sides[3] + up)
    axes.imshow(np.exp(log_p).reshape(count, count), extent=around, origin="lower", cmap=cmap, aspect="equal", interpolation="bilinear")
    axes.set(xlim=sides[:2], ylim=sides[2:])


def histogram(axes, x, *, extent=4.0, bins=160, blur=2.0, top=None, cmap="Blues"):
    """Draws how dense points of the plane lie, as a smooth histogram.

    Args:
      axes: the panel.
      x: the points, (B, 2), finite; those outside the extent are not drawn, but count.
      extent: half the side of a square about 0, or (left, right, bottom, top).
      bins: along each side.
      blur: standard deviation of the smoothing, in bins.
      top: the density that is darkest, for panels that are compared; the highest one where it is None.
      cmap: a colour map of matplotlib.
    Returns:
      The highest density, a number.
    Raises:
      TypeError: if axes is not one panel, or x is not of real numbers.
      ValueError: if the extent is neither one positive number nor four, in their order, x is not in the plane, empty or not finite, or bins
        or blur is out of its range.
    """
    _panel(axes)
    x, sides = _plane("x", x).reshape(-1, 2), _sides(extent)
    checks.whole("bins", bins, "how many there are along each side")
    checks.number("blur", blur, "the standard deviation of the smoothing, in bins", least=0)
    if not len(x) or not np.isfinite(x).all():
        lost = (~np.isfinite(x).all(-1)).sum()
        raise ValueError(f"x has {lost} of {len(x)} points that are not finite, but a density is of finite points, at least one.")
    counts = np.histogram2d(*x.T, bins=bins, range=np.reshape(sides, (2, 2)).tolist())[0]
    cell = (sides[1] - sides[0]) * (sides[3] - sides[2]) / bins**2
    shown = ndimage.gaussian_filter(counts.T / (len(x) * cell), blur)
    axes.imshow(shown, extent=sides, origin="lower", cmap=cmap, vmin=0, vmax=top)
    axes.set(xlim=sides[:2], ylim=sides[2:])
    return float(shown.max())


def streamlines(axes, field, t, *, extent=4.0, count=32, cmap="viridis"):
    """Draws a field of the plane at one time as curves along it, coloured by its size.

    Args:
      axes: the panel.
      field: (x, t) -> like x.
      t: the time, one number.
      extent: half the side of a square about 0, or (left, right, bottom, top).
      count: points along each side at which it is evaluated.
      cmap: a colour map of matplotlib.
    Returns:
      What a colour bar belongs to, as in `figure.colorbar(plots.streamlines(...), ax=axes, label="speed")`.
    Raises:
      TypeError: if axes is not one panel.
      ValueError: if the extent is neither one positive number nor four, in their order, count is below 2, t is not one number, or the
        field's values are not like x, or none is finite.
    """
    _panel(axes)
    x, sides = _grid(extent, count)
    u, v = _values(field, x, t).T.reshape(2, count, count)
    ticks = np.linspace(*sides[:2], count), np.linspace(*sides[2:], count)
    drawn = axes.streamplot(*ticks, u, v, color=np.hypot(u, v), cmap=cmap, linewidth=0.9, density=1.1, arrowsize=0.8)
    axes.set(xlim=sides[:2], ylim=sides[2:], aspect="equal")
    return drawn.lines


def arrows(axes, field, t, *, extent=4.0, count=17, color="0.25"):
    """Draws a field of the plane at one time as arrows.

    Args:
      axes: the panel.
      field: (x, t) -> like x.
      t: the time, one number.
      extent: half the side of a square about 0, or (left, right, bottom, top).
      count: arrows along each side.
      color: a colour of matplotlib.
    Raises:
      TypeError: if axes is not one panel.
      ValueError: if the extent is neither one positive number nor four, in their order, count is below 2, t is not one number, or the
        field's values are not like x, or none is finite.
    """
    _panel(axes)
    x, sides = _grid(extent, count)
    axes.quiver(*x.T, *_values(field, x, t).T, angles="xy", color=color, pivot="mid", width=0.0035)
    axes.set(xlim=sides[:2], ylim=sides[2:], aspect="equal")


def points(axes, x, *, color="C0", size=2.0, label=None):
    """Draws points of the plane, (B, 2), as dots.

    Args:
      axes: the panel.
      x: the points; those that are not finite are left out, and the panel says how many.
      color: a colour of matplotlib, or a number per point.
      size: area of a dot, in points squared.
      label: what they are, for a legend.
    Raises:
      TypeError: if axes is not one panel, or x is not of real numbers.
      ValueError: if x is not in the plane.
    """
    _panel(axes)
    x = _plane("x", x).reshape(-1, 2)
    lost = int((~np.isfinite(x).all(-1)).sum())
    axes.scatter(*x.T, s=size, c=color, linewidths=0, label=label)
    axes.set(aspect="equal")
    if lost:
        axes.set_title(f"{lost} of {len(x)} points are not finite", color="C3")


def lines(axes, states, times=None, *, color="0.4", width=0.7):
    """Draws trajectories: curves of the plane, which end in a dot, or numbers against time.

    Args:
      axes: the panel.
      states: as a sampler saves them, (times, n, 2), or, with `times`, (times, n) or (times, n, 1).
      times: the grid, (times,), for states on the line.
      color: a colour of matplotlib.
      width: of a line, in points.
    Raises:
      TypeError: if axes is not one panel, or the states are not of real numbers.
      ValueError: if there are none, or they are not in the plane, or on the line not as many as the times.
    """
    _panel(axes)
    states = np.asarray(states)
    if not states.size:
        raise ValueError(f"states have shape {states.shape}: there is nothing to draw.")
    if times is None:
        states = _plane("states", states)
        axes.plot(states[..., 0], states[..., 1], color=color, linewidth=width, alpha=0.6)
        axes.scatter(*states[-1].T, s=6, color="C3", zorder=3)
        axes.set(aspect="equal")
        return
    states = states[..., 0] if states.ndim == 3 and states.shape[-1] == 1 else states
    if states.ndim != 2 or np.shape(times) != states.shape[:1]:
        raise ValueError(f"states have shape {states.shape} and times {np.shape(times)}, but on the line states are (times, n).")
    axes.plot(np.asarray(times), states, color=color, linewidth=width, alpha=0.6)
    axes.set(xlabel="t")


def loss(axes, history, label="loss"):
    """Draws the loss over the steps, on a logarithmic axis where it is positive and falls by much.

    Args:
      axes: the panel.
      history: metrics with `step` and `loss`, as `training.fit` gives them.
      label: what the loss is.
    Raises:
      TypeError: if axes is not one panel.
      ValueError: if metrics have no step or no loss.
    """
    _panel(axes)
    history = list(history)
    for i, metrics in enumerate(history):
        if not {"step", "loss"} <= set(metrics):
            raise ValueError(f"history[{i}] has the keys {sorted(metrics)}, but metrics have step and loss, as training.fit gives them.")
    losses = np.array([float(metrics["loss"]) for metrics in history])
    axes.plot([int(metrics["step"]) for metrics in history], losses, linewidth=1)
    known = losses[np.isfinite(losses)]
    falls = len(known) > 0 and 0 < 5 * known.min() < known.max()
    if len(known) < len(losses):
        axes.set_title(f"{len(losses) - len(known)} of {len(losses)} losses are not finite", color="C3")
    axes.set(xlabel="step", ylabel=label, yscale="log" if falls else "linear")
    axes.grid(alpha=0.3)


def loss_by_time(axes, losses, times, *, bins=10, label=None):
    """Draws the mean loss in equal bins of t, with two standard errors, and so where a network finds its task hard.

    Args:
      axes: the panel.
      losses: one per example, (N,).
      times: theirs, (N,), in [0, 1].
      bins: how many.
      label: what they are, for a legend.
    Raises:
      TypeError: if axes is not one panel.
      ValueError: if losses and times are not (N,) alike, or a time is outside [0, 1].
    """
    _panel(axes)
    checks.whole("bins", bins, "how many there are")
    edges = np.linspace(0, 1, bins + 1)
    mean, error, _ = evaluation.loss_by_time(np.asarray(losses), np.asarray(times), edges)
    axes.errorbar((edges[1:] + edges[:-1]) / 2, mean, 2 * error, marker="o", markersize=3, linewidth=1, capsize=2, label=label)
    axes.set(xlabel="t", ylabel="loss")
    axes.grid(alpha=0.3)


def images(axes, shown):
    """Draws images side by side in one panel.

    Args:
      axes: the panel.
      shown: (rows, columns, H, W, C) in [-1, 1], cut off there: in colours where C is 3, else the first channel in grey, dark on light.
        Numbers that are not finite are red.
    Raises:
      TypeError: if axes is not one panel, or the images are of whole numbers.
      ValueError: if the images are not (rows, columns, H, W, C).
    """
    _panel(axes)
    _show(axes, _tile(shown))
    axes.set(xticks=[], yticks=[])


def samples(blocks, rows, *, columns=10, row_height=0.39):
    """Draws blocks of images side by side, whose rows are classes.

    Args:
      blocks: the title of each block and its images, (classes, n, H, W, C) in [-1, 1], as for `images`.
      rows: the classes' names, one per row.
      columns: images of a class that are drawn, at most.
      row_height: height of each row, in inches; more where its pixels need more.
    Returns:
      A Figure.
    Raises:
      ImportError: if matplotlib is not installed (`pip install fmjax[plots]`).
      TypeError: if images are of whole numbers.
      ValueError: if there are no blocks, the images are not (classes, n, H, W, C), or there are not as many names as classes.
    """
    checks.whole("columns", columns, "how many images of a class are drawn")
    if not blocks:
        raise ValueError("blocks is empty, but a picture has at least one block of images.")
    shown = {}
    for title, block in blocks.items():
        block = _five(f"block {title!r}", block)
        _check_rows(rows, len(block), f"block {title!r}")
        shown[title] = _tile(block[:, :columns])
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
    return figure


def trajectories(states, times, rows, *, columns=11):
    """Draws images on their way from noise to data: one in each row, time from left to right.

    Args:
      states: (times, n, H, W, C), as a sampler saves them.
      times: the grid, (times,).
      rows: the images' names, one per image.
      columns: times that are drawn, at most.
    Returns:
      A Figure.
    Raises:
      ImportError: if matplotlib is not installed (`pip install fmjax[plots]`).
      TypeError: if the states are of whole numbers.
      ValueError: if the states are not (times, n, H, W, C), or not as many as the times, or there are not as many names as images.
    """
    states, times = _five("states", states), np.asarray(times)
    checks.whole("columns", columns, "how many times are drawn")
    if times.shape != states.shape[:1]:
        raise ValueError(
            f"times have shape {times.shape}, but there are {len(states)} states, one per time: give the times of those saved."
        )
    _check_rows(rows, states.shape[1], "states")
    chosen = np.linspace(0, len(times) - 1, min(columns, len(times))).round().astype(int)
    image = _tile(states[chosen].swapaxes(0, 1))
    height = max(0.54 * len(rows), image.shape[0] / DPI)
    figure = _figure(0.6 + height * image.shape[1] / image.shape[0], height + 0.4)
    axes = figure.add_subplot()
    _show(axes, image)
    axes.set(xlabel="t", **_ticks("x", [f"{times[i]:.3g}" for i in chosen], image.shape[1]), **_ticks("y", rows, image.shape[0]))
    return figure


@dataclasses.dataclass(frozen=True)
class Animation:
    """A moving picture that a notebook shows, and that `.save("samples.gif")` writes; `animate` makes it."""

    gif: bytes = dataclasses.field(repr=False)
    """The picture, a GIF that repeats."""

    def save(self, file):
        """Writes it, `animation.save("samples.gif")`.

        Args:
          file: where to, in place of what was there; its name ends in .gif.
        Raises:
          ValueError: if it does not.
        """
        if Path(file).suffix.lower() != ".gif":
            raise ValueError(f"file is {str(file)!r}, but the animation is a GIF: give a name that ends in .gif.")
        Path(file).write_bytes(self.gif)

    def _repr_html_(self):
        return f'<img class="animation" src="data:image/gif;base64,{base64.b64encode(self.gif).decode()}" alt="animation">'


def animate(draw, frames, *, columns=1, size=3.4, seconds=4.0, limits=None) -> Animation:
    """Draws one picture per frame and puts them one after the other; the last stays for a second.

    Args:
      draw: `(panels, frame) -> None`, which fills empty panels: one panel, or a list of them where `columns` is more.
      frames: what it draws, in order, such as `enumerate(times)`.
      columns: panels side by side.
      size: side of a panel, in inches.
      seconds: of the whole, before the last frame stays.
      limits: (left, right, bottom, top) of each panel, or one number for a square about 0, so that nothing jumps.
    Returns:
      An Animation: the last expression of a notebook's cell, or `.save("samples.gif")`.
    Raises:
      ImportError: if matplotlib or Pillow is not installed (`pip install fmjax[plots]`).
      ValueError: if there are no frames, or a number is out of its range.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Animations need Pillow: pip install 'fmjax[plots]'") from error
    frames = list(frames)
    if not frames:
        raise ValueError("frames is empty, but an animation has at least one.")
    checks.whole("columns", columns, "how many panels there are")
    checks.number("size", size, "the side of a panel, in inches", least=0, above=True)
    checks.number("seconds", seconds, "how long the animation is", least=0, above=True)
    sides = None if limits is None else _sides(limits, "limits")
    figure = _figure(size * columns, size)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, pictures = FigureCanvasAgg(figure), []
    figure.set_dpi(90)
    for frame in frames:
        figure.clear()
        panels = [figure.add_subplot(1, columns, i) for i in range(1, columns + 1)]
        draw(panels[0] if columns == 1 else panels, frame)
        if sides is not None:
            for axes in panels:
                axes.set(xlim=sides[:2], ylim=sides[2:])
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    # One palette, so that colours do not flicker, of the colours of all frames, so that a dot in one of them has its own.
    packed = np.concatenate([np.asarray(picture, np.uint32).reshape(-1, 3) @ np.array([65536, 256, 1], np.uint32) for picture in pictures])
    colours, counts = np.unique(packed, return_counts=True)
    colours = np.repeat(colours, np.sqrt(counts).round().astype(int))
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1).astype(np.uint8)
    palette = Image.fromarray(colours[None]).quantize(256, dither=Image.Dither.NONE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    each = max(20, round(1000 * seconds / len(pictures)))
    written = io.BytesIO()
    durations = [each] * (len(pictures) - 1) + [each + 1000]
    pictures[0].save(written, format="gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    return Animation(written.getvalue())


def _figure(width, height):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'fmjax[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def _five(name, shown):
    shown = np.asarray(shown)
    if shown.ndim != 5 or not shown.size:
        raise ValueError(f"{name} has shape {shown.shape}, but images are (rows, columns, H, W, C).")
    if not jnp.issubdtype(shown.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {shown.dtype}, but images are floats in [-1, 1]: x / 127.5 - 1 makes them from bytes.")
    return shown


def _check_rows(rows, count, name):
    if len(rows) != count:
        raise ValueError(f"rows has {len(rows)} names, but {name} has {count} rows of images: give one name for each.")


def _tile(shown):
    """(rows, columns, H, W, C) to one image of 1 or 3 channels, with a line between."""
    shown = _five("shown", shown).astype(np.float32)
    shown = shown if shown.shape[-1] == 3 else shown[..., :1]
    rows, columns, height, width, channels = shown.shape
    padded = np.pad(shown, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-1 if channels == 1 else 1)
    return padded.swapaxes(1, 2).reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def _show(axes, image):
    light = (0.5 - 0.5 * image if image.shape[-1] == 1 else 0.5 + 0.5 * image).clip(0, 1)
    lost = ~np.isfinite(image).all(-1, keepdims=True)
    axes.imshow(np.where(lost, (0.84, 0.15, 0.16), light))


def _ticks(axis, names, pixels):
    """A name in the middle of each of equal parts."""
    size = (pixels + 1) / len(names)
    return {f"{axis}ticks": (np.arange(len(names)) + 0.5) * size - 1, f"{axis}ticklabels": list(names)}
