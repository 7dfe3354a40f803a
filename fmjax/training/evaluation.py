"""Evaluation: what a metric gives for each example of a finite stream, its mean and the error of that, and a loss by its times.

    m = sum_i m_i / n,   s = sqrt(sum_i (m_i - m)^2 / (n (n - 1)))        mean and its standard error          (1)

    def metric(params, keys, batch):
        x_1, _ = batch
        key_0, key_t = jax.vmap(jax.random.split, out_axes=1)(keys)
        x_0, t = sampling.noise(key_0, x_1.shape), jax.vmap(jax.random.uniform)(key_t)
        return losses.flow_matching(lambda x, t: model.apply(params, x, t), path, x_0, x_1, t)

    held_out = training.evaluate(metric, run.state.ema, key, pipeline.in_order(source, 256))

Example i draws from `fold_in(key, i)`, so what is measured depends neither on the batches nor on the devices.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from fmjax import checks


class Mean(NamedTuple):
    """A mean over examples and its standard error, as `evaluate` gives them."""

    mean: float
    """nan where any example's number is."""
    standard_error: float
    """Of the mean; nan for a single example."""
    count: int
    """Examples."""


def evaluate(metric, state, key, batches, *, sharding=None) -> Any:
    """The mean of a metric over all examples of a finite stream, and its standard error, in float64 on the host.

    m = sum_i m_i / n,   s = sqrt(sum_i (m_i - m)^2 / (n (n - 1)))

    Args:
      metric: (state, keys, batch) -> numbers (B,), one per example, or a dict of such; compiled once, also for further calls with the same
        function. `keys` are the examples' own, (B,), to be split before two draws.
      state: what the metric takes, such as parameters or a `TrainState`; an argument, so that another one compiles nothing.
      key: a typed key.
      batches: an iterable of batches, pytrees of arrays (B, ...), as `pipeline.in_order` gives every example of a source once. The last, or
        any other, may be smaller than the first: it is filled up with its own examples, which do not count.
      sharding: of a batch, as `parallel.batch_sharding(mesh)`; sizes are filled up to divide among its devices.
    Returns:
      A `Mean`, or a dict of them.
    Raises:
      TypeError: if the key is not typed, or the batches are arrays or a tuple of them.
      ValueError: if there is no batch, one is larger than the first, or the metric gives no numbers (B,).
    """
    totals, named = {}, False
    for values in per_example(metric, state, key, batches, sharding=sharding):
        named = isinstance(values, dict)
        values = values if named else {"": values}
        totals = {name: _add(totals.get(name, (0, 0.0, 0.0)), each) for name, each in values.items()}
    means = {name: _mean(*total) for name, total in totals.items()}
    return means if named else means[""]


def per_example(metric, state, key, batches, *, sharding=None) -> Iterator:
    """What a metric gives for the examples of each batch, for accumulators of one's own, as `np.concatenate(list(...))` is one.

    Args:
      metric, state, key, batches, sharding: as for `evaluate`.
    Returns:
      An iterator with a NumPy array of float64, or a dict of them, for each batch, without what fills it up.
    Raises:
      TypeError, ValueError: as `evaluate`, when the iterator is asked.
    """
    checks.function("metric", metric, "lambda params, keys, batch: losses.flow_matching(...)")
    checks.key(key)
    if isinstance(batches, tuple | dict | str) or hasattr(batches, "shape") or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"batches is a {type(batches).__name__}, but it is an iterable of batches: give pipeline.in_order(source, size), or a list."
        )
    return _each(metric, state, key, batches, sharding)


def _each(metric, state, key, batches, sharding):
    first, size, waiting = 0, None, None
    for batch in batches:
        count = _size(batch)
        if size is None:
            parts = 1 if sharding is None else sharding.num_devices
            size, largest = -(-count // parts) * parts, count
        if count > largest:
            raise ValueError(
                f"A batch has {count} examples, but the first had {largest}: batches have one size, and the last may be smaller."
            )
        if count < size:
            index = np.arange(size) % count
            batch = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], batch)
        if sharding is not None:
            batch = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), batch)
        # The device has its next batch before the host fetches the last one.
        measured = _measure(metric, sharding, state, key, first, batch), count
        if waiting is not None:
            yield _fetch(*waiting)
        first, waiting = first + count, measured
    if waiting is None:
        raise ValueError("There are no batches, so there is no mean: an iterator that was used up gives none again.")
    yield _fetch(*waiting)


@functools.partial(jax.jit, static_argnames=("metric", "sharding"))
def _measure(metric, sharding, state, key, first, batch):
    size = _size(batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(size))
    if sharding is not None:
        keys = jax.lax.with_sharding_constraint(keys, sharding)
    values = metric(state, keys, batch)
    for name, value in (values if isinstance(values, dict) else {"": values}).items():
        if not hasattr(value, "dtype") or value.shape != (size,) or jnp.issubdtype(value.dtype, jnp.complexfloating):
            given = f"shape {jnp.shape(value)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
            raise ValueError(
                f"The metric gives {given}{f' as {name!r}' if name else ''} for a batch of {size}, but it gives a real number per example, "
                f"({size},), or a dict of these: take no mean over the batch."
            )
    if sharding is not None:
        values = jax.lax.with_sharding_constraint(values, NamedSharding(sharding.mesh, PartitionSpec()))
    return values


