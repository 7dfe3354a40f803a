"""The loop: a run that goes from step to step, is logged and saved, and ends between two steps however it is ended."""

import contextlib
import dataclasses
import inspect
import math
import signal
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fmjax import checks, files
from fmjax.training.batches import Batches
from fmjax.training.gradients import OURS
from fmjax.training.progress import bar
from fmjax.training.run import Interrupted, NonFiniteLoss, Preempted, Run, check_position, check_run
from fmjax.training.signals import Signals
from fmjax.training.state import finite_where


def fit(
    step, run, batches, *, steps, log_every=100, callbacks=(), save=None, save_every=None, progress=True, trace=None, donate=False
) -> Run:
    """Trains until a run has taken `steps` steps, from wherever it is.

    The loop waits for the device once every `log_every` steps. A process that is told to end (SIGTERM, or Ctrl-C) ends after the step it
    is in, all processes of a job after the same one; a second Ctrl-C does not wait for a batch or a callback. The run that is saved
    then is whole: its state, its place in the data and what was logged belong together, and it goes on as if it had not been ended.

    Args:
      step: (state, key, batch) -> (state, metrics), as `make_step` makes it; it is compiled here.
      run: where to start, `Run(state, key)` at first; a copy of the state is trained, so the one given stays whole, unless `donate`. Arrays
        stay on the devices that they are on.
      batches: an iterable of batches, which is set to the run's position where it has one (`get_state` and `set_state`); or a function
        of the number of the step, as `lambda n: take(jax.random.fold_in(data_key, n))`, of another key than the run's, from whose
        `fold_in(run.key, n)` step n draws; or None where there are no data, and each batch is None.
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
      NonFiniteLoss: if a loss, a gradient, an update or a parameter is not finite, at the log after it came. So is any other number of
        the step's metrics, unless they have an `update_norm`, which says that the state is finite: then the number is logged as it is,
        with a warning the first time.
      Preempted: after SIGTERM; it ends the process with status `PREEMPTED` unless it is caught.
      Interrupted: after Ctrl-C, a KeyboardInterrupt.
      TypeError: if the run is no `Run`, has a place in the data and the batches cannot be set, or one that cannot be saved.
      ValueError: if the batches end before the steps, a number of steps is not a whole number, `save_every` has no `save`, or the
        metrics have no `loss`, a `step`, or more than numbers.
    """
    check_run(run)
    checks.whole("steps", steps, "the number of steps that the state has at the end", least=0)
    checks.whole("log_every", log_every, "the number of steps between two logs")
    _check_save(save, save_every)
    course = _Course(step, run, batches, donate, saves=save is not None)
    start, steps, now = course.start, max(course.start, steps), None
    if save is not None:
        check_position(course.batches.position())
    with Signals() as signals:
        try:
            with _progress(progress, run, start, steps) as show, _Trace(trace, start + log_every, start + 2 * log_every) as tracing:
                for n in range(start, steps + 1):
                    if course.has_metrics() and (n % log_every == 0 or n == steps):
                        with signals.waiting():
                            jax.block_until_ready(course.state)
                        now = course.good()
                        tracing.end(n)
                        now = course.log(now, n, callbacks, show, signals)
                    else:
                        show(n)
                    if save is not None and save_every is not None and n % save_every == 0 and course.saved < n < steps:
                        save(course.finite(course.good()), False)
                        course.saved = n
                    # After the last step too, so that no signal is lost.
                    if (number := signals.at(n)) is not None:
                        raise _ended(number, course.finite(course.whole()[0]))
                    if n == steps:
                        break
                    tracing.begin(n)
                    with signals.waiting():
                        batch, position = course.batches.draw(n, steps), course.batches.position()
                    now = None
                    course.take(batch, position)
        except BaseException as error:
            # Without a step there is nothing new, and what was saved before stays.
            if save is not None and course.taken() > start:
                with files.uninterrupted():
                    save(course.finite(course.whole()[0]), True)
            if type(error) is KeyboardInterrupt and course.taken() >= start:
                raise Interrupted(course.finite(course.whole()[0])) from error
            raise
        now = course.finite(course.good() if now is None else now)
        if save is not None:
            with files.uninterrupted():
                save(now, True)
    # One that came while it was saved.
    if (number := signals.got()) is not None:
        raise _ended(number, now)
    return now


def _check_save(save, save_every):
    """Raises unless a run can be saved, found out now rather than when training ends."""
    if save_every is not None:
        checks.whole("save_every", save_every, "the number of steps between two saves")
    if save is not None:
        checks.function("save", save, "checkpointer.save, or lambda run, wait: ...")
        try:
            with contextlib.suppress(ValueError):
                inspect.signature(save).bind(None, True)
        except TypeError as error:
            raise TypeError(f"save is called with a run and whether to wait, which {save!r} does not take: {error}.") from error
    elif save_every is not None:
        raise ValueError(f"save_every is {save_every}, but there is no save: give a function (run, wait), such as Checkpointer.save.")


def _ended(number, run):
    """What a signal raises."""
    return (Preempted if number == signal.SIGTERM else Interrupted)(run)


def _progress(wanted, run, start, steps):
    """A bar with the loss, where it is wanted, or nothing."""
    if not wanted or jax.process_index() != 0:
        return contextlib.nullcontext(lambda done, **numbers: None)
    return bar("training", "steps", steps, start, loss=run.history[-1].get("loss", math.nan) if run.history else math.nan)


class _Trace(contextlib.ExitStack):
    """A trace of the steps from `first` to `last`, where there is a folder for it."""

    def __init__(self, folder, first, last):
        super().__init__()
        self._folder, self._first, self._last = folder, first, last

    def begin(self, n):
        if self._folder is not None and n == self._first:
            self.enter_context(jax.profiler.trace(str(self._folder)))

    def end(self, n):
        if n >= self._last:
            self.close()


