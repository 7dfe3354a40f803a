"""Likelihood: log p(x) under a flow, by the change of variables along its trajectories.

    d/dt log p_t(X_t) = -div u_t(X_t),   log p_1(X_1) = log p_0(X_0) - int_0^1 div u_t(X_t) dt        (1)

The divergence is a trace, exact or estimated with probes e of mean 0 and covariance I,

    div u = tr J,   J = du/dx                                 `exact_divergence`, a product with J for every dimension  (2)
          = E e^T J e                                         `hutchinson`, a product for every probe        (3)
          = tr Q^T J Q + E e^T (I - Q Q^T) J (I - Q Q^T) e    `hutch_plus_plus`, Q spanning J sketch         (4)

A divergence is a function `(field, x, t) -> (u, div u)`, so write your own where a network knows it. Probes are arguments, drawn
once by the caller, so that a trajectory has one integrand from end to end and a solver keeps its order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax import checks, sampling, states
from fmjax.sampling.checks import check_ends

__all__ = [
    "log_density",
    "sample",
    "Density",
    "normal",
    "exact_divergence",
    "hutchinson",
    "hutch_plus_plus",
    "dequantize",
    "bits_per_dimension",
]


class Density(NamedTuple):
    """What a flow says of points."""

    log_p: jax.Array
    """log p_1(x_1) in nats, (B,); the mean over the probes where there are any."""
    standard_error: jax.Array
    """Of log_p over the probes, (B,): 0 without probes, NaN from one probe, which cannot tell."""
    x: Any
    """The other end of each trajectory, (B, ...), or a pytree like the state."""


def exact_divergence(field, x, t, *, block=16) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The field and its divergence, the trace of each example's Jacobian.

    div u = tr J,   J = du/dx        (2)

    Args:
      field: (x, t) -> like x, in which no example depends on another.
      x: states, (B, ...).
      t: a time.
      block: dimensions whose products are computed at once, which bounds the memory.
    Returns:
      u, like x, and div u, (B,).
    Raises:
      ValueError: if `block` is not a whole number of at least 1.
    """
    checks.whole("block", block, "how many products are computed at once")
    if (layout := states.layout(x)) is not None:
        u, trace = exact_divergence(layout.field(field), layout.flatten("x", x), t, block=block)
        return layout.unflatten(u, like=x), trace
    u, push = _linearize(field, x, t)
    dimensions = x[0].size
    basis = jnp.eye(dimensions, dtype=x.dtype).reshape(dimensions, *x.shape[1:])
    entries = lax.map(lambda e: _dot(e[None], push(jnp.broadcast_to(e, x.shape))), basis, batch_size=min(block, dimensions))
    return u, entries.sum(0)


def _linearize(field, x, t):
    """The field at x, and products with its derivative."""
    checks.function("field", field, checks.FIELD)
    return jax.linearize(lambda x: checks.like_state(field)(x, t), checks.batch("x", x))


def hutchinson(probes) -> Callable:
    """Hutchinson's estimate of the divergence.

    div u = E e^T J e        (3) (Hutchinson 1989; Grathwohl et al. 2019, arXiv:1810.01367)

    Args:
      probes: e, (B, k, ...), k for each example, or a pytree of them like the state; of mean 0 and covariance I:
        `jax.random.rademacher(key, (B, k, ...), float)` scatters less than normal ones.
    Returns:
      A divergence, (field, x, t) -> u, like x, and e^T J e of each probe, (B, k).
    Raises:
      ValueError: of the divergence, if the probes have not x's shape.
    """

    def divergence(field, x, t):
        if (layout := states.layout(x)) is not None:
            u, trace = divergence(layout.field(field), layout.flatten("x", x), t)
            return layout.unflatten(u, like=x), trace
        each = _probes("probes", probes, x)
        u, push = _linearize(field, x, t)
        return u, jax.vmap(lambda e: _dot(e, push(e)), 1, 1)(each)

    return divergence


