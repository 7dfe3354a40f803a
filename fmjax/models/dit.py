"""The diffusion transformer with adaLN-Zero    (Peebles and Xie 2023, arXiv:2212.09748; MIT 6.S184, "Diffusion Transformers").

An image, a signal or a volume becomes a sequence of patches; each block is attention and an MLP, whose normalisations are shifted
and scaled, and whose outputs are gated, by the embedding c of the time and the label:

    h <- h + g_1 A(s_1 N(h) + b_1),   h <- h + g_2 M(s_2 N(h) + b_2),   (b, s - 1, g) = W silu(c)

with A attention, M an MLP, N a normalisation and W a dense layer. The gates and the last layer start at zero, so a block starts as
the identity and the network as zero. The published sizes are `DiT_S`, `DiT_B`, `DiT_L` and `DiT_XL`:
`DiT_XL(patch_size=2, num_classes=1000)` is DiT-XL/2. Later recipes are other modules in its places, such as JiT
(Li and He 2025, arXiv:2511.13720), whose JiT-B/16 is

    DiT_B(patch_size=16, num_classes=1000, time_embedding=layers.Sinusoids(scale=1.0), bottleneck=128, class_tokens=32, context_start=4,
      norm=layers.RMSNorm, qk_norm=layers.RMSNorm, mlp_layer=SwiGLU, rotary=True)
"""

import functools
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from fmjax.models import conditions, layers

__all__ = ["DiT", "DiT_S", "DiT_B", "DiT_L", "DiT_XL", "GELU", "SwiGLU", "stack", "unstack"]

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros_init()


class Patches(nn.Module):
    """The features of an image's patches, through a narrow layer where there is a bottleneck    (Li and He 2025, arXiv:2511.13720)."""

    patch_size: int
    hidden_size: int
    bottleneck: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        side = (self.patch_size,) * (x.ndim - 2)
        first = self.bottleneck or self.hidden_size
        h = nn.Conv(first, side, side, "VALID", use_bias=not self.bottleneck, kernel_init=layers.as_matrix(_xavier), dtype=self.dtype)(x)
        h = h.reshape(x.shape[0], -1, first)
        return layers.Dense(self.hidden_size, kernel_init=_xavier, dtype=self.dtype)(h) if self.bottleneck else h


