"""Times: densities of t for training, grids of t for sampling.

Training draws one t an example; a network errs differently at different t, so where the draws fall is a choice.
Sampling follows a field along a grid, an increasing array of times that starts at noise (0) and ends at data (1).
"""

import jax
import jax.numpy as jnp


def uniform(key, n):
    """n independent times, t ~ Unif[0, 1)    (notes 004, "Flow Matching").

    Args:
      key: a typed key.
      n: how many.
    Returns:
      Times, (n,), float32.
    """
    return jax.random.uniform(key, (n,))


def stratified(key, n):
    """n uniform times, one in each of n equal intervals, in random order: the loss of a batch varies less.

    t_i = (p_i + u_i) / n,  p a permutation, u_i ~ Unif[0, 1)    (Kingma et al. 2021, appendix I.1, with u_i independent)

    Args:
      key: a typed key.
      n: how many.
    Returns:
      Times, (n,), float32; each is uniform on [0, 1).
    """
    key_order, key_within = jax.random.split(key)
    t = (jax.random.permutation(key_order, n) + jax.random.uniform(key_within, (n,))) / n
    # The sum can round up to n.
    return jnp.minimum(t, 1 - jnp.finfo(t.dtype).epsneg)


def logit_normal(key, n, mean=0.0, std=1.0):
    """n times whose logit is normal, which prefers the middle of the path    (Esser et al. 2024, eq. 19).

    t = 1 / (1 + exp(-g)),  g ~ N(mean, std^2)

    Args:
      key: a typed key.
      n: how many.
      mean: of the logit; above 0 prefers times near the data.
      std: of the logit.
    Returns:
      Times, (n,), float32.
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def grid(steps, start=0.0, end=1.0):
    """The uniform grid of `steps` steps, `steps + 1` times    (notes 003, "Euler Method": h = 1 / n).

    Args:
      steps: how many steps, at least 1.
      start: the first time.
      end: the last time; below 1 for a path whose velocity is infinite there.
    Returns:
      Times, (steps + 1,), float32.
    Raises:
      ValueError: if steps is not positive or end is not after start.
    """
    if steps < 1 or not end > start:
        raise ValueError(f"A grid has at least one step and ends after it starts, got steps={steps}, start={start}, end={end}.")
    return jnp.linspace(start, end, steps + 1)


def shift(t, factor):
    """Moves times towards noise, for a factor above 1, as larger images need    (Esser et al. 2024, eq. 23, with t reversed).

    t' = t / (t + factor (1 - t)),  so that on the linear path beta / alpha grows by the factor

    Args:
      t: times in [0, 1], any shape: a grid, or a batch for training.
      factor: 1 leaves t as it is.
    Returns:
      Times, like t, with 0 and 1 in their places.
    """
    return t / (t + factor * (1 - t))