def hutch_plus_plus(sketch, probes) -> Callable:
    """Hutch++: exact on the span of J sketch, Hutchinson's on the rest.

    div u = tr Q^T J Q + E e^T (I - Q Q^T) J (I - Q Q^T) e        (4) (Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649)

    Args:
      sketch: (B, m, ...), probes that find where J is large; at most as many as x has dimensions.
      probes: e, (B, k, ...), as for `hutchinson`.
    Returns:
      A divergence, (field, x, t) -> u, like x, and the estimate of each probe, (B, k), by 2 m + k products with J. Derivatives
        hold Q, which depends on x too: their mean over the probes is the derivative of the divergence.
    Raises:
      ValueError: of the divergence, if m is above the number of dimensions, or probes have not x's shape.
    """

    def divergence(field, x, t):
        if (layout := states.layout(x)) is not None:
            u, trace = divergence(layout.field(field), layout.flatten("x", x), t)
            return layout.unflatten(u, like=x), trace
        seen, each = _probes("sketch", sketch, x), _probes("probes", probes, x)
        if seen.shape[1] > x[0].size:
            raise ValueError(
                f"sketch has {seen.shape[1]} probes per example, but x of shape {x.shape} has only {x[0].size} dimensions: use "
                "`exact_divergence`."
            )
        u, push = _linearize(field, x, t)

        def times_j(vectors):
            """(B, m, D) to J times each."""
            pushed = jax.vmap(push, 1, 1)(vectors.reshape(*vectors.shape[:2], *x.shape[1:]))
            return pushed.reshape(vectors.shape)

        flat = (x.shape[0], -1, math.prod(x.shape[1:]))
        # Held in derivatives, which stay unbiased since (4) holds for any Q: where J has not full rank, Q has none.
        q = lax.stop_gradient(jnp.linalg.qr(times_j(seen.reshape(flat)).swapaxes(1, 2))[0].swapaxes(1, 2))
        product = functools.partial(jnp.einsum, precision="highest")
        known = product("bmd,bmd->b", q, times_j(q))
        rest = each.reshape(flat)
        rest = rest - product("bkd,bmd,bme->bke", rest, q, q)
        return u, known[:, None] + product("bkd,bkd->bk", rest, times_j(rest))

    return divergence


def log_density(field, log_density_0, x_1, times, *, divergence=exact_divergence, step=sampling.rk4) -> Density:
    """The log density of data under the flow of a field that starts from p_0.

    log p_1(x_1) = log p_0(x_0) - int_0^1 div u_t(X_t) dt        (1)

    Args:
      field: (x, t) -> like x, a velocity in which no example depends on another.
      log_density_0: x_0 -> (B,), of the noise; see `normal`.
      x_1: data, (B, ...), any float dtype.
      times: an increasing grid, (n + 1,), as for `sampling.sample_ode`; it is followed from its end to its start.
      divergence: `exact_divergence`, `hutchinson(probes)`, `hutch_plus_plus(sketch, probes)` or yours.
      step: one step, as for `sampling.sample_ode`.
    Returns:
      A `Density`, whose x is x_0, the noise that the data come from.
    Raises:
      TypeError: if x_1 is not of floats.
      ValueError: if the grid does not increase, probes do not have x's shape, or a trace or log_density_0 is not one per example.
    """
    checks.function("divergence", divergence, "likelihood.exact_divergence")
    if (layout := states.layout(x_1)) is not None:
        field, flat, of_noise = layout.field(field), layout.flatten("x_1", x_1), layout.of_state(log_density_0)
        found = log_density(field, of_noise, flat, times, divergence=divergence, step=step)
        return found._replace(x=layout.unflatten(found.x, like=x_1))
    backwards, times = sampling.reverse(field, times)

    def rate(backwards, x, t):
        u, trace = divergence(backwards, x, t)
        return u, -trace

    x_0, integral = _integrate(backwards, rate, x_1, times, step)
    return _density(_log_density_0(log_density_0, x_0), integral, x_0.astype(jnp.asarray(x_1).dtype))


