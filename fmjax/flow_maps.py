"""Flow maps: where the flow carries a state from one time to another, and the objectives that learn it for samples in few steps.

X_{s,t}(x) is the state at t of what was x at s. It is any function `(x, s, t) -> like x`; a network gives its mean velocity m,

    X_{s,t}(x) = x + (t - s) m(x, s, t),   m(x, t, t) = u_t(x)                                    (1)

with u the velocity. Of all functions m the flow map's alone has each of these (Boffi et al. 2024, arXiv:2406.07507):

    X_{r,t}(X_{s,r}(x)) = X_{s,t}(x)                                     semigroup                (2)
    d/dt X_{s,t}(x) = u_t(X_{s,t}(x))                                    Lagrangian               (3)
    d/ds X_{s,t}(x) + (dX_{s,t}/dx) u_s(x) = 0                           Eulerian                 (4)
    m(x, s, t) = u_s(x) + (t - s) (d/ds m + (dm/dx) u_s)(x, s, t)        the same                 (5)

An objective is the squared error of one of them, one number per example; the caller draws s, t and x_0, and takes the mean:

    mean_flow           (5), u_s from a pair of noise and data      MeanFlow, and its improved form by `tangent`
    eulerian            (5), u_s of a trained field                 distillation
    lagrangian          (3), u_t of a trained field                 distillation, or of itself
    self_consistency    (2)                                         shortcut models; progressive distillation by `teacher`
    consistency         (4), with a finite difference               consistency training and distillation

`losses.flow_matching(flow_maps.velocity(m), ...)` is what all become at s = t. A gradient goes through the prediction alone: what it is
compared with is held. All but `consistency` have their minimum at the exact map, and it in the limit of small differences.
"""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, losses, paths, sampling, states, targets, times

__all__ = [
    "flow_map",
    "mean_velocity",
    "velocity",
    "from_velocity",
    "convert",
    "mean_flow",
    "eulerian",
    "lagrangian",
    "self_consistency",
    "consistency",
    "adaptive",
    "guided_target",
    "draw_interval",
]

FlowMap = Callable[[Any, Any, Any], Any]
"""(x, s, t) -> like x."""
NETWORK = "lambda x, s, t: model.apply(params, x, s, end=t)"
"""What a mean velocity may be."""


_MAPS: weakref.WeakSet = weakref.WeakSet()
"""The flow maps that were made here, which are no mean velocities though they look like them."""


def _known(flow_map) -> FlowMap:
    _MAPS.add(flow_map)
    return flow_map


def _checked(name, function, example=NETWORK) -> Callable:
    """A function of a state, and then of times, whose output is like the state."""
    checks.function(name, function, example)
    if example is NETWORK and isinstance(function, types.FunctionType) and function in _MAPS:
        raise TypeError(
            f"{name} is a flow map, but a mean velocity is taken: give flow_maps.mean_velocity(flow_map), or the network itself."
        )

    def like_x(x, *times):
        value, said, layout = function(x, *times), f"The output of {name}", states.layout(x)
        if layout is None:
            checks.like(said, value, x)
        else:
            checks.like(said, layout.flatten(said, value), layout.flatten("x", x))
        return value

    return like_x


def _as_float(time) -> chex.ArrayDevice:
    """A time as a float of 32 bits at least; what is known stays so inside `jax.jit`, for the checks of fields where paths end."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(time, jnp.promote_types(jnp.result_type(float, time), jnp.float32))


def _move(x, dt, velocity) -> Any:
    """x + dt velocity, of one array or a pytree, with a dt for all or one per example."""

    def moved(a, u):
        a = jnp.asarray(a)
        return (a + paths.lift(dt, a) * u).astype(a.dtype)

    return jax.tree.map(moved, x, velocity)


def flow_map(mean_velocity) -> FlowMap:
    """The flow map of a mean velocity.

    X_{s,t}(x) = x + (t - s) m(x, s, t)        (1)

    Args:
      mean_velocity: m, (x, s, t) -> like x, a network.
    Returns:
      (x, s, t) -> like x.
    Raises:
      TypeError: if it is no function.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    return _known(lambda x, s, t: _move(x, _as_float(t) - _as_float(s), mean_velocity(x, s, t)))


