"""What the loop, the sharding of a step, the checkpoints and the pipeline cost: one JSON line per number.

    python -m benchmarks.parallel
    make bench-parallel ARGS="--out results/parallel.jsonl"

What a row says, and how it is measured, is at the head of `benchmarks/harness.py`. The parts, which `--only` picks:

- `loop`: `training.fit` over the bare compiled step, `STEPS` of one and of the other interleaved, both with their metrics fetched.
- `sharding`: `parallel.pmap` and a mesh of one device over `jax.jit` alone.
- `stall`: how long training waits for `Checkpointer.save` of a transformer's state, over the time until it is written.
- `verified`: the time to read that checkpoint with its checksums, over the time of Orbax to read it alone.
- `memory`: images per second of `data.pipeline` from memory, and of a bare copy of as many.
"""

import dataclasses
import functools
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness, train_step
from fmjax import checkpoints, parallel, training
from fmjax.checkpoints import store
from fmjax.data import images, pipeline
from fmjax.models import dit

STEPS = 20
"""Between two logs of the loop."""


@dataclasses.dataclass(frozen=True)
class Config(harness.Config):
    """Measures what training costs around its step; prints one JSON line per number."""

    batch: int = 16
    """Images per step."""
    width: int = 64
    """Features per patch of the transformer that is trained, so small that what goes on around it shows."""
    logs: int = 6
    """Logs of the loop in a round, each against as many bare steps."""
    model: str = "DiT-B/2"
    """The transformer whose state is saved: 130 million parameters, an optimiser and an average."""
    depth: int | None = None
    """Blocks of --model in place of its own, for a quick trial."""
    saves: int = 3
    """Checkpoints of each kind."""
    examples: int = 20_000
    """Images in memory."""


def small(config):
    """A maker of steps, a state and a batch."""
    model, optimizer = dit.DiT(patch_size=4, hidden_size=config.width, depth=4, num_heads=4, num_classes=10), optax.adamw(1e-4)
    keys, shape = jax.random.split(jax.random.key(config.seed), 2), (28, 28, 1)
    batch = jax.random.normal(keys[0], (config.batch, *shape)), jnp.arange(config.batch) % 10
    return (
        functools.partial(train_step.update, model, optimizer),
        training.init(train_step.initial(model, keys[1], shape), optimizer),
        batch,
    )


def loop(config):
    """`fit` over the bare step, both compiled anew a few times."""
    make, state, batch = small(config)
    key = jax.random.key(config.seed)

    def batches():
        while True:
            yield batch

    def once():
        """Seconds of `fit` between two logs, and of as many bare steps right after, (logs, 2)."""
        step = jax.jit(lambda state, key, batch: make()(state, jax.random.fold_in(key, state.step), batch), donate_argnums=0)
        bare_state, wall, last = jax.tree.map(jnp.copy, state), [], [0.0]

        def bare(_, row):
            nonlocal bare_state
            middle, metrics = time.perf_counter(), []
            for _ in range(STEPS):
                bare_state, metric = step(bare_state, key, batch)
                metrics.append(metric)
            jax.device_get(metrics)
            wall.append([middle - last[0], time.perf_counter() - middle])
            last[0] = time.perf_counter()

        steps = (config.logs + 1) * STEPS
        training.fit(make(), training.Run(state, key), batches(), steps=steps, log_every=STEPS, callbacks=[bare], progress=False)
        return wall[1:]

    yield harness.ratio("fit over the bare step: run time", np.array([once() for _ in range(config.repeats)]), 0, 1, most=1.02)


def sharding(config):
    """`pmap` and a mesh on one device."""
    make, state, batch = small(config)
    key, mesh = jax.random.key(config.seed), parallel.mesh(1)
    placed, spread = parallel.shard(state, mesh), jax.device_put(batch, parallel.batch_sharding(mesh))
    calls = (parallel.pmap(make(axis_name=parallel.AXIS), mesh), placed, batch), (make(), placed, spread), (make(), state, batch)
    makers = [harness.each([function], state, key, batch)[0] for function, state, batch in calls]
    timed = harness.interleaved(config, makers)
    yield harness.ratio("pmap on one device over jit: run time", timed, 0, 2)
    yield harness.ratio("mesh of one device over jit: run time", timed, 1, 2)


def large(config):
    """The state of the transformer, and what a row says of it."""
    params = train_step.initial(train_step.network(config.model, config.depth, scan=True), jax.random.key(config.seed))
    state = jax.block_until_ready(training.init(params, optax.adamw(1e-4)))
    return state, f"{config.model}, {sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9:.2g} GB"


def timed(count, *calls):
    """Seconds of the calls, (count, 1, calls), after one of each that does not count."""
    wall = []
    for _ in range(count + 1):
        wall.append([[]])
        for call in calls:
            start = time.perf_counter()
            wait = call()
            wall[-1][0].append(time.perf_counter() - start)
            if wait is not None:
                wait()
    return np.array(wall[1:])


def stall(config):
    """A save that returns at once over one that waits."""
    state, name = large(config)
    with tempfile.TemporaryDirectory() as folder, checkpoints.Checkpointer(folder, keep=1) as checkpointer:
        steps = iter(range(1000))

        def save(wait):
            checkpointer.save(training.Run(dataclasses.replace(state, step=jnp.int32(next(steps))), jax.random.key(0)), wait=wait)
            return checkpointer._finish

        measured = timed(config.saves, functools.partial(save, False), functools.partial(save, True))
    yield harness.ratio(f"a save of {name}, asynchronous over blocking: stall", measured, 0, 1)


def verified(config):
    """A checkpoint read with its checksums over one without, from the system's memory of the files both times."""
    state, name = large(config)
    verify = store.verify
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(folder + "/one", state)

        def restore(check):
            store.verify = check
            jax.block_until_ready(checkpoints.restore(folder + "/one", state))

        measured = timed(config.saves, functools.partial(restore, verify), functools.partial(restore, lambda folder, expected: None))
        store.verify = verify
    yield harness.ratio(f"a checkpoint of {name}, verified over read alone", measured, 0, 1, most=1.5)


def memory(config):
    """Batches from memory against a copy."""
    source = np.random.default_rng(config.seed).normal(size=(config.examples, 32, 32, 3)).astype(np.float32)
    size, count = 256, config.examples // 256
    arrays = images.arrays(source, np.zeros(config.examples, np.int32))
    stream = pipeline.to_device(pipeline.batches(arrays, size, seed=config.seed, threads=0))

    def piped():
        for _ in range(count):
            batch = next(stream)
        return batch

    def copied():
        for i in range(count):
            batch = jax.device_put(source[size * i : size * (i + 1)].copy())
        return batch

    measured = harness.interleaved(config, [lambda: piped, lambda: copied])
    yield harness.row("pipeline from memory, 32 x 32 x 3: images", size * count / float(np.median(measured[..., 0])), "1/s")
    yield harness.ratio("pipeline from memory over a copy: run time", measured, 0, 1)


def main(config: Config):
    harness.start(asynchronous=True)
    harness.report(config, harness.chosen(config, [loop, sharding, stall, verified, memory]))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.parallel")))
