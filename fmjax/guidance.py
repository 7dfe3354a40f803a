"""Guidance: fields of (x, t, y) to fields of (x, t).

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)                  classifier-free                 (1)
    s~(x | y) = s(x) + w grad log p_t(y | x)                      by a classifier                 (2)
    u~(x | y_1, y_2 ..) = u(x | null) + sum_i w_i (u(x | y_i) - u(x | null))     several conditions    (3)

(1) and (3) hold for velocities, scores and every other target alike, since they are affine in each other at a given x. How the
two values of (1) are put together is a function `(guided, unguided, scale) -> value`: `extrapolate` is (1), `zero_star`,
`projected(...)` and `rescaled(...)` are others, and so is yours. All give the guided value at scale 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, paths, targets


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


def extrapolate(guided, unguided, scale):
    """(1): from the unguided value through the guided one and on; scale as in `classifier_free`."""
    scale = _multiplies(guided, unguided, scale)
    return (1 - scale) * unguided + scale * guided


def zero_star(guided, unguided, scale):
    """CFG-Zero*: (1) with the unguided value scaled to be nearest to the guided one    (Fan et al. 2025, eq. 9).

    (1 - w) s u(x | null) + w u(x | y),   s = <u(x | y), u(x | null)> / |u(x | null)|^2 of each example

    The paper's zeros in the first steps are `interval(field, lambda x, t: jnp.zeros_like(x), first, 1)`. For velocities.
    """
    scale = _multiplies(guided, unguided, scale)
    return extrapolate(guided, _share(guided, unguided) * unguided, scale)


def projected(parallel=0.0, largest=None):
    """APG: (1) with less of the change along the guided value, which oversaturates    (Sadat et al. 2025, section 4, without momentum).

    D + (w - 1) (d_orthogonal + eta d_parallel),   d = D(x | y) - D(x | null), shortened to `largest` where it is longer

    For predicted data D: guide the field of data, then `targets.convert_field` it to a velocity.

    Args:
      parallel: the paper's eta; 1 leaves d as it is.
      largest: the paper's r, the norm of d at most; None for any.
    Returns:
      A way to put two values together, for `classifier_free`.
    """

    checks.number("parallel", parallel, "a share, of which 1 leaves the change as it is")
    if largest is not None:
        checks.number("largest", largest, "the norm of the change at most", least=0, above=True)

    def combine(guided, unguided, scale):
        scale = _multiplies(guided, unguided, scale)
        difference = guided - unguided
        if largest is not None:
            square = _dot(difference, difference)
            # The root of what is longer alone: the derivative of the root of zero is infinite.
            longer = square > largest**2
            difference = difference * jnp.where(longer, largest / jnp.sqrt(jnp.where(longer, square, 1)), 1)
        along = _share(difference, guided) * guided
        return guided + (scale - 1) * (difference - along + parallel * along)

    return combine


def rescaled(share=0.7):
    """(1) brought back to the spread of the guided value, in part    (Lin et al. 2024, section 3.4).

    Args:
      share: the paper's phi, in [0, 1]; 0 is (1) itself.
    Returns:
      A way to put two values together, for `classifier_free`.
    """

    checks.number("share", share, "how much is brought back", least=0, most=1)

    def combine(guided, unguided, scale):
        value = extrapolate(guided, unguided, scale)
        before, after = (jnp.var(each, tuple(range(1, value.ndim)), keepdims=True) for each in (guided, value))
        # The root of what is spread alone: the derivative of the root of zero is infinite.
        spread = (before > 0) & (after > 0)
        ratio = jnp.sqrt(jnp.where(spread, before / jnp.where(spread, after, 1), 1))
        return value * (share * jnp.where((after > 0) & ~spread, 0, ratio) + 1 - share)

    return combine


def _dot(a, b):
    """Of each example, (B, 1, ..., 1)."""
    checks.batch("The guided value", a)
    # Half precision has no numbers for the squares of a large image.
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return (a.astype(wide) * b.astype(wide)).sum(tuple(range(1, a.ndim)), keepdims=True)


def _share(a, b):
    """The multiple of b that is nearest to a, of each example; 0 where b is."""
    square = _dot(b, b)
    return jnp.where(square > 0, _dot(a, b) / jnp.where(square > 0, square, 1), 0)


def _under(field_y, conditions):
    """(x, t) -> the values under several conditions, each one an example, in one batched call."""
    checks.function("field_y", field_y, "lambda x, t, y: model.apply(params, x, t, y)")
    for y in conditions:
        if not y.ndim:
            raise ValueError("y has shape (), but it holds one condition per example, (B, ...): for one for all give jnp.full((B,), y).")
    # Joined here, not in a sampler's loop, where a network could not see the values of labels and say which is wrong.
    many_y = jnp.concatenate(conditions) if len(conditions) > 1 else conditions[0]

    def values(x, t):
        for y in conditions:
            if y.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"y has shape {y.shape}, but it must hold one condition per example for x of shape {x.shape}, {x.shape[:1]} or more."
                )
        count = len(conditions)
        many_x = jnp.concatenate([x] * count) if count > 1 else x
        many_t = jnp.concatenate([t] * count) if count > 1 and jnp.ndim(t) else t
        value = field_y(many_x, many_t, many_y)
        checks.like("The field's output", value, many_x)
        return jnp.split(value, count) if count > 1 else [value]

    return values


def _nulls(null, y):
    """The null as conditions like y."""
    return jnp.broadcast_to(_null_like(null, y), y.shape)


def _null_like(null, y):
    """The null in y's dtype, which must hold it: cast, 256 is class 0 in uint8, and 0.7 in any integer."""
    given = jnp.asarray(null) if isinstance(null, Tracer) else np.asarray(null)
    real = given.dtype == bool or jnp.issubdtype(given.dtype, jnp.integer) or jnp.issubdtype(given.dtype, jnp.floating)
    if not real or (given.dtype == bool) != (y.dtype == bool):
        raise TypeError(
            f"null is {null!r}, but y has dtype {y.dtype}: it is the condition that stands for none, a label such as the number of "
            "classes, or an array like one example's y."
        )
    if given.shape not in ((), y.shape[1:], y.shape):
        raise ValueError(f"null has shape {given.shape}, but it is one condition, {y.shape[1:]}, or one per example, {y.shape}.")
    if jnp.issubdtype(y.dtype, jnp.integer):
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(f"null is {null!r}, but y has dtype {y.dtype}: a label for no class is a whole number too.")
        if not isinstance(given, Tracer):
            held = jnp.iinfo(y.dtype)
            if given.size and (given.min() < held.min or given.max() > held.max):
                raise ValueError(f"null is {null}, but y has dtype {y.dtype}, which cannot hold it: give y.astype(jnp.int32).")
    if not isinstance(given, Tracer) and not np.isfinite(np.asarray(given.astype(y.dtype), np.float64)).all():
        raise ValueError(f"null is {null}, which is not finite in y's dtype, {y.dtype}: give a condition that the network was trained on.")
    return jnp.asarray(given, y.dtype)


