"""Transformers: DiT, SiT and JiT, from the tensors of their checkpoints, in every published size.

The three share names. DiT (Peebles and Xie 2023, arXiv:2212.09748) predicts noise and a variance in 1,000 discrete steps, SiT
(Ma et al. 2024, arXiv:2401.08740) a velocity along the linear path, and JiT (Li and He 2025, arXiv:2511.13720) the data along it.
"""

import re

import jax.numpy as jnp
import numpy as np

from fmjax import betas, checks, paths, targets
from fmjax.models import dit as networks
from fmjax.models import layers
from fmjax.pretrained import layouts
from fmjax.pretrained.layouts import Row, convolution, layer, norm, pointwise_image, same
from fmjax.pretrained.published import Published, discrete_time, given_time

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
"""Heads by features: of S, B, L, XL and H."""


def _rows(model) -> list[Row]:
    """The tensors of a `models.dit.DiT` as the official code of DiT, SiT and JiT names them.

    Args:
      model: a `DiT` with labels; with `bottleneck`, norms with scales and class tokens it is a JiT.
    Returns:
      A row for each leaf of its parameters without `scan`.
    """
    found = [
        *layer("time/Dense_0", "t_embedder.mlp.0"),
        *layer("time/Dense_1", "t_embedder.mlp.2"),
        Row(("label", "embedding"), "y_embedder.embedding_table.weight", same),
        *layer("last_modulation", "final_layer.adaLN_modulation.1"),
        *layer("last", "final_layer.linear"),
    ]
    if model.bottleneck:
        found += [
            *layer("patches/Conv_0", "x_embedder.proj1", convolution, bias=False),
            *layer("patches/Dense_0", "x_embedder.proj2", pointwise_image),
        ]
    else:
        found += layer("patches/Conv_0", "x_embedder.proj", convolution)
    if model.class_tokens:
        found.append(Row(("class_tokens", "tokens"), "in_context_posemb", same))
    scales = model.norm is layers.RMSNorm
    if scales:
        found += norm("last_norm", "final_layer.norm_final", bias=False)
    first, last = ("mlp.w12", "mlp.w3") if model.mlp_layer is networks.SwiGLU else ("mlp.fc1", "mlp.fc2")
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        found += [
            *layer(f"{ours}/modulation", f"{theirs}.adaLN_modulation.1"),
            *layer(f"{ours}/attention/Dense_0", f"{theirs}.attn.qkv"),
            *layer(f"{ours}/attention/Dense_1", f"{theirs}.attn.proj"),
            *layer(f"{ours}/mlp/Dense_0", f"{theirs}.{first}"),
            *layer(f"{ours}/mlp/Dense_1", f"{theirs}.{last}"),
        ]
        if scales:
            found += [*norm(f"{ours}/norm_1", f"{theirs}.norm1", bias=False), *norm(f"{ours}/norm_2", f"{theirs}.norm2", bias=False)]
        if model.qk_norm is not None:
            found += [
                *norm(f"{ours}/attention/norm_q", f"{theirs}.attn.q_norm", bias=False),
                *norm(f"{ours}/attention/norm_k", f"{theirs}.attn.k_norm", bias=False),
            ]
    return found


def dit(tensors, *, num_heads=None) -> Published:
    """DiT from the tensors of its checkpoint, such as DiT-XL-2-256x256.pt: noise, and a variance, in 1,000 discrete steps.

    The size is read from the tensors. Peebles and Xie 2023, arXiv:2212.09748.

    Args:
      tensors: arrays by name: `read("DiT-XL-2-256x256.pt")`, or `read(file, "ema")` of a checkpoint of its training code.
      num_heads: of the attention, which no tensor shows; None is what the file says, as `sit_metadata` has it, or the published size's.
    Returns:
      A `Published` of latents (H / 8, W / 8, 4), scaled by 0.18215, and labels, of which 1000 is none.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite, or a number cannot be the network's.
    """
    model = _size(tensors, num_heads, networks.DiT(time_embedding=layers.Sinusoids()))
    return _published(tensors, model, path=betas.linear(), target=targets.noise, time=discrete_time)


