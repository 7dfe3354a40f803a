"""The loop: a run that goes from step to step, is logged and saved, and ends between two steps however it is ended."""

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from fmjax import checks, files
from fmjax.progress import bar
from fmjax.training.state import TrainState, check_state, finite_where

PREEMPTED = 75
"""The exit status of a training that SIGTERM ended, after it was saved: start it again (EX_TEMPFAIL of sysexits.h)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training at a step: all that it goes on from."""

    state: TrainState
    """The state, of which `step` is the number of steps taken."""
    key: jax.Array
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


def check_position(position):
    """Raises unless a place in the data is what JSON gives back as it is."""
    try:
        same = json.loads(json.dumps(position)) == position
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TypeError(f"The batches' get_state() gives {position!r}, but a place in the data is what JSON can hold and give back.")


def check_run(run):
    """Raises unless it is a run, with a state that has a step and a typed key."""
    if not isinstance(run, Run):
        raise TypeError(f"The run is a {type(run).__name__}, but training goes on from a Run: give training.Run(state, key).")
    check_state(run.state)
    checks.key(run.key)


def fit(step, run, batches, *, steps, log_every=100, callbacks=(), save=None, save_every=None, progress=True, trace=None, donate=False):
    """Trains until a run has taken `steps` steps, from wherever it is.

    The loop waits for the device once every `log_every` steps. A process that is told to end (SIGTERM, or Ctrl-C) ends after the step it
    is in, all processes of a job after the same one; a second Ctrl-C does not wait for a batch or a callback. The run that is saved
    then is whole: its state, its place in the data and what was logged belong together, and it goes on as if it had not been ended.

    Args:
      step: (state, key, batch) -> (state, metrics), as `make_step` makes it; it is compiled here.
      run: where to start, `Run(state, key)` at first; a copy of the state is trained, so the one given stays whole, unless `donate`. Arrays
        stay on the devices that they are on.
      batches: an iterable of batches, which is set to the run's position where it has one (`get_state` and `set_state`); or a function
        of the number of the step, as `lambda n: take(jax.random.fold_in(key, n))`.
      steps: the number of steps that the state has at the end.
      log_every: steps between two logs.
      callbacks: functions `(run, metrics) -> None`, called in their order at every log with the run so far and the newest of its history,
        a dict to which they may add numbers; those that write it go last. The next step takes the memory of `run.state`: what is kept of
        it is copied, as `jax.device_get` does. Where one fails, all of them are called again when the run that was saved goes on.
      save: a function `(run, wait)`, as `Checkpointer.save`; called with wait=True when training ends: at the last step, and, where a
        step was taken, when something is not finite (with the last good run), when it is interrupted and when anything fails.
      save_every: steps after which it is called with wait=False.
      progress: whether to show a bar with the loss, steps per second and the time left.
      trace: a folder for a trace by `jax.profiler` of the second `log_every` steps, which TensorBoard and Perfetto show.
      donate: whether training takes the memory of the state given, whose arrays (and the parameters that `init` was given) are
        deleted then, rather than copy it: a large model has no room for two.
    Returns:
      The run, with `state` and `history`.
    Raises:
      NonFiniteLoss: if a loss, a gradient, an update or a parameter is not finite, at the log after it came.
      Preempted: after SIGTERM; it ends the process with status `PREEMPTED` unless it is caught.
      Interrupted: after Ctrl-C, a KeyboardInterrupt.
      TypeError: if the run is no `Run`, has a place in the data and the batches cannot be set, or one that cannot be saved.
      ValueError: if the batches end before the steps, a number of steps is not a whole number, `save_every` has no `save`, or the
        metrics have no `loss`, a `step`, or more than numbers.
    """
    check_run(run)
    checks.whole("steps", steps, "the number of steps that the state has at the end", least=0)
    checks.whole("log_every", log_every, "the number of steps between two logs")
    if save_every is not None:
        checks.whole("save_every", save_every, "the number of steps between two saves")
    if save is not None:
        checks.function("save", save, "checkpointer.save, or lambda run, wait: ...")
        try:
            with contextlib.suppress(ValueError):
                inspect.signature(save).bind(run, True)
        except TypeError as error:
            # Found out now rather than when training ends.
            raise TypeError(f"save is called with a run and whether to wait, which {save!r} does not take: {error}.") from error
    elif save_every is not None:
        raise ValueError(f"save_every is {save_every}, but there is no save: give a function (run, wait), such as Checkpointer.save.")
    # A copy's number: NumPy would keep the array that is read, which then could not be donated.
    start = int(jnp.copy(run.state.step))
    data = _Batches(batches, run.position, start)
    steps = max(start, steps)
    state, alive, take = _compiled(step, run, donate)
    before = jax.device_get(_not_finite(state))
    if save is not None:
        check_position(data.place())
    # What was logged, the metrics since then, and the places before the steps of those that are still on the device, and after the last.
    history, unlogged, pending, places = run.history, list(run.unlogged), [], [data.place()]
    saved, now = start, None

    def whole():
        """The run after its last good step, and what was wrong with the next; waits for the device."""
        fetched = jax.device_get(pending)
        good, wrong = 0, None
        for metrics, taken in fetched:
            bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
            if bad or not taken:
                wrong = " and ".join(bad) or "a state whose step is not one more than before"
                break
            unlogged.append({name: float(value) for name, value in metrics.items()})
            good += 1
        # What was fetched is not fetched again.
        del pending[:], places[:good]
        return Run(state, run.key, places[0], history, tuple(unlogged)), wrong

    def finite(run):
        """The run, unless a step of the caller's own left in it what is not finite; looked for before it is saved or given back."""
        counts = jax.device_get(_not_finite(run.state))
        bad = sum(max(int(after) - int(first), 0) for after, first in zip(counts, before, strict=True))
        if bad:
            raise NonFiniteLoss(
                f"{bad} numbers of the state are not finite at step {int(run.state.step)}, though its metrics are: the last good run "
                f"is the one saved at step {saved}, if any. A step of make_step is not taken then: check what the step does after it.",
                None,
            )
        return run

    def good():
        """The run, all of whose steps were good."""
        now, wrong = whole()
        if wrong is not None:
            at = int(state.step)
            advice = "Try a lower learning rate or gradient clipping, or check the data for nan and for labels out of range."
            if wrong.startswith("update_norm"):
                advice = "The loss and its gradient are finite, so the optimiser made it: check its learning rate at this step."
            raise NonFiniteLoss(
                f"{wrong} at step {at}: the step was not taken, and the run before it is this error's `run`"
                f"{' and was saved' if save and at > start else ''}. {advice}",
                now,
            )
        return now

    def log(now, n):
        """Adds to the history once every callback is done with it."""
        nonlocal history
        # Of those that a step has now; the run may have been begun with others.
        values = {name: [each[name] for each in unlogged if name in each] for name in unlogged[-1]}
        metrics = {"step": n} | {name: sum(each) / len(each) for name, each in values.items()}
        now = dataclasses.replace(now, history=(*history, metrics), unlogged=())
        show(n, loss=metrics["loss"])
        for callback in callbacks:
            with signals.waiting():
                callback(now, metrics)
            metrics.update({name: _number(name, value) for name, value in metrics.items()})
            if metrics.get("step") != n:
                raise ValueError(f"A callback changed the step of the metrics to {metrics.get('step')}, which is {n}: add to them alone.")
        history = now.history
        unlogged.clear()
        return now

    progress = progress and jax.process_index() == 0
    loss = run.history[-1].get("loss", math.nan) if run.history else math.nan
    shown = bar("training", "steps", steps, start, loss=loss) if progress else contextlib.nullcontext(lambda done, **numbers: None)
    with _Signals() as signals:
        try:
            with shown as show, contextlib.ExitStack() as tracing:
                for n in range(start, steps + 1):
                    if (unlogged or pending) and (n % log_every == 0 or n == steps):
                        with signals.waiting():
                            jax.block_until_ready(state)
                        now = good()
                        if n >= start + 2 * log_every:
                            tracing.close()
                        now = log(now, n)
                    else:
                        show(n)
                    if save is not None and save_every is not None and n % save_every == 0 and saved < n < steps:
                        save(finite(good()), False)
                        saved = n
                    # After the last step too, so that no signal is lost.
                    if (number := signals.at(n)) is not None:
                        raise (Preempted if number == signal.SIGTERM else Interrupted)(finite(whole()[0]))
                    if n == steps:
                        break
                    if trace is not None and n == start + log_every:
                        tracing.enter_context(jax.profiler.trace(str(trace)))
                    with signals.waiting():
                        batch, place = data.draw(n, steps), data.place()
                    now = None
                    state, alive, *outcome = take(state, alive, run.key, batch)
                    pending.append(outcome)
                    places.append(place)
        except BaseException as error:
            # Without a step there is nothing new, and what was saved before stays.
            if save is not None and _taken(state) > start:
                with files.uninterrupted():
                    save(finite(whole()[0]), True)
            if type(error) is KeyboardInterrupt and _taken(state) >= start:
                raise Interrupted(finite(whole()[0])) from error
            raise
        now = finite(good() if now is None else now)
        if save is not None:
            with files.uninterrupted():
                save(now, True)
    # One that came while it was saved.
    if (number := signals.got()) is not None:
        raise (Preempted if number == signal.SIGTERM else Interrupted)(now)
    return now


