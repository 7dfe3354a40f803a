"""Train steps of diffusion transformers compiled for real TPUs and GPUs, with none: memory, collectives, an estimate of the step.

    make tpu-aot                                                    builds the environment, prints one JSON line a program
    make gpu-aot                                                    the same for NVIDIA's H100
    make tpu-aot ARGS="--out results/tpu_aot.json --only v5e:4x4"   those of one topology

The compiler for the chip gives the program, its memory and its collectives. Nothing runs, so no time is measured: the times
are a roofline estimate,

    compute = 3 F B / (chips peak),   memory = bytes to and from HBM / bandwidth,   network = bytes of collectives / bandwidth     (1)
    step >= max(compute, memory, network),   step <= compute + memory + network                                                (2)

where F are the operations of a forward pass on an image (`benchmarks.train_step`), counted on paper, as are the bytes of (1),
because the compiler counts a loop once; the collectives are read from the compiled program, times the rounds of the loops that they
are in. MFU is compute over step, an interval by (2). What keeps a real chip from its peak besides is not in it. For a GPU the compiler
cannot try kernels out, so each product is left to cuBLAS.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies

from benchmarks import rows, train_step
from fmjax import parallel, training
from fmjax.models import dit


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker's pages say of a chip."""

    platform: str
    peak: float
    """Operations a second in bfloat16."""
    hbm: float
    """Bytes a second of memory."""
    links: float
    """Bytes a second to other chips."""
    describe: Callable[[str], dict]
    """What JAX wants to know of as many chips."""
    attention: str = "xla"
    options: dict = dataclasses.field(default_factory=dict)
    """Of the compiler."""
    memory: float = math.inf
    """Bytes, where the compiler does not refuse a program that needs more."""


def tpus(name):
    """The TPUs of a name such as v5e:4x4."""
    return {"topology_name": name}


def gpus(name):
    """The H100s of a name such as h100:8, all joined by NVLink; what the compiler asks a GPU otherwise is written here."""
    return {"topology": f"1x1x{name.partition(':')[2]}", "target_config": H100}


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
NO_TRIALS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
CHIPS = {
    "v5e": Chip("tpu", 197e12, 819e9, 200e9, tpus),
    "v5p": Chip("tpu", 459e12, 2765e9, 600e9, tpus),
    "h100": Chip("cuda", 989.4e12, 3352e9, 450e9, gpus, "cudnn", NO_TRIALS, 84942979072),
}
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
    """Images a step, of all chips."""
    scan: bool = True
    remat: bool = True

    @property
    def chip(self):
        return CHIPS[self.topology.partition(":")[0]]


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
    """Compiles train steps for chips and prints what the compiler says of them, one JSON line a program."""

    platform: Literal["tpu", "cuda"] = "tpu"
    """Whose programs: the two compilers are in environments of their own."""
    out: Path | None = None
    """Where the lines are written too, as one list, after each program."""
    only: tuple[str, ...] = ()
    """Words that a program's name must have, such as v5e:4x4 or DiT-8B/2; all programs where none is given."""


