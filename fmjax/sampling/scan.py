"""The scan: steps for flows and for stochastic differential equations without a path, and what follows them.

A step for (1) of `fmjax.sampling` is a function `(field, x, t, dt) -> x`; a step for (2) is `(drift, sigma, key, x, t, dt) -> x`,
which draws by `noise(key, x.shape)`; one that remembers is a `Multistep`. Grids are arguments of the compiled program and its size
does not depend on their length.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, paths, targets


class Multistep(NamedTuple):
    """A step that remembers: what it needs of the past is carried through the scan."""

    init: Callable[..., Any]
    """(x, times) -> memory, any pytree of arrays."""
    step: Callable[..., Any]
    """(field, memory, x, t, dt) -> (x, memory); in `sample_sde` (drift, sigma, key, memory, x, t, dt) -> (x, memory)."""


class DiffusionStep:
    """A step of (3) of `fmjax.sampling` that knows the path, for `sample_diffusion`, which gives it what it knows.

    Args:
      step: (path, velocity, sigma, key, x, t, dt) -> x; with an `init`, (path, velocity, sigma, key, memory, x, t, dt) -> (x, memory).
      init: (path, x, times) -> what the step remembers at the start, any pytree of arrays.
      at_end: (path) -> whether the velocity is evaluated at the end of a step too, where some paths' is infinite.
      within: the step of any SDE that this one takes in it, of the drift.
    """

    def __init__(self, step, init=None, *, at_end=lambda path: False, within=None):
        self.step, self.init, self.at_end, self.within = step, init, at_end, within
        self.__name__, self.__doc__ = getattr(step, "__name__", "step"), step.__doc__

    def __repr__(self):
        return f"DiffusionStep({self.__name__})"


def euler(field, x, t, dt):
    """X_{t+h} = X_t + h u_t(X_t): order 1, one evaluation    (notes 003, "Euler Method")."""
    return x + dt * field(x, t)


def heun(field, x, t, dt):
    """The trapezium rule with an Euler predictor: order 2, two evaluations, the second at t + dt    (Heun 1900)."""
    k_1 = field(x, t)
    k_2 = field(x + dt * k_1, t + dt)
    return x + dt / 2 * (k_1 + k_2)


def midpoint(field, x, t, dt):
    """An Euler step with the slope at the middle: order 2, two evaluations, none at t + dt    (Runge 1895)."""
    k_1 = field(x, t)
    return x + dt * field(x + dt / 2 * k_1, t + dt / 2)


def ralston(field, x, t, dt):
    """The step of order 2 with the least bound on its error: two evaluations, none at t + dt    (Ralston 1962)."""
    k_1 = field(x, t)
    k_2 = field(x + 2 * dt / 3 * k_1, t + 2 * dt / 3)
    return x + dt / 4 * (k_1 + 3 * k_2)


def rk4(field, x, t, dt):
    """The classical Runge-Kutta step: order 4, four evaluations    (Kutta 1901)."""
    k_1 = field(x, t)
    k_2 = field(x + dt / 2 * k_1, t + dt / 2)
    k_3 = field(x + dt / 2 * k_2, t + dt / 2)
    k_4 = field(x + dt * k_3, t + dt)
    return x + dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def euler_maruyama(drift, sigma, key, x, t, dt):
    """X_{t+h} = X_t + h u_t(X_t) + sqrt(h) sigma_t epsilon: one evaluation    (notes 003, "Euler-Maruyama method").

    Weak order 1; strong order 1 too, since sigma_t does not depend on X.
    """
    return x + dt * drift(x, t) + jnp.sqrt(dt) * sigma(t) * noise(key, x.shape, x.dtype)


def stochastic_heun(drift, sigma, key, x, t, dt):
    """The trapezium rule for drift and noise alike, with an Euler-Maruyama predictor    (Kloeden and Platen 1992, section 15.1).

    Weak order 2, two evaluations, the second at t + dt: on a path the drift must be finite there, so let `last` be another.
    """
    xi = jnp.sqrt(dt) * noise(key, x.shape, x.dtype)
    k_1 = drift(x, t)
    k_2 = drift(x + dt * k_1 + sigma(t) * xi, t + dt)
    return x + dt / 2 * (k_1 + k_2) + (sigma(t) + sigma(t + dt)) / 2 * xi


def mean(drift, sigma, key, x, t, dt):
    """Euler and Maruyama's step without its noise, as a last step    ("Mean" of SiT, Ma et al. 2024)."""
    return x + dt * drift(x, t)