def _size(batch):
    """The number of examples of a batch."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        given = ", ".join(sorted(str(size[0]) if size else "no" for size in sizes)) or "no"
        raise ValueError(f"A batch has arrays of {given} examples: give arrays (B, ...), with one B for all and at least 1.")
    return sizes.pop()[0]


def _fetch(values, count):
    return jax.tree.map(lambda value: np.asarray(value).astype(np.float64)[:count], values)


def _add(total, values):
    """(n, mean, sum of squares about it) of the examples so far and these    (Chan, Golub, LeVeque 1983, "Algorithms for computing the
    sample variance")."""
    n, mean, squares = total
    more, other = len(values), values.mean()
    difference = other - mean
    both = n + more
    return both, mean + difference * more / both, squares + ((values - other) ** 2).sum() + difference**2 * n * more / both


def _mean(n, mean, squares):
    return Mean(float(mean), float(np.sqrt(squares / (n - 1) / n)) if n > 1 else np.nan, n)


def loss_by_time(losses, times, edges) -> tuple[Any, Any, Any]:
    """The mean of losses in bins of their times, with standard errors, as `evaluate` has them.

    Args:
      losses: one per example, (N,).
      times: theirs, (N,).
      edges: of the bins, increasing, such as `np.linspace(0, 1, 11)`; a bin has its lower edge, and the last its upper one too.
    Returns:
      The means, their standard errors and how many losses there are, for each bin: of JAX where losses or times are, also inside
      `jax.jit`, else of NumPy in float64. A bin without losses has nan, nan and 0; one with a single loss has no standard error, nan.
    Raises:
      ValueError: if losses and times are not (N,) alike, the edges do not increase, or a time is known to be in no bin; inside `jax.jit`
        it counts in the first or the last.
    """
    on_device = any(isinstance(each, jax.Array) for each in (losses, times))
    checks.grid(edges, jnp.float32, "edges")
    edges = np.asarray(edges, np.float64)
    if jnp.ndim(losses) != 1 or jnp.shape(losses) != jnp.shape(times) or not jnp.size(losses):
        raise ValueError(f"losses have shape {jnp.shape(losses)} and times {jnp.shape(times)}, but there is one time per loss, (N,).")
    if not isinstance(times, Tracer):
        given = np.asarray(times, np.float64)
        # In the precision of the times, where an edge is rounded as they are.
        outside = ~((given >= edges[0] - 1e-6) & (given <= edges[-1] + 1e-6))
        if outside.any():
            raise ValueError(
                f"times has {given[outside][0]}, which is in no bin from {edges[0]:g} to {edges[-1]:g}: give edges around all."
            )
    if on_device:
        times = jnp.asarray(times)
        return _in_bins(jnp, jnp.asarray(losses), times.astype(jnp.promote_types(times.dtype, jnp.float32)), edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _in_bins(np, np.asarray(losses, np.float64), np.asarray(times, np.float64), edges)


def _in_bins(xp, losses, times, edges):
    losses = losses.astype(xp.promote_types(losses.dtype, np.float32))
    inner = xp.asarray(edges[1:-1], times.dtype)
    bins = xp.searchsorted(inner, times, side="right")
    inside = bins[None] == xp.arange(len(edges) - 1)[:, None]
    count = inside.sum(1)
    mean = xp.where(inside, losses[None], 0).sum(1) / count
    squares = xp.where(inside, (losses - mean[bins])[None] ** 2, 0).sum(1)
    error = xp.sqrt(squares / (count - 1) / count)
    return mean, xp.where(count > 1, error, xp.nan), count


def watch(function, *, every=1) -> Any:
    """A callback for `fit` that adds numbers of the averaged parameters to the metrics, such as how straight the flow is.

        def numbers(params):
            saved = sampling.sample_ode(field(params), x_0, grid, save=lambda x, t: x)[1]
            return {"straightness": metrics.straightness(saved, grid).mean()}

        run = training.fit(step, run, batches, steps=10, callbacks=[training.watch(numbers), training.json_lines("history.jsonl")])

    The loss by its times is another: `training.loss_by_time(loss, t, jnp.linspace(0, 1, 5))[0][-1]` is its mean in the last quarter.

    Args:
      function: params -> a dict of numbers; compiled once. It is given `run.state.ema`.
      every: logs after which it is called, from the first on; those between have none of its numbers.
    Returns:
      A function `(run, metrics)`; it goes before callbacks that write metrics.
    Raises:
      TypeError: if the function is none; when it is called, if it gives no dict of numbers.
      ValueError: if every is not a whole number of at least 1; when it is called, if a name is one of the metrics already.
    """
    checks.function("function", function, 'lambda params: {"straightness": ...}')
    checks.whole("every", every, "after how many logs it is called")
    compiled = jax.jit(function)

    def callback(run, metrics):
        # By the run's history, so that one that goes on is watched where it would have been.
        if (len(run.history) - 1) % every:
            return
        found = compiled(run.state.ema)
        if not isinstance(found, dict) or any(jnp.shape(value) != () or not jnp.isrealobj(value) for value in found.values()):
            raise TypeError(f"The function that is watched gives {jax.tree.map(jnp.shape, found)}, but it gives a dict of numbers.")
        if taken := found.keys() & metrics.keys():
            raise ValueError(f"The function that is watched gives {sorted(taken)}, which the metrics have already: give other names.")
        metrics.update({name: float(value) for name, value in found.items()})

    return callback
