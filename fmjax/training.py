"""Training: a state, a step, and the loop that takes it.

    g = grad_theta mean loss(theta),   theta <- theta + optimizer(g)                              (1)
    ema <- d_n ema + (1 - d_n) theta,  d_n = min(ema_decay, (1 + n) / (10 + n))                   (2)

A step is one pure function `(state, key, batch) -> (state, metrics)`: compile it with `jax.jit`, or run it on many devices
with `fmjax.parallel`.
"""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from fmjax import checks
from fmjax.progress import bar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as a pytree."""

    step: jax.Array
    """Updates made, int32."""
    params: Any
    """The network's parameters, float32."""
    opt_state: optax.OptState
    """The optimiser's state."""
    ema: Any
    """The average (2) of the parameters, for sampling; a tuple of them where the step keeps several."""


PREEMPTED = 75
"""The exit status of a training that SIGTERM ended, after it was saved: start it again (EX_TEMPFAIL of sysexits.h)."""


class Preempted(SystemExit):
    """Training stopped because the process was told to (SIGTERM), at the step that its `state` has."""

    def __init__(self, state, history):
        super().__init__(PREEMPTED)
        self.state = state
        self.history = history


class NonFiniteLoss(FloatingPointError):
    """Training stopped because a loss or its gradient was not finite; `state` is the last good one."""

    def __init__(self, message, state, history):
        super().__init__(message)
        self.state = state
        self.history = history


def init(params, optimizer, *, averages=None):
    """The state before the first step.

    Args:
      params: the network's parameters, any pytree.
      optimizer: an optax gradient transformation.
      averages: how many, for a step with a tuple of decays; by default one, which is no tuple.
    Returns:
      A `TrainState` of step 0, whose averages are copies of the parameters.
    Raises:
      TypeError: if the optimiser is none of optax.
      ValueError: if `averages` is not a whole number of at least 1.
    """
    _check_optimizer(optimizer)
    if averages is not None:
        checks.whole("averages", averages, "how many averages the state has, as many as the step has decays")
    copies = [jax.tree.map(jnp.copy, params) for _ in range(1 if averages is None else averages)]
    ema = copies[0] if averages is None else tuple(copies)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def check_state(state):
    """Raises unless a state is one of training, with a step."""
    if not isinstance(state, TrainState) and not hasattr(state, "step"):
        raise TypeError(f"The state is a {type(state).__name__}, but training has a TrainState: make one by init(params, optimizer).")


def _check_optimizer(optimizer):
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"optimizer is {optimizer!r}, but it is a gradient transformation of optax, such as optax.adamw(1e-4).")


def _check_metrics(metrics):
    """Raises unless a step's metrics are numbers by name, a loss among them."""
    if not isinstance(metrics, dict) or "loss" not in metrics:
        given = f"the keys {sorted(metrics)}" if isinstance(metrics, dict) else f"a {type(metrics).__name__}"
        raise ValueError(f'The step\'s metrics are {given}, but they are a dict with "loss" in it, which the bar and the rows show.')
    for name, value in metrics.items():
        if jnp.shape(value):
            raise ValueError(f"The step's metric {name!r} has shape {jnp.shape(value)}, but metrics are numbers: take its mean.")


