"""Neighbours: how much of a set of features lies where another does, by the distances to nearest neighbours.

The balls around the features of a set, each of which reaches to the k-th nearest of the others, stand for where its distribution is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks
from fmjax.metrics.sets import two

_BLOCK = 2**25
"""Distances in memory at once: 50,000 samples have 2.5e9 pairs."""
_ROUNDING = 2.0**-44
"""Of a squared distance, beside the squares of the two vectors: what is nearer to a ball's edge is on it, and so in the ball."""


def precision_recall(real, fake, k: int | np.integer = 3) -> tuple[float, float]:
    """Precision, the share of samples that lie where the data are, and recall, the share of the data that lies where samples are.

    M P = sum_j max_i 1(|y_j - x_i| <= r_i),   N R = sum_i max_j 1(|x_i - y_j| <= r_j)        (9)

    with r_i the distance of x_i to its k-th nearest neighbour in its own set, and r_j that of y_j    (Kynkäänniemi et al. 2019,
    arXiv:1904.06991). Both depend on k and on the numbers of samples: compare only those of as many. Distances are computed in float64,
    in blocks, on the device where JAX computes.

    Args:
      real: features x of data, (N, ...).
      fake: features y of samples, (M, ...).
      k: which neighbour a ball reaches.
    Returns:
      P and R, two floats in [0, 1].
    Raises:
      TypeError: if the features are not real numbers.
      ValueError: if they differ in shape, or one is not finite, or there are no more than k of them.
    """
    real, fake = _sets(real, fake, k)
    with jax.enable_x64(True):
        around_real = np.asarray(_balls(real, _radii(real, int(k)), fake))
        around_fake = np.asarray(_balls(fake, _radii(fake, int(k)), real))
    return float((around_real > 0).mean()), float((around_fake > 0).mean())


def density_coverage(real, fake, k: int | np.integer = 5) -> tuple[float, float]:
    """Density, in how many balls of data a sample lies, and coverage, the share of balls of data in which a sample lies.

    k M Q = sum_j sum_i 1(|y_j - x_i| <= r_i),   N V = sum_i max_j 1(|y_j - x_i| <= r_i)        (10)

    with r_i the distance of x_i to its k-th nearest neighbour in its own set    (Naeem et al. 2020, arXiv:2002.09797). Other than in (9),
    no ball is around a sample, and one outlier of the data, whose ball is large, counts as little as it is likely. For equal distributions
    and as many samples of each, Q is near 1 and V near 1 - 2^-k.

    Args:
      real: features x of data, (N, ...).
      fake: features y of samples, (M, ...).
      k: which neighbour a ball reaches.
    Returns:
      Q, a float at least 0 which may be above 1, and V, one in [0, 1].
    Raises:
      TypeError: if the features are not real numbers.
      ValueError: if they differ in shape, or one is not finite, or there are no more than k of them.
    """
    real, fake = _sets(real, fake, k)
    with jax.enable_x64(True):
        radii = _radii(real, int(k))
        balls, covered = np.asarray(_balls(real, radii, fake)), np.asarray(_nearest(real, fake) <= radii)
    return float(balls.mean() / k), float(covered.mean())


def _sets(real, fake, k):
    checks.whole("k", k, "which neighbour a ball reaches")
    real, fake = two(("real", "fake"), real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"k is {k}, but real has {len(real)} samples and fake has {len(fake)}, and each needs k others in its set.")
    # Products of vectors far from the origin lose the digits of their distances; one far vector moves a mean, and no median.
    centre = np.median(real, axis=0, keepdims=True)
    return real - centre, fake - centre


def _rows(function, x, y):
    """A function of the squared distances from each of x to all of y, and of their rounding, in blocks of rows that fit into memory."""
    squares = (y**2).sum(-1)

    def row(point):
        both = (point**2).sum() + squares
        return function(jnp.maximum(both - 2 * jnp.matmul(y, point, precision="highest"), 0), _ROUNDING * both)

    return lax.map(row, x, batch_size=max(_BLOCK // len(y), 1))


@functools.partial(jax.jit, static_argnames="k")
def _radii(x, k):
    """The squared distance of each to the k-th nearest of the others; the nearest of all is itself."""
    return _rows(lambda squares, rounding: -lax.top_k(-squares, k + 1)[0][k], x, x)


@jax.jit
def _balls(x, radii, y):
    """In how many balls around x each of y lies."""
    return _rows(lambda squares, rounding: (squares <= radii + rounding).sum(), y, x)


@jax.jit
def _nearest(x, y):
    """The squared distance from each of x to the nearest of y, at least, with its rounding."""
    return _rows(lambda squares, rounding: (squares - rounding).min(), x, y)
