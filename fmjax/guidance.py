"""Guidance: fields of (x, t, y) to fields of (x, t).

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)                  classifier-free                 (1)
    s~(x | y) = s(x) + w grad log p_t(y | x)                      by a classifier                 (2)
    u~(x | y_1, y_2 ..) = u(x | null) + sum_i w_i (u(x | y_i) - u(x | null))     several conditions    (3)

Both (1) and (3) hold for velocities, scores and every other target, since they are affine in each other at a given x. How the
two values of (1) are put together is a function `(guided, unguided, scale) -> value`: `extrapolate` is (1), `cfg_zero_star`,
`apg(...)` and `cfg_rescale(...)` are others, and so is yours. All give the guided value at scale 1.
"""

from collections.abc import Callable
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, paths, states
from fmjax.paths import Field

__all__ = [
    "classifier_free",
    "drop_labels",
    "classifier",
    "autoguidance",
    "compose",
    "interval",
    "extrapolate",
    "cfg_zero_star",
    "apg",
    "cfg_rescale",
    "channels",
]


def _shapes(x):
    """What a state is, for errors."""
    layout = states.layout(x)
    return f"shape {jnp.shape(x)}" if layout is None else f"the shapes {layout}"


def _like(x, value):
    """A value of all leaves side by side, as `_under` gives those of a pytree, like the state."""
    return value if (layout := states.layout(x)) is None else layout.unflatten(value, like=x)


def _check_scale(scale):
    """Raises unless the scale is a number or numbers, finite wherever they are known."""
    checks.real("The guidance scale", scale)
    if not isinstance(scale, Tracer) and not np.all(np.isfinite(scale)):
        raise ValueError(f"The guidance scale is {scale}, but it must be finite: 1 is no guidance, 3 is common.")


def _multiplies(guided, unguided, scale):
    """The scale shaped to multiply two values, which are alike."""
    checks.like("The unguided value", unguided, checks.floats("The guided value", guided))
    checks.floats("The unguided value", unguided)
    _check_scale(scale)
    return checks.multiplier("The guidance scale", scale, guided)


def extrapolate(guided, unguided, scale) -> chex.ArrayDevice:
    """Classifier-free guidance of two values: from the unguided one through the guided one and on.

    (1 - w) u(x | null) + w u(x | y)        (1)

    Args:
      guided: u(x | y), (B, ...), any float dtype.
      unguided: u(x | null), like guided.
      scale: w, as for `classifier_free`.
    Returns:
      A value like guided.
    Raises:
      TypeError: if a value is not of floats.
      ValueError: if the values differ in shape, or the scale is not finite or does not multiply them.
    """
    scale = _multiplies(guided, unguided, scale)
    return (1 - scale) * unguided + scale * guided


def cfg_zero_star(guided, unguided, scale) -> chex.ArrayDevice:
    """CFG-Zero*: (1) with the unguided value scaled to be nearest to the guided one, for velocities.

    (1 - w) s u(x | null) + w u(x | y),   s = <u(x | y), u(x | null)> / |u(x | null)|^2    (Fan et al. 2025, arXiv:2503.18886, eq. 9)

    with one s per example. The paper's zeros in the first steps are `interval(field, lambda x, t: jnp.zeros_like(x), first, 1)`.

    Args:
      guided: u(x | y), (B, ...), any float dtype.
      unguided: u(x | null), like guided.
      scale: w, as for `classifier_free`.
    Returns:
      A value like guided.
    Raises:
      TypeError: if a value is not of floats.
      ValueError: if the values differ in shape, or the scale is not finite or does not multiply them.
    """
    scale = _multiplies(guided, unguided, scale)
    return extrapolate(guided, _projection(guided, unguided) * unguided, scale)


def apg(eta=0.0, norm_threshold=None) -> Callable:
    """APG: (1) with less of the change along the guided value, which oversaturates; without the paper's momentum.

    D(x | y) + (w - 1) (d_o + eta d_p),   d = D(x | y) - D(x | null) = d_o + d_p    (Sadat et al. 2025, arXiv:2410.02416, section 4)

    with d_p the part of d along D(x | y), and d shortened to `norm_threshold` where it is longer. For predicted data D: guide the field
    of data, then `targets.convert_field` it to a velocity.

    Args:
      eta: the factor of the part d_p that is parallel to D(x | y); 1 leaves d as it is.
      norm_threshold: the paper's r, the largest norm of d, above 0; None for no limit.
    Returns:
      A function `(guided, unguided, scale) -> value`, the `combine` of `classifier_free`.
    Raises:
      ValueError: if eta is not finite, or `norm_threshold` not above 0.
    """

    checks.number("eta", eta, "the factor of the parallel component, of which 1 leaves the change as it is")
    if norm_threshold is not None:
        checks.number("norm_threshold", norm_threshold, "the largest norm of the change", least=0, above=True)

    def combine(guided, unguided, scale):
        scale = _multiplies(guided, unguided, scale)
        difference = guided - unguided
        if norm_threshold is not None:
            square = _dot(difference, difference)
            # The root of what is longer alone: the derivative of the root of zero is infinite.
            longer = square > norm_threshold**2
            difference = difference * jnp.where(longer, norm_threshold / jnp.sqrt(jnp.where(longer, square, 1)), 1)
        along = _projection(difference, guided) * guided
        return guided + (scale - 1) * (difference - along + eta * along)

    return combine


