"""The U-Net with residual blocks and attention.

(Ho et al. 2020, arXiv:2006.11239; Dhariwal and Nichol 2021, arXiv:2105.05233, "ADM"; MIT 6.S184, "U-Nets")

Going down, an image, a signal or a volume is halved level by level and its channels grow; going up it is doubled, and every block
also sees what was there going down. A residual block adds the embedding e of the time and the label between its convolutions, or
scales and shifts by it:

    r(h, e) = S(h) + C_2 silu(N(C_1 silu(N(h)) + W silu(e)))

with C convolutions, N `layers.GroupNorm`, W a dense layer and S the identity, or a dense layer where the channels change. The
layers, their paddings, their order of channels and their constants are those of the published PyTorch networks, so that their
weights fit, and `pretrained.unets` has them by name. The defaults are torchcfm's network for CIFAR-10, but for the scale of its time;
the course's third lab is `LabUNet`; ADM's for ImageNet at 256 pixels, which counts its time to 1000, is

    UNet(model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32), scale_shift_norm=True,
         resblock_updown=True, learn_sigma=True, dropout=0.0)

`Classifier` is the way down alone, which tells the class of a noisy image.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fmjax.models import conditions, layers

__all__ = ["UNet", "LabUNet", "Classifier"]

# PyTorch's first weights: uniform with variance 1 / (3 fan_in).
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_zeros = nn.initializers.zeros_init()


def _convolve(x, kernel, stride=1) -> chex.ArrayDevice:
    """A convolution 3 wide with a border of zeros. A stride of 2 begins at the first pixel, as PyTorch's does and "SAME" does not.

    Args:
      x: sequences, images or volumes, (B, *space, C).
      kernel: (3, ..., C, D), a 3 for each axis of space.
      stride: 1 or 2.
    Returns:
      (B, *space, D), each side over the stride, rounded up.
    """
    axes = x.ndim - 2
    space = "DHW"[-axes:]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, kernel, (stride,) * axes, ((1, 1),) * axes, dimension_numbers=layout)


class Conv(nn.Module):
    """`_convolve` and a bias."""

    channels: int
    stride: int = 1
    kernel_init: nn.initializers.Initializer = _uniform
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        shape = (*(3,) * (h.ndim - 2), h.shape[-1], self.channels)
        kernel = jnp.asarray(self.param("kernel", layers.as_matrix(self.kernel_init), shape), self.dtype)
        bias = jnp.asarray(self.param("bias", _zeros, (self.channels,)), self.dtype)
        return _convolve(h.astype(self.dtype), kernel, self.stride) + bias.reshape((1,) * (h.ndim - 1) + (-1,))


def _halve(h):
    sides = (2,) * (h.ndim - 2)
    return nn.avg_pool(h, sides, sides)


def _double(h):
    for axis in range(1, h.ndim - 1):
        h = h.repeat(2, axis=axis)
    return h


class Residual(nn.Module):
    """The residual block r(h, e), which halves or doubles the image where it is given how."""

    channels: int
    dropout: float = 0.0
    scale_shift_norm: bool = False
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h, e, resample=None, deterministic=True):
        skip = h
        h = nn.silu(layers.GroupNorm(self.groups, name="norm_in")(h))
        if resample is not None:
            h, skip = resample(h), resample(skip)
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(h)
        norm = layers.GroupNorm(self.groups, name="norm_out")
        e = layers.Dense(self.channels * (1 + self.scale_shift_norm), kernel_init=_uniform, dtype=self.dtype, name="embedding")(nn.silu(e))
        e = jnp.expand_dims(e, tuple(range(1, h.ndim - 1)))
        if self.scale_shift_norm:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic)
        h = Conv(self.channels, kernel_init=_zeros, dtype=self.dtype, name="conv_out")(h)
        if skip.shape[-1] != self.channels:
            skip = layers.Dense(self.channels, kernel_init=_uniform, dtype=self.dtype, name="skip")(skip)
        return skip + h


class PixelAttention(nn.Module):
    """Self-attention among pixels, added to them; the channels of its first layer go by head, then q, k, v.

    After it attention to a context, tokens and their mask, where it is given.
    """

    num_heads: int
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h, context=None):
        batch, *_, channels = h.shape
        qkv = layers.Dense(3 * channels, kernel_init=_uniform, dtype=self.dtype, name="qkv")(layers.GroupNorm(self.groups, name="norm")(h))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, -1, self.num_heads, 3, channels // self.num_heads), 3, 0)
        out = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        h = h + layers.Dense(channels, kernel_init=_zeros, dtype=self.dtype, name="out")(out)
        if context is None:
            return h
        pixels = layers.GroupNorm(self.groups, name="norm_cross")(h).reshape(batch, -1, channels)
        cross = layers.CrossAttention(self.num_heads, None, _uniform, self.dtype, name="cross_attention")
        return h + cross(pixels, *context).reshape(h.shape)


def _layers(network, e, context=None, deterministic=True):
    """Two functions that apply a residual block, and attention, of a name, with the network's fields."""
    remat = functools.partial(nn.remat, static_argnums=(3, 4)) if network.remat else lambda module: module

    def residual(h, name, width, resample=None):
        block = remat(Residual)(width, network.dropout, network.scale_shift_norm, network.groups, network.dtype, name=name)
        return block(h, e, resample, deterministic)

    def attend(h, name):
        heads = network.num_heads or h.shape[-1] // network.head_dim
        return (nn.remat(PixelAttention) if network.remat else PixelAttention)(heads, network.groups, network.dtype, name=name)(h, context)

    return residual, attend