class ContextTokens(nn.Module):
    """Tokens that stand before the patches: learnt ones, plus c on each where it is given."""

    count: int

    @nn.compact
    def __call__(self, h, c=None):
        tokens = jnp.asarray(self.param("tokens", nn.initializers.normal(0.02), (1, self.count, h.shape[-1])))
        tokens = jnp.broadcast_to(tokens if c is None else tokens + c[:, None], (h.shape[0], *tokens.shape[1:]))
        return jnp.concatenate([tokens.astype(h.dtype), h], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention, its softmax in float32, its queries and keys turned by angles where they are given.

    With a mask, (B, tokens), only to those tokens that it counts.
    """

    num_heads: int
    norm: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    implementation: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h, angles=None, mask=None):
        batch, tokens, width = h.shape
        qkv = layers.Dense(3 * width, kernel_init=_xavier, dtype=self.dtype)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads), 2, 0)
        if self.norm is not None:
            q, k = self.norm(name="norm_q")(q), self.norm(name="norm_k")(k)
        if angles is not None:
            q, k = layers.rotate(q, angles), layers.rotate(k, angles)
        among = None if mask is None else mask[:, None, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=among, implementation=self.implementation)
        return layers.Dense(width, kernel_init=_xavier, dtype=self.dtype)(out.reshape(h.shape))


class GELU(nn.Module):
    """The MLP of two dense layers.

    W_2 gelu(W_1 h)    (Peebles and Xie 2023, arXiv:2212.09748)
    """

    ratio: float = 4.0
    """How many times h's features it has inside."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""

    @nn.compact
    def __call__(self, h):
        hidden = nn.gelu(layers.Dense(int(h.shape[-1] * self.ratio), kernel_init=_xavier, dtype=self.dtype)(h), approximate=True)
        return layers.Dense(h.shape[-1], kernel_init=_xavier, dtype=self.dtype)(hidden)


class SwiGLU(nn.Module):
    """The gated MLP, two thirds as many features, so of as many parameters as `GELU`.

    W_3 (silu(W_1 h) W_2 h)    (Shazeer 2020, arXiv:2002.05202)
    """

    ratio: float = 4.0
    """How many times h's features it has inside, before the two thirds."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""

    @nn.compact
    def __call__(self, h):
        both = layers.Dense(2 * int(int(h.shape[-1] * self.ratio) * 2 / 3), kernel_init=_xavier, dtype=self.dtype)(h)
        gate, value = jnp.split(both, 2, axis=-1)
        return layers.Dense(h.shape[-1], kernel_init=_xavier, dtype=self.dtype)(nn.silu(gate) * value)


def _modulate(h, shift, scale):
    return h * (1 + scale) + shift


class Block(nn.Module):
    """Attention and an MLP, each modulated and gated by c; between them attention to a context, tokens and a mask, if it is given."""

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    norm: Callable = layers.LayerNorm
    qk_norm: Callable | None = None
    mlp_layer: Callable = GELU
    dtype: jnp.dtype = jnp.float32
    implementation: Literal["xla", "cudnn"] = "xla"

    @nn.compact
    def __call__(self, h, c, angles=None, deterministic=True, mask=None, context=None):
        width = h.shape[-1]
        modulation = layers.Dense(6 * width, kernel_init=_zeros, dtype=self.dtype, name="modulation")(nn.silu(c))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.num_heads, self.qk_norm, self.dtype, self.implementation, name="attention")
        m = attention(_modulate(self.norm(name="norm_1")(h), shift_1, scale_1), angles, mask)
        h = h + gate_1 * nn.Dropout(self.dropout)(m, deterministic)
        if context is not None:
            cross = layers.CrossAttention(self.num_heads, self.qk_norm, _xavier, self.dtype, name="cross_attention")
            h = h + nn.Dropout(self.dropout)(cross(self.norm(name="norm_cross")(h), *context), deterministic)
        m = self.mlp_layer(self.mlp_ratio, self.dtype, name="mlp")(_modulate(self.norm(name="norm_2")(h), shift_2, scale_2))
        return h + gate_2 * nn.Dropout(self.dropout)(m, deterministic)


class DiT(nn.Module):
    """A diffusion transformer for sequences, images and volumes of any size.

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, T, C), (B, H, W, C) or (B, D, H, W, C) with
    sides divisible by `patch_size`, t is () or (B,), y is (B,) with `num_classes` for no class, or what `condition` takes; the output is
    like x, or of twice the channels with `learn_sigma`. With dropout, training passes `deterministic=False` and `rngs={"dropout": key}`.

    Examples of different sizes are padded to one size, and a mask says what counts: `model.apply(params, x, t, y, mask=mask)`, bool,
    (B, *space), or one per patch. A patch counts if any of its positions does. What does not count is not attended to, its input does not
    matter (it may be nan) and its output is 0; what counts has the output that it would have without the padding.
    """

    patch_size: int = 2
    """The side of a patch, along every axis."""
    hidden_size: int = 384
    """Features of a token, a multiple of 4 and of `num_heads`."""
    depth: int = 12
    """How many blocks there are."""
    num_heads: int = 6
    """Heads of the attention."""
    num_classes: int | None = None
    """How many classes there are, where y is labels; the label of that number is no class. None for no labels."""
    condition: nn.Module | None = None
    """What y is, in place of `num_classes`: a module of `conditions`."""
    mlp_ratio: float = 4.0
    """How many times `hidden_size` the features inside an MLP are."""
    dropout: float = 0.0
    """The share of what a block adds that is dropped in training."""
    learn_sigma: bool = False
    """Whether the output has a second half, for a variance, as published weights of discrete-time diffusion have."""
    time_embedding: nn.Module = layers.Sinusoids()
    """Embedding of the time: `layers.Sinusoids`, `layers.Fourier` or `layers.LearnableFourier`."""
    norm: Callable = layers.LayerNorm
    """Makes the normalisations that are modulated: `layers.LayerNorm` or `layers.RMSNorm`."""
    qk_norm: Callable | None = None
    """Makes the normalisations of queries and keys, one per head: `layers.RMSNorm`."""
    mlp_layer: Callable = GELU
    """Makes the MLPs: `GELU` or `SwiGLU`."""
    rotary: bool = False
    """Whether attention uses rotary position embeddings, besides the positions that are added."""
    bottleneck: int | None = None
    """Features between a patch and its embedding, for large patches of pixels."""
    register_tokens: int = 0
    """Learnt tokens before the patches."""
    class_tokens: int = 0
    """Tokens of the label, or of another condition's vector, before the patches."""
    context_start: int = 0
    """The block before which those tokens join."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """`xla`, or `cudnn` for half precision on a GPU."""
    remat: bool = False
    """Whether to recompute each block in the backward pass rather than to keep its activations."""
    scan: bool = False
    """Whether to compile one block and loop over it, its parameters stacked (see `stack`). Without `remat`, the backward pass finds the
    products of its layers and computes the rest again."""
    end_time: bool = False
    """Whether the network has a second time, `end`, for a flow map (see `flow_maps`): `model.apply(params, x, s, y, end=t)`. How far it is
    from the first is embedded beside it, and at first adds nothing."""

    @nn.compact
    def __call__(self, x, t, y=None, deterministic=True, mask=None, end=None):
        self._check(x)
        given = conditions.embed(self, y, x, self.hidden_size)
        if self.class_tokens and given.vector is None:
            raise ValueError(
                f"class_tokens is {self.class_tokens}, but the network has no classes: give num_classes, a condition with a vector, or "
                "register_tokens."
            )
        context = None if given.tokens is None else (given.tokens.astype(self.dtype), given.tokens_mask)
        batch, *space, channels = x.shape
        inputs = x if given.image is None else jnp.concatenate([x, given.image.astype(x.dtype)], axis=-1)
        counts = patch_mask = None
        if mask is not None:
            counts, patch_mask = self._masks(mask, x)
            inputs = jnp.where(counts, inputs, 0)
        grid = [side // self.patch_size for side in space]
        h = Patches(self.patch_size, self.hidden_size, self.bottleneck, self.dtype, name="patches")(inputs)
        h = h + layers.grid_positions(*grid, self.hidden_size).astype(self.dtype)

        make = functools.partial(layers.TimeEmbedding, self.hidden_size, dtype=self.dtype)
        c = layers.embed_times(self, make, self.time_embedding, t, end, x)
        if given.vector is not None:
            vector = given.vector.astype(self.dtype)
            c = c + vector

        rest = (deterministic, patch_mask, context)
        h = self._blocks(h, c, grid, 0, range(self.context_start if self._tokens else self.depth), *rest)
        if self._tokens:
            if self.register_tokens:
                h = ContextTokens(self.register_tokens, name="registers")(h)
            if self.class_tokens:
                h = ContextTokens(self.class_tokens, name="class_tokens")(h, vector)
            h = self._blocks(h, c, grid, self._tokens, range(self.context_start, self.depth), *rest)
            h = h[:, self._tokens :]

        last_modulation = layers.Dense(2 * self.hidden_size, kernel_init=_zeros, dtype=self.dtype, name="last_modulation")
        shift, scale = jnp.split(last_modulation(nn.silu(c))[:, None], 2, axis=-1)
        h = _modulate(self.norm(name="last_norm")(h), shift, scale)
        channels = channels * (1 + self.learn_sigma)
        axes = len(space)
        h = layers.Dense(self.patch_size**axes * channels, kernel_init=_zeros, dtype=self.dtype, name="last")(h)
        h = h.reshape(batch, *grid, *(self.patch_size,) * axes, channels)
        # Each axis of the grid beside that of its patches.
        order = [axis for i in range(1, axes + 1) for axis in (i, axes + i)]
        out = h.transpose(0, *order, 2 * axes + 1).reshape(batch, *space, channels).astype(x.dtype)
        return out if counts is None else jnp.where(counts, out, 0)

    @property
    def _tokens(self):
        return self.register_tokens + self.class_tokens

    def _masks(self, mask, x):
        """Which positions count, shaped to multiply x, and which patches, (B, patches)."""
        batch, *space = x.shape[:-1]
        grid = [side // self.patch_size for side in space]
        mask = jnp.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"mask has dtype {mask.dtype}, but it is of bools, True for what counts: give mask > 0.")
        if mask.shape not in ((batch, *space), (batch, *grid)):
            raise ValueError(
                f"mask has shape {mask.shape}, but for x of shape {x.shape} it is {(batch, *space)}, or one per patch, {(batch, *grid)}."
            )
        if self.attention == "cudnn":
            raise ValueError("attention is 'cudnn', which takes no mask here: make the network with attention='xla'.")
        if mask.shape == (batch, *space):
            sides = [side for pair in zip(grid, [self.patch_size] * len(grid), strict=True) for side in pair]
            patches = mask.reshape(batch, *sides).any(range(2, 2 * len(grid) + 1, 2))
        else:
            patches = mask
            for axis in range(1, len(grid) + 1):
                mask = mask.repeat(self.patch_size, axis=axis)
        return mask[..., None], patches.reshape(batch, -1)

    def _blocks(self, h, c, grid, tokens, indices, deterministic, mask, context):
        """The blocks of those indices, whose tokens before the patches are beyond the mask."""
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (tokens, 0)), constant_values=True)
        angles = layers.rotary_angles(*grid, self.hidden_size // self.num_heads, before=tokens) if self.rotary else None
        module = Block
        if self.remat or self.scan:
            # A loop keeps all that its backward pass reads, where the compiler computes much of it again in blocks one by one. So only
            # the products of a loop are kept, but for those of attention, which grow with the square of the tokens.
            keep = None if self.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            module = nn.remat(Block, static_argnums=(4,), prevent_cse=not self.scan, policy=keep)
        fields = (self.num_heads, self.mlp_ratio, self.dropout, self.norm, self.qk_norm, self.mlp_layer, self.dtype, self.attention)
        block = functools.partial(module, *fields)
        if not self.scan:
            for i in indices:
                h = block(name=f"block_{i}")(h, c, angles, deterministic, mask, context)
        elif len(indices):
            layer = nn.scan(
                lambda block, h, _: (block(h, c, angles, deterministic, mask, context), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=len(indices),
            )
            h, _ = layer(block(name=f"blocks_{indices[0]}_{indices[-1]}"), h, None)
        return h

    def _check(self, x):
        if not isinstance(self.patch_size, int):
            raise TypeError(f"patch_size is {self.patch_size!r}, but it is one whole number, the side of a patch along every axis.")
        layers.require_images(x)
        space = x.shape[1:-1]
        if any(side % self.patch_size for side in space):
            raise ValueError(
                f"x of {layers.by(space)} positions does not divide into patches of {layers.by([self.patch_size] * len(space))}: pad it, "
                "and let channels stand last."
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 and of the number of heads, {self.num_heads}.")
        if self.rotary and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"rotary positions need heads of a multiple of 4 features, but {self.hidden_size} / {self.num_heads} is another."
            )
        if self._tokens and not 0 <= self.context_start < self.depth:
            raise ValueError(f"context_start is {self.context_start}, but the blocks are numbered 0 to {self.depth - 1}.")


class DiT_S(DiT):
    """`DiT` of 384 features, 12 blocks and 6 heads."""

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6


class DiT_B(DiT):
    """`DiT` of 768 features, 12 blocks and 12 heads."""

    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12


class DiT_L(DiT):
    """`DiT` of 1024 features, 24 blocks and 16 heads."""

    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16


class DiT_XL(DiT):
    """`DiT` of 1152 features, 28 blocks and 16 heads."""

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16


def stack(params, start=0) -> chex.ArrayTree:
    """The parameters of a DiT with `scan`, from those of the same network without.

    Args:
      params: of a DiT, {"params": ...}.
      start: its `context_start` where it has tokens before the patches.
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


def unstack(params) -> chex.ArrayTree:
    """The parameters of a DiT without `scan`, from those of the same network with it: the inverse of `stack`.

    Args:
      params: of a DiT with `scan`, {"params": ...}.
    Returns:
      The same with leaves of their own for each block.
    """
    out = {}
    for name, value in params["params"].items():
        if name.startswith("blocks_"):
            first, last = (int(number) for number in name.split("_")[1:])
            out |= {f"block_{i}": jax.tree.map(lambda leaf, i=i - first: leaf[i], value) for i in range(first, last + 1)}
        else:
            out[name] = value
    return {**params, "params": out}
