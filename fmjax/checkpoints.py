"""Checkpoints: a pytree to a folder and back, and those of a run that it goes on from, each checked when it is read.

    with checkpoints.Checkpointer("runs/latents/checkpoints") as checkpointer:
        run = checkpointer.resume(training.Run(state, key))
        run = training.fit(step, run, stream, steps=..., save=checkpointer.save, save_every=5000)

A checkpoint is a folder: `data-.../` by Orbax, and `checkpoint.json`, which names it, holds the SHA-256 of all its files and of itself,
and takes its predecessor's place in one rename once everything is on the disk. What is saved is the state as one program sees it,
whatever devices it lies on, so any number of devices restores it.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import re
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fmjax import checks, files, parallel, training

INDEX = "checkpoint.json"
FORMAT = "fmjax 1"
_ORBAX = "_CHECKPOINT_METADATA"
"""A file that every checkpoint of Orbax has."""
SMALLEST_SLICE = 2**20
"""Bytes. Of a larger array that several devices have, each writes a slice, and each is a program to compile, so smaller ones are whole."""
_OURS = re.compile(r"(data|writing)-[0-9a-f]{16}")
"""Folders of arrays, whole and not yet whole."""
_PART = re.compile(r"\.[0-9a-f]{16}\.part")
"""Names of what was not whole yet, or was being removed."""


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
    parallel.on_first(lambda: _require_own(folder))
    with files.uninterrupted():
        try:
            with _lock(folder):
                _begin(folder, tree, {})()
        except (OSError, TypeError):
            raise
        except Exception as error:
            raise OSError(f"The checkpoint at {folder} could not be written, and what was there stays: {_first_line(error)}.") from error
        finally:
            parallel.on_first(lambda: _remove_empty(folder))


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
    while (steps := _steps(folder)) and not _is_checkpoint(folder):
        try:
            return _read(folder / str(steps[-1]), like)[0]
        except (FileNotFoundError, CorruptCheckpoint):
            # A training may have removed it meanwhile.
            if _steps(folder)[-1:] == steps[-1:]:
                raise
    return _read(folder, like)[0]


class Checkpointer:
    """A run's checkpoints, a folder for each step, in a folder that this process alone writes to; use it as a context, or close it.

    Args:
      folder: where they are; parents are made. What an interrupted save left there is removed.
      keep: how many of the last are kept.
      best: the name of one of the metrics, such as "loss": the checkpoint with the least is kept too.
    Raises:
      ValueError: if `keep` is not a whole number of at least 1.
      BlockingIOError: if another process has the folder; the error says which.
      OSError: if the folder cannot be written to.
    """

    def __init__(self, folder, *, keep=3, best=None):
        checks.whole("keep", keep, "how many of the last checkpoints are kept")
        self.folder, self._keep, self._best = Path(folder).absolute(), keep, best
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        # Whether what is in the folder is known to be of the run that is saved.
        self._knows, self._closed = False, False
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._lock = _lock(self.folder)
        try:
            parallel.on_first(self._require_writable)
            parallel.on_first(self._tidy)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return _steps(self.folder)

    def save(self, run, wait=False) -> None:
        """Saves a run at its step, unless that has been; all processes call it.

        The arrays are copied before it returns, and written while training goes on. Where the save before this one failed, that is
        said in a warning and this one is waited for. Checkpoints of another course of training, such as those after a step to which
        the run was taken back, are named in a warning and renamed.

        Args:
          run: a `training.Run`.
          wait: whether to return only when it is written; signals that would end the process wait for it too.
        Raises:
          TypeError: if it is no `Run`, or its place in the data is nothing that JSON can hold.
          ValueError: if its metrics have not the number that `best` names.
          RuntimeError: if it was closed.
          BlockingIOError: if another process took the folder.
          OSError: if it could not be written; the error names the last whole one.
        """
        if self._closed:
            raise RuntimeError(f"The checkpointer of {self.folder} was closed: save within its context, or make another.")
        beside, step = self._beside(run), int(run.state.step)
        with files.uninterrupted():
            if self._pending is not None and (wait or self._pending[0] != step):
                try:
                    self._finish()
                except OSError as error:
                    warnings.warn(f"{error} That of step {step} is written now.", stacklevel=2)
                    wait = True
            if self._pending is None:
                parallel.on_first(lambda: self._set_aside(step, beside))
                self._knows = True
            # It may have been written and be gone.
            if self._pending is None and not parallel.anywhere(jax.process_index() == 0 and step in self.steps()):
                try:
                    parallel.on_first(self._require_writable)
                    finish = _begin(self.folder / str(step), run.state, beside)
                except BlockingIOError:
                    raise
                except Exception as error:
                    raise self._failed(step, error) from error
                self._pending = step, self._writer.submit(self._write, finish)
            if wait:
                self._finish()

    def resume(self, run) -> training.Run:
        """The run of the last checkpoint that is whole, or the one that is given where there is none yet.

        A damaged checkpoint is named in a warning and renamed, and the one before it is used.

        Args:
          run: to begin with, a `training.Run`; the shardings of its state's arrays say where those of the result lie.
        Returns:
          A `training.Run`.
        Raises:
          TypeError: if it is no `Run`.
          CorruptCheckpoint: if there are checkpoints and none is whole.
          ValueError: if the last is of another model, or was begun with another key, or the folder has checkpoints of Orbax's own.
        """
        training.check_run(run)
        steps = self.steps()
        others = [file.parent for file in sorted(self.folder.glob(f"*/{_ORBAX}")) if file.parent.name.isdecimal()]
        if others and not steps:
            raise ValueError(f"{self.folder} has checkpoints of Orbax's own, such as {others[0]}: give another folder.")
        for step in reversed(steps):
            folder = self.folder / str(step)
            try:
                state, beside = _read(folder, run.state)
            except CorruptCheckpoint as error:
                if step == steps[0]:
                    raise
                aside = _free(folder.with_name(f"{folder.name}.damaged"))
                warnings.warn(f"{error} The one before it is used; this one is now {aside}.", stacklevel=2)
                parallel.on_first(lambda folder=folder, aside=aside: folder.rename(aside))
                continue
            if "key" not in beside:
                raise ValueError(f"The checkpoint at {folder} is no run's, but a pytree of checkpoints.save: checkpoints.restore reads it.")
            key = _plain_key(run.key)
            if beside["key"] != key:
                raise ValueError(
                    f"The run in {self.folder} was begun with the key {beside['key']}, but {key} is given: give its seed or another folder."
                )
            self._knows = True
            if beside["position"] is None and step:
                warnings.warn(
                    f"The checkpoint at {folder} knows no place in the data: its batches had no get_state(). Set them to what comes after "
                    f"step {step}, or give batches that can be set, or a function of the step.",
                    stacklevel=2,
                )
            return training.Run(state, run.key, beside["position"], tuple(beside["history"]), tuple(beside["unlogged"]))
        return run

    def close(self) -> None:
        """Waits until all is written, and lets other processes have the folder.

        Raises:
          OSError: if the last could not be written.
        """
        self._closed = True
        try:
            with files.uninterrupted():
                self._finish()
        finally:
            self._writer.shutdown()
            with contextlib.suppress(OSError):
                parallel.on_first(self._tidy)
            self._lock.release()

    def _beside(self, run):
        """What stands beside the arrays."""
        training.check_run(run)
        training.check_position(run.position)
        last = run.history[-1] if run.history and run.history[-1].get("step") == int(run.state.step) else None
        if last is not None and self._best is not None and self._best not in last:
            raise ValueError(f"best is {self._best!r}, but the metrics are {', '.join(map(repr, last))}: name one of these.")
        return {"key": _plain_key(run.key), "position": run.position, "history": list(run.history), "unlogged": list(run.unlogged)}

    def _set_aside(self, step, beside):
        """Renames what is of another course of training: what comes after this step, and what is no beginning of the run."""
        others = []
        for other in self.steps():
            if other < step and self._knows:
                continue
            try:
                there = _index(self.folder / str(other))["beside"]
            except (CorruptCheckpoint, FileNotFoundError, ValueError):
                # It is named when it is read.
                continue
            begins = there.get("key") == beside["key"] and _same(there["history"], beside["history"][: len(there["history"])])
            if other > step or not begins or (other == step and not _same(there, beside)):
                others.append(self.folder / str(other))
        if others:
            moved = [folder.rename(_free(folder.with_name(f"{folder.name}.other"))).name for folder in others]
            warnings.warn(
                f"{self.folder} has checkpoints of another course of training than the run that is saved at step {step}; they are now "
                f"{', '.join(moved)}. Checkpointer.resume goes on with what is there.",
                stacklevel=4,
            )

    def _finish(self):
        """Waits for the save in the background."""
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        error = pending.exception()
        if parallel.anywhere(error is not None):
            raise self._failed(step, error or "another process of this job could not write its part") from error

    def _write(self, finish):
        finish()
        if jax.process_index() == 0:
            self._prune()

    def _failed(self, step, error):
        whole = [number for number in self.steps() if number != step] or ["none"]
        return OSError(
            f"A checkpoint could not be written to {self.folder} at step {step}: {_first_line(error)}. The last whole one there is "
            f"of step {whole[-1]}."
        )

    def _prune(self):
        """Removes all but the last and the best."""
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._best is not None:
            values = {}
            for step in steps:
                try:
                    history = _index(self.folder / str(step))["beside"]["history"]
                except (CorruptCheckpoint, FileNotFoundError):
                    # It is named when it is read.
                    kept.add(step)
                    continue
                if history and history[-1]["step"] == step and not math.isnan(value := history[-1].get(self._best, math.nan)):
                    values[step] = value
            if values:
                kept.add(min(values, key=lambda step: values[step]))
        for step in steps:
            if step not in kept:
                _remove(self.folder / str(step))

    def _tidy(self):
        """Removes what interrupted saves left."""
        for path in list(self.folder.iterdir()):
            if _PART.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.name.isdecimal() and path.is_dir() and not _is_checkpoint(path):
                _remove(path)

    def _require_writable(self):
        """Raises here and now: Orbax's threads would wait for each other for minutes."""
        with _named(self.folder):
            self._lock.check()
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{secrets.token_hex(8)}.part"
            probe.touch()
            probe.unlink()