def _down(network, inputs, channels, residual, attend):
    """What each layer of the way down gives, from the first convolution to the smallest images."""
    seen = [Conv(channels[0], dtype=network.dtype, name="in")(inputs)]
    for level, width in enumerate(channels):
        for i in range(network.num_res_blocks):
            h = residual(seen[-1], f"down_{level}_{i}", width)
            seen.append(attend(h, f"down_{level}_{i}_attention") if 2**level in network.attention_resolutions else h)
        if level < len(channels) - 1 and network.resblock_updown:
            seen.append(residual(seen[-1], f"down_{level}", width, _halve))
        elif level < len(channels) - 1:
            seen.append(Conv(width, 2, dtype=network.dtype, name=f"down_{level}")(seen[-1]))
    return seen


def _middle(h, attention, residual, attend):
    width = h.shape[-1]
    h = residual(h, "middle_0", width)
    return residual(attend(h, "middle_attention") if attention else h, "middle_1", width)


def _frequencies(network):
    return layers.Sinusoids(network.model_channels) if network.time_embedding is None else network.time_embedding


def _time_embedding(network):
    return functools.partial(layers.TimeEmbedding, 4 * network.model_channels, kernel_init=_uniform, dtype=network.dtype)


def _check(network, x, channels, middle_attention=True, per_channel_norm=False):
    layers.require_images(x)
    multiple = 2 ** (len(channels) - 1)
    if any(side % multiple for side in x.shape[1:-1]):
        raise ValueError(
            f"x of {layers.by(x.shape[1:-1])} positions cannot be halved {len(channels) - 1} times, once per level after the "
            f"first: its sides must be multiples of {multiple}."
        )
    for width in channels:
        if width % network.groups:
            raise ValueError(f"A level has {width} channels, which is no multiple of the {network.groups} groups of the normalisation.")
        if width == network.groups and not network.scale_shift_norm and not per_channel_norm:
            raise ValueError(
                f"{width} channels in {network.groups} groups are normalised one by one, which takes away the embedding that is added "
                "before: use fewer groups, or scale_shift_norm; or per_channel_norm, for weights that were trained so."
            )
    at = dict(zip((2**level for level in range(len(channels))), channels, strict=True))
    if not set(network.attention_resolutions) <= set(at):
        raise ValueError(
            f"attention_resolutions is {network.attention_resolutions}, but images are smaller by {', '.join(map(str, at))} at the levels."
        )
    widths = [*([channels[-1]] if middle_attention else []), *(at[shrink] for shrink in network.attention_resolutions)]
    if widths and (network.num_heads is None) == (network.head_dim is None):
        raise ValueError(
            f"num_heads is {network.num_heads} and head_dim is {network.head_dim}, but one says what the other is: leave one None."
        )
    for width in widths:
        if width % (network.num_heads or network.head_dim):
            heads = f"{network.num_heads} heads" if network.num_heads else f"heads of {network.head_dim} channels"
            raise ValueError(f"Attention among {width} channels cannot have {heads}, which do not divide them.")