def sit(tensors, *, num_heads=None, time_scale=None) -> Published:
    """SiT from the tensors of its checkpoint, such as SiT-XL-2-256x256.pt: the velocity of the linear path.

    The size is read from the tensors; a second half of the output, which its training did not use, is left out. Ma et al. 2024,
    arXiv:2401.08740.

    Args:
      tensors: arrays by name, as for `dit`.
      num_heads: of the attention, which no tensor shows; None is what the file says, as `sit_metadata` has it, or the published size's.
      time_scale: what the network multiplies its time with: 1 for SiT; 1000 for a network of ours, whose default that is. None is what the
        file says, as `sit_metadata` has it, or else 1.
    Returns:
      A `Published` of latents (H / 8, W / 8, 4), scaled by 0.18215, and labels, of which 1000 is none.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite, or a number cannot be the network's.
    """
    if time_scale is None:
        said = _said(tensors, "time_scale", float)
        time_scale = 1.0 if said is None else said
    checks.number("time_scale", time_scale, "what the network multiplies its time with", least=0, above=True)
    model = _size(tensors, num_heads, networks.DiT(time_embedding=layers.Sinusoids(scale=time_scale)))
    return _published(tensors, model, path=paths.Linear(), target=targets.velocity, time=given_time)


def jit(tensors, *, noise_scale=1.0, num_heads=None, context_start=None) -> Published:
    """JiT from the tensors of its checkpoint: the data along the linear path, from images of pixels.

    u = (D - x) / max(1 - t, 0.05)    (Li and He 2025, arXiv:2511.13720)

    Args:
      tensors: arrays by name: `read(file, "model_ema1").under("net.")`; its checkpoints hold the network's names under `net.`, in `model`
        and in two averages, `model_ema1` and `model_ema2`.
      noise_scale: of the noise, by which a model was trained: 1 at 256 pixels, 2 at 512.
      num_heads: of the attention, which no tensor shows; None is what the file says, as `sit_metadata` has it, or the published size's.
      context_start: the block before which the label's tokens join, likewise.
    Returns:
      A `Published` of images (H, W, 3) in [-1, 1] and labels, of which 1000 is none.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite, or a number cannot be the network's.
    """
    checks.number("noise_scale", noise_scale, "the scale of the noise in training", least=0, above=True)
    if context_start is not None:
        checks.whole("context_start", context_start, "the block before which the label's tokens join", least=0)
    base = networks.DiT(
        time_embedding=layers.Sinusoids(scale=1.0),
        norm=layers.RMSNorm,
        qk_norm=layers.RMSNorm,
        mlp_layer=networks.SwiGLU,
        rotary=True,
    )
    model = _size(tensors, num_heads, base)
    if model.class_tokens:
        # B, L and H of 12, 24 and 32 blocks.
        start = {12: 4, 24: 8, 32: 10}.get(model.depth) if context_start is None else context_start
        if start is None:
            raise ValueError(f"No published size has {model.depth} blocks, so context_start is not known: give it.")
        model = model.clone(context_start=start)
    path = paths.Linear() if noise_scale == 1 else paths.ScaledNoise(paths.Linear(), noise_scale)
    return _published(tensors, model, path=path, target=targets.data, time=given_time, least=0.05)


