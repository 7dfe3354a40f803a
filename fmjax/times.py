"""Times: densities of t for training, grids of t for sampling.

Training draws one t per example; a network errs differently at different t, so where the draws fall is a choice.
Sampling follows a field along a grid, an increasing array of times that starts at noise (0) and ends at data (1).
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.core import Tracer

from fmjax import checks, paths

__all__ = [
    "uniform_grid",
    "karras",
    "log_snr_grid",
    "optimize_grid",
    "shift",
    "resolution_factor",
    "cosine",
    "quadratic",
    "uniform",
    "stratified",
    "logit_normal",
    "log_normal",
]


def _known(function):
    """The same with a result that is known where its arguments are, also inside `jax.jit`: samplers check what they know."""

    @functools.wraps(function)
    def evaluated(*arguments, **named):
        with jax.ensure_compile_time_eval():
            return function(*arguments, **named)

    return evaluated


def _check_draw(key, n):
    checks.key(key)
    checks.whole("n", n, "how many times are drawn")


def uniform(key, n) -> chex.ArrayDevice:
    """Independent times, uniform from noise to data.

    t_i ~ Unif[0, 1]    (MIT 6.S184, "Flow Matching")

    Args:
      key: a typed key.
      n: how many.
    Returns:
      Times, (n,), float32, below 1.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if n is not a whole number of at least 1.
    """
    _check_draw(key, n)
    return jax.random.uniform(key, (n,))


def stratified(key, n) -> chex.ArrayDevice:
    """Uniform times, one in each of n equal intervals, in random order: the loss of a batch varies less.

    t_i = (p_i + u_i) / n,  u_i ~ Unif[0, 1]    (Kingma et al. 2021, arXiv:2107.00630, appendix I.1, with u_i independent)

    with p a random permutation of 0 to n - 1.

    Args:
      key: a typed key.
      n: how many.
    Returns:
      Times, (n,), float32; each is uniform on [0, 1).
    Raises:
      TypeError: if the key is not typed.
      ValueError: if n is not a whole number of at least 1.
    """
    _check_draw(key, n)
    key_order, key_within = jax.random.split(key)
    t = (jax.random.permutation(key_order, n) + jax.random.uniform(key_within, (n,))) / n
    # The sum can round up to n.
    return jnp.minimum(t, 1 - jnp.finfo(t.dtype).epsneg)


def logit_normal(key, n, mean=0.0, std=1.0) -> chex.ArrayDevice:
    """Times whose logit is normal, which prefers the middle of the path.

    t = 1 / (1 + exp(-g)),  g ~ N(mean, std^2)    (Esser et al. 2024, arXiv:2403.03206, eq. 19)

    Args:
      key: a typed key.
      n: how many.
      mean: of the logit; above 0 prefers times near the data.
      std: standard deviation of the logit, at least 0.
    Returns:
      Times, (n,), float32, in (0, 1).
    Raises:
      TypeError: if the key is not typed.
      ValueError: if n is not a whole number of at least 1, or `std` is negative.
    """
    _check_draw(key, n)
    checks.number("mean", mean, "the mean of the logit")
    checks.number("std", std, "the standard deviation of the logit", least=0)
    t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))
    # Far from the middle it rounds to 1, where some paths' velocity is infinite.
    return jnp.clip(t, jnp.finfo(t.dtype).tiny, 1 - jnp.finfo(t.dtype).epsneg)


def log_normal(key, n, path, mean=-1.2, std=1.2) -> chex.ArrayDevice:
    """Times at which the logarithm of the noise level beta / alpha is normal, EDM's density for training.

    log(beta_t / alpha_t) ~ N(mean, std^2)        (Karras et al. 2022, arXiv:2206.00364, table 1, P_mean and P_std)

    Args:
      key: a typed key.
      n: how many.
      path: anything with `alpha(t)` and `beta(t)`.
      mean: of the logarithm; -0.4 in EDM2.
      std: standard deviation of the logarithm, at least 0; 1.0 in EDM2.
    Returns:
      Times, (n,), float32, the nearer end where the path does not reach a noise level.
    Raises:
      TypeError: if the key is not typed, or `path` is no path, or joint.
      ValueError: if n is not a whole number of at least 1, or `std` is negative.
    """
    _check_draw(key, n)
    _check_one(path)
    checks.number("mean", mean, "the mean of the logarithm of the noise level")
    checks.number("std", std, "the standard deviation of the logarithm", least=0)
    # With alpha / (alpha + beta) = 1 / (1 + beta / alpha) its logit is minus the logarithm.
    return paths.time_from_signal_fraction(path, logit_normal(key, n, -mean, std))


def _check_steps(steps, least):
    """Raises unless steps is a whole number, at least so many."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < least:
        raise ValueError(f"steps={steps!r}, but the grid has at least {'one step' if least == 1 else f'{least} steps'}, a whole number.")


