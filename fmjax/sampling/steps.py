"""Steps: what may be followed, and one-step maps of fields and of stochastic differential equations without a path.

A step for (1) of `fmjax.sampling` is a function `(field, x, t, dt) -> x`; a step for (2) is `(drift, sigma, key, x, t, dt) -> x`,
which draws by `noise(key, x.shape)`; one that uses values of earlier steps is a `Multistep`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fmjax import checks, states


class Multistep(NamedTuple):
    """A step that has a state, such as the values of earlier steps, which is carried through the scan."""

    init: Callable[..., Any]
    """(x, times) -> state, any pytree of arrays."""
    step: Callable[..., Any]
    """(field, state, x, t, dt) -> (x, state); in `sample_sde` (drift, sigma, key, state, x, t, dt) -> (x, state)."""
    path: Any = None
    """The path that it knows, if any."""


class DiffusionStep:
    """A step of (3) of `fmjax.sampling` that knows the path, for `sample_diffusion`, which gives it what it knows.

    Args:
      step: (path, velocity, sigma, key, x, t, dt) -> x; with an `init`, (path, velocity, sigma, key, state, x, t, dt) -> (x, state).
      init: (path, x, times) -> its state at the start, any pytree of arrays.
      at_end: (path) -> whether the velocity is evaluated at the end of a step too, where some paths' is infinite.
      within: the step of any SDE that this one takes in it, of the drift.
    """

    def __init__(self, step, init=None, *, at_end=lambda path: False, within=None):
        self.step, self.init, self.at_end, self.within = step, init, at_end, within
        self.__name__, self.__doc__ = getattr(step, "__name__", "step"), step.__doc__

    def __repr__(self):
        return f"DiffusionStep({self.__name__})"


@dataclasses.dataclass(frozen=True)
class PathStep:
    """A step of a flow that knows the path, `(field, x, t, dt) -> x`, and evaluates nothing at data."""

    path: Any
    step: Callable[..., Any]

    def __call__(self, field, x, t, dt):
        return self.step(field, x, t, dt)


def euler(field, x, t, dt) -> chex.ArrayDevice:
    """Euler's step: order 1, one evaluation.

    X_{t+h} = X_t + h u_t(X_t)    (MIT 6.S184, "Euler Method")

    Args:
      field: (x, t) -> like x.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    return x + dt * field(x, t)


def heun(field, x, t, dt) -> chex.ArrayDevice:
    """The trapezium rule with an Euler predictor: order 2, two evaluations, the second at t + dt.

    X_{t+h} = X_t + h (k_1 + k_2) / 2,  k_1 = u_t(X_t),  k_2 = u_{t+h}(X_t + h k_1)    (Heun 1900)

    Args:
      field: (x, t) -> like x.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    k_1 = field(x, t)
    k_2 = field(x + dt * k_1, t + dt)
    return x + dt / 2 * (k_1 + k_2)


def midpoint(field, x, t, dt) -> chex.ArrayDevice:
    """An Euler step with the slope at the middle: order 2, two evaluations, none at t + dt.

    X_{t+h} = X_t + h u_{t+h/2}(X_t + h/2 u_t(X_t))    (Runge 1895)

    Args:
      field: (x, t) -> like x.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    k_1 = field(x, t)
    return x + dt * field(x + dt / 2 * k_1, t + dt / 2)


