"""Multistep: solvers of a flow that use the values of earlier steps, one evaluation per step.

In the coordinates of `reparametrisation`, dz/dc = D - E. A method holds one of y = D - E, D or E to a polynomial through its last values
y_j at c_j, in a variable k(c) in which y is smooth, and integrates the rest exactly, from c to s:

    z_s = z + (s - c) (D - E) + sum_j w_j (y_j - y),    w_j = int_c^s (s - r) q(r) l_j'(r) dr       (1)
    q = 1 for D - E, 1 / (1 - r) for D, -1 / r for E

with l_j the polynomials that are 1 at c_j and 0 at c and at the other nodes. docs/guides/solvers.md derives it, and says why k is
(1 - c)^2 for D.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fmjax import checks, paths
from fmjax.sampling.checks import check_domain, check_steps
from fmjax.sampling.reparametrisation import (
    Position,
    basis_weights,
    combine,
    elapsed,
    enter,
    leave,
    linear_time,
    per_coordinate,
    position,
    push,
    size,
    squared_data,
    squared_noise,
)
from fmjax.sampling.steps import Multistep, rk4


def adams_bashforth(order) -> Multistep:
    """Adams and Bashforth's multistep method (1883), along the path's own time.

    X_{t+h} = X_t + int_t^{t+h} P(r) dr

    with P the polynomial through the last values of u_t(X_t). The first steps have fewer values to go by, so each is corrected once the
    next value is known, at no evaluation more; where the order is above 3 the first is `sampling.rk4`'s.

    Args:
      order: how many values are used, at least 1; the order of the error.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along any field: one evaluation per step, and four more above order 3.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    checks.whole("order", order, "how many values a multistep method uses")
    return _multistep(paths.Linear(), _SLOPE, order, start=rk4 if order > 3 else None)


def dpm_solver_pp(path, order, *, variable=squared_noise) -> Multistep:
    """DPM-Solver++ 2M and 3M: the expected data D held to a polynomial through their last values, and the rest integrated exactly.

    z_s = z + (s - c) (D - E) + sum_j w_j (D_j - D)    (Lu et al. 2022, arXiv:2211.01095, section 4, with the integral exact)

    from c to s, in z = x / (alpha + beta) and the time c = alpha / (alpha + beta); the weights are (1) of `fmjax.sampling.multistep`.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; 2 is 2M, 3 is 3M. Above 3 the first step's error stays of order 3.
      variable: k, what the polynomial is in: (1 - c)^2 by default; `sampling.log_snr` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation per step.
    Raises:
      TypeError: if `path` is no path, or the variable is no function.
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, variable=variable)


def unipc(path, order, *, variable=squared_noise) -> Multistep:
    """UniPC: `dpm_solver_pp` whose every step is corrected by the next value.

    z_s = z + (s - c) (D - E) + sum_j w_j (D_j - D)    (Zhao et al. 2023, arXiv:2302.04867, with the integral exact)

    with D_s, which the next step evaluates, among the values of the correction.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: of the predictor; the corrector's is one higher. Above 2 the first step's error stays of order 3.
      variable: k, what the polynomial is in, as for `dpm_solver_pp`.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation per step.
    Raises:
      TypeError: if `path` is no path, or the variable is no function.
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, corrector=True, variable=variable)


