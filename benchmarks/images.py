"""Images a second from a diffusion transformer on latents of 32 x 32 x 4, by Euler steps with classifier-free guidance.

    make bench-images                                                       DiT-XL/2 on a GPU, beside PyTorch compiled
    make bench-images ARGS="--model DiT-S/8 --batch 2 --steps 2 --pytorch"  anywhere

One JSON line a number. A step evaluates the network once, on twice the batch; weights and computation are in bfloat16, the
state in float32. A time is the median over the runs of the whole sampler, after one that does not count. MFU is (1) of
`benchmarks.train_step` for as many forward passes.

PyTorch, where it is installed with CUDA or asked for, runs the same network in a process of its own, first, so that both have the
device's memory to themselves: `torch.compile`, attention by `scaled_dot_product_attention`, autocast, the loop in Python.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import rows, train_step
from benchmarks.train_step import CLASSES, SHAPE
from fmjax import guidance, sampling, times


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures a guided sampler of a diffusion transformer; prints one JSON line a number."""

    out: Path | None = None
    """Where the lines are written too, once all are there."""
    model: str | None = None
    """DiT-{S,B,L,XL}/{2,4,8}; none is DiT-XL/2, and DiT-S/8 on a CPU."""
    depth: int | None = None
    """Blocks in place of the model's, for a quick look."""
    batch: int | None = None
    """Images at once; none is 64, and 2 on a CPU."""
    steps: int | None = None
    """Of Euler's method; none is 50, and 2 on a CPU."""
    scale: float = 1.5
    """Of the guidance."""
    repeats: int = 5
    """Runs."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights and the computation."""
    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of attention; none is cudnn for bfloat16 on an NVIDIA GPU, else xla."""
    peers: bool = True
    """Whether to measure PyTorch where it is installed with CUDA."""
    pytorch: bool = False
    """Whether to measure it without CUDA too."""
    seed: int = 0
    """Of the weights and the noise."""


def main(config: Config):
    # So that the memory that is not in use is left to PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows.start()
    rows.report(measure(config), config.out)


def measure(config):
    """All rows."""
    device = jax.devices()[0]
    config = train_step.settled(config, device, batch=64, steps=50)
    model = train_step.network(config.model, config.depth, dtype=jnp.dtype(config.dtype), attention=config.attention, scan=True)
    operations = 2 * config.steps * train_step.flops(model, *SHAPE)
    settings = [f"batch {config.batch}", config.dtype, f"attention {config.attention}"]
    settings += [f"{config.depth} blocks"] * (config.depth is not None)
    name = f"{config.model}, {config.steps} Euler steps at guidance {config.scale:g}, {', '.join(settings)}"

    theirs = None
    if (config.peers or config.pytorch) and rows.ready(pytorch, ("torch",), "bench-images"):
        # In a new process, whose end gives the memory back.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            theirs = pool.submit(pytorch, config).result()
    ours = fmjax(config, model)
    peak = train_step.peak_of(device.device_kind)
    for who, packages, seconds in (("fmjax", (), ours), ("PyTorch", ("torch",), theirs)):
        if seconds is None:
            continue
        yield rows.row(f"{name}, {who}: images", config.batch / seconds, "1/s", packages=packages)
        if peak is not None:
            yield rows.row(f"{name}, {who}: MFU", operations * config.batch / (seconds * peak), "ratio", packages=packages)
    if theirs is not None:
        yield rows.row(f"{name}, PyTorch over fmjax: time", theirs / ours, "ratio", packages=("torch",))


def sampler(config, model):
    """(params, x_0, y) -> x_1."""

    def sample(params, x_0, y):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, CLASSES, config.scale)
        return sampling.sample_ode(field, x_0, times.uniform_grid(config.steps), step=sampling.euler)[0]

    return sample


def fmjax(config, model):
    """Seconds of a run."""
    key_init, key_0, key_y = jax.random.split(jax.random.key(config.seed), 3)
    one = [jnp.zeros(shape.shape, shape.dtype) for shape in train_step.arguments((1, *SHAPE))]
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(config.dtype), model.init(key, *one)))(key_init)
    arguments = (
        params,
        sampling.noise(key_0, (config.batch, *SHAPE)),
        jax.random.randint(key_y, (config.batch,), 0, CLASSES),
    )
    compiled = jax.jit(sampler(config, model)).lower(*arguments).compile()
    return train_step.rounds(1, config.repeats, functools.partial(compiled, *arguments), jax.block_until_ready)


def pytorch(config):
    """Seconds of a run of PyTorch, or None where there is no CUDA and nobody asked."""
    torch = importlib.import_module("torch")
    if not config.pytorch and not torch.cuda.is_available():
        return None
    from benchmarks import pytorch as twins

    torch.manual_seed(config.seed)
    where, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, config.dtype)
    twin = twins.DiT(train_step.network(config.model, config.depth), SHAPE).to(where)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    sample = twins.sampler(torch.compile(twin), np.linspace(0, 1, config.steps + 1), config.scale, dtype)
    x_0 = torch.randn((config.batch, SHAPE[-1], *SHAPE[:-1]), device=where)
    y = torch.randint(0, CLASSES, (config.batch,), device=where)
    return train_step.rounds(1, config.repeats, lambda: sample(x_0, y, CLASSES), lambda x: x.sum().item())


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
