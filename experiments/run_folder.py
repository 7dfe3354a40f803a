"""The folder of a run: one process at a time, one configuration, its checkpoints and its report."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from fmjax import checkpoints, files, parallel, plots, training

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def claim(config, *, free=(), trains=True):
    """Holds the folder of a configuration, which it keeps in config.json and compares with that of the run that is there.

    Args:
      config: a frozen dataclass with `folder`.
      free: names of fields that another call may change, since training does not depend on them.
      trains: whether the run trains; otherwise its configuration is neither compared nor written.
    Raises:
      SystemExit: if another process has the folder, or a run of another configuration is in it.
    """

    def take():
        lock = files.Lock(config.folder)
        try:
            if trains:
                _keep(config, {"folder", *free})
        except BaseException:
            lock.release()
            raise
        return lock

    if trains and jax.process_index() == 0:
        print(*(f"{name:20} {value}" for name, value in vars(config).items()), "", sep="\n")
    try:
        lock = parallel.on_first(take)
    except OSError as error:
        raise SystemExit(f"{error}\n--folder is {config.folder}: give one that this process alone can write to.") from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def train(config, step, run, batches, loss, *, callbacks=(), trace=None):
    """Trains from the last checkpoint in the folder on, if there is one; keeps checkpoints/, history.jsonl, tensorboard/ and loss.png.

    Args:
      config: has `folder`, `steps`, `log_every` and `save_every`.
      step, run, batches, callbacks, trace: as for `training.fit`; the run's state is donated.
      loss: what the loss is, such as "loss per pixel".
    Returns:
      The trained state, and numbers for the report.
    """
    with checkpoints.Checkpointer(config.folder / "checkpoints", keep=3, best="loss") as checkpointer:
        begun = checkpointer.resume(run)
        start, left = time.perf_counter(), config.steps - int(begun.state.step)
        show = sys.stderr.isatty()
        logs = (
            *([] if show else [_print_line]),
            training.json_lines(config.folder / "history.jsonl", begun.history),
            training.tensorboard(config.folder / "tensorboard", begun.history),
        )
        ended = training.fit(
            step,
            begun,
            batches,
            steps=config.steps,
            log_every=config.log_every,
            callbacks=(*callbacks, *logs),
            save=checkpointer.save,
            save_every=config.save_every,
            progress=show,
            trace=trace,
            donate=True,
        )
    numbers = {}
    if left > 0:
        numbers["training steps per second"] = left / (time.perf_counter() - start)
    if ended.history:
        last = ended.history[-max(1, len(ended.history) // 10) :]
        numbers[f"training {loss}, last tenth"] = float(np.mean([metrics["loss"] for metrics in last]))
        if jax.process_index() == 0:
            figure = Figure(figsize=(6, 3.5), layout="constrained", dpi=plots.DPI)
            plots.loss(figure.add_subplot(), ended.history, loss)
            figure.savefig(config.folder / "loss.png")
    return ended.state, numbers


def _print_line(run, metrics):
    """A line for each log, where there is no terminal for a bar."""
    if jax.process_index() == 0:
        numbers = {name: metrics[name] for name in ("step", "loss")} | metrics
        print(*(f"{name} {value:{'.4g' if isinstance(value, float) else ''}}" for name, value in numbers.items()), sep="  ", flush=True)


def report(folder, numbers, *, digits=3):
    """Writes a run's numbers to metrics.json, and prints them and what is in its folder."""
    if jax.process_index() != 0:
        return
    with files.replacing(folder / "metrics.json") as part:
        part.write_text(json.dumps(numbers, indent=2) + "\n")
    for name, value in numbers.items():
        print(f"{name:64} {value:10.{digits}f}")
    made = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if path.name != files.LOCK]
    print(f"\nThe run is in {folder}/: {', '.join(made)}")


def record(file, config, numbers):
    """Puts a run's numbers, settings, machine, commit and versions into a JSON file of results, under the name of its folder."""
    if jax.process_index() != 0:
        return
    runs = json.loads(file.read_text()) if file.exists() else {}
    device = jax.devices()[0]
    runs[config.folder.name] = {
        "device": f"cpu {platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}},
        "settings": _plain(config),
        **numbers,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as part:
        part.write_text(json.dumps(runs, indent=2) + "\n")


def commit():
    """The checkout's commit, with -dirty where files differ from it; a copy without its history has it from $COMMIT, if at all."""

    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    known = git("rev-parse", "--short", "--verify", "HEAD")
    return known + ("-dirty" if git("status", "--porcelain") else "") if known else os.environ.get("COMMIT")


def _keep(config, free):
    file, settings = config.folder / "config.json", _plain(config)
    # A first try that failed before its first checkpoint leaves nothing that another configuration could spoil.
    if file.exists() and any((config.folder / "checkpoints").glob("[0-9]*")):
        try:
            before = dict(json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{file} cannot be read ({error}): remove it, or give another --folder.") from error
        names = [name for name in settings | before if name not in free and settings.get(name) != before.get(name)]
        if names:
            changes = "; ".join(f"--{name.replace('_', '-')} was {before.get(name)} and is {settings.get(name)}" for name in names)
            raise SystemExit(
                f"{config.folder} has a run of another configuration: {changes}. Give what it had, or another --folder, or remove that one."
            )
    with files.replacing(file) as part:
        part.write_text(json.dumps(settings, indent=2) + "\n")


def _plain(value) -> Any:
    """A configuration as JSON gives it back: a dataclass as its fields, and its type where it stands in another."""
    if dataclasses.is_dataclass(value):
        return {field.name: _typed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_typed(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _typed(value):
    return {"type": type(value).__name__, **_plain(value)} if dataclasses.is_dataclass(value) else _plain(value)


@contextlib.contextmanager
def explained(flag):
    """Ends with a sentence where what a flag names is not there, or is something else."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"{flag}: {error}") from error


def content(file):
    """A name for what is in a file."""
    return hashlib.sha256(json.dumps(files.checksums(file.parent, [file.name])).encode()).hexdigest()[:16]


def keep(folder, settings, made):
    """Keeps what files of a folder depend on in its config.json, and stops where there are some that were made otherwise.

    Args:
      folder: of the run.
      settings: strings by name.
      made: the pattern of the files, in the folder.
    Raises:
      SystemExit: if there are such files, of other settings.
    """

    def compare():
        file, before = folder / "config.json", settings
        if next(folder.glob(made), None) is not None:
            before = json.loads(file.read_text()) if file.exists() else {}
        names = [name for name in settings | before if settings.get(name) != before.get(name)]
        if names:
            changes = "; ".join(f"{name} was {before.get(name)} and is {settings.get(name)}" for name in names)
            raise ValueError(f"{folder} has {made} of another configuration: {changes}. Give another --folder, or remove that one.")
        with files.replacing(file) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")

    try:
        parallel.on_first(compare)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
