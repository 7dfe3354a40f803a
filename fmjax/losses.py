"""Losses: one number per example, (B,); the caller draws t and x_0, and takes the mean.

    L_CFM = E |f(x_t, t) - (alpha'_t x_1 + beta'_t x_0)|^2        flow matching                   (1)
    L_CSM = E |f(x_t, t) + x_0 / beta_t|^2                        denoising score matching        (2)
    L_DDPM = E |f(x_t, t) - x_0|^2                                noise prediction                (3)

each have the gradient of the loss against the marginal velocity, score or noise (L_FM, L_SM), which is
`regression` on the fields of `marginals`. Squared norms are means over the coordinates, |.|^2 / d.
"""

import chex
import jax.numpy as jnp

from fmjax import checks, paths


def regression(field, x, t, value) -> chex.ArrayDevice:
    """Squared error of a field per coordinate.

    |f(x, t) - value|^2 / d    (MIT 6.S184, "Training Target and Train Loss"; with a marginal velocity L_FM, with a marginal score L_SM)

    Args:
      field: (x, t) -> like x.
      x: states, (B, ...), any float dtype.
      t: times, () or (B,).
      value: what the field should give, like x.
    Returns:
      (B,), in float32 or wider.
    Raises:
      ValueError: if the field's output or value has another shape than x.
    """
    checks.function("field", field, checks.FIELD)
    x = checks.batch("x", x)
    checks.times(checks.on_path(t), x)
    prediction = field(x, t)
    checks.like("The field's output", prediction, x)
    checks.like("value", value, x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    error = jnp.asarray(prediction, dtype) - jnp.asarray(value, dtype)
    return (error**2).mean(axis=tuple(range(1, x.ndim)))


def flow_matching(field, path, x_0, x_1, t) -> chex.ArrayDevice:
    """Conditional flow matching, of one draw of noise and time per example.

    |f(x_t, t) - u_t|^2 / d,  (x_t, u_t) = flow(x_0, x_1, t)        (1) (MIT 6.S184, "Flow Matching", L_CFM)

    Args:
      field: (x, t) -> like x, the network.
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype; or any source, where a bridge is wanted.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,).
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, t is neither one time nor one per example, or the field's output is not like x.
    """
    checks.path(path)
    x_t, u_t = paths.flow(path, x_0, checks.batch("x_1", x_1), t)
    return regression(field, x_t, t, u_t)


def denoising(field, path, x_0, x_1, t, *, target) -> chex.ArrayDevice:
    """Regression on any target, of one draw of noise and time per example.

    |f(x_t, t) - (a x_1 + b x_0)|^2 / d,  (a, b) = target(path, t)
    (2) with `targets.score`, (3) with `targets.noise` (MIT 6.S184, "Score Matching", L_CSM and L_DDPM)

    Args:
      field: (x, t) -> like x, the network.
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,), where the target is finite: beta_t > 0 for `targets.score`.
      target: what the field predicts, a function `(path, t) -> (a, b)`.
    Returns:
      (B,), in float32 or wider; times `targets.weight` it is another target's loss.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, t is neither one time nor one per example, or the field's output is not like x.
    """
    checks.path(path)
    checks.function("target", target, "targets.score")
    x_t = paths.interpolate(path, x_0, checks.batch("x_1", x_1), t)
    a, b = target(path, paths.lift(t, x_t))
    return regression(field, x_t, t, a * x_1 + b * x_0)
