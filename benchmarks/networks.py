"""The networks beside themselves and beside PyTorch: compile time, memory, forward passes and train steps, a line of JSON a number.

    python -m benchmarks.networks
    make bench-networks ARGS="--out results/networks.jsonl --seconds 4 --repeats 5"     beside PyTorch

What a row says, and how it is measured, is at the head of `benchmarks/rows.py`. The parts, which `--only` picks:

- `scan`: what the loop over the blocks saves: compile time and the length of the compiled program, over the unrolled network's.
- `remat`: what a loop and recomputing the blocks save: temporary memory of the train step, as the compiler counts it.
- `loop`: what these cost: the train step's run time.
- `convolution`, `transformer` and `lab_unet`: PyTorch's run time over fmjax's, so above 1 where fmjax is faster. The twins in
  `benchmarks/pytorch.py` have the same weights; the rows "largest difference" come first and say that outputs and gradients are
  the same. A train step is flow matching with its noise drawn, Adam, and an average of the parameters, on both sides. PyTorch
  runs as it comes ("eager") and, where it finds a compiler, by `torch.compile`.

Where PyTorch is faster, and why:

- The U-Net and convolutions: PyTorch calls oneDNN, whose gradients of a convolution are the faster ones. jaxlib 0.10 makes it worse on
  a CPU, where it hands convolutions to YNNPACK, which takes up to twice as long as Eigen, which it calls otherwise; jaxlib 0.12 has
  both alike. So `make bench-networks` leaves the convolutions to Eigen (`XLA_FLAGS`). On a GPU and a TPU both call the maker's.
- The transformer's train step, whose forward pass is the faster one here. `layers.Dense` avoids products that sum over two axes at
  once, which were a part of it; the rest has not been traced to its operations yet.

Memory in huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`) is not set here: the U-Net's train step is as fast as PyTorch's with it,
but the transformer's took once its time and once twice as long.
"""

import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import rows, train_step
from fmjax import sampling, training
from fmjax.models import unet

UNIT = "max abs difference / max abs"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the networks; prints one JSON line a number."""

    out: Path | None = None
    """Where the lines are written too, once all are there."""
    scan_models: tuple[str, ...] = ("DiT-XL/2",)
    """Transformers that are compiled as a loop and unrolled."""
    remat_models: tuple[str, ...] = ("DiT-S/4", "DiT-B/2")
    """Transformers whose train step is compiled unrolled, as a loop, and recomputed."""
    model: str = "DiT-S/4"
    """The transformer that runs beside PyTorch's."""
    depth: int | None = None
    """Blocks in place of every transformer's own, for a quick look."""
    batch: int = 16
    """Images."""
    seconds: float = 8.0
    """About how long to measure one comparison; a longer one is less noisy."""
    repeats: int = 7
    """Rounds of a comparison at least, unless ten times as long as that has passed."""
    precision: float = 0.03
    """Of a ratio, relative: there are more rounds until it is reached, or ten times as long as that has passed."""
    compiles: int = 1
    """Pairs of compilations at least, and up to five times as many where their ratios scatter."""
    only: tuple[str, ...] = ()
    """Parts to measure, by their names; all of them where none is named."""
    peers: bool = True
    """Whether to measure PyTorch where it is installed."""
    torch_compile: bool = True
    """Whether to measure `torch.compile` too."""
    seed: int = 0
    """Of the weights and the data."""


def main(config: Config):
    rows.start()
    rows.report(rows.measure(config, chosen(config)), config.out)


def chosen(config):
    """The parts to measure."""
    parts = [scan, remat, loop, convolution, transformer, lab_unet]
    if config.only:
        parts = [part for part in parts if part.__name__ in config.only]
    return [part for part in parts if part not in (convolution, transformer, lab_unet) or beside_torch(config, part)]


def beside_torch(config, part):
    """Whether PyTorch is to be measured."""
    return config.peers and rows.ready(part, ("torch",), "bench-networks")


# Against themselves. Shapes are enough to compile, so no weights are made, but for what runs.

WAYS = {"unrolled": {}, "scan": {"scan": True}, "scan and remat": {"scan": True, "remat": True}}


def scan(config):
    """The blocks as a loop over the blocks one by one."""
    for name in config.scan_models:
        pair = [train_step.network(name, config.depth, scan=scan) for scan in (True, False)]
        for what, compiled in {"forward pass": forward, "train step": step}.items():
            functions, arguments = zip(*(compiled(model, config.batch) for model in pair), strict=True)
            timed, programs = rows.compilations(config, functions, arguments)
            against = f"{name}, {what}, scan over unrolled"
            yield rows.ratio(f"{against}: compile time", timed, 0, 1, most=0.2)
            sizes = [len(rows.instructions(program)) for program in programs]
            yield rows.row(f"{against}: compiled size", sizes[0] / sizes[1], "ratio", most=0.2, characters=sizes)


