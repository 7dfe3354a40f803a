"""Solvers: steps made for Gaussian paths, and steps that remember.

Whatever the path, z = x / (alpha + beta) moves on the linear path with the clock c = alpha / (alpha + beta), from 0 at noise to
1 at data. With D = E[x_1 | x] and E = E[x_0 | x], and what a network gives converted to them without dividing by zero,

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

With noise, sigma_t^2 = 2 kappa b_t and the notes' b_t, holding D gives for kappa constant over a step

    z_s = s D + (1 - s) (rho^kappa E + sqrt(1 - rho^(2 kappa)) epsilon),    rho = c (1 - s) / (s (1 - c))    (3)

which is DDIM for kappa = 0 and DDPM's posterior for kappa = 1; to it come weights as in (2), of s (1 - rho^(1 + kappa)) l_j'.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import paths, sampling, targets

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def ddim(path):
    """DDIM: data and noise held over a step; on the linear path it is Euler's    (Song, Meng and Ermon 2021, eq. 12).

    x_s = alpha_s D + beta_s E

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 1, one evaluation.
    """

    def step(field, x, t, dt):
        end = jnp.asarray(path.alpha(t + dt)), jnp.asarray(path.beta(t + dt))
        return targets.convert(path, field(x, t), x, t, source=targets.velocity, target=lambda *_: end)

    return step


def edm_heun(path):
    """EDM's step: Heun's in x / alpha and the noise level beta / alpha, Euler's where that ends at 0    (Karras et al. 2022, algorithm 1).

    Args:
      path: anything with `alpha(t)` and `beta(t)`, alpha above 0 along the grid: EDM starts where beta / alpha is 80.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 2, two evaluations, one in a step that ends at beta = 0.
    """
    noise = functools.partial(targets.convert, path, source=targets.velocity, target=targets.noise)

    def step(field, x, t, dt):
        u, s = field(x, t), t + dt
        end = ddim(path)(lambda x, t: u, x, t, dt)

        def corrected():
            change = path.beta(s) - path.alpha(s) * path.beta(t) / path.alpha(t)
            return end + change / 2 * (noise(field(end, s), end, s) - noise(u, x, t))

        return lax.cond(path.beta(s) > 0, corrected, lambda: end)

    return step


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
    return _multistep(paths.Linear(), _SLOPE, order, start=sampling.rk4 if order > 3 else None)


def log_ratio(c):
    """log(alpha / beta), a clock for `dpm_solver_pp`, `unipc` and `deis`: what their papers interpolate in."""
    return jnp.log(c) - jnp.log1p(-c)


def _identity(c):
    return c


def _squared_noise(c):
    return (1 - c) ** 2


def _squared_data(c):
    return c**2


def dpm_solver_pp(path, order, *, clock=_squared_noise):
    """DPM-Solver++ 2M and 3M: (2) with y = D    (Lu et al. 2022b, section 4; the integral exact, the polynomial in (1 - c)^2).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; 2 is 2M, 3 is 3M. Above 3 the first step's error stays of order 3.
      clock: what the polynomial is in, a function of c, by default (1 - c)^2; `log_ratio` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, clock=clock)


