"""One step on many devices, in one process or in many.

A step is a pure function of whole arrays, `(state, key, batch) -> (state, metrics)`; where its arrays lie says what each
device holds and what they tell each other. So the ways to run it differ in where the state lies, in one argument:

    mesh = parallel.mesh()
    state = parallel.create(lambda: training.init(model.init(key, x, t), optimizer), mesh, parallel.fully_sharded)
    stream = pipeline.to_device(pipeline.batches(source, 256), sharding=parallel.batch_sharding(mesh))
    run = training.fit(step, training.Run(state, key), stream, steps=steps)

The state lies where one of these says, or a function of your own:

    replicated         every device holds the state and a part of the batch; gradients are averaged       (data parallel)
    fully_sharded      every device holds a part of each large array of the state too                     (FSDP, ZeRO-3)

`pmap` is the older way to say the first: it maps a step made with `axis_name` over the parts of a batch. Every random number
is drawn for the whole batch and then divided, so results do not depend on the number of devices; under `pmap` each device
draws for its part alone, as `make_step(accumulate=...)` does for as many parts on one device.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmjax import checks
from fmjax.training.progress import bar

__all__ = [
    "mesh",
    "create",
    "shard",
    "replicated",
    "fully_sharded",
    "batch_sharding",
    "constrain_activations",
    "pmap",
    "AXIS",
    "sample",
    "initialize",
    "on_first",
    "require_memory",
]

AXIS = "data"
"""The name of the mesh's axis."""


def initialize(coordinator=None, processes=None, index=None, *, connect=300, timeout=100) -> None:
    """Connects the processes of a job; call it before any other use of JAX, and not at all for a single process.

    On Slurm, on Cloud TPU and under Open MPI the arguments are found by JAX. When a process dies, the others end too.

    Args:
      coordinator: "host:port" of process 0.
      processes: how many there are.
      index: of this process.
      connect: seconds to wait for the others.
      timeout: seconds without a sign of life after which a process counts as dead.
    Raises:
      ValueError: if only some are given, or the index is not one of that many processes.
      RuntimeError: if the processes do not find each other, or disagree about their number.
    """
    given = {"coordinator": coordinator, "processes": processes, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} must be given too: coordinator, processes and index go together, or none of them.")
    if processes is not None and index is not None and not 0 <= index < processes:
        raise ValueError(f"index is {index}; expected one in [0, {processes}), the number of processes.")
    try:
        jax.distributed.initialize(coordinator, processes, index, initialization_timeout=connect, heartbeat_timeout_seconds=timeout)
    except Exception as error:
        raise RuntimeError(
            f"The processes of this job did not connect ({_first_line(error)}). Give every one the same coordinator and number of "
            "processes, and an index of its own; outside Slurm, Open MPI and Cloud TPU all three must be given."
        ) from error
    if processes is not None and jax.process_count() != processes:
        raise RuntimeError(f"This job has {jax.process_count()} processes, but {processes} were said: end the others and start again.")


def on_first(function) -> Any:
    """Calls a function in process 0 of a job alone, once all processes are there; where it fails, every process raises.

    Args:
      function: of nothing.
    Returns:
      What the function gives, in process 0, and None in the others.
    Raises:
      RuntimeError: in the others, if it failed in process 0.
    """
    if jax.process_count() == 1:
        return function()
    result, failed = None, None
    # What process 0 changes now, no other still reads.
    anywhere(False)
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as error:
            failed = error
    if anywhere(failed is not None):
        raise failed or RuntimeError("Process 0 of this job could not go on, and says why.")
    return result


def anywhere(flag) -> bool:
    """Whether a flag is set in any process of a job, which all call."""
    return bool(flag) if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(bool(flag)))))


