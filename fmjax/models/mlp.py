"""A multilayer perceptron for points."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from fmjax.models import conditions, layers

__all__ = ["MLP", "plain", "Residual"]


def plain(features, activation) -> Callable:
    """The layer of h alone: the input has in it what the condition is.

    activation(W h + b)

    Args:
      features: of the output.
      activation: a function of an array.
    Returns:
      A function of h, (B, n), and of the embedding e, which it leaves out, to (B, features).
    """
    return lambda h, e: activation(nn.Dense(features)(h))


class Residual(nn.Module):
    """The layer that adds to h, by the embedding e of the time and the condition.

    h + W_3 activation(W_1 N(h) + W_2 e)

    with N a layer normalisation. Its last layer starts at zero, so that it starts as the identity, or where h is of another width as a
    dense layer.
    """

    features: int
    """Of the output."""
    activation: Callable = nn.silu
    """A function of an array."""

    @nn.compact
    def __call__(self, h, e):
        skip = h if h.shape[-1] == self.features else nn.Dense(self.features, name="skip")(h)
        h = nn.Dense(self.features, name="in")(layers.LayerNorm(name="norm")(skip))
        h = self.activation(h + nn.Dense(self.features, use_bias=False, name="embedding")(e))
        return skip + nn.Dense(self.features, kernel_init=nn.initializers.zeros_init(), name="out")(h)


class MLP(nn.Module):
    """Dense layers on [t, x], and on an embedding of y where there is a condition    (the course's second lab).

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, ...), t is () or (B,), y is
    (B,) with `num_classes` for no class, or what `condition` takes; the output is like x.
    """

    hidden_size: int = 64
    """Features of each layer."""
    depth: int = 4
    """How many layers there are, besides the last."""
    activation: Callable = nn.silu
    """A function of an array."""
    num_classes: int | None = None
    """How many classes there are, where y is labels; the label of that number is no class. None for no labels."""
    condition: nn.Module | None = None
    """What y is, in place of `num_classes`: a module of `conditions` that gives a vector."""
    time_embedding: nn.Module | None = None
    """Of the time: `layers.Sinusoids`, `layers.Fourier` or `layers.LearnableFourier`; None is the time itself."""
    layer: Callable = plain
    """Makes the layers, `(features, activation)` to a function of h and of the embedding e: `plain` or `Residual`."""
    end_time: bool = False
    """Whether the network has a second time, `end`, for a flow map (see `flow_maps`): `model.apply(params, x, s, end=t)`. How far it is
    from the first is another input, or with a `time_embedding` is embedded beside it and at first adds nothing."""

    @nn.compact
    def __call__(self, x, t, y=None, end=None):
        times = layers.both_times(self, t, end, x)
        h = x.reshape(x.shape[0], -1)
        features = h.shape[1]
        given = conditions.embed(self, y, x, self.hidden_size, label="LabelEmbedding_0")
        for kind in ("tokens", "image"):
            if getattr(given, kind) is not None:
                raise ValueError(
                    f"The condition, {type(self.condition).__name__}, gives {kind}, but an MLP takes a vector alone: give conditions.Label "
                    "or conditions.Vector, or take a DiT or a UNet."
                )
        if self.time_embedding is None:
            e = jnp.stack(times, axis=-1)
        else:
            make = functools.partial(layers.TimeEmbedding, self.hidden_size, kernel_init=nn.initializers.lecun_normal())
            e = layers.embed_times(self, make, self.time_embedding, t, end, x)
        h = jnp.concatenate([e, h], axis=-1)
        if given.vector is not None:
            h, e = (jnp.concatenate([part, given.vector], axis=-1) for part in (h, e))
        for _ in range(self.depth):
            h = self.layer(self.hidden_size, self.activation)(h, e)
        return nn.Dense(features)(h).reshape(x.shape).astype(x.dtype)
