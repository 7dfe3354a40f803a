"""Diffusion transformers on latents of 32 x 32 x 4, their train step and a guided sampler, beside PyTorch: one JSON line per number.

    python -m benchmarks.train_step --model DiT-XL/2 --variants scan remat unrolled
    make bench-train ARGS="--model DiT-S/8 --batch 2 --steps 2"             anywhere; beside PyTorch in the environment of bench-images

`train`: a step is flow matching with labels, AdamW and an average of the parameters, these three in float32 and the network in bfloat16;
the state is donated. Steps run without waiting for each other; a time is the median over the rounds of a round's mean, after one that does
not count. `sample`: Euler steps with classifier-free guidance, a step evaluates the network once, on twice the batch; weights and
computation are in bfloat16, the state in float32. MFU is the share of the device's dense peak in bfloat16 that the network's own products
make up,

    MFU = 3 F B / (seconds per step * peak),   F = 2 (sum of kernel sizes * their rows + 2 tokens^2 width depth)          (1)

where F are the operations of a forward pass on one image (a backward pass is two, and a sampler has 2 F per step), B is the batch, and
products that are computed twice because of `remat` count once.

PyTorch, where it is installed, with CUDA if JAX has a GPU, runs the same network in a process of its own: `torch.compile`, attention by
`scaled_dot_product_attention`, autocast to the same dtype, which keeps the sums of the blocks in float32 (fmjax keeps them in the dtype),
fused AdamW. It runs first, so that both have the device's memory to themselves.
"""

import dataclasses
import functools
import importlib
import math
import re
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
from fmjax import guidance, losses, paths, sampling, times, training
from fmjax.models import dit