def mesh(count=None, devices=None) -> Mesh:
    """Devices in a row.

    Args:
      count: how many; by default all, of all processes.
      devices: to choose from, by default `jax.devices()`.
    Returns:
      A mesh with the axis `AXIS`, which the compiler divides work along on its own (`AxisType.Auto`).
    Raises:
      ValueError: if there are not so many devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices) if count is None else count
    if not 1 <= count <= len(devices):
        raise ValueError(f"A mesh of {count} devices was asked for; there are {len(devices)}: give a count from 1 to {len(devices)}.")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"A mesh of {count} of {len(devices)} devices would leave processes out: start fewer, or use all.")
    return Mesh(np.array(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(tree, mesh) -> Any:
    """Everything on every device.

    Args:
      tree: a pytree of arrays or shapes.
      mesh: the devices.
    Returns:
      A pytree of shardings.
    """
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def fully_sharded(tree, mesh, min_size=2**14) -> Any:
    """Every array in equal parts, a part per device, along its longest axis that divides; small ones on every device.

    Args:
      tree: a pytree of arrays or shapes: parameters, optimiser and averages alike.
      mesh: the devices.
      min_size: elements of the smallest array that is divided; smaller ones cost more to fetch than to keep.
    Returns:
      A pytree of shardings.
    """

    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if leaf.size < min_size or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(AXIS if axis == longest else None for axis in range(leaf.ndim))))

    return jax.tree.map(sharding, tree)


def create(make, mesh, sharding=replicated) -> Any:
    """A pytree whose arrays are made where they belong, so that no device ever holds all of it.

    Args:
      make: a function of nothing that gives a pytree, as `lambda: training.init(model.init(key, x, t), optimizer)`.
      mesh: the devices.
      sharding: `replicated`, `fully_sharded`, or any function `(shapes, mesh) -> shardings`.
    Returns:
      The pytree.
    Raises:
      MemoryError: if a device cannot hold its part.
    """
    shapes = jax.eval_shape(make)
    shardings = sharding(shapes, mesh)
    require_memory(jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings))
    return jax.jit(make, out_shardings=shardings)()


def shard(tree, mesh, sharding=replicated) -> Any:
    """A pytree that exists, where it belongs; every process gives the same values.

    Args:
      tree: of arrays.
      mesh: the devices.
      sharding: as for `create`.
    Returns:
      The pytree.
    """
    return jax.tree.map(jax.device_put, tree, sharding(tree, mesh))


def batch_sharding(mesh, size=None) -> NamedSharding:
    """A part of the examples on every device, for `pipeline.to_device`, `jax.device_put` and the noise that a sampler begins with.

    Args:
      mesh: the devices.
      size: of the batch, where it is to be checked before anything is allocated.
    Returns:
      A sharding of arrays `(B, ...)`.
    Raises:
      ValueError: if the devices do not divide the batch.
    """
    if size is not None and size % mesh.size:
        raise ValueError(
            f"The batch of {size} does not divide among {mesh.size} devices: give a multiple, such as {-(-size // mesh.size) * mesh.size}."
        )
    return NamedSharding(mesh, PartitionSpec(AXIS))


def require_memory(tree) -> None:
    """Raises unless every device of this process can hold its part of a pytree beside what it holds already.

    Args:
      tree: of `jax.ShapeDtypeStruct`s with shardings.
    Raises:
      MemoryError: if one cannot; where the device does not say what it has, as a CPU, nothing is raised.
    """
    leaves = jax.tree.leaves(tree)
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    devices = {device for leaf in leaves for device in leaf.sharding.addressable_devices}
    for device in devices:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
        if needed > free:
            raise MemoryError(
                f"A device's part of these arrays takes {needed / 2**30:.3g} GiB, and {device} has {free / 2**30:.3g} GiB free: "
                "use more devices, or parallel.fully_sharded."
            )


def constrain_activations(step, mesh) -> Callable:
    """A step whose Flax modules keep what they take and give divided by examples, as `fully_sharded` needs.

    Left alone, the compiler may fetch the activations of the whole batch to a part of the weights, rather than the weights of a
    layer to a part of the batch.

    Args:
      step: a pure function `(state, key, batch) -> (state, metrics)`.
      mesh: the devices.
    Returns:
      A function of the same arguments and values.
    """
    sharding = batch_sharding(mesh)

    def divide(x):
        examples = isinstance(x, jax.Array) and x.ndim > 1 and x.shape[0] % mesh.size == 0
        return lax.with_sharding_constraint(x, sharding) if examples else x

    def around(call, arguments, keywords, context):
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        arguments, keywords = jax.tree.map(divide, (arguments, keywords))
        return jax.tree.map(divide, call(*arguments, **keywords))

    def run(state, key, batch):
        with nn.intercept_methods(around):
            return step(state, key, batch)

    return run


def pmap(step, mesh) -> Callable:
    """A step of `make_step(..., axis_name=parallel.AXIS)`, mapped over the devices by `jax.pmap`.

    With several processes it is `jax.shard_map`, which `jax.pmap` runs as and which takes arrays of all processes.

    Args:
      step: a pure function `(state, key, batch) -> (state, metrics)` that averages over `AXIS`.
      mesh: the devices.
    Returns:
      A function of the same arguments: the state is the unreplicated one, the batch is whole, and each device takes its part.
    Raises:
      ValueError: of the function, if the devices do not divide the batch, or the step does not average over them.
    """
    checked = False
    if jax.process_count() > 1:
        everywhere, part = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, everywhere, part), out_specs=everywhere, check_vma=False)
    else:
        by_device = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=list(mesh.devices.flat))

        def mapped(state, key, batch):
            return by_device(state, key, jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch))

    def run(state, key, batch):
        leaves = jax.tree.leaves(batch)
        if not leaves:
            raise ValueError("The batch has no arrays, so no device has a part of it: give indices as a batch where there is no data.")
        batch_sharding(mesh, len(leaves[0]))
        nonlocal checked
        if not checked:
            _require_averages(step, mesh.size, state, key, batch)
            checked = True
        return mapped(state, key, batch)

    return run


def _require_averages(step, count, state, key, batch):
    """Raises where what a step gives depends on the part of a device: `jax.pmap` would return the first device's and say nothing."""
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, len(x) // count, *x.shape[1:]), x.dtype), batch)
    try:
        jax.eval_shape(jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS), state, key, part)
    except ValueError as error:
        if "out_axes" in str(error):
            raise ValueError(
                "The step gives every device a state of its own, since it does not average over the devices: make it with "
                "make_step(..., axis_name=parallel.AXIS), or average with jax.lax.pmean(..., parallel.AXIS)."
            ) from error
        raise


