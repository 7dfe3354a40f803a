"""The diffusion transformer with adaLN-Zero    (Peebles and Xie 2023; notes 004, "Diffusion Transformers").

An image becomes a row of patches; each block is attention and a perceptron, whose normalisations are shifted and
scaled, and whose outputs are gated, by the embedding c of the time and the label:

    h <- h + g_1 Attention(s_1 N(h) + b_1),   h <- h + g_2 Perceptron(s_2 N(h) + b_2),   (b, s - 1, g) = Dense(silu(c))

The gates and the last layer start at zero, so a block starts as the identity and the network as zero. The published sizes
are `S`, `B`, `L` and `XL`: `XL(patch=2, classes=1000)` is DiT-XL/2. Later recipes are other modules in its places, such as
(Li and He 2025), whose JiT-B/16 is

    B(patch=16, classes=1000, encoding=layers.Sinusoids(scale=1.0), bottleneck=128, class_tokens=32, tokens_start=4,
      norm=layers.RMSNorm, qk_norm=layers.RMSNorm, perceptron=SwiGLU, rotary=True)
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmjax.models import layers

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()


class Patches(nn.Module):
    """An image as a row of patches' features, by way of a narrow layer where there is a bottleneck    (Li and He 2025)."""

    patch: int
    width: int
    bottleneck: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        side = (self.patch, self.patch)
        first = self.bottleneck or self.width
        h = nn.Conv(first, side, side, "VALID", use_bias=not self.bottleneck, kernel_init=layers.as_matrix(_xavier), dtype=self.dtype)(x)
        h = h.reshape(x.shape[0], -1, first)
        return layers.Dense(self.width, kernel_init=_xavier, dtype=self.dtype)(h) if self.bottleneck else h