def forward(model, batch):
    """A forward pass, and the shapes of what it takes."""
    given = train_step.arguments((batch, *train_step.SHAPE))
    return model.apply, (jax.eval_shape(model.init, jax.random.key(0), *given), *given)


def step(model, batch):
    """A train step, and the shapes of what it takes."""
    optimizer = optax.adamw(train_step.RATE, weight_decay=train_step.DECAY)
    _, (params, x, _, y) = forward(model, batch)
    state = jax.eval_shape(lambda params: training.init(params, optimizer), params)
    return train_step.step(model, optimizer), (state, jax.eval_shape(lambda: jax.random.key(0)), (x, y))


def remat(config):
    """Temporary memory of a train step by what its backward pass keeps."""
    for name in config.remat_models:
        against = f"{name} train step, batch {config.batch}"
        temporary = {}
        for how, fields in WAYS.items():
            function, arguments = step(train_step.network(name, config.depth, **fields), config.batch)
            # Donated, as in training: else the compiler puts temporaries where the new state goes.
            compiled = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
            temporary[how] = train_step.memory(compiled).temp_size_in_bytes
            yield rows.row(f"{against}, {how}: temporary memory", temporary[how] / 2**20, "MiB")
        yield rows.row(f"{against}, scan over unrolled: temporary memory", temporary["scan"] / temporary["unrolled"], "ratio")
        yield rows.row(f"{against}, scan and remat over scan: temporary memory", temporary["scan and remat"] / temporary["scan"], "ratio")


def loop(config):
    """Run time of a train step by what its backward pass keeps."""
    keys, one = jax.random.split(jax.random.key(config.seed), 4), train_step.arguments((1, *train_step.SHAPE))
    batch = sampling.noise(keys[0], (config.batch, *train_step.SHAPE)), jax.random.randint(keys[1], (config.batch,), 0, train_step.CLASSES)
    calls = []
    for fields in WAYS.values():
        model = train_step.network(config.model, config.depth, **fields)
        params = jax.jit(lambda key, model=model: model.init(key, *(jnp.zeros(x.shape, x.dtype) for x in one)))(keys[2])
        calls.append(trainer(model, params, keys[3], batch))
    timed = rows.in_turns(config, [lambda call=call: call for call in calls])
    name = f"{config.model} train step, batch {config.batch}"
    yield rows.ratio(f"{name}, scan over unrolled: run time", timed, 1, 0)
    yield rows.ratio(f"{name}, scan and remat over scan: run time", timed, 2, 1)


# Against PyTorch. It is imported only where it is installed.


def convolution(config):
    """The gradient of a 3 x 3 convolution with respect to images and kernel, alone."""
    torch, packages = importlib.import_module("torch"), ("torch",)
    for side, channels in ((28, 32), (14, 64), (7, 128)):
        keys = jax.random.split(jax.random.key(config.seed), 3)
        x, g = (sampling.noise(key, (config.batch, side, side, channels)) for key in keys[:2])
        kernel = jax.random.normal(keys[2], (3, 3, channels, channels)) / np.sqrt(9 * channels)

        def gradient(x, kernel, g):
            return jax.vjp(unet.convolve, x, kernel)[1](g)

        makers = [*rows.each([gradient], x, kernel, g), functools.partial(torch_gradient, torch, x, kernel, g)]
        timed, (ours, theirs) = rows.in_turns(config, makers), [make()()[1] for make in makers]
        name = f"gradient of a 3 x 3 convolution, ({config.batch}, {side}, {side}, {channels}), PyTorch"
        yield relative(f"{name}'s and fmjax's: largest difference", np.moveaxis(theirs.numpy(), (0, 1), (-1, -2)), ours, packages=packages)
        yield rows.ratio(f"{name}, {threads(torch)}, over fmjax: run time", timed, 1, 0, packages=packages)


def torch_gradient(torch, x, kernel, g):
    """PyTorch's gradient of a 3 x 3 convolution as a function of nothing."""
    x, g = (torch.tensor(np.asarray(array).copy()).permute(0, 3, 1, 2) for array in (x, g))
    kernel = torch.tensor(np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1)).copy()).contiguous(memory_format=torch.channels_last)
    ones, zeros = (1, 1), (0, 0)
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(g, x, kernel, None, ones, ones, ones, False, zeros, 1, (True, True, False))[:2]


def transformer(config):
    """The transformer, unrolled: a loop over blocks costs a copy of each block's weights."""
    name = f"{config.model}, batch {config.batch}"
    yield from beside(config, name, train_step.network(config.model, config.depth), train_step.SHAPE, "DiT")


