"""Time reparametrisation: what is followed on every path alike, and one-step maps that know the path.

z = x / (alpha + beta) moves on the linear path in the time c = alpha / (alpha + beta), from 0 at noise to 1 at data:

    dz/dc = D - E,    D - E = (D - z) / (1 - c) = (z - E) / c,    D = E[x_1 | x],  E = E[x_0 | x]       (1)

A position holds c and 1 - c, each of which is exact to its last digits where it is small, so that steps between neighbours are too:
in c alone, two times near data, or near noise in (1 - c)^2, may be one float.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks, targets
from fmjax.sampling.steps import PathStep

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2
"""Gauss's rule on [0, 1]."""


class Position(NamedTuple):
    """Where a path is at a time."""

    data: jax.Array
    """c, the share of the data."""
    noise: jax.Array
    """1 - c."""


def position(path, t) -> Position:
    """The position of a path at times of any shape."""
    alpha, beta = path.alpha(t), path.beta(t)
    return Position(alpha / (alpha + beta), beta / (alpha + beta))


def elapsed(start, end) -> chex.ArrayDevice:
    """c at one position less c at another, from whichever of c and 1 - c is small."""
    return jnp.where(start.data < 0.5, end.data - start.data, start.noise - end.noise)


def _between(start, step, share) -> Position:
    """The position a share of a step after a start."""
    return Position(start.data + share * step, start.noise - share * step)


# Variables k(c) for polynomials: each a function of a position and an origin, their difference in k up to a factor.


def linear_time(position, origin) -> chex.ArrayDevice:
    """k = c."""
    return elapsed(origin, position)


def squared_noise(position, origin) -> chex.ArrayDevice:
    """k = (1 - c)^2, in which the expected data are smooth and nowhere flat (docs/guides/solvers.md)."""
    return elapsed(origin, position) * (origin.noise + position.noise)


def squared_data(position, origin) -> chex.ArrayDevice:
    """k = c^2, in which the expected noise is."""
    return elapsed(origin, position) * (origin.data + position.data)


def log_snr(position, origin) -> chex.ArrayDevice:
    """Half the log signal-to-noise ratio, as what the polynomial of a multistep method is in; infinite at noise and at data.

    k = log(alpha / beta)    (Lu et al. 2022, arXiv:2211.01095; Zhao et al. 2023, arXiv:2302.04867)

    Args:
      position: where a path is: its c = alpha / (alpha + beta), `data`, and 1 - c, `noise`.
      origin: another position.
    Returns:
      k at the position less k at the origin.
    """
    return jnp.log(position.data / origin.data) - jnp.log(position.noise / origin.noise)


