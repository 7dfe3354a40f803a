"""What the loop, the ways to run a step, the checkpoints and the pipeline cost: one JSON line a number.

    python -m benchmarks.parallel
    make bench-parallel ARGS="--out results/parallel.jsonl"

What a row says, and how it is measured, is at the head of `benchmarks/rows.py`. The parts, which `--only` picks:

- `loop`: `training.fit` over the bare compiled step, `every` steps of one and of the other in turns, both with their metrics fetched.
- `ways`: `parallel.pmap` and a mesh of one device over `jax.jit` alone.
- `stall`: how long training waits for `Checkpointer.save` of a transformer's state, over the time until it is written.
- `verified`: the time to read that checkpoint with its checksums, over the time of Orbax to read it alone.
- `pictures`: images per second of `data.pipeline` from memory, and of a bare copy of as many.
"""

import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import rows, train_step
from fmjax import checkpoints, losses, parallel, paths, sampling, training
from fmjax.data import images, pipeline
from fmjax.models import dit


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures what training costs around its step; prints one JSON line a number."""

    out: Path | None = None
    """Where the lines are written too, once all are there."""
    batch: int = 16
    """Images a step."""
    width: int = 64
    """Of the transformer that steps, so small that what goes on around it shows."""
    every: int = 20
    """Steps of a row."""
    rows: int = 6
    """Rows of the loop in a round, each against as many bare steps."""
    model: str = "DiT-B/2"
    """The transformer whose state is saved: 130 million parameters, an optimiser and an average."""
    depth: int | None = None
    """Its blocks, for a quick look."""
    saves: int = 3
    """Checkpoints of each kind."""
    examples: int = 20_000
    """Images in memory."""
    seconds: float = 8.0
    """About how long to measure one comparison."""
    repeats: int = 11
    """Rounds of a comparison at least, unless ten times as long as that has passed."""
    precision: float = 0.01
    """Of a ratio, relative: there are more rounds until it is reached, or ten times as long as that has passed."""
    only: tuple[str, ...] = ()
    """Parts to measure, by their names; all of them where none is named."""
    seed: int = 0
    """Of the weights and the data."""


def main(config: Config):
    rows.start(asynchronous=True)
    parts = [loop, ways, stall, verified, pictures]
    rows.report(rows.measure(config, [part for part in parts if not config.only or part.__name__ in config.only]), config.out)


def small(config):
    """A step, its state and a batch."""
    model, optimizer = dit.DiT(patch_size=4, hidden_size=config.width, depth=4, num_heads=4, num_classes=10), optax.adamw(1e-4)
    keys = jax.random.split(jax.random.key(config.seed), 2)
    batch = jax.random.normal(keys[0], (config.batch, 28, 28, 1)), jnp.arange(config.batch) % 10

    def loss_fn(params, key, batch):
        x_1, y = batch
        key_0, key_t = jax.random.split(key)
        x_0, t = sampling.noise(key_0, x_1.shape), jax.random.uniform(key_t, x_1.shape[:1])
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), paths.Linear(), x_0, x_1, t).mean()

    make = functools.partial(training.make_step, loss_fn, optimizer)
    state = jax.jit(lambda key: training.init(model.init(key, batch[0][:1], 0.5, batch[1][:1]), optimizer))(keys[1])
    return make, state, batch


def loop(config):
    """`fit` over the bare step, both compiled anew a few times."""
    make, state, batch = small(config)
    key = jax.random.key(config.seed)

    def batches():
        while True:
            yield batch

    def once():
        """Seconds of rows of `fit`, and of as many bare steps right after each, (rows, 2)."""
        step = jax.jit(lambda state, key, batch: make()(state, jax.random.fold_in(key, state.step), batch), donate_argnums=0)
        bare_state = jax.tree.map(jnp.copy, state)
        wall, last = [], [0.0]

        def bare(_, row):
            nonlocal bare_state
            middle = time.perf_counter()
            metrics = []
            for _ in range(config.every):
                bare_state, metric = step(bare_state, key, batch)
                metrics.append(metric)
            jax.device_get(metrics)
            end = time.perf_counter()
            wall.append([middle - last[0], end - middle])
            last[0] = time.perf_counter()

        steps = (config.rows + 1) * config.every
        training.fit(make(), training.Run(state, key), batches(), steps=steps, log_every=config.every, callbacks=[bare], progress=False)
        return wall[1:]

    measured = np.array([once() for _ in range(config.repeats)])
    yield rows.ratio("fit over the bare step: run time", (measured, measured), 0, 1, most=1.02)


def ways(config):
    """`pmap` and a mesh on one device."""
    make, state, batch = small(config)
    key, mesh = jax.random.key(config.seed), parallel.mesh(1)
    placed, spread = parallel.shard(state, mesh), jax.device_put(batch, parallel.batch_sharding(mesh))
    mapped, step = parallel.pmap(make(axis_name=parallel.AXIS), mesh), make()
    three = (mapped, placed, key, batch), (step, placed, key, spread), (step, state, key, batch)
    timed = rows.in_turns(config, [functools.partial(rows.fresh, *each) for each in three])
    yield rows.ratio("pmap on one device over jit: run time", timed, 0, 2)
    yield rows.ratio("mesh of one device over jit: run time", timed, 1, 2)


def large(config):
    """The state of the transformer, and its size in GB."""
    model, optimizer = train_step.network(config.model, config.depth, scan=True), optax.adamw(1e-4)
    one = [jnp.zeros(shape.shape, shape.dtype) for shape in train_step.arguments((1, *train_step.SHAPE))]
    state = jax.jit(lambda key: training.init(model.init(key, *one), optimizer))(jax.random.key(config.seed))
    jax.block_until_ready(state)
    return state, sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9


def stall(config):
    """A save that returns at once over one that waits."""
    state, size = large(config)
    wall = []
    with tempfile.TemporaryDirectory() as folder, checkpoints.Checkpointer(folder, keep=1) as checkpointer:
        for i in range(config.saves + 1):
            seconds = []
            for j, wait in enumerate((False, True)):
                state = dataclasses.replace(state, step=jnp.int32(2 * i + j))
                start = time.perf_counter()
                checkpointer.save(training.Run(state, jax.random.key(0)), wait=wait)
                seconds.append(time.perf_counter() - start)
                checkpointer._finish()
            wall.append(seconds)
    measured = np.array(wall[1:])[:, None]
    yield rows.ratio(f"a save of {config.model}, {size:.2g} GB, asynchronous over blocking: stall", (measured, measured), 0, 1)


def verified(config):
    """A checkpoint read with its checksums over one without, from the system's memory of the files both times."""
    state, size = large(config)
    wall = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(folder + "/one", state)
        verify = checkpoints._verify
        for _ in range(config.saves + 1):
            seconds = []
            for check in (verify, lambda folder, expected: None):
                checkpoints._verify = check
                start = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(folder + "/one", state))
                seconds.append(time.perf_counter() - start)
            wall.append(seconds)
        checkpoints._verify = verify
    measured = np.array(wall[1:])[:, None]
    yield rows.ratio(f"a checkpoint of {config.model}, {size:.2g} GB, verified over read alone", (measured, measured), 0, 1, most=1.5)


def pictures(config):
    """Batches from memory against a copy."""
    source = np.random.default_rng(config.seed).normal(size=(config.examples, 32, 32, 3)).astype(np.float32)
    labels = np.zeros(config.examples, np.int32)
    size, count = 256, config.examples // 256
    stream = pipeline.to_device(pipeline.batches(images.arrays(source, labels), size, seed=config.seed, threads=0))

    def piped():
        for _ in range(count):
            batch = next(stream)
        return batch

    def copied():
        for i in range(count):
            batch = jax.device_put(source[size * i : size * (i + 1)].copy())
        return batch

    timed = rows.in_turns(config, [lambda: piped, lambda: copied])
    yield rows.row("pipeline from memory, 32 x 32 x 3: images", size * count / float(np.median(timed[0][..., 0])), "1/s")
    yield rows.ratio("pipeline from memory over a copy: run time", timed, 0, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