def mean_velocity(flow_map) -> FlowMap:
    """The mean velocity of a flow map; over an empty interval its velocity, by a derivative.

    m(x, s, t) = (X_{s,t}(x) - x) / (t - s)        (1)

    Args:
      flow_map: (x, s, t) -> like x.
    Returns:
      (x, s, t) -> like x.
    Raises:
      TypeError: if it is no function.
    """
    flow_map = _checked("flow_map", flow_map, checks.MAP)

    def mean(x, s, t):
        s, t = _as_float(s), _as_float(t)
        like = jax.tree.map(lambda leaf: checks.floats("x", leaf), x)
        # In half precision the two ends of a short interval are one.
        x = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), like)
        end = flow_map(x, s, t)
        # Where no interval is empty there is no derivative, which may be infinite at the end of a path.
        known = not isinstance(s, Tracer) and not isinstance(t, Tracer) and not (np.asarray(s) == np.asarray(t)).any()
        slope = x if known else jax.jvp(lambda t: flow_map(x, s, t), (s + 0 * t,), (jnp.ones_like(s + 0 * t),))[1]

        def of(leaf, start, end, slope):
            dt = paths.lift(t - s, start)
            return jnp.where(dt != 0, (end - start) / jnp.where(dt != 0, dt, 1), slope).astype(leaf.dtype)

        return jax.tree.map(of, like, x, end, slope)

    return mean


