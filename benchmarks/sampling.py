"""Samplers against a scan written by hand, and against public solvers: one JSON line a number.

    python -m benchmarks.sampling --out results/sampling.jsonl
    make bench-peers ARGS="--out results/sampling.jsonl"        the same beside diffrax, torchdiffeq, flow_matching and diffusers

What a row says, and how it is measured, is at the head of `benchmarks/rows.py`. "Compiled programs equal" holds without
a clock, since equal programs take equal time; rows "control" compare a program with itself and so show what a ratio of 1
looks like here.

Where a public solver is as fast or faster, and why:

- diffrax at a batch of one, under JAX's default asynchronous dispatch. XLA hands a program over to another thread unless
  it may call the host, and diffrax's check for errors is such a call; handing over takes longer than the work. The rows
  "asynchronous dispatch" show it: with `throw=False` diffrax takes longer. So all other rows run synchronously.
- PyTorch's bare network at a batch of 1024, by a quarter with two threads on two free cores: its matrix products and its
  silu each take about half of XLA's time there. The rows "PyTorch" show it, piece by piece. What eager dispatch costs eats
  the advantage, so that torchdiffeq's sampler is about equal there, and slower at 1 and at 10,000. On busy cores its
  threads wait for each other at every operation, hence rows for one thread too.
"""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from benchmarks.rows import (
    ROOT,
    compilations,
    difference,
    each,
    fresh,
    in_turns,
    instructions,
    measure,
    ratio,
    ready,
    report,
    results,
    row,
    same_program,
    start,
    torch_threads,
)
from fmjax import guidance, paths, sampling, times
from fmjax.models import dit, mlp

SIGMA = 0.5
STEPS = (sampling.euler, sampling.heun, sampling.midpoint, sampling.rk4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the samplers; prints one JSON line a number."""

    out: Path | None = None
    """Where the lines are written too, once all are there."""
    batches: tuple[int, ...] = (1, 1024, 10_000)
    """Sizes of the batch."""
    steps: int = 100
    """Steps of a sampler."""
    sizes: tuple[int, int] = (10, 1000)
    """Numbers of steps whose compiled programs must be of one size."""
    width: int = 64
    """Of the network."""
    depth: int = 4
    """Of the network."""
    guidance_batches: tuple[int, ...] = (256, 1024)
    """Numbers of points in the measurement of guidance."""
    image_batches: tuple[int, ...] = (64, 256)
    """Numbers of images in the measurement of guidance."""
    image_steps: int = 10
    """Steps of a sampler of images."""
    solver_width: int = 384
    """Of the transformer of DiT-S/4, in the measurement of what solvers add to it."""
    solver_depth: int = 12
    """Of the same."""
    solver_steps: int = 50
    """Steps of every solver there."""
    seconds: float = 8.0
    """About how long to measure one comparison; a longer one is less noisy."""
    repeats: int = 11
    """Rounds of a comparison at least, each with programs compiled anew, unless ten times as long as that has passed."""
    precision: float = 0.01
    """Of a ratio, relative: there are more rounds until it is reached, or ten times as long as that has passed."""
    compiles: int = 7
    """Pairs of compilations at least, and up to five times as many where their ratios scatter."""
    asynchronous: bool = False
    """Whether JAX hands a program over to another thread, its default on a CPU, rather than run it in the caller's."""
    only: tuple[str, ...] = ()
    """Parts to measure, by the names on the progress lines; all of them where none is named."""
    peers: bool = True
    """Whether to measure the public solvers that are installed."""
    seed: int = 0
    """Of the weights and the noise."""


def main(config: Config):
    start(config.asynchronous)
    report(measure(config, chosen(config)), config.out)


def chosen(config):
    """The parts to measure."""
    parts = [sizes, ode, sde, control, guided_points, guided_images, overhead]
    if config.peers:
        parts += [part for part, peers in PEERS.items() if ready(part, peers)]
    if config.only:
        parts = [part for part in (*parts, handed_over) if part.__name__ in config.only]
    return parts


def network(config, classes=None):
    """The perceptron and its weights at random."""
    model = mlp.MLP(hidden_size=config.width, depth=config.depth, num_classes=classes)
    labels = () if classes is None else (jnp.zeros(1, int),)
    return model, model.init(jax.random.key(config.seed), jnp.zeros((1, 2)), 0.5, *labels)


def start_at(config, batch):
    """A sampler's noise, and another key."""
    key, key_0 = jax.random.split(jax.random.key(config.seed + 1))
    return key, sampling.noise(key_0, (batch, 2))


# The samplers, and the same by hand.


def our_ode(model, params, x_0, grid, step=sampling.euler):
    return sampling.sample_ode(lambda x, t: model.apply(params, x, t), x_0, grid, step=step)[0]


def our_sde(model, params, key, x_0, grid):
    return sampling.sample_sde(lambda x, t: model.apply(params, x, t), SIGMA, key, x_0, grid)[0]


def our_sde_key_each(model, params, key, x_0, grid):
    return our_sde(model, params, jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x_0))), x_0, grid)


