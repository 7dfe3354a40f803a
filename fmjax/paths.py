"""Paths: how noise becomes data.

A path joins noise x_0 ~ N(0, I) (the course's epsilon) to data x_1 (the course's z),

    x_t = alpha_t x_1 + beta_t x_0,        t = 0 is noise, t = 1 is data            (1)

so that p_t(x | x_1) = N(alpha_t x_1, beta_t^2 I). A path is any object with two methods, `alpha(t)` and
`beta(t)`; those below are frozen dataclasses and pytrees, so they can be arguments of `jit`, be compared,
printed, pickled, differentiated and mapped over their numbers. Derivatives in time are `jax.jvp`, so a path
of your own is its two methods and nothing else:

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Mine:
        def alpha(self, t): return (t + t**2) / 2
        def beta(self, t): return 1 - t

A path that comes to rest at noise, such as alpha_t = t^3 and beta_t = 1 - t^3, is one too; its velocity says nothing of the data there,
so grids for steps that know the path start later.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, states

__all__ = [
    "Path",
    "Linear",
    "Lipman",
    "ScaledNoise",
    "Cosine",
    "VariancePreserving",
    "Polynomial",
    "SquareRoot",
    "interpolate",
    "flow",
    "conditional_velocity",
    "conditional_score",
    "joint",
    "Joint",
    "signal_fraction",
    "time_from_signal_fraction",
    "lift",
]

Field = Callable[[Any, chex.Numeric], Any]
"""(x, t) -> like x: a velocity, a score, a network closed over its parameters."""


class Path(Protocol):
    """Anything with a schedule for the data and one for the noise, each of the shape of t."""

    def alpha(self, t) -> Any:
        """The factor of the data, which grows with t.

        Args:
          t: times, any shape.
        Returns:
          alpha_t, like t.
        """

    def beta(self, t) -> Any:
        """The factor of the noise, which falls with t.

        Args:
          t: times, any shape.
        Returns:
          beta_t, like t.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """The CondOT path.

    alpha_t = t,  beta_t = 1 - t    (MIT 6.S184, "Flow Matching for Gaussian Conditional Probability Paths")
    """

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return t

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return 1 - t


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lipman:
    """The linear path that keeps some noise at data: p_1(x | x_1) is narrow, not a point.

    alpha_t = t,  beta_t = 1 - (1 - sigma_min) t    (Lipman et al. 2023, arXiv:2210.02747, eq. 20)

    Samples end at data with noise of standard deviation `sigma_min`.

    Raises:
      ValueError: if `sigma_min` is below 0.
    """

    sigma_min: float = 1e-4
    """The noise at data, at least 0, where the path is `Linear`."""

    def __post_init__(self):
        checks.setting(self, "sigma_min", "the noise that is left at data")

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return t

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return 1 - (1 - self.sigma_min) * t


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledNoise:
    """A path with more noise, or less: large images hide less of themselves in noise of scale 1.

    x_t = alpha_t x_1 + scale beta_t x_0    (Li and He 2025, arXiv:2511.13720)

    with alpha and beta of the path. Samples start from `scale` times noise.

    Raises:
      ValueError: if `scale` is not above 0.
    """

    path: Any
    """The path."""
    scale: float = 2.0
    """What its noise is multiplied with, above 0."""

    def __post_init__(self):
        # Where JAX rebuilds a pytree it is anything else.
        if isinstance(self.path, type | int | float | complex | str | dict | list | tuple | np.ndarray | jax.Array | None):
            checks.path(self.path)
        if isinstance(self.path, Joint):
            raise TypeError("path is joint, of several leaves: scale the noise of each, paths.joint(ScaledNoise(path, scale), x_1).")
        checks.setting(self, "scale", "what the noise is multiplied with", above=True)

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return self.path.alpha(t)

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return self.scale * self.path.beta(t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine:
    """The trigonometric path.

    alpha_t = sin(pi t / 2),  beta_t = cos(pi t / 2)    (Albergo and Vanden-Eijnden 2023, arXiv:2209.15571)
    """

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return jnp.sin(jnp.pi / 2 * t)

    def beta(self, t) -> chex.ArrayDevice:
        # A sine, because the cosine of a rounded pi/2 is not zero.
        """beta_t, like t."""
        return jnp.sin(jnp.pi / 2 * (1 - t))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """The path of the variance-preserving SDE.

    alpha_t = exp(-s^2 (rate_max - rate_min) / 4 - s rate_min / 2),  beta_t = sqrt(1 - alpha_t^2),  s = 1 - t
    (Song et al. 2021, arXiv:2011.13456, eq. 33)

    The velocity is infinite at t = 1: grids for it end before 1. At t = 0 a trace of the data is left,
    alpha_0 = exp(-(rate_max + rate_min) / 4), which is 0.0066 by default.

    Raises:
      ValueError: if `rate_min` is below 0, or `rate_max` not above 0.
    """

    rate_min: float = 0.1
    """The rate of the noise at data, at least 0."""
    rate_max: float = 20.0
    """The rate of the noise at noise, above 0."""

    def __post_init__(self):
        checks.setting(self, "rate_min", "a rate of noise, so that alpha_t grows")
        checks.setting(self, "rate_max", "a rate of noise, so that alpha_t grows", above=True)

    def _log_alpha(self, t):
        s = 1 - t
        return -(s**2) * (self.rate_max - self.rate_min) / 4 - s * self.rate_min / 2

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return jnp.exp(self._log_alpha(t))

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Polynomial:
    """The linear path in another time.

    alpha_t = t^power,  beta_t = 1 - t^power

    For a power above 1 the velocity vanishes at t = 0 and says nothing of the data there: grids of `fmjax.sampling` start later.
    Below 1 it is infinite there.

    Raises:
      ValueError: if `power` is not above 0.
    """

    power: float = 2.0
    """The power of t, above 0."""

    def __post_init__(self):
        checks.setting(self, "power", "the power of t, so that alpha_t grows", above=True)

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return t**self.power

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return 1 - t**self.power


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SquareRoot:
    """The path of the course's second lab.

    alpha_t = t,  beta_t = sqrt(1 - t)

    The velocity is infinite at t = 1: grids for it end before 1.
    """

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t, like t."""
        return t

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t, like t."""
        return jnp.sqrt(1 - t)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Joint:
    """The path of a pytree whose leaves go along paths of their own; see `joint`, which makes it.

    Its alpha and beta are of the state laid out as one array (B, D): (1, D) for one time, (B, D) for times (B,) or (B, 1).
    """

    parts: tuple[Any, ...]
    """The path of each leaf."""
    layout: states.Layout
    """How the leaves lie side by side."""

    def alpha(self, t) -> chex.ArrayDevice:
        """alpha_t of every leaf, side by side.

        Args:
          t: times, (), (B,) or (B, 1).
        Returns:
          (1, D) for one time, (B, D) for several.
        """
        return self._side_by_side("alpha", t)

    def beta(self, t) -> chex.ArrayDevice:
        """beta_t of every leaf, side by side.

        Args:
          t: times, (), (B,) or (B, 1).
        Returns:
          (1, D) for one time, (B, D) for several.
        """
        return self._side_by_side("beta", t)

    def _side_by_side(self, schedule, t):
        t = jnp.asarray(t, jnp.result_type(float, t))
        column = t if t.ndim == 2 else t.reshape(-1, 1)
        values = [jnp.asarray(getattr(part, schedule)(column)) for part in self.parts]
        return jnp.concatenate(
            [jnp.broadcast_to(value, (len(column), size)) for value, size in zip(values, self.layout.sizes, strict=True)], axis=1
        )

    def check(self, x) -> None:
        """Raises unless a state is laid out as this path is.

        Args:
          x: a state, (B, D), or a pytree of arrays (B, ...).
        Raises:
          ValueError: if its leaves are others, or have other shapes.
        """
        layout, size = states.layout(x), sum(self.layout.sizes)
        if layout is not None and layout != self.layout:
            raise ValueError(f"The path is joint for the state {self.layout}, but the state is {layout}.")
        if layout is None and (jnp.ndim(x) != 2 or jnp.shape(x)[1] != size):
            raise ValueError(f"The path is joint for the state {self.layout}, but x is one array of shape {jnp.shape(x)}.")


def joint(paths, x) -> Joint:
    """The path of a pytree whose leaves go along paths of their own.

    x_t = alpha_t x_1 + beta_t x_0        (1)

    of every leaf, with the alpha and the beta of its own path, as `paths.joint({"image": Linear(), "pose": Cosine()}, x_1)`.

    Args:
      paths: a pytree of paths like the state, or one that stands for all leaves below it.
      x: a state, a pytree of arrays (B, ...), of which only the shapes are read.
    Returns:
      A path of that state, for every function that takes a path and a state.
    Raises:
      TypeError: if x is one array, or a leaf of `paths` is no path.
      ValueError: if the pytrees do not go together.
    """
    layout = states.layout(x)
    if layout is None:
        raise TypeError(f"x is of {type(x)}, but a joint path is of a pytree: give one path, such as paths.Linear(), to one array.")

    def is_path(value):
        return callable(getattr(value, "alpha", None)) and callable(getattr(value, "beta", None))

    for leaf in jax.tree.leaves(paths, is_leaf=is_path):
        checks.path(leaf)
        if isinstance(leaf, Joint):
            raise TypeError("A path in `paths` is joint itself: give one pytree with a path for each leaf, and join it once.")
    try:
        parts = jax.tree.map(lambda path, below: [path] * len(jax.tree.leaves(below)), paths, x, is_leaf=is_path)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"The paths {paths!r} do not go with the state {layout}: give a path for each leaf.") from error
    return Joint(tuple(jax.tree.leaves(parts, is_leaf=is_path)), layout)