MODELS = {f"DiT-{size}/{patch}": (getattr(dit, f"DiT_{size}"), patch) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
VARIANTS = {"scan": {"scan": True}, "remat": {"scan": True, "remat": True}, "unrolled": {}}
"""One block in a loop, the same recomputed in the backward pass, and the blocks one by one; and their settings."""
CLASSES = 1000
SHAPE = (32, 32, 4)
"""Of the latents of an image of 256 pixels."""
RATE, DECAY, EMA_DECAY = 1e-4, 0.01, 0.999
SCALE = 1.5
"""Of the guidance."""
# Operations per second in bfloat16, dense, by JAX's name of the device, from the makers' data sheets.
PEAKS = {
    r"NVIDIA H(100 80GB HBM3|200)": 989.4e12,
    r"NVIDIA A100": 312e12,
    r"TPU v4$": 275e12,
    r"TPU v5( lite|e)$": 197e12,
    r"TPU v5p?$": 459e12,
    r"TPU v6( lite|e)$": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures a diffusion transformer; prints one JSON line per number."""

    out: Path | None = None
    """File that the metrics are also written to, at the end."""
    only: tuple[str, ...] = ("train",)
    """Parts to measure: train, sample."""
    model: str | None = None
    """DiT-{S,B,L,XL}/{2,4,8}; none is DiT-XL/2, and DiT-S/8 on a CPU."""
    depth: int | None = None
    """Blocks in place of the model's, for a quick trial."""
    batch: int | None = None
    """Images at once; none is 128 for training, 64 for samples, and 2 on a CPU."""
    steps: int | None = None
    """Steps per round; none is 10 for training, 50 for samples, and 2 on a CPU."""
    repeats: int = 5
    """Rounds of the measurement."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the computation."""
    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of attention; none is cudnn for bfloat16 on an NVIDIA GPU, else xla."""
    variants: tuple[str, ...] = ("scan",)
    """Variants of the train step to measure: scan, remat, unrolled."""
    baselines: bool = True
    """Whether to measure PyTorch where it is installed."""
    seed: int = 0
    """Seed of the weights and the data."""


def main(config: Config):
    harness.start()
    harness.report(config, harness.chosen(config, [train, sample]))


def settled(config, batch, steps):
    """The configuration with nothing left open, and what a row's name says of it."""
    device = jax.devices()[0]
    cpu, cudnn = device.platform == "cpu", "NVIDIA" in device.device_kind and config.dtype == "bfloat16"
    defaults = {"model": "DiT-S/8", "batch": 2, "steps": 2} if cpu else {"model": "DiT-XL/2", "batch": batch, "steps": steps}
    defaults["attention"] = "cudnn" if cudnn else "xla"
    config = dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    blocks = f", {config.depth} blocks" if config.depth is not None else ""
    return config, f"batch {config.batch}, {config.dtype}, attention {config.attention}{blocks}"


def train(config):
    """The train step in its variants."""
    config, settings = settled(config, 128, 10)
    name = f"{config.model} train step, {settings}"
    operations = 3 * flops(network(config.model, config.depth), *SHAPE)
    yield harness.row(f"{name}: operations per image", operations / 1e9, "GFLOP")
    theirs = yield from baseline(config, name, pytorch_step, operations)
    found = {}
    for variant in config.variants:
        of = name + ("" if variant == "scan" else f", {variant}")
        seconds, held, how, compiling, temporary = found[variant] = fmjax_step(config, variant)
        yield from numbers(config, f"{of}, fmjax", seconds, operations, theirs, least=0.5)
        yield harness.row(f"{of}, fmjax: peak memory, {how}", held / 2**20, "MiB")
        yield harness.row(f"{of}, fmjax: temporary memory, by the compiler", temporary / 2**20, "MiB")
        yield harness.row(f"{of}, fmjax: compile time", compiling, "s")
    if "unrolled" in found:
        for variant in found.keys() - {"unrolled"}:
            for what, i, most in (("time", 0, None), ("temporary memory", 4, None), ("compile time", 3, 0.2)):
                yield harness.row(f"{name}, {variant} over unrolled: {what}", found[variant][i] / found["unrolled"][i], "ratio", most=most)


def sample(config):
    """The sampler."""
    config, settings = settled(config, 64, 50)
    name = f"{config.model}, {config.steps} Euler steps at guidance {SCALE:g}, {settings}"
    operations = 2 * config.steps * flops(network(config.model, config.depth), *SHAPE)
    theirs = yield from baseline(config, name, pytorch_sampler, operations)
    yield from numbers(config, f"{name}, fmjax", fmjax_sampler(config), operations, theirs)


def baseline(config, name, measure, operations):
    """The rows of PyTorch; gives its seconds, or None. `measure` does not run where CUDA is asked for and is not there."""
    cuda, packages = jax.devices()[0].platform == "gpu", {"packages": ("torch",)}
    found = harness.apart(measure, config, cuda) if config.baselines and harness.ready(measure, ("torch",)) else None
    if found is None:
        return None
    yield from numbers(config, f"{name}, PyTorch", found[0], operations, **packages)
    if cuda:
        yield harness.row(f"{name}, PyTorch: peak memory, by PyTorch", found[1] / 2**20, "MiB", **packages)
    return found[0]


def numbers(config, name, seconds, operations, theirs=None, least=None, packages=()):
    """Rows of a time: images per second, MFU where the device's peak is known, and PyTorch's time over it."""
    yield harness.row(f"{name}: time", 1e3 * seconds, "ms", packages=packages)
    yield harness.row(f"{name}: images", config.batch / seconds, "1/s", packages=packages)
    if peak := peak_of(jax.devices()[0].device_kind):
        yield harness.row(f"{name}: MFU", operations * config.batch / (seconds * peak), "ratio", least=least, packages=packages)
    if theirs is not None:
        yield harness.row(f"{name.removesuffix('fmjax')}PyTorch over fmjax: time", theirs / seconds, "ratio", packages=("torch",))


def peak_of(kind):
    """Operations per second of a device by JAX's name, or None."""
    return next((peak for pattern, peak in PEAKS.items() if re.match(pattern, kind)), None)


# The network and its train step, which the other benchmarks measure too.


def network(name, depth=None, **fields):
    """The transformer of that name, with labels."""
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}: the models are {', '.join(MODELS)}.")
    make, patch = MODELS[name]
    return make(patch_size=patch, num_classes=CLASSES, **({} if depth is None else {"depth": depth}), **fields)


def flops(model, height, width, channels=SHAPE[-1]):
    """F of (1) for a DiT with classes and without tokens beside its patches, and an image of that shape."""
    tokens = (height // model.patch_size) * (width // model.patch_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments((1, height, width, channels)))
    products = 2 * tokens**2 * model.hidden_size * model.depth
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            # The embedding of the time and the label is one row per image, not one per patch.
            products += leaf.size * (1 if {"time", "modulation", "last_modulation"} & set(names) else tokens)
    return 2 * products


def arguments(shape):
    """The shapes of a batch of images, its times and its labels."""
    return jax.ShapeDtypeStruct(shape, jnp.float32), *(jax.ShapeDtypeStruct(shape[:1], dtype) for dtype in (jnp.float32, jnp.int32))


def initial(model, key, shape=SHAPE):
    """The parameters of a network, made by one program."""
    one = [jnp.zeros(x.shape, x.dtype) for x in arguments((1, *shape))]
    return jax.jit(lambda key: model.init(key, *one))(key)


def update(model, optimizer, axis_name=None):
    """(state, key, (x_1, y)) -> (state, metrics): one step of training, which draws the noise and the times from the key."""

    def drawn(params, key, batch):
        x_1, y = batch
        key_0, key_t = jax.random.split(key)
        x_0, t = sampling.noise(key_0, x_1.shape), jax.random.uniform(key_t, x_1.shape[:1])
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), paths.Linear(), x_0, x_1, t).mean()

    return training.make_step(drawn, optimizer, ema_decay=EMA_DECAY, axis_name=axis_name)