class _Elsewhere:
    """The lock as the other processes of a job see it."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self):
        pass

    def release(self):
        pass


def _lock(folder):
    """The lock of a folder, which process 0 of a job takes."""

    def take():
        with _named(folder):
            return files.Lock(folder)

    return parallel.on_first(take) or _Elsewhere()


@contextlib.contextmanager
def _named(folder):
    """Says of which folder an error of the system is."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        message = f"Checkpoints cannot be written to {folder}: {error.strerror}. Make it writable, or give another folder."
        raise type(error)(message) from error


def _begin(folder, tree, beside):
    """Copies a pytree's arrays, and gives the function that waits until they are written and makes a checkpoint of them."""
    arrays, plain, leaves = {}, {}, {}
    for name, leaf in _leaves(tree).items():
        leaves[name] = _describe(name, leaf)
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, bool | int | float | str):
            plain[name] = leaf
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise TypeError(f"{name} was deleted: a training with donate=True took its memory. Save what it gives back.")
        elif leaf.size:
            arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    token = np.frombuffer(secrets.token_bytes(8), np.uint32)
    if jax.process_count() > 1:
        token = multihost_utils.broadcast_one_to_all(token)
    token, first = np.asarray(token).tobytes().hex(), jax.process_index() == 0
    writing, data = folder / f"writing-{token}", folder / f"data-{token}"

    def prepare():
        folder.mkdir(parents=True, exist_ok=True)
        _require_own(folder)
        for left in list(folder.iterdir()):
            if _PART.fullmatch(left.name):
                left.unlink()
            elif _OURS.match(left.name) and left.name.startswith("writing"):
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
                _remove_empty(folder)
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
            if _OURS.match(left.name) and left != data:
                shutil.rmtree(left, ignore_errors=True)

    return finish