def main(config: Config):
    rows.start()
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks for them where there is no TPU.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    compiler = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[config.platform]
    where = rows.describe() | {"jax": jax.__version__, compiler: rows.metadata.version(compiler)}
    where["device"] = "none: compiled ahead of time"
    found = []
    for program in PROGRAMS:
        if program.chip.platform != config.platform:
            continue
        name = f"{program.model}, {program.topology}, {program.rule}, batch {program.batch}"
        name += ("" if program.scan else ", unrolled") + ("" if program.remat else ", without remat")
        if all(word in name for word in config.only):
            found.append({"name": name, **measure(program), **where})
            print(json.dumps(found[-1]), flush=True)
            if config.out is not None:
                config.out.parent.mkdir(parents=True, exist_ok=True)
                config.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(program):
    """What the compiler says of a program, and the estimate."""
    chip = program.chip
    devices = topologies.get_topology_desc(platform=chip.platform, **chip.describe(program.topology)).devices
    mesh = parallel.mesh(devices=devices)
    make = functools.partial(MODELS[program.model], num_classes=train_step.CLASSES, dtype=jnp.bfloat16, attention=chip.attention)
    model = make(scan=program.scan, remat=program.remat)
    step, arguments, stay = lowered_from(model, mesh, RULES[program.rule], program.batch)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    start = time.perf_counter()
    said = {"parameters": parameters, "chips": mesh.size}
    try:
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(stay, None)).lower(*arguments).compile(chip.options)
    except jax.errors.JaxRuntimeError as error:
        return said | too_large(error)
    seconds = time.perf_counter() - start
    counted = train_step.memory(compiled)
    if counted.peak_memory_in_bytes > chip.memory:
        return said | too_much(counted.peak_memory_in_bytes, chip.memory)
    state = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    moved = collectives(compiled.as_text())

    operations = 3 * train_step.flops(make(scan=True), *train_step.SHAPE) * program.batch
    times = {
        "compute": operations / (mesh.size * chip.peak),
        "memory": hbm_bytes(model, parameters, program.batch / mesh.size, float(state)) / chip.hbm,
        "network": sum(on_the_wire(kind, size, mesh.size) for kind, size in moved.items()) / chip.links,
    }
    least, most = max(times.values()), sum(times.values())
    return said | {
        "fits": True,
        "peak memory of a chip, GB": short(counted.peak_memory_in_bytes / 1e9),
        "state of a chip, GB": short(float(state) / 1e9),
        "collectives of a step, GB": {kind: short(size / 1e9) for kind, size in moved.items()},
        "estimate, not measured": {
            "ms": {name: short(1e3 * value) for name, value in times.items()},
            "step, ms": [short(1e3 * least), short(1e3 * most)],
            "MFU": [short(times["compute"] / most), short(times["compute"] / least)],
            "images per second": [short(program.batch / most), short(program.batch / least)],
        },
        "seconds to compile": short(seconds),
    }


def too_large(error):
    """What the compiler says of a program that does not fit; any other error is raised again."""
    needs = re.search(r"(?:Used |temporaries \()([\d.]+)G\)? (?:of |exceeds available HBM \()([\d.]+)G", str(error))
    if needs is None:
        raise error
    return too_much(*(float(size) * 2**30 for size in needs.groups()))


def too_much(needs, has):
    return {"fits": False, "needs on a chip, GB": short(needs / 1e9), "of, GB": short(has / 1e9)}


def lowered_from(model, mesh, rule, batch):
    """The step, the shapes of its arguments where they lie, and where the state stays."""
    optimizer = optax.adamw(train_step.RATE, weight_decay=train_step.DECAY)
    one = train_step.arguments((1, *train_step.SHAPE))
    params = jax.eval_shape(model.init, jax.random.key(0), *one)
    state = jax.eval_shape(lambda params: training.init(params, optimizer), params)
    stay = rule(state, mesh)

    def there(shapes, shardings):
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)

    x, _, y = train_step.arguments((batch, *train_step.SHAPE))
    spread = parallel.batch_sharding(mesh, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=jax.tree.leaves(parallel.replicated({"key": key}, mesh))[0])
    step = train_step.step(model, optimizer)
    step = parallel.constrain_activations(step, mesh) if rule is parallel.fully_sharded else step
    return step, (there(state, stay), key, there((x, y), (spread, spread))), stay


def hbm_bytes(model, parameters, images, state):
    """Bytes between a chip and its memory in a step, on paper.

    The optimiser and the average read the gradient, the parameters and their three companions and write these four; the weights are read
    in bfloat16 by the forward pass, the recomputed one and the two products of the backward pass, and written once if they were
    gathered; of the activations, every product reads its input and writes its output, and a softmax reads and writes its scores,
    unless attention is fused.
    """
    tokens, width = (train_step.SHAPE[0] // model.patch_size) ** 2, model.hidden_size
    passes = 3 + model.remat
    scores = 0 if model.attention == "cudnn" else 2 * 4 * model.num_heads * tokens**2
    per_layer = 2 * tokens * width * (2 * (1 + 3) + 2 + 2 * (1 + 4) + 6) + scores
    return state * 9 / 4 + parameters * 2 * (passes + 1) + images * model.depth * per_layer * passes


def on_the_wire(kind, size, chips):
    """Bytes that a chip sends for a collective that gives so many, in a ring."""
    share = (chips - 1) / chips
    return size * {"all-reduce": 2 * share, "reduce-scatter": chips - 1, "collective-permute": 1}.get(kind, share)


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


def short(value):
    """A number of three significant digits."""
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
