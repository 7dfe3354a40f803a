"""The autoencoders of Stable Diffusion, whose files name their tensors in one of three ways.

`DIFFUSERS` are the names of diffusers' AutoencoderKL today, `DIFFUSERS_OLDER` those of its first versions, which published files have
still, and `COMPVIS` those of the paper's code (Rombach et al. 2022, arXiv:2112.10752), which single files for all of Stable Diffusion
have under "first_stage_model.".
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.models.autoencoder import Autoencoder
from fmjax.pretrained import layouts

__all__ = ["DIFFUSERS", "DIFFUSERS_OLDER", "COMPVIS", "autoencoder", "autoencoder_tensors"]


class _Names(NamedTuple):
    """What a file calls the layers: `{level}` counts from the largest images, `{up}` from the smallest, `{i}` the blocks of a level."""

    down: str
    """A residual block of the encoder."""
    halve: str
    """The convolution that halves the images of a level."""
    middle: tuple[str, str, str]
    """The first residual block, the attention and the second residual block of either network's smallest images."""
    up: str
    """A residual block of the decoder."""
    double: str
    """The convolution after the images of a level are doubled."""
    skip: str
    """The dense layer of a residual block whose channels change."""
    norm: str
    """The normalisation of the attention."""
    attention: tuple[str, str, str, str]
    """Its queries, keys, values and output."""
    attention_layout: layouts.Layout
    """How the kernels of these lie."""
    norm_out: str
    """The last normalisation of either network."""


DIFFUSERS = _Names(
    down="down_blocks.{level}.resnets.{i}",
    halve="down_blocks.{level}.downsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    up="up_blocks.{up}.resnets.{i}",
    double="up_blocks.{up}.upsamplers.0.conv",
    skip="conv_shortcut",
    norm="group_norm",
    attention=("to_q", "to_k", "to_v", "to_out.0"),
    attention_layout=layouts.dense,
    norm_out="conv_norm_out",
)
"""The names of diffusers' AutoencoderKL."""
DIFFUSERS_OLDER = DIFFUSERS._replace(attention=("query", "key", "value", "proj_attn"))
"""Those of its first versions."""
COMPVIS = _Names(
    down="down.{level}.block.{i}",
    halve="down.{level}.downsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    up="up.{level}.block.{i}",
    double="up.{level}.upsample.conv",
    skip="nin_shortcut",
    norm="norm",
    attention=("q", "k", "v", "proj_out"),
    attention_layout=layouts.pointwise_image,
    norm_out="norm_out",
)
"""The names of the paper's code."""

_STABLE_DIFFUSION = Autoencoder()
_PREFIX = "first_stage_model."
# Of the paper's training, not of the autoencoder.
_TRAINING = ("loss.", "model_ema.decay", "model_ema.num_updates")


def _rows(model, names=DIFFUSERS) -> list[layouts.Row]:
    """Which tensor each parameter is.

    Args:
      model: a `models.autoencoder.Autoencoder`.
      names: what the file calls its layers.
    Returns:
      One row per parameter.
    """
    widths = model.block_out_channels
    last = len(widths) - 1
    table = [*_ends("encoder", names), *_ends("decoder", names)]
    if model.use_quant_conv:
        table += layouts.layer("quant", "quant_conv", layouts.pointwise_image)
        table += layouts.layer("post_quant", "post_quant_conv", layouts.pointwise_image)
    for level, width in enumerate(widths):
        place = {"level": level, "up": last - level}
        for i in range(model.layers_per_block):
            widened = i == 0 and width != widths[max(level - 1, 0)]
            table += _residual(f"encoder/down_{level}_{i}", f"encoder.{names.down.format(i=i, **place)}", names, widened)
        for i in range(model.layers_per_block + 1):
            narrowed = i == 0 and width != widths[min(level + 1, last)]
            table += _residual(f"decoder/up_{level}_{i}", f"decoder.{names.up.format(i=i, **place)}", names, narrowed)
        if level < last:
            table += layouts.layer(f"encoder/down_{level}", f"encoder.{names.halve.format(**place)}", layouts.convolution)
        if level > 0:
            table += layouts.layer(f"decoder/up_{level}", f"decoder.{names.double.format(**place)}", layouts.convolution)
    return table