def deis(path, order, *, variable=squared_data) -> Multistep:
    """DEIS: the expected noise E held to a polynomial through its last values, and the rest integrated exactly.

    z_s = z + (s - c) (D - E) + sum_j w_j (E_j - E)    (Zhang and Chen 2023, arXiv:2204.13902, section 3.2)

    from c to s, in z = x / (alpha + beta) and the time c = alpha / (alpha + beta); the weights are (1) of `fmjax.sampling.multistep`.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; the paper's r plus 1. Above 3 the first step's error stays of order 3.
      variable: k, what the polynomial is in: c^2 by default, where the paper's is t.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation per step.
    Raises:
      TypeError: if `path` is no path, or the variable is no function.
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _NOISE, order, variable=variable)


class _Held(NamedTuple):
    """What a method holds to a polynomial: y, the q of (1), and the derivative of dz/dc in z while y stays; of positions."""

    value: Callable[..., Any]
    q: Callable[..., Any]
    derivative: Callable[..., Any]


_SLOPE = _Held(lambda z, at, slope: slope, lambda r: jnp.ones_like(r.data), lambda at: jnp.zeros_like(at.data))
_DATA = _Held(lambda z, at, slope: z + at.noise * slope, lambda r: 1 / r.noise, lambda at: -1 / at.noise)
_NOISE = _Held(lambda z, at, slope: z - at.data * slope, lambda r: -1 / r.data, lambda at: 1 / at.data)


class _History(NamedTuple):
    """What a method knows of the steps before, the newest first."""

    index: jax.Array
    """How many there were."""
    moved: jax.Array | None
    """By how much the last one moved z."""
    slope: jax.Array | None
    """dz/dc where it began."""
    nodes: Position
    """Where the values are, (length,), or (length, 1, D) along a joint path."""
    values: jax.Array
    """y there, (length, B, ...)."""


def _prediction(weights, values, value, slope, step):
    """(1): by how much z moves in a step of that length in c."""
    return step * slope + combine(weights, values - value[None])


def _correction(weights, history, value, step):
    """By how much the last step, of that length in c, should have moved z besides: (1) with the new value among its nodes."""
    values = push(value, history.values[1:], len(history.values))
    return _prediction(weights, values, history.values[0], history.slope, step) - history.moved


def _multistep(path, held, order, *, corrector=False, start=None, variable=linear_time):
    """(1), each step corrected once the next value is known: always with a corrector, else while there are fewer values than the order."""
    checks.path(path)
    checks.whole("order", order, "how many values a multistep method uses")
    checks.function("variable", variable, "sampling.log_snr")
    # One value more than the predictor's, for the corrector looks back from the start of its step.
    length = order if corrector or order > 1 else 0
    first = 1 if start is None else 2

    # Of two steps at once, which is half of the program.
    @jax.vmap
    def weights(nodes, known, begin, end):
        def of(nodes, begin, end):
            step = elapsed(begin, end)
            return basis_weights(variable, nodes, known, begin, end, lambda r, share: step * (1 - share) * held.q(r))

        return per_coordinate(of)(nodes, begin, end)

    def weigh(history, corrects, last, now, here, there):
        """The weights of the correction and of the prediction."""
        older, number = jax.tree.map(lambda a: a[1:], history.nodes), jnp.arange(length)
        known = corrects & (number < jnp.minimum(history.index, order)), number < jnp.minimum(history.index, order - 1)
        return weights(_both(push(now, older, length), history.nodes), jnp.stack(known), _both(last, here), _both(now, there))

    def step(field, history, x, t, dt):
        z, slope = enter(path, field, x, t)
        here, there = position(path, t), position(path, t + dt)
        value = held.value(z, here, slope)
        if length:
            corrects = (history.index >= first) & (corrector | (history.index < order))
            # Where nothing is corrected, any two positions: what is thrown away must be finite, or derivatives are not.
            last = Position(*(jnp.where(corrects, node[0], other) for node, other in zip(history.nodes, (0.25, 0.75), strict=True)))
            now = Position(*(jnp.where(corrects, coordinate, 0.5) for coordinate in here))
            for_last, for_next = weigh(history, corrects, last, now, here, there)
            correction = jnp.where(corrects, _correction(for_last, history, value, elapsed(last, now)), 0)
            z, x = z + correction, x + size(path, t) * correction
            slope = slope + held.derivative(now) * correction
        moved = elapsed(here, there) * slope
        if order > 1:
            moved = _prediction(for_next[: order - 1], history.values[: order - 1], value, slope, elapsed(here, there))
        x_next = leave(path, x, z, moved, t, dt)
        if start is not None:
            x_next = lax.cond(history.index == 0, functools.partial(start, field, x, t, dt), lambda: x_next)
        if not length:
            return x_next, history._replace(index=history.index + 1)
        nodes, values = push(here, history.nodes, length), push(value, history.values, length)
        return x_next, _History(history.index + 1, moved, slope, nodes, values)

    def init(x, times):
        check_steps(order, times)
        if held is not _SLOPE:
            check_domain(path, times)
        past, nodes = jnp.zeros_like(x) if length else None, jnp.full((length, *jnp.shape(path.beta(times[0]))), 0.5, times.dtype)
        return _History(jnp.zeros((), int), past, past, Position(nodes, nodes), jnp.zeros((length, *x.shape), x.dtype))

    return Multistep(init, step, None if held is _SLOPE else path)


def _both(*positions):
    return jax.tree.map(lambda *each: jnp.stack(each), *positions)
