"""Features: what the logits and the features of a classifier of images say of a set of samples."""

import jax
import numpy as np
from jax import lax
from scipy import special

from fmjax import checks
from fmjax.metrics.sets import one, two
from fmjax.metrics.statistics import require_squares


def inception_score(logits, splits: int | np.integer = 10) -> tuple[float, float]:
    """The Inception score: how sure a classifier is of each sample, and how many classes there are over all of them.

    IS = exp(E KL(p(y | x), p(y)))        (7) (Salimans et al. 2016, arXiv:1606.03498)

    1 at least, and as many as there are classes at most. It is that of each of `splits` parts of equal size, in the order given: samples
    that are sorted by class are to be shuffled first. Runs on the host in float64.

    Args:
      logits: of the classifier before its softmax, (N, classes).
      splits: into how many parts the samples are cut; ADM has parts of 5,000.
    Returns:
      The mean over the parts and their standard deviation, two floats.
    Raises:
      TypeError: if the logits are not real numbers.
      ValueError: if they are not (N, classes), are probabilities, or one is not finite, or there are fewer samples than parts.
    """
    checks.whole("splits", splits, "into how many parts the samples are cut")
    given, logits = np.shape(logits), one("logits", logits)
    if len(given) != 2 or given[1] < 2:
        raise ValueError(f"logits has shape {given}, but they are (N, classes), of two classes at least.")
    if len(logits) < splits:
        raise ValueError(f"logits are of {len(logits)} samples, which cannot be cut into splits={splits} parts: give fewer.")
    if (logits >= 0).all() and (np.abs(logits.sum(1) - 1) < 0.01).all():
        raise ValueError("logits are probabilities, whose rows sum to 1: give the logits, or the logarithms of probabilities above 0.")
    log_p = special.log_softmax(logits, axis=1)
    scores = []
    for part in (log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits] for i in range(splits)):
        log_q = special.logsumexp(part, axis=0, keepdims=True) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - log_q)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(key, x, y, subsets: int | np.integer = 100, subset_size: int | np.integer = 1000) -> tuple[float, float]:
    """The kernel distance between two sets of features, over random subsets of both; with Inception features of images, the KID.

    MMD^2 = E k(x_1, x_2) + E k(y_1, y_2) - 2 E k(x_1, y_1),   k(x, y) = (x^T y / d + 1)^3        (8)

    with d the length of the vectors    (Bińkowski et al. 2018, arXiv:1801.01401). Its estimate has no bias, whatever the number of samples,
    so that it may be a little below 0 for equal distributions. Runs on the host in float64.

    Args:
      key: a typed key, which draws the subsets, without replacement.
      x: features, (N, ...).
      y: features, (M, ...).
      subsets: how many are drawn.
      subset_size: how many samples of each set are in one, at most N and M.
    Returns:
      The mean over the subsets and their standard deviation, two floats.
    Raises:
      TypeError: if the key is not typed, or the features are not real numbers.
      ValueError: if the features differ in shape, or one is not finite, or there are fewer than a subset has.
    """
    checks.key(key)
    checks.whole("subsets", subsets, "how many subsets are drawn")
    checks.whole("subset_size", subset_size, "how many samples of each set are in a subset", least=2)
    x, y = two(("x", "y"), x, y)
    if subset_size > min(len(x), len(y)):
        raise ValueError(
            f"subset_size is {subset_size}, but x has {len(x)} samples and y has {len(y)}, and a subset is drawn without replacement: give "
            "as many at most, or more samples."
        )
    key_x, key_y = jax.random.split(key)
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for of_x, of_y in zip(_subsets(key_x, len(x), subsets, subset_size), _subsets(key_y, len(y), subsets, subset_size), strict=True):
            within = _mean_of_pairs(x[of_x]) + _mean_of_pairs(y[of_y])
            squares.append(within - 2 * _kernel(x[of_x], y[of_y]).mean())
    require_squares(np.append(x, y), squares)
    return float(np.mean(squares)), float(np.std(squares))


def _subsets(key, n, subsets, size):
    """Indices, (subsets, size), each row without replacement."""
    draw = jax.jit(lambda keys: lax.map(lambda key: jax.random.permutation(key, n)[:size], keys))
    return np.asarray(draw(jax.random.split(key, subsets)))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x):
    """E k(x_1, x_2) over different samples."""
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