def _compiled(step, run, donate):
    """The state to train, whether all was finite so far, and the step (state, alive, key, batch) -> (state, alive, metrics, taken)."""

    def take(state, alive, key, batch):
        new, metrics = step(state, jax.random.fold_in(key, state.step), batch)
        _check_metrics(metrics)
        taken = new.step == state.step + 1
        # After a step that was not finite no other is taken, so that the state is the one before it.
        alive &= jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all() & taken
        return finite_where(alive, new, state), alive, metrics, taken

    state = _distinct(run.state) if donate else jax.tree.map(jnp.copy, run.state)
    stay = jax.tree.map(lambda x: x.sharding if isinstance(getattr(x, "sharding", None), NamedSharding) else None, state)
    take = jax.jit(take, donate_argnums=0, out_shardings=(stay, stay.step, None, None))
    # On the devices of the state, as it comes back from a step: another placement would compile the step again.
    return state, jnp.ones_like(state.step, bool), take


def _distinct(state):
    """The same state, where an array that stands in it twice, as some optimisers' parameters do, is a copy: none is donated twice."""
    seen = set()

    def own(leaf):
        if not isinstance(leaf, jax.Array) or not leaf.size:
            return leaf
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        memory = {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in data.addressable_shards}
        if memory & seen:
            return jnp.copy(leaf)
        seen.update(memory)
        return leaf

    return jax.tree.map(own, state)


