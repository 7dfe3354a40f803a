"""U-Nets: guided-diffusion's ADM and its classifiers, torchcfm's networks and EDM's ADM, in every published size.

ADM (Dhariwal and Nichol 2021, arXiv:2105.05233) predicts noise, and a variance, in 1,000 discrete steps; torchcfm's networks (Tong et al.
2024, arXiv:2302.00482) predict a velocity along the linear path; EDM's ADM (Karras et al. 2022, arXiv:2206.00364) is preconditioned. What
`model.apply(params, x, t)` takes as time is

    t = k / 1000,  k = 0, ..., 999        ADM and its classifiers: k is the index of a step          (1)
    t                                     torchcfm: 0 is noise, 1 is data                            (2)
    t = log(sigma) / 4                    EDM: x is c_in (data + sigma noise), the result is F       (3)

The sizes are modules, so that their fields may be given: `ADM_64(dtype=jnp.bfloat16)`. Classes are 0 to 999, and none of these networks
has a label for no class: they are guided by a classifier.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fmjax.models import conditions, layers
from fmjax.models.unet import Classifier, UNet
from fmjax.pretrained import layouts
from fmjax.pretrained.layouts import Layout, Row, convolution, dense, pointwise, pointwise_image, same, then

__all__ = [
    "ADM_64",
    "ADM_128",
    "ADM_256",
    "ADM_256_unconditional",
    "ADM_512",
    "ADM_LSUN",
    "ADM_64_to_256",
    "ADM_128_to_512",
    "ADM_classifier_64",
    "ADM_classifier_128",
    "ADM_classifier_256",
    "ADM_classifier_512",
    "TORCHCFM_CIFAR10",
    "TORCHCFM_MNIST",
    "EDM_ADM_64",
    "adm_params",
    "adm_classifier_params",
    "torchcfm_params",
    "edm_adm_params",
]


class ADM_128(UNet):
    """128x128_diffusion.pt: ADM for ImageNet at 128 pixels; t as in (1)."""

    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (4, 8, 16)
    head_dim: int | None = None
    num_heads: int | None = 4
    condition: nn.Module | None = conditions.Label(1000, null_label=False)
    dropout: float = 0.0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    learn_sigma: bool = True


class ADM_256(ADM_128):
    """256x256_diffusion.pt: ADM for ImageNet at 256 pixels; t as in (1)."""

    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    head_dim: int | None = 64
    num_heads: int | None = None


class ADM_64(ADM_256):
    """64x64_diffusion.pt: ADM for ImageNet at 64 pixels, the one with the new order of attention; t as in (1)."""

    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    dropout: float = 0.1


class ADM_512(ADM_256):
    """512x512_diffusion.pt: ADM for ImageNet at 512 pixels; t as in (1)."""

    channel_mult: tuple[float, ...] = (0.5, 1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (16, 32, 64)


class ADM_256_unconditional(ADM_256):
    """256x256_diffusion_uncond.pt: ADM for ImageNet at 256 pixels without classes; t as in (1)."""

    condition: nn.Module | None = None


class ADM_LSUN(ADM_256_unconditional):
    """lsun_bedroom.pt, lsun_cat.pt, lsun_horse.pt, and without its dropout lsun_horse_nodropout.pt, at 256 pixels; t as in (1)."""

    dropout: float = 0.1


class ADM_64_to_256(ADM_128):
    """64_256_upsampler.pt: ADM for ImageNet at 256 pixels, given those of 64; t as in (1).

    It takes 6 channels, `jnp.concatenate([x, jax.image.resize(small, x.shape, "bilinear")], -1)`, and gives 3 and their variance.
    """

    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (8, 16, 32)
    out_channels: int | None = 3


class ADM_128_to_512(ADM_64_to_256):
    """128_512_upsampler.pt: ADM for ImageNet at 512 pixels, given those of 128, as `ADM_64_to_256` is; t as in (1)."""

    attention_resolutions: tuple[int, ...] = (16, 32)
    head_dim: int | None = 64
    num_heads: int | None = None


class ADM_classifier_64(Classifier):
    """64x64_classifier.pt: the classifier of noisy images of 64 pixels; t as in (1)."""

    image_size: int = 64
    num_res_blocks: int = 4


class ADM_classifier_128(Classifier):
    """128x128_classifier.pt: the classifier of noisy images of 128 pixels; t as in (1)."""

    image_size: int = 128
    channel_mult: tuple[float, ...] = (1, 1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (4, 8, 16)


class ADM_classifier_256(Classifier):
    """256x256_classifier.pt: the classifier of noisy images of 256 pixels; t as in (1)."""

    image_size: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (8, 16, 32)


class ADM_classifier_512(Classifier):
    """512x512_classifier.pt: the classifier of noisy images of 512 pixels; t as in (1)."""

    image_size: int = 512
    channel_mult: tuple[float, ...] = (0.5, 1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (16, 32, 64)


class TORCHCFM_CIFAR10(UNet):
    """otcfm_cifar10_weights_step_400000.pt, and those of cfm and fm: torchcfm's network for CIFAR-10; t as in (2)."""

    time_embedding: nn.Module | None = layers.Sinusoids(128, scale=1.0)