def noise(key, shape, dtype=jnp.float32):
    """Standard normal noise in which example i depends on the key and on i, not on the size of the batch.

    JAX's default generator hashes the key with each number's place, and examples come first; so from one key a smaller
    batch is the head of a larger one. Any part of a batch can be drawn alone where each example has its own key.

    Args:
      key: a typed key; or one an example, (B,), of which example i then depends on the i-th alone.
      shape: (B, ...).
      dtype: a float dtype.
    Returns:
      Noise of that shape.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if there is neither one key nor one an example.
    """
    checks.key(key, shape[0])
    # In rows, whose numbers are the same and whose program XLA compiles in a fifth of the time that one of images takes.
    n, size = shape[0], math.prod(shape[1:])
    if key.ndim == 0:
        return jax.random.normal(key, (n, size), dtype).reshape(shape)
    # Of the generators only the default one draws the same under `vmap` as alone.
    over = jax.vmap if jax.random.key_impl(key) == "threefry2x32" else lambda draw: functools.partial(lax.map, draw)
    return over(lambda key: jax.random.normal(key, (size,), dtype))(key).reshape(shape)


def check_step(step, arguments, last=None):
    """Raises unless a step can be called with these arguments: a maker of steps that was not called, a string, a step of another kind."""
    if isinstance(last, Multistep):
        raise TypeError("last is a Multistep, which remembers steps before it, but the last step stands alone: take sampling.euler.")
    for name, each in (("step", step), ("last", last)):
        if each is None and name == "last":
            continue
        remembers = isinstance(each, Multistep)
        wants, called = (_remembering(arguments), each.step) if remembers else (arguments, each)
        wanted = f"({', '.join(wants)}) -> {'(x, memory)' if remembers else 'x'}"
        example, made, other = _EXAMPLES[arguments]
        if not callable(called):
            raise TypeError(f"{name} is {each!r}, but it is a function {wanted}, such as sampling.{example}.")
        if not takes(called, wants):
            named = getattr(called, "__name__", type(called).__name__)
            raise TypeError(
                f"{name} is {named}{inspect.signature(called)}, but a step here is {wanted}, such as sampling.{example}: a function that "
                f"makes a step is called first, as in step={made}; {other}."
            )


