"""Adaptive: a flow followed as finely as a tolerance asks, by diffrax (`pip install "fmjax[adaptive]"`).

A step is accepted where its estimated error is below atol + rtol |x|, in the root mean square over the numbers that share it:
those of one example, so that a sample does not depend on its batch mates, or those of the whole batch.
"""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, states
from fmjax.sampling.checks import check_ends


class AdaptiveSolution(NamedTuple):
    """Where a flow arrived, and what it took."""

    x: Any
    """The end of each trajectory, like x_0; NaN where the steps ran out."""
    steps: jax.Array
    """Accepted or not, of each example, (B,), or of the batch, (). One costs six evaluations with the default solver."""
    reached: jax.Array
    """The time that was reached, likewise: the end, unless the steps ran out."""


def sample_ode_adaptive(
    field, x_0, *, start=0.0, end=1.0, rtol=1e-4, atol=1e-4, solver=None, per_example=True, max_steps=1000, adjoint=None
) -> AdaptiveSolution:
    """Follows a field in steps whose error a pair of Runge-Kutta methods estimates.

    dX = u_t(X) dt    (Dormand and Prince 1980; Tsitouras 2011)

    Args:
      field: (x, t) -> like x; t is a scalar here.
      x_0: where to start, (B, ...), any float dtype, or a pytree of such arrays; the state is float32 or wider.
      start: the first time.
      end: the last time; before `start` to go back, from data to noise.
      rtol: relative tolerance; float32 allows 1e-6 at the least.
      atol: absolute tolerance, likewise.
      solver: one of diffrax's with an error estimate; None for `diffrax.Tsit5()`, another is `diffrax.Dopri5()`.
      per_example: whether each example has steps of its own, where no example may depend on another in `field`; or the batch has them.
      max_steps: how many at most, accepted or not.
      adjoint: one of diffrax's ways to differentiate: None for `diffrax.RecursiveCheckpointAdjoint()`, backwards alone;
        `diffrax.ForwardMode()` or `diffrax.DirectAdjoint()` for forwards, as a Jacobian's product needs.
    Returns:
      An `AdaptiveSolution`.
    Raises:
      ModuleNotFoundError: if diffrax is not installed.
      TypeError: if x_0 is not of floats.
      ValueError: if x_0 is no batch, a tolerance is not positive, or an end is not finite.
      RuntimeError: if the steps run out, with how far it came. Inside `jax.jit` nothing can be raised: x is NaN there.
    """
    try:
        diffrax = importlib.import_module("diffrax")
    except ModuleNotFoundError:
        raise ModuleNotFoundError('Adaptive steps are by diffrax, which is not installed: pip install "fmjax[adaptive]".') from None
    if (layout := states.layout(x_0)) is not None:
        options = {"start": start, "end": end, "rtol": rtol, "atol": atol, "solver": solver, "per_example": per_example}
        options |= {"max_steps": max_steps, "adjoint": adjoint}
        solution = sample_ode_adaptive(layout.field(field), layout.flatten("x_0", x_0), **options)
        return solution._replace(x=layout.unflatten(solution.x, like=x_0))
    if adjoint is not None and not isinstance(adjoint, diffrax.AbstractAdjoint):
        raise TypeError(f"adjoint is {adjoint!r}, but it is one of diffrax's, such as diffrax.ForwardMode().")
    x_0 = checks.batch("x_0", x_0)
    for name, value in (("start", start), ("end", end)):
        checks.number(name, value, "a time")
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.number(name, value, "a tolerance", least=0, above=True)
    checks.whole("max_steps", max_steps, "how many steps are taken at most")
    checks.function("field", field, checks.FIELD)
    dtype = jnp.promote_types(x_0.dtype, jnp.float32)
    field = checks.like_state(field)
    if not isinstance(start, Tracer):
        check_ends(field, x_0.astype(dtype), np.asarray([start], dtype), (0,))

    def slope(t, x, _):
        return field(x, t)

    def follow(x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Tsit5() if solver is None else solver,
            t0=jnp.asarray(start, dtype),
            t1=jnp.asarray(end, dtype),
            dt0=None,
            y0=x,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
            adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
            throw=False,
        )
        arrived = solution.result == diffrax.RESULTS.successful
        return AdaptiveSolution(jnp.where(arrived, solution.ys[0], jnp.nan), solution.stats["num_steps"], solution.ts[0])

    def alone(x):
        solution = follow(x[None])
        return solution._replace(x=solution.x[0])

    x = x_0.astype(dtype)
    solution = (jax.vmap(alone) if per_example else follow)(x)
    if not isinstance(solution.x, Tracer):
        short = np.flatnonzero(np.isnan(np.asarray(solution.x)).reshape(len(x), -1).any(1))
        if short.size:
            reached = np.broadcast_to(solution.reached, len(x))[short]
            raise RuntimeError(
                f"{short.size} of {len(x)} trajectories did not arrive at t = {end:g} in {max_steps} steps; example {short[0]} came to "
                f"t = {reached[0]:g}: give max_steps more, a larger tolerance, or an end before the field is infinite."
            )
    return solution._replace(x=solution.x.astype(x_0.dtype))
