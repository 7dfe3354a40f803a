"""Trajectories: how long and how straight the way of a flow is, from states saved on it."""

from typing import Any

import chex
import jax.numpy as jnp

from fmjax import checks
from fmjax.metrics.sets import root


def _steps(trajectory) -> tuple[Any, Any]:
    """The steps between states, (n, B, D), and their lengths, (n, B)."""
    trajectory = checks.floats("trajectory", trajectory)
    if trajectory.ndim < 3 or len(trajectory) < 2:
        raise ValueError(
            f"trajectory has shape {trajectory.shape}, but it is of states on the way, (n + 1, B, ...) with n at least 1: "
            "sampling.sample_ode(..., save=lambda x, t: x)[1]."
        )
    if trajectory.dtype.itemsize < 4:
        raise TypeError(f"trajectory has dtype {trajectory.dtype}, whose rounding may be longer than a step: sample in float32.")
    steps = jnp.diff(trajectory.reshape(*trajectory.shape[:2], -1), axis=0)
    return steps, root((steps**2).sum(-1))


def _between(times, steps):
    """The times between states, (n, 1)."""
    times = checks.grid(times, steps.dtype)
    if len(times) != len(steps) + 1:
        raise ValueError(f"times has shape {times.shape}, but there is a time for each of the {len(steps) + 1} states.")
    return jnp.diff(times)[:, None]


def path_length(trajectory) -> chex.ArrayDevice:
    """How long the way of each example is.

    sum_i |X_{i+1} - X_i|

    Beside the straight line, `jnp.linalg.norm(trajectory[-1] - trajectory[0], axis=-1)`, it says how straight it is.

    Args:
      trajectory: states on the way, (n + 1, B, ...).
    Returns:
      (B,).
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if it has another shape.
    """
    return _steps(trajectory)[1].sum(0)


def path_energy(trajectory, times) -> chex.ArrayDevice:
    """The energy of the way of each example; exact for Euler's steps.

    int |u_t(X_t)|^2 dt = sum_i |X_{i+1} - X_i|^2 / (t_{i+1} - t_i)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing.
    Returns:
      (B,), at least the square of the straight line over the whole time.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, or the times do not increase.
    """
    steps, lengths = _steps(trajectory)
    return (lengths**2 / _between(times, steps)).sum(0)


def straightness(trajectory, times) -> chex.ArrayDevice:
    """How far the way of each example is from a straight line at constant speed, for which it is 0.

    S = int |u_t(X_t) - (X_1 - X_0)|^2 dt    (Liu et al. 2022, arXiv:2209.03003)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing.
    Returns:
      (B,).
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, or the times do not increase.
    """
    steps, _ = _steps(trajectory)
    between = _between(times, steps)
    mean = steps.sum(0, keepdims=True) / between.sum()
    return (between * ((steps / between[..., None] - mean) ** 2).sum(-1)).sum(0)


def curvature(trajectory) -> chex.ArrayDevice:
    """How much the way of each example turns in all, in radians: 0 for a straight line, 2 pi for a circle.

    sum_i angle(X_i - X_{i-1}, X_{i+1} - X_i)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
    Returns:
      (B,); a step of length 0 turns nowhere, and hides a turn between the steps beside it.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if it has another shape.
    """
    steps, lengths = _steps(trajectory)
    unit = steps / jnp.where(lengths == 0, 1, lengths)[..., None]
    apart, along = (root((value**2).sum(-1)) for value in (unit[1:] - unit[:-1], unit[1:] + unit[:-1]))
    rests = (lengths[1:] == 0) | (lengths[:-1] == 0)
    return jnp.where(rests, 0, 2 * jnp.arctan2(apart, jnp.where(rests, 1, along))).sum(0)


def normalized_path_energy(trajectory, times, distance) -> chex.ArrayDevice:
    """How much more energy the flow takes than optimal transport between the same two sets, NPE.

    |E int |u_t(X_t)|^2 dt - W_2^2| / W_2^2    (Tong et al. 2023, arXiv:2302.00482)

    Args:
      trajectory: states on the way, (n + 1, B, ...).
      times: theirs, (n + 1,), increasing, from 0 to 1.
      distance: W_2 between the first distribution and the data, above 0, as `wasserstein` gives it.
    Returns:
      A number at least 0.
    Raises:
      TypeError: if the states are not of floats of at least 32 bits.
      ValueError: if a shape is another, the times do not increase, or the distance is not above 0.
    """
    checks.number("distance", distance, "W_2 between the two sets", least=0, above=True)
    return jnp.abs(path_energy(trajectory, times).mean() - distance**2) / distance**2
