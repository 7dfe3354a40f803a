"""A multilayer perceptron for points."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from fmjax.models import layers


class MLP(nn.Module):
    """Dense layers on [t, x], and on an embedding of y where there are classes    (the course's second lab).

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, ...), t is () or (B,), y is
    (B,) with `num_classes` for no class; the output is like x.
    """

    hidden_size: int = 64
    depth: int = 4
    activation: Callable = nn.silu
    num_classes: int | None = None

    @nn.compact
    def __call__(self, x, t, y=None):
        h = x.reshape(x.shape[0], -1)
        features = h.shape[1]
        layers.check_labels(self.num_classes, y, x)
        h = jnp.concatenate([layers.batch_times(t, x)[:, None], h], axis=-1)
        if self.num_classes is not None:
            h = jnp.concatenate([h, layers.LabelEmbedding(self.num_classes, self.hidden_size)(y)], axis=-1)
        for _ in range(self.depth):
            h = self.activation(nn.Dense(self.hidden_size)(h))
        return nn.Dense(features)(h).reshape(x.shape).astype(x.dtype)