@_known
def uniform_grid(steps, start=0.0, end=1.0) -> chex.ArrayDevice:
    """The uniform grid.

    t_i = start + i (end - start) / steps    (MIT 6.S184, "Euler Method", h = 1 / n)

    Args:
      steps: how many steps, at least 1.
      start: the first time.
      end: the last time; below 1 for a path whose velocity is infinite there.
    Returns:
      Times, (steps + 1,), float32.
    Raises:
      ValueError: if steps is not positive or end is not after start.
    """
    _check_steps(steps, 1)
    checks.number("start", start, "the first time")
    checks.number("end", end, "the last time")
    if not start < end:
        raise ValueError(f"A grid ends after it starts, and both are finite, got steps={steps}, start={start}, end={end}.")
    return jnp.linspace(start, end, steps + 1)


@_known
def shift(t, factor) -> chex.ArrayDevice:
    """Moves times towards noise, for a factor above 1, as larger images need.

    s = t / (t + factor (1 - t))    (Esser et al. 2024, arXiv:2403.03206, eq. 23)

    so that on the linear path the noise level beta / alpha grows by the factor.

    Args:
      t: times in [0, 1], any shape: a grid, or a batch for training.
      factor: above 0; 1 leaves t as it is.
    Returns:
      Times, like t, with 0 and 1 in their places.
    Raises:
      ValueError: if the factor is not above 0, or a known time is outside [0, 1].
    """
    checks.number("factor", factor, "what the noise level is multiplied with, 1 to leave times as they are", least=0, above=True)
    _check_times(t)
    return t / (t + factor * (1 - t))


def resolution_factor(size, base) -> float:
    """The factor of `shift` for images of another size than times were chosen for.

    sqrt(size / base)    (Esser et al. 2024, arXiv:2403.03206, eq. 23)

    Args:
      size: numbers in an image, such as 512 * 512.
      base: numbers in an image of the size that needs no shift.
    Returns:
      The factor, a number.
    Raises:
      ValueError: if one is not above 0.
    """
    checks.number("size", size, "a count of numbers in an image, such as 512 * 512", least=0, above=True)
    checks.number("base", base, "a count of numbers in an image, such as 256 * 256", least=0, above=True)
    return (size / base) ** 0.5


def _check_times(t):
    """Raises unless times are real numbers in [0, 1], wherever they are known."""
    checks.real("t", t)
    if not isinstance(t, Tracer) and not ((np.asarray(t) >= 0) & (np.asarray(t) <= 1)).all():
        raise ValueError(f"t is {t}, but times go from 0, noise, to 1, data.")


@_known
def cosine(t) -> chex.ArrayDevice:
    """Moves times towards both ends: steps shrink towards noise and towards data.

    s = (1 - cos(pi t)) / 2

    Args:
      t: times in [0, 1], any shape.
    Returns:
      Times, like t, with 0 and 1 in their places.
    Raises:
      ValueError: if a known time is outside [0, 1].
    """
    _check_times(t)
    return jnp.sin(jnp.pi / 2 * t) ** 2


@_known
def quadratic(t) -> chex.ArrayDevice:
    """Moves times towards data: steps shrink towards data.

    s = 1 - (1 - t)^2    (Song, Meng and Ermon 2021, arXiv:2010.02502, appendix D.2)

    Args:
      t: times in [0, 1], any shape.
    Returns:
      Times, like t, with 0 and 1 in their places.
    Raises:
      ValueError: if a known time is outside [0, 1].
    """
    _check_times(t)
    return 1 - (1 - t) ** 2