def classifier_free(field_y, y, null, scale, *, combine=extrapolate):
    """Classifier-free guidance, in one batched call of the network.

    u~(x | y) = (1 - w) u(x | null) + w u(x | y)        (1) (notes 002 and 004, "Classifier-Free Guidance")

    Args:
      field_y: (x, t, y) -> like x, the network.
      y: conditions, (B,) labels or (B, ...) of any kind.
      null: the condition that stands for none, a label or an array like one example's y; or like y, one an example. What is
        not wanted, a negative condition, takes its place.
      scale: w, a number, one per example, (B,), or an array that multiplies x. 1 is no guidance and costs one evaluation.
      combine: how the values are put together, `(guided, unguided, scale) -> value`; `extrapolate` is (1).
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if the scale is not finite or has axes other than x's, or y has not one condition an example.
    """
    _check_scale(scale)
    checks.function("combine", combine, "guidance.zero_star")
    y = jnp.asarray(y)
    plain = not isinstance(scale, Tracer) and np.ndim(scale) == 0 and scale == 1
    values = _under(field_y, [y] if plain else [_nulls(null, y), y])

    def field(x, t):
        *unguided, guided = values(x, t)
        return guided if plain else combine(guided, *unguided, checks.multiplier("The guidance scale", scale, x))

    return field


def weighted(field_y, ys, null, scales):
    """Several conditions with a weight each, in one batched call of the network.

    u~ = u(x | null) + sum_i w_i (u(x | y_i) - u(x | null))        (3) (Liu et al. 2022, eq. 11)

    Args:
      field_y: (x, t, y) -> like x, the network.
      ys: conditions, each (B,) labels or (B, ...) of any kind.
      null: the condition that stands for none, a label or an array like one example's y.
      scales: w_i, a number each, or an array that multiplies x; below 0 turns away from a condition.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if there is not one scale a condition, a scale is not finite or has axes other than x's, or a y has not one
        condition an example.
    """
    ys = [jnp.asarray(y) for y in ys]
    if len(ys) != len(scales) or not ys:
        raise ValueError(f"There are {len(ys)} conditions and {len(scales)} scales, but each condition has one scale.")
    for scale in scales:
        _check_scale(scale)
    values = _under(field_y, [_nulls(null, ys[0]), *ys])

    def field(x, t):
        unguided, *guided = values(x, t)
        multipliers = [checks.multiplier("The guidance scale", scale, x) for scale in scales]
        return unguided + sum(scale * (value - unguided) for scale, value in zip(multipliers, guided, strict=True))

    return field


