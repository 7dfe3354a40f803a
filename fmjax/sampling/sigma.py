"""Sigma: choices of sigma_t, by the names of SiT    (Ma et al. 2024, arXiv:2401.08740, section 3.4).

Every sigma_t >= 0 gives the marginals of the flow (`sampling.sample_diffusion`), exactly with the exact score and infinitely many steps.
With a network's score and few steps it is a choice: noise corrects earlier errors of the network, and needs more steps. Each choice is a
function of t. One that does not fall with beta, as a constant or (4) on some paths, multiplies the network's error near data in the
drift of the SDE, by sigma^2 / (2 beta); `sampling.ancestral` does not.

    sigma_sbdm                     sigma_t^2 = 2 scale b_t      the reverse of the noising SDE, DDPM's; infinite where alpha_t = 0   (1)
    sigma_beta                     sigma_t = scale beta_t       finite from noise to data, 0 at data: a good default                 (2)
    sigma_sqrt_beta                sigma_t^2 = scale beta_t     "sigma" of SiT, and "linear" on the linear path                      (3)
    sigma_decreasing               sigma_t^2 = scale cos^4(pi t / 2)                                                                 (4)
    sigma_increasing_decreasing    sigma_t^2 = scale sin^2(pi t)                                                                     (5)

b_t = beta_t^2 alpha'_t / alpha_t - beta_t beta'_t (MIT 6.S184, "Classifier-Free Guidance"). A constant is a number.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from fmjax import checks, targets


def _check_scale(scale):
    checks.number("scale", scale, "how much noise there is", least=0)


def sigma_sbdm(path, scale=1.0) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """The sigma of the reverse of the SDE that turns data to noise along the path; `scale` 1 with `sampling.ancestral` is DDPM.

    sigma_t^2 = 2 scale b_t,  b_t = beta_t^2 alpha'_t / alpha_t - beta_t beta'_t    (Ma et al. 2024, arXiv:2401.08740, section 3.4)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      scale: how much noise there is, at least 0.
    Returns:
      sigma, a function of t; infinite where alpha_t = 0, so drifts with it need a grid that starts later.
    Raises:
      TypeError: if `path` is no path.
      ValueError: if the scale is negative.
    """
    checks.path(path)
    _check_scale(scale)
    return lambda t: jnp.sqrt(2 * scale * targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1])


def sigma_beta(path, scale=1.0) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """A sigma in proportion to the noise that is left, finite from noise to data and 0 at data: a good default.

    sigma_t = scale beta_t    (Ma et al. 2024, arXiv:2401.08740, section 3.4)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      scale: how much noise there is, at least 0.
    Returns:
      sigma, a function of t.
    Raises:
      TypeError: if `path` is no path.
      ValueError: if the scale is negative.
    """
    checks.path(path)
    _check_scale(scale)
    return lambda t: scale * path.beta(t)


def sigma_sqrt_beta(path, scale=1.0) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """A sigma whose square is in proportion to the noise that is left: "sigma" of SiT, and "linear" on the linear path.

    sigma_t^2 = scale beta_t    (Ma et al. 2024, arXiv:2401.08740, section 3.4)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      scale: how much noise there is, at least 0.
    Returns:
      sigma, a function of t.
    Raises:
      TypeError: if `path` is no path.
      ValueError: if the scale is negative.
    """
    checks.path(path)
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale * path.beta(t))


def sigma_decreasing(scale=1.0) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """A sigma that falls from noise to data, whatever the path.

    sigma_t^2 = scale cos(pi t / 2)^4    (Ma et al. 2024, arXiv:2401.08740, section 3.4)

    Args:
      scale: how much noise there is, at least 0.
    Returns:
      sigma, a function of t.
    Raises:
      ValueError: if the scale is negative.
    """
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale) * jnp.cos(jnp.pi / 2 * t) ** 2


def sigma_increasing_decreasing(scale=1.0) -> Callable[[chex.Numeric], chex.ArrayDevice]:
    """A sigma that is largest in the middle, whatever the path.

    sigma_t^2 = scale sin(pi t)^2    (Ma et al. 2024, arXiv:2401.08740, section 3.4)

    Args:
      scale: how much noise there is, at least 0.
    Returns:
      sigma, a function of t.
    Raises:
      ValueError: if the scale is negative.
    """
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale) * jnp.abs(jnp.sin(jnp.pi * t))
