"""The diffusion transformer with adaLN-Zero    (Peebles and Xie 2023; notes 004, "Diffusion Transformers").

An image becomes a row of patches; each block is attention and a perceptron, whose normalisations are shifted and
scaled, and whose outputs are gated, by the embedding c of the time and the label:

    h <- h + g_1 Attention(s_1 LN(h) + b_1),   h <- h + g_2 MLP(s_2 LN(h) + b_2),   (b, s - 1, g) = Dense(silu(c))

The gates and the last layer start at zero, so a block starts as the identity and the network as zero.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmjax.models import layers

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()
# Of the kernel as a matrix from a patch to its features.
_xavier_patch = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3)


def _normalise(h):
    """Layer normalisation without parameters, in float32."""
    wide = h.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(h.dtype)


def _modulate(h, shift, scale):
    return _normalise(h) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention, its softmax in float32."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    implementation: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h):
        batch, tokens, width = h.shape
        qkv = nn.Dense(3 * width, kernel_init=_xavier, dtype=self.dtype)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return nn.Dense(width, kernel_init=_xavier, dtype=self.dtype)(out.reshape(h.shape))


class Block(nn.Module):
    """Attention and a perceptron, each modulated and gated by c."""

    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    attention: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h, c, deterministic=True):
        width = h.shape[-1]
        modulation = nn.Dense(6 * width, kernel_init=_zeros, dtype=self.dtype)(nn.silu(c))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        attended = Attention(self.heads, self.dtype, self.attention)(_modulate(h, shift_1, scale_1))
        h = h + gate_1 * nn.Dropout(self.dropout)(attended, deterministic)
        m = nn.Dense(int(width * self.mlp_ratio), kernel_init=_xavier, dtype=self.dtype)(_modulate(h, shift_2, scale_2))
        m = nn.Dense(width, kernel_init=_xavier, dtype=self.dtype)(nn.gelu(m, approximate=True))
        return h + gate_2 * nn.Dropout(self.dropout)(m, deterministic)


class DiT(nn.Module):
    """A diffusion transformer.

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, H, W, C) with H and W divisible
    by the patch, t is () or (B,), y is (B,) with `classes` for no class; the output is like x. With dropout, training
    passes `deterministic=False` and `rngs={"dropout": key}`.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int | None = None
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    time_scale: float = 1000.0
    """Multiplies t before its embedding."""
    dtype: jnp.dtype = jnp.float32
    """Of the computation; parameters are float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """`xla`, or `cudnn` for half precision on a GPU."""
    remat: bool = False
    """Whether to recompute each block in the backward pass rather than to keep its activations."""
    scan: bool = False
    """Whether to compile one block and loop over it, its parameters stacked."""

    @nn.compact
    def __call__(self, x, t, y=None, deterministic=True):
        self._check(x)
        batch, height, width, channels = x.shape
        side = (self.patch, self.patch)
        rows, columns = height // self.patch, width // self.patch
        h = nn.Conv(self.width, side, side, "VALID", kernel_init=_xavier_patch, dtype=self.dtype, name="patches")(x)
        h = h.reshape(batch, rows * columns, self.width) + layers.grid_positions(rows, columns, self.width).astype(self.dtype)

        c = layers.TimeEmbedding(self.width, scale=self.time_scale, dtype=self.dtype, name="time")(layers.batch_times(t, x))
        if self.classes is not None:
            c = c + layers.LabelEmbedding(self.classes, self.width, name="label")(layers.require_labels(y, x)).astype(self.dtype)

        module = nn.remat(Block, static_argnums=(3,), prevent_cse=not self.scan) if self.remat else Block
        block = functools.partial(module, self.heads, self.mlp_ratio, self.dropout, self.dtype, self.attention)
        if self.scan:
            layer = nn.scan(
                lambda block, h, _: (block(h, c, deterministic), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )
            h, _ = layer(block(name="blocks"), h, None)
        else:
            for i in range(self.depth):
                h = block(name=f"block_{i}")(h, c, deterministic)

        shift, scale = jnp.split(
            nn.Dense(2 * self.width, kernel_init=_zeros, dtype=self.dtype, name="last_modulation")(nn.silu(c))[:, None], 2, axis=-1
        )
        h = nn.Dense(self.patch**2 * channels, kernel_init=_zeros, dtype=self.dtype, name="last")(_modulate(h, shift, scale))
        h = h.reshape(batch, rows, columns, self.patch, self.patch, channels)
        return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape).astype(x.dtype)

    def _check(self, x):
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}, but a DiT takes images, (B, H, W, C).")
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"The image of {x.shape[1]} x {x.shape[2]} pixels does not divide into patches of {self.patch} x {self.patch}."
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of the number of heads, {self.heads}.")
