"""The state that training changes, and a step of it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fmjax import checks
from fmjax.training.gradients import check_arguments, float32, gradient, mean_of_floats, value_function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as a pytree."""

    step: jax.Array
    """Updates made, int32."""
    params: Any
    """The network's parameters."""
    opt_state: optax.OptState
    """The optimiser's state, of float32 where parameters have half precision."""
    ema: Any
    """The exponential moving average (EMA) of the parameters, for sampling, in float32 likewise; a tuple where the step keeps several."""
    variables: Any = None
    """What else the network changes when it is trained, such as BatchNorm's statistics, or None.

    No average is taken of them: sample with `ema` and these. Statistics are of the parameters as they are trained, so where an average is
    far behind, measure them with it anew (docs/guides/network.md).
    """


def init(params, optimizer, *, emas=None, variables=None) -> TrainState:
    """The state before the first step.

    Args:
      params: the network's parameters, any pytree.
      optimizer: an optax gradient transformation.
      emas: how many exponential moving averages of the parameters, for a step with a tuple of decays; by default one, which is no tuple.
      variables: any pytree that the network changes beside its parameters: Linen's other collections, as `{"batch_stats": ...}`, or NNX's
        other states; by default None, and the loss function neither takes nor gives any.
    Returns:
      A `TrainState` of step 0, whose EMAs are copies of the parameters. EMAs and the optimiser's state have float32 where parameters have
      half precision, numbers become arrays, and no array stands in it twice.
    Raises:
      TypeError: if the optimiser is none of optax.
      ValueError: if `emas` is not a whole number of at least 1.
    """
    _check_optimizer(optimizer)
    if emas is not None:
        checks.whole("emas", emas, "how many EMAs the state has, as many as the step has decays")
    # A number has no dtype of its own, so that a step would change it.
    params, variables = jax.tree.map(
        lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, jnp.result_type(leaf)), (params, variables)
    )
    copies = [jax.tree.map(jnp.copy, float32(params)) for _ in range(1 if emas is None else emas)]
    ema = copies[0] if emas is None else tuple(copies)
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf):
        # What is small may be the optimiser's own, such as a key, which a donated state would take from it.
        if id(leaf) in seen or leaf.size < 2**16:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    opt_state, variables = jax.tree.map(own, (optimizer.init(float32(params)), variables))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, variables)


def finite_where(taken, new, old) -> Any:
    """The new state where a step is taken, else the old one, in the old one's dtypes."""

    def choose(new, old):
        chosen = jnp.where(taken, new, old)
        return chosen if chosen.dtype == old.dtype else chosen.astype(old.dtype)

    return jax.tree.map(choose, new, old)


def _update_norm(updates, params, opt_state, variables, old):
    """The norm of the updates, nan where a number of the new state is not finite that was so before.

    An infinite moment gives an update of zero, so moments count; each is added, times zero, to an update of its shape, so that all are
    read at once. Parameters are finite where updates are, but for those of a dtype that ends before the norm does.
    """
    squares = [jnp.square(jnp.abs(leaf)) for leaf in jax.tree.leaves(float32(updates))]
    of_shape = {square.shape: [i for i, other in enumerate(squares) if other.shape == square.shape] for square in squares}
    index = {shape: itertools.cycle(indices) for shape, indices in of_shape.items()}
    small = [_ends_early(leaf) for leaf in jax.tree.leaves(params)]
    pairs = [*zip(jax.tree.leaves((opt_state, variables)), jax.tree.leaves((old.opt_state, old.variables)), strict=True)]
    pairs += itertools.compress(zip(jax.tree.leaves(params), jax.tree.leaves(old.params), strict=True), small)
    for new, before in pairs:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            continue
        # Some begin at infinity, such as the best loss so far.
        zero = jnp.where(jnp.isfinite(before), jnp.abs(_as_kept(new)) * 0, 0)
        if new.shape in index:
            i = next(index[new.shape])
            squares[i] = squares[i] + zero
        else:
            squares.append(zero)
    return jnp.sqrt(sum((jnp.sum(square) for square in squares), jnp.zeros(())))


def _as_kept(leaf):
    """The numbers of a leaf as its dtype has them; the compiler may leave out that they are rounded to half precision and back."""
    wide = float32(leaf)
    if wide.dtype == leaf.dtype:
        return wide
    kept = jnp.finfo(leaf.dtype)
    return jax.lax.reduce_precision(wide, kept.nexp, kept.nmant)


