"""EMA: averages of the parameters while training, and those of other lengths afterwards    (Karras et al. 2024, "EDM2", arXiv:2312.02696).

The power-function average after t steps, and how a step updates it:

    e_t = int_0^t p_t(tau) theta_tau dtau,   p_t(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)      (1)
    e <- d_n e + (1 - d_n) theta,   d_n = (1 - 1 / (n + 1))^(gamma + 1)                            (2)

Its relative standard deviation, that of tau over t under (1), is sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))    (3).

    step = training.make_step(loss_fn, optimizer, ema_decay=(training.power_ema(0.05), training.power_ema(0.1)))
    state = training.init(params, optimizer, emas=2)

Keep `(step, sigma_rel, jax.device_get(average))` now and then; `post_hoc_ema` makes the average of any sigma_rel from them.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def ema_exponent(sigma_rel) -> float:
    """The exponent of a power-function average, from its relative standard deviation.

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))    (Karras et al. 2024, arXiv:2312.02696, section 3.1)

    Args:
      sigma_rel: the relative standard deviation of the average, in (0, 0.28].
    Returns:
      gamma, at least 0.
    Raises:
      ValueError: if there is none for that sigma_rel.
    """
    if not isinstance(sigma_rel, int | float | np.number) or not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(
            f"sigma_rel is {sigma_rel!r}, but an average's relative standard deviation is in (0, {12**-0.5:.3f}]: 0.05 and 0.1 are common."
        )
    # (3) squared: sigma^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(float(roots[np.abs(roots.imag) < 1e-9].real.max()), 0.0)


def power_ema(sigma_rel) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """The decay of a power-function average, for `training.make_step`'s `ema_decay`.

    d_n = (1 - 1 / (n + 1))^(gamma + 1)    (Karras et al. 2024, arXiv:2312.02696, section 3.1)

    with gamma the `ema_exponent` of `sigma_rel`.

    Args:
      sigma_rel: the relative standard deviation of the average, in (0, 0.28].
    Returns:
      A function of the number n of steps taken.
    Raises:
      ValueError: if there is no exponent for that sigma_rel.
    """
    gamma = ema_exponent(sigma_rel)
    return lambda n: (1 - 1 / (jnp.asarray(n, jnp.float32) + 1)) ** (gamma + 1)


def post_hoc_ema(snapshots, sigma_rel, step=None) -> Any:
    """The average of another sigma_rel, or at an earlier step, from those kept    (Karras et al. 2024, arXiv:2312.02696, section 3.2).

    The weights minimise the squared difference between the wanted profile, p of (1) of `fmjax.training.ema`, and the sum of those kept.

    Args:
      snapshots: triples `(step, sigma_rel, average)`, their averages pytrees of one structure.
      sigma_rel: of the average to make.
      step: at which; by default the last of the snapshots.
    Returns:
      A pytree like the averages.
    Raises:
      ValueError: if there are no snapshots, one is not a triple, or has other arrays than the first, or step is not in (0, the last
        of them].
    """
    if not snapshots:
        raise ValueError("There are no snapshots: keep (step, sigma_rel, average) now and then while training.")
    for i, snapshot in enumerate(snapshots):
        if not isinstance(snapshot, tuple | list) or len(snapshot) != 3:
            raise ValueError(f"Snapshot {i} is a {type(snapshot).__name__}, but each is a triple (step, sigma_rel, average).")
        if _shapes(snapshot[2]) != _shapes(snapshots[0][2]):
            raise ValueError(f"The average of snapshot {i} has other arrays than the first: average parameters of one network.")
    steps, sigmas, trees = zip(*snapshots, strict=True)
    step = max(steps) if step is None else step
    if not 0 < step <= max(steps) or min(steps) <= 0:
        raise ValueError(f"step is {step} and the snapshots are of steps {sorted(steps)}; expected one after 0 and up to the last.")
    times = np.asarray(steps, np.float64)
    gammas = np.array([ema_exponent(each) for each in sigmas])
    products = _product(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _product(times, gammas, np.float64(step), ema_exponent(sigma_rel))
    weights = np.linalg.lstsq(products, wanted, rcond=None)[0]

    def total(*leaves):
        return np.einsum("i,i...->...", weights, np.stack(leaves).astype(np.float64)).astype(leaves[0].dtype)

    return jax.tree.map(total, *trees)


def _shapes(tree):
    """The structure of a pytree and the shapes of its arrays."""
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _product(t_a, gamma_a, t_b, gamma_b):
    """The integral of p_a p_b over [0, min(t_a, t_b)], without powers that overflow."""
    shorter, exponents = np.minimum(t_a, t_b), (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return exponents * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b * shorter / (t_a * t_b)
