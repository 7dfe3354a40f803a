"""Train steps of diffusion transformers compiled for real TPUs, with no TPU: memory, collectives, and an estimate of the step.

    make tpu-aot                                                    builds the environment, prints one JSON line a program
    make tpu-aot ARGS="--out results/tpu_aot.json --only v5e:4x4"   those of one topology

The compiler for the chip gives the program, its memory and its collectives. Nothing runs, so no time is measured: the times
are a roofline estimate,

    compute = 3 F B / (chips peak),   memory = bytes to and from HBM / bandwidth,   network = bytes of collectives / bandwidth     (1)
    step >= max(compute, memory, network),   step <= compute + memory + network                                                (2)

where F are the operations of a forward pass on an image (`benchmarks.train_step`), counted on paper, as are the bytes of (1),
because the compiler counts a loop once; the collectives are read from the compiled program, times the rounds of the loops that they
are in. MFU is compute over step, an interval by (2). What keeps a real chip from its peak besides is not in it.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies

from benchmarks import rows, train_step
from fmjax import parallel, training
from fmjax.models import dit

CHIPS = {
    # Operations a second in bfloat16, bytes a second of memory and of links, from the maker's pages.
    "v5e": (197e12, 819e9, 200e9),
    "v5p": (459e12, 2765e9, 600e9),
}
MODELS = {
    "DiT-XL/2": functools.partial(dit.XL, patch=2),
    "DiT-3B/2": functools.partial(dit.DiT, patch=2, width=2304, depth=32, heads=18),
    "DiT-8B/2": functools.partial(dit.DiT, patch=2, width=3328, depth=40, heads=26),
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
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles train steps for TPUs and prints what the compiler says of them, one JSON line a program."""

    out: Path | None = None
    """Where the lines are written too, as one list, after each program."""
    only: tuple[str, ...] = ()
    """Words that a program's name must have, such as v5e:4x4 or DiT-8B/2; all programs where none is given."""


def main(config: Config):
    rows.start()
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks for them where there is no TPU.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    where = rows.describe() | {"jax": jax.__version__, "libtpu": rows.metadata.version("libtpu")}
    where["device"] = "none: compiled ahead of time"
    found = []
    for program in PROGRAMS:
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
    devices = topologies.get_topology_desc(program.topology, platform="tpu").devices
    mesh = parallel.mesh(devices=devices)
    make = functools.partial(MODELS[program.model], classes=train_step.CLASSES, dtype=jnp.bfloat16)
    model = make(scan=program.scan, remat=program.remat)
    step, arguments, stay = lowered_from(model, mesh, RULES[program.rule], program.batch)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    peak, hbm, links = CHIPS[program.topology.partition(":")[0]]
    start = time.perf_counter()
    said = {"parameters": parameters, "chips": mesh.size}
    try:
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(stay, None)).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return said | too_large(error)
    seconds = time.perf_counter() - start
    counted = train_step.memory(compiled)
    state = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    moved = collectives(compiled.as_text())

    operations = 3 * train_step.flops(make(scan=True), *train_step.SHAPE) * program.batch
    times = {
        "compute": operations / (mesh.size * peak),
        "memory": hbm_bytes(model, parameters, program.batch / mesh.size, float(state)) / hbm,
        "network": sum(on_the_wire(kind, size, mesh.size) for kind, size in moved.items()) / links,
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
            "images a second": [short(program.batch / most), short(program.batch / least)],
        },
        "seconds to compile": short(seconds),
    }


def too_large(error):
    """What the compiler says of a program that does not fit; any other error is raised again."""
    needs = re.search(r"(?:Used |temporaries \()([\d.]+)G\)? (?:of |exceeds available HBM \()([\d.]+)G", str(error))
    if needs is None:
        raise error
    return {"fits": False, "needs on a chip, GB": short(float(needs[1]) * 2**30 / 1e9), "of, GB": short(float(needs[2]) * 2**30 / 1e9)}


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
    step = parallel.by_examples(step, mesh) if rule is parallel.fully_sharded else step
    return step, (there(state, stay), key, there((x, y), (spread, spread))), stay


def hbm_bytes(model, parameters, images, state):
    """Bytes between a chip and its memory in a step, on paper.

    The optimiser and the average read the gradient, the parameters and their three companions and write these four; the weights are read
    in bfloat16 by the forward pass, the recomputed one and the two products of the backward pass, and written once if they were
    gathered; of the activations, every product reads its input and writes its output, and a softmax reads and writes its scores.
    """
    tokens, width = (train_step.SHAPE[0] // model.patch) ** 2, model.width
    passes = 3 + model.remat
    per_layer = 2 * tokens * width * (2 * (1 + 3) + 2 + 2 * (1 + 4) + 6) + 2 * 4 * model.heads * tokens**2
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
        """Of a loop, which counts from 0 to a constant that its condition names; 1 of other instructions."""
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