def cfg_rescale(phi=0.7) -> Callable:
    """Guidance (1) brought back to the spread of the guided value, in part.

    phi s_y / s_v v + (1 - phi) v,   v = (1 - w) u(x | null) + w u(x | y)    (Lin et al. 2024, arXiv:2305.08891, section 3.4)

    with s_y and s_v the standard deviations of u(x | y) and of v over the coordinates of an example.

    Args:
      phi: how much of it, in [0, 1]; 0 is (1) itself.
    Returns:
      A function `(guided, unguided, scale) -> value`, the `combine` of `classifier_free`.
    Raises:
      ValueError: if phi is not in [0, 1].
    """

    checks.number("phi", phi, "the share of the rescaled value", least=0, most=1)

    def combine(guided, unguided, scale):
        value = extrapolate(guided, unguided, scale)
        before, after = (jnp.var(each, tuple(range(1, value.ndim)), keepdims=True) for each in (guided, value))
        # The root of what is spread alone: the derivative of the root of zero is infinite.
        spread = (before > 0) & (after > 0)
        ratio = jnp.sqrt(jnp.where(spread, before / jnp.where(spread, after, 1), 1))
        return value * (phi * jnp.where((after > 0) & ~spread, 0, ratio) + 1 - phi)

    return combine


def channels(count, combine=extrapolate) -> Callable:
    """Guidance of the first channels alone; the others keep their guided value. DiT's and SiT's samplers guide three of four latents.

    u~_c = combine(u(x | y), u(x | null), w)_c for c < count,   u~_c = u(x | y)_c for c >= count
    (Peebles and Xie 2023, arXiv:2212.09748, in its code)

    Args:
      count: how many, of the last axis.
      combine: how these are put together, `(guided, unguided, scale) -> value`.
    Returns:
      A function `(guided, unguided, scale) -> value`, the `combine` of `classifier_free`.
    Raises:
      ValueError: if count is not a whole number of at least 1, or a value has fewer channels.
    """
    checks.whole("count", count, "how many channels are guided")
    checks.function("combine", combine, "guidance.extrapolate")

    def first(guided, unguided, scale):
        if guided.shape[-1] < count:
            raise ValueError(f"count is {count}, but the value has shape {guided.shape}: it has {guided.shape[-1]} channels.")
        scale = cast("Any", checks.multiplier("scale", scale, guided))
        scale = scale[..., :count] if jnp.ndim(scale) == guided.ndim and scale.shape[-1] > 1 else scale
        value = combine(guided[..., :count], unguided[..., :count], scale)
        return jnp.concatenate([value, guided[..., count:]], axis=-1)

    return first


def _dot(a, b):
    """Of each example, (B, 1, ..., 1)."""
    checks.batch("The guided value", a)
    # Half precision has no numbers for the squares of a large image.
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return (a.astype(dtype) * b.astype(dtype)).sum(tuple(range(1, a.ndim)), keepdims=True)


def _projection(a, b):
    """The multiple of b that is nearest to a, of each example; 0 where b is."""
    square = _dot(b, b)
    return jnp.where(square > 0, _dot(a, b) / jnp.where(square > 0, square, 1), 0)


def _under(field_y, conditions):
    """(x, t) -> the values under several conditions, each of one per example, in one batched call."""
    checks.function("field_y", field_y, "lambda x, t, y: model.apply(params, x, t, y)")
    count = len(conditions)
    # Joined here, not in a sampler's loop, where a network could not see the values of labels and say which is wrong.
    many_y = jax.tree.map(lambda *each: jnp.concatenate(each), *conditions) if count > 1 else conditions[0]

    def values(x, t):
        examples = states.example_shape(x)
        for leaf in jax.tree.leaves(conditions):
            if leaf.shape[:1] != examples:
                raise ValueError(
                    f"y has shape {leaf.shape}, but it must hold one condition per example for x of {_shapes(x)}, {examples} or more."
                )
        many_x = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * count), x) if count > 1 else x
        many_t = jnp.concatenate([t] * count) if count > 1 and jnp.ndim(t) else t
        value = field_y(many_x, many_t, many_y)
        if (layout := states.layout(many_x)) is None:
            checks.like("The field's output", value, many_x)
        else:
            value = layout.flatten("The field's output", value)
        return jnp.split(value, count) if count > 1 else [value]

    return values


