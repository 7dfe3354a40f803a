"""Diffusion: how much noise an SDE carries, choices of sigma_t.

Every sigma_t >= 0 gives the marginals of the flow (`sampling.sample_diffusion`), exactly with the exact score and steps without end.
With a network's score and few steps it is a choice: noise corrects what the network got wrong before, and needs more steps. Each choice
is a function of t. One that does not fall with beta, as a constant or `decreasing` on some paths, multiplies the network's error near
data in the drift of the SDE, by sigma^2 / (2 beta); `sampling.ancestral` does not.

    natural          sigma_t^2 = 2 scale b_t      the reverse of the noising SDE, DDPM's; infinite where alpha_t = 0      (1)
    by_noise         sigma_t = scale beta_t       finite from noise to data, gone at data: a good default                 (2)
    by_variance      sigma_t^2 = scale beta_t     "sigma" of SiT, Ma et al. 2024, section 3.4, code                       (3)
    decreasing       sigma_t^2 = scale cos^4(pi t / 2)                                                                    (4)
    bump             sigma_t^2 = scale sin^2(pi t)                                                                        (5)

b_t = beta_t^2 alpha'_t / alpha_t - beta_t beta'_t is the notes' (004, "Classifier-Free Guidance"). A constant is a number.
"""

import jax.numpy as jnp

from fmjax import checks, targets


def _check_scale(scale):
    checks.number("scale", scale, "how much noise there is", least=0)


def natural(path, scale=1.0):
    """(1), the reverse of the SDE that turns data to noise along the path; `scale` 1 with `sampling.ancestral` is DDPM.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      scale: the ratio of sigma_t^2 to 2 b_t.
    Returns:
      sigma, a function of t; infinite where alpha_t = 0, so drifts with it need a grid that starts later.
    """
    checks.path(path)
    _check_scale(scale)
    return lambda t: jnp.sqrt(2 * scale * targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1])


def by_noise(path, scale=1.0):
    """(2), in proportion to the noise that is left."""
    checks.path(path)
    _check_scale(scale)
    return lambda t: scale * path.beta(t)


def by_variance(path, scale=1.0):
    """(3), its square in proportion to the noise that is left."""
    checks.path(path)
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale * path.beta(t))


def decreasing(scale=1.0):
    """(4), falling from noise to data whatever the path."""
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale) * jnp.cos(jnp.pi / 2 * t) ** 2


def bump(scale=1.0):
    """(5), largest in the middle, whatever the path."""
    _check_scale(scale)
    return lambda t: jnp.sqrt(scale) * jnp.abs(jnp.sin(jnp.pi * t))