def velocity(mean_velocity) -> paths.Field:
    """The velocity, which is the mean over an empty interval: a field, for every sampler, guidance and likelihood.

    u_t(x) = m(x, t, t)        (1)

    Args:
      mean_velocity: m, (x, s, t) -> like x.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      TypeError: if it is no function.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    return lambda x, t: mean_velocity(x, t, t)


def from_velocity(field, steps=1, *, step=sampling.heun) -> FlowMap:
    """The flow map of a velocity by so many steps of a solver: of a teacher, and for comparison.

    dX/da = (t - s) u_r(X),   r = s + a (t - s),   0 <= a <= 1

    Args:
      field: (x, t) -> u_t(x), like x.
      steps: how many steps; one of `sampling.euler` is what progressive distillation begins with.
      step: one step, `(field, x, t, dt) -> x`, as for `sampling.sample_ode`.
    Returns:
      (x, s, t) -> like x; s and t are () or (B,), in either order.
    Raises:
      TypeError: if the field is no function, or the step one that knows a path, whose times are not those of each interval.
      ValueError: if steps is not a whole number of at least 1.
    """
    checks.function("field", field, checks.FIELD)
    checks.whole("steps", steps, "how many steps there are")
    if getattr(step, "path", None) is not None:
        raise TypeError(f"step is {step!r}, which knows the times of a path, but intervals here have their own: take sampling.heun.")

    def mapped(x, s, t):
        s, t = _as_float(s), _as_float(t)

        def scaled(x, a):
            with jax.ensure_compile_time_eval():
                dt, r = t - s, s + a * (t - s)
            return jax.tree.map(lambda u: (paths.lift(dt, u) * u).astype(u.dtype), field(x, r))

        return sampling.sample_ode(scaled, x, times.uniform_grid(steps), step=step)[0]

    return _known(mapped)


def convert(path, network, *, source) -> FlowMap:
    """The mean velocity from a network that predicts something else at (x, s, t), such as data that a straight line would lead to.

    m(x, s, t) = a_s x + b_s f(x, s, t)    (Lu et al. 2026, arXiv:2601.22158, for data)

    with a, b of `targets.convert` at s: at t = s it is the velocity from the prediction of `source`.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      network: (x, s, t) -> like x.
      source: what it predicts where t = s, a target, such as `targets.data`.
    Returns:
      A mean velocity, (x, s, t) -> like x.
    Raises:
      TypeError: if `path` is no path, or the network is no function.
    """
    checks.path(path)
    checks.function("network", network, NETWORK)
    return lambda x, s, t: targets.convert(path, network(x, s, t), x, s, source=source, target=targets.velocity)


def _interval(s, t, x, *, forward=True) -> tuple[Any, Any]:
    """Both times as one per example; raises where an interval that is known goes backwards and may not."""
    states.layout(x)
    leaf = checks.floats("x", jax.tree.leaves(x)[0])
    with jax.ensure_compile_time_eval():
        s, t = (
            jnp.broadcast_to(checks.times(checks.on_path(time, name), leaf, name), leaf.shape[:1]) for name, time in (("s", s), ("t", t))
        )
    if forward and not isinstance(s, Tracer) and not isinstance(t, Tracer) and (np.asarray(s) > np.asarray(t)).any():
        begins, ends = np.asarray(s), np.asarray(t)
        i = int(np.argmax(begins > ends))
        raise ValueError(
            f"s is {begins[i]:g} and t {ends[i]:g} in example {i}, but intervals go forward, s <= t, from noise to data: exchange "
            "them, or draw them by flow_maps.draw_interval."
        )
    return s, t


def _along(mean_velocity, x, s, t, tangent) -> tuple[Any, Any]:
    """m at (x, s, t), and how it changes with s while x moves with the tangent."""
    return jax.jvp(lambda x, s: mean_velocity(x, s, t), (x, s), (tangent, jnp.ones_like(s)))


def _eulerian(mean_velocity, x, s, t, u, tangent, weight, mask):
    """The error of (5)."""
    x = jax.tree.map(jnp.asarray, x)
    like_x = lambda value: jax.tree.map(lambda u, a: jnp.asarray(u, a.dtype), value, x)  # noqa: E731
    value, slope = _along(mean_velocity, x, s, t, lax.stop_gradient(like_x(tangent)))
    wanted = lax.stop_gradient(_move(like_x(u), t - s, slope))
    return losses.regression(lambda x, t: value, x, s, wanted, weight=weight, mask=mask)


def mean_flow(mean_velocity, path, x_0, x_1, s, t, *, tangent=None, target=None, weight=None, mask=None) -> chex.ArrayDevice:
    """MeanFlow: the mean velocity from pairs of noise and data, by one derivative forward.

    |m(x_s, s, t) - u - (t - s) (d/ds m + (dm/dx) u)|^2 / d,   u = alpha'_s x_1 + beta'_s x_0
    (Geng et al. 2025, arXiv:2505.13447; with `tangent` Geng et al. 2025, arXiv:2512.02012)

    with what follows m held. Its mean is (5), since u enters linearly and has the mean u_s(x_s).

    Args:
      mean_velocity: m, (x, s, t) -> like x, the network.
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype, or a pytree of them.
      x_1: data, like x_0.
      s: where intervals begin, in [0, 1], () or (B,), before the end of a path whose velocity is infinite there.
      t: where they end, at least s; at s = t it is flow matching.
      tangent: (x, s) -> like x, the velocity along which m is differentiated: `flow_maps.velocity(m)` is the improved form, whose
        variance is less; None is u.
      target: (x, s, u) -> like x, what stands for u, such as `guided_target`.
      weight: of each coordinate, as for `losses.regression`.
      mask: what counts, likewise.
    Returns:
      (B,), in float32 or wider; see `adaptive`.
    Raises:
      TypeError: if an array is not of floats, or the network is no function.
      ValueError: if shapes differ, or a known s is after t.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    s, t = _interval(s, t, x_1)
    x, u = paths.flow(path, x_0, x_1, s)
    if target is not None:
        checks.function("target", target, "lambda x, s, u: u")
        of_pair = u
        u = _checked("target", lambda x, s: target(x, s, of_pair), checks.FIELD)(x, s)
    along = u if tangent is None else _checked("tangent", tangent, checks.FIELD)(x, s)
    return _eulerian(mean_velocity, x, s, t, u, along, weight, mask)