def hand_ode(model, params, x_0, grid):
    """Euler's method as one would write it."""

    def body(x, interval):
        t, dt = interval
        return x + dt * model.apply(params, x, t), None

    return lax.scan(body, x_0, (grid[:-1], jnp.diff(grid)))[0]


def hand_sde(model, params, key, x_0, grid):
    """Euler and Maruyama's method as one would write it, one key per step for the whole batch."""

    def body(carry, interval):
        (x, key), (t, dt) = carry, interval
        key, key_step = jax.random.split(key)
        x = x + dt * model.apply(params, x, t) + jnp.sqrt(dt) * SIGMA * jax.random.normal(key_step, x.shape)
        return (x, key), None

    return lax.scan(body, (x_0, key), (grid[:-1], jnp.diff(grid)))[0][0]


def hand_sde_key_each(model, params, key, x_0, grid):
    """The same with a key per example, so that any part of a batch can be drawn alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x_0)))

    def body(x, interval):
        index, t, dt = interval
        keys_step = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        epsilon = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys_step)
        return x + dt * model.apply(params, x, t) + jnp.sqrt(dt) * SIGMA * epsilon, None

    return lax.scan(body, x_0, (jnp.arange(len(grid) - 1), grid[:-1], jnp.diff(grid)))[0]


def sizes(config):
    """The compiled size of each sampler, which must not grow with the number of steps.

    The size is the length of the optimised program's instructions with every number written as 0, since the number of steps is
    itself one of the numbers; and the bytes of machine code, on the devices that tell.
    """
    model, params = network(config)
    key, x_0 = start_at(config, config.batches[0])
    programs = [(f"sample_ode, {step.__name__}", functools.partial(our_ode, model, step=step), (params, x_0)) for step in STEPS]
    programs += [("sample_sde, euler_maruyama", functools.partial(our_sde, model), (params, key, x_0))]
    for name, program, arguments in programs:
        compiled = [jax.jit(program).lower(*arguments, times.uniform_grid(steps)).compile() for steps in config.sizes]
        text = [len(re.sub(r"\d+", "0", instructions(each))) for each in compiled]
        code = [getattr(each.memory_analysis(), "generated_code_size_in_bytes", 0) for each in compiled]
        for unit, (few, many) in {"characters of HLO": text, "bytes of machine code": code}.items():
            if few or many:
                yield row(f"compiled size of {name}, {config.sizes[0]} steps", few, unit)
                yield row(f"compiled size of {name}, {config.sizes[1]} steps", many, unit, equal=few)


def ode(config):
    """`sample_ode` over Euler's method written by hand."""
    model, params = network(config)
    grid = times.uniform_grid(config.steps)
    functions = [functools.partial(our_ode, model), functools.partial(hand_ode, model)]
    for batch in config.batches:
        _, x_0 = start_at(config, batch)
        makers = each(functions, params, x_0, grid)
        against = f"sample_ode over a scan by hand, batch {batch}"
        yield same_program(against, functions, params, x_0, grid)
        yield difference(f"{against}: results", *results(makers))
        yield ratio(f"{against}: run time", in_turns(config, makers), 0, 1, most=1.03)
        compiled, _ = compilations(config, functions, [(params, x_0, grid)] * 2)
        yield ratio(f"{against}: compile time", compiled, 0, 1, most=1.2)