def _ends_early(leaf):
    """Whether a dtype ends before the square root of float32's end, as float16 does."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating) and float(jnp.finfo(leaf.dtype).max) < 1e19)


def check_state(state) -> None:
    """Raises unless a state is one of training, with a step."""
    if not isinstance(state, TrainState) and not hasattr(state, "step"):
        raise TypeError(f"The state is a {type(state).__name__}, but training has a TrainState: make one by init(params, optimizer).")


def _check_optimizer(optimizer):
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"optimizer is {optimizer!r}, but it is a gradient transformation of optax, such as optax.adamw(1e-4).")


def make_step(loss_fn, optimizer, *, ema_decay: Any = 0.999, axis_name=None, accumulate=1) -> Callable:
    """One training step.

    A step whose loss, gradient or new state is not finite leaves the state as it was and shows in its metrics. The optimiser sees gradients
    and parameters of half precision in float32, and is given optax's extra arguments: the loss as `value`, its gradient as `grad`, and as
    `value_fn` the loss of this batch and key as a function of the parameters, which line searches call.

    Args:
      loss_fn: (params, key, batch) -> loss, one number; or (loss, numbers), with a dict of further numbers by name for the metrics. Where
        the state has variables: (params, variables, key, batch) -> (loss, variables) or (loss, numbers, variables), the last like those
        given. They go from part to part of a batch, and floats among them are averaged along `axis_name`.
      optimizer: the optax gradient transformation that made the state's `opt_state`.
      ema_decay: the largest d_n of the EMA, ema <- d_n ema + (1 - d_n) params, in [0, 1); or a function of n, int32, that gives
        d_n itself, as `training.power_ema` does; or a tuple of either, for as many EMAs.
      axis_name: the axis over which `jax.pmap` maps the step: losses and gradients are averaged along it, and each
        device folds its index into the key.
      accumulate: parts of a batch whose gradients are computed one after another, to save memory, and averaged. Part i
        takes every `accumulate`-th example from the i-th on, and folds i into the key.
    Returns:
      (state, key, batch) -> (state, metrics), with metrics `loss`, `grad_norm` and `update_norm`, scalars of float32, or float64 where that
      is enabled, and the numbers of the loss function, averaged as the loss is. `update_norm` is not finite where a number of the new
      parameters, the optimiser's state, an EMA or the variables would not be. The loss function's numbers may be nan: they are measured,
      and no part of the state.
    Raises:
      TypeError: if the optimiser is none of optax; of the step, if the state is no `TrainState`, or the loss function does not take
        variables where the state has them, or takes them where it has none.
      ValueError: if an ema_decay is not in [0, 1), or accumulate is not a whole number of at least 1; of the step, if it does not
        divide the batch, the loss function gives something else than that, one of its numbers is none or has the name of one of the
        step's, the state has not as many EMAs as there are decays, or another optimiser made it.
    """
    for decay in ema_decay if isinstance(ema_decay, tuple) else (ema_decay,):
        if not callable(decay) and not (isinstance(decay, int | float | np.number | jax.Array) and 0 <= decay < 1):
            raise ValueError(
                f"ema_decay is {decay!r}, but it must be in [0, 1), a function of the step, or a tuple of these: 0 keeps no EMA, "
                "0.999 is common."
            )
    # How many arguments it takes depends on the state.
    checks.function("loss_fn", loss_fn, "loss_fn = lambda params, key, batch: losses.flow_matching(...).mean()")
    _check_optimizer(optimizer)
    checks.whole("accumulate", accumulate, "the number of parts of a batch, of which 1 takes it at once")

    def average(d_n, ema, params):
        return optax.incremental_update(float32(params), ema, 1 - d_n)

    def decays(n):
        """d_n of every average."""
        several = ema_decay if isinstance(ema_decay, tuple) else (ema_decay,)
        return [jnp.asarray(decay(n)) if callable(decay) else jnp.minimum(decay, (1 + n) / (10 + n)) for decay in several]

    def step(state, key, batch):
        check_state(state)
        check_arguments(loss_fn, state.variables)
        made = jax.eval_shape(lambda params: optimizer.init(float32(params)), state.params)
        if _shapes(made) != _shapes(state.opt_state):
            raise ValueError(
                "The state's opt_state is of another optimiser or of other parameters: make it by init(params, optimizer) with the step's."
            )
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        part = state.variables, key, batch
        (loss, (numbers, variables)), grads = gradient(loss_fn, accumulate, state.params, *part)
        if axis_name is not None:
            loss, grads, numbers = lax.pmean((loss, grads, numbers), axis_name)
            variables = mean_of_floats(variables, axis_name)
        loss, grads = float32(jnp.asarray(loss)), float32(grads)
        value_fn = value_function(loss_fn, accumulate, axis_name, state.params, *part)
        extra = {"value": loss, "grad": grads, "value_fn": value_fn}
        updates, opt_state = _update(optimizer, grads, state.opt_state, float32(state.params), extra)
        params, d = optax.apply_updates(state.params, updates), decays(state.step)
        if isinstance(ema_decay, tuple):
            if not isinstance(state.ema, tuple) or len(state.ema) != len(ema_decay):
                raise ValueError(f"The step has {len(ema_decay)} decays: make the state by init(..., emas={len(ema_decay)}).")
            ema = tuple(average(d_n, ema, params) for d_n, ema in zip(d, state.ema, strict=True))
        elif jax.tree.structure(state.ema) != jax.tree.structure(state.params):
            given = f"{len(state.ema)} EMAs" if isinstance(state.ema, tuple) else "an EMA of other parameters"
            raise ValueError(f"The state has {given}, but the step has one decay: make the state by init(params, optimizer).")
        else:
            ema = average(d[0], state.ema, params)
        new = TrainState(state.step + 1, params, opt_state, ema, variables)
        weighted = jnp.stack([(d_n >= 0) & (d_n <= 1) for d_n in d]).all()
        update_norm = jnp.where(weighted, _update_norm(updates, params, opt_state, variables, state), jnp.nan)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "update_norm": update_norm}
        return finite_where(jnp.isfinite(jnp.stack(list(metrics.values()))).all(), new, state), metrics | numbers

    return step


def _update(optimizer, grads, opt_state, params, extra):
    """The optimiser's updates and new state; those that use optax's extra arguments, such as line searches, are given them."""
    # MultiSteps takes them too, but is none of that type.
    takes = isinstance(optimizer, optax.GradientTransformationExtraArgs | optax.MultiSteps)
    try:
        return optimizer.update(grads, opt_state, params, **extra if takes else {})
    except TypeError as error:
        # Some of that type, such as sam, take others alone, also within a chain.
        if not takes or not any(f"unexpected keyword argument '{name}'" in str(error) for name in extra):
            raise
    return optimizer.update(grads, opt_state, params)


def _shapes(tree):
    """The structure of a pytree and the shapes of its leaves."""
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
