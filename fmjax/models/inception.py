"""The Inception-v3 network of TensorFlow's graph of 2015-12-05, whose features the FID, the sFID and the Inception score are of.

(Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500, "FID"; Nash et al. 2021, arXiv:2103.03841, "sFID")

An image of any size is resized and scaled in the graph, and goes through convolutions and then through blocks of branches:

    h = (r(x) - 128) / 128                                                                         (1)
    c(h) = max((W h - m) g / sqrt(v + 1e-3) + b, 0)                                                (2)

where r is `tensorflow_bilinear` to 299 x 299 pixels. The features are the mean of the last block's channels over its pixels, and the logits
a dense layer of them. Three things are as in that graph and not as in later versions of the network, such as torchvision's: averages over 3
x 3 pixels are of those inside the image; the last block takes the maximum instead; and there are 1008 classes. A Frechet distance is
comparable with published ones only where its features are from the published weights, `pretrained.inception`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from fmjax.models import layers

__all__ = ["Inception", "Outputs", "check_images", "preprocess", "tensorflow_bilinear"]

_SIZE = 299
"""The side of the images that the convolutions take."""


def tensorflow_bilinear(images, size) -> chex.ArrayDevice:
    """Bilinear resizing as TensorFlow 1 did it: without the offset of half a pixel that aligns the centres of two images.

    y_i = (1 - w) x_j + w x_{j + 1},   w = i H / h - j,   0 <= w < 1

    along either side, of length H before and h after, with the last pixel repeated. Images are not smoothed before they become smaller.
    `jax.image.resize` is another one.

    Args:
      images: (B, H, W, C), floats or uint8.
      size: (height, width) of the result.
    Returns:
      (B, height, width, C), float32.
    Raises:
      ValueError: if the images are no such batch.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}, but they are a batch (B, H, W, C): for one image give image[None].")
    images = images.astype(jnp.float32)
    for axis, length in zip((2, 1), reversed(size), strict=True):
        before = images.shape[axis]
        place = np.arange(length, dtype=np.float32) * np.float32(before / length)
        first = np.minimum(place.astype(np.int32), before - 1)
        weight = jnp.asarray(place - first.astype(np.float32)).reshape((1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
        low = jnp.take(images, first, axis, mode="clip")
        high = jnp.take(images, np.minimum(first + 1, before - 1), axis, mode="clip")
        images = low + (high - low) * weight
    return images


def check_images(images) -> None:
    """Raises unless images are a batch that `Inception` takes, where their values are known: call it before a jitted network.

    Args:
      images: (B, H, W, 3), uint8, or floats in [0, 255].
    Raises:
      TypeError: if they are neither uint8 nor floats.
      ValueError: if they have another shape, or are floats outside [0, 255], or within [-1, 1], where networks of images work.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        grey = ", and grey ones jnp.repeat(images, 3, -1)" if images.ndim and images.shape[-1] == 1 else ""
        raise ValueError(f"images have shape {images.shape}, but Inception takes (B, H, W, 3): for one image give image[None]{grey}.")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images have dtype {images.dtype}, but Inception takes uint8, or floats in [0, 255]: cast them.")
    if images.dtype == np.uint8 or isinstance(images, Tracer):
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and 1 < high <= 255):
        raise ValueError(
            f"images are floats from {low:g} to {high:g}, but Inception takes them in [0, 255]: those in [-1, 1] become "
            "jnp.round(127.5 * (jnp.clip(images, -1, 1) + 1)), those in [0, 1] 255 * images, and black ones are given as uint8."
        )


def preprocess(images) -> chex.ArrayDevice:
    """What the convolutions take of images of any size.

    h = (r(x) - 128) / 128        (1)

    where r is `tensorflow_bilinear` to 299 x 299 pixels.

    Args:
      images: (B, H, W, 3), uint8, or floats in [0, 255].
    Returns:
      (B, 299, 299, 3), float32, from -1 to 127/128.
    Raises:
      TypeError: as `check_images` does.
      ValueError: likewise.
    """
    check_images(images)
    return (tensorflow_bilinear(images, (_SIZE, _SIZE)) - 128) / 128


class Outputs(NamedTuple):
    """What the network tells of images, all in float32."""

    features: chex.ArrayDevice
    """(B, 2048), `pool_3` of the graph: of the FID, the KID, precision and recall."""
    spatial: chex.ArrayDevice
    """(B, 2023), the first 7 channels of `mixed_6/conv` of the graph, 17 x 17 pixels, the channels last: of the sFID."""
    logits: chex.ArrayDevice
    """(B, 1008)."""
    logits_unbiased: chex.ArrayDevice
    """(B, 1008), without the bias of the last layer: of the Inception score, by their softmax."""


class _Conv(nn.Module):
    """A convolution, a normalisation by statistics that are parameters, and a ReLU: (2)."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        # A GPU would round float32 to 10 bits otherwise, and a TPU to 7.
        convolution = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            kernel_init=layers.as_matrix(nn.initializers.he_normal()),
            dtype=self.dtype,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )
        h = convolution(h).astype(jnp.float32)
        zeros, ones, shape = nn.initializers.zeros_init(), nn.initializers.ones_init(), (self.features,)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        h = (h - mean[None, None, None]) * (scale / jnp.sqrt(var + 1e-3))[None, None, None] + bias[None, None, None]
        return nn.relu(h).astype(self.dtype)


def _mean(h):
    """The mean of 3 x 3 pixels, of those that are in the image."""
    return nn.avg_pool(h, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _largest(h):
    return nn.max_pool(h, (3, 3), (1, 1), "SAME")


def _halve(h):
    return nn.max_pool(h, (3, 3), (2, 2), "VALID")


class _A(nn.Module):
    """Of 35 x 35 pixels: one, five and twice three pixels wide, and a mean."""

    pool_features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        conv = functools.partial(_Conv, dtype=self.dtype)
        one = conv(64, name="branch1x1")(h)
        five = conv(48, name="branch5x5_1")(h)
        five = conv(64, (5, 5), name="branch5x5_2")(five)
        double = conv(64, name="branch3x3dbl_1")(h)
        double = conv(96, (3, 3), name="branch3x3dbl_2")(double)
        double = conv(96, (3, 3), name="branch3x3dbl_3")(double)
        pool = conv(self.pool_features, name="branch_pool")(_mean(h))
        return jnp.concatenate([one, five, double, pool], -1)


class _B(nn.Module):
    """From 35 x 35 pixels to 17 x 17."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        conv = functools.partial(_Conv, dtype=self.dtype)
        three = conv(384, (3, 3), 2, "VALID", name="branch3x3")(h)
        double = conv(64, name="branch3x3dbl_1")(h)
        double = conv(96, (3, 3), name="branch3x3dbl_2")(double)
        double = conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _halve(h)], -1)


class _C(nn.Module):
    """Of 17 x 17 pixels: one, seven and twice seven pixels wide, one axis at a time, and a mean; and its first branch by itself."""

    inner: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        conv = functools.partial(_Conv, dtype=self.dtype)
        one = conv(192, name="branch1x1")(h)
        seven = conv(self.inner, name="branch7x7_1")(h)
        seven = conv(self.inner, (1, 7), name="branch7x7_2")(seven)
        seven = conv(192, (7, 1), name="branch7x7_3")(seven)
        double = conv(self.inner, name="branch7x7dbl_1")(h)
        double = conv(self.inner, (7, 1), name="branch7x7dbl_2")(double)
        double = conv(self.inner, (1, 7), name="branch7x7dbl_3")(double)
        double = conv(self.inner, (7, 1), name="branch7x7dbl_4")(double)
        double = conv(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = conv(192, name="branch_pool")(_mean(h))
        return jnp.concatenate([one, seven, double, pool], -1), one


class _D(nn.Module):
    """From 17 x 17 pixels to 8 x 8."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        conv = functools.partial(_Conv, dtype=self.dtype)
        three = conv(192, name="branch3x3_1")(h)
        three = conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = conv(192, name="branch7x7x3_1")(h)
        seven = conv(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = conv(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _halve(h)], -1)


class _E(nn.Module):
    """Of 8 x 8 pixels: branches that part into rows and columns, and a pool."""

    pool: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h):
        conv = functools.partial(_Conv, dtype=self.dtype)
        one = conv(320, name="branch1x1")(h)
        three = conv(384, name="branch3x3_1")(h)
        three_rows = conv(384, (1, 3), name="branch3x3_2a")(three)
        three_columns = conv(384, (3, 1), name="branch3x3_2b")(three)
        double = conv(448, name="branch3x3dbl_1")(h)
        double = conv(384, (3, 3), name="branch3x3dbl_2")(double)
        double_rows = conv(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_columns = conv(384, (3, 1), name="branch3x3dbl_3b")(double)
        pool = conv(192, name="branch_pool")(self.pool(h))
        return jnp.concatenate([one, three_rows, three_columns, double_rows, double_columns, pool], -1)


class Inception(nn.Module):
    """The network: images to `Outputs`.

    Its layers are named as in the file of its published weights, 24 million numbers, statistics included.
    """

    dtype: jnp.dtype = jnp.float32
    """Precision of the convolutions; parameters, statistics and outputs are float32. Published distances are of float32."""

    @nn.compact
    def __call__(self, images):
        """The features and logits of images.

        Args:
          images: (B, H, W, 3), uint8, or floats in [0, 255]; inside `jax.jit`, call `check_images` before.
        Returns:
          `Outputs`.
        Raises:
          TypeError: if the images are neither uint8 nor floats.
          ValueError: if they have another shape or, where their values are known, are not in [0, 255].
        """
        conv = functools.partial(_Conv, dtype=self.dtype)
        h = preprocess(images).astype(self.dtype)
        h = conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(h)
        h = conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(h)
        h = conv(64, (3, 3), name="Conv2d_2b_3x3")(h)
        h = _halve(h)
        h = conv(80, name="Conv2d_3b_1x1")(h)
        h = conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(h)
        h = _halve(h)
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            h = _A(pool_features, self.dtype, name=f"Mixed_5{letter}")(h)
        h = _B(self.dtype, name="Mixed_6a")(h)
        h, _ = _C(128, self.dtype, name="Mixed_6b")(h)
        h, _ = _C(160, self.dtype, name="Mixed_6c")(h)
        h, one = _C(160, self.dtype, name="Mixed_6d")(h)
        h, _ = _C(192, self.dtype, name="Mixed_6e")(h)
        h = _D(self.dtype, name="Mixed_7a")(h)
        h = _E(_mean, self.dtype, name="Mixed_7b")(h)
        h = _E(_largest, self.dtype, name="Mixed_7c")(h)
        features = h.astype(jnp.float32).mean((1, 2))
        spatial = one[..., :7].astype(jnp.float32).reshape(len(one), -1)
        logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
        bias = self.param("fc_bias", nn.initializers.zeros_init(), (1008,))
        return Outputs(features, spatial, logits + bias[None], logits)
