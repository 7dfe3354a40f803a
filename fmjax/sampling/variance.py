"""Variance: a step whose noise a network has learnt beside its prediction."""

from typing import Any

import chex
import jax.numpy as jnp

from fmjax import checks, paths, targets
from fmjax.sampling.reparametrisation import noise_kept, position
from fmjax.sampling.steps import DiffusionStep, noise


def learned_variance(predict) -> DiffusionStep:
    """DDPM's step with the variance that a network predicts, for `sample_diffusion`: one evaluation.

    x_s = alpha_s D + beta_s rho E + sqrt(1 - rho^2) beta_t^f beta_s^(1 - f) epsilon,  f = (v + 1) / 2
    (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15)

    with rho the noise level at s over that at t, D = E[x_1 | x_t], E = E[x_0 | x_t]: v = -1 is the variance of the posterior given the
    data, 1 that of the step where nothing is known of them. No noise is added in a step to data. `sigma` is not used: give
    `sampling.sigma_sbdm(path)`, whose SDE the step is of.

    Args:
      predict: (x, t) -> (velocity, v), each like x, from one evaluation.
    Returns:
      A `DiffusionStep`.
    Raises:
      TypeError: if `predict` is no function.
    """
    checks.function("predict", predict, "lambda x, t: (velocity, v)")

    def step(path, velocity, sigma, key, x, t, dt) -> chex.ArrayDevice:
        u, v = _two(predict(x, t))
        data, noise_ = (targets.convert(path, u, x, t, source=targets.velocity, target=target) for target in (targets.data, targets.noise))
        rho = noise_kept(position(path, t), position(path, t + dt))
        here, there = path.beta(t), path.beta(t + dt)
        share = (v.astype(x.dtype) + 1) / 2
        # A power of 0 would be 1 at f = 1.
        scale = jnp.where(there > 0, here**share * jnp.where(there > 0, there, 1) ** (1 - share), 0)
        mean = path.alpha(t + dt) * data + there * rho * noise_
        return mean + jnp.sqrt(1 - rho**2) * scale * noise(key, x.shape, x.dtype)

    step.__name__ = "learned_variance"
    return DiffusionStep(step)


def _two(predicted: Any):
    if not isinstance(predicted, tuple) or len(predicted) != 2:
        raise TypeError(f"predict gave {type(predicted).__name__}, but it gives two arrays, the velocity and v: (velocity, v).")
    checks.like("v", predicted[1], predicted[0])
    return predicted


def clip_data(path, velocity, low=-1.0, high=1.0) -> paths.Field:
    """A velocity whose data stay in the range that data have, as DDPM's samplers for images in [-1, 1] do.

    u = a x + b clip(E[x_1 | x_t], low, high)    (Ho et al. 2020, arXiv:2006.11239)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity: (x, t) -> u_t(x), like x.
      low: the least that data are.
      high: the most.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      TypeError: if `path` is no path, or the velocity is no function.
      ValueError: if `low` is not below `high`.
    """
    checks.number("low", low, "the least that data are")
    checks.number("high", high, "the most that data are", least=low, above=True)
    data = targets.convert_field(path, velocity, source=targets.velocity, target=targets.data)

    def clipped(x, t, data):
        return jnp.clip(data(x, t), low, high)

    return targets.convert_field(path, paths.on_states(clipped, data, path=path), source=targets.data, target=targets.velocity)
