"""Solvers: steps of a flow made for Gaussian paths, and steps that remember.

Whatever the path, z = x / (alpha + beta) moves on the linear path with the clock c = alpha / (alpha + beta), from 0 at noise to
1 at data (`sampling.clock`). With D = E[x_1 | x] and E = E[x_0 | x], and what a network gives converted to them without dividing by
zero,

    dz/dc = D - E,    D - E = (D - z) / (1 - c) = (z - E) / c                                       (1)

A multistep method holds one of them, y = D - E, D or E, to a polynomial through its last values y_j at c_j and integrates the
rest of (1) exactly, from c to s,

    z_s = z + (s - c) (D - E) + sum_j w_j (y_j - y),    w_j = int_c^s (s - r) q(r) l_j'(r) dr       (2)
    q = 1 for D - E, 1 / (1 - r) for D, -1 / r for E

with l_j the polynomials that are 1 at c_j and 0 at c and at the other nodes, and the integral by Gauss's rule. Without memory
the last two are DDIM. The polynomials are in a clock k(c) in which y is smooth and nowhere flat: by (1)

    dD/dc = (1 - c) d(D - E)/dc,   dE/dc = -c d(D - E)/dc,   so k = (1 - c)^2 for D, c^2 for E, c for D - E.

Nothing in (2) is infinite at noise or data then, unless the velocity is 0 there (`paths.Polynomial`), and no step falls back to a
lower order. In k = c the last of equal steps would err by an order more than the others, since D comes to rest at data. Published
methods take the log signal-to-noise ratio, log c / (1 - c), and fall back where that is infinite; `clock=log_ratio` does so here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fmjax import checks, paths, sampling, targets
from fmjax.sampling import clock as clocks
from fmjax.sampling.clock import heun as heun
from fmjax.sampling.clock import log_ratio as log_ratio
from fmjax.sampling.scan import PathStep, check_domain, check_steps


def ddim(path):
    """DDIM: data and noise held over a step; on the linear path it is Euler's    (Song, Meng and Ermon 2021, eq. 12).

    x_s = alpha_s D + beta_s E

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 1, one evaluation.
    """

    checks.path(path)

    def step(field, x, t, dt):
        z, slope = clocks.enter(path, field, x, t)
        return clocks.leave(path, x, z, clocks.ahead(clocks.position(path, t), clocks.position(path, t + dt)) * slope, t, dt)

    return PathStep(path, step)


def edm_heun(path):
    """EDM's step: Heun's in x / alpha and the noise level beta / alpha    (Karras et al. 2022, algorithm 1).

    Euler's, which is DDIM, where the noise level ends at 0, as in the paper, and where it starts at infinity: on equal steps from
    alpha = 0 it is of order 1, for the first noise levels are far apart. It is made for `times.karras`; `heun` here for equal steps.

    Args:
      path: anything with `alpha(t)` and `beta(t)`; EDM starts where beta / alpha is 80.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 2, two evaluations, one in a step at either end of the path.
    """
    noise = functools.partial(targets.convert, path, source=targets.velocity, target=targets.noise)

    checks.path(path)

    def step(field, x, t, dt):
        u, s = field(x, t), t + dt
        end = ddim(path)(lambda x, t: u, x, t, dt)

        def corrected():
            # beta_s - alpha_s beta_t / alpha_t, whose terms differ little between neighbours.
            gone = clocks.ahead(clocks.position(path, t), clocks.position(path, s))
            change = -gone * clocks.size(path, t) * clocks.size(path, s) / path.alpha(t)
            return end + change / 2 * (noise(field(end, s), end, s) - noise(u, x, t))

        return lax.cond((path.beta(s) > 0) & (path.alpha(t) > 0), corrected, lambda: end)

    return PathStep(path, step)


def adams_bashforth(order):
    """Adams and Bashforth's multistep method    (1883): (2) with y = u_t, along the path's own time.

    The first steps have fewer values to go by, so each is mended once the next value is known, at no evaluation more; where the
    order is above 3 the first is `sampling.rk4`'s.

    Args:
      order: how many values are used, at least 1; the order of the error.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along any field: one evaluation a step, and four more above order 3.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    checks.whole("order", order, "how many values a multistep method uses")
    return _multistep(paths.Linear(), _SLOPE, order, start=sampling.rk4 if order > 3 else None)