def sample(field, log_density_0, x_0, times, *, divergence=exact_divergence, step=sampling.rk4) -> Density:
    """`sampling.sample_ode` that knows the density of what it samples.

    log p_1(x_1) = log p_0(x_0) - int_0^1 div u_t(X_t) dt        (1)

    Args:
      field: (x, t) -> like x, a velocity in which no example depends on another.
      log_density_0: x_0 -> (B,), of the noise; see `normal`.
      x_0: where to start, (B, ...), any float dtype.
      times: an increasing grid, (n + 1,).
      divergence: `exact_divergence`, `hutchinson(probes)`, `hutch_plus_plus(sketch, probes)` or yours.
      step: one step, as for `sampling.sample_ode`.
    Returns:
      A `Density`, whose x is x_1.
    Raises:
      TypeError: if x_0 is not of floats.
      ValueError: if the grid does not increase, probes do not have x's shape, or a trace or log_density_0 is not one per example.
    """
    if (layout := states.layout(x_0)) is not None:
        field, flat, of_noise = layout.field(field), layout.flatten("x_0", x_0), layout.of_state(log_density_0)
        found = sample(field, of_noise, flat, times, divergence=divergence, step=step)
        return found._replace(x=layout.unflatten(found.x, like=x_0))
    x_1, integral = _integrate(field, divergence, x_0, times, step)
    return _density(_log_density_0(log_density_0, x_0), integral, x_1.astype(jnp.asarray(x_0).dtype))


def normal(x) -> chex.ArrayDevice:
    """The standard normal log density of each example.

    log p(x) = -|x|^2 / 2 - d / 2 log(2 pi)

    Noise c times as large, as of `paths.ScaledNoise`, has the log density normal(x / c) - d log(c).

    Args:
      x: (B, ...), any float dtype, or a pytree of such arrays.
    Returns:
      (B,), in nats, float32 or wider.
    Raises:
      TypeError: if x is not of floats.
      ValueError: if x is no batch.
    """
    if (layout := states.layout(x)) is not None:
        x = layout.flatten("x", x)
    x = _examples(x)
    return -(x**2 + jnp.log(2 * jnp.pi)).reshape(x.shape[0], -1).sum(-1) / 2


def dequantize(key, x, width) -> chex.ArrayDevice:
    """Data of discrete levels spread over their cells.

    x + width (u - 1/2),  u ~ Unif[0, 1]    (Theis, van den Oord and Bethge 2016, arXiv:1511.01844)

    Args:
      key: a typed key.
      x: data, (B, ...), any float dtype, or a pytree of such arrays.
      width: between two levels: 2 / 255 where 0 to 255 became -1 to 1.
    Returns:
      Data, like x, in float32 or wider: half precision has no numbers between the levels.
    Raises:
      TypeError: if the key is not typed, or x is not of floats.
      ValueError: if width is not one positive number.
    """
    checks.key(key)
    if (layout := states.layout(x)) is not None:
        return layout.unflatten(dequantize(key, layout.flatten("x", x), width))
    x = _examples(x)
    _check_width(width)
    return x + jnp.asarray(width, x.dtype) * (jax.random.uniform(key, x.shape, x.dtype) - 0.5)


def bits_per_dimension(log_p, shape, width) -> chex.ArrayDevice:
    """Bits per dimension of discrete data, from the log density of data that were dequantized.

    -log_2(p) / d - log_2(width)    (Theis et al. 2016, arXiv:1511.01844)

    which is in expectation at least the bits of the levels themselves.

    Args:
      log_p: log p, in nats, any shape.
      shape: of one example, whose product is d.
      width: between two levels.
    Returns:
      Bits, like log_p.
    Raises:
      ValueError: if shape is not of positive whole numbers, or width not one positive number.
    """
    _check_width(width)
    if not isinstance(shape, Sequence) or not all(isinstance(size, int | np.integer) and size > 0 for size in shape):
        raise ValueError(f"shape is {shape!r}, but it is the shape of one example, whole numbers of at least 1: give x.shape[1:].")
    return -log_p / (math.prod(shape) * jnp.log(2)) - jnp.log2(width)