def sde(config):
    """`sample_sde` over Euler and Maruyama's method written by hand, with one key and with a key per example."""
    model, params = network(config)
    grid = times.uniform_grid(config.steps)
    pairs = {"": (our_sde, hand_sde), " with a key per example": (our_sde_key_each, hand_sde_key_each)}
    for batch in config.batches:
        key, x_0 = start_at(config, batch)
        for which, pair in pairs.items():
            against = f"sample_sde over a scan by hand{which}, batch {batch}"
            functions = [functools.partial(function, model) for function in pair]
            makers = each(functions, params, key, x_0, grid)
            if which:
                yield same_program(against, functions, params, key, x_0, grid)
                yield difference(f"{against}: results", *results(makers))
            yield ratio(f"{against}: run time", in_turns(config, makers), 0, 1, most=1.03)
            compiled, _ = compilations(config, functions, [(params, key, x_0, grid)] * 2)
            yield ratio(f"{against}: compile time", compiled, 0, 1, most=1.2)


def control(config):
    """The scan written by hand over itself: what a ratio of 1 looks like on this machine."""
    model, params = network(config)
    grid = times.uniform_grid(config.steps)
    for batch in config.batches:
        _, x_0 = start_at(config, batch)
        makers = each([functools.partial(hand_ode, model)] * 2, params, x_0, grid)
        yield ratio(f"control, a scan by hand over itself, batch {batch}: run time", in_turns(config, makers), 0, 1)


def guided(config, name, model, params, x_0, y, null, grid):
    """Classifier-free guidance over none: the same work at scale 1, twice the batch at another."""

    def none(params, x_0, y):
        return sampling.sample_ode(lambda x, t: model.apply(params, x, t, y), x_0, grid, step=sampling.euler)[0]

    def scaled(scale, params, x_0, y):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, null, scale)
        return sampling.sample_ode(field, x_0, grid, step=sampling.euler)[0]

    functions = [functools.partial(scaled, 1.0), functools.partial(scaled, 3.0), none]
    makers = each(functions, params, x_0, y)
    yield same_program(f"guidance at scale 1 over none, {name}", functions[::2], params, x_0, y)
    yield difference(f"guidance at scale 1 over none, {name}: results", *results(makers)[::2])
    ran = in_turns(config, makers)
    yield ratio(f"guidance at scale 1 over none, {name}: run time", ran, 0, 2, most=1.02)
    yield ratio(f"guidance at scale 3 over none, {name}: run time", ran, 1, 2, most=2.05)


def guided_points(config):
    """Guidance of the perceptron."""
    model, params = network(config, classes=10)
    for batch in config.guidance_batches:
        _, x_0 = start_at(config, batch)
        yield from guided(config, f"MLP, batch {batch}", model, params, x_0, jnp.arange(batch) % 10, 10, times.uniform_grid(config.steps))


def guided_images(config):
    """Guidance of a small diffusion transformer."""
    model = dit.DiT(patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10, scan=True)
    # Weights at random, since a new transformer gives zero everywhere.
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), 0.5, jnp.zeros(1, int))
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(config.seed)
    params = jax.tree.unflatten(structure, [jnp.asarray(0.05 * random.standard_normal(leaf.shape, np.float32)) for leaf in leaves])
    for batch in config.image_batches:
        x_0 = sampling.noise(jax.random.key(config.seed + 1), (batch, 8, 8, 1))
        yield from guided(
            config, f"DiT, batch {batch}", model, params, x_0, jnp.arange(batch) % 10, 10, times.uniform_grid(config.image_steps)
        )


PATH = paths.Linear()
OVERHEAD = {
    "heun": (sampling.heun, 2),
    "adams_bashforth 2": (sampling.adams_bashforth(2), 1),
    "adams_bashforth 3": (sampling.adams_bashforth(3), 1),
    "dpm_solver_pp 2": (sampling.dpm_solver_pp(PATH, 2), 1),
    "dpm_solver_pp 3": (sampling.dpm_solver_pp(PATH, 3), 1),
    "unipc 2": (sampling.unipc(PATH, 2), 1),
    "unipc 3": (sampling.unipc(PATH, 3), 1),
    "deis 3": (sampling.deis(PATH, 3), 1),
    "ancestral": (sampling.ancestral, 1),
    "sde_dpm_solver_pp": (sampling.sde_dpm_solver_pp, 1),
    "churn": (sampling.churn(), 2),
}
"""Solvers, and their evaluations per step."""
NOISY = ("ancestral", "sde_dpm_solver_pp", "churn")