def fits(path, x) -> None:
    """Raises unless a path is one, and one of such a state."""
    checks.path(path)
    if isinstance(path, Joint):
        path.check(x)


def on_states(function, *fields, others=(), path=None) -> Field:
    """A field of any state from a function written for arrays: where the state is a pytree, its fields are those of one array (B, D).

    Args:
      function: (x, t, *fields, *others) -> like x, of one array.
      *fields: each (x, t) -> like x, of the state.
      others: functions of the state, and of t or not, to anything.
      path: one that the state is to fit, if any.
    Returns:
      A field, (x, t) -> like x.
    """

    def field(x, t):
        if path is not None:
            fits(path, x)
        if (layout := states.layout(x)) is None:
            return function(x, t, *fields, *others)
        flat = function(layout.flatten("x", x), t, *map(layout.field, fields), *map(layout.of_state, others))
        return layout.unflatten(flat, like=x)

    return field


def lift(t, x) -> chex.ArrayDevice:
    """Times shaped to multiply x: the one place where times meet examples.

    Args:
      t: times, () or (B,); a Python number, or an array of any float dtype.
      x: (B, ...), any float dtype.
    Returns:
      t of shape () or (B, 1, ..., 1), in float32 or in x's dtype where that is wider.
    Raises:
      TypeError: if t is an array of integers or complex numbers.
      ValueError: if t is neither one time nor one per example.
    """
    t = checks.times(t, x)
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


