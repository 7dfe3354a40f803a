"""The store: a pytree to a folder and back, each file of it checked when it is read."""

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fmjax import files, parallel
from fmjax.checkpoints.folders import (
    INDEX,
    ORBAX,
    OURS,
    PART,
    checkpoints_in,
    first_line,
    is_checkpoint,
    is_ours,
    lock,
    remove_empty,
    require_own,
    steps_in,
)
from fmjax.checkpoints.leaves import _impl, abstract, describe, is_key, leaves_of

FORMAT = "fmjax 1"
SMALLEST_SLICE = 2**20
"""Bytes. Of a larger array that several devices have, each writes a slice, and each is a program to compile, so smaller ones are whole."""


class CorruptCheckpoint(ValueError):
    """A checkpoint whose files are not what was written."""


def save(folder, tree) -> None:
    """Writes a pytree to a folder, whole or not at all, in place of the checkpoint that was there.

    Args:
      folder: where to; parents are made.
      tree: any pytree of arrays, typed keys, numbers and strings, such as a `TrainState`.
    Raises:
      FileExistsError: if the folder has other files in it and no checkpoint.
      BlockingIOError: if another process writes to it.
      OSError: if it cannot be written to; the checkpoint that was there stays.
      TypeError: if a leaf is of another kind.
    """
    folder = Path(folder).absolute()
    parallel.on_first(lambda: require_own(folder))
    with files.uninterrupted():
        try:
            with lock(folder):
                begin(folder, tree, {})()
        except (OSError, TypeError):
            raise
        except Exception as error:
            raise OSError(f"The checkpoint at {folder} could not be written, and what was there stays: {first_line(error)}.") from error
        finally:
            parallel.on_first(lambda: remove_empty(folder))


def restore(folder, like) -> Any:
    """Reads a pytree from a folder.

    Args:
      folder: what `save` wrote, or a `Checkpointer`'s folder, whose last checkpoint is read.
      like: a pytree of the same structure, of arrays or of `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes them); an array's sharding says
        where the result's lies.
    Returns:
      A pytree like `like`, NumPy's where that is.
    Raises:
      FileNotFoundError: if there is no checkpoint at the folder, though there may be some in it.
      CorruptCheckpoint: if any file of it is not as it was written.
      ValueError: if it is of another structure than `like`.
      MemoryError: if a device cannot hold its part of `like`.
    """
    folder = Path(folder).absolute()
    while (steps := steps_in(folder)) and not is_checkpoint(folder):
        try:
            return read(folder / str(steps[-1]), like)[0]
        except (FileNotFoundError, CorruptCheckpoint):
            # A training may have removed it meanwhile.
            if steps_in(folder)[-1:] == steps[-1:]:
                raise
    return read(folder, like)[0]


def begin(folder, tree, beside):
    """Copies a pytree's arrays, and gives the function that waits until they are written and makes a checkpoint of them."""
    arrays, plain, leaves = {}, {}, {}
    for name, leaf in leaves_of(tree).items():
        leaves[name] = describe(name, leaf)
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, bool | int | float | str):
            plain[name] = leaf
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise TypeError(f"{name} was deleted: a training with donate=True took its memory. Save what it gives back.")
        elif leaf.size:
            arrays[name] = jax.random.key_data(leaf) if is_key(leaf) else leaf
    token = np.frombuffer(secrets.token_bytes(8), np.uint32)
    if jax.process_count() > 1:
        token = multihost_utils.broadcast_one_to_all(token)
    token, first = np.asarray(token).tobytes().hex(), jax.process_index() == 0
    writing, data = folder / f"writing-{token}", folder / f"data-{token}"

    def prepare():
        folder.mkdir(parents=True, exist_ok=True)
        require_own(folder)
        for left in list(folder.iterdir()):
            if PART.fullmatch(left.name):
                left.unlink()
            elif OURS.match(left.name) and left.name.startswith("writing"):
                shutil.rmtree(left)

    parallel.on_first(prepare)
    # Orbax would leave threads that wait for each other where the folder is gone.
    response = None
    if arrays:
        with _settings():
            response = ocp.save_async(str(writing), arrays)

    def finish():
        try:
            if response is not None:
                response.result()
            if first:
                commit()
        except BaseException:
            if first:
                for left in folder.glob(f"{writing.name}*"):
                    shutil.rmtree(left, ignore_errors=True)
                remove_empty(folder)
            raise

    def commit():
        writing.mkdir(exist_ok=True)
        found = files.checksums(writing, sorted(str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file()))
        gone = [name for name, sums in found.items() if sums is None]
        if gone:
            raise OSError(f"{writing / gone[0]} was written and cannot be read")
        with files.replacing(folder / INDEX) as part:
            index = {"format": FORMAT, "data": data.name, "leaves": leaves, "plain": plain, "files": found, "beside": beside}
            part.write_text(json.dumps({"checkpoint": index, "sha256": _seal(index)}))
            writing.rename(data)
        for left in folder.iterdir():
            if OURS.match(left.name) and left != data:
                shutil.rmtree(left, ignore_errors=True)

    return finish


