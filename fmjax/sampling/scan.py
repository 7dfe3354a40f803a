"""The scan: what follows a field or a stochastic differential equation along a grid.

Grids are arguments of the compiled program, and its size does not depend on their length.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, paths, states
from fmjax.paths import Field
from fmjax.sampling.checks import (
    FLOW,
    check_domain,
    check_drift,
    check_ends,
    check_sde,
    check_sigma,
    check_step,
    coefficient,
    drift_at_end,
    evaluated_at_end,
)
from fmjax.sampling.steps import DiffusionStep, Multistep, PathStep, euler_maruyama, heun


def follow(advance, state, x_0, times, last, save, save_every) -> tuple[chex.ArrayDevice, Any]:
    """Scans advance(index, state, x, t, dt) over the grid, in float32 or wider; a last step that is another follows the scan."""
    x_0 = checks.batch("x_0", x_0)
    dtype = jnp.promote_types(x_0.dtype, jnp.float32)
    times = checks.grid(times, dtype)
    # Where the grid is known it stays so inside `jax.jit`, for the checks of multistep methods.
    with jax.ensure_compile_time_eval():
        scanned = times if last is None else times[:-1]
    steps = len(times) - 1 - (last is not None)
    if not steps:
        raise ValueError("times has one step, but there is another last step: take two steps at least, or leave `last` out.")
    if not isinstance(save_every, int | np.integer) or not 1 <= save_every <= steps or steps % save_every:
        raise ValueError(
            f"save_every is {save_every}, but a grid of {steps} steps can save the states after every k-th only where k divides {steps}."
        )

    def body(carry, interval):
        (state, x), (index, t, dt) = carry, interval
        state, x = advance(index, state, x, t, dt)
        return (state, x), None if save is None or save_every > 1 else save(x, t + dt)

    def several(carry, intervals):
        (state, x), _ = lax.scan(body, carry, intervals)
        return (state, x), save(x, intervals[1][-1] + intervals[2][-1])

    carry = state(x_0.astype(dtype), scanned), x_0.astype(dtype)
    intervals = jnp.arange(steps), scanned[:-1], jnp.diff(scanned)
    if save is None or save_every == 1:
        (_, x), saved = lax.scan(body, carry, intervals)
    else:
        (_, x), saved = lax.scan(several, carry, jax.tree.map(lambda a: a.reshape(-1, save_every), intervals))
    states = [] if save is None else [_alone(save(x_0.astype(dtype), times[0])), saved]
    if last is not None:
        before, x = x, last(steps, x, times[-2], times[-1] - times[-2])
        checks.like("The last step's output", x, before)
        states += [] if save is None else [_alone(save(x, times[-1]))]
    return x.astype(x_0.dtype), jax.tree.map(lambda *parts: jnp.concatenate(parts), *states) if states else None


def _alone(saved):
    """What was saved of one state, with the leading axis of those of many."""
    return jax.tree.map(lambda value: jnp.asarray(value)[None], saved)


def sample_ode(
    field, x_0, times, *, step: Callable[..., Any] | Multistep = heun, last=None, save=None, save_every=1
) -> tuple[chex.ArrayDevice, Any]:
    """Follows a field along a grid: the flow, (1) of `fmjax.sampling`, from noise to data.

    X_{i+1} = step(field, X_i, t_i, t_{i+1} - t_i)    (MIT 6.S184, "Sampling from a Flow Model", which stops a step short)

    Outside `jax.jit` each call compiles anew: `sample = jax.jit(lambda params, x_0: sample_ode(field(params), x_0, times)[0])`.

    Args:
      field: (x, t) -> like x; t is a scalar here.
      x_0: where to start, (B, ...), any float dtype, or a pytree of such arrays; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(field, x, t, dt) -> x`, to which a pytree is one array (B, D): `heun`, the default, of two evaluations, the
        second at t + dt; `euler`, `midpoint`, `rk4`, or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `euler` after `heun`, so that nothing is evaluated at the end.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      save_every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / save_every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / save_every + 2.
    Raises:
      TypeError: if x_0 is not of floats, the step is of another kind, or the field takes only a time per example.
      ValueError: if the grid does not increase, the field is infinite at a known end of it, its output has another shape than x, a
        multistep method needs more steps than there are, or `save_every` does not divide their number.
    """
    check_step(step, FLOW, last)
    checks.function("field", field, checks.FIELD)
    for each in (step, last):
        if isinstance(each, PathStep | Multistep) and each.path is not None:
            paths.fits(each.path, x_0)
    if (layout := states.layout(x_0)) is not None:
        field, flat, save = layout.field(field), layout.flatten("x_0", x_0), layout.of_state(save)
        x_1, saved = sample_ode(field, flat, times, step=step, last=last, save=save, save_every=save_every)
        return layout.unflatten(x_1, like=x_0), saved
    final = step if last is None else last
    x_0 = checks.batch("x_0", x_0)
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    at_end = not isinstance(final, Multistep | PathStep) and evaluated_at_end(final)
    if isinstance(step, PathStep):
        check_domain(step.path, times)
    field = checks.like_state(field)
    check_ends(field, x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32)), times, (0, -1) if at_end else (0,))

    def advance(index, state, x, t, dt):
        if isinstance(step, Multistep):
            return step.step(field, state, x, t, dt)[::-1]
        return None, step(field, x, t, dt)

    end = last and (lambda index, x, t, dt: last(field, x, t, dt))
    return follow(advance, _initial(step), x_0, times, end, save, save_every)


def sample_sde(
    drift, sigma, key, x_0, times, *, step: Callable[..., Any] | Multistep = euler_maruyama, last=None, save=None, save_every=1
) -> tuple[chex.ArrayDevice, Any]:
    """Follows an SDE without a path, (2) of `fmjax.sampling`, along a grid: Brownian motion, Ornstein-Uhlenbeck, Langevin.

    X_{i+1} = step(drift, sigma, key_i, X_i, t_i, t_{i+1} - t_i)    (MIT 6.S184, "Sampling from a Diffusion Model")

    Data are sampled by `sample_diffusion`, which makes the drift from the path and sigma. Example i's noise depends on the key, on i
    and on the number of the step, not on the size of the batch (see `noise`). Outside `jax.jit` each call compiles anew.

    Args:
      drift: (x, t) -> like x; t is a scalar here.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
      key: a typed key; or one per example, (B,), of which example i then depends on the i-th alone.
      x_0: where to start, (B, ...), any float dtype, or a pytree of such arrays; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(drift, sigma, key, x, t, dt) -> x`: `euler_maruyama`, or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `euler_maruyama_noiseless`, or yours.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      save_every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / save_every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / save_every + 2.
    Raises:
      TypeError: if x_0 is not of floats, the key is not typed, or the step is of another kind, such as one that knows a path.
      ValueError: if the grid does not increase, the keys are neither one nor one per example, the drift's output has
        another shape than x, a multistep method needs more steps than there are, or `save_every` does not divide their number.
    """
    for each in (step, last):
        if isinstance(each, DiffusionStep):
            raise TypeError(
                f"step is {each!r}, which knows a path: give it to sample_diffusion(path, velocity, sigma, ...), which takes the velocity, "
                "not the drift."
            )
    checks.function("drift", drift, "sampling.langevin(score, sigma)")
    if (layout := states.layout(x_0)) is not None:
        checks.function("drift", drift, "sampling.langevin(score, sigma)")
        drift, flat, save = layout.field(drift), layout.flatten("x_0", x_0), layout.of_state(save)
        x_1, saved = sample_sde(drift, sigma, key, flat, times, step=step, last=last, save=save, save_every=save_every)
        return layout.unflatten(x_1, like=x_0), saved
    x_0, sigma = checks.batch("x_0", x_0), coefficient(sigma)
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    drift = checks.like_state(drift)
    check_sde(key, x_0, step, last)
    check_sigma(sigma, times)
    check_drift(drift, sigma, x_0, times, (0, -1) if drift_at_end(step if last is None else last) else (0,))
    return follow_sde(drift, sigma, key, x_0, times, step, last, save, save_every)


def follow_sde(drift, sigma, key, x_0, times, step, last, save, save_every) -> tuple[chex.ArrayDevice, Any]:
    """The scan of an SDE, whose arguments are checked."""
    fold_in = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in

    def advance(index, state, x, t, dt):
        key_step = fold_in(key, index)
        if isinstance(step, Multistep):
            return step.step(drift, sigma, key_step, state, x, t, dt)[::-1]
        return None, step(drift, sigma, key_step, x, t, dt)

    end = last and (lambda index, x, t, dt: last(drift, sigma, fold_in(key, index), x, t, dt))
    return follow(advance, _initial(step), x_0, times, end, save, save_every)


def _initial(step):
    """The state of a step at the start."""
    return step.init if isinstance(step, Multistep) else lambda x, times: None


def reverse(field, times) -> tuple[Field, chex.ArrayDevice]:
    """The field and the grid from data back to noise, for `sample_ode`.

    dX_s = -u_t(X_s) ds,  t = t_0 + t_n - s

    Args:
      field: (x, t) -> like x.
      times: an increasing grid, (n + 1,).
    Returns:
      A field and an increasing grid from t_0 to t_n, whose steps are those of `times` in the other order.
    Raises:
      TypeError: if the field is no function.
      ValueError: if the grid does not increase.
    """
    # Numbers that are known stay so inside `jax.jit`, for the checks of samplers.
    times = times if isinstance(times, Tracer) else np.asarray(checks.grid(times, jnp.result_type(float)))
    checks.function("field", field, checks.FIELD)
    both = times[0] + times[-1]

    def backwards(x, s):
        value = field(x, both - s)
        if states.layout(x) is not None:
            return jax.tree.map(jnp.negative, value)
        checks.like("The field's output", value, x)
        return -value

    return backwards, both - times[::-1]