def signal_fraction(path, t) -> chex.ArrayDevice:
    """The share of the data in a path's scales: the time at which the linear path has the same signal-to-noise ratio.

    c_t = alpha_t / (alpha_t + beta_t)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      Numbers in [0, 1], like t; paths of the same noise at the same signal differ in scale alone.
    """
    return path.alpha(t) / (path.alpha(t) + path.beta(t))


def time_from_signal_fraction(path, signal) -> chex.ArrayDevice:
    """The time of a path at a given signal: the inverse of `signal_fraction`, by bisection.

    alpha_t / (alpha_t + beta_t) = signal

    Args:
      path: anything with `alpha(t)` and `beta(t)`, whose ratio alpha_t / beta_t rises over [0, 1].
      signal: in [0, 1], any shape; noise is 0, data 1.
    Returns:
      Times like signal, in [0, 1], the nearer end where the path does not reach it; differentiable in the signal and the path.
    Raises:
      TypeError: if `path` is no path, or the signal is not of real numbers.
      ValueError: if a known signal is outside [0, 1], or along a joint path has another last axis than its state, (..., D).
    """
    checks.path(path)
    checks.real("signal", signal)
    if isinstance(path, Joint):
        if jnp.shape(signal)[-1:] != (sum(path.layout.sizes),):
            raise ValueError(
                f"The path is joint, but signal has shape {jnp.shape(signal)}: the leaves reach a signal at times of their own, so ask "
                "the path of one leaf."
            )
        ends = np.cumsum(path.layout.sizes)[:-1]
        each = zip(path.parts, jnp.split(jnp.asarray(signal), ends, axis=-1), strict=True)
        return jnp.concatenate([time_from_signal_fraction(part, value) for part, value in each], axis=-1)
    signal = jnp.asarray(signal, jnp.result_type(float, signal))
    if not isinstance(signal, Tracer) and not ((signal >= 0) & (signal <= 1)).all():
        raise ValueError(f"The signal is {signal}, but alpha / (alpha + beta) is in [0, 1]: 0 is noise, 1 is data.")
    # Each round evaluates 2^10 intervals at once, since a device finds that easier than ten halvings one by one.
    parts, t, width = 2**10, jnp.zeros_like(signal), 1.0
    for _ in range(-(-(jnp.finfo(signal.dtype).nmant + 1) // 10)):
        width = width / parts
        inner = t[None] + width * jnp.arange(1, parts, dtype=t.dtype).reshape(-1, *(1,) * t.ndim)
        t = t + width * (signal_fraction(path, inner) <= signal[None]).sum(0)
    first, last = (signal_fraction(path, jnp.asarray(end, t.dtype)) for end in (0, 1))
    inside = (signal > first) & (signal < last)

    def over(slope, value):
        """Nothing where the slope is not finite, or the path does not get there."""
        usable = jnp.isfinite(slope) & (slope > 0) & inside
        return jnp.where(usable, value / jnp.where(usable, slope, 1), 0)

    def newton(missing, t):
        value, slope = jax.jvp(missing, (t,), (jnp.ones_like(t),))
        return t - over(slope, value)

    # One step of Newton's method for what is left; derivatives of any order by the implicit function theorem.
    t = lax.custom_root(
        lambda t: signal_fraction(path, t) - signal, t + width / 2, newton, lambda slope, value: over(slope(jnp.ones_like(value)), value)
    )
    t = jnp.where(signal <= first, 0, jnp.where(signal >= last, 1, jnp.clip(t, 0, 1)))
    return jnp.where(jnp.isnan(signal), jnp.nan, t)


def interpolate(path, x_0, x_1, t) -> chex.ArrayDevice:
    """Point on the path from x_0 to x_1 at time t.

    x_t = alpha_t x_1 + beta_t x_0        (1)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,).
    Returns:
      x_t, like x_1; the sum is made in float32 or wider.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    fits(path, x_1)
    if (layout := states.layout(x_1)) is not None:
        flat = interpolate(path, layout.flatten("x_0", x_0), layout.flatten("x_1", x_1), t)
        return layout.unflatten(flat, like=x_1)
    x_0, x_1 = checks.floats("x_0", x_0), checks.floats("x_1", x_1)
    checks.like("x_0", x_0, x_1)
    t = lift(checks.on_path(t), x_1)
    return (path.alpha(t) * x_1 + path.beta(t) * x_0).astype(x_1.dtype)


def flow(path, x_0, x_1, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """Point on the path from x_0 to x_1 at time t, and its velocity.

    x_t = alpha_t x_1 + beta_t x_0,  u_t = d x_t / dt    (MIT 6.S184, "Flow Matching for Gaussian Conditional Probability Paths")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      x_0: noise, (B, ...), any float dtype.
      x_1: data, like x_0.
      t: times in [0, 1], () or (B,).
    Returns:
      x_t and u_t, each like x_1. u_t is infinite where the path's derivative is.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    fits(path, x_1)
    if (layout := states.layout(x_1)) is not None:
        both = flow(path, layout.flatten("x_0", x_0), layout.flatten("x_1", x_1), t)
        return layout.unflatten(both[0], like=x_1), layout.unflatten(both[1], like=x_1)
    t = checks.times(checks.on_path(t), checks.floats("x_1", x_1))
    return jax.jvp(lambda t: interpolate(path, x_0, x_1, t), (t,), (jnp.ones_like(t),))


def _noise_at(path, x, x_1, t):
    """The x_0 whose path to x_1 passes x at time t: (1) solved for x_0, for beta_t > 0."""
    x, x_1 = checks.floats("x", x), checks.floats("x_1", x_1)
    checks.like("x", x, x_1)
    t = lift(checks.on_path(t), x_1)
    return (x - path.alpha(t) * x_1) / path.beta(t)


def conditional_velocity(path, x, x_1, t) -> chex.ArrayDevice:
    """Velocity at x of the flow that carries all noise to the one point x_1.

    u_t(x | z) = (alpha'_t - alpha_t beta'_t / beta_t) z + (beta'_t / beta_t) x    (MIT 6.S184, "Gaussian probability path")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      x: states, (B, ...), any float dtype.
      x_1: data (the course's z), like x.
      t: times with beta_t > 0, () or (B,).
    Returns:
      u_t(x | x_1), like x; infinite where beta_t = 0 unless x is there already.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    fits(path, x_1)
    if (layout := states.layout(x_1)) is not None:
        flat = conditional_velocity(path, layout.flatten("x", x), layout.flatten("x_1", x_1), t)
        return layout.unflatten(flat, like=x_1)
    return flow(path, _noise_at(path, x, x_1, t), x_1, t)[1]


def conditional_score(path, x, x_1, t) -> chex.ArrayDevice:
    """Gradient in x of log p_t(x | x_1).

    grad log p_t(x | z) = -(x - alpha_t z) / beta_t^2    (MIT 6.S184, "Gaussian probability path")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      x: states, (B, ...), any float dtype.
      x_1: data (the course's z), like x.
      t: times with beta_t > 0, () or (B,).
    Returns:
      The score, like x; infinite where beta_t = 0.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, or t is neither one time nor one per example.
    """
    fits(path, x_1)
    if (layout := states.layout(x_1)) is not None:
        flat = conditional_score(path, layout.flatten("x", x), layout.flatten("x_1", x_1), t)
        return layout.unflatten(flat, like=x_1)
    noise = _noise_at(path, x, x_1, t)
    return (-noise / path.beta(lift(t, noise))).astype(x_1.dtype)