def make_step(loss_fn, optimizer, *, ema_decay: Any = 0.999, axis_name=None, accumulate=1):
    """One training step, (1) and (2).

    A step whose loss or gradient is not finite leaves the state as it was and shows in its metrics.

    Args:
      loss_fn: (params, key, batch) -> scalar loss.
      optimizer: the optax gradient transformation that made the state's `opt_state`.
      ema_decay: the largest d_n of (2), in [0, 1); or a function of n, int32, that gives d_n itself, as
        `averages.power` does; or a tuple of either, for as many averages.
      axis_name: the axis over which `jax.pmap` maps the step: losses and gradients are averaged along it, and each
        device folds its index into the key.
      accumulate: parts of a batch whose gradients are computed one after another, to save memory, and averaged. Part i
        takes every `accumulate`-th example from the i-th on, and folds i into the key.
    Returns:
      (state, key, batch) -> (state, metrics), with metrics `loss` and `grad_norm`, scalars of float32, or float64 where that is enabled.
    Raises:
      TypeError: if the optimiser is none of optax; of the step, if the state is no `TrainState`.
      ValueError: if an ema_decay is not in [0, 1), or accumulate is not a whole number of at least 1; of the step, if it does not
        divide the batch, the loss is not one number, the state has not as many averages as there are decays, or another optimiser made it.
    """
    for decay in ema_decay if isinstance(ema_decay, tuple) else (ema_decay,):
        if not callable(decay) and not (isinstance(decay, int | float | np.number | jax.Array) and 0 <= decay < 1):
            raise ValueError(
                f"ema_decay is {decay!r}, but it must be in [0, 1), a function of the step, or a tuple of these: 0 keeps no average, "
                "0.999 is common."
            )
    checks.function("loss_fn", loss_fn, "lambda params, key, batch: losses.flow_matching(...).mean()")
    _check_optimizer(optimizer)
    checks.whole("accumulate", accumulate, "the number of parts of a batch, of which 1 takes it at once")

    def scalar_loss(params, key, batch):
        loss = loss_fn(params, key, batch)
        if isinstance(loss, tuple) or jnp.shape(loss):
            given = f"a tuple of {len(loss)}" if isinstance(loss, tuple) else f"shape {jnp.shape(loss)}"
            raise ValueError(f"loss_fn gives {given}, but it is one number: take .mean() of the losses, and nothing beside it.")
        return loss

    value_and_grad = _accumulated(jax.value_and_grad(scalar_loss), accumulate)

    def average(decay, ema, params, n):
        d_n: Any = decay(n) if callable(decay) else jnp.minimum(decay, (1 + n) / (10 + n))
        return optax.incremental_update(params, ema, 1 - d_n)

    def step(state, key, batch):
        check_state(state)
        if jax.tree.structure(state.opt_state) != jax.tree.structure(jax.eval_shape(optimizer.init, state.params)):
            raise ValueError("The state's opt_state is of another optimiser: make the state by init(params, optimizer) with the step's.")
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        loss, grads = value_and_grad(state.params, key, batch)
        if axis_name is not None:
            loss, grads = lax.pmean((loss, grads), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if isinstance(ema_decay, tuple):
            if not isinstance(state.ema, tuple) or len(state.ema) != len(ema_decay):
                raise ValueError(f"The step has {len(ema_decay)} decays: make the state by init(..., averages={len(ema_decay)}).")
            ema = tuple(average(decay, ema, params, state.step) for decay, ema in zip(ema_decay, state.ema, strict=True))
        elif jax.tree.structure(state.ema) != jax.tree.structure(state.params):
            given = f"{len(state.ema)} averages" if isinstance(state.ema, tuple) else "an average of other parameters"
            raise ValueError(f"The state has {given}, but the step has one decay: make the state by init(params, optimizer).")
        else:
            ema = average(ema_decay, state.ema, params, state.step)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, params, opt_state, ema)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return state, {"loss": loss, "grad_norm": grad_norm}

    return step


def _accumulated(value_and_grad, count):
    """The same function of parts of a batch one by one, averaged."""
    if count == 1:
        return value_and_grad

    def parts(leaf):
        if len(leaf) % count:
            raise ValueError(f"The batch of {len(leaf)} does not divide into the {count} parts of accumulate.")
        # Every count-th example, so that a part of a batch that is spread over devices is spread over them too.
        return leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)

    def run(params, key, batch):
        def body(total, part):
            i, batch = part
            return jax.tree.map(jnp.add, total, value_and_grad(params, jax.random.fold_in(key, i), batch)), None

        batch = jax.tree.map(parts, batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jax.ShapeDtypeStruct((), jnp.result_type(float)), params))
        total, _ = lax.scan(body, zeros, (jnp.arange(count), batch))
        return jax.tree.map(lambda x: x / count, total)

    return run