def sit_tensors(params, model, size) -> dict[str, np.ndarray]:
    """The tensors of a `DiT`'s parameters under the names of DiT's, SiT's and JiT's code, which loads them.

    Args:
      params: {"params": ...}.
      model: the `models.dit.DiT` that they are of, with labels, without `scan`.
      size: of its examples, (H, W, C), for the table of positions that is in those files.
    Returns:
      Arrays by name, for `write`.
    Raises:
      TypeError: if `params` has no "params".
      ValueError: if the parameters are not those of such a network.
    """
    grid = (side // model.patch_size for side in size[:2])
    return {"pos_embed": layers.grid_positions(*grid, model.hidden_size), **layouts.to_tensors(_rows(model), params)}


def sit_metadata(model) -> dict[str, str]:
    """What no tensor of a `DiT` shows, for `write` beside `sit_tensors`, so that `sit` reads it: the heads, and the scale of the time.

    Args:
      model: a `models.dit.DiT`, whose time is embedded by `layers.Sinusoids`.
    Returns:
      Strings by name.
    Raises:
      ValueError: if the time is embedded otherwise, which those files do not know.
    """
    embedding = model.time_embedding
    if not isinstance(embedding, layers.Sinusoids):
        raise ValueError(f"The time is embedded by {type(embedding).__name__}, but SiT's code has layers.Sinusoids: train it with those.")
    return {"num_heads": str(model.num_heads), "time_scale": str(embedding.scale)}


def _said(tensors, name, kind):
    """A number above 0 that a file says of its network beside its tensors; None where it says none."""
    text = getattr(tensors, "metadata", {}).get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < np.inf:
        raise ValueError(f"The file says that its network has {name} {text[:80]!r}, but it is a number above 0.")
    return value


def _size(tensors, num_heads, base):
    """The module of the size that the tensors have."""
    layouts.require_tensors(tensors)
    if num_heads is not None:
        checks.whole("num_heads", num_heads, "how many heads the attention has")
    said = _said(tensors, "num_heads", int)
    if said is not None and num_heads not in (None, said):
        raise ValueError(f"num_heads is {num_heads}, but the file says that its network has {said}: leave it out.")
    num_heads = num_heads if said is None else said
    shape = _shapes(tensors)
    first = "x_embedder.proj1.weight" if base.rotary else "x_embedder.proj.weight"
    # By their numbers of axes.
    needed = {
        first: 4,
        "y_embedder.embedding_table.weight": 2,
        "t_embedder.mlp.0.weight": 2,
        "final_layer.linear.weight": 2,
        "blocks.0.attn.qkv.weight": 2,
        **({"in_context_posemb": 3} if "in_context_posemb" in tensors else {}),
    }
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(
            f"The file has no {missing[0]}, which says the network's size; it has {', '.join(list(tensors)[:4])} and so on. Is it a "
            "checkpoint of another network, or are the names under a prefix, as JiT's under net., `tensors.under('net.')`?"
        )
    for name, axes in needed.items():
        if len(shape(name)) != axes or 0 in shape(name):
            raise ValueError(f"{name} has shape {tuple(shape(name))}, but it has {axes} axes, none of them 0: is it another network?")
    features, channels, patch_size = shape(first)[0], *shape(first)[1:3]
    bottleneck = features if base.rotary else None
    hidden_size = shape("t_embedder.mlp.0.weight")[0]
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
    depth = next(i for i in range(len(numbers) + 1) if i not in numbers)
    if depth < len(numbers):
        raise ValueError(
            f"The file has {len(numbers)} blocks up to blocks.{max(numbers)}, but none is blocks.{depth}: part of it is missing."
        )
    if num_heads is None and hidden_size not in _HEADS:
        raise ValueError(f"No published size has {hidden_size} features, so num_heads is not known: give it.")
    num_heads = _HEADS[hidden_size] if num_heads is None else num_heads
    if hidden_size % num_heads:
        raise ValueError(f"num_heads is {num_heads}, but the network has {hidden_size} features, which is no multiple of it.")
    out = shape("final_layer.linear.weight")[0] // patch_size**2
    if out not in (channels, 2 * channels):
        raise ValueError(f"The network gives {out} channels for {channels}, but it gives as many, or twice as many with a variance.")
    tokens = shape("in_context_posemb")[1] if "in_context_posemb" in tensors else 0
    return base.clone(
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=shape("y_embedder.embedding_table.weight")[0] - 1,
        learn_sigma=out == 2 * channels,
        bottleneck=bottleneck,
        class_tokens=tokens,
    )


def _shapes(tensors):
    return tensors.shape if hasattr(tensors, "shape") else lambda name: np.shape(tensors[name])


def _published(tensors, model, **convention) -> Published:
    shape = _shapes(tensors)
    channels = shape("x_embedder.proj1.weight" if model.bottleneck else "x_embedder.proj.weight")[1]
    if "pos_embed" not in tensors:
        raise ValueError("The file has no pos_embed, the fixed table of positions, which says the size of the images: it is cut short.")
    given = np.asarray(tensors["pos_embed"])
    grid = round(given.shape[1] ** 0.5) if given.ndim == 3 else 0
    square = grid and given.shape == (1, grid * grid, model.hidden_size) and jnp.issubdtype(given.dtype, jnp.floating)
    ours = layers.grid_positions(grid, grid, model.hidden_size) if square else None
    # In half precision it is rounded.
    if ours is None or not np.abs(ours - given.astype(np.float32)).max() <= (1e-4 if given.dtype.itemsize > 2 else 4e-3):
        raise ValueError(
            f"pos_embed, of shape {given.shape}, is not the fixed table of sines and cosines of a square grid: the network was trained "
            "with other positions."
        )
    side = model.patch_size * grid
    size = (side, side, channels)
    shapes = layouts.shapes_of(model, np.zeros((1, *size), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32))
    params = layouts.from_tensors(_rows(model), shapes, tensors, ignore=lambda name: name == "pos_embed")
    return Published(params, model=model, size=size, variance=model.learn_sigma and convention["target"] is targets.noise, **convention)