def lab_unet(config):
    """The U-Net of the course's third lab on MNIST's shape."""
    yield from beside(config, f"U-Net of the lab, batch {config.batch}", unet.LabUNet(num_classes=10), (28, 28, 1), "UNet")


def beside(config, name, model, shape, twin):
    """PyTorch over fmjax, for a network with classes."""
    from benchmarks import pytorch

    torch, packages = pytorch.torch, ("torch",)
    keys = jax.random.split(jax.random.key(config.seed), 7)
    x_0, x_1 = (sampling.noise(key, (config.batch, *shape)) for key in keys[:2])
    t, y = jax.random.uniform(keys[2], (config.batch,)), jax.random.randint(keys[3], (config.batch,), 0, model.num_classes)
    params = randomized(keys[5], jax.jit(model.init)(keys[4], x_0, t, y))
    network = pytorch.load(getattr(pytorch, twin)(model, shape), params)
    torch_x_0, torch_x_1 = map(pytorch.images, (x_0, x_1))
    torch_t, torch_y = (torch.tensor(np.asarray(array).copy()) for array in (t, y))
    who = f"PyTorch, {threads(torch)}"

    # That it is the same network.
    apply = jax.jit(model.apply)
    with torch.inference_mode():
        theirs = network(torch_x_0, torch_t, torch_y).permute(0, 2, 3, 1).numpy()
    yield relative(f"{name}, PyTorch's and fmjax's outputs: largest difference", theirs, apply(params, x_0, t, y), packages=packages)
    ours = jax.jit(jax.grad(functools.partial(train_step.loss, model)))(params, x_0, x_1, t, y)
    pytorch.flow_matching(network, torch_x_0, torch_x_1, torch_t, torch_y).backward()
    theirs = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    ours = dict(pytorch.load(getattr(pytorch, twin)(model, shape), ours).named_parameters())
    flat = [np.concatenate([gradient[key].detach().numpy().ravel() for key in theirs]) for gradient in (theirs, ours)]
    yield relative(f"{name}, PyTorch's and fmjax's gradients: largest difference", *flat, packages=packages)

    networks = {"eager": network}
    if config.torch_compile:
        compiled, reason = torch.compile(network), None
        try:
            # Both of its programs, for the forward pass alone and for training.
            with torch.inference_mode():
                compiled(torch_x_0, torch_t, torch_y)
            pytorch.flow_matching(compiled, torch_x_0, torch_x_1, torch_t, torch_y).backward()
            network.zero_grad()
            networks["torch.compile"] = compiled
        except Exception as error:
            reason = error
            print(f"{name}: torch.compile does not work here: {error}", file=sys.stderr)
        yield rows.row(f"{name}: torch.compile works", int(reason is None), "1 or 0", packages=packages)

    calls = [functools.partial(apply, params, x_0, t, y)]
    calls += [functools.partial(each, torch_x_0, torch_t, torch_y) for each in networks.values()]
    with torch.inference_mode():
        timed = rows.in_turns(config, [lambda call=call: call for call in calls])
    for i, how in enumerate(networks, 1):
        yield rows.ratio(f"{name}, forward pass, {who}, {how}, over fmjax: run time", timed, i, 0, packages=packages)

    steps = [trainer(model, params, keys[6], (x_1, y))]
    for each in networks.values():
        optimizer = torch.optim.Adam(network.parameters(), lr=train_step.RATE, fused=True)
        steps.append(functools.partial(pytorch.trainer(each, optimizer, train_step.EMA_DECAY), torch_x_1, torch_y))
    timed = rows.in_turns(config, [lambda call=call: call for call in steps])
    for i, how in enumerate(networks, 1):
        yield rows.ratio(f"{name}, train step, {who}, {how}, over fmjax: run time", timed, i, 0, packages=packages)


def randomized(key, params):
    """Parameters with noise on each, since a new network gives zero everywhere."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def trainer(model, params, key, batch):
    """fmjax's train step as a function of nothing, which keeps its state."""
    optimizer = optax.adam(train_step.RATE)
    state = training.init(jax.tree.map(jnp.copy, params), optimizer)
    take = jax.jit(train_step.step(model, optimizer), donate_argnums=0)

    def once():
        nonlocal state
        state, metrics = take(state, key, batch)
        return metrics

    return once


def relative(name, a, b, **more):
    """The row of the largest difference of two results over their largest value."""
    a, b = np.asarray(a), np.asarray(b)
    return rows.row(name, float(np.abs(a - b).max() / np.abs(b).max()), UNIT, **more)


def threads(torch):
    """How many threads PyTorch has: as many as there are cores, which is what XLA takes."""
    torch.set_num_threads(os.cpu_count() or 1)
    return f"{torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