def takes(function, arguments):
    """Whether a function can be called with so many arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        # Some callables, such as NumPy's, do not say what they take.
        return True
    return True


def _remembering(arguments):
    return (*arguments[:-3], "memory", *arguments[-3:])


_FLOW = ("field", "x", "t", "dt")
SDE = ("drift", "sigma", "key", "x", "t", "dt")
_EXAMPLES = {
    _FLOW: ("heun", "solvers.unipc(path, 2)", "steps with noise are for sample_diffusion and sample_sde"),
    SDE: ("euler_maruyama", "sampling.churn()", "steps without noise are for sample_ode"),
}


def check_ends(field, x_0, times, ends):
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


def evaluated_at_end(step, *arguments):
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


def follow(advance, memory, x_0, times, last, save, every):
    """Scans advance(index, memory, x, t, dt) over the grid, in float32 or wider; a last step that is another follows the scan."""
    x_0 = checks.batch("x_0", x_0)
    dtype = jnp.promote_types(x_0.dtype, jnp.float32)
    times = checks.grid(times, dtype)
    # Where the grid is known it stays so inside `jax.jit`, for the checks of multistep methods.
    with jax.ensure_compile_time_eval():
        scanned = times if last is None else times[:-1]
    steps = len(times) - 1 - (last is not None)
    if not steps:
        raise ValueError("times has one step, but there is another last step: take two steps at least, or leave `last` out.")
    if not isinstance(every, int | np.integer) or not 1 <= every <= steps or steps % every:
        raise ValueError(
            f"every is {every}, but a grid of {steps} steps can save the states after every k-th only where k divides {steps}."
        )

    def body(carry, interval):
        (memory, x), (index, t, dt) = carry, interval
        memory, x = advance(index, memory, x, t, dt)
        return (memory, x), None if save is None or every > 1 else save(x, t + dt)

    def several(carry, intervals):
        (memory, x), _ = lax.scan(body, carry, intervals)
        return (memory, x), save(x, intervals[1][-1] + intervals[2][-1])

    carry = memory(x_0.astype(dtype), scanned), x_0.astype(dtype)
    intervals = jnp.arange(steps), scanned[:-1], jnp.diff(scanned)
    if save is None or every == 1:
        (_, x), saved = lax.scan(body, carry, intervals)
    else:
        (_, x), saved = lax.scan(several, carry, jax.tree.map(lambda a: a.reshape(-1, every), intervals))
    states = [] if save is None else [_alone(save(x_0.astype(dtype), times[0])), saved]
    if last is not None:
        before, x = x, last(steps, x, times[-2], times[-1] - times[-2])
        checks.like("The last step's output", x, before)
        states += [] if save is None else [_alone(save(x, times[-1]))]
    return x.astype(x_0.dtype), jax.tree.map(lambda *some: jnp.concatenate(some), *states) if states else None


def _alone(saved):
    """What was saved of one state, with the leading axis of those of many."""
    return jax.tree.map(lambda value: jnp.asarray(value)[None], saved)


def sample_ode(field, x_0, times, *, step: Callable[..., Any] | Multistep = heun, last=None, save=None, every=1):
    """Follows a field along a grid: the flow (1) from noise to data.

    X_{i+1} = step(field, X_i, t_i, t_{i+1} - t_i)    (notes 003, "Sampling from a Flow Model", which stops a step short)

    Outside `jax.jit` each call compiles anew: `sample = jax.jit(lambda params, x_0: sample_ode(field(params), x_0, times)[0])`.

    Args:
      field: (x, t) -> like x; t is a scalar here.
      x_0: where to start, (B, ...), any float dtype; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(field, x, t, dt) -> x`: `heun`, the default, of two evaluations, the second at t + dt; `euler`, `midpoint`, `rk4`,
        or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `euler` after `heun`, so that nothing is evaluated at the end.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / every + 2.
    Raises:
      TypeError: if x_0 is not of floats, the step is of another kind, or the field takes only a time per example.
      ValueError: if the grid does not increase, the field is infinite at a known end of it, its output has another shape than x, a
        multistep method needs more steps than there are, or `every` does not divide their number.
    """
    check_step(step, _FLOW, last)
    checks.function("field", field, checks.FIELD)
    final = step if last is None else last
    x_0 = checks.batch("x_0", x_0)
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    at_end = not isinstance(final, Multistep | PathStep) and evaluated_at_end(final)
    if isinstance(step, PathStep):
        check_domain(step.path, times)
    field = checks.like_state(field)
    check_ends(field, x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32)), times, (0, -1) if at_end else (0,))

    def advance(index, memory, x, t, dt):
        if isinstance(step, Multistep):
            return step.step(field, memory, x, t, dt)[::-1]
        return None, step(field, x, t, dt)

    end = last and (lambda index, x, t, dt: last(field, x, t, dt))
    return follow(advance, _memory(step), x_0, times, end, save, every)


def sample_sde(drift, sigma, key, x_0, times, *, step: Callable[..., Any] | Multistep = euler_maruyama, last=None, save=None, every=1):
    """Follows a stochastic differential equation (2) without a path along a grid: Brownian motion, Ornstein-Uhlenbeck, Langevin.

    X_{i+1} = step(drift, sigma, key_i, X_i, t_i, t_{i+1} - t_i)    (notes 003, "Sampling from a Diffusion Model")

    Data are sampled by `sample_diffusion`, which makes the drift from the path and sigma. Example i's noise depends on the key, on i
    and on the number of the step, not on the size of the batch (see `noise`). Outside `jax.jit` each call compiles anew.

    Args:
      drift: (x, t) -> like x; t is a scalar here.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
      key: a typed key; or one an example, (B,), of which example i then depends on the i-th alone.
      x_0: where to start, (B, ...), any float dtype; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(drift, sigma, key, x, t, dt) -> x`: `euler_maruyama`, or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `mean`, or yours.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / every + 2.
    Raises:
      TypeError: if x_0 is not of floats, the key is not typed, or the step is of another kind, such as one that knows a path.
      ValueError: if the grid does not increase, the keys are neither one nor one an example, the drift's output has
        another shape than x, a multistep method needs more steps than there are, or `every` does not divide their number.
    """
    for each in (step, last):
        if isinstance(each, DiffusionStep):
            raise TypeError(
                f"step is {each!r}, which knows a path: give it to sample_diffusion(path, velocity, sigma, ...), which takes the velocity, "
                "not the drift."
            )
    checks.function("drift", drift, "sampling.langevin(score, sigma)")
    x_0, sigma = checks.batch("x_0", x_0), coefficient(sigma)
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    drift = checks.like_state(drift)
    check_sde(key, x_0, step, last)
    check_sigma(sigma, times)
    check_drift(drift, sigma, x_0, times, (0, -1) if drift_at_end(step if last is None else last) else (0,))
    return follow_sde(drift, sigma, key, x_0, times, step, last, save, every)


def check_sde(key, x_0, step, last):
    """Raises unless there are keys for the examples, and steps of (2)."""
    checks.key(key, x_0.shape[0])
    check_step(step, SDE, last)


def drift_at_end(step):
    """Whether a step of (2) evaluates the drift at the end of its interval."""
    return not isinstance(step, Multistep) and evaluated_at_end(step, np.ones_like, jax.random.key(0))


def check_sigma(sigma, times):
    """Raises where sigma is no number of at least 0 inside a known grid."""
    if isinstance(times, Tracer):
        return
    first, last = np.asarray(times)[[0, -1]]
    inner = first + (last - first) * np.linspace(0, 1, 34, dtype=times.dtype)[1:-1]
    with jax.ensure_compile_time_eval():
        value = jax.vmap(sigma)(inner)
    if isinstance(value, Tracer):
        return
    wrong = np.flatnonzero(~((np.asarray(value) >= 0) & (np.asarray(value) < np.inf)))
    if wrong.size:
        raise ValueError(
            f"sigma is {np.asarray(value)[wrong[0]]} at t = {inner[wrong[0]]:g}, but it is finite and at least 0 on all of the grid."
        )


def check_drift(drift, sigma, x_0, times, ends):
    """Raises where an SDE's steps would meet an infinite drift or sigma at an end of a known grid."""
    check_ends(drift, x_0.astype(times.dtype), times, ends)
    for end in () if isinstance(times, Tracer) else ends:
        with jax.ensure_compile_time_eval():
            value = sigma(np.asarray(times)[end])
        if not isinstance(value, Tracer) and not np.isfinite(value):
            raise ValueError(
                f"sigma is {value} at t = {np.asarray(times)[end]:g}, where the step evaluates it: let the grid start later or end "
                "earlier, or take a step that knows the path, such as sampling.ancestral."
            )