class _Course:
    """A run whose steps are taken on the device, and whose metrics are read later."""

    def __init__(self, step, run, batches, donate, saves):
        # A copy's number: NumPy would keep the array that is read, which then could not be donated.
        self.start = self.saved = int(jnp.copy(run.state.step))
        self.batches = Batches(batches, run.position, self.start)
        self.state, self._alive, self._take = _compiled(step, run, donate)
        self._before = jax.device_get(_not_finite(self.state))
        # The metrics since the last log, those still on the device, and the positions before each of these steps and after the last.
        self._unlogged, self._pending, self._positions = list(run.unlogged), [], [self.batches.position()]
        self._key, self._history, self._saves = run.key, run.history, saves
        # Numbers beside the loss that a warning has said are not finite.
        self._named = set()

    def take(self, batch, position):
        """A step; nothing waits for it."""
        self.state, self._alive, *outcome = self._take(self.state, self._alive, self._key, batch)
        self._pending.append(outcome)
        self._positions.append(position)

    def taken(self):
        """The steps that the state has, -1 where the step that failed took its memory with it."""
        try:
            return int(self.state.step)
        except Exception:
            return -1

    def has_metrics(self):
        """Whether there is anything to log."""
        return bool(self._unlogged or self._pending)

    def whole(self):
        """The run after its last good step, and what was wrong with the next; waits for the device."""
        fetched = jax.device_get(self._pending)
        good, wrong = 0, None
        for metrics, taken in fetched:
            bad = [f"{name} {value}" for name, value in _of_the_state(metrics).items() if not math.isfinite(value)]
            if bad or not taken:
                wrong = " and ".join(bad) or "a state whose step is not one more than before"
                break
            self._unlogged.append({name: float(value) for name, value in metrics.items()})
            good += 1
            measured = {name: value for name, value in self._unlogged[-1].items() if name not in self._named and not math.isfinite(value)}
            self._named |= measured.keys()
            for name, value in measured.items():
                warnings.warn(
                    f"The number {name!r} beside the loss is {value} at a step: it is logged as it is, and "
                    "training goes on, since the state is finite. Have the loss function give another number where it has none.",
                    stacklevel=4,
                )
        # What was fetched is not fetched again.
        del self._pending[:], self._positions[:good]
        return Run(self.state, self._key, self._positions[0], self._history, tuple(self._unlogged)), wrong

    def good(self):
        """The run, all of whose steps were good."""
        run, wrong = self.whole()
        if wrong is not None:
            at = int(self.state.step)
            advice = "Try a lower learning rate or gradient clipping, or check the data for nan and for labels out of range."
            if wrong.startswith("update_norm"):
                advice = "The loss and its gradient are finite, so the optimiser made it: check its learning rate at this step."
                if run.state.variables is not None:
                    advice = f"{advice} Or it is in the variables that the loss function gives."
            raise NonFiniteLoss(
                f"{wrong} at step {at}: the step was not taken, and the run before it is this error's `run`"
                f"{' and was saved' if self._saves and at > self.start else ''}. {advice}",
                run,
            )
        return run

    def finite(self, run):
        """The run, unless a step of the caller's own left in it what is not finite; checked before it is saved or given back."""
        counts = jax.device_get(_not_finite(run.state))
        bad = sum(max(int(after) - int(before), 0) for after, before in zip(counts, self._before, strict=True))
        if bad:
            raise NonFiniteLoss(
                f"{bad} numbers of the state are not finite at step {int(run.state.step)}, though its metrics are: the last good run "
                f"is the one saved at step {self.saved}, if any. A step of make_step is not taken then: check what the step does after it.",
                None,
            )
        return run

    def log(self, run, n, callbacks, show, signals):
        """The run with the mean of its metrics in its history, once every callback is done with it."""
        # Of those that a step has now; the run may have been begun with others.
        values = {name: [each[name] for each in self._unlogged if name in each] for name in self._unlogged[-1]}
        metrics = {"step": n} | {name: sum(each) / len(each) for name, each in values.items()}
        run = dataclasses.replace(run, history=(*self._history, metrics), unlogged=())
        show(n, loss=metrics["loss"])
        for callback in callbacks:
            with signals.waiting():
                callback(run, metrics)
            metrics.update({name: _number(name, value) for name, value in metrics.items()})
            if metrics.get("step") != n:
                raise ValueError(f"A callback changed the step of the metrics to {metrics.get('step')}, which is {n}: add to them alone.")
        self._history = run.history
        self._unlogged.clear()
        return run


def _compiled(step, run, donate):
    """The state to train, whether all was finite so far, and the step (state, alive, key, batch) -> (state, alive, metrics, taken)."""

    def take(state, alive, key, batch):
        new, metrics = step(state, jax.random.fold_in(key, state.step), batch)
        _check_metrics(metrics)
        taken = new.step == state.step + 1
        # After a step that was not finite no other is taken, so that the state is the one before it.
        alive &= jnp.isfinite(jnp.stack(jax.tree.leaves(_of_the_state(metrics)))).all() & taken
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


def _not_finite(state):
    """How many numbers of each array of a state are not finite."""
    return [_count(leaf) for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@jax.jit
def _count(leaf):
    # A program for each shape; one for all arrays would take a third of the time to compile the step.
    return jnp.sum(~jnp.isfinite(leaf))


def _of_the_state(metrics):
    """The metrics that are not finite where the state would not be: all of them, unless an update_norm says so."""
    return {name: value for name, value in metrics.items() if name in OURS or "update_norm" not in metrics}


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