def autoguidance(field, weak_field, scale, *, combine=extrapolate):
    """Guidance by a weaker version of the same network    (Karras et al. 2024, eq. 3): (1) with it in the null's place.

    Args:
      field: (x, t) -> like x.
      weak_field: likewise, smaller or trained less, and of the same target.
      scale: w; 1 is no guidance and evaluates `field` alone.
      combine: how the values are put together, `(guided, unguided, scale) -> value`.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      ValueError: if the scale is not finite or has axes other than x's.
    """
    checks.function("field", field, checks.FIELD)
    checks.function("weak_field", weak_field, checks.FIELD)
    _check_scale(scale)
    checks.function("combine", combine, "guidance.zero_star")
    if not isinstance(scale, Tracer) and np.ndim(scale) == 0 and scale == 1:
        return field

    def guided(x, t):
        value, weak = field(x, t), weak_field(x, t)
        checks.like("The field's output", value, x)
        checks.like("The weak field's output", weak, x)
        return combine(value, weak, checks.multiplier("The guidance scale", scale, x))

    return guided


def interval(guided, otherwise, start, end):
    """One field while t is in [start, end], another outside; only one of them is evaluated    (Kynkäänniemi et al. 2024).

    Args:
      guided: (x, t) -> like x, inside.
      otherwise: likewise, outside; the network under its condition costs half of its guidance.
      start: the first time inside.
      end: the last.
    Returns:
      A field, (x, t) -> like x, for one t at a time, as samplers have it.
    Raises:
      ValueError: if the interval is empty, or t has a time an example.
    """
    checks.function("guided", guided, checks.FIELD)
    checks.function("otherwise", otherwise, checks.FIELD)
    checks.number("start", start, "a time")
    checks.number("end", end, "a time")
    if not isinstance(start, Tracer) and not isinstance(end, Tracer) and not start <= end:
        raise ValueError(f"The interval from {start} to {end} is empty.")

    def field(x, t):
        if jnp.ndim(t):
            raise ValueError(f"t has shape {jnp.shape(t)}, but guidance in an interval takes one time for the whole batch.")
        inside, outside = checks.like_state(guided, "The guided field's output"), checks.like_state(otherwise, "The other field's output")
        return lax.cond((start <= t) & (t <= end), inside, outside, x, t)

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
    checks.function("field", field, checks.FIELD)
    checks.function("log_probability", log_probability, "lambda x, t: nn.log_softmax(model.apply(params, x, t))[jnp.arange(len(y)), y]")
    if not callable(scale):
        _check_scale(scale)

    def total(x, t):
        value = log_probability(x, t)
        if jnp.shape(value) != x.shape[:1]:
            raise ValueError(
                f"log_probability gives shape {jnp.shape(value)}, but it is one number per example, {x.shape[:1]}: of the class wanted of "
                "it, as log_probabilities[jnp.arange(len(y)), y]."
            )
        return value.sum()

    def guided(x, t):
        weight = scale(paths.lift(t, x)) if callable(scale) else scale
        if callable(scale) and not isinstance(t, Tracer):
            _check_weight(scale, t)
        value = field(x, t)
        checks.like("The field's output", value, x)
        return value + checks.multiplier("The guidance scale", weight, x) * jax.grad(total)(x, t)

    return guided


def _check_weight(weight, t):
    """Raises where a weight in time is infinite at a time whose value is known."""
    with jax.ensure_compile_time_eval():
        value = weight(np.asarray(t, np.float32))
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"The guidance's weight is infinite at t = {np.asarray(t)}, where it meets a gradient of 0: let the grid start later, as "
            "times.grid(n, start=1e-3) does, or guide in `interval`."
        )


def _check_spread(spread, t):
    """Raises where what was measured without noise leaves no room for a correction, which is infinite there."""
    with jax.ensure_compile_time_eval():
        value = spread(np.asarray(t, np.float32))
    if not isinstance(value, Tracer) and not (np.asarray(value) > 0).all():
        raise ValueError(
            f"The spread r_t is {np.asarray(value)} at t = {np.asarray(t)}, where the correction is infinite: evaluate nothing there, as "
            "solvers.heun(path), sampling.midpoint and last=sampling.euler do, or say how much noise the measurement has."
        )