def _taken(state):
    """The steps that a state has, -1 where the step that failed took its memory with it."""
    try:
        return int(state.step)
    except Exception:
        return -1


def _not_finite(state):
    """How many numbers of each array of a state are not finite."""
    return [_count(leaf) for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@jax.jit
def _count(leaf):
    # A program for each shape; one for all arrays would take a third of the time to compile the step.
    return jnp.sum(~jnp.isfinite(leaf))


def _check_metrics(metrics):
    """Raises unless a step's metrics are numbers by name, a loss among them."""
    if not isinstance(metrics, dict) or "loss" not in metrics:
        given = f"the keys {sorted(metrics)}" if isinstance(metrics, dict) else f"a {type(metrics).__name__}"
        raise ValueError(f'The step\'s metrics are {given}, but they are a dict with "loss" in it, which the bar and the history show.')
    if "step" in metrics:
        raise ValueError("The step's metrics have a 'step', but that is the number of the step where they are logged: name it otherwise.")
    for name, value in metrics.items():
        if jnp.shape(value):
            raise ValueError(f"The step's metric {name!r} has shape {jnp.shape(value)}, but metrics are numbers: take its mean.")


def _number(name, value):
    """A number, which a callback may have added, as JSON can hold it."""
    if not isinstance(name, str):
        raise TypeError(f"A callback added {name!r} to the metrics, whose names are strings.")
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"A callback added {value!r} as {name!r} to the metrics, which are numbers.") from error


class _Batches:
    """Batches one by one, and where they are."""

    def __init__(self, batches: Any, position, step):
        self._place = step if callable(batches) and not hasattr(batches, "__iter__") else None
        self._start = step
        self._batches: Any = batches
        if self._place is None:
            self._batches = iter(batches)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if position is None:
            return
        if self._place is not None:
            if position != step:
                raise TypeError(
                    f"The run's place in its batches is {position!r}, but the batches are a function of the step: give those it had."
                )
        elif not hasattr(self._batches, "set_state"):
            raise TypeError(
                f"The run's place in its batches is {position!r}, but a {type(self._batches).__name__} has no set_state: give batches that "
                "can be set, as data.pipeline makes them, or Run(..., position=None) where they are in their place."
            )
        else:
            try:
                self._batches.set_state(copy.deepcopy(position))
            except Exception as error:
                raise TypeError(
                    f"The batches could not be set to the run's place in them, {position!r} ({type(error).__name__}: {error}): give "
                    "batches of the kind that it was saved with."
                ) from error

    def draw(self, n, steps):
        if self._place is not None:
            self._place = n + 1
            return self._batches(n)
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                f"The batches ended after {n - self._start} of {steps - self._start} steps: give an iterable that repeats."
            ) from None

    def place(self):
        """Where the next batch is."""
        if self._place is not None or not hasattr(self._batches, "get_state"):
            return self._place
        return copy.deepcopy(self._batches.get_state())


class _Signals:
    """SIGTERM and SIGINT, which end training between two steps, where the state and the batches are at the same place."""

    def __init__(self):
        self._got, self._waiting, self._before = [], False, {}

    def __enter__(self):
        # JAX catches SIGTERM where there are several processes, and agrees with them on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            caught = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._catch) for number in caught}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, n):
        """The signal that came before step n, to this process or, where there are several, to one of them; or None."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(n) else None
        return self.got()

    def got(self):
        """The signal that came to this process, where JAX does not catch it; or None."""
        return self._got[0] if self._got else None

    @contextlib.contextmanager
    def waiting(self):
        """Here, where no step is half taken, a second SIGINT does not wait."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _catch(self, number, frame):
        again = number in self._got and number == signal.SIGINT
        self._got.append(number)
        if again and self._waiting:
            self._waiting = False
            raise KeyboardInterrupt