def unipc(path, order, *, clock=_squared_noise):
    """UniPC: `dpm_solver_pp` whose every step is mended once the next value is known    (Zhao et al. 2023; the integral exact).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: of the predictor; the corrector's is one higher. Above 2 the first step's error stays of order 3.
      clock: what the polynomial is in, a function of c, by default (1 - c)^2; `log_ratio` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _DATA, order, corrected=True, clock=clock)


def deis(path, order, *, clock=_squared_data):
    """DEIS: (2) with y = E    (Zhang and Chen 2023, section 3.2; the polynomial in c^2, where theirs is in t).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      order: how many values are used; the paper's r plus 1. Above 3 the first step's error stays of order 3.
      clock: what the polynomial is in, a function of c, by default c^2.
    Returns:
      A `sampling.Multistep` for `sampling.sample_ode` along a velocity: one evaluation a step.
    Raises:
      ValueError: if the order is not positive; while sampling, if there are fewer steps.
    """
    return _multistep(path, _NOISE, order, clock=clock)


# Steps with noise. They take the velocity, since they know the path, and any sigma.


def ancestral(path):
    """Data held over a step, noise renewed as sigma says: (3)    (DDPM's posterior, Ho et al. 2020, eq. 7, where sigma is
    `diffusion.natural`).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_sde` along a velocity: one evaluation, weak order 1; finite at noise and data. Derivatives in the
        times of the grid hold for its inner ones; in an end at noise or data they leave out how much noise is kept.
    """

    def step(velocity, sigma, key, x, t, dt):
        z, slope = _enter(path, velocity, x, t)
        c, s = paths.signal_at(path, t), paths.signal_at(path, t + dt)
        return _size(path, t + dt) * _renewed(z, slope, c, s, _kappa(path, sigma, t, dt), sampling.noise(key, x.shape, x.dtype))

    return step


def sde_dpm_solver_pp(path, *, clock=_squared_noise):
    """SDE-DPM-Solver++ 2M: `ancestral` with D a line through its last two values    (Lu et al. 2022b, appendix A; the integral exact).

    There is none of a higher order: the last values differ by their noise, which a parabola through them would multiply.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      clock: what the line is in, a function of c, by default (1 - c)^2; `log_ratio` is the paper's.
    Returns:
      A `sampling.Multistep` for `sampling.sample_sde` along a velocity and any sigma: one evaluation a step.
    Raises:
      ValueError: while sampling, if there are fewer than two steps.
    """

    def step(velocity, sigma, key, memory, x, t, dt):
        index, clocks, values = memory
        z, slope = _enter(path, velocity, x, t)
        c, s, kappa = paths.signal_at(path, t), paths.signal_at(path, t + dt), _kappa(path, sigma, t, dt)
        data = z + (1 - c) * slope
        z = _renewed(z, slope, c, s, kappa, sampling.noise(key, x.shape, x.dtype))

        def kernel(r):
            rho = _rho(r, s)
            return s * (1 - rho * jnp.exp(_log_kept(rho, kappa)))

        weights = _basis_weights(clock, clocks, index > 0, c, s, kernel)
        z = z + _combine(weights, values - data[None])
        return _size(path, t + dt) * z, (index + 1, c[None], data[None])

    def init(x, times):
        _check_steps(2, times)
        _check_domain(path, times)
        return jnp.zeros((), int), jnp.zeros(1, times.dtype), jnp.zeros((1, *x.shape), x.dtype)

    return sampling.Multistep(init, step)


def churn(path, step=sampling.heun):
    """EDM's stochastic sampler: noise is added, and a step of the flow goes on from the time that has so much noise.

    x_r = (alpha_r + beta_r) / (alpha_t + beta) (x_t + sigma_t sqrt(h) epsilon),   beta_r / alpha_r = beta / alpha_t,
    beta^2 = beta_t^2 + sigma_t^2 h    (Karras et al. 2022, algorithm 2, whose gamma is a choice of beta)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      step: a step of the flow from r to t + h, `(field, x, t, dt) -> x`.
    Returns:
      A step for `sampling.sample_sde` along a velocity and any sigma, with the evaluations of `step`.
    """

    def noisy_step(velocity, sigma, key, x, t, dt):
        added = sigma(t + dt / 2) * jnp.sqrt(dt)
        size = path.alpha(t) + jnp.sqrt(path.beta(t) ** 2 + added**2)
        # Without noise there is no way back, not by a rounding either.
        r = jnp.where(added > 0, jnp.minimum(paths.time_at(path, path.alpha(t) / size), t), t)
        x_r = _size(path, r) / size * (x + added * sampling.noise(key, x.shape, x.dtype))
        return step(velocity, x_r, r, t + dt - r)

    return noisy_step


def predictor_corrector(path, step, *, size=0.08, corrections=1):
    """A step, and Langevin dynamics at the time where it ends    (Song et al. 2021, algorithms 2 and 4).

    x + beta_s ((rho - 1) E + sqrt(1 - rho^2) epsilon),   rho = exp(-2 size^2), which is (4) of `sampling` over a time of
    2 (size beta_s)^2 with D held: the paper's step with its norms at their expectation, so that no example meets another.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      step: the predictor, for a velocity: `ancestral(path)`, `churn(path)` or yours.
      size: the paper's signal-to-noise ratio r; marginals are moved by its square, so half of the paper's .16 here.
      corrections: how many after each step.
    Returns:
      A step for `sampling.sample_sde` along a velocity and any sigma, with one evaluation a correction beside the predictor's.
    """
    rho = float(np.exp(-2 * size**2))

    def corrected_step(velocity, sigma, key, x, t, dt):
        split = jax.vmap(functools.partial(jax.random.split, num=1 + corrections)) if key.ndim else None
        keys = jnp.moveaxis(split(key), 1, 0) if split else jax.random.split(key, 1 + corrections)
        x, s = step(velocity, sigma, keys[0], x, t, dt), t + dt

        def correct(x, key):
            noise = targets.convert(path, velocity(x, s), x, s, source=targets.velocity, target=targets.noise)
            fresh = sampling.noise(key, x.shape, x.dtype)
            return x + path.beta(s) * ((rho - 1) * noise + jnp.sqrt(1 - rho**2) * fresh), None

        return lax.scan(correct, x, keys[1:])[0]

    return corrected_step


def tweedie(path, velocity_field):
    """A last step to what the data are expected to be, E[x_1 | x_t], where Tweedie's formula ends    (Efron 2011; SiT's last step).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity_field: (x, t) -> u_t(x), like x.
    Returns:
      A last step for `sampling.sample_sde` along any drift.
    """

    def step(drift, sigma, key, x, t, dt):
        return targets.convert(path, velocity_field(x, t), x, t, source=targets.velocity, target=targets.data)

    return step


class _Held(NamedTuple):
    """What a method holds to a polynomial: y, the q of (2), and how the slope of z changes with z while y stays."""

    value: Callable[..., Any]
    q: Callable[..., Any]
    pull: Callable[..., Any]


_SLOPE = _Held(lambda z, c, slope: slope, lambda r: jnp.ones_like(r), lambda c: jnp.zeros_like(c))
_DATA = _Held(lambda z, c, slope: z + (1 - c) * slope, lambda r: 1 / (1 - r), lambda c: -1 / (1 - c))
_NOISE = _Held(lambda z, c, slope: z - c * slope, lambda r: -1 / r, lambda c: 1 / c)


def _size(path, t):
    return path.alpha(t) + path.beta(t)


def _enter(path, velocity, x, t):
    """z of (1), and its slope D - E."""
    slope = targets.convert(path, velocity(x, t), x, t, source=targets.velocity, target=lambda _, t: (jnp.ones_like(t), -jnp.ones_like(t)))
    return x / _size(path, t), slope


def _multistep(path, held, order, *, corrected=False, start=None, clock=_identity):
    """(2), and its corrector: the last step again with the new value among the nodes, always or only while starting."""
    _check_order(order)
    # A value more than the predictor's, for the corrector looks back from the start of its step.
    length = order if corrected or order > 1 else 0

    def step(field, memory, x, t, dt):
        index, z_last, slope_last, clocks, values = memory
        z, slope = _enter(path, field, x, t)
        c, s = paths.signal_at(path, t), paths.signal_at(path, t + dt)
        value = held.value(z, c, slope)

        if length:
            mend = (index >= (1 if start is None else 2)) & (corrected | (index < order))
            # Where nothing is mended, any two times: what is thrown away must be finite, or derivatives are not.
            c_last, c_now = jnp.where(mend, clocks[0], 0.25), jnp.where(mend, c, 0.5)
            known = mend & (jnp.arange(length) < jnp.minimum(index, order))
            weights = _basis_weights(clock, _push(c_now, clocks[1:], length), known, c_last, c_now, lambda r: (c_now - r) * held.q(r))
            change = _combine(weights, _push(value, values[1:], length) - values[:1])
            mended = z_last + (c_now - c_last) * slope_last + change
            slope = jnp.where(mend, slope + held.pull(c_now) * (mended - z), slope)
            z = jnp.where(mend, mended, z)

        weights = _basis_weights(clock, clocks[: order - 1], jnp.arange(order - 1) < index, c, s, lambda r: (s - r) * held.q(r))
        x_next = _size(path, t + dt) * (z + (s - c) * slope + _combine(weights, values[: order - 1] - value[None]))
        if start is not None:
            x_next = lax.cond(index == 0, functools.partial(start, field, x, t, dt), lambda: x_next)
        if length:
            z_last, slope_last, clocks, values = z, slope, _push(c, clocks, length), _push(value, values, length)
        return x_next, (index + 1, z_last, slope_last, clocks, values)

    def init(x, times):
        _check_steps(order, times)
        if held is not _SLOPE:
            _check_domain(path, times)
        past = jnp.zeros_like(x) if length else None
        return jnp.zeros((), int), past, past, jnp.zeros(length, times.dtype), jnp.zeros((length, *x.shape), x.dtype)

    return sampling.Multistep(init, step)


def _basis_weights(clock, nodes, known, start, end, kernel):
    """int_start^end kernel(r) l_j'(r) dr for the nodes that are known, 0 for the others; all 0 where a clock is infinite."""
    known = known & jnp.isfinite(clock(nodes)) & jnp.isfinite(clock(start)) & jnp.isfinite(clock(end))
    # Other numbers in the place of what is unknown, all distinct, so that nothing is divided by zero, in derivatives neither.
    at_start = clock(jnp.where(jnp.isfinite(clock(start)), start, 0.5))
    at_nodes = jnp.where(known, clock(jnp.where(known, nodes, 0.5)), at_start + 1 + jnp.arange(len(nodes)))
    others = known[None, :] & ~np.eye(len(nodes), dtype=bool)

    def basis(r):
        k = clock(r)
        gaps = jnp.where(others, at_nodes[:, None] - at_nodes[None, :], 1)
        rest = jnp.where(others, (k - at_nodes[None, :]) / gaps, 1).prod(1)
        return (k - at_start) / (at_nodes - at_start) * rest

    r = start + (end - start) * jnp.asarray(_NODES, start.dtype)
    slopes = jax.vmap(jax.jacfwd(basis))(r)
    weights = (end - start) * jnp.asarray(_WEIGHTS, start.dtype) * kernel(r) @ slopes
    return jnp.where(known, weights, 0)


def _combine(weights, values):
    """sum_j w_j values_j."""
    return jnp.tensordot(weights.astype(values.dtype), values, 1)


def _push(value, values, length):
    """The newest value in front of the others, as many as are kept."""
    return jnp.concatenate([value[None], values])[:length]


def _rho(c, s):
    """Of (3)."""
    return c * (1 - s) / (s * (1 - c))


def _log_kept(rho, kappa):
    """log rho^kappa; derivatives take it as constant where rho is 0, for the power's may be infinite there."""
    inside = rho > 0
    return jnp.where(inside, kappa * jnp.log(jnp.where(inside, rho, 1)), jnp.where(kappa > 0, -jnp.inf, 0))


def _kappa(path, sigma, t, dt):
    """sigma^2 / (2 b) at the middle of a step: where it starts b may be infinite, where it ends 0."""
    middle = t + dt / 2
    return sigma(middle) ** 2 / (2 * targets.coefficients(path, middle, source=targets.score, target=targets.velocity)[1])


def _renewed(z, slope, c, s, kappa, epsilon):
    """(3)."""
    log_kept = _log_kept(_rho(c, s), kappa)
    renewed = log_kept < 0
    fresh = jnp.where(renewed, jnp.sqrt(-jnp.expm1(2 * jnp.where(renewed, log_kept, -1))), 0)
    return s * (z + (1 - c) * slope) + (1 - s) * (jnp.exp(log_kept) * (z - c * slope) + fresh * epsilon)


def _check_order(order):
    if order < 1:
        raise ValueError(f"order is {order}, but a multistep method uses at least one value.")


def _check_domain(path, times):
    """Raises where a grid leaves the path, or starts where its velocity says nothing, wherever their values are known."""
    if not isinstance(times, Tracer):
        first, last = np.asarray(times)[[0, -1]]
        if first < 0 or last > 1:
            raise ValueError(f"times go from {first:g} to {last:g}, but a path goes from 0, noise, to 1, data.")
        with jax.ensure_compile_time_eval():
            row = targets.velocity(path, first)
        if not any(isinstance(entry, Tracer) for entry in row) and not np.any(row):
            raise ValueError(f"The velocity of {path} is 0 at t = {first:g} and says nothing of the data: start the grid later.")


def _check_steps(order, times):
    if len(times) - 1 < order:
        raise ValueError(
            f"The method has order {order} and needs as many steps, but the grid has {len(times) - 1}: take more steps or a lower order."
        )
