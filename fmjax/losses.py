"""Losses: one number per example, (B,); the caller draws t and x_0, and takes the mean.

    L_CFM = E |f(x_t, t) - (alpha'_t x_1 + beta'_t x_0)|^2        flow matching                   (1)
    L_CSM = E |f(x_t, t) + x_0 / beta_t|^2                        denoising score matching        (2)
    L_DDPM = E |f(x_t, t) - x_0|^2                                noise prediction                (3)

each have the gradient of the loss against the marginal velocity, score or noise (L_FM, L_SM), which is
`regression` on the fields of `marginals`. Squared norms are means over the coordinates that count,

    |e|^2 / d = sum_j m_j w_j e_j^2 / sum_j m_j,        m a mask, w weights, 1 where they are left out             (4)

over all leaves of a state that is a pytree. Weightings in time are functions of the path and t, (B,), which multiply the losses:
`losses.flow_matching(field, path, x_0, x_1, t) * losses.min_snr(path, t)`. Each is a weight of the data's squared error, turned by
`targets.weight` into one of what the network predicts.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, paths, states, targets

__all__ = [
    "flow_matching",
    "denoising",
    "regression",
    "min_snr",
    "edm_weighting",
    "sigmoid_weighting",
    "masked_mean",
    "pseudo_huber",
    "learnt_uncertainty",
]


def _spread(name, value, x, state):
    """A weight or a mask for each coordinate of the state laid out as one array, (B, ...), or what multiplies it."""
    layout = states.layout(state)
    # A list of numbers is an array that is not made yet.
    value = np.asarray(value) if isinstance(value, list) and states.layout(value) is None else value
    if layout is None:
        return checks.multiplier(name, value, x)
    if jax.tree.structure(value) == layout.structure:
        each = zip(jax.tree.leaves(value), jax.tree.leaves(state), strict=True)
        leaves = [jnp.broadcast_to(checks.multiplier(name, leaf, jnp.asarray(part)), jnp.shape(part)) for leaf, part in each]
        return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
    if not hasattr(value, "shape") and not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, but it is one number, one per example, or a pytree like the state, {layout}, of these.")
    return checks.multiplier(name, value, x)


def _mask(mask, x, state) -> Any:
    """What counts, bool, of the shape of the state laid out as one array; None where all of it does."""
    if mask is None:
        return None
    mask = np.asarray(mask) if isinstance(mask, list) and states.layout(mask) is None else mask
    for leaf in jax.tree.leaves(mask):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.bool_):
            raise TypeError(f"mask has dtype {dtype}, but it is True for what counts: give numbers as `weight`.")
    as_numbers = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), mask)
    return jnp.broadcast_to(_spread("mask", as_numbers, x, state) > 0, x.shape)


def _clean(x_0, x_1, mask):
    """Noise and data, with 0 for what does not count, so that NaN there reaches neither the network nor a gradient."""
    layout = states.layout(x_1)
    flat_1 = checks.batch("x_1", x_1) if layout is None else layout.flatten("x_1", x_1)
    if mask is None:
        return x_0, x_1
    flat_0 = checks.floats("x_0", x_0) if layout is None else layout.flatten("x_0", x_0)
    checks.like("x_0", flat_0, flat_1)
    counts = _mask(mask, flat_1, x_1)
    cleaned = jnp.where(counts, flat_0, 0), jnp.where(counts, flat_1, 0)
    return cleaned if layout is None else (layout.unflatten(cleaned[0], like=x_0), layout.unflatten(cleaned[1], like=x_1))


def regression(field, x, t, value, *, weight=None, mask=None) -> chex.ArrayDevice:
    """Squared error of a field per coordinate.

    |f(x, t) - value|^2 / d        (4) (MIT 6.S184, "Training Target and Train Loss"; with a marginal velocity L_FM, with a score L_SM)

    Args:
      field: (x, t) -> like x.
      x: states, (B, ...), any float dtype, or a pytree of them.
      t: times, () or (B,).
      value: what the field should give, like x.
      weight: the w of (4): a number, one per example, (B,), an array that multiplies x, or for a pytree a pytree of these like x, as in
        {"image": 1.0, "pose": 10.0}. Without it all coordinates count the same. An array of fewer axes has x's first ones: (B,), (B, T).
      mask: the m of (4), True for what counts: bool, of the same shapes. What is behind it, NaN too, matters in no value or gradient.
    Returns:
      (B,), in float32 or wider; 0 for an example of which nothing counts (see `masked_mean`).
    Raises:
      TypeError: if the mask is not bool.
      ValueError: if the field's output or value has another shape than x.
    """
    checks.function("field", field, checks.FIELD)
    if (layout := states.layout(x)) is not None:
        flat, value = layout.flatten("x", x), layout.flatten("value", value)
        mask = None if mask is None else _mask(mask, flat, x)
        weight = None if weight is None else _spread("weight", weight, flat, x)
        return regression(layout.field(field), flat, t, value, weight=weight, mask=mask)
    x = checks.batch("x", x)
    checks.times(checks.on_path(t), x)
    counts = _mask(mask, x, x)
    x = x if counts is None else jnp.where(counts, x, 0)
    prediction = field(x, t)
    checks.like("The field's output", prediction, x)
    checks.like("value", value, x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    error = jnp.asarray(prediction, dtype) - jnp.asarray(value, dtype)
    if counts is not None:
        error = jnp.where(counts, error, 0)
    square = error**2
    if weight is not None:
        weight = jnp.asarray(_spread("weight", weight, x, x), dtype)
        square = (weight if counts is None else jnp.where(counts, weight, 0)) * square
    axes = tuple(range(1, x.ndim))
    return square.mean(axis=axes) if counts is None else square.sum(axis=axes) / jnp.maximum(counts.sum(axis=axes), 1)


def flow_matching(field, path, x_0, x_1, t, *, weight=None, mask=None) -> chex.ArrayDevice:
    """Conditional flow matching, of one draw of noise and time per example.

    |f(x_t, t) - u_t|^2 / d,  x_t = alpha_t x_1 + beta_t x_0,  u_t = alpha'_t x_1 + beta'_t x_0    (1) (MIT 6.S184, "Flow Matching", L_CFM)

    Args:
      field: (x, t) -> like x, the network.
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype, or a pytree of them; or any source, where a bridge is wanted.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,).
      weight: of each coordinate, as for `regression`.
      mask: what counts, as for `regression`; the network sees a state of 0 behind it.
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, t is neither one time nor one per example, or the field's output is not like x.
    """
    paths.fits(path, x_1)
    x_t, u_t = paths.flow(path, *_clean(x_0, x_1, mask), t)
    return regression(field, x_t, t, u_t, weight=weight, mask=mask)


def denoising(field, path, x_0, x_1, t, *, target, weight=None, mask=None) -> chex.ArrayDevice:
    """Regression on any target, of one draw of noise and time per example.

    |f(x_t, t) - (a x_1 + b x_0)|^2 / d,  (a, b) = target(path, t)
    (2) with `targets.score`, (3) with `targets.noise` (MIT 6.S184, "Score Matching", L_CSM and L_DDPM)

    Args:
      field: (x, t) -> like x, the network.
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype, or a pytree of them.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,), where the target is finite: beta_t > 0 for `targets.score`.
      target: what the field predicts, a function `(path, t) -> (a, b)`.
      weight: of each coordinate, as for `regression`.
      mask: what counts, as for `regression`; the network sees a state of 0 behind it.
    Returns:
      (B,), in float32 or wider; times `targets.weight` it is another target's loss.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, t is neither one time nor one per example, or the field's output is not like x.
    """
    paths.fits(path, x_1)
    checks.function("target", target, "targets.score")
    x_0, x_1 = _clean(x_0, x_1, mask)
    if (layout := states.layout(x_1)) is not None:
        flat_0, flat_1 = layout.flatten("x_0", x_0), layout.flatten("x_1", x_1)
        counts = None if mask is None else _mask(mask, flat_1, x_1)
        weight = None if weight is None else _spread("weight", weight, flat_1, x_1)
        return denoising(layout.field(field), path, flat_0, flat_1, t, target=target, weight=weight, mask=counts)
    x_t = paths.interpolate(path, x_0, x_1, t)
    a, b = target(path, paths.lift(t, x_t))
    return regression(field, x_t, t, a * x_1 + b * x_0, weight=weight, mask=mask)


def masked_mean(values, mask) -> chex.ArrayDevice:
    """The mean over what counts, such as the losses of the examples that are no padding.

    sum_i m_i v_i / sum_i m_i

    Args:
      values: v, any shape.
      mask: m, bool, like values; NaN behind it does not matter, in gradients neither.
    Returns:
      A number; NaN where nothing counts.
    Raises:
      TypeError: if the mask is not bool.
      ValueError: if the shapes differ.
    """
    values, mask = jnp.asarray(values), jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}, but it is True for what counts: give mask.astype(bool), or multiply by weights.")
    checks.like("mask", mask, values)
    return jnp.where(mask, values, 0).sum() / mask.sum()


def pseudo_huber(loss, c) -> chex.ArrayDevice:
    """The pseudo-Huber distance, which outliers change less, from a squared error per coordinate (4).

    sqrt(|e|^2 / d + c^2) - c        (Song and Dhariwal 2024, arXiv:2310.14189, eq. 8, divided by sqrt(d), with c for their c / sqrt(d))

    Args:
      loss: squared errors per coordinate, any shape, as `flow_matching` gives them.
      c: where it turns from the square of the error to its size, above 0; the paper's is 0.00054.
    Returns:
      Numbers like loss, with a gradient of 0 in an error of 0.
    Raises:
      ValueError: if c is below 1e-15, whose square float32 does not hold.
    """
    # The square of a smaller one would be 0 in float32, and the gradient of an error of 0 not a number.
    checks.number("c", c, "the error at which the distance turns linear", least=1e-15)
    # The difference of roots, without its cancellation.
    return loss / (jnp.sqrt(loss + c**2) + c)


def learnt_uncertainty(loss, log_variance) -> chex.ArrayDevice:
    """A loss weighted by one over what the network thinks it is, which balances the times.

    loss / exp(u) + u        (Kendall et al. 2018, arXiv:1705.07115; Karras et al. 2024, arXiv:2312.02696, eq. 14)

    which is least where exp(u) is the mean of the loss.

    Args:
      loss: (B,), as `flow_matching` gives it.
      log_variance: u, (B,), a small network's of t, trained along, such as `layers.LogVariance`.
    Returns:
      (B,).
    Raises:
      ValueError: if the shapes differ.
    """
    checks.like("log_variance", log_variance, loss)
    return loss * jnp.exp(-log_variance) + log_variance


def _errors(path, t, target):
    """alpha_t, beta_t, and the factors by which an error of the target is one of the noise, of the data and of the velocity, in size.

    Products of these have their limits at noise and at data, where a weight of the data's error may be infinite.
    """
    checks.path(path)
    checks.function("target", target, "targets.velocity")
    if isinstance(path, paths.Joint):
        raise TypeError("A joint path has no one noise level at a time: weight each leaf by the weighting of its own path.")
    checks.on_path(t)
    t = jnp.asarray(t, jnp.promote_types(jnp.result_type(float, t), jnp.float32))
    factors = [targets.coefficients(path, t, source=target, target=to)[1] for to in (targets.noise, targets.data, targets.velocity)]
    return path.alpha(t), path.beta(t), *map(jnp.abs, factors)


def _known(weight, name, path, t):
    """The weight; raises where it is not finite at a time whose value is known."""
    if not isinstance(weight, Tracer) and not np.isfinite(np.asarray(weight)).all():
        at = np.broadcast_to(np.asarray(t), np.shape(weight)).reshape(-1)[np.flatnonzero(~np.isfinite(np.asarray(weight)))[0]]
        raise ValueError(
            f"{name} on {path} is infinite, or has a limit that is not computed, at t = {at:g} for this target: draw times inside, such as "
            "0.001 + 0.998 * times.stratified(key, n), or predict the velocity."
        )
    return weight


def min_snr(path, t, *, target=targets.velocity, gamma=5.0) -> chex.ArrayDevice:
    """min-SNR-gamma: the data's squared error weighted by the signal-to-noise ratio, at most gamma.

    w_t = min(alpha_t^2 / beta_t^2, gamma)        (Hang et al. 2023, arXiv:2303.09556, section 3.4)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
      target: what the network predicts, a function `(path, t) -> (a, b)`, on whose squared error the weight is.
      gamma: the most, above 0.
    Returns:
      Weights, like t, finite from noise to data for the targets of `targets`.
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if gamma is not above 0, or the weight is not finite at a known time.
    """
    checks.number("gamma", gamma, "the largest weight of the data's error", least=0, above=True)
    _, _, noise, data, _ = _errors(path, t, target)
    return _known(jnp.minimum(noise**2, gamma * data**2), "min_snr", path, t)


def edm_weighting(path, t, *, target=targets.velocity, sigma_data=0.5) -> chex.ArrayDevice:
    """EDM's weighting of the data's squared error, under which every time has the same loss before training; of `targets.edm` it is 1.

    w_t = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2,  sigma = beta_t / alpha_t    (Karras et al. 2022, arXiv:2206.00364, table 1)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape; EDM draws them by `times.log_normal`.
      target: what the network predicts, a function `(path, t) -> (a, b)`, on whose squared error the weight is.
      sigma_data: the data's standard deviation, above 0.
    Returns:
      Weights, like t; infinite of the noise and the score where alpha_t = 0, and of the data where beta_t = 0.
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if `sigma_data` is not above 0, or the weight is not finite at a known time.
    """
    checks.number("sigma_data", sigma_data, "the data's standard deviation", least=0, above=True)
    _, _, noise, data, _ = _errors(path, t, target)
    return _known((data / sigma_data) ** 2 + noise**2, "edm_weighting", path, t)


def sigmoid_weighting(path, t, *, target=targets.velocity, bias=0.0) -> chex.ArrayDevice:
    """The sigmoid weighting of SiD2, for uniform t: errors of the noise count up to the noise level that the bias sets.

    w_t = 1/2 lambda'_t sigmoid(bias - lambda_t),  lambda_t = log(alpha_t^2 / beta_t^2)
    (Kingma and Gao 2023, arXiv:2303.00848, section 4; Hoogeboom et al. 2024, arXiv:2410.19324, section 3)

    of the noise's squared error.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape; for another density than the uniform one, divide by it.
      target: what the network predicts, a function `(path, t) -> (a, b)`, on whose squared error the weight is.
      bias: the log signal-to-noise ratio up to which errors of the noise count in full; lower for larger images.
    Returns:
      Weights, like t; infinite of the noise and the score where alpha_t = 0, and of the data where beta_t = 0; nan at an end where the
        path's velocity is infinite, for other targets than the velocity.
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if the weight is not finite at a known time.
    """
    checks.number("bias", bias, "the log signal-to-noise ratio up to which errors count")
    alpha, beta, noise, data, velocity = _errors(path, t, target)
    e_b = jnp.exp(jnp.asarray(bias, jnp.result_type(float)))
    # alpha times the data's factor is beta times the noise's; of the two the one that is finite at the nearer end.
    both = jnp.where(alpha < beta, beta * noise, alpha * data) * velocity
    return _known(e_b * both / (alpha**2 + e_b * beta**2), "sigmoid_weighting", path, t)
