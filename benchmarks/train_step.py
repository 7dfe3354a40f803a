"""The train step of diffusion transformers on latents of 32 x 32 x 4: one JSON line a number.

    python -m benchmarks.train_step --model DiT-XL/2 --batch 128
    make bench-train ARGS="--model DiT-S/8 --batch 2 --steps 2"             anywhere

A step is flow matching with labels, AdamW and an average of the parameters, these three in float32 and the network in bfloat16;
the state is donated and the blocks are a scan. Steps run without waiting for each other; a time is the median over the rounds
of a round's mean, after one that does not count.

MFU is the share of the device's dense peak in bfloat16 that the network's own products make up,

    MFU = 3 F B / (seconds per step * peak),   F = 2 (sum of kernel sizes * their rows + 2 tokens^2 width depth)            (1)

where F are the operations of a forward pass on one image (a backward pass is two), B is the batch, and products that are computed
twice because of `--remat` count once.

PyTorch, where it is installed with CUDA or asked for, trains the same network in a process of its own: compiled by
`torch.compile`, attention by `scaled_dot_product_attention`, autocast to the same dtype, which keeps the sums of the blocks in
float32 (fmjax keeps them in the dtype), fused AdamW. It runs first, so that both have the device's memory to themselves.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import math
import multiprocessing
import os
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

from benchmarks import rows
from fmjax import losses, paths, sampling, training
from fmjax.models import dit

MODELS = {f"DiT-{size}/{patch}": (getattr(dit, f"DiT_{size}"), patch) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
CLASSES = 1000
SHAPE = (32, 32, 4)
"""Of the latents of an image of 256 pixels."""
RATE, DECAY, EMA_DECAY = 1e-4, 0.01, 0.999
# Operations a second in bfloat16, dense, by JAX's name of the device, from the makers' data sheets.
PEAKS = {
    r"NVIDIA H100 80GB HBM3": 989.4e12,
    r"NVIDIA H200": 989.4e12,
    r"NVIDIA A100": 312e12,
    r"TPU v4$": 275e12,
    r"TPU v5( lite|e)$": 197e12,
    r"TPU v5p?$": 459e12,
    r"TPU v6( lite|e)$": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the train step of a diffusion transformer; prints one JSON line a number."""

    out: Path | None = None
    """Where the lines are written too, once all are there."""
    model: str | None = None
    """DiT-{S,B,L,XL}/{2,4,8}; none is DiT-XL/2, and DiT-S/8 on a CPU."""
    depth: int | None = None
    """Blocks in place of the model's, for a quick look."""
    batch: int | None = None
    """Images a step; none is 128, and 2 on a CPU."""
    steps: int | None = None
    """Steps a round; none is 10, and 2 on a CPU."""
    repeats: int = 5
    """Rounds."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; parameters are float32."""
    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of attention; none is cudnn for bfloat16 on an NVIDIA GPU, else xla."""
    remat: bool = False
    """Whether to recompute each block in the backward pass."""
    scan: bool = True
    """Whether to compile one block and loop over it."""
    peers: bool = True
    """Whether to measure PyTorch where it is installed with CUDA."""
    pytorch: bool = False
    """Whether to measure it without CUDA too."""
    seed: int = 0
    """Of the weights and the data."""


def main(config: Config):
    # So that the memory that is not in use is left to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows.start()
    rows.report(measure(config), config.out)


def settled(config, device, batch=128, steps=10):
    """The configuration with nothing left open; a batch and steps for what is not a CPU."""
    cpu = device.platform == "cpu"
    small = {"model": "DiT-S/8", "batch": 2, "steps": 2} if cpu else {"model": "DiT-XL/2", "batch": batch, "steps": steps}
    cudnn = device.platform == "gpu" and "NVIDIA" in device.device_kind and config.dtype == "bfloat16"
    defaults = small | {"attention": "cudnn" if cudnn else "xla"}
    return dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def measure(config):
    """All rows."""
    device = jax.devices()[0]
    config = settled(config, device)
    model = network(
        config.model,
        config.depth,
        dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        remat=config.remat,
        scan=config.scan,
    )
    peak = peak_of(device.device_kind)
    if peak is None:
        print(f"No MFU: the peak of {device.device_kind} is not known here", file=sys.stderr)
    operations = 3 * flops(model, *SHAPE)

    settings = [f"batch {config.batch}", config.dtype, f"attention {config.attention}"]
    settings += [f"{config.depth} blocks"] * (config.depth is not None) + ["remat"] * config.remat + ["unrolled"] * (not config.scan)
    name = f"{config.model} train step, {', '.join(settings)}"
    yield rows.row(f"{name}: operations per image", operations / 1e9, "GFLOP")

    theirs = None
    if (config.peers or config.pytorch) and rows.ready(pytorch, ("torch",), "bench-networks"):
        # In a new process, whose end gives the memory back.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            theirs = pool.submit(pytorch, config).result()
    ours = fmjax(config, model, device)
    for who, packages, measured in (("fmjax", (), ours), ("PyTorch", ("torch",), theirs)):
        if measured is None:
            continue
        seconds, held, how = measured
        yield rows.row(f"{name}, {who}: time", 1e3 * seconds, "ms", packages=packages)
        yield rows.row(f"{name}, {who}: images", config.batch / seconds, "1/s", packages=packages)
        if held is not None:
            yield rows.row(f"{name}, {who}: peak memory, {how}", held / 2**20, "MiB", packages=packages)
        if peak is not None:
            least = 0.5 if who == "fmjax" else None
            share = operations * config.batch / (seconds * peak)
            yield rows.row(f"{name}, {who}: MFU", share, "ratio", least=least, packages=packages)
    if theirs is not None:
        yield rows.row(f"{name}, PyTorch over fmjax: time", theirs[0] / ours[0], "ratio", packages=("torch",))


def peak_of(kind):
    """Operations a second of a device by JAX's name, or None."""
    return next((peak for pattern, peak in PEAKS.items() if re.match(pattern, kind)), None)


