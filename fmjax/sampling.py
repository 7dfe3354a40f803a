"""Sampling: one-step maps, and the one scan that follows them.

    dX = u_t(X) dt                                                flow model                      (1)
    dX = u_t(X) dt + sigma_t dW                                   diffusion model                 (2)
    dX = (u_t + sigma_t^2 / 2 grad log p_t)(X) dt + sigma_t dW    the marginals of (1), any sigma (3)
    dX = sigma_t^2 / 2 grad log p(X) dt + sigma_t dW              Langevin dynamics               (4)

A step for (1) is a function `(field, x, t, dt) -> x`; a step for (2) is `(drift, sigma, key, x, t, dt) -> x`, which
draws by `noise(key, x.shape)`. Steps that know the path take the velocity in the drift's place and make (3) themselves;
a step that remembers the last ones is a `Multistep`: see `fmjax.solvers`. Grids are arguments of the compiled program and
its size does not depend on their length. The functions are not compiled by themselves: wrap the caller in `jax.jit`, as in
`jax.jit(lambda params, x_0: sample_ode(field(params), x_0, times)[0])`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import paths, targets


class Multistep(NamedTuple):
    """A step that remembers: what it needs of the past is carried through the scan."""

    init: Callable[..., Any]
    """(x, times) -> memory, any pytree of arrays."""
    step: Callable[..., Any]
    """(field, memory, x, t, dt) -> (x, memory); in `sample_sde` (drift, sigma, key, memory, x, t, dt) -> (x, memory)."""


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


def _check_key(key, n):
    dtype = getattr(key, "dtype", type(key).__name__)
    if not isinstance(key, jax.Array) or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key has dtype {dtype}, but keys are typed: make one with jax.random.key(seed).")
    if key.shape not in ((), (n,)):
        raise ValueError(f"key has shape {key.shape}, but it must be one key, (), or one an example, {(n,)}.")


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
    _check_key(key, shape[0])
    # In rows, whose numbers are the same and whose program XLA compiles in a fifth of the time that one of images takes.
    n, size = shape[0], math.prod(shape[1:])
    if key.ndim == 0:
        return jax.random.normal(key, (n, size), dtype).reshape(shape)
    # Of the generators only the default one draws the same under `vmap` as alone.
    over = jax.vmap if jax.random.key_impl(key) == "threefry2x32" else lambda draw: functools.partial(lax.map, draw)
    return over(lambda key: jax.random.normal(key, (size,), dtype))(key).reshape(shape)


def _check_times(times, dtype):
    """The grid as an array of floats; its order is checked wherever its values are known."""
    if jnp.ndim(times) != 1 or len(times) < 2:
        raise ValueError(
            f"times has shape {jnp.shape(times)}, but a grid is one-dimensional with at least two times, such as jnp.linspace(0, 1, 51)."
        )
    if not isinstance(times, Tracer):
        values = np.asarray(times).astype(dtype)
        backwards = np.flatnonzero(~(np.diff(values) > 0))
        if backwards.size:
            i = int(backwards[0])
            raise ValueError(
                f"times must increase, but times[{i}] is {values[i]:g} and times[{i + 1}] is {values[i + 1]:g} in {values.dtype}; "
                "0 is noise, 1 is data."
            )
    return jnp.asarray(times, dtype)


def _like_state(field):
    """The field with its output held to the state: its shape checked, its dtype the state's."""

    def checked(x, t):
        value = field(x, t)
        paths.check_like("The field's output", value, x)
        return jnp.asarray(value, x.dtype)

    return checked


def _follow(advance, memory, x_0, times, last, save, every):
    """Scans advance(index, memory, x, t, dt) over the grid, in float32 or wider; a last step that is another follows the scan."""
    x_0 = paths.check_float("x_0", x_0)
    dtype = jnp.promote_types(x_0.dtype, jnp.float32)
    # Where the grid is known it stays so inside `jax.jit`, for the checks of multistep methods.
    with jax.ensure_compile_time_eval():
        times = _check_times(times, dtype)
        scanned = times if last is None else times[:-1]
    steps = len(times) - 1 - (last is not None)
    if not steps:
        raise ValueError("times has one step, but there is another last step: take two steps at least, or leave `last` out.")
    if not 1 <= every <= steps or steps % every:
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
        x = last(steps, x, times[-2], times[-1] - times[-2])
        states += [] if save is None else [_alone(save(x, times[-1]))]
    return x.astype(x_0.dtype), jax.tree.map(lambda *some: jnp.concatenate(some), *states) if states else None


def _alone(saved):
    """What was saved of one state, with the leading axis of those of many."""
    return jax.tree.map(lambda value: jnp.asarray(value)[None], saved)