def eulerian(mean_velocity, field, x, s, t, *, weight=None, mask=None) -> chex.ArrayDevice:
    """Eulerian distillation of a trained velocity: its flow map, by one derivative forward.

    |m(x, s, t) - u_s(x) - (t - s) (d/ds m + (dm/dx) u_s)(x, s, t)|^2 / d    (Boffi et al. 2024, arXiv:2406.07507, over (t - s)^2)

    with what follows m held. At the flow map of the field it is 0, wherever the states are.

    Args:
      mean_velocity: m, (x, s, t) -> like x, the network.
      field: u, (x, t) -> like x, of the teacher.
      x: states at s, (B, ...), such as `paths.interpolate(path, x_0, x_1, s)`.
      s: where intervals begin, in [0, 1], () or (B,).
      t: where they end; before s for a map that goes back to noise.
      weight: of each coordinate, as for `losses.regression`.
      mask: what counts, likewise.
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats, or the network or the field is no function.
      ValueError: if shapes differ.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    field = _checked("field", field, checks.FIELD)
    s, t = _interval(s, t, x, forward=False)
    u = field(x, s)
    return _eulerian(mean_velocity, x, s, t, u, u, weight, mask)


def lagrangian(mean_velocity, field, x, s, t, *, weight=None, mask=None) -> chex.ArrayDevice:
    """Lagrangian distillation of a trained velocity, or of the network's own: the map's end moves with the flow.

    |d/dt X_{s,t}(x) - u_t(X_{s,t}(x))|^2 / d    (Boffi et al. 2024, arXiv:2406.07507; 2025, arXiv:2505.18825)

    with u_t held. At the flow map of the field it is 0. The gradient goes through the derivative in t.

    Args:
      mean_velocity: m, (x, s, t) -> like x, the network.
      field: u, (x, t) -> like x, of the teacher; `flow_maps.velocity(m)` beside flow matching is self-distillation.
      x: states at s, (B, ...), such as `paths.interpolate(path, x_0, x_1, s)`.
      s: where intervals begin, in [0, 1], () or (B,).
      t: where they end; before s for a map that goes back to noise.
      weight: of each coordinate, as for `losses.regression`.
      mask: what counts, likewise.
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats, or the network or the field is no function.
      ValueError: if shapes differ.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    field = _checked("field", field, checks.FIELD)
    s, t = _interval(s, t, x, forward=False)
    end, slope = jax.jvp(lambda t: _move(x, t - s, mean_velocity(x, s, t)), (t,), (jnp.ones_like(t),))
    wanted = lax.stop_gradient(field(end, t))
    return losses.regression(lambda x, t: slope, x, t, wanted, weight=weight, mask=mask)