def _conditions(y):
    """Conditions as arrays, one or a pytree of them, each of one condition per example."""
    y = jax.tree.map(jnp.asarray, y) if states.layout(y) is not None else jnp.asarray(y)
    for leaf in jax.tree.leaves(y):
        if not leaf.ndim:
            raise ValueError(
                "y has shape (), but it must hold one condition per example, (B,) or (B, ...): jnp.full((B,), label) for one label."
            )
    return y


def _nulls(null, y):
    """The null as conditions like y."""
    if (layout := states.layout(y)) is not None:
        if jax.tree.structure(null) != layout.structure:
            raise ValueError(f"null is {null!r}, but y is the pytree {layout}: give a null for each of its leaves.")
        return jax.tree.map(_nulls, null, y)
    return checks.null(null, y)


def classifier_free(field_y, y, null, scale, *, combine=extrapolate) -> Field:
    """Classifier-free guidance, in one batched call of the network.

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)        (1) (MIT 6.S184, "Classifier-Free Guidance")

    Args:
      field_y: (x, t, y) -> like x, the network.
      y: conditions, (B,) labels or (B, ...) of any kind, or a pytree of such arrays.
      null: the condition that stands for none, a label or an array like one example's y; or like y, one per example; of a pytree one for
        each leaf. NaN stands for none in the modules of `models.conditions` for real numbers. What is not wanted, a negative
        condition, takes its place.
      scale: w, a number, one per example, (B,), or an array that multiplies x. 1 is no guidance and costs one evaluation.
      combine: how the values are put together, `(guided, unguided, scale) -> value`; `extrapolate` is (1).
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if the scale is not finite or has axes other than x's, or y has not one condition per example.
    """
    _check_scale(scale)
    checks.function("combine", combine, "guidance.cfg_zero_star")
    y = _conditions(y)
    plain = not isinstance(scale, Tracer) and np.ndim(scale) == 0 and scale == 1
    values = _under(field_y, [y] if plain else [_nulls(null, y), y])

    def field(x, t):
        *unguided, guided = values(x, t)
        value = guided if plain else combine(guided, *unguided, checks.multiplier("The guidance scale", scale, guided))
        return _like(x, value)

    return field


def compose(field_y, ys, null, scales) -> Field:
    """Several conditions, one weight per condition, in one batched call of the network.

    u~ = u(x | null) + sum_i w_i (u(x | y_i) - u(x | null))        (3) (Liu et al. 2022, arXiv:2206.01714, eq. 11)

    Args:
      field_y: (x, t, y) -> like x, the network.
      ys: conditions, each (B,) labels or (B, ...) of any kind.
      null: the condition that stands for none, a label or an array like one example's y.
      scales: w_i, a number for each condition, or an array that multiplies x; below 0 turns away from a condition.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if there is not one scale per condition, a scale is not finite or has axes other than x's, or a y has not one
        condition per example.
    """
    ys = [_conditions(y) for y in ys]
    if len(ys) != len(scales) or not ys:
        raise ValueError(f"There are {len(ys)} conditions and {len(scales)} scales, but each condition has one scale.")
    for scale in scales:
        _check_scale(scale)
    values = _under(field_y, [_nulls(null, ys[0]), *ys])

    def field(x, t):
        unguided, *guided = values(x, t)
        multipliers = [checks.multiplier("The guidance scale", scale, unguided) for scale in scales]
        return _like(x, unguided + sum(scale * (value - unguided) for scale, value in zip(multipliers, guided, strict=True)))

    return field


