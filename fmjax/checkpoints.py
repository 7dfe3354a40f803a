"""Checkpoints by Orbax: a pytree to a folder and back, and the series of them that a training leaves and goes on from.

    with checkpoints.Series("runs/latents/checkpoints") as series:
        state, key = series.resume(state, key, stream)
        state, history = training.fit(
            step, state, stream, key, steps=...,
            callbacks=[lambda state, row: series.save(state, key, stream, row)],
            save=lambda state: series.save(state, key, stream, wait=True),
        )

What is saved is the state as one program sees it, whatever devices it lies on, so any number of devices restores it.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fmjax import checks, parallel
from fmjax.training import check_state

_MARK = "_CHECKPOINT_METADATA"
"""The file that every checkpoint of Orbax has."""
SMALLEST_SLICE = 2**20
"""Bytes. Of a larger array that several devices have, each writes a slice, and each is a program to compile, so smaller ones are whole."""


class Damaged(ValueError):
    """A checkpoint whose files are not what was written."""


def save(folder, state):
    """Writes a pytree to a folder, whole or not at all, in place of what was there.

    Args:
      folder: where to; parents are made.
      state: any pytree of arrays, such as a `TrainState`.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    # The old checkpoint goes only once the new one is whole.
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    with _settings():
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
      FileNotFoundError: if there is no checkpoint at the folder, though there may be some in it.
      Damaged: if what is there is not whole.
      ValueError: if it is of another structure than `like`.
      MemoryError: if a device cannot hold its part of `like`.
    """
    folder = Path(folder).absolute()
    _put_back(folder)
    if not folder.exists():
        raise FileNotFoundError(f"There is no checkpoint at {folder}: train first, or give the folder of a run.")
    if not (folder / _MARK).exists() and (inside := _checkpoints_in(folder)):
        raise FileNotFoundError(
            f"{folder} is no checkpoint itself, but has {len(inside)} in it: give one of them, such as {inside[-1]}, or go on from the "
            "last whole one with Series(folder).resume."
        )
    try:
        saved = _leaves(ocp.metadata(str(folder)).metadata)
    except Exception as error:
        raise Damaged(f"The checkpoint at {folder} is damaged, or is none: {_first_line(error)}") from error
    wanted = _leaves(like)
    if not saved:
        raise Damaged(f"The checkpoint at {folder} is damaged: it names no arrays.")
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
    parallel.require_memory(abstract)
    try:
        return ocp.load(str(folder), abstract)
    except Exception as error:
        raise Damaged(f"The checkpoint at {folder} is damaged: {_first_line(error)}") from error


class Series:
    """A run's checkpoints, a folder a step, each whole or not there at all; use it as a context, or close it.

    Args:
      folder: where they are; parents are made. What an interrupted save left there is removed.
      keep: how many of the last are kept.
      best: the name of a number in the rows, such as "loss": the checkpoint with the least is kept too.
    Raises:
      ValueError: if `keep` is not a whole number of at least 1.
      OSError: if the folder cannot be written to.
    """

    def __init__(self, folder, *, keep=3, best=None):
        checks.whole("keep", keep, "how many of the last checkpoints are kept")
        self.folder, self._best = Path(folder).absolute(), best
        self._require_writable()
        policies: Any = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if best is not None:
            kept.append(policies.BestN(get_metric_fn=lambda row: -row[best], n=1, keep_checkpoints_without_metrics=False))
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._pending = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self):
        """The steps that have a checkpoint, in order."""
        return [info.step for info in self._checkpointer.checkpoints]

    def save(self, state, key, stream=None, row=None, *, wait=False):
        """Saves a state at its step, unless that has been; all processes call it.

        The arrays are copied before it returns, and written while training goes on.

        Args:
          state: a `TrainState`.
          key: that `fit` draws from.
          stream: of the batches, where it has `get_state()`, as those of `data.pipeline` do.
          row: numbers to keep with it, as `fit` gives them.
          wait: whether to return only when it is written.
        Raises:
          TypeError: if the state is no `TrainState`, or the key is not typed.
          ValueError: if the row has not the number that `best` names.
          OSError: if this one, or the one before it, could not be written.
        """
        check_state(state)
        checks.key(key)
        if row is not None and self._best is not None and self._best not in row:
            raise ValueError(f"best is {self._best!r}, but the row has {', '.join(map(repr, row))}: name one of these.")
        step = int(state.step)
        beside: dict[str, Any] = {"key": np.asarray(jax.random.key_data(key)).tolist()}
        if stream is not None:
            beside["stream"] = stream.get_state()
        try:
            if step not in self.steps():
                self._finish()
                self._require_writable()
                with _settings():
                    self._pending = self._checkpointer.save_async(step, state, force=True, metrics=row, custom_metadata=beside)
            if wait:
                self._finish()
        except Exception as error:
            self._pending = None
            whole = [number for number in self.steps() if number != step] or ["none"]
            raise OSError(
                f"A checkpoint could not be written to {self.folder} at step {step}: {_first_line(error)}. The last whole one there is "
                f"of step {whole[-1]}."
            ) from error

    def resume(self, state, key, stream=None):
        """The last checkpoint that is whole, or what is given where there is none yet.

        A damaged one is named in a warning and renamed, and the one before it is used.

        Args:
          state: a `TrainState` of the same structure; its arrays' shardings say where those of the result lie.
          key: to begin with.
          stream: of the batches, which is set to where it was.
        Returns:
          The state and the key.
        Raises:
          TypeError: if the key is not typed.
          Damaged: if there are checkpoints and none is whole.
          ValueError: if the last is of another model.
        """
        checks.key(key)
        checkpoints = self._checkpointer.checkpoints
        for info in reversed(checkpoints):
            folder = self.folder / str(info.step)
            try:
                restored = restore(folder, state)
                beside: Any = self._checkpointer.metadata(info.step).custom_metadata
            except Damaged as error:
                if info is checkpoints[0]:
                    raise
                aside = folder.with_name(f"{folder.name}.damaged")
                warnings.warn(f"{error} The one before it is used; this one is now {aside}.", stacklevel=2)
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                multihost_utils.sync_global_devices("a damaged checkpoint is out of the way")
                self._checkpointer.reload()
                continue
            if stream is not None and "stream" in beside:
                stream.set_state(beside["stream"])
            return restored, jax.random.wrap_key_data(jnp.array(beside["key"], jnp.uint32), impl=jax.random.key_impl(key))
        return state, key

    def close(self):
        """Waits until all is written."""
        self._finish()
        self._checkpointer.close()

    def _require_writable(self):
        """Raises here and now: Orbax's threads would wait for each other for minutes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            message = f"Checkpoints cannot be written to {self.folder}: {error.strerror}. Make it writable, or give another folder."
            raise type(error)(message) from error

    def _finish(self):
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def _checkpoints_in(folder):
    """The checkpoints one or two folders down, those of a series in the order of their steps."""
    found = [mark.parent for pattern in ("*", "*/*") for mark in folder.glob(f"{pattern}/{_MARK}")]
    return sorted(found, key=lambda one: (one.parent, int(one.name) if one.name.isdigit() else -1))


def _put_back(folder):
    """Undoes the first of the two renames of a `save` that was killed before the second."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def _settings():
    """Orbax's settings for a save."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
    return context


def _leaves(tree):
    """The dtype and shape of every array of a tree, by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _first_line(error):
    return str(error).strip().partition("\n")[0]
