"""Sets of samples as metrics take them: checked, as vectors, about a common origin."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def _samples(name, points) -> Any:
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
            "metric is one of finite samples: find what made them, or drop them and report how many."
        )
    return points


def _vectors(points) -> chex.ArrayDevice:
    """An array of floats of at least 32 bits."""
    points = jnp.asarray(points)
    return points.astype(jnp.promote_types(points.dtype, jnp.float32))


def vectors_on_host(points) -> np.ndarray:
    """An array of float64, whose samples are vectors."""
    return np.asarray(points, np.float64).reshape(len(points), -1)


def _known(name, points) -> Any:
    """Samples whose values are known, on the host."""
    if isinstance(points, Tracer):
        raise TypeError(f"{name} has no values inside jax.jit, where this metric, which runs on the host, cannot be: call it outside.")
    return _samples(name, points)


def one(name, points) -> np.ndarray:
    """One set of vectors in float64, (N, D)."""
    points = _known(name, points)
    if points.ndim < 2 or 0 in points.shape:
        raise ValueError(
            f"{name} has shape {points.shape}, but a set of samples is (N, ...), none of it 0: for numbers give {name}[:, None]."
        )
    return vectors_on_host(points)


def two(names, x, y) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of vectors of one length in float64, about the origin they have."""
    x, y = _known(names[0], x), _known(names[1], y)
    _require_alike(x, y)
    return vectors_on_host(x), vectors_on_host(y)


def pair(x, y, vectors=_vectors) -> tuple[Any, Any]:
    """Two sets of vectors of one length, about a common origin."""
    x, y = _samples("x", x), _samples("y", y)
    _require_alike(x, y)
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


def _require_alike(x, y):
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:] or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"Two sets of samples are (N, ...) and (M, ...) with the same (...), none of them 0, got {x.shape} and {y.shape}: for sets of "
            "numbers give x[:, None] and y[:, None]."
        )


def root(square) -> chex.ArrayDevice:
    """The root, of derivative 0 at 0, where that of a distance does not exist; nan stays nan."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
