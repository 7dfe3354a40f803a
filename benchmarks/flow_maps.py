"""Flow maps: what a training step and a sample cost beside those of flow matching, a JSON line each.

    make bench-flow-maps ARGS="--out results/flow_maps.jsonl"
    python -m benchmarks.flow_maps --model DiT-B/4 --batch 128 --dtype bfloat16 --only train          on a GPU

`train`: a step of MeanFlow, and of its improved form, over one of flow matching, of the same network with two times, on the same batch
of latents of 32 x 32 x 4 with labels, with AdamW and an average of the parameters. MeanFlow adds a derivative forwards, about as much as a
forward pass, to one and a backward pass of twice its cost or more; the improved form evaluates the velocity besides. `sample`: one step of
the map over twenty Euler steps of the field. Attention is XLA's, since that of cuDNN has no derivative forwards.
"""

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks import harness, train_step
from fmjax import flow_maps, losses, paths, sampling, times, training
from fmjax.models import layers

PATH, STEPS = paths.Linear(), 20


@dataclasses.dataclass(frozen=True)
class Config(harness.Config):
    """Measures flow maps; prints one JSON line per number."""

    model: str = "DiT-S/4"
    """The transformer, DiT-{S,B,L,XL}/{2,4,8}."""
    depth: int | None = None
    """Blocks in place of the model's, for a quick trial."""
    batch: int = 16
    """Images at once."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the computation."""
    scan: bool = False
    """Whether one block is compiled and looped over."""


def flow_matching(m, key, x_0, x_1):
    return losses.flow_matching(flow_maps.velocity(m), PATH, x_0, x_1, times.stratified(key, len(x_1)))


def mean_flow(m, key, x_0, x_1):
    return flow_maps.mean_flow(m, PATH, x_0, x_1, *flow_maps.draw_interval(key, len(x_1)))


def improved(m, key, x_0, x_1):
    return flow_maps.mean_flow(m, PATH, x_0, x_1, *flow_maps.draw_interval(key, len(x_1)), tangent=flow_maps.velocity(m))


OBJECTIVES = {"flow matching": flow_matching, "MeanFlow": mean_flow, "improved MeanFlow": improved}


def setting(config):
    """A network, its parameters, a key, noise, labels, and what rows are named by."""
    embedding = layers.Sinusoids(scale=1.0)
    fields = {"time_embedding": embedding, "qk_norm": layers.RMSNorm, "end_time": True, "scan": config.scan}
    model = train_step.network(config.model, config.depth, dtype=jnp.dtype(config.dtype), **fields)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    y = jax.random.randint(keys[2], (config.batch,), 0, train_step.CLASSES)
    blocks = f", {config.depth} blocks" if config.depth is not None else ""
    name = f"{config.model}{blocks}, batch {config.batch}, {config.dtype}"
    return model, train_step.initial(model, keys[0]), keys[3], sampling.noise(keys[1], (config.batch, *train_step.SHAPE)), y, name


def train(config):
    """The train step: time, compile time, and memory beside the arguments."""
    model, params, key, x_1, y, name = setting(config)
    optimizer = optax.adamw(train_step.RATE, weight_decay=train_step.DECAY)
    state = jax.jit(lambda params: training.init(params, optimizer))(params)

    def step(objective):
        def loss_fn(params, key, batch):
            x_1, y = batch
            key_0, key = jax.random.split(key)
            m = lambda x, s, t: model.apply(params, x, s, y, end=t)  # noqa: E731
            return objective(m, key, sampling.noise(key_0, x_1.shape), x_1).mean()

        return training.make_step(loss_fn, optimizer, ema_decay=train_step.EMA_DECAY)

    steps, arguments = [step(objective) for objective in OBJECTIVES.values()], (state, key, (x_1, y))
    measured = harness.interleaved(config, harness.each(steps, *arguments))
    compiling, held = [], []
    for each in steps:
        start = time.perf_counter()
        compiled = jax.jit(lambda *arguments, each=each: each(*arguments)).lower(*arguments).compile()
        compiling.append(time.perf_counter() - start)
        held.append(train_step.memory(compiled).temp_size_in_bytes)
    for i, kind in enumerate(OBJECTIVES):
        yield harness.row(f"{name}, a step of {kind}: compile time", compiling[i], "s")
        yield harness.row(f"{name}, a step of {kind}: temporary memory, by the compiler", held[i] / 2**20, "MiB")
        if i:
            yield harness.ratio(f"{name}, a step of {kind} over one of flow matching: time", measured, i, 0, most=2.2)
            for what, values in (("compile time", compiling), ("temporary memory", held)):
                yield harness.row(f"{name}, a step of {kind} over one of flow matching: {what}", values[i] / values[0], "ratio")


def sample(config):
    """One step of the map over those of a field."""
    model, params, _, x_0, y, name = setting(config)

    def mapped(params, x_0, y):
        m = lambda x, s, t: model.apply(params, x, s, y, end=t)  # noqa: E731
        return sampling.sample_map(flow_maps.flow_map(m), x_0, times.uniform_grid(1))[0]

    def solved(params, x_0, y):
        field = lambda x, t: model.apply(params, x, t, y)  # noqa: E731
        return sampling.sample_ode(field, x_0, times.uniform_grid(STEPS), step=sampling.euler)[0]

    measured = harness.interleaved(config, harness.each([mapped, solved], params, x_0, y))
    yield harness.ratio(f"{name}, a sample in one step over one in {STEPS} Euler steps: time", measured, 0, 1)


def main(config: Config):
    harness.start()
    return harness.report(config, harness.chosen(config, (train, sample)))


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.flow_maps"))
