"""Checks of steps, grids, sigma and the ends of a grid, by all samplers."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, paths, targets
from fmjax.sampling.steps import Multistep


def check_step(step, arguments, last=None) -> None:
    """Raises unless a step can be called with these arguments: a maker of steps that was not called, a string, a step of another kind."""
    if isinstance(last, Multistep):
        raise TypeError("last is a Multistep, which has a state, but the last step stands alone: take sampling.euler.")
    for name, each in (("step", step), ("last", last)):
        if each is None and name == "last":
            continue
        stateful = isinstance(each, Multistep)
        wants, called = (_with_state(arguments), each.step) if stateful else (arguments, each)
        wanted = f"({', '.join(wants)}) -> {'(x, state)' if stateful else 'x'}"
        example, made, other = _EXAMPLES[arguments]
        if not callable(called):
            raise TypeError(f"{name} is {each!r}, but it is a function {wanted}, such as sampling.{example}.")
        if not checks.takes(called, wants):
            named = getattr(called, "__name__", type(called).__name__)
            raise TypeError(
                f"{name} is {named}{inspect.signature(called)}, but a step here is {wanted}, such as sampling.{example}: a function that "
                f"makes a step is called first, as in step={made}; {other}."
            )


def _with_state(arguments):
    return (*arguments[:-3], "state", *arguments[-3:])


FLOW = ("field", "x", "t", "dt")
SDE = ("drift", "sigma", "key", "x", "t", "dt")
_EXAMPLES = {
    FLOW: ("heun", "sampling.unipc(path, 2)", "steps with noise are for sample_diffusion and sample_sde"),
    SDE: ("euler_maruyama", "sampling.churn()", "steps without noise are for sample_ode"),
}


def check_ends(field, x_0, times, ends) -> None:
    """Raises where a field cannot be evaluated at an end of the grid, or only with a time per example, wherever their values are known.

    Args:
      field: (x, t) -> like x; (x, t) -> any pytree, for a drift and its sigma.
      x_0: where to start.
      times: the grid.
      ends: which times of it are looked at, such as (0, -1).
    """

    def traced(t):
        return jax.eval_shape(lambda x: field(x, t), x_0)

    # A grid that is an argument of a compiled function is not known, and a time in the middle stands for it.
    seen = [np.asarray(0.5, x_0.dtype)] if isinstance(times, Tracer) else [np.asarray(times)[end] for end in ends]
    try:
        for t in seen:
            traced(t)
    except (IndexError, TypeError, ValueError) as error:
        # Where a time in the middle is taken, or one per example is not either, it is not the shape of the time.
        for other, good in ((np.asarray(0.5, x_0.dtype), True), (np.full(x_0.shape[:1], t), False)):
            try:
                traced(other)
            except Exception:
                if not good:
                    raise error from None
            else:
                if good:
                    raise error from None
        raise TypeError(
            f"The field takes one time per example, (B,), but samplers give one time for the whole batch, of shape () "
            f"({type(error).__name__}: {error}). Begin the field with t = jnp.broadcast_to(t, x.shape[:1]), which takes both."
        ) from error


def evaluated_at_end(step, *arguments) -> bool:
    """Whether a step calls its field at the end of its interval, by a step of numbers alone; False where that cannot be told."""
    seen = []

    def field(x, t):
        seen.append(float(t))
        return 0 * x

    try:
        with jax.ensure_compile_time_eval():
            step(field, *arguments, np.zeros((1, 1), np.float32), 0.0, 1.0)
    except Exception:
        return False
    return 1.0 in seen


def check_sde(key, x_0, step, last) -> None:
    """Raises unless there are keys for the examples, and steps of (2)."""
    checks.key(key, x_0.shape[0])
    check_step(step, SDE, last)


def drift_at_end(step) -> bool:
    """Whether a step of (2) evaluates the drift at the end of its interval."""
    return not isinstance(step, Multistep) and evaluated_at_end(step, np.ones_like, jax.random.key(0))


def check_sigma(sigma, times) -> None:
    """Raises where sigma is no number of at least 0 inside a known grid."""
    if isinstance(times, Tracer):
        return
    first, last = np.asarray(times)[[0, -1]]
    inner = first + (last - first) * np.linspace(0, 1, 34, dtype=times.dtype)[1:-1]
    with jax.ensure_compile_time_eval():
        value = jax.vmap(sigma)(inner)
    if isinstance(value, Tracer):
        return
    value = np.asarray(value).reshape(len(inner), -1)
    wrong, which = np.nonzero(~((value >= 0) & (value < np.inf)))
    if wrong.size:
        raise ValueError(
            f"sigma is {value[wrong[0], which[0]]} at t = {inner[wrong[0]]:g}, but it is finite and at least 0 on all of the grid."
        )


def check_drift(drift, sigma, x_0, times, ends) -> None:
    """Raises where an SDE's steps would meet an infinite drift or sigma at an end of a known grid."""
    check_ends(drift, x_0.astype(times.dtype), times, ends)
    for end in () if isinstance(times, Tracer) else ends:
        with jax.ensure_compile_time_eval():
            value = sigma(np.asarray(times)[end])
        if not isinstance(value, Tracer) and not np.isfinite(value).all():
            raise ValueError(
                f"sigma is {value} at t = {np.asarray(times)[end]:g}, where the step evaluates it: let the grid start later or end "
                "earlier, or take a step that knows the path, such as sampling.ancestral."
            )


