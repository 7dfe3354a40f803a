"""Logs of a run: callbacks of `fit` that keep a file equal to the run's history, whatever befell it.

Where the file is not what was written last (the run was killed and goes on from an earlier step, its folder was deleted, a line was
cut off), it is written anew from the history.
"""

import json
import os
import secrets
import struct
import time
from collections.abc import Callable
from pathlib import Path

import jax

from fmjax import files

SUFFIX = ".fmjax"
"""Of the event files that `tensorboard` writes, and removes when it writes another in their place."""


def json_lines(file, history=()) -> Callable:
    """A callback of `fit` that keeps the metrics in a file, a line of JSON for each time that they are logged.

    Args:
      file: where to, in place of what was there; process 0 alone writes.
      history: that of the run which goes on, as `Checkpointer.resume` gives it.
    Returns:
      A function `(run, metrics) -> None`, which goes after callbacks that add numbers.
    Raises:
      OSError: if it cannot be written.
    """
    return _log(lambda: Path(file), lambda metrics: (json.dumps(metrics) + "\n").encode(), b"", history)


def tensorboard(folder, history=()) -> Callable:
    """A callback of `fit` that keeps the metrics in TensorBoard's files.

    Args:
      folder: where to, in place of what this wrote there before; process 0 alone writes.
      history: that of the run which goes on, as `Checkpointer.resume` gives it.
    Returns:
      A function `(run, metrics) -> None`, which goes after callbacks that add numbers.
    Raises:
      ImportError: if tensorboardX is not installed (`pip install fmjax[tensorboard]`).
      OSError: if it cannot be written.
    """
    try:
        from tensorboardX import record_writer, summary
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ImportError("training.tensorboard needs tensorboardX: pip install 'fmjax[tensorboard]'") from error

    def record(**content):
        # Event files hold records: a length, a checksum of it, the event, a checksum of that.
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = struct.pack("<Q", len(event)), event
        return b"".join(part + struct.pack("<I", record_writer.masked_crc32c(part)) for part in parts)

    def encode(metrics):
        scalars = [(name, value) for name, value in metrics.items() if name != "step"]
        return b"".join(record(step=metrics["step"], summary=summary.scalar(name, value)) for name, value in scalars)

    def name():
        # A new one each time: TensorBoard reads on in the latest.
        return Path(folder) / f"events.out.tfevents.{int(time.time()):010}.{secrets.token_hex(4)}{SUFFIX}"

    return _log(name, encode, record(file_version="brain.Event:2"), history)


def _log(name, encode, head, history):
    """A callback that keeps a file equal to the encoded history: it adds to the file it wrote, or writes another."""
    file, size, count, last = name(), -1, 0, None

    def rewrite(history):
        nonlocal file, size, count, last
        file = name()
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as part:
            part.write_bytes(head + b"".join(map(encode, history)))
        size, count, last = file.stat().st_size, len(history), dict(history[-1]) if history else None
        for old in file.parent.glob(f"*tfevents*{SUFFIX}") if file.name.endswith(SUFFIX) else ():
            if old != file:
                old.unlink(missing_ok=True)

    def write(run, metrics):
        nonlocal size, count, last
        if jax.process_index() != 0:
            return
        # Another run than the one whose history is there, or numbers that were added to it since.
        other = len(run.history) != count + 1 or (count > 0 and run.history[-2] != last)
        if other or not file.exists() or file.stat().st_size != size:
            rewrite(run.history)
            return
        content = encode(metrics)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(f"{file} could not be written to the end: is the disk full?")
        finally:
            os.close(descriptor)
        size, count, last = size + len(content), count + 1, dict(metrics)

    if jax.process_index() == 0:
        rewrite(history)
    return write
