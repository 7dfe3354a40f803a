"""Checkpoints: a pytree to a folder and back, by Orbax."""

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
    ocp.save(str(folder), state, overwrite=True)


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
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), like)
    try:
        return ocp.load(str(folder), abstract)
    except Exception as error:
        raise ValueError(
            f"The checkpoint at {folder} is damaged or of another model: {error} "
            "Give the model and the optimiser that it was saved with (config.json of its run names them)."
        ) from error
