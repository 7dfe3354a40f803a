"""Training: a state, a step, and the loop that takes it.

    g = grad_theta mean loss(theta),   theta <- theta + optimizer(g)                              (1)
    ema <- d_n ema + (1 - d_n) theta,  d_n = min(ema_decay, (1 + n) / (10 + n))                   (2)

A step is one pure function `(state, key, batch) -> (state, metrics)`: compile it with `jax.jit`, or map it over
devices with `jax.pmap` under the axis name that it was made with.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


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
    """The average (2) of the parameters, for sampling."""


class NonFiniteLoss(FloatingPointError):
    """Training stopped because a loss or its gradient was not finite; `state` is the last good one."""

    def __init__(self, message, state, history):
        super().__init__(message)
        self.state = state
        self.history = history


def init(params, optimizer):
    """The state before the first step.

    Args:
      params: the network's parameters, any pytree.
      optimizer: an optax gradient transformation.
    Returns:
      A `TrainState` of step 0, whose average is a copy of the parameters.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params))


def make_step(loss_fn, optimizer, *, ema_decay=0.999, axis_name=None):
    """One training step, (1) and (2).

    A step whose loss or gradient is not finite leaves the state as it was and shows in its metrics.

    Args:
      loss_fn: (params, key, batch) -> scalar loss.
      optimizer: the optax gradient transformation that made the state's `opt_state`.
      ema_decay: the largest d_n of (2), in [0, 1).
      axis_name: the axis over which `jax.pmap` maps the step: losses and gradients are averaged along it, and each
        device folds its index into the key.
    Returns:
      (state, key, batch) -> (state, metrics), with metrics `loss` and `grad_norm`, float32 scalars.
    Raises:
      ValueError: if ema_decay is not in [0, 1).
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}, but it must be in [0, 1): 0 keeps no average, 0.999 is common.")

    def step(state, key, batch):
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        loss, grads = jax.value_and_grad(loss_fn)(state.params, key, batch)
        if axis_name is not None:
            loss, grads = lax.pmean((loss, grads), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, params, opt_state, ema)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return state, {"loss": loss, "grad_norm": grad_norm}

    return step


def fit(step, state, batches, key, *, steps, every=100, callbacks=(), save=None, progress=True):
    """Trains until the state has taken `steps` steps, from wherever it is.

    Step n draws from `fold_in(key, n)`. The loop waits for the device once every `every` steps.

    Args:
      step: (state, key, batch) -> (state, metrics), as `make_step` makes it; it is compiled here.
      state: where to start; a copy is trained, so the state given stays whole.
      batches: an iterable of batches.
      key: a typed key.
      steps: the number of steps that the state has at the end.
      every: steps between two rows of the history.
      callbacks: functions `(state, row) -> None`, called with every row.
      save: a function of the state, called when training ends: at the last step, when the loss is not finite (with
        the last good state), and when it is interrupted.
      progress: whether to show a bar with the loss, steps a second and the time left.
    Returns:
      The state, and the history: rows with `step` and the mean of every metric since the row before.
    Raises:
      NonFiniteLoss: if a loss or gradient is not finite, at the end of the row in which it came.
      ValueError: if the batches end before the steps.
    """

    def take(state, alive, key, batch):
        new, metrics = step(state, jax.random.fold_in(key, state.step), batch)
        # After a step that was not finite no other is taken, so that the state is the one before it.
        alive &= jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
        return jax.tree.map(lambda new, old: jnp.where(alive, new, old), new, state), alive, metrics

    take = jax.jit(take, donate_argnums=0)
    alive = jnp.array(True)
    state = jax.tree.map(jnp.copy, state)
    start = int(state.step)
    history, pending, batches = [], [], iter(batches)
    try:
        with _bar(start, steps) if progress else contextlib.nullcontext(lambda step, row: None) as show:
            for n in range(start, steps):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise ValueError(
                        f"The batches ended after {n - start} of {steps - start} steps: give an iterable that repeats."
                    ) from None
                state, alive, metrics = take(state, alive, key, batch)
                pending.append(metrics)
                if (n + 1) % every and n + 1 != steps:
                    show(n + 1, None)
                    continue
                rows, pending = jax.device_get(pending), []
                for i, metrics in enumerate(rows):
                    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
                    if bad:
                        at = n + 1 - len(rows) + i
                        raise NonFiniteLoss(
                            f"{' and '.join(bad)} at step {at}: the step was not taken, and the state before it is this error's `state`"
                            f"{' and was saved' if save else ''}. Try a lower learning rate, gradient clipping, or check the data for nan.",
                            state,
                            history,
                        )
                row = {"step": n + 1} | {name: float(sum(m[name] for m in rows) / len(rows)) for name in rows[0]}
                history.append(row)
                show(n + 1, row)
                for callback in callbacks:
                    callback(state, row)
    finally:
        if save is not None:
            save(state)
    return state, history


@contextlib.contextmanager
def _bar(start, steps):
    """A progress bar, and the function `(step, row or None) -> None` that moves it."""
    from rich import progress

    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.4f}"),
        progress.TextColumn("{task.fields[rate]:.1f} steps/s"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task("", total=steps, completed=start, loss=math.nan, rate=0.0)

        def show(step, row):
            elapsed = bar.tasks[task].elapsed or math.inf
            loss = {} if row is None else {"loss": row["loss"]}
            bar.update(task, completed=step, rate=(step - start) / elapsed, **loss)

        yield show
