"""How the parameters of a network stand in a PyTorch file: one table of leaves for reading and writing.

A row says which tensor a leaf of the parameters is, and how its axes lie there: a dense layer of PyTorch is (features out, features in)
and multiplies from the other side; a convolution is (out, in, *sides). Every leaf and every tensor is used exactly once.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


class Layout(NamedTuple):
    """How the axes of a tensor become those of a leaf, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


same = Layout(lambda x: x, lambda x: x)
"""Vectors: biases, scales, tables of embeddings."""
dense = Layout(lambda x: x.T, lambda x: x.T)
"""(out, in) -> (in, out)."""
convolution = Layout(lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))
"""(out, in, *sides) -> (*sides, in, out)."""
pointwise = Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None])
"""A convolution of one position on a sequence, (out, in, 1), which is a dense layer here."""
pointwise_image = Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None, None])
"""A convolution of one pixel, (out, in, 1, 1), which is a dense layer here."""


def then(first, second) -> Layout:
    """One layout after another in reading, and back in writing."""
    return Layout(lambda x: second.read(first.read(x)), lambda x: first.write(second.write(x)))


class Row(NamedTuple):
    """A leaf of the parameters, by its path below "params", and the tensor that it is."""

    path: tuple[str, ...]
    name: str
    layout: Layout


def layer(path, name, layout=dense, *, bias=True) -> list[Row]:
    """The rows of a layer with a kernel and a bias.

    Args:
      path: of the layer, words with slashes between: "block_0/mlp/Dense_0".
      name: of the layer in the file: "blocks.0.mlp.fc1".
      layout: of the kernel.
      bias: whether it has one.
    Returns:
      One or two rows.
    """
    path = tuple(path.split("/"))
    return [Row((*path, "kernel"), f"{name}.weight", layout), *([Row((*path, "bias"), f"{name}.bias", same)] if bias else [])]


def norm(path, name, *, bias=True) -> list[Row]:
    """The rows of a normalisation with a scale and a bias."""
    path = tuple(path.split("/"))
    return [Row((*path, "scale"), f"{name}.weight", same), *([Row((*path, "bias"), f"{name}.bias", same)] if bias else [])]


def require_tensors(tensors) -> None:
    """Raises unless tensors are arrays by name."""
    if not isinstance(tensors, Mapping):
        given = repr(tensors) if tensors is None or isinstance(tensors, str | Path) else f"a {type(tensors).__name__}"
        raise TypeError(f"tensors is {given}, but they are arrays by name: give pretrained.read(path).")


def shapes_of(model, *inputs) -> dict[tuple[str, ...], Any]:
    """The shapes of a network's parameters, by path, without making them."""
    return traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def from_tensors(
    rows: Iterable[Row], shapes, tensors: Mapping[str, Any], *, ignore: Callable[[str], bool] = lambda name: False
) -> chex.ArrayTree:
    """The parameters that a file of tensors holds, in float32, one tensor in memory at a time.

    Args:
      rows: of all leaves.
      shapes: theirs, as `shapes_of` gives them.
      tensors: by name, as `read` gives them.
      ignore: which names are no parameters, such as tables of positions that are computed here.
    Returns:
      {"params": ...}.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    require_tensors(tensors)
    rows = list(rows)
    _require_once(rows, shapes)
    names = [row.name for row in rows]
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in set(names) and not ignore(name)]
    if missing or unknown:
        raise ValueError(
            f"The file's tensors are not those of this network: {_listed('missing', missing)}; {_listed('not known', unknown)}. Make the "
            "network as the file was trained, or pick another part of the file."
        )
    leaves = {}
    # The largest first, so that the others fit into the memory that their copies leave to the allocator.
    for row in sorted(rows, key=lambda row: -shapes[row.path].size):
        tensor = np.asarray(tensors[row.name])
        given = tensor.shape
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{row.name} has dtype {tensor.dtype}, but weights are real floats: read a file that is not quantised.")
        try:
            leaf = row.layout.read(tensor)
        except ValueError:
            leaf = tensor
        if leaf.shape != shapes[row.path].shape:
            wanted = row.layout.write(np.broadcast_to(np.float32(0), shapes[row.path].shape)).shape
            raise ValueError(
                f"{row.name} has shape {given}, but it is {wanted} in this network (its {'/'.join(row.path)}): make the network in the "
                "size of the file."
            )
        leaf = np.asarray(leaf, np.float32)
        if not np.isfinite(leaf).all():
            raise ValueError(f"{row.name} holds numbers that are not finite: the file is damaged, or its training diverged.")
        # Axes change places in JAX's copy, many times faster than in one of NumPy; waiting keeps copies from piling up.
        leaves[row.path] = jax.block_until_ready(jnp.array(leaf))
    return {"params": traverse_util.unflatten_dict(leaves)}


def to_tensors(rows: Iterable[Row], params) -> dict[str, np.ndarray]:
    """The tensors of a file from parameters: the inverse of `from_tensors`.

    Args:
      rows: of all leaves.
      params: {"params": ...}.
    Returns:
      Arrays by name.
    Raises:
      TypeError: if `params` has no "params".
      ValueError: if the rows are not of these parameters.
    """
    if not isinstance(params, Mapping) or "params" not in params:
        keys = f" of the keys {', '.join(map(str, list(params)[:4]))}" if isinstance(params, Mapping) else ""
        raise TypeError(f'params is a {type(params).__name__}{keys}, but it is {{"params": ...}}, as model.init gives it.')
    rows, leaves = list(rows), traverse_util.flatten_dict(params["params"])
    _require_once(rows, leaves)
    return {row.name: np.ascontiguousarray(row.layout.write(np.asarray(leaves[row.path]))) for row in rows}


def _require_once(rows, leaves):
    paths = [row.path for row in rows]
    missing, unknown = [path for path in leaves if path not in set(paths)], [path for path in paths if path not in leaves]
    if missing or unknown or len(set(paths)) < len(paths) or len({row.name for row in rows}) < len(rows):
        raise ValueError(
            "The parameters are not those of the network that the file's table is of: "
            f"{_listed('without a tensor', ['/'.join(path) for path in missing])}; "
            f"{_listed('not in the parameters', ['/'.join(path) for path in unknown])}."
        )


def _listed(what, names):
    shown = ", ".join(names[:4])
    return f"{len(names)} {what}" + (f" ({shown}{' and more' if len(names) > 4 else ''})" if names else "")