def overhead(config):
    """Every solver over as many bare evaluations of a DiT-S/4 for one image of 32 x 32."""
    model = dit.DiT(patch_size=4, hidden_size=config.solver_width, depth=config.solver_depth, num_heads=6, scan=True)
    x_0 = sampling.noise(jax.random.key(config.seed + 1), (1, 32, 32, 4))
    random = np.random.default_rng(config.seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x_0, 0.5)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32)), shapes)
    grid, key = times.uniform_grid(config.solver_steps), jax.random.key(config.seed)

    def solve(step, noisy, params, x_0, grid):
        field = functools.partial(model.apply, params)
        if noisy:
            return sampling.sample_diffusion(PATH, field, 1.0, key, x_0, grid, step=step)[0]
        return sampling.sample_ode(field, x_0, grid, step=step)[0]

    def bare(each, params, x_0, grid):
        """Each evaluation needs the one before, as a solver's do."""
        ts = jnp.repeat(grid[:-1], each, total_repeat_length=each * config.solver_steps)
        return lax.scan(lambda x, t: (x + 1e-3 * jnp.asarray(model.apply(params, x, t)), None), x_0, ts)[0]

    for name, (step, each_step) in OVERHEAD.items():
        functions = [functools.partial(solve, step, name in NOISY), functools.partial(bare, each_step)]
        against = f"{name}, {config.solver_steps} steps, over its evaluations of DiT-S/4"
        yield ratio(f"{against}: run time", in_turns(config, each(functions, params, x_0, grid)), 0, 1, most=1.05)
        compiled, _ = compilations(dataclasses.replace(config, compiles=min(2, config.compiles)), functions, [(params, x_0, grid)] * 2)
        yield ratio(f"{against}: compile time", compiled, 0, 1)


# The public solvers. They are imported by name and only where they are installed.


def diffrax_euler(diffrax, model, steps, params, x_0, grid, throw=True):
    """diffrax's Euler with constant steps, its other settings as they come."""
    term = diffrax.ODETerm(lambda t, x, _: model.apply(params, x, t))
    constant = diffrax.ConstantStepSize()
    solution = diffrax.diffeqsolve(term, diffrax.Euler(), t0=0.0, t1=1.0, dt0=1 / steps, y0=x_0, stepsize_controller=constant, throw=throw)
    return solution.ys[-1]


def asynchronous(config):
    """The part `handed_over` in a process of its own, in which JAX hands programs over to another thread."""
    fields = ("steps", "width", "depth", "seconds", "repeats", "seed")
    flags = [f"--{field}={getattr(config, field)}" for field in fields] + ["--batches", str(config.batches[0])]
    command = [sys.executable, "-m", "benchmarks.sampling", "--asynchronous", "--only", "handed_over", *flags]
    child = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    yield from map(json.loads, child.stdout.splitlines())


def handed_over(config):
    """diffrax over `sample_ode` where programs are handed over to another thread, except those that may call the host.

    Its check for errors is such a call; with `throw=False` it has none.
    """
    diffrax = importlib.import_module("diffrax")
    model, params = network(config)
    grid, batch = times.uniform_grid(config.steps), config.batches[0]
    _, x_0 = start_at(config, batch)
    theirs = [functools.partial(diffrax_euler, diffrax, model, config.steps, throw=throw) for throw in (True, False)]
    functions = [*theirs, functools.partial(our_ode, model)]
    ran = in_turns(config, each(functions, params, x_0, grid))
    for i, name in enumerate(("diffrax", "diffrax, throw=False,")):
        yield ratio(f"{name} over sample_ode, batch {batch}, asynchronous dispatch: run time", ran, i, 2, packages=("diffrax",))