def ralston(field, x, t, dt) -> chex.ArrayDevice:
    """The step of order 2 with the least bound on its error: two evaluations, none at t + dt.

    X_{t+h} = X_t + h (k_1 + 3 k_2) / 4,  k_1 = u_t(X_t),  k_2 = u_{t+2h/3}(X_t + 2/3 h k_1)    (Ralston 1962)

    Args:
      field: (x, t) -> like x.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    k_1 = field(x, t)
    k_2 = field(x + 2 * dt / 3 * k_1, t + 2 * dt / 3)
    return x + dt / 4 * (k_1 + 3 * k_2)


def rk4(field, x, t, dt) -> chex.ArrayDevice:
    """The classical Runge-Kutta step: order 4, four evaluations, the last at t + dt.

    X_{t+h} = X_t + h (k_1 + 2 k_2 + 2 k_3 + k_4) / 6,  k_1 = u_t(X_t),  k_4 = u_{t+h}(X_t + h k_3)    (Kutta 1901)
    k_2 = u_{t+h/2}(X_t + h/2 k_1),  k_3 = u_{t+h/2}(X_t + h/2 k_2)

    Args:
      field: (x, t) -> like x.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    k_1 = field(x, t)
    k_2 = field(x + dt / 2 * k_1, t + dt / 2)
    k_3 = field(x + dt / 2 * k_2, t + dt / 2)
    k_4 = field(x + dt * k_3, t + dt)
    return x + dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def euler_maruyama(drift, sigma, key, x, t, dt) -> chex.ArrayDevice:
    """Euler and Maruyama's step: weak order 1, one evaluation; strong order 1 too, since sigma_t does not depend on X.

    X_{t+h} = X_t + h u_t(X_t) + sqrt(h) sigma_t epsilon    (MIT 6.S184, "Euler-Maruyama method")

    Args:
      drift: (x, t) -> like x.
      sigma: the diffusion coefficient, a function of t.
      key: a typed key, or one per example, (B,).
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    return x + dt * drift(x, t) + jnp.sqrt(dt) * sigma(t) * noise(key, x.shape, x.dtype)


def stochastic_heun(drift, sigma, key, x, t, dt) -> chex.ArrayDevice:
    """The trapezium rule for drift and noise alike, with an Euler-Maruyama predictor: weak order 2, two evaluations.

    X_{t+h} = X_t + h (k_1 + k_2) / 2 + (sigma_t + sigma_{t+h}) / 2 w,  w = sqrt(h) epsilon
    k_1 = u_t(X_t),  k_2 = u_{t+h}(X_t + h k_1 + sigma_t w)    (Kloeden and Platen 1992, section 15.1)

    The second evaluation is at t + dt: on a path the drift must be finite there, so let `last` be another.

    Args:
      drift: (x, t) -> like x.
      sigma: the diffusion coefficient, a function of t.
      key: a typed key, or one per example, (B,).
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    xi = jnp.sqrt(dt) * noise(key, x.shape, x.dtype)
    k_1 = drift(x, t)
    k_2 = drift(x + dt * k_1 + sigma(t) * xi, t + dt)
    return x + dt / 2 * (k_1 + k_2) + (sigma(t) + sigma(t + dt)) / 2 * xi


def euler_maruyama_noiseless(drift, sigma, key, x, t, dt) -> chex.ArrayDevice:
    """Euler and Maruyama's step without its noise, as a last step.

    X_{t+h} = X_t + h u_t(X_t)    ("Mean" of SiT, Ma et al. 2024, arXiv:2401.08740)

    Args:
      drift: (x, t) -> like x.
      sigma: the diffusion coefficient, not used.
      key: a typed key, not used.
      x: the state, (B, ...).
      t: its time, ().
      dt: h, how long the step is, ().
    Returns:
      The state at t + h, like x.
    """
    return x + dt * drift(x, t)


def noise(key, shape, dtype=jnp.float32) -> chex.ArrayDevice:
    """Standard normal noise in which example i depends on the key and on i, not on the size of the batch.

    JAX's default generator hashes the key with each number's place, and examples come first; so from one key a smaller
    batch is the head of a larger one. Any part of a batch can be drawn alone where each example has its own key.

    Args:
      key: a typed key; or one per example, (B,), of which example i then depends on the i-th alone.
      shape: (B, ...).
      dtype: a float dtype.
    Returns:
      Noise of that shape.
    Raises:
      TypeError: if the key is not typed, or the shape is not that of a batch.
      ValueError: if there is neither one key nor one per example.
    """
    if not isinstance(shape, tuple | list) or not shape:
        raise TypeError(f"shape is {shape!r}, but it is that of a batch, (B, ...): of a pytree sampling.noise_like(key, x) draws like x.")
    checks.key(key, shape[0])
    # In rows, whose numbers are the same and whose program XLA compiles in a fifth of the time that one of images takes.
    n, size = shape[0], math.prod(shape[1:])
    if key.ndim == 0:
        return jax.random.normal(key, (n, size), dtype).reshape(shape)
    # Of the generators only the default one draws the same under `vmap` as alone.
    over = jax.vmap if jax.random.key_impl(key) == "threefry2x32" else lambda draw: functools.partial(lax.map, draw)
    return over(lambda key: jax.random.normal(key, (size,), dtype))(key).reshape(shape)


def noise_like(key, x) -> Any:
    """`noise` like a state: of one array of its shape and dtype, of a pytree like each leaf.

    Args:
      key: a typed key; or one per example, (B,), of which example i then depends on the i-th alone.
      x: data, (B, ...), any float dtype, or a pytree of such arrays, of which only shapes and dtypes are read.
    Returns:
      Noise like x.
    Raises:
      TypeError: if the key is not typed, or x is not of floats.
      ValueError: if there is neither one key nor one per example.
    """
    if (layout := states.layout(x)) is None:
        x = checks.floats("x", x)
        return noise(key, x.shape, x.dtype)
    flat = jax.eval_shape(functools.partial(layout.flatten, "x"), x)
    return layout.unflatten(noise(key, flat.shape, flat.dtype), like=x)
