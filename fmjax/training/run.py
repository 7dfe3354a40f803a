"""The run: all that a training goes on from, and how it ends."""

import dataclasses
import json
from typing import Any

import chex

from fmjax import checks
from fmjax.training.state import TrainState, check_state

PREEMPTED = 75
"""The exit status of a training that SIGTERM ended, after it was saved: start it again (EX_TEMPFAIL of sysexits.h)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training and its progress: all that it goes on from."""

    state: TrainState
    """The state, of which `step` is the number of steps taken."""
    key: chex.PRNGKey
    """A typed key, of which step n draws from `fold_in(key, n)`."""
    position: Any = None
    """Where the batches are: their `get_state()`, the step where they are a function of it, or None where they have no place."""
    history: tuple[dict[str, float], ...] = ()
    """What was logged: the `step`, the mean of every metric since the one before, and what callbacks added."""
    unlogged: tuple[dict[str, float], ...] = ()
    """The metrics of each step since then."""


class Preempted(SystemExit):
    """Training stopped because the process was told to (SIGTERM), at the step of its `run`."""

    def __init__(self, run):
        super().__init__(PREEMPTED)
        self.run = run


class Interrupted(KeyboardInterrupt):
    """Training stopped by Ctrl-C, at the step of its `run`."""

    def __init__(self, run):
        super().__init__(f"at step {int(run.state.step)}")
        self.run = run


class NonFiniteLoss(FloatingPointError):
    """Training stopped because a loss, a gradient, an update or a parameter was not finite; `run` is the last good one, or None."""

    def __init__(self, message, run):
        super().__init__(message)
        self.run = run


def check_position(position) -> None:
    """Raises unless a place in the data is what JSON gives back as it is."""
    try:
        same = json.loads(json.dumps(position)) == position
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TypeError(f"The batches' get_state() gives {position!r}, but a place in the data is what JSON can hold and give back.")


def check_run(run) -> None:
    """Raises unless it is a run, with a state that has a step and a typed key."""
    if not isinstance(run, Run):
        raise TypeError(f"The run is a {type(run).__name__}, but training goes on from a Run: give training.Run(state, key).")
    check_state(run.state)
    checks.key(run.key)
