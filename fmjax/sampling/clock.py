"""The clock of a path: what its steps are taken in, whatever the path's own time.

z = x / (alpha + beta) moves on the linear path with the clock c = alpha / (alpha + beta), from 0 at noise to 1 at data. A position
holds c and 1 - c, each of which is exact to its last digits where it is small, so that steps between neighbours in any clock are
too: in c alone, two times near data, or near noise in (1 - c)^2, may be one float.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks, targets
from fmjax.sampling.scan import PathStep

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2
"""Gauss's rule on [0, 1]."""


class Position(NamedTuple):
    """Where a path is at a time."""

    data: jax.Array
    """c, the share of the data."""
    noise: jax.Array
    """1 - c."""


def position(path, t):
    """The position of a path at times of any shape."""
    alpha, beta = path.alpha(t), path.beta(t)
    return Position(alpha / (alpha + beta), beta / (alpha + beta))


def ahead(start, end):
    """How far the clock goes from one position to another, from the shares that are small."""
    return jnp.where(start.data < 0.5, end.data - start.data, start.noise - end.noise)


def between(start, step, share):
    """The position a share of a step after a start."""
    return Position(start.data + share * step, start.noise - share * step)


# Clocks for polynomials: each a function of a position and an origin that is their difference in a variable k(c), up to a factor.


def identity(position, origin):
    """k = c."""
    return ahead(origin, position)


def squared_noise(position, origin):
    """k = (1 - c)^2, in which the expected data come to rest at data as they should (see `fmjax.solvers`)."""
    return ahead(origin, position) * (origin.noise + position.noise)


def squared_data(position, origin):
    """k = c^2, the same for the expected noise at noise."""
    return ahead(origin, position) * (origin.data + position.data)


def log_ratio(position, origin):
    """k = log(alpha / beta), what the papers of `dpm_solver_pp`, `unipc` and `deis` interpolate in; infinite at noise and at data."""
    return jnp.log(position.data / origin.data) - jnp.log(position.noise / origin.noise)


def enter(path, velocity, x, t):
    """z, and its slope dz/dc = D - E."""
    slope = targets.convert(path, velocity(x, t), x, t, source=targets.velocity, target=lambda _, t: (jnp.ones_like(t), -jnp.ones_like(t)))
    return x / size(path, t), slope


def leave(path, x, z, moved, t, dt):
    """x at t + dt where z has moved: x and what is added to it, so that small steps are not rounded with z."""
    before, after = size(path, t), size(path, t + dt)
    return x + ((after - before) * z + after * moved)


def size(path, t):
    """alpha + beta, by which x is larger than z."""
    return path.alpha(t) + path.beta(t)


def noise_kept(start, end):
    """rho, the noise level at the end of a step over that at its start: 0 where it starts at noise or ends at data."""
    known = (start.data > 0) & (start.noise > 0) & (end.data > 0) & (end.noise > 0)
    return jnp.where(known, 1 - ahead(start, end) / jnp.where(known, end.data * start.noise, 1), 0)


def basis_weights(clock, nodes, known, start, end, kernel):
    """int_start^end kernel(r) l_j'(r) dr for the polynomials l_j that are 1 at one node and 0 at the start and at the other nodes.

    Args:
      clock: what the polynomials are in, a function of a position and an origin.
      nodes: positions, (n,), the newest first.
      known: which of them there are, (n,).
      start: a position.
      end: another.
      kernel: a function of positions and of their shares of the step.
    Returns:
      Weights, (n,): 0 for what is not known or coincides with the start or with a newer node, and where a clock is infinite.
    """
    step = ahead(start, end)
    usable = jnp.isfinite(clock(end, start))
    # Other numbers in the place of what is unknown, all distinct, so that nothing is divided by zero, in derivatives neither.
    origin = jax.tree.map(lambda a: jnp.where(usable, a, 0.5), start)
    within = jnp.where(usable, step, 0.25)
    known = known & usable & jnp.isfinite(clock(nodes, origin))
    offsets = clock(jax.tree.map(lambda a: jnp.where(known, a, 0.25), nodes), origin)
    known = known & (offsets != 0)
    newer = np.tri(len(known), k=-1, dtype=bool)
    known = known & ~((offsets[:, None] == offsets[None, :]) & known[None, :] & newer).any(1)
    offsets = jnp.where(known, offsets, 1 + jnp.arange(len(known), dtype=step.dtype))
    others = known[None, :] & ~np.eye(len(known), dtype=bool)
    gaps = jnp.where(others, offsets[:, None] - offsets[None, :], 1)

    shares = jnp.asarray(NODES, step.dtype)
    k, moves = jax.jvp(lambda share: clock(between(origin, within, share), origin), (shares,), (jnp.ones_like(shares),))
    # l_j is a product, whose derivative is the sum of what is left where one factor after the other gives way to its own.
    away = (k[:, None] - offsets[None])[:, None, :]
    factors = jnp.concatenate([k[:, None, None] / offsets[None, :, None], jnp.where(others[None], away / gaps[None], 1)], -1)
    rates = jnp.concatenate([1 / offsets[:, None], jnp.where(others, 1 / gaps, 0)], -1)
    rest = jnp.where(np.eye(len(known) + 1, dtype=bool)[None, None], 1, factors[:, :, None, :]).prod(-1)
    slopes = moves[:, None] * (rates[None] * rest).sum(-1)
    return jnp.where(known, jnp.asarray(WEIGHTS, step.dtype) * kernel(between(start, step, shares), shares) @ slopes, 0)


def combine(weights, values):
    """sum_j w_j values_j."""
    return jnp.tensordot(weights.astype(values.dtype), values, 1)


def push(value, values, length):
    """The newest in front of the others, as many as are kept; of arrays or of positions."""
    return jax.tree.map(lambda value, values: jnp.concatenate([value[None], values])[:length], value, values)


def heun(path):
    """Heun's step in the path's clock: `sampling.heun` on the linear path, on others with nothing evaluated at data    (1).

    z_s = z + (s - c) (y + y_s) / 2,  y = D - E;  DDIM's where it ends at beta = 0

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
    Returns:
      A step for `sampling.sample_ode` along a velocity: order 2, two evaluations, one in a step that ends at beta = 0.
    """

    checks.path(path)

    def step(field, x, t, dt):
        z, slope = enter(path, field, x, t)
        s = t + dt
        here, there = position(path, t), position(path, s)
        gone = ahead(here, there)
        end = leave(path, x, z, gone * slope, t, dt)

        def corrected():
            return leave(path, x, z, gone / 2 * (slope + enter(path, field, end, s)[1]), t, dt)

        return lax.cond(there.noise > 0, corrected, lambda: end)

    return PathStep(path, step)