def self_consistency(mean_velocity, x, s, r, t, *, teacher=None, weight=None, mask=None) -> chex.ArrayDevice:
    """One step as two steps are: shortcut models, and progressive distillation of a teacher's two steps into one.

    |m(x, s, t) - ((r - s) m'(x, s, r) + (t - r) m'(X'_{s,r}(x), r, t)) / (t - s)|^2 / d
    (Frans et al. 2024, arXiv:2410.12557; Salimans and Ho 2022, arXiv:2202.00512)

    with m' held: the network itself, or the teacher. It learns nothing at s = t, where flow matching has to.

    Args:
      mean_velocity: m, (x, s, t) -> like x, the network.
      x: states at s, (B, ...), such as `paths.interpolate(path, x_0, x_1, s)`.
      s: where the first step begins, in [0, 1], () or (B,).
      r: where it ends and the second begins, such as (s + t) / 2.
      t: where that ends.
      teacher: m', likewise: the network's average, or that of `from_velocity(field)` by `flow_maps.mean_velocity`; None is m.
      weight: of each coordinate, as for `losses.regression`.
      mask: what counts, likewise.
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats, or the network or the teacher is no function.
      ValueError: if shapes differ, or known times do not increase.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    teacher = mean_velocity if teacher is None else _checked("teacher", teacher)
    s, r = _interval(s, r, x)
    r, t = _interval(r, t, x)
    first = teacher(x, s, r)
    second = teacher(_move(x, r - s, first), r, t)
    share = jnp.where(t > s, (r - s) / jnp.where(t > s, t - s, 1), 0.5)
    wanted = jax.tree.map(lambda a, b: paths.lift(share, a) * a + paths.lift(1 - share, b) * b, first, second)
    return losses.regression(lambda x, s: mean_velocity(x, s, t), x, s, lax.stop_gradient(wanted), weight=weight, mask=mask)


def consistency(mean_velocity, x, s, y, r, t, *, teacher=None, weight=None, mask=None) -> chex.ArrayDevice:
    """Two states of one way, a little apart, lead to the same end: consistency training and distillation.

    |X_{s,t}(x) - X'_{r,t}(y)|^2 / d    (Song et al. 2023, arXiv:2303.01469; Song and Dhariwal 2023, arXiv:2310.14189)

    with X' held: the network itself, or its average. For training y is `paths.interpolate(path, x_0, x_1, r)` of the noise and data of x;
    for distillation it is a step of the teacher from x, `flow_maps.from_velocity(field)(x, s, r)`. At the exact map the gradient of the
    mean is of the order (r - s)^2 in training, and 0 up to the solver's error in distillation; so is the loss in training, and it is
    divided by r - s where steps differ.

    Args:
      mean_velocity: m, (x, s, t) -> like x, the network.
      x: states at s, (B, ...).
      s: their times, in [0, 1], () or (B,).
      y: states at r, like x.
      r: their times, at least s.
      t: where both are led to, at least r; 1 for data.
      teacher: the mean velocity of X', likewise; None is m.
      weight: of each coordinate, as for `losses.regression`.
      mask: what counts, likewise.
    Returns:
      (B,), in float32 or wider.
    Raises:
      TypeError: if an array is not of floats, or the network or the teacher is no function.
      ValueError: if shapes differ, or known times do not increase.
    """
    mean_velocity = _checked("mean_velocity", mean_velocity)
    teacher = mean_velocity if teacher is None else _checked("teacher", teacher)
    s, r = _interval(s, r, x)
    r, t = _interval(r, t, x)
    wanted = lax.stop_gradient(flow_map(teacher)(y, r, t))
    return losses.regression(lambda x, s: flow_map(mean_velocity)(x, s, t), x, s, wanted, weight=weight, mask=mask)


def adaptive(loss, power=1.0, constant=1e-3) -> chex.ArrayDevice:
    """A loss whose gradient is less where it is large, so that few examples do not rule a batch.

    loss / (loss + c)^p, the denominator held    (Geng et al. 2025, arXiv:2505.13447, section 4.3)

    With p = 0.5 it is like a pseudo-Huber loss. Its value says little; the loss itself does.

    Args:
      loss: (B,), squared errors.
      power: p, at least 0, where the loss stays as it is.
      constant: c, above 0.
    Returns:
      (B,), like the loss.
    Raises:
      ValueError: if the power is below 0, or the constant is not above 0.
    """
    loss = checks.floats("loss", loss)
    checks.number("power", power, "how strongly large losses count less", least=0)
    checks.number("constant", constant, "what keeps small losses from counting without bound", least=0, above=True)
    return loss * lax.stop_gradient((loss + constant) ** -power)


def guided_target(mean_velocity_y, y, null, scale, mix=0.0) -> Callable:
    """Guidance learnt with the map, so that sampling takes one evaluation: `target` of `mean_flow`.

    w u + k m(x, s, s | y) + (1 - w - k) m(x, s, s | null)    (Geng et al. 2025, arXiv:2505.13447, section 4.2)

    with m held. The map is that of guidance at scale w / (1 - k). Where the label is none the target is u.

    Args:
      mean_velocity_y: (x, s, t, y) -> like x, the network.
      y: labels as the network gets them, some dropped, (B,); or conditions of any kind, as for `guidance.classifier_free`.
      null: the label of none, or the condition that stands for none.
      scale: w.
      mix: k, below 1.
    Returns:
      (x, s, u) -> like x.
    Raises:
      TypeError: if the network is no function, or the null no label where y are labels.
      ValueError: if the scale is not finite, mix is not in [0, 1), or y's dtype cannot hold the null.
    """
    checks.function("mean_velocity_y", mean_velocity_y, "lambda x, s, t, y: model.apply(params, x, s, y, end=t)")
    checks.number("scale", scale, "the guidance scale")
    checks.number("mix", mix, "the share of the network's own conditional velocity", least=0, most=0.999)
    y = jax.tree.map(jnp.asarray, y)
    none = jax.tree.map(checks.null, null, y)
    network = _checked("mean_velocity_y", lambda x, s, y: mean_velocity_y(x, s, s, y), "(x, s, t, y) -> like x")
    # What is NaN is none too, in the modules of `models.conditions`.
    alike = jax.tree.map(lambda a, b: ((a == b) | ((a != a) & (b != b))).reshape(len(a), -1).all(1), y, none)
    given = ~functools.reduce(jnp.logical_and, jax.tree.leaves(alike))

    def target(x, s, u):
        of_none = network(x, s, none)
        own = u if isinstance(mix, int | float) and not mix else network(x, s, y)

        def mixed(u, own, of_none):
            guided = scale * u + mix * own + (1 - scale - mix) * of_none
            return jnp.where(given.reshape(-1, *(1,) * (u.ndim - 1)), guided, u)

        return lax.stop_gradient(jax.tree.map(mixed, u, own, of_none))

    return target


def draw_interval(key, n, *, equal=0.75, draw=times.uniform) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """Beginnings and ends of intervals: two times in order, or for a share of the examples one time twice.

    s = min(a, b),  t = max(a, b)    (Geng et al. 2025, arXiv:2505.13447, section 4.3)

    Args:
      key: a typed key.
      n: how many.
      equal: the share of them with s = t, in [0, 1], rounded to whole examples; they learn the velocity.
      draw: (key, n) -> times, (n,), of a and b alike: `times.uniform`, or
        `lambda key, n: times.logit_normal(key, n, 0.4, 1.0)`.
    Returns:
      s and t, (n,) each, s <= t.
    Raises:
      TypeError: if the key is not typed, or `draw` is no function.
      ValueError: if n is not a whole number of at least 1, or equal not in [0, 1].
    """
    checks.key(key)
    checks.whole("n", n, "how many intervals are drawn")
    checks.number("equal", equal, "the share of intervals of length 0", least=0, most=1)
    checks.function("draw", draw, "times.uniform")
    key_a, key_b = jax.random.split(key)
    a, b = (jnp.asarray(checks.on_path(draw(key, n), "What draw gave")) for key in (key_a, key_b))
    if a.shape != (n,) or b.shape != (n,):
        raise ValueError(f"draw gave times of shape {a.shape}, but it is asked for {n} of them, of shape {(n,)}.")
    s, t = jnp.minimum(a, b), jnp.maximum(a, b)
    # Draws are independent, so the first ones are any.
    alike = jnp.arange(n) < round(equal * n)
    return jnp.where(alike, t, s), t