# The network and its train step, which benchmarks.networks measures too.


def network(name, depth=None, **fields):
    """The transformer of that name, with labels."""
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}: the models are {', '.join(MODELS)}.")
    make, patch = MODELS[name]
    return make(patch_size=patch, num_classes=CLASSES, **({} if depth is None else {"depth": depth}), **fields)


def flops(model, height, width, channels=SHAPE[-1]):
    """Operations of the matrix products of a forward pass on one image, two a multiplication with its addition    (1).

    Args:
      model: a DiT with classes and without tokens beside its patches.
      height: of the image.
      width: of the image.
      channels: of the image.
    Returns:
      F of (1).
    """
    tokens = (height // model.patch_size) * (width // model.patch_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments((1, height, width, channels)))
    products = 2 * tokens**2 * model.hidden_size * model.depth
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            # The embedding of the time and the label is one row per image, not one a patch.
            products += leaf.size * (1 if {"time", "modulation", "last_modulation"} & set(names) else tokens)
    return 2 * products


def arguments(shape):
    """The shapes of a batch of images, its times and its labels."""
    return jax.ShapeDtypeStruct(shape, jnp.float32), *(jax.ShapeDtypeStruct(shape[:1], dtype) for dtype in (jnp.float32, jnp.int32))


def loss(model, params, x_0, x_1, t, y):
    """Flow matching on the linear path, the batch's mean."""
    return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), paths.Linear(), x_0, x_1, t).mean()


def step(model, optimizer):
    """(state, key, (x_1, y)) -> (state, metrics): one step of training, which draws the noise and the times."""

    def drawn(params, key, batch):
        x_1, y = batch
        key_0, key_t = jax.random.split(key)
        return loss(model, params, sampling.noise(key_0, x_1.shape), x_1, jax.random.uniform(key_t, x_1.shape[:1]), y)

    update = training.make_step(drawn, optimizer, ema_decay=EMA_DECAY)
    return lambda state, key, batch: update(state, jax.random.fold_in(key, state.step), batch)


def memory(compiled):
    """What the compiler says of a program's memory."""
    counted = compiled.memory_analysis()
    if counted is None:
        raise RuntimeError(f"The compiler for {jax.devices()[0].device_kind} does not count memory, so there is no row to print.")
    return counted


# The two measurements: seconds per step, bytes at the peak, and who counted them.


def rounds(steps, repeats, once, wait):
    """The median over the rounds of a step's mean seconds; the first, which compiles, does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(steps):
            out = once()
        wait(out)
        seconds.append((time.perf_counter() - start) / steps)
    return float(np.median(seconds[1:]))


def fmjax(config, model, device):
    """fmjax's step."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    one = [jnp.zeros(shape.shape, shape.dtype) for shape in arguments((1, *SHAPE))]
    state = jax.jit(lambda key: training.init(model.init(key, *one), optimizer))(keys[0])
    x_1 = jax.random.normal(keys[1], (config.batch, *SHAPE))
    batch = x_1, jax.random.randint(keys[2], x_1.shape[:1], 0, CLASSES)
    compiled = jax.jit(step(model, optimizer), donate_argnums=0).lower(state, keys[3], batch).compile()

    def once():
        nonlocal state
        state, metrics = compiled(state, keys[3], batch)
        return metrics

    def wait(metrics):
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"The loss is {metrics['loss']}.")

    seconds = rounds(config.steps, config.repeats, once, wait)
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return seconds, stats["peak_bytes_in_use"], "by the device"
    counted = memory(compiled)
    held = counted.argument_size_in_bytes + counted.output_size_in_bytes - counted.alias_size_in_bytes
    return seconds, held + counted.temp_size_in_bytes, "by the compiler"


def pytorch(config):
    """PyTorch's step, or None where there is no CUDA and nobody asked."""
    torch = importlib.import_module("torch")
    if not config.pytorch and not torch.cuda.is_available():
        return None
    from benchmarks import pytorch as twins

    torch.manual_seed(config.seed)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twin = twins.DiT(network(config.model, config.depth), SHAPE).to(where)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    dtype = getattr(torch, config.dtype) if config.dtype != "float32" else None
    take = twins.trainer(torch.compile(twin), optimizer, EMA_DECAY, dtype)
    x_1 = torch.randn((config.batch, SHAPE[-1], *SHAPE[:-1]), device=where)
    y = torch.randint(0, CLASSES, (config.batch,), device=where)

    seconds = rounds(config.steps, config.repeats, functools.partial(take, x_1, y), lambda loss: loss.item())
    return seconds, torch.cuda.max_memory_allocated() if where.type == "cuda" else None, "by PyTorch"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
