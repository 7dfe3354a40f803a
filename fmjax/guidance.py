"""Guidance: fields of (x, t, y) to fields of (x, t).

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)                  classifier-free                 (1)
    s~(x | y) = s(x) + w grad log p_t(y | x)                      by a classifier                 (2)

(1) holds for velocities, scores and every other target alike, since they are affine in each other at a given x.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import paths


def _check_scale(scale):
    """Raises unless the scale is finite, wherever its value is known."""
    if not isinstance(scale, Tracer) and not np.all(np.isfinite(scale)):
        raise ValueError(f"The guidance scale is {scale}, but it must be finite: 1 is no guidance, 3 is common.")


def classifier_free(field_y, y, null, scale):
    """Classifier-free guidance, in one batched call of the network.

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)        (1) (notes 002 and 004, "Classifier-Free Guidance")

    Args:
      field_y: (x, t, y) -> like x, the network.
      y: conditions, (B,) labels or (B, ...) of any kind.
      null: the condition that stands for none, a label or an array like one example's y.
      scale: w, a number or an array that multiplies x, such as (B, 1, 1, 1). 1 is no guidance and costs one evaluation.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if the scale is not finite, or y has not one condition an example.
    """
    _check_scale(scale)
    y = jnp.asarray(y)
    plain = not isinstance(scale, Tracer) and np.ndim(scale) == 0 and scale == 1

    def field(x, t):
        if y.shape[:1] != x.shape[:1]:
            raise ValueError(f"y has shape {y.shape}, but it must hold one condition an example for x of shape {x.shape}.")
        if plain:
            return field_y(x, t, y)
        nulls = jnp.broadcast_to(jnp.asarray(null, y.dtype), y.shape)
        both_t = jnp.concatenate([t, t]) if jnp.ndim(t) else t
        both = field_y(jnp.concatenate([x, x]), both_t, jnp.concatenate([nulls, y]))
        unguided, guided = jnp.split(both, 2)
        return (1 - scale) * unguided + scale * guided

    return field


def classifier(field, log_probability, scale):
    """Guidance by the gradient of a classifier.

    f(x, t) + w_t grad_x log p_t(y | x)        (2) (notes 002 and 004, "Classifier-Free Guidance")

    For a score field w_t is the scale w itself. For a velocity field it is w b_t with the notes' b_t,
    `lambda t: w * targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1]`, for alpha_t > 0.

    Args:
      field: (x, t) -> like x.
      log_probability: (x, t) -> (B,), log p_t(y | x) of each example for the class wanted of it.
      scale: w_t, a number or a function of t.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if the scale is a number that is not finite.
    """
    if not callable(scale):
        _check_scale(scale)

    def guided(x, t):
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x)
        return field(x, t) + (scale(paths.lift(t, x)) if callable(scale) else scale) * gradient

    return guided


def drop_labels(key, y, null, rate):
    """Replaces conditions by the null, each example on its own    (notes 004, "replace y = null with prob. eta").

    Args:
      key: a typed key.
      y: conditions, (B,) labels or (B, ...) of any kind.
      null: the condition that stands for none, a label or an array like one example's y.
      rate: the notes' eta, the probability of the null, in [0, 1].
    Returns:
      Conditions, like y.
    Raises:
      ValueError: if the rate is not a probability.
    """
    if not isinstance(rate, Tracer) and not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, but it is a probability, in [0, 1].")
    y = jnp.asarray(y)
    drop = jax.random.bernoulli(key, rate, y.shape[:1])
    return jnp.where(drop.reshape(-1, *(1,) * (y.ndim - 1)), jnp.asarray(null, y.dtype), y)
