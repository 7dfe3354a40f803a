"""Conditions of any kind: modules that make of y what a network takes.

    Label(num_classes)    integers, (B,)                 a vector, added to the time's embedding
    Vector()              real numbers, (B, k)           the same
    Tokens()              a sequence, (B, L, k)          tokens, which the network attends to
    Image()               an image, (B, *space, k)       channels beside the input's
    Several({...})        a dict of those                all of it

A network has one in its field `condition`; a module of your own with the same call, `(y, x, features) -> Embedded`, is one too.

What is not given has learnt values in its place, by which networks are guided (Ho and Salimans 2022, arXiv:2207.12598). One rule says what
that is, for all real kinds: what is nan is not given, since nan is no number and goes wherever y goes, in any batch, without a wrapper. So
the null of `guidance.classifier_free` and `guidance.drop_labels` is nan; of labels, which are integers, it is `num_classes`. No nan is in
what is computed from it, nor in gradients.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from fmjax.models import layers

__all__ = ["Label", "Vector", "Tokens", "Image", "Several", "Embedded"]


class Embedded(NamedTuple):
    """What a network takes of a condition, each None where there is none of it."""

    vector: chex.ArrayDevice | None = None
    """(B, features), added to the embedding of the time."""
    tokens: chex.ArrayDevice | None = None
    """(B, L, features), for cross-attention."""
    tokens_mask: chex.ArrayDevice | None = None
    """(B, L), which tokens there are; None is all."""
    image: chex.ArrayDevice | None = None
    """(B, *space, k), concatenated to the input."""


def embed(network, y, x, features, label="label") -> Embedded:
    """What a network takes of y, inside its compact method: by its field `condition`, or of labels by its field `num_classes`.

    Args:
      network: with the two fields, of which one at most is not None.
      y: the condition, or None for a network without.
      x: the input, (B, ...).
      features: of vectors and tokens.
      label: the name of the table of labels.
    Returns:
      What there is of it.
    Raises:
      ValueError: if both fields are given, or y is missing or is of another kind or batch.
    """
    if network.condition is None:
        layers.check_labels(network.num_classes, y, x)
        if network.num_classes is None:
            return Embedded()
        return Embedded(vector=layers.LabelEmbedding(network.num_classes, features, name=label)(y))
    if network.num_classes is not None:
        raise ValueError(
            f"num_classes is {network.num_classes} and condition is a {type(network.condition).__name__}, but one of them says what y is: "
            f"for both give condition=conditions.Several({{'label': conditions.Label({network.num_classes}), ...}})."
        )
    if y is None:
        raise ValueError(
            f"This network has a condition, {type(network.condition).__name__}, and needs y, one for each of {x.shape[0]} examples, got "
            "none: what is not given is nan, or of labels num_classes."
        )
    given = network.condition(y, x, features)
    if not isinstance(given, Embedded):
        raise TypeError(
            f"The condition gives a {type(given).__name__}, but it gives a conditions.Embedded, such as Embedded(vector=(B, features))."
        )
    return given


def _given(y, x, kind, wanted):
    """y as an array of real numbers, and where it is given along its last axis.

    Half of it there is an error where it is known, and otherwise stays nan. `wanted` is y's shape, in which "k" and "L" are any size.
    """
    words = f"({', '.join(map(str, wanted))})"
    if isinstance(y, Mapping) or y is None or isinstance(y, str):
        raise TypeError(f"y is {layers.described(y)}, but this condition is {kind}, {words}, of real floats: nan where it is not given.")
    # Before it meets a trace, in which all arrays are traced.
    known = np.asarray(y) if not isinstance(y, Tracer) and getattr(y, "is_fully_addressable", True) else None
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            f"y has dtype {y.dtype}, but this condition is {kind} of real floats: convert numbers with .astype(jnp.float32), and give "
            "labels to conditions.Label."
        )
    same = y.ndim == len(wanted) and all(want in (size, "k", "L") for size, want in zip(y.shape, wanted, strict=True))
    if not same or 0 in y.shape:
        raise ValueError(
            f"y has shape {y.shape}, but for x of shape {x.shape} this condition is {kind}, {words}, batch first: give one per example."
        )
    if known is not None:
        missing = np.isnan(known)
        halves = np.argwhere(missing.any(-1) & ~missing.all(-1))
        if halves.size:
            place = tuple(int(i) for i in halves[0])
            raise ValueError(
                f"y{list(place)} is {known[place]}, of which some is nan and some is not: all of it is nan where it is not given, "
                "and parts that can be missing on their own are conditions on their own, in conditions.Several."
            )
    return y.astype(jnp.promote_types(y.dtype, jnp.float32)), ~jnp.isnan(y).all(-1)


def _null(module, features, init):
    """A learnt vector, shaped (features,)."""
    return jnp.asarray(module.param("null", init, (features,)))


class Label(nn.Module):
    """A class of each example, (B,), from 0 to num_classes; the last is no class. A vector of `layers.LabelEmbedding`."""

    num_classes: int
    """How many classes there are; the label of that number is no class."""
    null_label: bool = True
    """Whether there is a label for no class: some published networks have none, and refuse it."""

    @nn.compact
    def __call__(self, y, x, features):
        layers.check_labels(self.num_classes, y, x)
        return Embedded(vector=layers.LabelEmbedding(self.num_classes, features, self.null_label, name="label")(y))


class Vector(nn.Module):
    """Real numbers of each example, (B, k), about 1 in size, through a two-layer network; an example of nan has a learnt vector instead.

    Where some of an example's numbers are nan and some are not is an error where they are known, and gives nan in a compiled function.
    """

    @nn.compact
    def __call__(self, y, x, features):
        y, given = _given(y, x, "a vector of each example", (x.shape[0], "k"))
        given = given[:, None]
        h = nn.silu(nn.Dense(features)(jnp.where(given, y, 0)))
        h = nn.Dense(features, kernel_init=nn.initializers.normal(0.02))(h)
        return Embedded(vector=jnp.where(given, h, _null(self, features, nn.initializers.normal(0.02))[None]))


class Tokens(nn.Module):
    """A sequence, (B, L, k), such as a text encoder's output, which has its order in it; networks attend to what is not nan.

    Shorter sequences are padded with nan to a common L, and an example of nan alone has one learnt token. Where some of a token's
    numbers are nan and some are not is an error where they are known, and gives nan in a compiled function.
    """

    @nn.compact
    def __call__(self, y, x, features):
        y, given = _given(y, x, "a sequence of tokens", (x.shape[0], "L", "k"))
        null = ~given.any(1, keepdims=True) & (jnp.arange(y.shape[1]) == 0)[None]
        h = nn.Dense(features)(jnp.where(given[..., None], y, 0))
        h = jnp.where(null[..., None], _null(self, features, nn.initializers.normal(0.02))[None, None], h)
        return Embedded(tokens=h, tokens_mask=given | null)


class Image(nn.Module):
    """An image (or a signal, or a volume) where x is, (B, *space, k): channels beside x's, and one more that is 1 where it is given.

    Pixels of nan have a learnt value per channel, so an image that is known in part, as in inpainting, is nan in the rest. Where some
    channels of a pixel are nan and some are not is an error where they are known, and gives nan in a compiled function.
    """

    @nn.compact
    def __call__(self, y, x, features):
        y, given = _given(y, x, "an image as large as x", (*x.shape[:-1], "k"))
        given = given[..., None]
        null = _null(self, y.shape[-1], nn.initializers.zeros_init()).reshape((1,) * (y.ndim - 1) + (-1,))
        return Embedded(image=jnp.concatenate([jnp.where(given, y, null), given.astype(y.dtype)], axis=-1))


class Several(nn.Module):
    """Conditions by name: y is a dict of the same keys. Vectors are summed, tokens and images are concatenated in the order of the keys.

    `Several({"label": Label(10), "pose": Vector()})` takes `{"label": (B,) integers, "pose": (B, k)}`; each may be given without the other.
    """

    parts: Mapping[str, nn.Module]
    """The condition of each key."""

    @nn.compact
    def __call__(self, y, x, features):
        if not isinstance(y, Mapping) or set(y) != set(self.parts):
            raise ValueError(
                f"y is {layers.described(y)}, but this condition is a dict of the keys {sorted(self.parts)}: give each of them, nan, or of "
                "labels num_classes, where it is not given."
            )
        given = []
        for name in sorted(self.parts):
            try:
                each = self.parts[name](y[name], x, features)
            except (TypeError, ValueError) as error:
                error.add_note(f"This y is y[{name!r}] of a conditions.Several.")
                raise
            if each.tokens is not None and each.tokens_mask is None:
                # Tokens that are all there, beside others that may not be.
                each = each._replace(tokens_mask=jnp.ones(each.tokens.shape[:2], bool))
            given.append(each)

        def joined(field, join) -> Any:
            values = [getattr(each, field) for each in given if getattr(each, field) is not None]
            return join(values) if values else None

        return Embedded(
            vector=joined("vector", sum),
            tokens=joined("tokens", lambda values: jnp.concatenate(values, axis=1)),
            tokens_mask=joined("tokens_mask", lambda values: jnp.concatenate(values, axis=1)),
            image=joined("image", lambda values: jnp.concatenate(values, axis=-1)),
        )