class TORCHCFM_MNIST(UNet):
    """The network of torchcfm's examples of MNIST; t as in (2). With classes, `condition=conditions.Label(10, null_label=False)`."""

    model_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2, 2)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (1,)
    head_dim: int | None = None
    num_heads: int | None = 1
    dropout: float = 0.0
    time_embedding: nn.Module | None = layers.Sinusoids(32, scale=1.0)
    per_channel_norm: bool = True


class EDM_ADM_64(ADM_64):
    """edm-imagenet-64x64-cond-adm.pkl: EDM's ADM for ImageNet at 64 pixels; t as in (3).

    With `learn_sigma=True` it is the one of baseline-imagenet-64x64-cond-adm.pkl, whose t is k itself, 0 to 999.
    """

    learn_sigma: bool = False
    time_embedding: nn.Module | None = layers.Sinusoids(192, scale=1.0)


def adm_params(tensors, model, new_attention_order=None) -> chex.ArrayTree:
    """The parameters that a file of guided-diffusion's ADM holds.

    Args:
      tensors: by their official names.
      model: the network, in the file's size, such as `ADM_256()`.
      new_attention_order: whether it was trained with `--use_new_attention_order`, which no tensor shows; None is True for `ADM_64` and
        False for all others, as was published.
    Returns:
      {"params": ...}, float32.
    Raises:
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    shapes = _shapes(model, _input_channels(tensors, "input_blocks.0.0.weight"))
    return layouts.from_tensors(_adm_rows(model, shapes, new_attention_order), shapes, tensors)


def adm_classifier_params(tensors, model) -> chex.ArrayTree:
    """The parameters that a file of a classifier of guided-diffusion holds.

    Args:
      tensors: by their official names.
      model: the classifier, in the file's size, such as `ADM_classifier_256()`.
    Returns:
      {"params": ...}, float32.
    Raises:
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    shapes = _shapes(model, _input_channels(tensors, "input_blocks.0.0.weight"))
    return layouts.from_tensors(_classifier_rows(model, shapes), shapes, tensors)


