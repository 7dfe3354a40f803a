"""Folders of checkpoints: what is in them, whose it is, and the lock of one."""

import contextlib
import re
import secrets
import shutil

from fmjax import files, parallel

INDEX = "checkpoint.json"
ORBAX = "_CHECKPOINT_METADATA"
"""A file that every checkpoint of Orbax has."""
OURS = re.compile(r"(data|writing)-[0-9a-f]{16}")
"""Folders of arrays, whole and not yet whole."""
PART = re.compile(r"\.[0-9a-f]{16}\.part")
"""Names of what was not whole yet, or was being removed."""


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


def lock(folder):
    """The lock of a folder, which process 0 of a job takes."""

    def take():
        with named(folder):
            return files.Lock(folder)

    return parallel.on_first(take) or _Elsewhere()


@contextlib.contextmanager
def named(folder):
    """Says of which folder an error of the system is."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        message = f"Checkpoints cannot be written to {folder}: {error.strerror}. Make it writable, or give another folder."
        raise type(error)(message) from error


def steps_in(folder):
    """The steps that have a checkpoint, whole or damaged."""
    try:
        return sorted(
            int(path.name)
            for path in folder.iterdir()
            if path.name.isdecimal() and path.name == str(int(path.name)) and is_checkpoint(path)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_checkpoint(folder):
    """Whether it was one once: a save that was cut off has no data yet, or still has the file that was to become its index."""
    if (folder / INDEX).exists():
        return True
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(name.startswith("data-") and OURS.fullmatch(name) for name in names) and not any(name.endswith(".part") for name in names)


def checkpoints_in(folder):
    """The checkpoints one or two folders down, those of a run in the order of their steps."""
    found = [file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{INDEX}")]
    return sorted(found, key=lambda one: (one.parent, int(one.name) if one.name.isdecimal() else -1))


def require_own(folder):
    """Raises where a folder has files that are not ours."""
    if not folder.exists() or is_checkpoint(folder):
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but a checkpoint is a folder: give another name.")
    others = [path.name for path in folder.iterdir() if not is_ours(path.name)]
    if others:
        raise FileExistsError(
            f"{folder} has {others[0]} in it and is no checkpoint: give a folder of its own, which need not be there yet."
        )


def is_ours(name):
    return name in (INDEX, files.LOCK) or bool(OURS.match(name) or PART.fullmatch(name))


def remove(folder):
    """Removes a checkpoint, or what is left of one, at once for all who look; one with files that are not ours stays."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and all(map(is_ours, names)):
        shutil.rmtree(folder.rename(folder.with_name(f".{secrets.token_hex(8)}.part")), ignore_errors=True)


def remove_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def free_name(path):
    """A name that nothing has yet."""
    count, candidate = 1, path
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def first_line(error):
    return str(error).strip().partition("\n")[0].rstrip(".")
