"""DINOv2's vision transformer, whose features compare sets of images    (Oquab et al. 2023, arXiv:2304.07193).

An image becomes a class token and the tokens of its patches, with learnt positions added; registers, which have none, may stand between
them (Darcet et al. 2023, arXiv:2309.16588). Each block is

    h <- h + s_1 A(N(h)),   h <- h + s_2 M(N(h))                                              (1)

with A attention, M an MLP, N a layer normalisation and s learnt scales per feature (Touvron et al. 2021, arXiv:2103.17239). The features
of an image are its class token after the last normalisation. FD-DINOv2 is the Frechet distance between the features that `DINOv2_L` has
of two sets of images (Stein et al. 2023, arXiv:2306.04675), resized to 224 x 224: see `preprocess`.

The positions are learnt for a grid of 37 x 37 patches. Another grid has the cubic interpolation of them along both axes,

    p_i = sum_j k(c_i - j) q_j,   c_i = (i + 1/2) / r - 1/2                                   (2)

with q the learnt positions along an axis, k Keys' kernel and r how many times as many patches the new axis has.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from fmjax.models import dit, layers

__all__ = ["preprocess", "Features", "GELU", "SwiGLU", "DINOv2", "DINOv2_S", "DINOv2_B", "DINOv2_L", "DINOv2_G"]

_normal = nn.initializers.normal(0.02)
# Of ImageNet's pixels in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def preprocess(images) -> chex.ArrayDevice:
    """What the network takes, from images with values from 0 to 255.

    (x / 255 - m) / s

    with m and s the mean and the standard deviation of ImageNet's pixels in [0, 1], per channel. FD-DINOv2 is measured on images of
    224 x 224. Resize bytes of another size before, both sides whatever their ratio, as dgm-eval does by default:
    `data.resize.pillow(images, (224, 224), PIL.Image.Resampling.BICUBIC)`, which smooths where images shrink and rounds to bytes. Its
    option `--clean_resize` is `data.resize.clean_bicubic(images, (224, 224))` instead. The two distances differ: say which it is.

    Args:
      images: (B, H, W, 3), from 0 to 255, bytes or floats.
    Returns:
      (B, H, W, 3), float32.
    Raises:
      TypeError: if the images are neither uint8 nor floats.
      ValueError: if the images have another shape, or their known values are not from 0 to 255 but, for example, from 0 to 1.
    """
    given = jnp.asarray(images)
    _require_rgb("images", given)
    if given.dtype != jnp.uint8 and not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"images have dtype {given.dtype}, but they are uint8, or floats from 0 to 255: cast them.")
    if not isinstance(given, Tracer) and given.is_fully_addressable:
        values = np.asarray(given)
        least, most = values.min(), values.max()
        # Bytes of 0 and 1 are images that are nearly black.
        if not (least >= 0 and most <= 255) or (jnp.issubdtype(given.dtype, jnp.floating) and 0 < most <= 1):
            raise ValueError(
                f"images have values from {least:g} to {most:g}, but they go from 0 to 255: give 255 * x for x from 0 to 1, and "
                "127.5 * (x + 1), clipped to [0, 255], for x from -1 to 1."
            )
    return (given.astype(jnp.float32) / 255 - _MEAN[None, None, None]) / _STD[None, None, None]


class Features(NamedTuple):
    """What the network says of images, after its last normalisation."""

    class_token: chex.ArrayDevice
    """Of the images, (B, hidden_size): what FD-DINOv2 compares."""
    patch_tokens: chex.ArrayDevice
    """Of their patches, (B, H / patch_size, W / patch_size, hidden_size)."""


class GELU(nn.Module):
    """The MLP of two dense layers, four times as many features inside.

    W_2 gelu(W_1 h), the gelu exact    (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    """

    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""

    @nn.compact
    def __call__(self, h):
        hidden = nn.gelu(layers.Dense(4 * h.shape[-1], kernel_init=_normal, dtype=self.dtype)(h), approximate=False)
        return layers.Dense(h.shape[-1], kernel_init=_normal, dtype=self.dtype)(hidden)


class SwiGLU(nn.Module):
    """The gated MLP of the giant network, 8/3 as many features inside, rounded up to a multiple of 8.

    W_3 (silu(W_1 h) W_2 h)    (Shazeer 2020, arXiv:2002.05202)
    """

    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters are float32."""

    @nn.compact
    def __call__(self, h):
        hidden = -(-(8 * h.shape[-1] // 3) // 8) * 8
        both = layers.Dense(2 * hidden, kernel_init=_normal, dtype=self.dtype)(h)
        gate, value = jnp.split(both, 2, axis=-1)
        return layers.Dense(h.shape[-1], kernel_init=_normal, dtype=self.dtype)(nn.silu(gate) * value)


class _Block(nn.Module):
    """(1)."""

    num_heads: int
    mlp_layer: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h):
        scale_1, scale_2 = (
            jnp.asarray(self.param(name, nn.initializers.ones_init(), h.shape[-1:])).astype(self.dtype)[None, None]
            for name in ("scale_1", "scale_2")
        )
        h = h + scale_1 * dit.Attention(self.num_heads, dtype=self.dtype, name="attention")(_layer_norm("norm_1")(h))
        return h + scale_2 * self.mlp_layer(self.dtype, name="mlp")(_layer_norm("norm_2")(h))


def _layer_norm(name):
    return layers.LayerNorm(use_bias=True, use_scale=True, name=name)


class DINOv2(nn.Module):
    """A vision transformer for images of any size that divides into patches: `model.apply(params, preprocess(images))` is (B, hidden_size).

    The published sizes are `DINOv2_S`, `DINOv2_B`, `DINOv2_L` and `DINOv2_G`; with `register_tokens=4` they are those with registers.
    Patches have features, too: `model.apply(params, preprocess(images), method="features")`.
    """

    hidden_size: int = 384
    """Features of a token, a multiple of `num_heads`."""
    depth: int = 12
    """How many blocks there are."""
    num_heads: int = 6
    """Heads of the attention."""
    patch_size: int = 14
    """The side of a patch."""
    register_tokens: int = 0
    """Learnt tokens between the class token and the patches. With them the positions are interpolated as those networks were trained."""
    image_size: int = 518
    """The side of the images whose patches the positions are learnt for."""
    mlp_layer: Callable = GELU
    """Makes the MLPs: `GELU` or `SwiGLU`."""
    dtype: jnp.dtype = jnp.float32
    """Precision of the computation; parameters and features are float32."""

    def __call__(self, x):
        return self.features(x).class_token

    @nn.compact
    def features(self, x) -> Features:
        """The features of images and of their patches.

        Args:
          x: images as `preprocess` gives them, (B, H, W, 3), with sides divisible by `patch_size`.
        Returns:
          `Features`, in float32.
        Raises:
          TypeError: if x is not of floats.
          ValueError: if x has another shape, or known values that no image has after `preprocess`, or the heads do not divide the features.
        """
        x = jnp.asarray(x)
        self._check(x)
        rows, columns = (side // self.patch_size for side in x.shape[1:3])
        side = self.image_size // self.patch_size
        class_token = self.param("class_token", _normal, (1, 1, self.hidden_size))
        positions = jnp.asarray(self.param("positions", _normal, (1, 1 + side**2, self.hidden_size)))
        if (rows, columns) != (side, side):
            along = [_interpolation(size, side, smooth=self.register_tokens > 0) for size in (rows, columns)]
            grid = positions[0, 1:].reshape(side, side, -1)
            grid = jnp.einsum("ri,cj,ijd->rcd", *along, grid, precision="highest")
            positions = jnp.concatenate([positions[:, :1], grid.reshape(1, -1, self.hidden_size)], axis=1)

        h = dit.Patches(self.patch_size, self.hidden_size, dtype=self.dtype, name="patches")(x)
        tokens = [jnp.asarray(class_token) + positions[:, :1]]
        if self.register_tokens:
            tokens.append(jnp.asarray(self.param("registers", _normal, (1, self.register_tokens, self.hidden_size))))
        before = jnp.concatenate(tokens, axis=1).astype(self.dtype)
        h = jnp.concatenate([jnp.broadcast_to(before, (len(x), *before.shape[1:])), h + positions[:, 1:].astype(self.dtype)], axis=1)
        for i in range(self.depth):
            h = _Block(self.num_heads, self.mlp_layer, self.dtype, name=f"block_{i}")(h)
        h = _layer_norm("last_norm")(h)
        return Features(h[:, 0], h[:, before.shape[1] :].reshape(len(x), rows, columns, -1))

    def _check(self, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x has dtype {x.dtype}, but it is of floats: give dinov2.preprocess(images).")
        _require_rgb("x", x)
        if any(side % self.patch_size for side in x.shape[1:3]):
            raise ValueError(
                f"x of {layers.by(x.shape[1:3])} pixels does not divide into patches of {layers.by([self.patch_size] * 2)}: resize the "
                f"images to {layers.by([16 * self.patch_size] * 2)}."
            )
        # After `preprocess` values are within 2.7 of 0.
        if not isinstance(x, Tracer) and x.is_fully_addressable and np.abs(np.asarray(x)).max() > 20:
            raise ValueError(
                f"x has values up to {np.abs(np.asarray(x)).max():g}, but the network takes pixels of mean 0 and deviation 1: give "
                "dinov2.preprocess(images)."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of the number of heads, {self.num_heads}.")


class DINOv2_S(DINOv2):
    """`DINOv2` of 384 features, 12 blocks and 6 heads: ViT-S/14."""

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6


class DINOv2_B(DINOv2):
    """`DINOv2` of 768 features, 12 blocks and 12 heads: ViT-B/14."""

    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12


class DINOv2_L(DINOv2):
    """`DINOv2` of 1024 features, 24 blocks and 16 heads: ViT-L/14, whose features FD-DINOv2 compares."""

    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16


class DINOv2_G(DINOv2):
    """`DINOv2` of 1536 features, 40 blocks and 24 heads, with gated MLPs: ViT-g/14."""

    hidden_size: int = 1536
    depth: int = 40
    num_heads: int = 24
    mlp_layer: Callable = SwiGLU


def _require_rgb(name, x):
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}, but images are (B, H, W, 3), channels last: repeat the channel of grey ones.")


def _interpolation(size, side, *, smooth) -> np.ndarray:
    """The matrix of (2), (size, side), in float32.

    The networks without registers were trained with r = (size + 0.1) / side, a = -0.75 and the outermost positions repeated beyond the
    ends; those with registers with r = size / side, a = -0.5, and a kernel that widens where the grid shrinks and is cut off at the ends.
    """
    ratio = (size if smooth else size + 0.1) / side
    centres = (np.arange(size) + 0.5) / ratio - 0.5
    if smooth:
        weights = _keys((centres[:, None] - np.arange(side)[None]) * min(ratio, 1.0), -0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    weights = _keys(centres[:, None] - np.arange(-2, side + 2)[None], -0.75)
    weights[:, 2] += weights[:, :2].sum(1)
    weights[:, -3] += weights[:, -2:].sum(1)
    return weights[:, 2:-2].astype(np.float32)


def _keys(x, a):
    """The cubic kernel, 1 at 0, 0 at other whole numbers and beyond 2    (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (((x - 5) * x + 8) * x - 4), 0.0))