def step(model, optimizer):
    """The same, from one key for all steps."""
    once = update(model, optimizer)
    return lambda state, key, batch: once(state, jax.random.fold_in(key, state.step), batch)


def memory(compiled):
    """What the compiler says of a program's memory."""
    counted = compiled.memory_analysis()
    if counted is None:
        raise RuntimeError(f"The compiler for {jax.devices()[0].device_kind} does not count memory, so there is no row to print.")
    return counted


# The measurements.


def setting(config, **fields):
    """A network, its parameters, a key, noise or images, and labels."""
    model = network(config.model, config.depth, dtype=jnp.dtype(config.dtype), attention=config.attention, **fields)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    y = jax.random.randint(keys[2], (config.batch,), 0, CLASSES)
    return model, initial(model, keys[0]), keys[3], sampling.noise(keys[1], (config.batch, *SHAPE)), y


def fmjax_step(config, variant):
    """Seconds of a step, bytes at the peak, who counted them, seconds to compile, and bytes of temporaries."""
    model, params, key, x_1, y = setting(config, **VARIANTS[variant])
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    state, start = jax.jit(lambda params: training.init(params, optimizer))(params), time.perf_counter()
    compiled = jax.jit(step(model, optimizer), donate_argnums=0).lower(state, key, (x_1, y)).compile()
    compiling, counted = time.perf_counter() - start, memory(compiled)
    del params

    def once():
        nonlocal state
        state, metrics = compiled(state, key, (x_1, y))
        return metrics

    def wait(metrics):
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"The loss is {metrics['loss']}.")

    seconds = harness.mean_seconds(config.steps, config.repeats, once, wait)
    # Of a process, so of the first variant that it measures.
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") if variant == config.variants[0] else None
    how = "by the compiler" if held is None else "by the device"
    if held is None:
        held = counted.argument_size_in_bytes + counted.output_size_in_bytes - counted.alias_size_in_bytes + counted.temp_size_in_bytes
    return seconds, held, how, compiling, counted.temp_size_in_bytes


def fmjax_sampler(config):
    """Seconds of a run."""
    model, params, _, x_0, y = setting(config, scan=True)
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)

    def run(params, x_0, y):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, CLASSES, SCALE)
        return sampling.sample_ode(field, x_0, times.uniform_grid(config.steps), step=sampling.euler)[0]

    return harness.mean_seconds(1, config.repeats, functools.partial(jax.jit(run), params, x_0, y), jax.block_until_ready)


def pytorch_setting(config, cuda):
    """PyTorch, the module with the reference, the network, a batch of images and labels, and the dtype; or None without its CUDA."""
    torch = importlib.import_module("torch")
    if cuda and not torch.cuda.is_available():
        return None
    from benchmarks import pytorch as reference

    torch.manual_seed(config.seed)
    where = torch.device("cuda" if cuda else "cpu")
    x, y = torch.randn((config.batch, SHAPE[-1], *SHAPE[:-1]), device=where), torch.randint(0, CLASSES, (config.batch,), device=where)
    return torch, reference, reference.DiT(network(config.model, config.depth), SHAPE).to(where), x, y, getattr(torch, config.dtype)


def pytorch_step(config, cuda):
    """Seconds of PyTorch's step, and bytes at the peak."""
    if (found := pytorch_setting(config, cuda)) is None:
        return None
    torch, reference, model, x_1, y, dtype = found
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    take = reference.trainer(torch.compile(model), optimizer, EMA_DECAY, dtype)
    seconds = harness.mean_seconds(config.steps, config.repeats, lambda: take(x_1, y), lambda loss: loss.item())
    return seconds, torch.cuda.max_memory_allocated() if cuda else None


def pytorch_sampler(config, cuda):
    """Seconds of PyTorch's sampler, its loop in Python, and bytes at the peak."""
    if (found := pytorch_setting(config, cuda)) is None:
        return None
    torch, reference, model, x_0, y, dtype = found
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    run = reference.sampler(torch.compile(model), np.linspace(0, 1, config.steps + 1), SCALE, dtype)
    seconds = harness.mean_seconds(1, config.repeats, lambda: run(x_0, y, CLASSES), lambda x: x.sum().item())
    return seconds, torch.cuda.max_memory_allocated() if cuda else None


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.train_step")))
