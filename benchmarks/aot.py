"""Train steps of diffusion transformers compiled for real TPUs and GPUs, with none: what they hold in memory and what they send.

    make tpu-aot                                                    builds the environment, prints one JSON line per program
    make gpu-aot                                                    the same for NVIDIA's H100
    make tpu-aot ARGS="--out results/tpu_aot.json --only v5e:4x4"   those of one topology

The compiler for the chip gives the program, its memory and its collectives, which are read from the program's text, times the rounds of
the loops that they are in: no interface counts them. Nothing runs, so no time is measured. For a GPU the compiler cannot try kernels
out, so each product is left to cuBLAS.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies

from benchmarks import harness, train_step
from fmjax import parallel, training
from fmjax.models import dit

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_address_bits: 64
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
H100_MEMORY = 84942979072
"""Bytes; the compiler for GPUs does not refuse a program that needs more."""
NO_TRIALS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
MODELS = {
    "DiT-XL/2": functools.partial(dit.DiT_XL, patch_size=2),
    "DiT-3B/2": functools.partial(dit.DiT, patch_size=2, hidden_size=2304, depth=32, num_heads=18),
    "DiT-8B/2": functools.partial(dit.DiT, patch_size=2, hidden_size=3328, depth=40, num_heads=26),
}
RULES = {"replicated": parallel.replicated, "fully_sharded": parallel.fully_sharded}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step to compile."""

    topology: str
    model: str
    rule: str
    batch: int
    """Images per step, of all chips."""
    scan: bool = True
    remat: bool = True


PROGRAMS = (
    Program("v5e:4x4", "DiT-XL/2", "replicated", 256),
    Program("v5e:4x4", "DiT-XL/2", "replicated", 1024),
    Program("v5e:4x4", "DiT-XL/2", "fully_sharded", 256),
    Program("v5e:4x4", "DiT-XL/2", "fully_sharded", 256, remat=False),
    Program("v5e:4x4", "DiT-XL/2", "fully_sharded", 1024),
    Program("v5e:4x4", "DiT-3B/2", "replicated", 256),
    Program("v5e:4x4", "DiT-3B/2", "fully_sharded", 256),
    Program("v5e:4x4", "DiT-8B/2", "fully_sharded", 256),
    Program("v5p:2x2x4", "DiT-XL/2", "replicated", 1024),
    Program("v5p:2x2x4", "DiT-XL/2", "fully_sharded", 1024),
    Program("v5p:2x2x4", "DiT-3B/2", "fully_sharded", 1024),
    Program("v5p:2x2x4", "DiT-8B/2", "replicated", 256),
    Program("v5p:2x2x4", "DiT-8B/2", "fully_sharded", 256),
    Program("v5e:16x16", "DiT-XL/2", "replicated", 8192),
    Program("v5e:16x16", "DiT-XL/2", "fully_sharded", 8192),
    Program("v5e:16x16", "DiT-8B/2", "fully_sharded", 2048),
    # How long the blocks one by one take to compile.
    Program("v5e:4x4", "DiT-XL/2", "fully_sharded", 256, scan=False),
    # As benchmarks.train_step trains where there is a GPU.
    Program("h100:1", "DiT-XL/2", "replicated", 128, remat=False),
    Program("h100:1", "DiT-XL/2", "replicated", 128, remat=False, scan=False),
    Program("h100:1", "DiT-XL/2", "replicated", 256, remat=False),
    Program("h100:1", "DiT-XL/2", "replicated", 256),
    Program("h100:8", "DiT-XL/2", "replicated", 1024, remat=False),
    Program("h100:8", "DiT-XL/2", "fully_sharded", 1024, remat=False),
    Program("h100:8", "DiT-3B/2", "fully_sharded", 512),
    Program("h100:8", "DiT-8B/2", "fully_sharded", 256),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles train steps for chips and prints what the compiler says of them, one JSON line per program."""

    platform: Literal["tpu", "cuda"] = "tpu"
    """Compiler to use; the two are in environments of their own."""
    out: Path | None = None
    """File that the metrics are also written to, as one list, after each program."""
    only: tuple[str, ...] = ()
    """Words that a program's name must have, such as v5e:4x4 or DiT-8B/2; all programs where none is given."""


def main(config: Config):
    harness.start()
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks for them where there is no TPU.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    compiler = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[config.platform]
    where = harness.describe() | {"jax": jax.__version__, compiler: metadata.version(compiler), "device": "none: compiled ahead of time"}
    found = []
    for program in PROGRAMS:
        name = f"{program.model}, {program.topology}, {program.rule}, batch {program.batch}"
        name += ("" if program.scan else ", unrolled") + ("" if program.remat else ", without remat")
        if (program.topology.startswith("h100") == (config.platform == "cuda")) and all(word in name for word in config.only):
            found.append({"name": name, **measure(program), **where})
            print(json.dumps(found[-1]), flush=True)
            if config.out is not None:
                config.out.parent.mkdir(parents=True, exist_ok=True)
                config.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(program):
    """What the compiler says of a program."""
    chip, _, chips = program.topology.partition(":")
    gpu = chip == "h100"
    # All GPUs are joined by NVLink.
    topology = {"topology": f"1x1x{chips}", "target_config": H100} if gpu else {"topology_name": program.topology}
    mesh = parallel.mesh(devices=topologies.get_topology_desc(platform="cuda" if gpu else "tpu", **topology).devices)
    fields = {"attention": "cudnn" if gpu else "xla", "scan": program.scan, "remat": program.remat}
    model = MODELS[program.model](classes=train_step.CLASSES, dtype=jnp.bfloat16, **fields)
    step, arguments, stay = lowered_from(model, mesh, RULES[program.rule], program.batch)
    start, said = time.perf_counter(), {"parameters": sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)), "chips": mesh.size}
    try:
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(stay, None)).lower(*arguments)
        compiled = lowered.compile(NO_TRIALS if gpu else {})
    except jax.errors.JaxRuntimeError as error:
        return said | too_large(error)
    seconds, peak = time.perf_counter() - start, train_step.memory(compiled).peak_memory_in_bytes
    if gpu and peak > H100_MEMORY:
        return said | too_much(peak, H100_MEMORY)
    state = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    return said | {
        "fits": True,
        "peak memory per chip, GB": harness.short(peak / 1e9, 3),
        "state per chip, GB": harness.short(float(state) / 1e9, 3),
        "collectives per step, GB": {kind: harness.short(size / 1e9, 3) for kind, size in collectives(compiled.as_text()).items()},
        "seconds to compile": harness.short(seconds, 3),
    }


