"""Layers that the networks share: embeddings of times, labels and positions, and normalisations.

An embedding of the time is a module `(B,) -> (B, d)` without the network behind it:

    [cos(1000 t w_i), sin(1000 t w_i)],   w_i = 10000^(-2 i / d)        Sinusoids               (1)
    sqrt(2 / d) [cos(2 pi t w_i), sin(2 pi t w_i)]                      Fourier                 (2)
    sqrt(2 / d) [cos(2 pi t w_i), sin(2 pi t w_i)]                      LearnableFourier        (3)

where the w_i of (2) go from the lowest to the highest, and those of (3) are learnt. The norm of (2) and (3) is exactly 1, since the
squares of a cosine and a sine sum to 1.
"""

import math
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from fmjax import paths

__all__ = [
    "Sinusoids",
    "Fourier",
    "LearnableFourier",
    "TimeEmbedding",
    "LabelEmbedding",
    "LogVariance",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "Dense",
    "CrossAttention",
    "grid_positions",
    "rotary_angles",
    "rotate",
]


def as_matrix(initializer) -> Callable:
    """An initialiser of a convolution's kernel as the matrix from a patch to its features.

    Its numbers are those of the kernel itself, but XLA compiles the drawing of a matrix in a fifth of the time.

    Args:
      initializer: (key, shape, dtype) -> an array, of matrices.
    Returns:
      The same for kernels (*sides, features in, features out).
    """
    return lambda key, shape, dtype=jnp.float32: initializer(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def batch_times(t, x) -> chex.ArrayDevice:
    """One time per example, (B,), float32, from a time or one per example."""
    if jnp.ndim(x) < 2 <= jnp.ndim(t):
        raise ValueError(f"x has shape {jnp.shape(x)} and t {jnp.shape(t)}, but a network is a function of (x, t), in this order.")
    t = paths.lift(t, x)
    return jnp.broadcast_to(t.reshape(t.shape[:1]), x.shape[:1]).astype(jnp.float32)


def _waves(phase):
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class Sinusoids(nn.Module):
    """Cosines and sines of the time, (B,) -> (B, features), at frequencies that fall geometrically from 1 to 1 / max_period.

    [cos(scale t w_i), sin(scale t w_i)],   w_i = p^(-2 i / features)        (1) (Peebles and Xie 2023, arXiv:2212.09748)

    with p the `max_period`.
    """

    features: int = 256
    """How many cosines and sines there are, an even number."""
    scale: float = 1000.0
    """Multiplies t in [0, 1]: published discrete-time networks count to 1000."""
    max_period: float = 10_000.0
    """Of the longest wave, over 2 pi."""

    @nn.compact
    def __call__(self, t):
        _require_even(self.features)
        half = self.features // 2
        return _waves(self.scale * t[:, None] * self.max_period ** (-jnp.arange(half, dtype=jnp.float32) / half)[None])


class Fourier(nn.Module):
    """Cosines and sines of the time, (B,) -> (B, features), at frequencies that rise geometrically, of norm 1.

    sqrt(2 / features) [cos(2 pi t w_i), sin(2 pi t w_i)]        (2) (the course's notes of 2026)
    w_i = lowest (highest / lowest)^((i - 1) / (features / 2 - 1)),  1 <= i <= features / 2
    """

    features: int = 256
    """How many cosines and sines there are, an even number."""
    lowest: float = 0.25
    """The lowest frequency, in periods over [0, 1]: a quarter of a wave, so that no two times look alike."""
    highest: float = 256.0
    """The highest frequency, likewise."""

    @nn.compact
    def __call__(self, t):
        _require_even(self.features)
        frequencies = np.geomspace(self.lowest, self.highest, self.features // 2, dtype=np.float32)
        return np.sqrt(2 / self.features, dtype=np.float32) * _waves(2 * np.pi * t[:, None] * frequencies[None])


class LearnableFourier(nn.Module):
    """Cosines and sines of the time, (B,) -> (B, features), at learnt frequencies, normal at the start, of norm 1.

    sqrt(2 / features) [cos(2 pi t w_i), sin(2 pi t w_i)],  w_i ~ N(0, spread^2)        (3) (the course's third lab)
    """

    features: int = 256
    """How many cosines and sines there are, an even number."""
    spread: float = 1.0
    """The standard deviation of the first frequencies, in periods over [0, 1]."""

    @nn.compact
    def __call__(self, t):
        _require_even(self.features)
        frequencies = self.param("frequencies", nn.initializers.normal(self.spread), (self.features // 2,))
        return np.sqrt(2 / self.features, dtype=np.float32) * _waves(2 * np.pi * t[:, None] * frequencies[None])


def _require_even(width):
    if width % 2 or width < 2:
        raise ValueError(f"The time embedding has {width} features, but cosines and sines need an even one.")


class TimeEmbedding(nn.Module):
    """An embedding of the time through a two-layer network, (B,) -> (B, features)    (Peebles and Xie 2023, arXiv:2212.09748)."""

    features: int
    """Of both layers."""
    frequency_embedding: nn.Module = Sinusoids()
    """What the time is embedded by first: `Sinusoids`, `Fourier` or `LearnableFourier`."""
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    """Initialiser of both layers' weights."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""
    last_init: nn.initializers.Initializer | None = None
    """Of the second layer, where it is another one."""

    @nn.compact
    def __call__(self, t):
        h = self.frequency_embedding(t).astype(self.dtype)
        h = nn.silu(nn.Dense(self.features, kernel_init=self.kernel_init, dtype=self.dtype)(h))
        return nn.Dense(self.features, kernel_init=self.last_init or self.kernel_init, dtype=self.dtype)(h)


def both_times(network, t, end, x) -> list[chex.ArrayDevice]:
    """A network's time, and how far its end is from it where it has one, (B,) each."""
    t = batch_times(t, x)
    if network.end_time:
        return [t, jnp.zeros_like(t) if end is None else batch_times(end, x) - t]
    if end is not None:
        raise ValueError("end is given, but this network has one time alone: make it with end_time=True.")
    return [t]


def embed_times(network, make, frequencies, t, end, x) -> chex.ArrayDevice:
    """The embedding of a network's time, and of how far away its end is where it has one, which at first adds nothing.

    Args:
      network: has a field `end_time`, whether there is one.
      make: makes a `TimeEmbedding`, of all but the frequencies and the name.
      frequencies: of the time, a module.
      t: times, () or (B,).
      end: of the interval, likewise, or None.
      x: states, (B, ...).
    Returns:
      (B, features).
    Raises:
      ValueError: if there is an end and the network has none.
    """
    t, *interval = both_times(network, t, end, x)
    e = make(frequency_embedding=frequencies, name="time")(t)
    if not interval:
        return e
    # Frequencies of its own: as they are given they are the time's, under the network's name for them.
    own = make(frequency_embedding=frequencies.clone(name=None), last_init=nn.initializers.zeros_init(), name="interval")
    return e + own(*interval)


class LogVariance(nn.Module):
    """The u of `losses.learnt_uncertainty`, (B,) -> (B,): a dense layer, 0 at first, on the time's frequencies.

    (Karras et al. 2024, arXiv:2312.02696, section 2.3)
    """

    frequency_embedding: nn.Module = Fourier(128)
    """What the time is embedded by: `Sinusoids`, `Fourier` or `LearnableFourier`."""

    @nn.compact
    def __call__(self, t):
        return nn.Dense(1, kernel_init=nn.initializers.zeros_init())(self.frequency_embedding(t))[:, 0]


class LabelEmbedding(nn.Module):
    """A table of vectors, (B,) -> (B, features): one per class and one more, the last, for no class.

    A label outside [0, num_classes] is an error where its value is known, and gives nan inside a compiled function.
    """

    num_classes: int
    """How many classes there are; the label of that number is no class."""
    features: int
    """Of each vector."""
    null_label: bool = True
    """Whether there is a vector for no class. Networks that were published without one have seen a class on every example."""

    @nn.compact
    def __call__(self, y):
        rows = self.num_classes + self.null_label
        words = f"0 to {rows - 1}" + (" (the last means no class)" if self.null_label else "")
        table = self.param("embedding", nn.initializers.normal(0.02), (rows, self.features))
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"y has dtype {y.dtype}, but labels are integers from {words}.")
        if jnp.iinfo(y.dtype).max < rows - 1:
            raise TypeError(
                f"y has dtype {y.dtype}, which ends at {jnp.iinfo(y.dtype).max}, but labels are {words}: convert it with "
                ".astype(jnp.int32) before larger ones wrap around."
            )
        if not isinstance(y, Tracer) and y.is_fully_addressable:
            wrong = np.asarray(y)[(np.asarray(y) < 0) | (np.asarray(y) >= rows)]
            if wrong.size:
                last = (
                    f"{self.num_classes} means no class."
                    if self.null_label
                    else "this network has no label for no class (null_label is False): it cannot be guided without a classifier."
                )
                raise ValueError(f"label {wrong.flat[0]} is out of range: labels are 0 to {self.num_classes - 1}, and {last}")
        return jnp.asarray(table).at[y].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def described(y) -> str:
    """What a condition is, in the words of an error."""
    if isinstance(y, Mapping):
        return f"a dict of the keys {sorted(y, key=str)}"
    return f"an array of shape {y.shape}" if hasattr(y, "shape") else f"{y!r}"


def check_labels(classes, y, x) -> None:
    """Raises unless there is one label per example where a network has classes, and none where it has not."""
    if isinstance(y, Mapping):
        raise TypeError(f"y is {described(y)}, but this network takes {'no y' if classes is None else 'labels'}: see conditions.Several.")
    if classes is None and y is not None:
        raise ValueError(
            f"y has shape {jnp.shape(y)}, but this network was made without classes and has no null label either: it cannot be "
            "guided. Make it with `num_classes` or a `condition`, or leave y out."
        )
    if classes is not None and (y is None or jnp.shape(y) != x.shape[:1]):
        given = "none" if y is None else f"shape {jnp.shape(y)}"
        cure = f": for one label for all give jnp.full({x.shape[:1]}, y)" if y is not None and jnp.ndim(y) == 0 else ""
        raise ValueError(f"This network has classes and needs one label per example, y of shape {x.shape[:1]}, got {given}{cure}.")


def require_images(x) -> None:
    """Raises unless x is a batch of sequences, images or volumes."""
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"x has shape {x.shape}, but this network takes sequences, (B, T, C), images, (B, H, W, C), or volumes, (B, D, H, W, C): for "
            "points take an MLP, and for one channel give x[..., None]."
        )


def by(sides) -> str:
    """Sides in words: "8 x 6"."""
    return " x ".join(map(str, sides))


class Dense(nn.Dense):
    """Flax's dense layer on rows, with all its fields.

    It is the same program on a GPU, and half the time of its gradient on a CPU, where XLA is slow at a product that sums over two axes.
    """

    def __call__(self, inputs):
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features)


class CrossAttention(nn.Module):
    """Multi-head attention of h, (B, N, features), to tokens, (B, L, ...), that a mask counts, (B, L); it gives zero at the start."""

    num_heads: int
    """How many heads there are, a divisor of the features."""
    norm: Callable | None = None
    """Makes the normalisations of queries and keys, such as `RMSNorm`; None for none."""
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    """Initialiser of the weights, but of the last layer's, which are zero."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""

    @nn.compact
    def __call__(self, h, tokens, mask=None):
        batch, _, width = h.shape
        q = Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, name="q")(h)
        kv = Dense(2 * width, kernel_init=self.kernel_init, dtype=self.dtype, name="kv")(tokens)
        q = q.reshape(batch, -1, self.num_heads, width // self.num_heads)
        k, v = jnp.moveaxis(kv.reshape(batch, -1, 2, *q.shape[2:]), 2, 0)
        if self.norm is not None:
            q, k = self.norm(name="norm_q")(q), self.norm(name="norm_k")(k)
        out = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None])
        return Dense(width, kernel_init=nn.initializers.zeros_init(), dtype=self.dtype, name="out")(out.reshape(h.shape))


class LayerNorm(nn.LayerNorm):
    """Flax's layer normalisation in float32, without parameters    (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float = 1e-6
    """Added to the variance."""
    use_bias: bool = False
    """Whether there is a learnt shift."""
    use_scale: bool = False
    """Whether there is a learnt scale."""
    # The fast one is a difference of squares, which loses all digits where the mean is large.
    use_fast_variance: bool = False
    """Whether the variance is a difference of squares."""


class RMSNorm(nn.Module):
    """Division by the root mean square, and a learnt scale, in float32.

    g x / sqrt(m + epsilon),  m = sum_i x_i^2 / d    (Zhang and Sennrich 2019, arXiv:1910.07467)
    """

    epsilon: float = 1e-6
    """Added to the mean square."""

    @nn.compact
    def __call__(self, h):
        scale = jnp.asarray(self.param("scale", nn.initializers.ones_init(), h.shape[-1:]))
        x = h.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale.reshape((1,) * (h.ndim - 1) + scale.shape)).astype(h.dtype)


