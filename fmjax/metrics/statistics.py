"""Statistics: the mean and the covariance of features, batch by batch, in files, and the Fréchet distance of two.

Sums of squares about a common origin lose the digits of features far from it; here each batch has its own mean, and batches are put
together by their means and covariances    (Chan, Golub and LeVeque 1979).
"""

import dataclasses

import numpy as np

from fmjax import checks, files
from fmjax.metrics.sets import one

_SYMMETRIC = 1e-5
"""How far a covariance may be from symmetric, of its largest number: that of float32 features is so by rounding."""
_NEGATIVE = 1e-3
"""How far below 0 an eigenvalue of a covariance may be, of the largest: those in float32 are so by rounding."""
_ROUNDING = 16 * np.finfo(np.float64).eps
"""Eigenvalues below it, of the largest, are those of a covariance of fewer samples than dimensions: rounding in the place of 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """The mean and the covariance of features, in float64 on the host, and of how many they are.

    n m = sum_i x_i,   (n - 1) C = sum_i (x_i - m) (x_i - m)^T        (5)

    `moments` makes them of features, `load_moments` reads them; `Moments(mu, sigma)` is what another file holds.
    """

    mean: np.ndarray
    """m, (D,)."""
    covariance: np.ndarray
    """C, (D, D), as `numpy.cov` gives it; 0 where there is one sample."""
    count: int | None = None
    """n; None where it is not known, as in files of other libraries."""

    def __post_init__(self):
        mean, covariance = _numbers("mean", self.mean), _numbers("covariance", self.covariance)
        if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
            raise ValueError(f"mean has shape {mean.shape} and covariance {covariance.shape}, but they are (D,) and (D, D).")
        if np.abs(covariance - covariance.T).max() > _SYMMETRIC * np.abs(covariance).max() or covariance.diagonal().min() < 0:
            raise ValueError("covariance is not symmetric, or has a variance below 0: give numpy.cov(features, rowvar=False).")
        if self.count is not None:
            checks.whole("count", self.count, "how many samples the moments are of")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)


def _numbers(name, value):
    value = np.asarray(value)
    if value.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {value.dtype}, but it is an array of real numbers.")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has {(~np.isfinite(value)).sum()} of {value.size} numbers that are not finite.")
    # A copy, which the caller's later changes do not reach.
    return value.astype(np.float64)


def _require_moments(**given):
    for name, value in given.items():
        if not isinstance(value, Moments):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but it is Moments: make them by metrics.moments(features), or read them by "
                "metrics.load_moments(path)."
            )
    sizes = {name: value.mean.size for name, value in given.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The moments are of features of {' and '.join(map(str, sizes.values()))} dimensions, but those of one network and layer have "
            "as many: take both from the same."
        )


def moments(features) -> Moments:
    """The mean and the covariance of features.

    n m = sum_i x_i,   (n - 1) C = sum_i (x_i - m) (x_i - m)^T        (5)

    Runs on the host in float64. Features on several devices or processes are gathered first: each process has the moments of all.

    Args:
      features: (N, ...), flattened to vectors.
    Returns:
      Moments.
    Raises:
      TypeError: if the features are not real numbers.
      ValueError: if they are not a batch of vectors, or one is not finite.
    """
    features = one("features", features)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = features.mean(0)
        apart = features - mean[None]
        covariance = apart.T @ apart / max(len(features) - 1, 1)
    require_squares(features, mean, covariance)
    return Moments(mean, covariance, len(features))


def require_squares(features, *made) -> None:
    """Raises where numbers made of features are beyond float64."""
    if not all(np.isfinite(each).all() for each in made):
        raise ValueError(
            f"Features are up to {np.abs(features).max():g}, whose products float64 does not hold: scale them, all sets alike."
        )


def merge(a, b) -> Moments:
    """The moments of two sets together, exact to rounding, whatever was merged before and in which order.

    S = S_a + S_b + n_a n_b / (n_a + n_b) (m_b - m_a) (m_b - m_a)^T,   S = (n - 1) C        (6)

    Args:
      a: Moments of one set.
      b: Moments of another, whose features are as long.
    Returns:
      Moments of both.
    Raises:
      TypeError: if they are not Moments.
      ValueError: if they differ in dimensions, or how many samples one is of is not known.
    """
    _require_moments(a=a, b=b)
    if a.count is None or b.count is None:
        raise ValueError("Moments without a count cannot be merged: a mean of means needs to know of how many samples each is.")
    count, step = a.count + b.count, b.mean - a.mean
    scatter = (a.count - 1) * a.covariance + (b.count - 1) * b.covariance + np.outer(step, step) * (a.count * b.count / count)
    return Moments(a.mean + step * (b.count / count), scatter / (count - 1), count)


def update(previous, features) -> Moments:
    """The moments of what came before and of one batch of features more, so that no more than a batch is held.

    Args:
      previous: Moments, or None before the first batch.
      features: (B, ...).
    Returns:
      Moments of all.
    Raises:
      TypeError: if `previous` is not Moments, or the features are not real numbers.
      ValueError: if the features differ in length, or one is not finite.
    """
    batch = moments(features)
    return batch if previous is None else merge(previous, batch)


def frechet(a, b) -> float:
    """The Fréchet distance between two normal distributions, of which the FID is one.

    FD = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))        (4) (Heusel et al. 2017, arXiv:1706.08500)

    The FID is that of Inception's pooled features, sFID that of its spatial ones (Nash et al. 2021, arXiv:2103.03841), and FD-DINOv2
    that of DINOv2's class token (Stein et al. 2023, arXiv:2306.04675). All fall with the number of samples: compare only those of as
    many, 50,000 in most papers. Right with fewer samples than dimensions, too. Runs on the host in float64.

    Args:
      a: Moments.
      b: Moments, whose features are as long.
    Returns:
      FD, a float at least 0, a squared distance.
    Raises:
      TypeError: if they are not Moments.
      ValueError: if they differ in dimensions, or one is of fewer than two samples, or is no covariance.
    """
    _require_moments(a=a, b=b)
    if 1 in (a.count, b.count):
        raise ValueError(f"A covariance needs at least two samples, got {a.count} and {b.count}.")
    # The root of the one of fewer samples, which has the lower rank: the product is smaller, and less is rounding.
    (of_low, low), (of_high, high) = sorted((("a", a), ("b", b)), key=lambda each: each[1].count or np.inf)
    values, vectors = np.linalg.eigh(low.covariance)
    _require_positive(of_low, values, values[-1])
    if high.count is None:
        # Another program's, which the root of few samples would see in part.
        of_file = np.linalg.eigvalsh(high.covariance)
        _require_positive(of_high, of_file, of_file[-1])
    there = values > _ROUNDING * values[-1]
    root = vectors[:, there] * np.sqrt(values[there])
    # tr (C_a C_b)^(1/2) = tr (A^T C_b A)^(1/2) with A A^T = C_a, which is symmetric: real eigenvalues, no complex root.
    with np.errstate(over="ignore", invalid="ignore"):
        product = root.T @ high.covariance @ root
    require_squares(np.append(low.covariance, high.covariance), product)
    squares = np.linalg.eigvalsh(product)
    _require_positive(of_high, squares, values[-1] * high.covariance.diagonal().max())
    cross = np.sqrt(np.maximum(squares, 0)).sum()
    with np.errstate(over="ignore"):
        distance = float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
    require_squares(np.append(a.mean, b.mean), distance)
    # Rounding leaves a little on either side of zero where the sets are equal.
    return max(distance, 0.0)


def _require_positive(name, values, largest):
    if values.size and values[0] < -_NEGATIVE * max(largest, 0):
        raise ValueError(
            f"The covariance of {name} is none: it has eigenvalues below 0 that are no rounding, so that its features would have variances "
            "below 0 in some direction; give numpy.cov(features, rowvar=False)."
        )


def save_moments(path, moments) -> None:
    """Writes moments to an .npz file, in the layout that other libraries read: `mu`, `sigma`, and `count` beside them.

    Args:
      path: of the file, by convention ending with .npz; its folder exists.
      moments: Moments.
    Raises:
      TypeError: if they are not Moments.
    """
    _require_moments(moments=moments)
    count = {} if moments.count is None else {"count": moments.count}
    with files.replacing(path) as part, open(part, "wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, **count)


def load_moments(path, mean="mu", covariance="sigma") -> Moments:
    """The moments in an .npz file: reference statistics of a data set, as ADM, EDM, pytorch-fid and clean-fid publish them.

    Nothing in the file is executed, so one that was pickled (.pkl, as EDM2's) is refused: in the program it came with, write its `mu`
    and `sigma` by `numpy.savez`.

    Args:
      path: of the file.
      mean: the name of the mean in it, (D,); "mu_s" is that of ADM for sFID.
      covariance: the name of the covariance, (D, D); "sigma_s" is that of ADM for sFID.
    Returns:
      Moments, whose count is known where `save_moments` wrote it.
    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if the file is no .npz file, is damaged or has other names, or what it has under them is no mean and covariance.
    """
    held = files.arrays(path)
    missing = [name for name in (mean, covariance) if name not in held]
    if missing:
        raise ValueError(
            f"{path} has {', '.join(held) or 'nothing'}, but not {' and '.join(missing)}: name the mean and the covariance, or make the "
            "moments of features of its images."
        )
    # Compressed zeros of any shape are a small file.
    if len(held[mean].shape) != 1 or held[covariance].shape != held[mean].shape * 2:
        raise ValueError(
            f"{path} has no moments as {mean} and {covariance}: mean has shape {held[mean].shape} and covariance "
            f"{held[covariance].shape}, but they are (D,) and (D, D)."
        )
    try:
        count = held["count"].read().item() if "count" in held and not held["count"].shape else None
        return Moments(held[mean].read(), held[covariance].read(), count)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has no moments as {mean} and {covariance}: {error}") from error