def read(folder, like):
    """A checkpoint's pytree, and what stands beside it."""
    index = index_of(folder)
    try:
        return _load(folder, index, like), index["beside"]
    except CorruptCheckpoint:
        # It may have been replaced meanwhile.
        if index_of(folder)["data"] == index["data"]:
            raise
    return read(folder, like)


def index_of(folder):
    """What a checkpoint's own file says, checked."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_bytes())
        index = content["checkpoint"]
        if content["sha256"] != _seal(index):
            raise ValueError("its SHA-256 is another")
    except FileNotFoundError:
        if is_checkpoint(folder):
            raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {INDEX} is missing.") from None
        if not folder.exists():
            raise FileNotFoundError(f"There is no checkpoint at {folder}: train first, or give the folder of a run.") from None
        if (folder / ORBAX).exists():
            raise ValueError(f"The checkpoint at {folder} is Orbax's own, without checksums: read it by orbax.checkpoint.") from None
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [INDEX]
        if all(map(is_ours, names)) and INDEX not in names:
            raise FileNotFoundError(f"There is no checkpoint in {folder} yet: train first, or give the folder of a run.") from None
        inside = checkpoints_in(folder)
        if inside:
            raise FileNotFoundError(
                f"{folder} is no checkpoint itself, but has {len(inside)} in it: give one of them, such as {inside[-1]}, or go on from the "
                "last whole one with Checkpointer(folder).resume."
            ) from None
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged, or is none: it has no {INDEX}.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {INDEX} is not as it was written: {first_line(error)}") from error
    if index["format"] != FORMAT:
        raise ValueError(
            f"The checkpoint at {folder} has the format {index['format']!r}, but this fmjax reads {FORMAT!r}: use the one that wrote it."
        )
    return index


def _load(folder, index, like):
    saved, wanted = index["leaves"], leaves_of(like)
    different = []
    for name in saved | wanted:
        here = describe(name, wanted[name]) if name in wanted else "missing"
        there = saved.get(name, "missing")
        # Training makes an array of a number.
        if here != there and not (here in ("int", "float", "bool") and there == describe(name, jnp.asarray(wanted[name]))):
            different.append(f"{name} is {there} there and {here} here")
    if different:
        more = f", and {len(different) - 3} more leaves differ" if len(different) > 3 else ""
        raise ValueError(
            f"The checkpoint at {folder} is of another model: {'; '.join(different[:3])}{more}. Give the model and the optimiser that it "
            "was saved with."
        )
    targets = {name: abstract(leaf) for name, leaf in wanted.items() if name not in index["plain"]}
    parallel.require_memory([leaf for leaf in targets.values() if isinstance(leaf, jax.ShapeDtypeStruct)])
    verify(folder / index["data"], index["files"])
    arrays = {name: leaf for name, leaf in targets.items() if leaf.size}
    try:
        found: dict[str, Any] = ocp.load(str(folder / index["data"]), arrays) if arrays else {}
    except Exception as error:
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {first_line(error)}") from error
    for name, leaf in targets.items():
        if not leaf.size:
            empty = np.zeros(leaf.shape, leaf.dtype)
            found[name] = empty if isinstance(leaf, np.ndarray) else jax.device_put(empty, leaf.sharding)
        if is_key(wanted[name]):
            found[name] = jax.random.wrap_key_data(found[name], impl=_impl(wanted[name]))
    return jax.tree.structure(like).unflatten([index["plain"].get(name, found.get(name)) for name in wanted])


def verify(folder, expected):
    """Raises unless all files are as they were written; each process of a job reads its share of them."""
    mine = list(expected)[jax.process_index() :: jax.process_count()]
    found = files.checksums(folder, mine)
    bad = [name for name in mine if found[name] != expected[name]]
    anywhere = parallel.anywhere(bool(bad))
    if bad:
        size, wanted = (found[bad[0]] or ["missing"])[0], expected[bad[0]][0]
        what = "missing" if size == "missing" else "of another content" if size == wanted else f"{size} bytes, where {wanted} were written"
        more = f", and {len(bad) - 1} more of its files are not as they were written" if len(bad) > 1 else ""
        raise CorruptCheckpoint(f"The checkpoint at {folder.parent} is damaged: {folder.name}/{bad[0]} is {what}{more}.")
    if anywhere:
        raise CorruptCheckpoint(
            f"The checkpoint at {folder.parent} is damaged: another process of this job found files that are not as they were written."
        )


def _seal(index):
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _settings():
    """Orbax's settings for a save."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
    return context