class GroupNorm(nn.Module):
    """Normalisation of groups of channels, with a learnt scale and shift, in float32    (Wu and He 2018, arXiv:1803.08494)."""

    groups: int = 32
    """How many groups there are, a divisor of the channels."""
    epsilon: float = 1e-5
    """Added to the variance."""

    @nn.compact
    def __call__(self, h):
        channels = h.shape[-1]
        space = tuple(range(1, h.ndim - 1))
        scale = jnp.asarray(self.param("scale", nn.initializers.ones_init(), (channels,))).reshape((1,) * (h.ndim - 1) + (-1,))
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros_init(), (channels,))).reshape((1,) * (h.ndim - 1) + (-1,))

        def group_means(x):
            means = x.mean(space).reshape(h.shape[0], self.groups, -1).mean(-1)
            return jnp.expand_dims(jnp.repeat(means, channels // self.groups, axis=-1), space)

        x = h.astype(jnp.float32)
        mean = group_means(x)
        # The variance does not change with the mean to first order, so its gradient need not go through that: a pass less.
        # What is zero here is what it changes to second order.
        fixed = jax.lax.stop_gradient(mean)
        variance = group_means((x - fixed) ** 2) - (mean - fixed) ** 2
        return ((x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(h.dtype)


def _phases(sides, features, name):
    """Places along each axis times its frequencies, which fall from 1 to 1 / 10,000: [(positions, pairs of features of the axis)]."""
    each, rest = divmod(features // 2, len(sides))
    if features % 2 or not each:
        raise ValueError(
            f"{name} have {features} features, but they come in pairs and each of the {len(sides)} axes has one at least: give an even "
            f"number of {2 * len(sides)} or more."
        )
    places = np.meshgrid(*(np.arange(side) for side in sides), indexing="ij")
    counts = [each + rest if axis == 0 else each for axis in range(len(sides))]
    return [place.reshape(-1, 1) * 10_000.0 ** (-np.arange(n) / n) for place, n in zip(places, counts, strict=True)]


def grid_positions(*shape) -> np.ndarray:
    """Fixed sine-cosine positions of a grid of patches, the features shared among its axes    (Peebles and Xie 2023, arXiv:2212.09748).

    Of the pairs of a sine and a cosine each axis has as many, the first one also those that remain: of 384 features a sequence has 384, an
    image 192 per axis and a volume 128 per axis; of 512 a volume has 172, 170 and 170. The last axis comes first.

    Args:
      *shape: sides of the grid, then the features, an even number: `grid_positions(rows, columns, features)`.
    Returns:
      (1, positions, features), float32, row by row.
    Raises:
      ValueError: if there is not one pair for each axis.
    """
    *sides, features = shape
    phases = _phases(sides, features, "Positions")
    return np.concatenate([wave(phase) for phase in reversed(phases) for wave in (np.sin, np.cos)], axis=-1)[None].astype(np.float32)


def rotary_angles(*shape, before=0) -> np.ndarray:
    """Angles by which attention turns pairs of features, the pairs shared among the axes    (Su et al. 2021, arXiv:2104.09864).

    Each axis has as many, the first one also those that remain, as in `grid_positions`; here the first axis comes first.

    Args:
      *shape: sides of the grid of patches, then the features of a head, an even number.
      before: tokens before the grid, which are not turned.
    Returns:
      (before + positions, features / 2), float32.
    Raises:
      ValueError: if there is not one pair for each axis.
    """
    *sides, features = shape
    grid = np.concatenate(_phases(sides, features, "Rotary positions"), axis=-1)
    return np.concatenate([np.zeros((before, grid.shape[-1])), grid]).astype(np.float32)


def rotate(h, angles) -> chex.ArrayDevice:
    """Turns neighbouring pairs of features by angles, in float32: products of two results depend on differences of places alone.

    h_{2i} <- cos(a_i) h_{2i} - sin(a_i) h_{2i+1},  h_{2i+1} <- sin(a_i) h_{2i} + cos(a_i) h_{2i+1}
    (Su et al. 2021, arXiv:2104.09864, eq. 34)

    Args:
      h: queries or keys, (B, tokens, heads, features).
      angles: a, (tokens, features / 2), as `rotary_angles` gives them.
    Returns:
      Like h.
    """
    cos, sin = (wave(angles)[None, :, None] for wave in (jnp.cos, jnp.sin))
    even, odd = (h[..., i::2].astype(jnp.float32) for i in range(2))
    return jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1).reshape(h.shape).astype(h.dtype)