def check_domain(path, times) -> None:
    """Raises where a grid leaves the path, or starts where its velocity says nothing of the data, wherever their values are known.

    That is where the velocity's row (a, b) is 0 or in proportion to (alpha, beta), that of the state itself, to all digits but one.
    """
    check_range(times)
    if isinstance(times, Tracer):
        return

    def says(t):
        with jax.ensure_compile_time_eval():
            a, b = targets.velocity(path, t)
            largest = jnp.maximum(jnp.abs(a), jnp.abs(b))
            a, b = (jnp.where(jnp.isinf(entry), jnp.sign(entry), entry / largest) for entry in (a, b))
            alpha, beta = path.alpha(t), path.beta(t)
            return jnp.nan_to_num(jnp.abs(alpha * b - beta * a) / (alpha + beta))

    if isinstance(path, paths.Joint):
        for part in path.parts:
            check_domain(part, times)
        return
    _check_rises(path, times)
    first = np.asarray(times)[0]
    found = says(first)
    if isinstance(found, Tracer) or np.asarray(found) > _LEAST_SAID:
        return
    later = np.geomspace(1e-3, 0.5, 28).astype(np.float32)
    enough = later[(later > first) & (np.asarray(says(later)) > _LEAST_SAID)]
    cure = f", such as times.uniform_grid(n, start={enough[0]:.2g})" if enough.size else ""
    raise ValueError(
        f"The velocity of {path} is 0 or in proportion to the state at t = {first:g} and says nothing of the data there, which this step "
        f"asks for: start the grid later{cure}."
    )


def _check_rises(path, times):
    """Raises where a path loses data on the way, so that a time does not follow from a noise level."""
    first, last = np.asarray(times)[[0, -1]]
    t = first + (last - first) * np.linspace(0, 1, 34, dtype=times.dtype)
    with jax.ensure_compile_time_eval():
        signal = paths.signal_fraction(path, t)
    if isinstance(signal, Tracer):
        return
    falls = np.flatnonzero(np.diff(np.asarray(signal, np.float64)) < -1e-6)
    if falls.size:
        i = int(falls[0])
        raise ValueError(
            f"On {path} alpha / beta falls from t = {t[i]:.3g} to {t[i + 1]:.3g}, but steps that know a path go from noise to data as it "
            "rises: take a step for any field, such as sampling.heun or sampling.euler_maruyama."
        )


_LEAST_SAID = 1e-8
"""Of the data in a velocity, beside 1 for the noise: less is lost to rounding in float32."""


def check_range(times) -> None:
    """Raises where a grid leaves the path, wherever its values are known."""
    if not isinstance(times, Tracer):
        first, last = np.asarray(times)[[0, -1]]
        if first < 0 or last > 1:
            raise ValueError(f"times go from {first:g} to {last:g}, but a path goes from 0, noise, to 1, data.")


def check_steps(order, times) -> None:
    """Raises unless a grid has as many steps as a multistep method needs."""
    if len(times) - 1 < order:
        raise ValueError(
            f"The method has order {order} and needs as many steps, but the grid has {len(times) - 1}: take more steps or a lower order."
        )


def coefficient(sigma: Any) -> Callable[[Any], Any]:
    """sigma as a function of t, of one number for each time; checked wherever its value is known."""
    if not callable(sigma) and (isinstance(sigma, str) or sigma is None or not jnp.issubdtype(jnp.result_type(sigma), jnp.number)):
        raise TypeError(f"sigma is {sigma!r}, but it is a number or a function of t, such as sampling.sigma_beta(path).")

    def checked(value, t):
        value = jnp.asarray(value)
        # Of a joint path each coordinate has its own.
        joint = value.ndim == 2 and value.shape[0] == (jnp.shape(t)[0] if jnp.ndim(t) else 1)
        if value.shape not in ((), jnp.shape(t)) and not joint:
            raise ValueError(
                f"sigma has shape {value.shape}, but it is one number for the whole batch, or a function of t that gives one for each time."
            )
        if not isinstance(value, Tracer) and not (np.asarray(value) >= 0).all():
            raise ValueError(f"sigma is {value}, but it is at least 0.")
        if jnp.iscomplexobj(value):
            raise TypeError(f"sigma has dtype {value.dtype}, but it is a real number of at least 0: give its abs().")
        # In t's dtype, which is the state's: a wider number would widen it.
        return value.astype(jnp.result_type(t))

    if not callable(sigma):
        checked(sigma, 0.0)
        if not isinstance(sigma, Tracer) and not np.isfinite(sigma):
            raise ValueError(f"sigma is {sigma}, but it is a finite number of at least 0.")
    return lambda t: checked(sigma(t) if callable(sigma) else sigma, t)