def torchcfm_params(tensors, model) -> chex.ArrayTree:
    """The parameters that a file of torchcfm holds, in which "ema_model" are those to sample with, and "net_model" the last ones.

    Args:
      tensors: of either part, by their official names, which begin with "module." where several GPUs trained it.
      model: the network, in the file's size, such as `TORCHCFM_CIFAR10()`.
    Returns:
      {"params": ...}, float32.
    Raises:
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    prefix = "module." if any(name.startswith("module.") for name in tensors) else ""
    shapes = _shapes(model, _input_channels(tensors, f"{prefix}input_blocks.0.0.weight"))
    return layouts.from_tensors(_under(prefix, _adm_rows(model, shapes, False)), shapes, tensors)


def edm_adm_params(tensors, model) -> chex.ArrayTree:
    """The parameters that EDM's DhariwalUNet holds.

    The filters by which it halves and doubles images are those of `models.unet`, and are left out; so is the layer of augmentations,
    which is for training, and the table `u` of its preconditioning for discrete steps.

    Args:
      tensors: by their official names, which begin with "model." where they are those of the preconditioned network.
      model: the network, in the file's size, such as `EDM_ADM_64()`.
    Returns:
      {"params": ...}, float32.
    Raises:
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    # "enc.64x64_conv.weight" says the sides of the images.
    first = next((name for name in tensors if name.startswith(f"{prefix}enc.") and name.endswith("_conv.weight")), "enc.64x64_conv.weight")
    image_size = int(first.removeprefix(f"{prefix}enc.").partition("x")[0])
    shapes = _shapes(model, _input_channels(tensors, first))
    known = {f"{prefix}map_augment.weight", "u"}
    rows = _under(prefix, _edm_rows(model, shapes, image_size))
    return layouts.from_tensors(rows, shapes, tensors, ignore=lambda name: name in known or name.endswith(".resample_filter"))


_ADM_RESIDUAL = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_ADM_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_EDM_RESIDUAL = {"norm_in": "norm0", "conv_in": "conv0", "embedding": "affine", "norm_out": "norm1", "conv_out": "conv1", "skip": "skip"}
_EDM_ATTENTION = {"norm": "norm2", "qkv": "qkv", "out": "proj"}


def _adm_rows(model, shapes, new_attention_order=None):
    """Which tensor of a file of ADM, or of torchcfm, each parameter is; `layouts.to_tensors` writes them back."""
    new = isinstance(model, ADM_64) if new_attention_order is None else new_attention_order
    order = (lambda heads: _swapped((3, heads, -1), 0)) if new else lambda heads: same
    label = {"label": "label_emb", "condition/label": "label_emb"}
    return _rows(model, shapes, _adm_down(model) | _adm_up(model) | label, pointwise, order, same)


def _classifier_rows(model, shapes):
    """Those of a file of a classifier."""
    names = _adm_down(model) | {"pool_qkv": "out.2.qkv_proj", "out": "out.2.c_proj"}
    rest = {path: leaf for path, leaf in shapes.items() if path != ("positions",)}
    found = _rows(model, rest, names, pointwise, lambda heads: same, same)
    return [*found, Row(("positions",), "out.2.positional_embedding", dense)]


def _adm_down(model):
    """The official name of each layer on the way down, of the middle and of those around, by ours; there are fewer in the parameters."""
    names = {"time/Dense_0": "time_embed.0", "time/Dense_1": "time_embed.2", "in": "input_blocks.0.0", "norm_out": "out.0", "out": "out.2"}
    count = 1
    for level in range(len(model.channel_mult)):
        for i in range(model.num_res_blocks):
            names |= _inside(f"down_{level}_{i}", f"input_blocks.{count}.0", _ADM_RESIDUAL)
            names |= _inside(f"down_{level}_{i}_attention", f"input_blocks.{count}.1", _ADM_ATTENTION)
            count += 1
        names |= _inside(f"down_{level}", f"input_blocks.{count}.0", _ADM_RESIDUAL) | {f"down_{level}": f"input_blocks.{count}.0.op"}
        count += 1
    for i in range(2):
        names |= _inside(f"middle_{i}", f"middle_block.{2 * i}", _ADM_RESIDUAL)
    return names | _inside("middle_attention", "middle_block.1", _ADM_ATTENTION)


def _adm_up(model):
    names, count = {}, 0
    for level in reversed(range(len(model.channel_mult))):
        for i in range(model.num_res_blocks + 1):
            names |= _inside(f"up_{level}_{i}", f"output_blocks.{count}.0", _ADM_RESIDUAL)
            names |= _inside(f"up_{level}_{i}_attention", f"output_blocks.{count}.1", _ADM_ATTENTION)
            count += 1
        after = f"output_blocks.{count - 1}.{2 if 2**level in model.attention_resolutions else 1}"
        names |= _inside(f"up_{level}", after, _ADM_RESIDUAL) | {f"up_{level}": f"{after}.conv"}
    return names