def _check_width(width):
    """Raises unless the width between levels is one positive number."""
    checks.number("width", width, "the step between two levels, 2 / 255 for images in [-1, 1]", least=0, above=True)


def _examples(x):
    """Examples in float32 or wider: a density is a sum over many dimensions, of which half precision would keep two or three digits."""
    x = checks.batch("x", x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _log_density_0(log_density_0, x):
    """The density of the noise of each example, checked."""
    checks.function("log_density_0", log_density_0, "likelihood.normal")
    value = jnp.asarray(log_density_0(x))
    if jnp.shape(value) != x.shape[:1]:
        raise ValueError(
            f"log_density_0 gives shape {jnp.shape(value)}, but it is one number per example, {x.shape[:1]}: sum over the axes of one "
            "example, as .sum(-1) does for vectors, or take [:, 0] of one column."
        )
    return value


def _integrate(field, divergence, x, times, step):
    """The end of the trajectories, and the integral of the divergence along them: one state with a column more, or k."""
    x = _examples(x)
    checks.function("field", field, checks.FIELD)
    checks.function("divergence", divergence, "likelihood.exact_divergence")
    times = checks.grid(times, x.dtype)
    check_ends(checks.like_state(field), x, times, (0,))
    shape = x.shape
    traces = jax.eval_shape(lambda x, t: divergence(field, x, t)[1], x, times[0]).shape
    if traces[:1] != shape[:1] or len(traces) > 2 or 0 in traces[1:]:
        raise ValueError(
            f"The divergence gives a trace of shape {traces}, but it is one number per example, {shape[:1]}, or one per probe, "
            f"({shape[0]}, k): sum over the axes of one example."
        )
    columns = traces[1:]
    count = math.prod(columns)

    def both(z, t):
        u, trace = divergence(field, z[:, : z.shape[1] - count].reshape(shape), t)
        checks.like("The field's output", u, z[:, : z.shape[1] - count].reshape(shape))
        return jnp.concatenate([u.reshape(z.shape[0], -1), trace.reshape(z.shape[0], -1)], axis=1)

    z = jnp.concatenate([x.reshape(x.shape[0], -1), jnp.zeros((x.shape[0], count), x.dtype)], axis=1)
    z, _ = sampling.sample_ode(both, z, times, step=step)
    return z[:, : z.shape[1] - count].reshape(shape), z[:, z.shape[1] - count :].reshape(x.shape[0], *columns)


def _density(log_p_0, integral, x):
    """The mean over the columns, if there are any."""
    if integral.ndim == 1:
        return Density(log_p_0 - integral, jnp.zeros_like(integral), x)
    count = integral.shape[1]
    error = jnp.std(integral, axis=1, ddof=1) / jnp.sqrt(count) if count > 1 else jnp.full(x.shape[0], jnp.nan, integral.dtype)
    return Density(log_p_0 - integral.mean(1), error, x)


def _probes(name, probes, x):
    """Probes in x's dtype, checked."""
    if states.layout(probes) is not None:
        leaves = [checks.floats(name, leaf) for leaf in jax.tree.leaves(probes)]
        probes = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    probes = checks.floats(name, probes)
    if 0 in probes.shape:
        raise ValueError(f"{name} has shape {probes.shape}, but an estimate needs at least one probe.")
    if probes.ndim != x.ndim + 1 or (probes.shape[0], *probes.shape[2:]) != x.shape:
        wanted = ", ".join(map(str, (x.shape[0], "k", *x.shape[1:])))
        raise ValueError(f"{name} has shape {probes.shape}, but for x of shape {x.shape} it must be ({wanted}): k probes per example.")
    return jnp.asarray(probes, x.dtype)


def _dot(a, b):
    """Of each example, (B,)."""
    return (a * b).reshape(b.shape[0], -1).sum(-1)