def sample(function, key, n, *, chunk, mesh=None, progress=True) -> Any:
    """Many samples, a chunk that fits the device at a time, in the host's memory.

    Each call compiles the function anew, with the arrays that it closes over as constants: draw all samples in one call. Example i
    depends on the key and on i alone, up to rounding: not on the chunk, nor on the number of devices.

    Args:
      function: (keys (chunk,), indices (chunk,)) -> any pytree of arrays (chunk, ...); compiled once. Labels may come from the
        indices: `lambda keys, i: sampler(params, keys, i % 10)`.
      key: a typed key; example i's is `jax.random.fold_in(key, i)`.
      n: how many.
      chunk: how many at a time.
      mesh: devices to divide a chunk among; by default the one that JAX computes on.
      progress: whether to show a bar with samples per second and the time left.
    Returns:
      The pytree with NumPy arrays (n, ...), on every process.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if there is nothing to draw, the devices do not divide the chunk, or an array of the function is not (chunk, ...).
    """
    checks.function("function", function, "lambda keys, indices: sampler(params, keys, indices % 10)")
    checks.whole("n", n, "how many samples are drawn")
    checks.whole("chunk", chunk, "how many samples are drawn at a time")
    checks.key(key)
    sharding = None if mesh is None else batch_sharding(mesh, chunk)

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(first):
        indices = first + jnp.arange(chunk)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        if sharding is not None:
            indices, keys = lax.with_sharding_constraint((indices, keys), sharding)
        drawn = function(keys, indices)
        for path, leaf in jax.tree_util.tree_leaves_with_path(drawn):
            if jnp.shape(leaf)[:1] != (chunk,):
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"The function gives {f'{name} of ' if name else ''}shape {jnp.shape(leaf)} for {chunk} keys, but arrays have a row "
                    f"per key, ({chunk}, ...): map what draws one sample by jax.vmap."
                )
        return drawn

    samples, waiting = None, None
    starts = range(0, n, chunk)
    with bar("sampling", "samples", n) if progress and jax.process_index() == 0 else contextlib.nullcontext() as show:
        for start in (*starts, None):
            # The device has its next chunk before the host fetches the last one.
            drawn = None if start is None else (start, draw(start))
            if waiting is not None:
                samples = _store(samples, *waiting, n)
                if show:
                    show(min(waiting[0] + chunk, n))
            waiting = drawn
    return samples


def _store(samples, first, values, n):
    """Puts a chunk's arrays, of which the last may be longer than what is left, into those of all samples."""
    gather = jax.process_count() > 1
    parts = jax.tree.map(lambda a: multihost_utils.process_allgather(a, tiled=True) if gather else np.asarray(a), values)
    if samples is None:
        samples = jax.tree.map(lambda a: np.empty((n, *a.shape[1:]), a.dtype), parts)
    for whole, part in zip(jax.tree.leaves(samples), jax.tree.leaves(parts), strict=True):
        whole[first : first + len(part)] = part[: n - first]
    return samples


def _first_line(error):
    return str(error).strip().partition("\n")[0]