def enter(path, velocity, x, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """z, and its slope dz/dc = D - E."""
    slope = targets.convert(path, velocity(x, t), x, t, source=targets.velocity, target=lambda _, t: (jnp.ones_like(t), -jnp.ones_like(t)))
    return x / size(path, t), slope


def leave(path, x, z, moved, t, dt) -> chex.ArrayDevice:
    """x at t + dt where z has moved: x and what is added to it, so that small steps are not rounded with z."""
    before, after = size(path, t), size(path, t + dt)
    return x + ((after - before) * z + after * moved)


def anywhere(condition) -> chex.ArrayDevice:
    """Whether a condition holds for a coordinate of a joint path, or as it is for one path."""
    return condition.any() if jnp.ndim(condition) else condition


def _where_known(condition, value, other) -> chex.ArrayDevice:
    """The value at the coordinates of a joint path where a condition holds, inside a branch that one path takes where it does."""
    return jnp.where(condition, value, other) if jnp.ndim(condition) else value


def per_coordinate(weights) -> Callable:
    """Weights, (n,), of positions that may be of each coordinate of a joint path, (..., 1, D): (n, 1, D) then."""

    def mapped(nodes, *positions):
        if jax.tree.leaves(nodes)[0].ndim == 1:
            return weights(nodes, *positions)
        squeezed = jax.tree.map(lambda a: a[..., 0, :], (nodes, *positions))
        return jax.vmap(weights, -1, -1)(*squeezed)[..., None, :]

    return mapped


def size(path, t) -> chex.ArrayDevice:
    """alpha + beta, by which x is larger than z."""
    return path.alpha(t) + path.beta(t)


def noise_kept(start, end) -> chex.ArrayDevice:
    """rho, the noise level at the end of a step over that at its start: 0 where it starts at noise or ends at data."""
    known = (start.data > 0) & (start.noise > 0) & (end.data > 0) & (end.noise > 0)
    return jnp.where(known, 1 - elapsed(start, end) / jnp.where(known, end.data * start.noise, 1), 0)


def basis_weights(variable, nodes, known, start, end, kernel) -> chex.ArrayDevice:
    """int_start^end kernel(r) l_j'(r) dr for the polynomials l_j that are 1 at one node and 0 at the start and at the other nodes.

    Args:
      variable: k, what the polynomials are in, a function of a position and an origin.
      nodes: positions, (n,), the newest first.
      known: which of them there are, (n,).
      start: a position.
      end: another.
      kernel: a function of positions and of their shares of the step.
    Returns:
      Weights, (n,): 0 for what is not known or coincides with the start or with a newer node, and where the variable is infinite.
    """
    step = elapsed(start, end)
    usable = jnp.isfinite(variable(end, start))
    # Other numbers in the place of what is unknown, all distinct, so that nothing is divided by zero, in derivatives neither.
    origin = jax.tree.map(lambda a: jnp.where(usable, a, 0.5), start)
    within = jnp.where(usable, step, 0.25)
    known = known & usable & jnp.isfinite(variable(nodes, origin))
    offsets = variable(jax.tree.map(lambda a: jnp.where(known, a, 0.25), nodes), origin)
    known = known & (offsets != 0)
    newer = np.tri(len(known), k=-1, dtype=bool)
    known = known & ~((offsets[:, None] == offsets[None, :]) & known[None, :] & newer).any(1)
    offsets = jnp.where(known, offsets, 1 + jnp.arange(len(known), dtype=step.dtype))
    others = known[None, :] & ~np.eye(len(known), dtype=bool)
    gaps = jnp.where(others, offsets[:, None] - offsets[None, :], 1)

    shares = jnp.asarray(NODES, step.dtype)
    k, moves = jax.jvp(lambda share: variable(_between(origin, within, share), origin), (shares,), (jnp.ones_like(shares),))
    # l_j is a product, whose derivative is the sum of what is left where one factor after the other gives way to its own.
    away = (k[:, None] - offsets[None])[:, None, :]
    factors = jnp.concatenate([k[:, None, None] / offsets[None, :, None], jnp.where(others[None], away / gaps[None], 1)], -1)
    rates = jnp.concatenate([1 / offsets[:, None], jnp.where(others, 1 / gaps, 0)], -1)
    rest = jnp.where(np.eye(len(known) + 1, dtype=bool)[None, None], 1, factors[:, :, None, :]).prod(-1)
    slopes = moves[:, None] * (rates[None] * rest).sum(-1)
    areas = jnp.asarray(WEIGHTS, step.dtype) * kernel(_between(start, step, shares), shares)
    return jnp.where(known, jnp.matmul(areas, slopes, precision="highest"), 0)


def combine(weights, values) -> chex.ArrayDevice:
    """sum_j w_j values_j; the weights may be of each coordinate, (n, 1, D)."""
    weights = weights.astype(values.dtype)
    # Or a GPU takes ten bits of each number, and a TPU eight.
    return jnp.tensordot(weights, values, 1, precision="highest") if weights.ndim == 1 else (weights * values).sum(0)


def push(value, values, length) -> Any:
    """The newest in front of the others, as many as are kept; of arrays or of positions."""
    return jax.tree.map(lambda value, values: jnp.concatenate([value[None], values])[:length], value, values)


def ddim(path) -> PathStep:
    """DDIM: data and noise held over a step; on the linear path it is Euler's.

    x_s = alpha_s D + beta_s E    (Song, Meng and Ermon 2021, arXiv:2010.02502, eq. 12)

    with D = E[x_1 | x_t] the expected data and E = E[x_0 | x_t] the expected noise.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 1, one evaluation.
    Raises:
      TypeError: if `path` is no path.
    """

    checks.path(path)

    def step(field, x, t, dt):
        z, slope = enter(path, field, x, t)
        return leave(path, x, z, elapsed(position(path, t), position(path, t + dt)) * slope, t, dt)

    return PathStep(path, step)


def edm_heun(path) -> PathStep:
    """EDM's step: Heun's in x / alpha and the noise level beta / alpha.

    x_s / alpha_s = x_t / alpha_t + (sigma_s - sigma_t) (E_t + E_s) / 2,  sigma = beta / alpha
    (Karras et al. 2022, arXiv:2206.00364, algorithm 1)

    with E = E[x_0 | x] the expected noise. Euler's, which is DDIM, where the noise level ends at 0, as in the paper, and where it starts at
    infinity: on equal steps from noise it is of order 1, for the first noise levels are far apart. It is made for `times.karras`;
    `path_heun` for equal steps.

    Args:
      path: anything with `alpha(t)` and `beta(t)`; EDM starts where beta / alpha is 80.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 2, two evaluations, one in a step at either end of the path.
    Raises:
      TypeError: if `path` is no path.
    """
    noise = functools.partial(targets.convert, path, source=targets.velocity, target=targets.noise)

    checks.path(path)

    def step(field, x, t, dt):
        u, s = field(x, t), t + dt
        end = ddim(path)(lambda x, t: u, x, t, dt)

        def corrected():
            # beta_s - alpha_s beta_t / alpha_t, whose terms differ little between neighbours.
            gone = elapsed(position(path, t), position(path, s))
            change = -gone * size(path, t) * size(path, s) / path.alpha(t)
            return end + change / 2 * (noise(field(end, s), end, s) - noise(u, x, t))

        known = (path.beta(s) > 0) & (path.alpha(t) > 0)
        return lax.cond(anywhere(known), lambda: _where_known(known, corrected(), end), lambda: end)

    return PathStep(path, step)


def path_heun(path) -> PathStep:
    """Heun's step in a time that all paths share: `sampling.heun` on the linear path, on others with nothing evaluated at data.

    z_s = z_t + (c_s - c_t) (y_t + y_s) / 2,  z = x / (alpha + beta),  c = alpha / (alpha + beta),  y = E[x_1 | x] - E[x_0 | x]

    and DDIM's where it ends at beta = 0.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 2, two evaluations, one in a step that ends at beta = 0.
    Raises:
      TypeError: if `path` is no path.
    """

    checks.path(path)

    def step(field, x, t, dt):
        z, slope = enter(path, field, x, t)
        s = t + dt
        here, there = position(path, t), position(path, s)
        gone = elapsed(here, there)
        end = leave(path, x, z, gone * slope, t, dt)

        def corrected():
            return leave(path, x, z, gone / 2 * (slope + enter(path, field, end, s)[1]), t, dt)

        known = there.noise > 0
        return lax.cond(anywhere(known), lambda: _where_known(known, corrected(), end), lambda: end)

    return PathStep(path, step)