def fit(step, state, batches, key, *, steps, every=100, callbacks=(), save=None, progress=True, trace=None, donate=False):
    """Trains until the state has taken `steps` steps, from wherever it is.

    Step n draws from `fold_in(key, n)`. The loop waits for the device once every `every` steps. A process that is told to
    end (SIGTERM) ends after the step it is in, all processes of a job after the same one.

    Args:
      step: (state, key, batch) -> (state, metrics), as `make_step` makes it; it is compiled here.
      state: where to start; a copy is trained, so the state given stays whole, unless `donate`. Arrays stay on the devices that
        they are on.
      batches: an iterable of batches.
      key: a typed key.
      steps: the number of steps that the state has at the end.
      every: steps between two rows of the history.
      callbacks: functions `(state, row) -> None`, called with every row. The next step takes the memory of the state:
        what is kept of it is copied, as `jax.device_get` does.
      save: a function of the state, called when training ends: at the last step, and, where a step was taken, when the loss is
        not finite (with the last good state), when it is interrupted and when anything fails.
      progress: whether to show a bar with the loss, steps a second and the time left.
      trace: a folder for a trace by `jax.profiler` of the second `every` steps, which TensorBoard and Perfetto show.
      donate: whether training takes the memory of the state given, whose arrays (and the parameters that `init` was given) are
        deleted then, rather than copy it: a large model has no room for two.
    Returns:
      The state, and the history: rows with `step` and the mean of every metric since the row before.
    Raises:
      NonFiniteLoss: if a loss or gradient is not finite, at the end of the row in which it came.
      Preempted: after SIGTERM; it ends the process with status `PREEMPTED` unless it is caught.
      TypeError: if the state is no `TrainState`, or the key is not typed.
      ValueError: if the batches end before the steps, `steps` or `every` is not a whole number, or the metrics have no `loss` or more
        than numbers.
    """
    check_state(state)
    checks.key(key)
    checks.whole("steps", steps, "the number of steps that the state has at the end", least=0)
    checks.whole("every", every, "the number of steps between two rows")

    def take(state, alive, key, batch):
        new, metrics = step(state, jax.random.fold_in(key, state.step), batch)
        _check_metrics(metrics)
        # After a step that was not finite no other is taken, so that the state is the one before it.
        alive &= jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
        return jax.tree.map(lambda new, old: jnp.where(alive, new, old), new, state), alive, metrics

    if not donate:
        state = jax.tree.map(jnp.copy, state)
    stay = jax.tree.map(lambda x: x.sharding if isinstance(getattr(x, "sharding", None), NamedSharding) else None, state)
    take = jax.jit(take, donate_argnums=0, out_shardings=(stay, stay.step, None))
    # On the devices of the state, as it comes back from a step: another placement would compile the step again.
    alive = jnp.ones_like(state.step, bool)
    start = int(state.step)
    history, pending, batches = [], [], iter(batches)
    progress = progress and jax.process_index() == 0
    shown = bar("training", "steps", steps, start, loss=math.nan) if progress else contextlib.nullcontext(lambda done, **numbers: None)
    try:
        with (
            shown as show,
            _signals() as signalled,
            contextlib.ExitStack() as tracing,
        ):
            for n in range(start, max(start, steps) + 1):
                # After the last step too, so that no signal is lost.
                if (number := signalled(n)) is not None:
                    raise Preempted(state, history) if number == signal.SIGTERM else KeyboardInterrupt
                if n >= steps:
                    break
                if trace is not None and n == start + every:
                    tracing.enter_context(jax.profiler.trace(str(trace)))
                try:
                    batch = next(batches)
                except StopIteration:
                    raise ValueError(
                        f"The batches ended after {n - start} of {steps - start} steps: give an iterable that repeats."
                    ) from None
                state, alive, metrics = take(state, alive, key, batch)
                pending.append(metrics)
                if (n + 1) % every and n + 1 != steps:
                    show(n + 1)
                    continue
                rows, pending = jax.device_get(pending), []
                for i, metrics in enumerate(rows):
                    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
                    if bad:
                        at = n + 1 - len(rows) + i
                        raise NonFiniteLoss(
                            f"{' and '.join(bad)} at step {at}: the step was not taken, and the state before it is this error's `state`"
                            f"{' and was saved' if save and at > start else ''}. Try a lower learning rate or gradient "
                            "clipping, or check the data for nan and for labels out of range.",
                            state,
                            history,
                        )
                if n + 1 >= start + 2 * every:
                    tracing.close()
                row = {"step": n + 1} | {name: float(sum(m[name] for m in rows) / len(rows)) for name in rows[0]}
                history.append(row)
                show(n + 1, loss=row["loss"])
                for callback in callbacks:
                    callback(state, row)
    except BaseException:
        # Without a step there is nothing new, and what was saved before stays.
        if save is not None and int(state.step) > start:
            save(state)
        raise
    if save is not None:
        save(state)
    return state, history


def json_lines(file):
    """A callback of `fit` that adds every row to a file, a line of JSON each.

    Args:
      file: where to; process 0 alone writes.
    Returns:
      A function `(state, row) -> None`.
    """
    file = Path(file)

    def write(state, row):
        if jax.process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    return write


def tensorboard(folder):
    """A callback of `fit` that adds every row to TensorBoard's files.

    Args:
      folder: where to; process 0 alone writes.
    Returns:
      A function `(state, row) -> None`.
    Raises:
      ImportError: if tensorboardX is not installed (`pip install fmjax[tensorboard]`).
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("training.tensorboard needs tensorboardX: pip install 'fmjax[tensorboard]'") from error
    writer = SummaryWriter(str(folder), flush_secs=1) if jax.process_index() == 0 else None

    def write(state, row):
        if writer is not None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

    return write


@contextlib.contextmanager
def _signals():
    """What came before step n: SIGTERM, to this process or, where there are several, to one of them; SIGINT; or None.

    A signal between two steps finds the state and the batches at the same place; a second SIGINT does not wait for that.
    """
    if jax.process_count() > 1:
        # JAX catches SIGTERM and agrees with the other processes on a step.
        yield lambda n: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(n) else None
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda n: None
        return
    got = []

    def catch(number, frame):
        if number in got and number == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda n: got[0] if got else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