def autoencoder(tensors, model=_STABLE_DIFFUSION) -> chex.ArrayTree:
    """The parameters that a file of an autoencoder holds, whichever names it has.

    Of a file for all of Stable Diffusion only the tensors under "first_stage_model." are read; the paper's code saves with an autoencoder
    what its loss has learnt, which is not read either.

    Args:
      tensors: by name.
      model: the `models.autoencoder.Autoencoder` that the file is of; its `scaling_factor` and `shift_factor` do not stand in the file.
    Returns:
      {"params": ...}, float32.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if the names are of no autoencoder, or a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    layouts.require_tensors(tensors)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    tables = [[row._replace(name=prefix + row.name) for row in _rows(model, names)] for names in (DIFFUSERS, DIFFUSERS_OLDER, COMPVIS)]
    found = [sum(row.name in tensors for row in table) for table in tables]
    if 2 * max(found) < len(tables[0]):
        given = ", ".join(list(tensors)[:4])
        raise ValueError(
            f"The file has {len(tensors)} tensors ({given}, ...), but of this autoencoder's {len(tables[0])} only {found[0]} by diffusers' "
            f"names, such as {tables[0][0].name}, {found[1]} by its older ones and {found[2]} by CompVis', such as "
            f"{tables[2][-1].name}: give the file of an autoencoder, and its names without what a wrapper put before them."
        )
    side = 2 ** (len(model.block_out_channels) - 1)
    shapes = layouts.shapes_of(model, jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32))
    return layouts.from_tensors(
        tables[found.index(max(found))],
        shapes,
        tensors,
        ignore=lambda name: not name.startswith(prefix) or name.removeprefix(prefix).startswith(_TRAINING),
    )


def autoencoder_tensors(params, model=_STABLE_DIFFUSION) -> dict[str, np.ndarray]:
    """The tensors of parameters by the names of diffusers' AutoencoderKL, the inverse of `autoencoder`.

    Args:
      params: {"params": ...}.
      model: the `models.autoencoder.Autoencoder` that they are of.
    Returns:
      Arrays by name.
    Raises:
      TypeError: if `params` has no "params".
      ValueError: if the parameters are not of this model.
    """
    return layouts.to_tensors(_rows(model), params)


def _ends(part, names):
    """The rows of what either network has once."""
    table = layouts.layer(f"{part}/in", f"{part}.conv_in", layouts.convolution)
    before, attention, after = (f"{part}.{name}" for name in names.middle)
    table += _residual(f"{part}/middle_0", before, names) + _residual(f"{part}/middle_1", after, names)
    table += layouts.norm(f"{part}/middle_attention/norm", f"{attention}.{names.norm}")
    for path, name in zip(("q", "k", "v", "out"), names.attention, strict=True):
        table += layouts.layer(f"{part}/middle_attention/{path}", f"{attention}.{name}", names.attention_layout)
    table += layouts.norm(f"{part}/norm_out", f"{part}.{names.norm_out}")
    return table + layouts.layer(f"{part}/out", f"{part}.conv_out", layouts.convolution)


def _residual(path, name, names, skip=False):
    """The rows of a residual block."""
    table = layouts.norm(f"{path}/norm_in", f"{name}.norm1") + layouts.layer(f"{path}/conv_in", f"{name}.conv1", layouts.convolution)
    table += layouts.norm(f"{path}/norm_out", f"{name}.norm2") + layouts.layer(f"{path}/conv_out", f"{name}.conv2", layouts.convolution)
    return table + (layouts.layer(f"{path}/skip", f"{name}.{names.skip}", layouts.pointwise_image) if skip else [])