def diffrax_ode(config):
    """diffrax over `sample_ode`."""
    diffrax = importlib.import_module("diffrax")
    model, params = network(config)
    grid = times.uniform_grid(config.steps)

    functions = [functools.partial(diffrax_euler, diffrax, model, config.steps), functools.partial(our_ode, model)]
    for batch in config.batches:
        _, x_0 = start_at(config, batch)
        makers = each(functions, params, x_0, grid)
        against = f"diffrax over sample_ode, batch {batch}"
        packages = ("diffrax",)
        yield difference(f"{against}: results", *results(makers), packages=packages)
        yield ratio(f"{against}: run time", in_turns(config, makers), 0, 1, packages=packages)
        compiled, _ = compilations(dataclasses.replace(config, compiles=max(1, config.compiles // 2)), functions, [(params, x_0, grid)] * 2)
        yield ratio(f"{against}: compile time", compiled, 0, 1, packages=packages)


def diffrax_sde(config):
    """diffrax with a virtual Brownian tree over `sample_sde`. The noise is another, so means and deviations are compared."""
    diffrax, lineax = map(importlib.import_module, ("diffrax", "lineax"))
    model, params = network(config)
    grid = times.uniform_grid(config.steps)

    def theirs(params, key, x_0, grid):
        motion = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / config.steps, shape=x_0.shape, key=key)
        drift = diffrax.ODETerm(lambda t, x, _: model.apply(params, x, t))
        diffusion = diffrax.ControlTerm(lambda t, x, _: lineax.DiagonalLinearOperator(jnp.full_like(x, SIGMA)), motion)
        solution = diffrax.diffeqsolve(diffrax.MultiTerm(drift, diffusion), diffrax.Euler(), t0=0.0, t1=1.0, dt0=1 / config.steps, y0=x_0)
        return solution.ys[-1]

    functions = [theirs, functools.partial(our_sde, model)]
    for batch in config.batches:
        key, x_0 = start_at(config, batch)
        makers = each(functions, params, key, x_0, grid)
        against = f"diffrax, VirtualBrownianTree, over sample_sde, batch {batch}"
        packages = ("diffrax", "lineax")
        if batch > 1000:
            a, b = results(makers)
            yield difference(f"{against}: means of the results", a.mean(0), b.mean(0), packages=packages)
            yield difference(f"{against}: standard deviations of the results", a.std(0), b.std(0), packages=packages)
        yield ratio(f"{against}: run time", in_turns(config, makers), 0, 1, packages=packages)
        compiled, _ = compilations(
            dataclasses.replace(config, compiles=max(1, config.compiles // 2)), functions, [(params, key, x_0, grid)] * 2
        )
        yield ratio(f"{against}: compile time", compiled, 0, 1, packages=packages)


def torch_network(torch, params, depth):
    """The same network with the same weights in PyTorch, (t, x) -> like x."""
    layers = []
    for i in range(depth + 1):
        dense = params["params"][f"Dense_{i}"]
        linear = torch.nn.Linear(*dense["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.asarray(dense["kernel"]).T.copy()))
            linear.bias.copy_(torch.tensor(np.asarray(dense["bias"]).copy()))
        layers += [linear, torch.nn.SiLU()]
    body = torch.nn.Sequential(*layers[:-1])
    return lambda t, x: body(torch.cat([t.expand(len(x), 1), x], dim=-1))


def torch_forward(config):
    """PyTorch over JAX, without any sampler: one evaluation of the network, and what it is made of."""
    torch = importlib.import_module("torch")
    model, params = network(config)
    velocity, packages = torch_network(torch, params, config.depth), ("torch",)
    key = jax.random.key(config.seed)
    matrix = jax.random.normal(key, (config.width, config.width))
    torch_matrix = torch.tensor(np.asarray(matrix).copy())
    time_half = torch.tensor(0.5)
    for batch in config.batches:
        _, x_0 = start_at(config, batch)
        h = jax.random.normal(key, (batch, config.width))
        torch_x, torch_h = (torch.tensor(np.asarray(array).copy()) for array in (x_0, h))
        pairs = {
            "one evaluation of the network": (
                lambda x=torch_x: functools.partial(velocity, time_half, x.clone()),
                functools.partial(fresh, model.apply, params, x_0, 0.5),
            ),
            f"a product with {config.width} x {config.width}": (
                lambda h=torch_h: functools.partial(torch.matmul, h.clone(), torch_matrix.clone()),
                functools.partial(fresh, jnp.matmul, h, matrix),
            ),
            "silu": (
                lambda h=torch_h: functools.partial(torch.nn.functional.silu, h.clone()),
                functools.partial(fresh, jax.nn.silu, h),
            ),
        }
        for name, makers in pairs.items():
            for threads in torch_threads(torch):
                with torch.inference_mode():
                    measured = in_turns(dataclasses.replace(config, seconds=config.seconds / 4), makers)
                yield ratio(f"PyTorch, {threads}, over JAX, {name}, batch {batch}: run time", measured, 0, 1, packages=packages)


def torchdiffeq_ode(config):
    """torchdiffeq over `sample_ode`, eager as it comes."""
    torch, torchdiffeq = map(importlib.import_module, ("torch", "torchdiffeq"))
    grid = torch.linspace(0, 1, config.steps + 1)

    def theirs(velocity, x_0):
        return torchdiffeq.odeint(velocity, x_0, grid, method="euler")[-1]

    yield from torch_ode(config, torch, theirs, "torchdiffeq")


def flow_matching_ode(config):
    """flow_matching's `ODESolver` over `sample_ode`, eager as it comes."""
    torch, solver = map(importlib.import_module, ("torch", "flow_matching.solver"))

    def theirs(velocity, x_0):
        return solver.ODESolver(lambda x, t: velocity(t, x)).sample(x_0, step_size=1 / config.steps, method="euler")

    yield from torch_ode(config, torch, theirs, "flow_matching")


DIFFUSERS = {
    "FlowMatchEulerDiscreteScheduler": (sampling.euler, {}),
    "DPMSolverMultistepScheduler": (OVERHEAD["dpm_solver_pp 2"][0], {"solver_order": 2}),
    "UniPCMultistepScheduler": (OVERHEAD["unipc 2"][0], {"solver_order": 2}),
}
"""Schedulers of diffusers, the solver of the same name here, and their settings."""


def diffusers_ode(config):
    """diffusers' schedulers over `sample_ode` with the solver of the same name, eager as they come, their preparation included."""
    torch, diffusers = map(importlib.import_module, ("torch", "diffusers"))
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    for name, (step, settings) in DIFFUSERS.items():
        scheduler = getattr(diffusers, name)(**({**flows, **settings} if settings else {}))

        def theirs(velocity, x, scheduler=scheduler, euler=not settings):
            """They predict noise less data, and count time from data."""
            if euler:
                scheduler.set_timesteps(sigmas=np.linspace(1, 0, config.steps + 1)[:-1])
            else:
                scheduler.set_timesteps(config.steps)
            for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
                x = scheduler.step(-velocity(1 - sigma, x), t, x).prev_sample
            return x

        yield from torch_ode(config, torch, theirs, "diffusers", f"diffusers' {name}", step)


def torch_ode(config, torch, theirs, package, name=None, step=sampling.euler):
    """A solver of PyTorch over `sample_ode`."""
    name = name or package
    model, params = network(config)
    grid = times.uniform_grid(config.steps)
    velocity, packages = torch_network(torch, params, config.depth), (package, "torch")
    quick = dataclasses.replace(config, seconds=config.seconds / 2)
    for batch in config.batches:
        _, x_0 = start_at(config, batch)
        torch_x = torch.tensor(np.asarray(x_0).copy())
        makers = [
            lambda x=torch_x: functools.partial(theirs, velocity, x.clone()),
            *each([functools.partial(our_ode, model, step=step)], params, x_0, grid),
        ]
        for threads in torch_threads(torch):
            with torch.inference_mode():
                ends, measured = results(makers), in_turns(quick, makers)
            against = f"{name}, {threads}, over sample_ode, batch {batch}"
            if step is sampling.euler:  # The others' polynomials are in another variable.
                yield difference(f"{against}: results", *ends, packages=packages)
            yield ratio(f"{against}: run time", measured, 0, 1, packages=packages)


PEERS = {
    diffrax_ode: ("diffrax",),
    asynchronous: ("diffrax",),
    diffrax_sde: ("diffrax",),
    torch_forward: ("torch",),
    torchdiffeq_ode: ("torch", "torchdiffeq"),
    flow_matching_ode: ("torch", "flow_matching"),
    diffusers_ode: ("torch", "diffusers"),
}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
