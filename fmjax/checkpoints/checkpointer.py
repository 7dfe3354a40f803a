"""The checkpointer: a run's checkpoints, a folder for each step."""

import concurrent.futures
import contextlib
import math
import secrets
import shutil
import warnings
from pathlib import Path

import jax

from fmjax import checks, files, parallel, training
from fmjax.checkpoints.folders import ORBAX, PART, first_line, free_name, is_checkpoint, lock, named, remove, steps_in
from fmjax.checkpoints.leaves import plain_key, same
from fmjax.checkpoints.parts import for_optimizer
from fmjax.checkpoints.store import CorruptCheckpoint, begin, index_of, read
from fmjax.training.run import check_position, check_run


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
        self._lock = lock(self.folder)
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
        """The steps that have a checkpoint, in order.

        Returns:
          Their numbers, a list.
        """
        return steps_in(self.folder)

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
                    finish = begin(self.folder / str(step), run.state, beside)
                except BlockingIOError:
                    raise
                except Exception as error:
                    raise self._failed(step, error) from error
                self._pending = step, self._writer.submit(self._write, finish)
            if wait:
                self._finish()

    def resume(self, run, *, new_optimizer=False) -> training.Run:
        """The run of the last checkpoint that is whole, or the one that is given where there is none yet.

        A damaged checkpoint is named in a warning and renamed, and the one before it is used.

        Args:
          run: to begin with, a `training.Run`; the shardings of its state's arrays say where those of the result lie.
          new_optimizer: whether the run's optimiser may be another than that of the checkpoint: the step, the parameters, averages,
            variables, the place in the data and the history are as they were saved, and so is what of the optimiser's state has the same
            name and shape, such as moments and counts, whatever its place in an `optax.chain`; the rest is as in the run given, and named
            in a warning. What an optimiser of the same names means by them, such as Adamax by its `nu`, is not known here: then begin a new
            run from the parameters (`restore_part`). The same call goes on with it when the run is resumed again.
        Returns:
          A `training.Run`.
        Raises:
          TypeError: if it is no `Run`.
          CorruptCheckpoint: if there are checkpoints and none is whole.
          ValueError: if the last is of another model, or of another optimiser without `new_optimizer`, or was begun with another key, or
            the folder has checkpoints of Orbax's own.
        """
        check_run(run)
        steps, of_optimizer = self.steps(), []
        choose = for_optimizer(of_optimizer) if new_optimizer else None
        others = [file.parent for file in sorted(self.folder.glob(f"*/{ORBAX}")) if file.parent.name.isdecimal()]
        if others and not steps:
            raise ValueError(f"{self.folder} has checkpoints of Orbax's own, such as {others[0]}: give another folder.")
        for step in reversed(steps):
            folder = self.folder / str(step)
            try:
                state, beside = read(folder, run.state, choose)
            except CorruptCheckpoint as error:
                if step == steps[0]:
                    raise
                aside = free_name(folder.with_name(f"{folder.name}.damaged"))
                warnings.warn(f"{error} The one before it is used; this one is now {aside}.", stacklevel=2)
                parallel.on_first(lambda folder=folder, aside=aside: folder.rename(aside))
                continue
            if "key" not in beside:
                raise ValueError(f"The checkpoint at {folder} is no run's, but a pytree of checkpoints.save: checkpoints.restore reads it.")
            key = plain_key(run.key)
            if beside["key"] != key:
                raise ValueError(
                    f"The run in {self.folder} was begun with the key {beside['key']}, but {key} is given: give its seed or another folder."
                )
            self._knows = True
            if of_optimizer:
                warnings.warn(f"{of_optimizer[-1]} The checkpoint is that at {folder}.", stacklevel=2)
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
        check_run(run)
        check_position(run.position)
        last = run.history[-1] if run.history and run.history[-1].get("step") == int(run.state.step) else None
        if last is not None and self._best is not None and self._best not in last:
            raise ValueError(f"best is {self._best!r}, but the metrics are {', '.join(map(repr, last))}: name one of these.")
        return {"key": plain_key(run.key), "position": run.position, "history": list(run.history), "unlogged": list(run.unlogged)}

    def _set_aside(self, step, beside):
        """Renames what is of another course of training: what comes after this step, and what is no beginning of the run."""
        others = []
        for other in self.steps():
            if other < step and self._knows:
                continue
            try:
                there = index_of(self.folder / str(other))["beside"]
            except (CorruptCheckpoint, FileNotFoundError, ValueError):
                # It is named when it is read.
                continue
            begins = there.get("key") == beside["key"] and same(there["history"], beside["history"][: len(there["history"])])
            # A run that ended between two logs, and whose last steps are logged now.
            logged = begins and there["unlogged"] and not beside["unlogged"] and len(beside["history"]) == len(there["history"]) + 1
            if other > step or not begins or (other == step and not logged and not same(there, beside)):
                others.append(self.folder / str(other))
        if others:
            moved = [folder.rename(free_name(folder.with_name(f"{folder.name}.other"))).name for folder in others]
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
            f"A checkpoint could not be written to {self.folder} at step {step}: {first_line(error)}. The last whole one there is "
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
                    history = index_of(self.folder / str(step))["beside"]["history"]
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
                remove(self.folder / str(step))

    def _tidy(self):
        """Removes what interrupted saves left."""
        for path in list(self.folder.iterdir()):
            if PART.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.name.isdecimal() and path.is_dir() and not is_checkpoint(path):
                remove(path)

    def _require_writable(self):
        """Raises here and now: Orbax's threads would wait for each other for minutes."""
        with named(self.folder):
            self._lock.check()
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{secrets.token_hex(8)}.part"
            probe.touch()
            probe.unlink()
