"""Bridges: paths between two points that are noisy on the way.

A bridge joins x_0 and x_1, from any two distributions, by a stochastic interpolant,

    x_t = alpha_t x_1 + beta_t x_0 + gamma_t z,        z ~ N(0, I)        (1) (Albergo et al. 2023, arXiv:2303.08797)

so that p_t(x | x_0, x_1) = N(alpha_t x_1 + beta_t x_0, gamma_t^2 I), whose velocity is the derivative of (1) in time, and whose score is

    grad log p_t(x | x_0, x_1) = -z / gamma_t        (2)

A bridge is any object with a path, `path`, and a method `gamma(t)`; those below are frozen dataclasses and pytrees. Velocity and noise are
learnt together from one draw ([SF]^2M, Tong et al. 2023, arXiv:2307.03672):

    x_t, u_t = bridges.flow(bridge, x_0, x_1, z, t)
    loss = losses.regression(velocity, x_t, t, u_t) + losses.regression(noise, x_t, t, z)

Since x_0 need not be noise, the score does not follow from the velocity: `score` makes it from the noise. With it the flow has an SDE of
the same marginals for any sigma, from x_0 to x_1 and from x_1 to x_0:

    sampling.sample_sde(sampling.sde_extension(velocity, score, sigma), sigma, key, x_0, times)
    back, grid = sampling.reverse(sampling.sde_extension(velocity, lambda x, t: -score(x, t), sigma), times)
    sampling.sample_sde(back, sigma, key, x_1, grid)

where a sigma that is a function of time is read backwards too, as `lambda s: sigma(times[0] + times[-1] - s)`, in the last line.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from fmjax import checks, paths, states
from fmjax.paths import Field

__all__ = [
    "Bridge",
    "Brownian",
    "Constant",
    "Interpolant",
    "interpolate",
    "flow",
    "conditional_velocity",
    "conditional_score",
    "score",
]


class Bridge(Protocol):
    """Anything with a path and the size of the noise on it."""

    path: Any
    """alpha_t and beta_t, a path."""

    def gamma(self, t) -> Any:
        """The factor of the noise z.

        Args:
          t: times, any shape.
        Returns:
          gamma_t, like t.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Brownian:
    """The Brownian bridge, of which the Schrödinger bridge of dX = sigma dW is the mixture over the entropic plan.

    gamma_t = sigma sqrt(t (1 - t))    (Tong et al. 2023, arXiv:2307.03672)

    Its velocity is infinite at both ends: draw times between them.

    Raises:
      ValueError: if sigma is not above 0.
    """

    sigma: float = 1.0
    """The standard deviation of dW per unit of time."""
    path: Any = dataclasses.field(default_factory=paths.Linear)
    """alpha_t and beta_t, a path."""

    def __post_init__(self):
        checks.setting(self, "sigma", "the noise of a unit of time", above=True)

    def gamma(self, t) -> chex.ArrayDevice:
        """gamma_t, like t."""
        return self.sigma * jnp.sqrt(t * (1 - t))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant:
    """A path with the same noise at all times.

    gamma_t = sigma    (Tong et al. 2023, arXiv:2302.00482; with `paths.Cosine()` their variance-preserving one)

    Raises:
      ValueError: if sigma is not above 0.
    """

    sigma: float = 0.1
    """The standard deviation."""
    path: Any = dataclasses.field(default_factory=paths.Linear)
    """alpha_t and beta_t, a path."""

    def __post_init__(self):
        checks.setting(self, "sigma", "the noise at all times", above=True)

    def gamma(self, t) -> chex.ArrayDevice:
        """gamma_t, like t."""
        return self.sigma * jnp.ones_like(t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interpolant:
    """A path with any noise.

    gamma_t is any function of t, differentiable between the ends (Albergo et al. 2023, arXiv:2303.08797).

    Raises:
      TypeError: if the noise is no function.
    """

    path: Any
    """alpha_t and beta_t, a path."""
    noise: Callable = dataclasses.field(metadata={"static": True})
    """gamma, a function of t, above 0 between the ends: `lambda t: jnp.sqrt(2 * t * (1 - t))`."""

    def __post_init__(self):
        checks.function("noise", self.noise, "lambda t: jnp.sqrt(2 * t * (1 - t))")

    def gamma(self, t) -> chex.ArrayDevice:
        """gamma_t, like t."""
        return self.noise(t)


def _check(bridge):
    """Raises unless bridge has a path and gamma."""
    if isinstance(bridge, type) or not callable(getattr(bridge, "gamma", None)) or not hasattr(bridge, "path"):
        made = f", which is a class: make one with {bridge.__name__}()" if isinstance(bridge, type) else ""
        raise TypeError(f"bridge is {bridge!r}{made}; a bridge has a path and gamma(t), such as bridges.Brownian(1.0).")
    checks.path(bridge.path)


def _on_bridge(bridge, t, **ends):
    """The arrays (B, ...) of a bridge's ends, its times and the layout of the state, if it is a pytree."""
    _check(bridge)
    x_1 = ends["x_1"]
    paths.fits(bridge.path, x_1)
    if (layout := states.layout(x_1)) is not None:
        ends = {name: layout.flatten(name, value) for name, value in ends.items()}
    else:
        ends = {name: checks.floats(name, value) for name, value in ends.items()}
        for name, value in ends.items():
            checks.like(name, value, ends["x_1"])
    return layout, ends, checks.times(checks.on_path(t), ends["x_1"])


def _gamma(bridge, t):
    gamma = bridge.gamma(t)
    if jnp.shape(gamma) not in ((), jnp.shape(t)):
        raise ValueError(f"gamma(t) of {bridge!r} has shape {jnp.shape(gamma)} for t of shape {jnp.shape(t)}, but it is like t.")
    return gamma


def _point(bridge, x_0, x_1, z, t):
    """(1), in float32 or wider."""
    wide = paths.lift(t, x_1)
    return bridge.path.alpha(wide) * x_1 + bridge.path.beta(wide) * x_0 + _gamma(bridge, wide) * z


def interpolate(bridge, x_0, x_1, z, t) -> Any:
    """Point on the bridge from x_0 to x_1 at time t.

    x_t = alpha_t x_1 + beta_t x_0 + gamma_t z        (1)

    Args:
      bridge: anything with a `path` and `gamma(t)`.
      x_0: the start, (B, ...), any float dtype, or a pytree of them.
      x_1: the end, like x_0.
      z: noise, like x_0.
      t: times in [0, 1], () or (B,).
    Returns:
      x_t, like x_1.
    Raises:
      TypeError: if an array is not of floats, or the bridge is none.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    layout, ends, t = _on_bridge(bridge, t, x_0=x_0, x_1=x_1, z=z)
    x_t = _point(bridge, **ends, t=t)
    return x_t.astype(ends["x_1"].dtype) if layout is None else layout.unflatten(x_t, like=x_1)


def flow(bridge, x_0, x_1, z, t) -> tuple[Any, Any]:
    """Point on the bridge from x_0 to x_1 at time t, and its velocity.

    x_t = alpha_t x_1 + beta_t x_0 + gamma_t z,  u_t = d x_t / dt    (Tong et al. 2023, arXiv:2307.03672)

    Args:
      bridge: anything with a `path` and `gamma(t)`.
      x_0: the start, (B, ...), any float dtype, or a pytree of them.
      x_1: the end, like x_0.
      z: noise, like x_0.
      t: times in [0, 1], () or (B,).
    Returns:
      x_t and u_t, each like x_1. u_t is not finite where the derivative of gamma or of the path is not, as at both ends of `Brownian`.
    Raises:
      TypeError: if an array is not of floats, or the bridge is none.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    layout, ends, t = _on_bridge(bridge, t, x_0=x_0, x_1=x_1, z=z)
    both = jax.jvp(lambda t: _point(bridge, **ends, t=t), (t,), (jnp.ones_like(t),))
    x_t, u_t = (value.astype(ends["x_1"].dtype) if layout is None else layout.unflatten(value, like=x_1) for value in both)
    return x_t, u_t


def _noise_at(bridge, x, x_0, x_1, t):
    """The z whose bridge from x_0 to x_1 passes x at time t: (1) solved for z, for gamma_t > 0."""
    wide = paths.lift(t, x_1)
    return (x - bridge.path.alpha(wide) * x_1 - bridge.path.beta(wide) * x_0) / _gamma(bridge, wide)


def conditional_velocity(bridge, x, x_0, x_1, t) -> Any:
    """Velocity at x of the flow around the line from x_0 to x_1.

    u_t(x | x_0, x_1) = alpha'_t x_1 + beta'_t x_0 + gamma'_t / gamma_t (x - alpha_t x_1 - beta_t x_0)
    (Tong et al. 2023, arXiv:2307.03672)

    Args:
      bridge: anything with a `path` and `gamma(t)`.
      x: states, (B, ...), any float dtype, or a pytree of them.
      x_0: the start, like x.
      x_1: the end, like x.
      t: times with gamma_t > 0, () or (B,).
    Returns:
      u_t(x | x_0, x_1), like x_1; not finite where gamma_t = 0.
    Raises:
      TypeError: if an array is not of floats, or the bridge is none.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    layout, ends, t = _on_bridge(bridge, t, x=x, x_0=x_0, x_1=x_1)
    z = _noise_at(bridge, **ends, t=t)
    value = jax.jvp(lambda t: _point(bridge, ends["x_0"], ends["x_1"], z, t), (t,), (jnp.ones_like(t),))[1]
    return value.astype(ends["x_1"].dtype) if layout is None else layout.unflatten(value, like=x_1)


def conditional_score(bridge, x, x_0, x_1, t) -> Any:
    """Gradient in x of log p_t(x | x_0, x_1).

    grad log p_t(x | x_0, x_1) = -(x - alpha_t x_1 - beta_t x_0) / gamma_t^2        (2)

    Args:
      bridge: anything with a `path` and `gamma(t)`.
      x: states, (B, ...), any float dtype, or a pytree of them.
      x_0: the start, like x.
      x_1: the end, like x.
      t: times with gamma_t > 0, () or (B,).
    Returns:
      The score, like x_1; not finite where gamma_t = 0.
    Raises:
      TypeError: if an array is not of floats, or the bridge is none.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    layout, ends, t = _on_bridge(bridge, t, x=x, x_0=x_0, x_1=x_1)
    value = -_noise_at(bridge, **ends, t=t) / _gamma(bridge, paths.lift(t, ends["x_1"]))
    return value.astype(ends["x_1"].dtype) if layout is None else layout.unflatten(value, like=x_1)


def score(bridge, noise_field) -> Field:
    """The score that belongs to a field of the noise.

    s_t(x) = -(1 / gamma_t) E[z | x_t = x]

    which is the mean of (2) over the bridges through x.

    Args:
      bridge: anything with a `path` and `gamma(t)`.
      noise_field: (x, t) -> E[z | x_t = x], like x: what `losses.regression` on z learns.
    Returns:
      A field, (x, t) -> like x, for gamma_t > 0.
    Raises:
      TypeError: if the field is no function, or the bridge is none.
    """
    _check(bridge)
    checks.function("noise_field", noise_field, checks.FIELD)

    def converted(x, t, noise_field):
        noise, wide = noise_field(x, t), paths.lift(checks.on_path(t), x)
        checks.like("The noise", noise, x)
        return (-noise / _gamma(bridge, wide)).astype(x.dtype)

    return paths.on_states(converted, noise_field)