class ContextTokens(nn.Module):
    """Tokens that stand before the patches: learnt ones, plus c on each where it is given."""

    count: int

    @nn.compact
    def __call__(self, h, c=None):
        tokens = jnp.asarray(self.param("tokens", nn.initializers.normal(0.02), (1, self.count, h.shape[-1])))
        tokens = jnp.broadcast_to(tokens if c is None else tokens + c[:, None], (h.shape[0], *tokens.shape[1:]))
        return jnp.concatenate([tokens.astype(h.dtype), h], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention, its softmax in float32, its queries and keys turned by angles where they are given."""

    heads: int
    norm: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    implementation: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h, angles=None):
        batch, tokens, width = h.shape
        qkv = layers.Dense(3 * width, kernel_init=_xavier, dtype=self.dtype)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        if self.norm is not None:
            q, k = self.norm(name="norm_q")(q), self.norm(name="norm_k")(k)
        if angles is not None:
            q, k = layers.rotate(q, angles), layers.rotate(k, angles)
        out = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return layers.Dense(width, kernel_init=_xavier, dtype=self.dtype)(out.reshape(h.shape))


class GELU(nn.Module):
    """Dense, gelu, Dense    (Peebles and Xie 2023)."""

    ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        wide = nn.gelu(layers.Dense(int(h.shape[-1] * self.ratio), kernel_init=_xavier, dtype=self.dtype)(h), approximate=True)
        return layers.Dense(h.shape[-1], kernel_init=_xavier, dtype=self.dtype)(wide)


class SwiGLU(nn.Module):
    """Dense (silu(Dense) * Dense), two thirds as wide, so of as many parameters as the other    (Shazeer 2020)."""

    ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        wide = layers.Dense(2 * int(int(h.shape[-1] * self.ratio) * 2 / 3), kernel_init=_xavier, dtype=self.dtype)(h)
        gate, value = jnp.split(wide, 2, axis=-1)
        return layers.Dense(h.shape[-1], kernel_init=_xavier, dtype=self.dtype)(nn.silu(gate) * value)


def _modulate(h, shift, scale):
    return h * (1 + scale) + shift


class Block(nn.Module):
    """Attention and a perceptron, each modulated and gated by c."""

    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    norm: Callable = layers.LayerNorm
    qk_norm: Callable | None = None
    perceptron: Callable = GELU
    dtype: jnp.dtype = jnp.float32
    implementation: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h, c, angles=None, deterministic=True):
        width = h.shape[-1]
        modulation = layers.Dense(6 * width, kernel_init=_zeros, dtype=self.dtype, name="modulation")(nn.silu(c))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.heads, self.qk_norm, self.dtype, self.implementation, name="attention")
        m = attention(_modulate(self.norm(name="norm_1")(h), shift_1, scale_1), angles)
        h = h + gate_1 * nn.Dropout(self.dropout)(m, deterministic)
        m = self.perceptron(self.mlp_ratio, self.dtype, name="mlp")(_modulate(self.norm(name="norm_2")(h), shift_2, scale_2))
        return h + gate_2 * nn.Dropout(self.dropout)(m, deterministic)


class DiT(nn.Module):
    """A diffusion transformer for images of any size.

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, H, W, C) with H and W divisible
    by the patch, t is () or (B,), y is (B,) with `classes` for no class; the output is like x, or (B, H, W, 2C) with
    `learn_sigma`. With dropout, training passes `deterministic=False` and `rngs={"dropout": key}`.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int | None = None
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    learn_sigma: bool = False
    """Whether the output has a second half, for a variance, as published weights of discrete-time diffusion have."""
    encoding: nn.Module = layers.Sinusoids()
    """Of the time: `layers.Sinusoids`, `layers.Fourier` or `layers.LearnableFourier`."""
    norm: Callable = layers.LayerNorm
    """Makes the normalisations that are modulated: `layers.LayerNorm` or `layers.RMSNorm`."""
    qk_norm: Callable | None = None
    """Makes the normalisations of queries and keys, a head each: `layers.RMSNorm`."""
    perceptron: Callable = GELU
    """Makes the perceptrons: `GELU` or `SwiGLU`."""
    rotary: bool = False
    """Whether attention sees places by turning queries and keys, beside the positions that are added."""
    bottleneck: int | None = None
    """Features between a patch and its embedding, for large patches of pixels."""
    register_tokens: int = 0
    """Learnt tokens before the patches."""
    class_tokens: int = 0
    """Tokens of the label before the patches."""
    tokens_start: int = 0
    """The block before which those tokens join."""
    dtype: jnp.dtype = jnp.float32
    """Of the computation; parameters are float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """`xla`, or `cudnn` for half precision on a GPU."""
    remat: bool = False
    """Whether to recompute each block in the backward pass rather than to keep its activations."""
    scan: bool = False
    """Whether to compile one block and loop over it, its parameters stacked (see `stack`). Without `remat`, the backward pass finds the
    products of its layers and computes the rest again."""

    @nn.compact
    def __call__(self, x, t, y=None, deterministic=True):
        self._check(x)
        layers.check_labels(self.classes, y, x)
        batch, height, width, channels = x.shape
        rows, columns = height // self.patch, width // self.patch
        h = Patches(self.patch, self.width, self.bottleneck, self.dtype, name="patches")(x)
        h = h + layers.grid_positions(rows, columns, self.width).astype(self.dtype)

        c = layers.TimeEmbedding(self.width, self.encoding, dtype=self.dtype, name="time")(layers.batch_times(t, x))
        label = None
        if self.classes is not None:
            label = layers.LabelEmbedding(self.classes, self.width, name="label")(y).astype(self.dtype)
            c = c + label

        h = self._blocks(h, c, rows, columns, 0, range(self.tokens_start if self._tokens else self.depth), deterministic)
        if self._tokens:
            if self.register_tokens:
                h = ContextTokens(self.register_tokens, name="registers")(h)
            if self.class_tokens:
                h = ContextTokens(self.class_tokens, name="class_tokens")(h, label)
            h = self._blocks(h, c, rows, columns, self._tokens, range(self.tokens_start, self.depth), deterministic)
            h = h[:, self._tokens :]

        last_modulation = layers.Dense(2 * self.width, kernel_init=_zeros, dtype=self.dtype, name="last_modulation")
        shift, scale = jnp.split(last_modulation(nn.silu(c))[:, None], 2, axis=-1)
        h = _modulate(self.norm(name="last_norm")(h), shift, scale)
        channels = channels * (1 + self.learn_sigma)
        h = layers.Dense(self.patch**2 * channels, kernel_init=_zeros, dtype=self.dtype, name="last")(h)
        h = h.reshape(batch, rows, columns, self.patch, self.patch, channels)
        return h.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels).astype(x.dtype)

    @property
    def _tokens(self):
        return self.register_tokens + self.class_tokens

    def _blocks(self, h, c, rows, columns, tokens, indices, deterministic):
        """The blocks of those indices."""
        angles = layers.rotary_angles(rows, columns, self.width // self.heads, tokens) if self.rotary else None
        module = Block
        if self.remat or self.scan:
            # A loop keeps all that its backward pass reads, where the compiler computes much of it again in blocks one by one. So only
            # the products of a loop are kept, but for those of attention, which grow with the square of the tokens.
            keep = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            module = nn.remat(Block, static_argnums=(4,), prevent_cse=not self.scan, policy=keep)
        fields = (self.heads, self.mlp_ratio, self.dropout, self.norm, self.qk_norm, self.perceptron, self.dtype, self.attention)
        block = functools.partial(module, *fields)
        if not self.scan:
            for i in indices:
                h = block(name=f"block_{i}")(h, c, angles, deterministic)
        elif len(indices):
            layer = nn.scan(
                lambda block, h, _: (block(h, c, angles, deterministic), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=len(indices),
            )
            h, _ = layer(block(name=f"blocks_{indices[0]}_{indices[-1]}"), h, None)
        return h

    def _check(self, x):
        layers.require_images(x)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"The image of {x.shape[1]} x {x.shape[2]} pixels does not divide into patches of {self.patch} x {self.patch}."
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of the number of heads, {self.heads}.")
        if self.rotary and self.width // self.heads % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 features, but {self.width} / {self.heads} is another.")
        if self.class_tokens and self.classes is None:
            raise ValueError(f"class_tokens is {self.class_tokens}, but the network has no classes: say classes, or register_tokens.")
        if self._tokens and not 0 <= self.tokens_start < self.depth:
            raise ValueError(f"tokens_start is {self.tokens_start}, but the blocks are numbered 0 to {self.depth - 1}.")


S = functools.partial(DiT, width=384, depth=12, heads=6)
B = functools.partial(DiT, width=768, depth=12, heads=12)
L = functools.partial(DiT, width=1024, depth=24, heads=16)
XL = functools.partial(DiT, width=1152, depth=28, heads=16)


def stack(params, start=0):
    """The parameters of a DiT with `scan`, from those of its twin without.

    Args:
      params: of a DiT, {"params": ...}.
      start: its `tokens_start` where it has tokens before the patches.
    Returns:
      The same with the blocks' leaves stacked.
    """
    rest = {name: value for name, value in params["params"].items() if not name.startswith("block_")}
    depth = len(params["params"]) - len(rest)
    for first, last in ((0, start - 1), (start, depth - 1)):
        if first <= last:
            blocks = [params["params"][f"block_{i}"] for i in range(first, last + 1)]
            rest[f"blocks_{first}_{last}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "params": rest}


def unstack(params):
    """The parameters of a DiT without `scan`, from those of its twin with: the inverse of `stack`."""
    out = {}
    for name, value in params["params"].items():
        if name.startswith("blocks_"):
            first, last = (int(number) for number in name.split("_")[1:])
            out |= {f"block_{i}": jax.tree.map(lambda leaf, i=i - first: leaf[i], value) for i in range(first, last + 1)}
        else:
            out[name] = value
    return {**params, "params": out}