def dpm_solver_pp(path, order, *, clock=clocks.squared_noise):
    """DPM-Solver++ 2M and 3M: (2) with y = D    (Lu et al. 2022b, section 4; the integral exact, the polynomial in (1 - c)^2).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; 2 is 2M, 3 is 3M. Above 3 the first step's error stays of order 3.
      clock: what the polynomial is in, by default (1 - c)^2; `log_ratio` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, clock=clock)


def unipc(path, order, *, clock=clocks.squared_noise):
    """UniPC: `dpm_solver_pp` whose every step is mended once the next value is known    (Zhao et al. 2023; the integral exact).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: of the predictor; the corrector's is one higher. Above 2 the first step's error stays of order 3.
      clock: what the polynomial is in, by default (1 - c)^2; `log_ratio` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, corrected=True, clock=clock)


def deis(path, order, *, clock=clocks.squared_data):
    """DEIS: (2) with y = E    (Zhang and Chen 2023, section 3.2; the polynomial in c^2, where theirs is in t).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; the paper's r plus 1. Above 3 the first step's error stays of order 3.
      clock: what the polynomial is in, by default c^2.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _NOISE, order, clock=clock)


class _Held(NamedTuple):
    """What a method holds to a polynomial: y, the q of (2), and how the slope of z changes with z while y stays; of positions."""

    value: Callable[..., Any]
    q: Callable[..., Any]
    pull: Callable[..., Any]


_SLOPE = _Held(lambda z, at, slope: slope, lambda r: jnp.ones_like(r.data), lambda at: jnp.zeros_like(at.data))
_DATA = _Held(lambda z, at, slope: z + at.noise * slope, lambda r: 1 / r.noise, lambda at: -1 / at.noise)
_NOISE = _Held(lambda z, at, slope: z - at.data * slope, lambda r: -1 / r.data, lambda at: 1 / at.data)


def _both(*positions):
    return jax.tree.map(lambda *each: jnp.stack(each), *positions)


def _multistep(path, held, order, *, corrected=False, start=None, clock=clocks.identity):
    """(2), and its corrector: the last step again with the new value among the nodes, always or only while starting."""
    checks.path(path)
    checks.whole("order", order, "how many values a multistep method uses")
    checks.function("clock", clock, "solvers.log_ratio")
    # A value more than the predictor's, for the corrector looks back from the start of its step.
    length = order if corrected or order > 1 else 0

    # Of two steps at once, which is half of the program.
    @jax.vmap
    def weights(nodes, known, start, end):
        step = clocks.ahead(start, end)
        return clocks.basis_weights(clock, nodes, known, start, end, lambda r, share: step * (1 - share) * held.q(r))

    def step(field, memory, x, t, dt):
        index, moved_last, slope_last, nodes, values = memory
        z, slope = clocks.enter(path, field, x, t)
        here, there = clocks.position(path, t), clocks.position(path, t + dt)
        value = held.value(z, here, slope)

        if length:
            mend = (index >= (1 if start is None else 2)) & (corrected | (index < order))
            # Where nothing is mended, any two positions: what is thrown away must be finite, or derivatives are not.
            last = clocks.Position(jnp.where(mend, nodes.data[0], 0.25), jnp.where(mend, nodes.noise[0], 0.75))
            now = clocks.Position(jnp.where(mend, here.data, 0.5), jnp.where(mend, here.noise, 0.5))
            older = jax.tree.map(lambda a: a[1:], nodes)
            for_last, for_next = weights(
                _both(clocks.push(now, older, length), nodes),
                jnp.stack([mend & (jnp.arange(length) < jnp.minimum(index, order)), jnp.arange(length) < jnp.minimum(index, order - 1)]),
                _both(last, here),
                _both(now, there),
            )
            change = clocks.combine(for_last, clocks.push(value, values[1:], length) - values[:1])
            mended = jnp.where(mend, clocks.ahead(last, now) * slope_last + change - moved_last, 0)
            slope = slope + held.pull(now) * mended
            z, x = z + mended, x + clocks.size(path, t) * mended

        moved = clocks.ahead(here, there) * slope
        if order > 1:
            moved = moved + clocks.combine(for_next[: order - 1], values[: order - 1] - value[None])
        x_next = clocks.leave(path, x, z, moved, t, dt)
        if start is not None:
            x_next = lax.cond(index == 0, functools.partial(start, field, x, t, dt), lambda: x_next)
        if length:
            moved_last, slope_last, nodes, values = moved, slope, clocks.push(here, nodes, length), clocks.push(value, values, length)
        return x_next, (index + 1, moved_last, slope_last, nodes, values)

    def init(x, times):
        check_steps(order, times)
        if held is not _SLOPE:
            check_domain(path, times)
        past, nodes = jnp.zeros_like(x) if length else None, jnp.full(length, 0.5, times.dtype)
        return jnp.zeros((), int), past, past, clocks.Position(nodes, nodes), jnp.zeros((length, *x.shape), x.dtype)

    return sampling.Multistep(init, step)