def sample_ode(field, x_0, times, *, step: Callable[..., Any] | Multistep = heun, last=None, save=None, every=1):
    """Follows a field along a grid: the flow (1) from noise to data.

    X_{i+1} = step(field, X_i, t_i, t_{i+1} - t_i)    (notes 003, "Sampling from a Flow Model", which stops a step short)

    Args:
      field: (x, t) -> like x; t is a scalar here.
      x_0: where to start, (B, ...), any float dtype; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(field, x, t, dt) -> x`: `euler`, `heun`, `midpoint`, `rk4`, or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `euler` after `heun`, so that nothing is evaluated at the end.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / every + 2.
    Raises:
      TypeError: if x_0 is not of floats.
      ValueError: if the grid does not increase, the field's output has another shape than x, a multistep method needs more
        steps than there are, or `every` does not divide their number.
    """
    field = _like_state(field)

    def advance(index, memory, x, t, dt):
        if isinstance(step, Multistep):
            return step.step(field, memory, x, t, dt)[::-1]
        return None, step(field, x, t, dt)

    end = last and (lambda index, x, t, dt: last(field, x, t, dt))
    return _follow(advance, _memory(step), x_0, times, end, save, every)


def sample_sde(drift, sigma, key, x_0, times, *, step: Callable[..., Any] | Multistep = euler_maruyama, last=None, save=None, every=1):
    """Follows a stochastic differential equation (2) along a grid.

    X_{i+1} = step(drift, sigma, key_i, X_i, t_i, t_{i+1} - t_i)    (notes 003, "Sampling from a Diffusion Model")

    Example i's noise depends on the key, on i and on the number of the step, not on the size of the batch (see `noise`).

    Args:
      drift: (x, t) -> like x; t is a scalar here. A step that knows the path (`ancestral`, `churn`) takes the velocity.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
      key: a typed key; or one an example, (B,), of which example i then depends on the i-th alone.
      x_0: where to start, (B, ...), any float dtype; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      step: one step, `(drift, sigma, key, x, t, dt) -> x`: `euler_maruyama`, or yours; or a `Multistep`.
      last: the last step where it is another one, as `step`: `mean`, `tweedie(path, velocity_field)`, or yours.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n / every + 1 from x_0 to x_1 (None without `save`); where
        `last` is another one, of (n - 1) / every + 2.
    Raises:
      TypeError: if x_0 is not of floats, or the key is not typed.
      ValueError: if the grid does not increase, the keys are neither one nor one an example, the drift's output has
        another shape than x, a multistep method needs more steps than there are, or `every` does not divide their number.
    """
    drift, sigma, x_0 = _like_state(drift), _coefficient(sigma), paths.check_float("x_0", x_0)
    _check_key(key, x_0.shape[0])
    fold_in = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in

    def advance(index, memory, x, t, dt):
        key_step = fold_in(key, index)
        if isinstance(step, Multistep):
            return step.step(drift, sigma, key_step, memory, x, t, dt)[::-1]
        return None, step(drift, sigma, key_step, x, t, dt)

    end = last and (lambda index, x, t, dt: last(drift, sigma, fold_in(key, index), x, t, dt))
    return _follow(advance, _memory(step), x_0, times, end, save, every)


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
    times = jnp.asarray(times)
    both = times[0] + times[-1]
    return lambda x, s: -field(x, both - s), both - times[::-1]


def _coefficient(sigma: Any) -> Callable[[Any], Any]:
    """sigma as a function of t."""
    # In t's dtype, which is the state's: a wider number would widen it.
    return lambda t: jnp.asarray(sigma(t) if callable(sigma) else sigma, jnp.result_type(t))


def extend(velocity_field, score_field, sigma):
    """The SDE extension trick from a velocity and a score: a drift for `sample_sde` with the velocity's marginals.

    u_t(x) + sigma_t^2 / 2 grad log p_t(x)        (3) (notes 002, "SDE extension trick"; 004, "Score Matching")

    Args:
      velocity_field: (x, t) -> u_t(x), like x.
      score_field: (x, t) -> grad log p_t(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x.
    """
    sigma = _coefficient(sigma)
    return lambda x, t: velocity_field(x, t) + sigma(paths.lift(t, x)) ** 2 / 2 * score_field(x, t)


def sde_drift(path, velocity_field, sigma):
    """The SDE extension trick from a velocity alone: on a path, the score follows from it.

    u_t(x) + sigma_t^2 / 2 (alpha_t u_t(x) - alpha'_t x) / (beta_t (beta_t alpha'_t - alpha_t beta'_t))
    (3) (notes 004, "Denoising Diffusion Models", whose s_t(x) prints alpha_t for alpha'_t in the denominator)

    From a score alone, or from predicted noise or data, convert first:
    `sde_drift(path, targets.convert_field(path, score_field, source=targets.score, target=targets.velocity), sigma)`.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity_field: (x, t) -> u_t(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x, of one evaluation of `velocity_field`; its domain is beta_t > 0.
    """

    def drift(x, t):
        u = velocity_field(x, t)
        score = targets.convert(path, u, x, t, source=targets.velocity, target=targets.score)
        return extend(lambda x, t: u, lambda x, t: score, sigma)(x, t)

    return drift


def langevin(score_field, sigma):
    """The drift of Langevin dynamics, under which the distribution with that score stays as it is.

    sigma_t^2 / 2 grad log p(x)        (4) (notes 004, "Remark Langevin dynamics")

    Args:
      score_field: (x, t) -> grad log p(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x, for `sample_sde` with the same sigma.
    """
    return extend(lambda x, t: jnp.zeros_like(x), score_field, sigma)