class UNet(nn.Module):
    """A U-Net for sequences, images and volumes of any size that halves often enough.

    `model.apply(params, x, t)` or, with classes, `model.apply(params, x, t, y)`: x is (B, T, C), (B, H, W, C) or (B, D, H, W, C) with
    sides that are multiples of 2^(levels - 1), t is () or (B,), y is (B,) with `num_classes` for no class, or what `condition` takes;
    the output is like x, or of twice the channels with `learn_sigma`. With dropout, training passes `deterministic=False` and
    `rngs={"dropout": key}`.
    """

    model_channels: int = 128
    """Channels of the first level, over its multiplier."""
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    """What the channels are multiplied with at each level."""
    num_res_blocks: int = 2
    """Residual blocks per level going down; one more going up."""
    attention_resolutions: tuple[int, ...] = (2,)
    """By how much an image is smaller where there is attention: 2 is 16 x 16 of 32 x 32. The middle has it unless there is none."""
    head_dim: int | None = 64
    """Channels per head of the attention."""
    num_heads: int | None = None
    """Heads of the attention, in place of `head_dim`."""
    num_classes: int | None = None
    """How many classes there are, where y is labels; the label of that number is no class. None for no labels."""
    condition: nn.Module | None = None
    """What y is, in place of `num_classes`: a module of `conditions`. Tokens are seen wherever there is attention."""
    dropout: float = 0.1
    """The share of a block's features that are dropped in training."""
    scale_shift_norm: bool = False
    """Whether the embedding scales and shifts what the second normalisation gives, rather than to be added before it."""
    resblock_updown: bool = False
    """Whether residual blocks halve and double images, rather than convolutions."""
    learn_sigma: bool = False
    """Whether the output has a second half, for a variance, as published weights of discrete-time diffusion have."""
    time_embedding: nn.Module | None = None
    """Of the time: `layers.Sinusoids`, `layers.Fourier` or `layers.LearnableFourier`; None is `layers.Sinusoids(model_channels)`."""
    groups: int = 32
    """Of the normalisation; every number of channels must be a multiple."""
    dtype: jnp.dtype = jnp.float32
    """Of the computation; parameters and normalisations are float32."""
    remat: bool = False
    """Whether to recompute each block in the backward pass rather than to keep its activations."""

    out_channels: int | None = None
    """Channels of the output, or of its first half with `learn_sigma`; None is the input's."""
    middle_attention: bool | None = None
    """Whether there is attention in the middle; None is where there is attention elsewhere."""
    per_channel_norm: bool = False
    """Whether a level may have as many channels as groups, which takes away the embedding that is added there: torchcfm's network for
    MNIST is published so."""
    end_time: bool = False
    """Whether the network has a second time, `end`, for a flow map (see `flow_maps`): `model.apply(params, x, s, y, end=t)`. How far it is
    from the first is embedded beside it, and at first adds nothing."""

    @nn.compact
    def __call__(self, x, t, y=None, deterministic=True, end=None):
        channels = [int(self.model_channels * multiplier) for multiplier in self.channel_mult]
        middle = bool(self.attention_resolutions) if self.middle_attention is None else self.middle_attention
        _check(self, x, channels, middle, self.per_channel_norm)
        given = conditions.embed(self, y, x, 4 * self.model_channels)
        context = None if given.tokens is None else (given.tokens.astype(self.dtype), given.tokens_mask)
        if context is not None and not self.attention_resolutions and not middle:
            raise ValueError(
                "The condition gives tokens, but attention_resolutions is (), and tokens are seen where there is attention: give the "
                "resolutions that have it."
            )
        e = layers.embed_times(self, _time_embedding(self), _frequencies(self), t, end, x)
        if given.vector is not None:
            e = e + given.vector.astype(self.dtype)

        residual, attend = _layers(self, e, context, deterministic)
        inputs = x if given.image is None else jnp.concatenate([x, given.image.astype(x.dtype)], axis=-1)
        seen = _down(self, inputs, channels, residual, attend)
        h = _middle(seen[-1], middle, residual, attend)
        for level, width in reversed(list(enumerate(channels))):
            for i in range(self.num_res_blocks + 1):
                h = residual(jnp.concatenate([h, seen.pop()], axis=-1), f"up_{level}_{i}", width)
                if 2**level in self.attention_resolutions:
                    h = attend(h, f"up_{level}_{i}_attention")
            if level > 0:
                if self.resblock_updown:
                    h = residual(h, f"up_{level}", width, _double)
                else:
                    h = Conv(width, dtype=self.dtype, name=f"up_{level}")(_double(h))

        h = nn.silu(layers.GroupNorm(self.groups, name="norm_out")(h))
        last = (self.out_channels or x.shape[-1]) * (1 + self.learn_sigma)
        return Conv(last, kernel_init=_zeros, dtype=self.dtype, name="out")(h).astype(x.dtype)