def too_large(error):
    """What the compiler says of a program that does not fit; any other error is raised again."""
    needs = re.search(r"(?:Used |temporaries \()([\d.]+)G\)? (?:of |exceeds available HBM \()([\d.]+)G", str(error))
    if needs is None:
        raise error
    return too_much(*(float(size) * 2**30 for size in needs.groups()))


def too_much(needs, has):
    return {"fits": False, "needs per chip, GB": harness.short(needs / 1e9, 3), "of, GB": harness.short(has / 1e9, 3)}


def lowered_from(model, mesh, rule, batch):
    """The step, the shapes of its arguments where they lie, and where the state stays."""
    optimizer = optax.adamw(train_step.RATE, weight_decay=train_step.DECAY)
    x, _, y = train_step.arguments((batch, *train_step.SHAPE))
    params = jax.eval_shape(model.init, jax.random.key(0), *train_step.arguments((1, *train_step.SHAPE)))
    state = jax.eval_shape(lambda params: training.init(params, optimizer), params)
    stay, spread = rule(state, mesh), parallel.batch_sharding(mesh, batch)

    def there(shapes, shardings):
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)

    key = {"key": jax.eval_shape(lambda: jax.random.key(0))}
    step = train_step.step(model, optimizer)
    step = parallel.constrain_activations(step, mesh) if rule is parallel.fully_sharded else step
    return step, (there(state, stay), there(key, parallel.replicated(key, mesh))["key"], there((x, y), (spread, spread))), stay


def collectives(text):
    """Bytes that the collectives of a compiled program give in a step, a chip, by their kind.

    The body of a loop counts as often as the loop goes round. One that overlaps with computation stands in the text piece by piece, in
    several fusions of one channel, and counts once.
    """
    bodies, name = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if opened[1] else opened[2]
            bodies[name] = []
        elif name is not None and line.startswith("  "):
            bodies[name].append(line)

    def rounds(line):
        """Of a loop, as the compiler says, or from 0 to a constant that its condition names; 1 of other instructions."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
        if not condition:
            return 1
        ends = [int(end) for each in bodies[condition[1]] for end in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", each)]
        if not ends:
            raise ValueError(f"The rounds of a loop cannot be read from its condition, {condition[1]}.")
        return max(ends)

    found, seen = {}, set()  # bytes and rounds of each collective

    def visit(name, times):
        if (name, times) in seen:
            return
        seen.add((name, times))
        for line in bodies.get(name, ()):
            for called in re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                visit(called, times * rounds(line))
            for kind in COLLECTIVES:
                if made := re.search(rf"= (.*?) {kind}(-start)?\(", line):
                    channel = re.search(r"channel_id=(\d+)", line)
                    key = kind, channel[1] if channel else line
                    size, least = found.get(key, (0, times))
                    found[key] = max(size, size_of(made[1], kind, bool(made[2]))), min(least, times)

    visit("ENTRY", 1)
    totals = {kind: sum(size * times for (each, _), (size, times) in found.items() if each == kind) for kind in COLLECTIVES}
    return {kind: size for kind, size in totals.items() if size}


def size_of(kinds, kind, start):
    """Bytes of the result of an instruction of those types; what starts a gathering gives its operand too."""
    sizes = [
        SIZES.get(dtype, 0) * int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", kinds)
    ]
    if start and kind != "all-reduce" and kinds.startswith("("):
        return max(sizes, default=0)
    return sum(sizes)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.aot")))
