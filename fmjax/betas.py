"""Betas: diffusion in discrete steps as a path, so that its networks follow every sampler here.

A table beta_1, ..., beta_N says how much noise each of N steps adds (Ho et al. 2020, arXiv:2006.11239):

    A_k = prod_{i <= k} (1 - beta_i)                                                      (1)
    alpha_t = sqrt(A_k),   beta_t = sqrt(1 - A_k),   k = N (1 - t)                        (2)

so that t = 0 is the step k = N, and t = 1 is data, k = 0. Between the steps log A is a cubic that rises, with a continuous derivative.
A network of this kind counts from 0: at t it sees k - 1, which `step_index` gives. Fewer steps are a coarser grid, not another path:
`grid(path, 250)`.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks

__all__ = ["Betas", "linear", "cosine", "grid", "step_index"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["betas"])
@dataclasses.dataclass(frozen=True)
class Betas:
    """The path of a table of betas.

    alpha_t = sqrt(A_k),   beta_t = sqrt(1 - A_k),   k = N (1 - t)        (2) (Ho et al. 2020, arXiv:2006.11239)

    The velocity is infinite at t = 1, as that of `paths.VariancePreserving` is, and at t = 0 a trace of the data is left.

    Raises:
      ValueError: if the betas are not one or more numbers above 0 and below 1.
    """

    betas: tuple[float, ...]
    """beta_1 to beta_N, (N,): of a step that begins at data, first."""

    def __post_init__(self):
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas has shape {betas.shape} and numbers from {betas.min(initial=np.inf):g} to {betas.max(initial=-np.inf):g}, but it "
                "is a table (N,) of the variances that N steps add, each above 0 and below 1: betas.linear() is the usual one."
            )
        object.__setattr__(self, "betas", tuple(betas.tolist()))

    def __repr__(self):
        return f"Betas({len(self.betas)} betas from {self.betas[0]:g} to {self.betas[-1]:g})"

    def _log_signal(self, t):
        """log A."""
        values, slopes = _knots(self.betas)
        dtype = jnp.promote_types(jnp.result_type(float, t), jnp.float32)
        k = len(self.betas) * (1 - jnp.asarray(t, dtype))
        i = jnp.clip(jnp.floor(k), 0, len(self.betas) - 1).astype(int)
        share = k - i.astype(dtype)
        (left, right), (rise, fall) = ((jnp.asarray(knots, dtype)[i], jnp.asarray(knots, dtype)[i + 1]) for knots in (values, slopes))
        # Hermite's cubic, as the line and what bends it.
        secant = right - left
        bend = (rise - secant) * (1 - share) - (fall - secant) * share
        return left + share * (secant + (1 - share) * bend)

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return jnp.exp(self._log_signal(t) / 2).astype(jnp.result_type(float, t))

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return jnp.sqrt(-jnp.expm1(self._log_signal(t))).astype(jnp.result_type(float, t))


@functools.lru_cache(maxsize=16)
def _knots(betas):
    """log A at 0 to N, and its derivatives there, so that it falls between them (Fritsch and Butland 1984)."""
    steps = np.log1p(-np.asarray(betas, np.float64))
    slopes = np.concatenate([steps[:1], 2 / (1 / steps[1:] + 1 / steps[:-1]), steps[-1:]])
    return np.concatenate([[0.0], np.cumsum(steps)]), slopes


def linear(steps=1000) -> Betas:
    """The path of DDPM, ADM and DiT: betas that grow from 1e-4 to .02, for 1,000 steps.

    beta_k = (1000 / N) (1e-4 + (0.02 - 1e-4) (k - 1) / (N - 1))    (Ho et al. 2020, arXiv:2006.11239)

    Args:
      steps: N.
    Returns:
      A path.
    Raises:
      ValueError: if `steps` is not a whole number above 20, from which on every beta is below 1.
    """
    checks.whole("steps", steps, "how many betas there are", 21)
    return Betas(tuple(1000 / steps * np.linspace(1e-4, 0.02, steps)))


def cosine(steps=1000) -> Betas:
    """The path of improved DDPM and of ADM at 64 pixels: A falls as a squared cosine.

    A_k = f(k) / f(0),   f(k) = cos(pi / 2 (k / N + 0.008) / 1.008)^2,  beta_k <= 0.999    (Nichol and Dhariwal 2021, arXiv:2102.09672)

    Args:
      steps: N.
    Returns:
      A path.
    Raises:
      ValueError: if `steps` is not a whole number of at least 1.
    """
    checks.whole("steps", steps, "how many betas there are")
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return Betas(tuple(np.minimum(1 - signal[1:] / signal[:-1], 0.999)))


def grid(path, steps) -> np.ndarray:
    """The grid of so many steps of a table, as even as whole numbers are, from the last step to data: DDPM's respaced one.

    t = 1 - k / N    (Nichol and Dhariwal 2021, arXiv:2102.09672)

    with k - 1 the whole number nearest to i (N - 1) / (n - 1) for i = n - 1 down to 0, and at last k = 0.

    Args:
      path: a `Betas`.
      steps: n, at most N; or the indices k - 1 themselves, increasing: `range(0, 1000, 40)` are DDIM's 25 steps.
    Returns:
      Times, (n + 1,), float32, increasing to 1.
    Raises:
      TypeError: if the path is not a `Betas`.
      ValueError: if there are more steps than betas, or the indices do not increase within the table.
    """
    _require_table(path, "a grid of whole steps is one of a betas.Betas: others have times.uniform_grid")
    count = len(path.betas)
    if np.ndim(steps) == 0:
        checks.whole("steps", steps, "how many steps there are")
        if steps > count:
            raise ValueError(f"steps is {steps}, but the table has {count} betas: take at most as many.")
        # Rounds half to even, as Python does.
        indices = np.rint(np.arange(steps) * ((count - 1) / max(steps - 1, 1))).astype(int)
    else:
        indices = np.asarray(steps)
        inside = indices.size and np.issubdtype(indices.dtype, np.integer) and indices.ndim == 1
        if not inside or indices[0] < 0 or indices[-1] >= count or (np.diff(indices) < 1).any():
            raise ValueError(f"steps is {steps}, but indices are whole numbers that increase from 0 or more to at most {count - 1}.")
    return (1 - np.append(indices[::-1] + 1, 0) / count).astype(np.float32)


def _require_table(path, what):
    if not isinstance(path, Betas):
        raise TypeError(f"path is {path!r}, but {what}.")


def step_index(path, t) -> chex.ArrayDevice:
    """What a network of discrete steps sees of the time: k - 1, 0 for the step nearest to data.

    k - 1 = N (1 - t) - 1

    Times that float32 cannot tell from a whole step are that step, so that those of `grid` give whole numbers, as the network saw in
    training.

    Args:
      path: a `Betas`.
      t: times, any shape, of 32 bits at least: those of fewer cannot tell a thousand steps apart.
    Returns:
      Like t, float32, between 0 and N - 1: nearer to data than its first step the network knows no other.
    Raises:
      TypeError: if the path is not a `Betas`, or the times are not floats of 32 bits at least.
      ValueError: if a known time is not in [0, 1].
    """
    _require_table(path, "only the steps of a betas.Betas have numbers")
    checks.on_path(t)
    dtype = jnp.result_type(float, t)
    if hasattr(t, "dtype") and jnp.dtype(t.dtype).itemsize < 4:
        raise TypeError(
            f"t has dtype {t.dtype}, whose numbers are up to {jnp.finfo(t.dtype).epsneg:.1g} apart, but steps {1 / len(path.betas):g}: "
            "give times as float32, as samplers do."
        )
    count = len(path.betas)
    index = count * (1 - jnp.asarray(t, dtype)) - 1
    # The time, its difference from 1 and the product are each rounded.
    whole = jnp.round(index)
    index = index + lax.stop_gradient(jnp.where(jnp.abs(index - whole) <= count * 2.0**-23, whole - index, 0))
    return jnp.clip(index, 0, count - 1).astype(jnp.float32)
