"""Progress: what long work shows while it runs."""

import contextlib
import math


@contextlib.contextmanager
def bar(name, unit, total, done=0, **numbers):
    """A progress bar with the speed, the time that has passed and the time left.

    Args:
      name: of the work, such as "training".
      unit: what is counted, such as "steps".
      total: how many there are.
      done: how many there were before.
      **numbers: others to show by name, as they are at first.
    Returns:
      A context manager that gives the function `(done, **numbers)` which moves the bar; a number left out stays.
    """
    from rich import progress

    columns = (
        progress.TextColumn(name),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        *(progress.TextColumn(f"{number} {{task.fields[{number}]:.4f}}") for number in numbers),
        progress.TextColumn(f"{{task.fields[rate]:.1f}} {unit}/s"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as shown:
        task = shown.add_task("", total=total, completed=done, rate=0.0, **numbers)

        def move(now, **numbers):
            shown.update(task, completed=now, rate=(now - done) / (shown.tasks[task].elapsed or math.inf), **numbers)

        yield move
