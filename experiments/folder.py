"""The folder of a run: one process at a time, one configuration, and its report."""

import contextlib
import dataclasses
import json
from pathlib import Path

from fmjax import files, parallel


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

    try:
        lock = parallel.on_first(take)
    except OSError as error:
        raise SystemExit(f"{error}\n--folder is {config.folder}: give one that this process alone can write to.") from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def report(folder, numbers, made):
    """Writes a run's numbers to metrics.json, and prints them and what else is in its folder."""
    with files.replacing(folder / "metrics.json") as part:
        part.write_text(json.dumps(numbers, indent=2) + "\n")
    for name, value in numbers.items():
        print(f"{name:64} {value:10.3f}")
    print(f"\nThe run is in {folder}/: {made}")


def _keep(config, free):
    file, settings = config.folder / "config.json", _plain(config)
    if file.exists():
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


def _plain(config):
    """A configuration as JSON gives it back."""

    def plain(value):
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path) else value if isinstance(value, str | int | float | None) else repr(value)

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
