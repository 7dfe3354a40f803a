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


def read(folder, like, choose=None):
    """A checkpoint's pytree, and what stands beside it.

    `choose` is a function (folder, saved, wanted) -> {name: name there, or None}, of the leaves' kinds there and those of `like`, both by
    name; where it says None the leaf of `like` stays. By default they must be the same.
    """
    index = index_of(folder)
    try:
        return _load(folder, index, like, choose or exactly), index["beside"]
    except CorruptCheckpoint:
        # It may have been replaced meanwhile.
        if index_of(folder)["data"] == index["data"]:
            raise
    return read(folder, like, choose)


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


def exactly(folder, saved, wanted):
    """Each leaf by its own name; raises unless the checkpoint has these and no others."""
    different = [name for name in saved | wanted if not fits(name, saved.get(name), wanted.get(name))]
    if different:
        raise ValueError(_another(folder, different, saved, wanted))
    return {name: name for name in wanted}


def fits(name, there, leaf):
    """Whether a leaf of this kind is restored into that one."""
    if there is None or leaf is None:
        return False
    here = describe(name, leaf)
    # Training makes an array of a number.
    return here == there or (here in ("int", "float", "bool") and there == describe(name, jnp.asarray(leaf)))


def say(name, saved, wanted):
    """In what a leaf differs."""
    here = describe(name, wanted[name]) if name in wanted else "missing"
    return f"{name} is {saved.get(name, 'missing')} there and {here} here"


CURES = {
    "opt_state": "Give the optimiser that it was saved with, or go on with this one by Checkpointer(...).resume(run, new_optimizer=True). "
    "To sample, checkpoints.restore_part(folder, 'ema') reads the average alone.",
    "ema": "Give init as many emas as it was saved with. To sample, checkpoints.restore_part(folder, 'ema') reads what there is.",
    "variables": "Give init the variables that it was saved with.",
}
"""What to do where a part of the state alone differs."""


def _another(folder, different, saved, wanted):
    """What to say of a checkpoint that is not like the pytree it is to be restored into."""
    more = f", and {len(different) - 3} more leaves differ" if len(different) > 3 else ""
    listed = f"{'; '.join(say(name, saved, wanted) for name in different[:3])}{more}"
    if not all({"step", "params"} <= {name.partition(".")[0] for name in names} for names in (saved, wanted)):
        cure = "Give the model and the optimiser that it was saved with; checkpoints.restore_part reads a part of it."
        if wanted and all(fits(name, saved.get(f"params.{name}"), leaf) for name, leaf in wanted.items()):
            cure = "To read these alone, checkpoints.restore_part(folder, 'params', like), or 'ema' for their average."
        return f"The checkpoint at {folder} is of another model: {listed}. {cure}"
    parts = list(dict.fromkeys(name.partition(".")[0] for name in different))
    if "params" in parts:
        return (
            f"The checkpoint at {folder} is of another model: {listed}. The parameters differ: give the model that it was saved with; or "
            "begin another training from what fits by checkpoints.restore_matching(folder, params, part='ema', new=(...), unused=(...))."
        )
    names = {"opt_state": "another optimiser", "ema": "other averages", "variables": "other variables"}
    what = " and ".join(names.get(part, f"another {part}") for part in parts)
    return (
        f"The checkpoint at {folder} is not of another model, whose parameters would differ, but of {what}: {listed}. "
        f"{' '.join(CURES[part] for part in parts if part in CURES)}"
    )


def _load(folder, index, like, choose):
    wanted = leaves_of(like)
    there = choose(folder, index["leaves"], wanted)
    plain = {name: index["plain"][at] for name, at in there.items() if at in index["plain"]}
    kept = {name: wanted[name] for name, at in there.items() if at is None}
    targets = {at: abstract(wanted[name]) for name, at in there.items() if name not in plain and name not in kept}
    parallel.require_memory([leaf for leaf in targets.values() if isinstance(leaf, jax.ShapeDtypeStruct)])
    verify(folder / index["data"], index["files"])
    arrays = {name: leaf for name, leaf in targets.items() if leaf.size}
    try:
        with _settings():
            found: dict[str, Any] = ocp.load(str(folder / index["data"]), arrays) if arrays else {}
    except Exception as error:
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {first_line(error)}") from error
    for name, leaf in targets.items():
        if not leaf.size:
            empty = np.zeros(leaf.shape, leaf.dtype)
            found[name] = empty if isinstance(leaf, np.ndarray) else jax.device_put(empty, leaf.sharding)
    restored, given = plain | kept, set()
    for name, at in there.items():
        if name not in restored:
            # Where two leaves are of one there, each has its own array.
            value = jnp.copy(found[at]) if at in given else found[at]
            given.add(at)
            restored[name] = jax.random.wrap_key_data(value, impl=_impl(wanted[name])) if is_key(wanted[name]) else value
    return jax.tree.structure(like).unflatten([restored[name] for name in wanted])


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
    """Orbax's settings."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
    # What is asked for, and nothing else, is read.
    context.pytree.loading.partial_load = True
    return context
