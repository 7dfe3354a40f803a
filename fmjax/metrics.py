"""Metrics: distances between two sets of samples, (N, ...) and (M, ...), flattened to vectors.

W_2^2 = min_gamma E |x - y|^2,   (x, y) ~ gamma                                               (1)
SW_2^2 = E W_2^2(v^T x, v^T y),   |v| = 1                                                     (2)
ED^2 = 2 E |x_1 - y_1| - E |x_1 - x_2| - E |y_1 - y_2|                                        (3)
FD = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))                                        (4)

with gamma the couplings of the two sets, v uniform among directions, x_1 and x_2, y_1 and y_2 independent draws from either set, and
m and C their means and covariances.

And how straight a flow is, from states saved on the way, `sampling.sample_ode(..., save=lambda x, t: x)`: their length, their energy and
what of it is more than a straight line's, their turns, and NPE, the energy of the flow against that of optimal transport.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fmjax import checks

__all__ = [
    "wasserstein",
    "sliced_wasserstein",
    "energy_distance",
    "frechet_distance",
    "nearest_distance",
    "path_length",
    "path_energy",
    "straightness",
    "curvature",
    "normalized_path_energy",
]


def _samples(name, points):
    """Samples, on the host where their values are known, and of no sharding where they are not: distances pair all of x with all of y.

    Raises unless they are real numbers, finite wherever they are known: a distance of others may be a plausible number.
    """
    points = points if isinstance(points, jax.Array) else np.asarray(points)
    if not (points.dtype == bool or jnp.issubdtype(points.dtype, jnp.integer) or jnp.issubdtype(points.dtype, jnp.floating)):
        raise TypeError(f"{name} has dtype {points.dtype}, but samples are real numbers: give the images or features as floats.")
    if isinstance(points, Tracer):
        mesh = jax.typeof(points).sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types
        return jax.sharding.reshard(points, NamedSharding(mesh, PartitionSpec())) if explicit else points
    if isinstance(points, jax.Array) and not points.is_fully_addressable:
        points = multihost_utils.process_allgather(points, tiled=True)
    points = np.asarray(points)
    finite = np.isfinite(points).all(tuple(range(1, points.ndim)))
    if not finite.all():
        raise ValueError(
            f"{name} has {(~finite).sum()} of {finite.size} samples that are not finite, the first at index {np.argmin(finite)}, but a "
            "distance is one of finite samples: find what made them, or drop them and report how many."
        )
    return points


def _vectors(points):
    """An array of floats of at least 32 bits."""
    points = jnp.asarray(points)
    return points.astype(jnp.promote_types(points.dtype, jnp.float32))


def _vectors_on_host(points):
    return np.asarray(points, np.float64)


def _pair(x, y, vectors=_vectors):
    """Two sets of vectors of one length."""
    x, y = _samples("x", x), _samples("y", y)
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:] or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"Two sets of samples are (N, ...) and (M, ...) with the same (...), none of them 0, got {x.shape} and {y.shape}: for sets of "
            "numbers give x[:, None] and y[:, None]."
        )
    if not isinstance(x, Tracer) and not isinstance(y, Tracer):
        # About a common origin, before the numbers are rounded to float32: large ones that differ little differ still.
        centre = y.astype(np.float64).mean(0)
        x, y = x.astype(np.float64) - centre, y.astype(np.float64) - centre
        largest = max(np.abs(x).max(), np.abs(y).max())
        if largest > np.finfo(np.float32).max ** 0.5 / len(x[0].reshape(-1)):
            raise ValueError(f"Samples are up to {largest:g} from the mean of y, whose squares float32 does not hold: scale both sets.")
        if 0 < largest < 1e-15:
            raise ValueError(f"Samples are within {largest:g} of the mean of y, whose squares are 0 in float32: scale both sets.")
    return vectors(x).reshape(len(x), -1), vectors(y).reshape(len(y), -1)


def _root(square):
    """The root, of derivative 0 at 0, where that of a distance does not exist; nan stays nan."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def wasserstein(x, y) -> float:
    """The exact Wasserstein distance W_2 between two sets, by a linear program.

    W_2^2 = min_gamma E |x - y|^2,   (x, y) ~ gamma        (1)

    Runs on the host in float64, in O(N^2) memory: seconds for 2,000 points, minutes for 10,000.

    Args:
      x: (N, ...).
      y: (M, ...).
    Returns:
      W_2, a float.
    Raises:
      ImportError: if POT is not installed (`pip install fmjax[metrics]`).
      TypeError: if the points are not real numbers.
      ValueError: if the points differ in shape, or one is not finite.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("metrics.wasserstein needs POT: pip install 'fmjax[metrics]'") from error
    x, y = _pair(x, y, _vectors_on_host)
    # Rounded squared distances may be a little below zero where points are equal.
    return float(np.sqrt(max(ot.emd2([], [], ot.dist(x, y), numItermax=10_000_000), 0)))


def sliced_wasserstein(key, x, y, projections: int | np.integer = 128) -> chex.ArrayDevice:
    """The sliced Wasserstein distance SW_2, over random directions.

    SW_2^2 = E W_2^2(v^T x, v^T y),   |v| = 1        (2) (Bonneel et al. 2015)

    Where the data have separate modes, a share s of the points in another mode counts as sqrt(s), so that two draws of the same data are
    far apart by chance: compare with the distance of two such draws. Faster inside `jax.jit` for many points.

    Args:
      key: a typed key, which draws the directions.
      x: (N, ...).
      y: (M, ...), N and M at will.
      projections: how many directions.
    Returns:
      SW_2, a scalar.
    Raises:
      TypeError: if the key is not typed, or the points are not real numbers.
      ValueError: if projections is not a whole number of at least 1, or the points differ in shape, or one is not finite.
    """
    checks.whole("projections", projections, "how many directions are drawn")
    checks.key(key)
    x, y = _pair(x, y)
    directions = jax.random.normal(key, (x.shape[1], int(projections)), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    x, y = (jnp.sort(jnp.matmul(points, directions, precision="highest"), axis=0) for points in (x, y))
    # Both quantile functions are constant between the levels i / N and j / M: integrate over those intervals.
    n, m = len(x), len(y)
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    left, width = levels[:-1], np.diff(levels) / (n * m)
    squares = (x[left // m] - y[left // n]) ** 2
    return _root((jnp.asarray(width, x.dtype)[:, None] * squares).sum(0).mean())


def energy_distance(x, y) -> chex.ArrayDevice:
    """The energy distance between two sets.

    ED^2 = 2 E |x_1 - y_1| - E |x_1 - x_2| - E |y_1 - y_2|        (3) (Szekely and Rizzo 2013)

    Args:
      x: (N, ...).
      y: (M, ...).
    Returns:
      ED, a scalar at least 0; 0 only for equal distributions.
    Raises:
      TypeError: if the points are not real numbers.
      ValueError: if the points differ in shape, or one is not finite.
    """
    x, y = _pair(x, y)

    def mean_distance(x, y):
        return lax.map(lambda point: _root(((y - point[None]) ** 2).sum(-1)).mean(), x, batch_size=64).mean()

    return _root(jnp.maximum(2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y), 0))


def nearest_distance(x, y) -> chex.ArrayDevice:
    """The Euclidean distance from each of x to the nearest of y, which shows a model that copies its data.

    min_j |x_i - y_j|

    Args:
      x: (N, ...).
      y: (M, ...).
    Returns:
      (N,).
    Raises:
      TypeError: if the points are not real numbers.
      ValueError: if the points differ in shape, or one is not finite.
    """
    x, y = _pair(x, y)
    return lax.map(lambda point: _root(((y - point[None]) ** 2).sum(-1).min()), x, batch_size=64)


def frechet_distance(x, y) -> float:
    """The Fréchet distance between normal distributions fitted to two sets of features.

    FD = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))        (4) (Heusel et al. 2017, arXiv:1706.08500)

    With Inception features of images it is the FID. Runs on the host in float64.

    Args:
      x: features, (N, ...).
      y: features, (M, ...).
    Returns:
      FD, a float, a squared distance.
    Raises:
      TypeError: if the features are not real numbers.
      ValueError: if they differ in shape, or one is not finite, or a set has fewer than two.
    """
    x, y = _pair(x, y, _vectors_on_host)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"A covariance needs at least two samples, got {len(x)} and {len(y)}.")
    mean_x, mean_y = x.mean(0), y.mean(0)
    cov_x, cov_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    # tr (C_x C_y)^(1/2) = tr (A C_y A)^(1/2) with A = C_x^(1/2), which is symmetric: real eigenvalues, no complex root.
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    # Rounding leaves a little on either side of zero where the sets are equal.
    return max(float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross), 0.0)


def _steps(trajectory) -> tuple[Any, Any]:
    """The steps between states, (n, B, D), and their lengths, (n, B)."""
    trajectory = checks.floats("trajectory", trajectory)
    if trajectory.ndim < 3 or len(trajectory) < 2:
        raise ValueError(
            f"trajectory has shape {trajectory.shape}, but it is of states on the way, (n + 1, B, ...) with n at least 1: "
            "sampling.sample_ode(..., save=lambda x, t: x)[1]."
        )
    if trajectory.dtype.itemsize < 4:
        raise TypeError(f"trajectory has dtype {trajectory.dtype}, whose rounding may be longer than a step: sample in float32.")
    steps = jnp.diff(trajectory.reshape(*trajectory.shape[:2], -1), axis=0)
    return steps, _root((steps**2).sum(-1))


def _between(times, steps):
    """The times between states, (n, 1)."""
    times = checks.grid(times, steps.dtype)
    if len(times) != len(steps) + 1:
        raise ValueError(f"times has shape {times.shape}, but there is a time for each of the {len(steps) + 1} states.")
    return jnp.diff(times)[:, None]


def path_length(trajectory) -> chex.ArrayDevice:
    """How long the way of each example is.

    sum_i |X_{i+1} - X_i|

    Beside the straight line, `jnp.linalg.norm(trajectory[-1] - trajectory[0], axis=-1)`, it says how straight it is.

    Args:
      trajectory: states on the way, (n + 1, B, ...).
    Returns:
      (B,).
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if it has another shape.
    """
    return _steps(trajectory)[1].sum(0)


def path_energy(trajectory, times) -> chex.ArrayDevice:
    """The energy of the way of each example; exact for Euler's steps.

    int |u_t(X_t)|^2 dt = sum_i |X_{i+1} - X_i|^2 / (t_{i+1} - t_i)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing.
    Returns:
      (B,), at least the square of the straight line over the whole time.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, or the times do not increase.
    """
    steps, lengths = _steps(trajectory)
    return (lengths**2 / _between(times, steps)).sum(0)


def straightness(trajectory, times) -> chex.ArrayDevice:
    """How far the way of each example is from a straight line at constant speed, for which it is 0.

    S = int |u_t(X_t) - (X_1 - X_0)|^2 dt    (Liu et al. 2022, arXiv:2209.03003)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing.
    Returns:
      (B,).
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, or the times do not increase.
    """
    steps, _ = _steps(trajectory)
    between = _between(times, steps)
    mean = steps.sum(0, keepdims=True) / between.sum()
    return (between * ((steps / between[..., None] - mean) ** 2).sum(-1)).sum(0)


def curvature(trajectory) -> chex.ArrayDevice:
    """How much the way of each example turns in all, in radians: 0 for a straight line, 2 pi for a circle.

    sum_i angle(X_i - X_{i-1}, X_{i+1} - X_i)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
    Returns:
      (B,); a step of length 0 turns nowhere, and hides a turn between the steps beside it.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if it has another shape.
    """
    steps, lengths = _steps(trajectory)
    unit = steps / jnp.where(lengths == 0, 1, lengths)[..., None]
    apart, along = (_root((value**2).sum(-1)) for value in (unit[1:] - unit[:-1], unit[1:] + unit[:-1]))
    rests = (lengths[1:] == 0) | (lengths[:-1] == 0)
    return jnp.where(rests, 0, 2 * jnp.arctan2(apart, jnp.where(rests, 1, along))).sum(0)


def normalized_path_energy(trajectory, times, distance) -> chex.ArrayDevice:
    """How much more energy the flow takes than optimal transport between the same two sets, NPE.

    |E int |u_t(X_t)|^2 dt - W_2^2| / W_2^2    (Tong et al. 2023, arXiv:2302.00482)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing, from 0 to 1.
      distance: W_2 between the first distribution and the data, above 0, as `wasserstein` gives it.
    Returns:
      A number at least 0.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, the times do not increase, or the distance is not above 0.
    """
    checks.number("distance", distance, "W_2 between the two sets", least=0, above=True)
    return jnp.abs(path_energy(trajectory, times).mean() - distance**2) / distance**2
