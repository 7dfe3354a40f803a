"""Files and folders: written whole or not at all, checked when they are read, and written to by one process at a time.

with files.replacing("rows.jsonl") as part:      # a name of its own, beside the file, which takes the file's place at the end
    part.write_text(...)
with files.Lock("runs/latents"):                 # another process that wants it learns who has it
    ...
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

BLOCK = 2**26
"""Bytes that are hashed at once; the blocks of a large file are hashed in parallel."""
LOCK = "fmjax.lock"
BEAT = 5.0
"""Seconds between two signs of life of a lock."""
PATIENCE = 30.0
"""Seconds without one after which a process on another machine is taken for dead."""


@contextlib.contextmanager
def replacing(file):
    """A path to write to, which takes the place of a file once all is written; until then, and if anything fails, the file stays.

    Args:
      file: where to; its folder exists.
    Returns:
      A context manager that gives the path.
    """
    file = Path(os.path.realpath(file))
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    part.touch(exist_ok=False)
    try:
        yield part
        _sync(part)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # Not every system has folders that can be waited for.
    with contextlib.suppress(OSError):
        _sync(file.parent)


def _sync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array in an .npz file, whose numbers are not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The array.

        Returns:
          Its numbers.
        Raises:
          ValueError: if they cannot be read, as where the file is damaged or the array was pickled.
        """
        with open(self.path, "rb") as file, _readable(self.path), zipfile.ZipFile(file).open(f"{self.name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def arrays(path) -> dict[str, _Stored]:
    """The arrays of an .npz file, whose shapes are known before their numbers are read; nothing in it is run.

    Args:
      path: of the file.
    Returns:
      Arrays by name, with `shape`, `dtype` and `read()`.
    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it is no .npz file, or is damaged.
    """
    found = {}
    with open(path, "rb") as file, _readable(path), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as member:
                major = np.lib.format.read_magic(member)[0]
                header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(member)
            name = info.filename.removesuffix(".npy")
            found[name] = _Stored(Path(path), name, shape, dtype)
    return found


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    # Damaged bytes fail anywhere in zipfile, zlib and NumPy.
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no .npz file, or a damaged one ({said[:200]}): write it by numpy.savez, or fetch it again.") from error


def checksums(folder, names) -> dict[str, list | None]:
    """The size and the SHA-256 of every block of files.

    Args:
      folder: where they are.
      names: their names in it.
    Returns:
      A dict of lists `[bytes, hash, ...]` by name, which JSON can hold; None for what is no file or cannot be read.
    """
    sizes = {}
    for name in names:
        try:
            sizes[name] = (Path(folder) / name).stat().st_size
        except OSError:
            sizes[name] = -1
    blocks = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), BLOCK)]

    def one(block):
        name, start = block
        try:
            with (Path(folder) / name).open("rb") as file:
                file.seek(start)
                return hashlib.sha256(file.read(BLOCK)).hexdigest()
        except OSError:
            return None

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = {name: [size] for name, size in sizes.items()}
        for (name, _), digest in zip(blocks, pool.map(one, blocks), strict=True):
            found[name].append(digest)
    return {name: None if None in each else each for name, each in found.items()}


@contextlib.contextmanager
def uninterrupted():
    """Holds back SIGTERM and SIGINT until the block has ended, where this is the main thread; then they are delivered."""
    # In a block around this one they are held back already.
    if threading.current_thread() is not threading.main_thread() or hasattr(signal.getsignal(signal.SIGINT), "holds"):
        yield
        return
    held = []

    def hold(number, frame):
        if not held:
            print("A checkpoint is being written: the process ends when it is there (SIGQUIT ends it now).", file=sys.stderr, flush=True)
        held.append(number)

    hold.holds = True
    # In a job of several processes JAX has SIGTERM, and agrees with the others on a step.
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, hold) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(held):
            signal.raise_signal(number)


class Lock:
    """A folder that this process alone writes to, until it is released; use it as a context.

    On one machine the operating system knows who holds it, and that it died. Machines that share a file system see a sign of life every
    `BEAT` seconds, and take a lock without one for `PATIENCE` seconds.

    Args:
      folder: made if it is not there.
    Raises:
      BlockingIOError: if another process holds it; the error says which.
      OSError: if the folder cannot be written to.
    """

    def __init__(self, folder):
        self._file, self._token = Path(folder).absolute() / LOCK, secrets.token_hex(8)
        self._descriptor: Any = None
        self._process = os.getpid()
        self._take()
        if hasattr(os, "register_at_fork"):
            # A forked child would keep the lock of a process that died.
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: this() and this()._close())  # pyright: ignore[reportOptionalMemberAccess]
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def check(self) -> None:
        """Takes the lock again where its folder was deleted.

        Raises:
          BlockingIOError: if another process took it, because this one seemed dead.
        """
        holder = _holder(self._file)
        if holder is None:
            self._close()
            self._take()
        elif holder.get("token") != self._token:
            raise BlockingIOError(f"{self._file.parent} was taken over by {_name(holder)}: it was deleted, or this process seemed dead.")

    def release(self) -> None:
        """Lets others have it."""
        if os.getpid() != self._process:
            return
        self._released.set()
        holder = _holder(self._file)
        if holder is not None and holder.get("token") == self._token:
            self._file.unlink(missing_ok=True)
        self._close()

    def _take(self):
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                alone = _only_one(self._descriptor)
                if alone is False:
                    raise self._held(_holder(self._file) or {})
                # Whoever released it may have deleted the file that was opened here.
                if not self._same():
                    self._close()
                    continue
                before = _holder(self._file)
                elsewhere = bool(before) and (alone is None or before.get("machine") != _machine())
                if elsewhere:
                    self._watch(before)
                self._write()
                if elsewhere:
                    # Two machines may have waited for the same dead one: the last that wrote has it.
                    time.sleep(1.0)
                    if (holder := _holder(self._file) or {}).get("token") != self._token:
                        raise self._held(holder)
                return
            except BaseException:
                self._close()
                raise

    def _same(self):
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._file.stat())
        except FileNotFoundError:
            return False

    def _watch(self, before):
        """Raises as soon as the holder gives a sign of life; returns when it gave none for long enough."""
        print(f"{self._file.parent} was written to by {_name(before)}: is it alive? {PATIENCE:.0f} s", file=sys.stderr, flush=True)
        seen, end = os.fstat(self._descriptor).st_mtime_ns, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(0.2, PATIENCE / 10))
            if os.fstat(self._descriptor).st_mtime_ns != seen or not self._same():
                raise self._held(before)

    def _write(self):
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        who = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "since": now, "token": self._token}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(who).encode(), 0)
        os.fsync(self._descriptor)

    def _held(self, holder):
        return BlockingIOError(f"{self._file.parent} is written to by {_name(holder)}: end that first, or give another folder.")

    def _beat(self):
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError, TypeError):
                os.utime(self._descriptor)

    def _close(self):
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _only_one(descriptor):
    """Whether no other process of this machine holds a file; None where the file system cannot tell, and its sign of life must do."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _machine():
    """A name of the running system, which no other and no later one has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _holder(file):
    """What a lock's file says, {} where it says nothing that can be read, None where there is none."""
    try:
        content = json.loads(file.read_text())
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _name(holder):
    if not holder:
        return "another process"
    mine = holder.get("machine") == _machine() and holder.get("process") == os.getpid()
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}" + (", which is this one" if mine else "")