def autoguidance(field, weak_field, scale, *, combine=extrapolate) -> Field:
    """Guidance by a weaker version v of the same network u.

    u~(x) = (1 - w) v(x) + w u(x)        (1) (Karras et al. 2024, arXiv:2406.02507, eq. 3)

    Args:
      field: u, (x, t) -> like x.
      weak_field: v, likewise, smaller or trained less, and of the same target.
      scale: w; 1 is no guidance and evaluates `field` alone.
      combine: how the values are put together, `(guided, unguided, scale) -> value`.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      TypeError: if a field is no function.
      ValueError: if the scale is not finite or has axes other than x's.
    """
    checks.function("field", field, checks.FIELD)
    checks.function("weak_field", weak_field, checks.FIELD)
    _check_scale(scale)
    checks.function("combine", combine, "guidance.cfg_zero_star")
    if not isinstance(scale, Tracer) and np.ndim(scale) == 0 and scale == 1:
        return field

    def guided(x, t, field, weak_field):
        value, weak = field(x, t), weak_field(x, t)
        checks.like("The field's output", value, x)
        checks.like("The weak field's output", weak, x)
        return combine(value, weak, checks.multiplier("The guidance scale", scale, x))

    return paths.on_states(guided, field, weak_field)


def interval(guided, otherwise, start, end) -> Field:
    """One field while t is in [start, end], another outside; only one of them is evaluated    (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    Args:
      guided: (x, t) -> like x, inside.
      otherwise: likewise, outside; the network under its condition costs half of its guidance.
      start: the first time inside.
      end: the last.
    Returns:
      A field, (x, t) -> like x, for one t at a time, as samplers have it.
    Raises:
      TypeError: if a field is no function.
      ValueError: if the interval is empty; of the field, if t is one time per example.
    """
    checks.function("guided", guided, checks.FIELD)
    checks.function("otherwise", otherwise, checks.FIELD)
    checks.number("start", start, "a time")
    checks.number("end", end, "a time")
    if not isinstance(start, Tracer) and not isinstance(end, Tracer) and not start <= end:
        raise ValueError(f"The interval from {start} to {end} is empty.")

    def field(x, t, guided, otherwise):
        if jnp.ndim(t):
            raise ValueError(f"t has shape {jnp.shape(t)}, but guidance in an interval takes one time for the whole batch.")
        inside, outside = checks.like_state(guided, "The guided field's output"), checks.like_state(otherwise, "The other field's output")
        return lax.cond((start <= t) & (t <= end), inside, outside, x, t)

    return paths.on_states(field, guided, otherwise)


def classifier(field, log_probability, scale) -> Field:
    """Guidance by the gradient of a classifier.

    f(x, t) + w_t grad_x log p_t(y | x)        (2) (MIT 6.S184, "Classifier-Free Guidance")

    For a score field w_t is the scale w itself. For a velocity field it is w b_t with the course's b_t,
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
    checks.function("field", field, checks.FIELD)
    checks.function("log_probability", log_probability, "lambda x, t: nn.log_softmax(model.apply(params, x, t))[jnp.arange(len(y)), y]")
    if not callable(scale):
        _check_scale(scale)

    def total(x, t, log_probability):
        value = log_probability(x, t)
        if jnp.shape(value) != x.shape[:1]:
            raise ValueError(
                f"log_probability gives shape {jnp.shape(value)}, but it is one number per example, {x.shape[:1]}: of the class wanted of "
                "it, as log_probabilities[jnp.arange(len(y)), y]."
            )
        return value.sum()

    def guided(x, t, field, log_probability):
        weight = scale(paths.lift(t, x)) if callable(scale) else scale
        if callable(scale) and not isinstance(t, Tracer):
            checks.weight(scale, t)
        value = field(x, t)
        checks.like("The field's output", value, x)
        return value + checks.multiplier("The guidance scale", weight, x) * jax.grad(total)(x, t, log_probability)

    return paths.on_states(guided, field, others=(log_probability,))


def drop_labels(key, y, null, rate) -> chex.ArrayDevice:
    """Replaces conditions by the null, each example on its own    (MIT 6.S184, "replace y = null with prob. eta").

    Args:
      key: a typed key.
      y: conditions, (B,) labels or (B, ...) of any kind, or a pytree of such arrays, which are dropped together.
      null: the condition that stands for none, a label or an array like one example's y; of a pytree one for each leaf.
      rate: the course's eta, the probability of the null, in [0, 1].
    Returns:
      Conditions, like y.
    Raises:
      ValueError: if the rate is not a probability.
    """
    checks.key(key)
    checks.number("rate", rate, "the probability of the null", least=0, most=1)
    y = _conditions(y)
    examples = states.example_shape(y)
    drop = jax.random.bernoulli(key, rate, examples)

    def dropped(none, y):
        if y.shape[:1] != examples:
            raise ValueError(f"y has leaves of {examples[0]} and of {y.shape[0]} conditions, but each is of one per example.")
        return jnp.where(drop.reshape(-1, *(1,) * (y.ndim - 1)), none, y)

    return jax.tree.map(dropped, _nulls(null, y), y)