@_known
def karras(path, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> chex.ArrayDevice:
    """EDM's grid in a path's own time: powers of the noise level in equal steps, and data.

    sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,  i < n,  sigma_n = 0
    (Karras et al. 2022, arXiv:2206.00364, eq. 5)

    with the noise level sigma = beta / alpha.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      steps: how many steps n, at least 2.
      sigma_min: the last noise level but 0.
      sigma_max: the first noise level; the path must reach it.
      rho: above 1 makes steps shrink towards data.
    Returns:
      Times, (steps + 1,); it starts where the noise level is `sigma_max`, so noise there is beta_t N(0, I) to good approximation.
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if there are fewer than 2 steps, the levels are not 0 < sigma_min < sigma_max, or the path does not reach them.
    """
    _check_one(path)
    _check_steps(steps, 2)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        checks.number(name, value, "a noise level" if name != "rho" else "a power", least=0, above=True)
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, but the grid goes from sigma_max to sigma_min.")
    root = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return _at_levels(path, np.append(root**rho, 0.0))


@_known
def log_snr_grid(path, steps, start, end) -> chex.ArrayDevice:
    """The grid in equal steps of the log signal-to-noise ratio.

    lambda_i = lambda_0 + i (lambda_n - lambda_0) / n,  lambda_t = log(alpha_t^2 / beta_t^2)
    (Lu et al. 2022, arXiv:2206.00927, section 5)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      steps: how many steps n, at least 1.
      start: the first time, with alpha_t > 0.
      end: the last time, with beta_t > 0.
    Returns:
      Times, (steps + 1,).
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if steps is not positive, end is not after start, or the ratio is infinite at one of them.
    """
    _check_one(path)
    uniform_grid(steps, start, end)
    first, last = (float(jnp.log(path.alpha(t)) - jnp.log(path.beta(t))) for t in map(jnp.asarray, (float(start), float(end))))
    if not np.all(np.isfinite([first, last])):
        raise ValueError(f"log(alpha / beta) is {first:g} at t = {start} and {last:g} at t = {end}: take times between noise and data.")
    inner = np.exp(-np.linspace(first, last, steps + 1))
    return _at_levels(path, inner).at[0].set(start).at[-1].set(end)


def _check_one(path):
    """Raises unless a path has one noise level at a time."""
    checks.path(path)
    if isinstance(path, paths.Joint):
        raise TypeError("A joint path has another noise level for each leaf: give the path of one of them, or a grid of times.")


def _at_levels(path, levels):
    """The times of falling noise levels beta / alpha."""
    signal = 1 / (1 + np.asarray(levels))
    first = float(paths.signal_fraction(path, jnp.asarray(0.0)))
    # The path's own first level, given as a number, is rounded otherwise than its signal.
    if signal[0] < first * (1 - 1e-6):
        raise ValueError(f"The first noise level is {levels[0]:g}, but the path starts at {1 / first - 1:g}: take a smaller one.")
    return paths.time_from_signal_fraction(path, np.maximum(signal, first))


def optimize_grid(error, first, *, iterations=200) -> chex.ArrayDevice:
    """The grid between the same ends that makes an error small, by L-BFGS through the sampler.

    As in "Align Your Steps" (Sabour et al. 2024, arXiv:2404.14507), for another error.

    For a field of one's own, against a fine solution from the same noise:

        fine, _ = sampling.sample_ode(field, x_0, times.uniform_grid(500))
        error = lambda grid: ((sampling.sample_ode(field, x_0, grid)[0] - fine) ** 2).mean()
        grid = times.optimize_grid(error, times.uniform_grid(8))

    Args:
      error: a grid to a positive number, differentiable; compiled here.
      first: the grid to begin with, (n + 1,), increasing.
      iterations: how many at most.
    Returns:
      Times, like `first`, increasing, with an error no larger.
    Raises:
      ValueError: if the grid does not increase, or the error of the first is not a positive number.
    """
    checks.function("error", error, "lambda grid: ((sampling.sample_ode(field, x_0, grid)[0] - fine) ** 2).mean()")
    checks.whole("iterations", iterations, "how many there are at most")
    first = np.asarray(checks.grid(first, jnp.result_type(float), "first"), np.float64)
    span = first[-1] - first[0]

    def grid_of(logits):
        inner = first[0] + span * jnp.cumsum(jax.nn.softmax(logits))[:-1]
        return jnp.concatenate([jnp.asarray(first[:1], inner.dtype), inner, jnp.asarray(first[-1:], inner.dtype)])

    log_error = jax.jit(jax.value_and_grad(lambda logits: jnp.log(error(grid_of(logits)))))
    seen = []

    def measured(logits):
        value, gradient = (np.asarray(out, np.float64) for out in log_error(jnp.asarray(logits)))
        usable = np.isfinite(value) and np.all(np.isfinite(gradient))
        if usable:
            seen.append((float(value), logits.copy()))
        # A grid whose steps have collapsed is only a bad one to the search.
        return (value, gradient) if usable else (np.inf, np.zeros_like(logits))

    logits = np.log(np.diff(first))
    if not np.isfinite(measured(logits)[0]):
        raise ValueError(
            "The error of the grid to begin with, or its gradient, is not a positive finite number: compare with a finer solution."
        )
    scipy.optimize.minimize(measured, logits, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return grid_of(jnp.asarray(min(seen, key=lambda one: one[0])[1]))
