"""Checkpoints: a pytree to a folder and back, by Orbax."""

import shutil
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp


def save(folder, state):
    """Writes a pytree to a folder, whole or not at all, in place of what was there.

    Args:
      folder: where to; parents are made.
      state: any pytree of arrays, such as a `TrainState`.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The old checkpoint goes only once the new one is whole.
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    ocp.save(str(new), state, overwrite=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder, like):
    """Reads a pytree from a folder.

    Args:
      folder: what `save` wrote.
      like: a pytree of the same structure, of arrays or of `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes them).
    Returns:
      A pytree like `like`.
    Raises:
      FileNotFoundError: if there is no checkpoint in the folder.
      ValueError: if what is there is damaged or of another structure than `like`.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"There is no checkpoint at {folder}: train first, or give the folder of a run.")
    try:
        saved = _leaves(ocp.metadata(str(folder)).metadata)
    except Exception as error:
        raise ValueError(f"The checkpoint at {folder} is damaged, or is none: {_first_line(error)}") from error
    wanted = _leaves(like)
    if not saved:
        raise ValueError(f"The checkpoint at {folder} is damaged: it names no arrays.")
    different = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
    if different:
        name = different[0]
        more = f", and {len(different) - 1} more leaves differ" if len(different) > 1 else ""
        raise ValueError(
            f"The checkpoint at {folder} is of another model: {name} is {saved.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here{more}. Give the model and the optimiser that it was saved with."
        )
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or one_device), like)
    try:
        return ocp.load(str(folder), abstract)
    except Exception as error:
        raise ValueError(f"The checkpoint at {folder} is damaged: {_first_line(error)}") from error


def _leaves(tree):
    """The dtype and shape of every array of a tree, by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _first_line(error):
    return str(error).strip().partition("\n")[0]