def _read(folder, like):
    """A checkpoint's pytree, and what stands beside it."""
    index = _index(folder)
    try:
        return _load(folder, index, like), index["beside"]
    except CorruptCheckpoint:
        # It may have been replaced meanwhile.
        if _index(folder)["data"] == index["data"]:
            raise
    return _read(folder, like)


def _index(folder):
    """What a checkpoint's own file says, checked."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_bytes())
        index = content["checkpoint"]
        if content["sha256"] != _seal(index):
            raise ValueError("its SHA-256 is another")
    except FileNotFoundError:
        if _is_checkpoint(folder):
            raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {INDEX} is missing.") from None
        if not folder.exists():
            raise FileNotFoundError(f"There is no checkpoint at {folder}: train first, or give the folder of a run.") from None
        if (folder / _ORBAX).exists():
            raise ValueError(f"The checkpoint at {folder} is Orbax's own, without checksums: read it by orbax.checkpoint.") from None
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [INDEX]
        if all(map(_is_ours, names)) and INDEX not in names:
            raise FileNotFoundError(f"There is no checkpoint in {folder} yet: train first, or give the folder of a run.") from None
        inside = _checkpoints_in(folder)
        if inside:
            raise FileNotFoundError(
                f"{folder} is no checkpoint itself, but has {len(inside)} in it: give one of them, such as {inside[-1]}, or go on from the "
                "last whole one with Checkpointer(folder).resume."
            ) from None
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged, or is none: it has no {INDEX}.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {INDEX} is not as it was written: {_first_line(error)}") from error
    if index["format"] != FORMAT:
        raise ValueError(
            f"The checkpoint at {folder} has the format {index['format']!r}, but this fmjax reads {FORMAT!r}: use the one that wrote it."
        )
    return index


def _load(folder, index, like):
    saved, wanted = index["leaves"], _leaves(like)
    different = []
    for name in saved | wanted:
        here = _describe(name, wanted[name]) if name in wanted else "missing"
        there = saved.get(name, "missing")
        # Training makes an array of a number.
        if here != there and not (here in ("int", "float", "bool") and there == _describe(name, jnp.asarray(wanted[name]))):
            different.append(f"{name} is {there} there and {here} here")
    if different:
        more = f", and {len(different) - 3} more leaves differ" if len(different) > 3 else ""
        raise ValueError(
            f"The checkpoint at {folder} is of another model: {'; '.join(different[:3])}{more}. Give the model and the optimiser that it "
            "was saved with."
        )
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items() if name not in index["plain"]}
    parallel.require_memory([leaf for leaf in abstract.values() if isinstance(leaf, jax.ShapeDtypeStruct)])
    _verify(folder / index["data"], index["files"])
    arrays = {name: leaf for name, leaf in abstract.items() if leaf.size}
    try:
        found: dict[str, Any] = ocp.load(str(folder / index["data"]), arrays) if arrays else {}
    except Exception as error:
        raise CorruptCheckpoint(f"The checkpoint at {folder} is damaged: {_first_line(error)}") from error
    for name, leaf in abstract.items():
        if not leaf.size:
            empty = np.zeros(leaf.shape, leaf.dtype)
            found[name] = empty if isinstance(leaf, np.ndarray) else jax.device_put(empty, leaf.sharding)
        if _is_key(wanted[name]):
            found[name] = jax.random.wrap_key_data(found[name], impl=_impl(wanted[name]))
    return jax.tree.structure(like).unflatten([index["plain"].get(name, found.get(name)) for name in wanted])


def _verify(folder, expected):
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


def _leaves(tree):
    """The leaves of a pytree by name: their keys joined by dots, those within a key written as %2E, so that no two names are the same."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(quote(jax.tree_util.keystr((key,), simple=True), safe="").replace(".", "%2E") for key in path)
        while name in named:
            name += "~"
        named[name] = leaf
    return named


