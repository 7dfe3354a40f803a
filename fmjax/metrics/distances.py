"""Distances between two sets of samples, (N, ...) and (M, ...), flattened to vectors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks
from fmjax.metrics.sets import pair, root, two, vectors_on_host
from fmjax.metrics.statistics import frechet, moments


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
    x, y = pair(x, y, vectors_on_host)
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
    x, y = pair(x, y)
    directions = jax.random.normal(key, (x.shape[1], int(projections)), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    x, y = (jnp.sort(jnp.matmul(points, directions, precision="highest"), axis=0) for points in (x, y))
    # Both quantile functions are constant between the levels i / N and j / M: integrate over those intervals.
    n, m = len(x), len(y)
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    left, width = levels[:-1], np.diff(levels) / (n * m)
    squares = (x[left // m] - y[left // n]) ** 2
    return root((jnp.asarray(width, x.dtype)[:, None] * squares).sum(0).mean())


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
    x, y = pair(x, y)

    def mean_distance(x, y):
        return lax.map(lambda point: root(((y - point[None]) ** 2).sum(-1)).mean(), x, batch_size=64).mean()

    return root(jnp.maximum(2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y), 0))


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
    x, y = pair(x, y)
    return lax.map(lambda point: root(((y - point[None]) ** 2).sum(-1).min()), x, batch_size=64)


def frechet_distance(x, y) -> float:
    """The Fréchet distance between normal distributions fitted to two sets of features.

    FD = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))        (4) (Heusel et al. 2017, arXiv:1706.08500)

    With Inception features of images it is the FID. Runs on the host in float64. Where the features come in batches, or one set is known
    by its mean and covariance alone, `frechet` compares their `moments`.

    Args:
      x: features, (N, ...).
      y: features, (M, ...).
    Returns:
      FD, a float, a squared distance.
    Raises:
      TypeError: if the features are not real numbers.
      ValueError: if they differ in shape, or one is not finite, or a set has fewer than two.
    """
    x, y = two(("x", "y"), x, y)
    return frechet(moments(x), moments(y))