def linear_inverse(path, field, operator, y, *, noise=0.0, spread=None, iterations=10):
    """Samples of data x_1 given y = A x_1 + noise, from a field that knows the data alone: inpainting, super-resolution.

    u~ = u + b_t (dD/dx)^T A^T (r_t^2 A A^T + noise^2 I)^-1 (y - A D),   D = E[x_1 | x_t = x]
    (Song et al. 2023, eq. 8; Pokle et al. 2023 for flows), which is (2) with p(x_1 | x_t) taken as N(D, r_t^2 I)

    It is exact where the data are N(0, I) and a good guide elsewhere.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      field: (x, t) -> u_t(x), like x, in which no example depends on another.
      operator: A, of one example, a linear function of an array like x[0]: `lambda x: x * mask`, `lambda x: x[::2, ::2]`.
      y: what was measured of each example, (B, ...); what A cannot give, such as finite numbers behind a mask, does not matter.
      noise: its standard deviation.
      spread: r_t, a function of t; None for beta_t / sqrt(alpha_t^2 + beta_t^2), right for data N(0, I).
      iterations: of conjugate gradients for the inverse, one where A A^T has one eigenvalue beside 0.
    Returns:
      A velocity field, (x, t) -> like x, for 0 < alpha_t and 0 < beta_t: of one evaluation of `field` and its derivative.
    Raises:
      ValueError: if A of an example and y have other shapes, y is not finite, A of 0 is not 0, or a number is out of its range.
    """
    checks.path(path)
    checks.function("field", field, checks.FIELD)
    y = checks.floats("y", y)
    checks.whole("iterations", iterations, "how many iterations of conjugate gradients there are")
    checks.number("noise", noise, "a standard deviation", least=0)
    if not isinstance(y, Tracer) and not np.isfinite(np.asarray(y)).all():
        raise ValueError("y has numbers that are not finite: put 0 where the operator cannot give anything, as behind a mask.")
    checks.function("operator", operator, "lambda x: x * mask")
    if spread is not None:
        checks.function("spread", spread, f"lambda t: {spread!r}")

    def default(t):
        return path.beta(t) / jnp.sqrt(path.alpha(t) ** 2 + path.beta(t) ** 2)

    def b(t):
        return targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1]

    def guided(x, t):
        if not isinstance(t, Tracer):
            _check_weight(b, t)
            if not isinstance(noise, Tracer) and noise == 0:
                _check_spread(default if spread is None else spread, t)

        def data_and_velocity(x):
            u = field(x, t)
            return targets.convert(path, u, x, t, source=targets.velocity, target=targets.data), u

        expected, pull_back, u = jax.vjp(data_and_velocity, x, has_aux=True)
        measured = jax.vmap(operator)(expected)
        if measured.shape != jnp.shape(y):
            raise ValueError(f"y has shape {jnp.shape(y)}, but the operator gives {measured.shape} for x of shape {x.shape}.")
        try:
            with jax.ensure_compile_time_eval():
                of_zero = operator(jnp.zeros(x.shape[1:], expected.dtype))
        except jax.errors.JAXTypeError:  # It has numbers that are not known.
            of_zero = 0
        if not isinstance(of_zero, Tracer) and np.any(np.asarray(of_zero)):
            raise ValueError("The operator of 0 is not 0, but it is linear: take what it adds from y, and leave it out.")
        transpose = jax.linear_transpose(operator, expected[0])
        variance = jnp.broadcast_to((default if spread is None else spread)(t) ** 2, x.shape[:1])

        conjugate_gradients = functools.partial(jax.scipy.sparse.linalg.cg, tol=float(jnp.finfo(measured.dtype).eps), maxiter=iterations)

        def pull(variance, y, measured):
            if not isinstance(noise, Tracer) and noise == 0:
                # What A cannot give, such as numbers behind a mask, would leave the system without a solution.
                y = operator(conjugate_gradients(lambda v: transpose(operator(v))[0], transpose(y)[0])[0])
            residual = y - measured
            # The system depends on what it is solved for, since JAX has no second derivative of a solution where one of them is constant.
            variance = variance + 0 * residual.sum()
            return transpose(conjugate_gradients(lambda v: variance * operator(transpose(v)[0]) + noise**2 * v, residual)[0])[0]

        known = jnp.asarray(y, measured.dtype)
        pulled = jax.vmap(pull)(variance, known, measured)
        # Conjugate gradients answer 0 where they are asked of NaN, which would be a sample without a measurement.
        finite = jnp.isfinite(known).reshape(len(x), -1).all(1)
        pulled = jnp.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), pulled, jnp.nan)
        return u + b(paths.lift(t, x)) * pull_back(pulled)[0]

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
    checks.key(key)
    checks.number("rate", rate, "the probability of the null", least=0, most=1)
    y = jnp.asarray(y)
    if not y.ndim:
        raise ValueError(
            "y has shape (), but it must hold one condition per example, (B,) or (B, ...): jnp.full((B,), label) for one label."
        )
    drop = jax.random.bernoulli(key, rate, y.shape[:1])
    return jnp.where(drop.reshape(-1, *(1,) * (y.ndim - 1)), _nulls(null, y), y)