def _describe(name, leaf):
    """The kind and shape of a leaf, in a word."""
    if isinstance(leaf, bool | int | float | str) and not isinstance(leaf, np.generic):
        return type(leaf).__name__
    traced = isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    if traced or not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{name or 'The tree'} is a {type(leaf).__name__}, but a checkpoint holds arrays, typed keys, numbers and strings.")
    number = leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)
    if not _is_key(leaf) and (not number or leaf.dtype in (np.longdouble, np.clongdouble)):
        raise TypeError(f"{name or 'The tree'} has dtype {leaf.dtype}, but a checkpoint's arrays have dtypes of JAX: convert it.")
    return f"{leaf.dtype}{list(leaf.shape)}"


def _same(one, other):
    """Whether two things are the same in JSON, where nan is nan."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _plain_key(key):
    return {"impl": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()}


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf):
    """The generator of a typed key, or of its shape alone."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _abstract(leaf):
    """What Orbax restores a leaf into: arrays of NumPy stay those, since JAX may not have their dtype."""
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        leaf = jnp.asarray(leaf)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    if isinstance(leaf, np.ndarray | np.generic) or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _seal(index):
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _steps(folder):
    """The steps that have a checkpoint, whole or damaged."""
    try:
        return sorted(
            int(path.name)
            for path in folder.iterdir()
            if path.name.isdecimal() and path.name == str(int(path.name)) and _is_checkpoint(path)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_checkpoint(folder):
    """Whether it was one once: a save that was cut off has no data yet, or still has the file that was to become its index."""
    if (folder / INDEX).exists():
        return True
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(name.startswith("data-") and _OURS.fullmatch(name) for name in names) and not any(name.endswith(".part") for name in names)


def _checkpoints_in(folder):
    """The checkpoints one or two folders down, those of a run in the order of their steps."""
    found = [file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{INDEX}")]
    return sorted(found, key=lambda one: (one.parent, int(one.name) if one.name.isdecimal() else -1))


def _require_own(folder):
    """Raises where a folder has files that are not ours."""
    if not folder.exists() or _is_checkpoint(folder):
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but a checkpoint is a folder: give another name.")
    others = [path.name for path in folder.iterdir() if not _is_ours(path.name)]
    if others:
        raise FileExistsError(
            f"{folder} has {others[0]} in it and is no checkpoint: give a folder of its own, which need not be there yet."
        )


def _is_ours(name):
    return name in (INDEX, files.LOCK) or bool(_OURS.match(name) or _PART.fullmatch(name))


def _remove(folder):
    """Removes a checkpoint, or what is left of one, at once for all who look; one with files that are not ours stays."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and all(map(_is_ours, names)):
        shutil.rmtree(folder.rename(folder.with_name(f".{secrets.token_hex(8)}.part")), ignore_errors=True)


def _remove_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def _free(path):
    """A name that nothing has yet."""
    count, candidate = 1, path
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _settings():
    """Orbax's settings for a save."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
    return context


def _first_line(error):
    return str(error).strip().partition("\n")[0].rstrip(".")