class LabUNet(UNet):
    """`UNet` as in the course's third lab: 32, 64 and 128 channels, no attention."""

    model_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2, 4)
    attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    groups: int = 8


class Classifier(nn.Module):
    """The way down of a U-Net and a pool by attention: the classifier of noisy images by which ADM is guided.

    The mean m of the pixels h_i of the last features, after a normalisation, attends to them and to itself, each with a learnt position:

        logits = W A(m + p_0; m + p_0, h_1 + p_1, h_2 + p_2, ...)    (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4.1)

    `model.apply(params, x, t)`: x is (B, H, W, C), or a signal or a volume, whose sides are `image_size`, and t is () or (B,); the output
    is (B, num_classes). `guidance.classifier` takes `lambda x, t: nn.log_softmax(model.apply(params, x, t))[jnp.arange(len(y)), y]`. With
    dropout, training passes `deterministic=False` and `rngs={"dropout": key}`.
    """

    image_size: int = 64
    """The sides of the images, which its positions are for."""
    num_classes: int = 1000
    """How many classes it tells apart."""
    model_channels: int = 128
    """Channels of the first level, over its multiplier."""
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    """What the channels are multiplied with at each level."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    """By how much an image is smaller where there is attention: 2 is 32 x 32 of 64 x 64. The middle has it always."""
    head_dim: int | None = 64
    """Channels per head of the attention."""
    num_heads: int | None = None
    """Heads of the attention, in place of `head_dim`."""
    dropout: float = 0.0
    """The share of a block's features that are dropped in training."""
    scale_shift_norm: bool = True
    """Whether the embedding scales and shifts what the second normalisation gives, rather than to be added before it."""
    resblock_updown: bool = True
    """Whether residual blocks halve images, rather than convolutions."""
    time_embedding: nn.Module | None = None
    """Of the time: `layers.Sinusoids`, `layers.Fourier` or `layers.LearnableFourier`; None is `layers.Sinusoids(model_channels)`."""
    groups: int = 32
    """Of the normalisation; every number of channels must be a multiple."""
    dtype: jnp.dtype = jnp.float32
    """Of the computation; parameters and normalisations are float32."""
    remat: bool = False
    """Whether to recompute each block in the backward pass rather than to keep its activations."""

    @nn.compact
    def __call__(self, x, t, deterministic=True):
        channels = [int(self.model_channels * multiplier) for multiplier in self.channel_mult]
        _check(self, x, channels)
        if set(x.shape[1:-1]) != {self.image_size}:
            raise ValueError(
                f"x has {layers.by(x.shape[1:-1])} positions, but this classifier has those of images with sides of {self.image_size}: "
                "resize them, or make it with another image_size."
            )
        e = _time_embedding(self)(frequency_embedding=_frequencies(self), name="time")(layers.batch_times(t, x))
        residual, attend = _layers(self, e, None, deterministic)
        h = _middle(_down(self, x, channels, residual, attend)[-1], True, residual, attend)

        h = nn.silu(layers.GroupNorm(self.groups, name="norm_out")(h))
        batch, *_, width = h.shape
        h = h.reshape(batch, -1, width)
        h = jnp.concatenate([h.mean(1, keepdims=True), h], axis=1)
        positions = self.param("positions", nn.initializers.normal(width**-0.5), h.shape[1:])
        h = h + jnp.asarray(positions, h.dtype)[None]
        qkv = layers.Dense(3 * width, kernel_init=_uniform, dtype=self.dtype, name="pool_qkv")(h)
        head_dim = self.head_dim or width // (self.num_heads or 1)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, -1, 3, width // head_dim, head_dim), 2, 0)
        pooled = jax.nn.dot_product_attention(q[:, :1], k, v).reshape(batch, width)
        return layers.Dense(self.num_classes, kernel_init=_uniform, dtype=self.dtype, name="out")(pooled).astype(x.dtype)
