"""DINOv2's published weights as the parameters of `models.dinov2`    (Oquab et al. 2023, arXiv:2304.07193).

The files are `dinov2_vits14_pretrain.pth` and its like, `DINOv2_S()` to `DINOv2_G()`; those with `_reg4` in their names are of
`register_tokens=4`. timm's files of the networks without registers, but for the giant one, have the same names.
"""

import re

import chex
import jax
import jax.numpy as jnp

from fmjax.models import dinov2 as network
from fmjax.pretrained import layouts

__all__ = ["dinov2"]


def dinov2(tensors, model) -> chex.ArrayTree:
    """The parameters that a file of DINOv2 holds.

    Blocks may be numbered within chunks, `blocks.0.3.` for `blocks.3.`, as training saves them.

    Args:
      tensors: by their official names.
      model: the network, in the file's size, such as `models.dinov2.DINOv2_L()`.
    Returns:
      {"params": ...}, float32.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    layouts.require_tensors(tensors)
    given = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): name for name in tensors}
    named = [row._replace(name=given.get(row.name, row.name)) for row in _rows(model)]
    image = jax.ShapeDtypeStruct((1, model.patch_size, model.patch_size, 3), jnp.float32)
    return layouts.from_tensors(named, layouts.shapes_of(model, image), tensors, ignore=lambda name: name == "mask_token")


def _rows(model) -> list[layouts.Row]:
    """Which tensor of a file each parameter is; `layouts.to_tensors(_rows(model), params)` writes them back.

    Args:
      model: a `models.dinov2.DINOv2`.
    Returns:
      The rows of all its parameters. What takes the place of masked patches in training, `mask_token`, is no parameter here.
    """
    found = [
        layouts.Row(("class_token",), "cls_token", layouts.same),
        layouts.Row(("positions",), "pos_embed", layouts.same),
        *layouts.layer("patches/Conv_0", "patch_embed.proj", layouts.convolution),
        *layouts.norm("last_norm", "norm"),
    ]
    if model.register_tokens:
        found.append(layouts.Row(("registers",), "register_tokens", layouts.same))
    first, second = ("w12", "w3") if model.mlp_layer is network.SwiGLU else ("fc1", "fc2")
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        found += [
            *layouts.norm(f"{ours}/norm_1", f"{theirs}.norm1"),
            *layouts.layer(f"{ours}/attention/Dense_0", f"{theirs}.attn.qkv"),
            *layouts.layer(f"{ours}/attention/Dense_1", f"{theirs}.attn.proj"),
            layouts.Row((ours, "scale_1"), f"{theirs}.ls1.gamma", layouts.same),
            *layouts.norm(f"{ours}/norm_2", f"{theirs}.norm2"),
            *layouts.layer(f"{ours}/mlp/Dense_0", f"{theirs}.mlp.{first}"),
            *layouts.layer(f"{ours}/mlp/Dense_1", f"{theirs}.mlp.{second}"),
            layouts.Row((ours, "scale_2"), f"{theirs}.ls2.gamma", layouts.same),
        ]
    return found