def follow_sde(drift, sigma, key, x_0, times, step, last, save, every):
    """The scan of an SDE, whose arguments are checked."""
    fold_in = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in

    def advance(index, memory, x, t, dt):
        key_step = fold_in(key, index)
        if isinstance(step, Multistep):
            return step.step(drift, sigma, key_step, memory, x, t, dt)[::-1]
        return None, step(drift, sigma, key_step, x, t, dt)

    end = last and (lambda index, x, t, dt: last(drift, sigma, fold_in(key, index), x, t, dt))
    return follow(advance, _memory(step), x_0, times, end, save, every)


def _memory(step):
    """What a step remembers at the start."""
    return step.init if isinstance(step, Multistep) else lambda x, times: None


def reverse(field, times):
    """The field and the grid of the way back, from data to noise, for `sample_ode`.

    X_t follows u_t(x) forwards in t where X_s, s = t_0 + t_n - t, follows -u_t(x) forwards in s.

    Args:
      field: (x, t) -> like x.
      times: an increasing grid, (n + 1,).
    Returns:
      A field and an increasing grid from t_0 to t_n, whose steps are those of `times` in the other order.
    """
    # Numbers that are known stay so inside `jax.jit`, for the checks of samplers.
    times = times if isinstance(times, Tracer) else np.asarray(checks.grid(times, jnp.result_type(float)))
    checks.function("field", field, checks.FIELD)
    both = times[0] + times[-1]

    def backwards(x, s):
        value = field(x, both - s)
        checks.like("The field's output", value, x)
        return -value

    return backwards, both - times[::-1]