def _edm_rows(model, shapes, image_size):
    """Those of EDM's DhariwalUNet, in whose names are the sides of the images."""
    sides = [f"{image_size >> level}x{image_size >> level}" for level in range(len(model.channel_mult))]
    names = {"time/Dense_0": "map_layer0", "time/Dense_1": "map_layer1", "in": f"enc.{sides[0]}_conv"}
    names |= {"norm_out": "out_norm", "out": "out_conv", "label": "map_label", "condition/label": "map_label"}
    blocks = {"middle_0": f"dec.{sides[-1]}_in0", "middle_1": f"dec.{sides[-1]}_in1"}
    for level, side in enumerate(sides):
        blocks |= {f"down_{level}_{i}": f"enc.{side}_block{i}" for i in range(model.num_res_blocks)}
        blocks |= {f"up_{level}_{i}": f"dec.{side}_block{i}" for i in range(model.num_res_blocks + 1)}
        if level:
            blocks |= {f"down_{level - 1}": f"enc.{side}_down", f"up_{level}": f"dec.{sides[level - 1]}_up"}
    for ours, theirs in blocks.items():
        attention = "middle_attention" if ours == "middle_0" else f"{ours}_attention"
        names |= _inside(ours, theirs, _EDM_RESIDUAL) | _inside(attention, theirs, _EDM_ATTENTION)
    # One matrix for labels as vectors of zeros and a one is the table of its columns.
    return _rows(model, shapes, names, pointwise_image, lambda heads: _swapped((heads, -1, 3), 1), dense)


def _inside(ours, theirs, parts):
    return {f"{ours}/{part}": f"{theirs}.{name}" for part, name in parts.items()}


def _rows(model, shapes, names, attention, order, label):
    """A row per parameter: the official names of layers, the layout of attention's, the order of its first, and the table of labels'."""
    found = []
    for path, leaf in shapes.items():
        *layer, kind = path
        if kind == "embedding":
            layout = label
        elif kind != "kernel":
            layout = same
        elif leaf.ndim > 2:
            layout = convolution
        elif layer[-1] in ("embedding", "Dense_0", "Dense_1"):
            layout = dense
        else:
            layout = pointwise_image if layer[-1] == "skip" else attention
        if layer[-1] == "qkv":
            width = leaf.shape[-1] // 3
            layout = then(order(model.num_heads or width // model.head_dim), layout)
        found.append(Row(path, f"{names['/'.join(layer)]}.{'bias' if kind == 'bias' else 'weight'}", layout))
    return found


def _swapped(sizes, axis) -> Layout:
    """The first axis as three, of which one and the next change places; -1 is for what remains."""
    swapped = list(sizes)
    swapped[axis], swapped[axis + 1] = sizes[axis + 1], sizes[axis]

    def order(sizes):
        return lambda x: x.reshape(*sizes, *x.shape[1:]).swapaxes(axis, axis + 1).reshape(x.shape)

    return Layout(order(sizes), order(swapped))


def _under(prefix, rows):
    return [row._replace(name=prefix + row.name) for row in rows]


def _shapes(model, channels):
    side = model.image_size if isinstance(model, Classifier) else 2 ** (len(model.channel_mult) - 1)
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    t, y = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    labels = isinstance(model, UNet) and (model.num_classes is not None or model.condition is not None)
    return layouts.shapes_of(model, x, t, y) if labels else layouts.shapes_of(model, x, t)


def _input_channels(tensors, name):
    """Of the first convolution; 3 where it is missing, which the rows say."""
    if name not in tensors:
        return 3
    shape = tensors.shape(name) if hasattr(tensors, "shape") else np.shape(tensors[name])
    return shape[1] if len(shape) == 4 else 3
