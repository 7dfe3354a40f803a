"""Layers that the networks share: embeddings of times, labels and positions."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer


def batch_times(t, x):
    """One time an example, (B,), float32, from a time or one an example."""
    t = jnp.asarray(t, jnp.float32)
    if t.shape not in ((), x.shape[:1]):
        raise ValueError(f"t has shape {t.shape}, but it must be () or one time an example, {x.shape[:1]}, for x of shape {x.shape}.")
    return jnp.broadcast_to(t, x.shape[:1])


def sinusoids(t, width, max_period=10_000.0):
    """Cosines and sines of t at frequencies that fall geometrically from 1 to 1 / max_period    (Peebles and Xie 2023).

    [cos(t w_i), sin(t w_i)],  w_i = max_period^(-2i / width),  i = 0 ... width / 2 - 1

    Args:
      t: (B,), float32.
      width: of the embedding, even.
      max_period: the longest wave's, over 2 pi.
    Returns:
      (B, width), float32.
    """
    frequencies = max_period ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    phase = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def grid_positions(height, width, features):
    """Fixed sine-cosine positions of a grid of patches: half the features for the column, half for the row    (Peebles and Xie 2023).

    Args:
      height: rows.
      width: columns.
      features: of the embedding, a multiple of 4.
    Returns:
      (1, height * width, features), float32, row by row.
    """
    frequencies = 10_000.0 ** (-np.arange(features // 4) / (features // 4))
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    phases = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=-1)[None].astype(np.float32)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through a two-layer network    (Peebles and Xie 2023)."""

    width: int
    frequencies: int = 256
    scale: float = 1000.0
    """Multiplies t in [0, 1]: published discrete-time networks count to 1000."""
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t):
        normal = nn.initializers.normal(0.02)
        h = sinusoids(self.scale * t, self.frequencies).astype(self.dtype)
        h = nn.silu(nn.Dense(self.width, kernel_init=normal, dtype=self.dtype)(h))
        return nn.Dense(self.width, kernel_init=normal, dtype=self.dtype)(h)


class LabelEmbedding(nn.Module):
    """A table with a row a class and one more, the last, for no class.

    A label outside [0, classes] is an error where its value is known, and gives nan inside a compiled function.
    """

    classes: int
    width: int

    @nn.compact
    def __call__(self, y):
        table = self.param("embedding", nn.initializers.normal(0.02), (self.classes + 1, self.width))
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"y has dtype {y.dtype}, but labels are integers from 0 to {self.classes} (the last means no class).")
        if not isinstance(y, Tracer):
            wrong = np.asarray(y)[(np.asarray(y) < 0) | (np.asarray(y) > self.classes)]
            if wrong.size:
                raise ValueError(
                    f"label {wrong.flat[0]} is out of range: labels are 0 to {self.classes - 1}, and {self.classes} means no class."
                )
        return jnp.asarray(table).at[y].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def require_labels(y, x):
    """y, or an error that says what is missing."""
    if y is None or jnp.shape(y) != x.shape[:1]:
        given = "none" if y is None else f"shape {jnp.shape(y)}"
        raise ValueError(f"This network has classes and needs one label an example, y of shape {x.shape[:1]}, got {given}.")
    return y
