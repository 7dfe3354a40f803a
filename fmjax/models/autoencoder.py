"""The autoencoder of latent diffusion, between images and latents with an eighth of their sides.

(Rombach et al. 2022, arXiv:2112.10752, "Stable Diffusion"; Kingma and Welling 2014, arXiv:1312.6114)

The encoder gives a normal distribution of z, of mean m and log-variance v; the decoder gives the image back:

    q(z | x) = N(m(x), exp(v(x)))                                         (1)
    z = m(x) + exp(v(x) / 2) epsilon,  epsilon ~ N(0, I)                  (2)

z is of no particular size. What a diffusion model learns, the data x_1 of `paths`, is z about a shift a and with a scale s, which
bring it near variance 1:

    x_1 = s (z - a)                                                       (3)

`Autoencoder.encode` and `decode` are of z, `latents` and `images` of x_1. The numbers a and s do not stand in the files of weights:
s is 0.18215 for Stable Diffusion 1 and 2 and for DiT and SiT, 0.13025 for SDXL; Stable Diffusion 3 has a scale of 1.5305, a shift of
0.0609 and 16 channels, FLUX.1 0.3611, 0.1159 and 16, both without the `use_quant_conv` of the former.

The layers, their paddings and their constants are those of the published PyTorch networks, so that their weights fit.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmjax import checks, sampling
from fmjax.models import layers

__all__ = ["Autoencoder"]

# Of the published networks, in every normalisation.
_EPSILON = 1e-6


def _norm(groups, name):
    return layers.GroupNorm(groups, _EPSILON, name=name)


def _conv(channels, dtype, name, stride=1):
    # Of an even side, "SAME" with a stride of 2 has a border of zeros after the last pixel alone, as the published networks have.
    init = layers.as_matrix(nn.initializers.lecun_normal())
    return nn.Conv(channels, (3, 3), stride, padding="SAME", kernel_init=init, dtype=dtype, name=name)


class Residual(nn.Module):
    """The residual block S(h) + C_2 silu(N_2(C_1 silu(N_1(h)))), S the identity or a dense layer where the channels change."""

    channels: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h):
        skip = h
        h = _conv(self.channels, self.dtype, "conv_in")(nn.silu(_norm(self.groups, "norm_in")(h)))
        h = _conv(self.channels, self.dtype, "conv_out")(nn.silu(_norm(self.groups, "norm_out")(h)))
        if skip.shape[-1] != self.channels:
            skip = layers.Dense(self.channels, dtype=self.dtype, name="skip")(skip)
        return skip + h


class Attention(nn.Module):
    """Self-attention among pixels with one head, added to them; its softmax is in float32 whatever the dtype."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h):
        batch, *_, channels = h.shape
        pixels = _norm(self.groups, "norm")(h).reshape(batch, -1, 1, channels)
        q, k, v = (layers.Dense(channels, dtype=self.dtype, name=name)(pixels) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        return h + layers.Dense(channels, dtype=self.dtype, name="out")(out)


def _middle(h, groups, dtype):
    """The smallest images' layers, of the module that calls it."""
    h = Residual(h.shape[-1], groups, dtype, name="middle_0")(h)
    h = Attention(groups, dtype, name="middle_attention")(h)
    return Residual(h.shape[-1], groups, dtype, name="middle_1")(h)


class Encoder(nn.Module):
    """Images (B, H, W, C) to features (B, H / 2^k, W / 2^k, features), halved after each level but the last."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = _conv(self.block_out_channels[0], self.dtype, "in")(x)
        for level, channels in enumerate(self.block_out_channels):
            for i in range(self.layers_per_block):
                h = Residual(channels, self.groups, self.dtype, name=f"down_{level}_{i}")(h)
            if level < len(self.block_out_channels) - 1:
                h = _conv(channels, self.dtype, f"down_{level}", stride=2)(h)
        h = nn.silu(_norm(self.groups, "norm_out")(_middle(h, self.groups, self.dtype)))
        return _conv(self.features, self.dtype, "out")(h)


class Decoder(nn.Module):
    """Latents to images, each pixel repeated to twice the sides after each level but the last, which is number 0."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z):
        h = _middle(_conv(self.block_out_channels[-1], self.dtype, "in")(z), self.groups, self.dtype)
        for level, channels in reversed(list(enumerate(self.block_out_channels))):
            for i in range(self.layers_per_block + 1):
                h = Residual(channels, self.groups, self.dtype, name=f"up_{level}_{i}")(h)
            if level > 0:
                h = _conv(channels, self.dtype, f"up_{level}")(h.repeat(2, axis=1).repeat(2, axis=2))
        return _conv(self.features, self.dtype, "out")(nn.silu(_norm(self.groups, "norm_out")(h)))


class Autoencoder(nn.Module):
    """The variational autoencoder of Stable Diffusion, whose defaults are the sizes of its versions 1 and 2.

    `model.apply(params, x)` is the image decoded from the mean of x; the parts are `model.apply(params, key, x, method="latents")` and
    `model.apply(params, x_1, method="images")` for a diffusion model, and the methods "encode" and "decode" without its scale.

    Attention among the h w pixels of the latents takes h^2 w^2 numbers per image: decode large images one by one.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, from the largest images to the smallest; k levels halve the sides k - 1 times."""
    layers_per_block: int = 2
    """Residual blocks per level of the encoder; one more in the decoder."""
    latent_channels: int = 4
    """Channels of the latents."""
    channels: int = 3
    """Channels of the images."""
    groups: int = 32
    """Of the normalisation; every number of channels must be a multiple."""
    scaling_factor: float = 0.18215
    """The s of (3)."""
    shift_factor: float = 0.0
    """The a of (3)."""
    use_quant_conv: bool = True
    """Whether there is a dense layer after the encoder and one before the decoder."""
    dtype: jnp.dtype = jnp.float32
    """Of the computation; parameters, normalisations and the softmax are float32. The activations of SDXL's weights are too large for
    float16."""

    def setup(self):
        """Makes both networks.

        Raises:
          ValueError: if the groups of the normalisation do not divide the channels of a level.
        """
        for width in self.block_out_channels:
            if width % self.groups:
                raise ValueError(f"A level has {width} channels, which is no multiple of the {self.groups} groups of the normalisation.")
        sizes = (self.block_out_channels, self.layers_per_block)
        self.encoder = Encoder(*sizes, 2 * self.latent_channels, self.groups, self.dtype)
        self.decoder = Decoder(*sizes, self.channels, self.groups, self.dtype)
        if self.use_quant_conv:
            self.quant = layers.Dense(2 * self.latent_channels, dtype=self.dtype)
            self.post_quant = layers.Dense(self.latent_channels, dtype=self.dtype)

    def __call__(self, x):
        """The image decoded from the mean of its distribution.

        Args:
          x: images in [-1, 1], (B, H, W, channels), as `encode` takes them.
        Returns:
          Images like x.
        """
        return self.decode(self.encode(x)[0])

    def encode(self, x):
        """The distribution of the latents z of images, without the scale of (3).

        q(z | x) = N(m(x), exp(v(x)))        (1)

        Args:
          x: images in [-1, 1], (B, H, W, channels), any float dtype, sides multiples of 2^(levels - 1).
        Returns:
          The mean m and the log-variance v, held in [-30, 20], each (B, H / 2^(levels - 1), W / 2^(levels - 1), latent_channels).
        Raises:
          TypeError: if the images are not of real floats.
          ValueError: if they have another number of axes or channels, or sides that cannot be halved as often.
        """
        x = _images("x", x, self.channels, "images in [-1, 1]")
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if any(side % multiple for side in x.shape[1:3]):
            raise ValueError(
                f"x has images of {layers.by(x.shape[1:3])} pixels, but this autoencoder makes a pixel of {multiple} x {multiple}: crop or "
                f"resize them to sides that are multiples of {multiple}."
            )
        moments = self.encoder(x)
        if self.use_quant_conv:
            moments = self.quant(moments)
        mean, log_variance = jnp.split(moments.astype(x.dtype), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, z):
        """The images of latents z without the scale of (3), of which those of a diffusion model are `images`.

        Args:
          z: as `encode` means them, (B, h, w, latent_channels), any float dtype.
        Returns:
          Images, about in [-1, 1], (B, h 2^(levels - 1), w 2^(levels - 1), channels), of z's dtype.
        Raises:
          TypeError: if the latents are not of real floats.
          ValueError: if they have another number of axes or channels.
        """
        z = _images("z", z, self.latent_channels, "latents")
        return self.decoder(self.post_quant(z) if self.use_quant_conv else z).astype(z.dtype)

    def latents(self, key, x):
        """A draw of the latents x_1 of images, which a diffusion model learns.

        x_1 = s (m(x) + exp(v(x) / 2) epsilon - a),  epsilon ~ N(0, I)        (2), (3)

        Args:
          key: a typed key; or one per example, (B,), of which example i then depends on the i-th alone.
          x: images in [-1, 1], as `encode` takes them.
        Returns:
          (B, H / 2^(levels - 1), W / 2^(levels - 1), latent_channels), of x's dtype.
        Raises:
          TypeError: if the key is not typed, or the images are not of real floats.
          ValueError: if there is neither one key nor one per example, or for what `encode` says.
        """
        mean, log_variance = self.encode(x)
        z = mean + jnp.exp(log_variance / 2) * sampling.noise_like(key, mean)
        return self.scaling_factor * (z - self.shift_factor)

    def images(self, latents):
        """The images of latents x_1 of a diffusion model: `decode` of x_1 / s + a, the inverse of (3).

        Args:
          latents: as `latents` gives them, (B, h, w, latent_channels), any float dtype.
        Returns:
          Images, about in [-1, 1], (B, h 2^(levels - 1), w 2^(levels - 1), channels), of the dtype of the latents.
        Raises:
          TypeError: if the latents are not of real floats.
          ValueError: if they have another number of axes or channels.
        """
        return self.decode(_images("latents", latents, self.latent_channels, "latents") / self.scaling_factor + self.shift_factor)


def _images(name, x, channels, what):
    """Raises unless x is a batch of images with so many channels, and returns it as an array."""
    x = checks.floats(name, x)
    if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape:
        hint = f": move its channels last, {name}.transpose(0, 2, 3, 1)" if x.ndim == 4 and x.shape[1] == channels else ""
        raise ValueError(f"{name} has shape {x.shape}, but this autoencoder takes {what}, (B, H, W, {channels}){hint}.")
    return x