def coefficient(sigma: Any) -> Callable[[Any], Any]:
    """sigma as a function of t, of one number for each time; checked wherever its value is known."""
    if not callable(sigma) and (isinstance(sigma, str) or sigma is None or not jnp.issubdtype(jnp.result_type(sigma), jnp.number)):
        raise TypeError(f"sigma is {sigma!r}, but it is a number or a function of t, such as diffusion.by_noise(path).")

    def checked(value, t):
        value = jnp.asarray(value)
        if value.shape not in ((), jnp.shape(t)):
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


def check_domain(path, times):
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

    _check_rises(path, times)
    first = np.asarray(times)[0]
    found = says(first)
    if isinstance(found, Tracer) or np.asarray(found) > _LEAST_SAID:
        return
    later = np.geomspace(1e-3, 0.5, 28).astype(np.float32)
    enough = later[(later > first) & (np.asarray(says(later)) > _LEAST_SAID)]
    cure = f", such as times.grid(n, start={enough[0]:.2g})" if enough.size else ""
    raise ValueError(
        f"The velocity of {path} is 0 or in proportion to the state at t = {first:g} and says nothing of the data there, which this step "
        f"asks for: start the grid later{cure}."
    )


def _check_rises(path, times):
    """Raises where a path loses data on the way, so that a time does not follow from a noise level."""
    first, last = np.asarray(times)[[0, -1]]
    t = first + (last - first) * np.linspace(0, 1, 34, dtype=times.dtype)
    with jax.ensure_compile_time_eval():
        signal = paths.signal_at(path, t)
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


@dataclasses.dataclass(frozen=True)
class PathStep:
    """A step of a flow that knows the path, `(field, x, t, dt) -> x`, and evaluates nothing at data."""

    path: Any
    step: Callable[..., Any]

    def __call__(self, field, x, t, dt):
        return self.step(field, x, t, dt)


def check_range(times):
    """Raises where a grid leaves the path, wherever its values are known."""
    if not isinstance(times, Tracer):
        first, last = np.asarray(times)[[0, -1]]
        if first < 0 or last > 1:
            raise ValueError(f"times go from {first:g} to {last:g}, but a path goes from 0, noise, to 1, data.")


def check_steps(order, times):
    """Raises unless a grid has as many steps as a multistep method needs."""
    if len(times) - 1 < order:
        raise ValueError(
            f"The method has order {order} and needs as many steps, but the grid has {len(times) - 1}: take more steps or a lower order."
        )
