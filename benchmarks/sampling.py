"""Samplers against a scan written by hand, and against public solvers: one JSON line per number.

    python -m benchmarks.sampling --out results/sampling.jsonl
    make bench-baselines ARGS="--out results/sampling.jsonl"    the same beside diffrax, torchdiffeq, flow_matching and diffusers

What a row says, and how it is measured, is at the head of `benchmarks/harness.py`.

Where a public solver is as fast or faster, and why: PyTorch's bare network at a batch of 1024 takes three quarters of XLA's time with two
threads on two free cores, since its matrix products and its silu each take about half. What eager dispatch costs eats the advantage, so
that torchdiffeq's sampler is about equal there, and slower at 1 and at 10,000.
"""

import dataclasses
import functools
import importlib
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from benchmarks import harness
from fmjax import guidance, paths, sampling, times
from fmjax.models import dit, mlp

SIGMA = 0.5
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


@dataclasses.dataclass(frozen=True)
class Config(harness.Config):
    """Measures the samplers; prints one JSON line per number."""

    batches: tuple[int, ...] = (1, 1024, 10_000)
    """Batch sizes, in points."""
    steps: int = 100
    """Steps of a sampler."""
    width: int = 64
    """Features per layer of the MLP."""
    depth: int = 4
    """Features per layer of the MLP."""
    guidance_batches: tuple[int, ...] = (256, 1024)
    """Numbers of points in the measurement of guidance."""
    image_batches: tuple[int, ...] = (64, 256)
    """Numbers of images in the measurement of guidance."""
    image_steps: int = 10
    """Steps of a sampler of images."""
    solver_depth: int = 12
    """Blocks of the DiT-S/4 in the measurement of what solvers add to it."""
    solver_steps: int = 50
    """Steps of every solver there."""
    repeats: int = 11
    compiles: int = 7


def network(config, classes=None):
    """The MLP and its weights at random."""
    model = mlp.MLP(hidden_size=config.width, depth=config.depth, num_classes=classes)
    labels = () if classes is None else (jnp.zeros(1, int),)
    return model, model.init(jax.random.key(config.seed), jnp.zeros((1, 2)), 0.5, *labels)


def transformer(config, scale, shape, *labels, **fields):
    """A transformer and its weights at random, since a new one gives zero everywhere."""
    model, random = dit.DiT(scan=True, **fields), np.random.default_rng(config.seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), 0.5, *labels)
    return model, jax.tree.map(lambda leaf: jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32)), shapes)


def start_at(config, *shape):
    """A sampler's noise, and another key."""
    key, key_0 = jax.random.split(jax.random.key(config.seed + 1))
    return key, sampling.noise(key_0, shape)


def compared(config, against, functions, *arguments, most=None, compile_most=None, compiles=None, **more):
    """Run time and compile time of the first function over the second."""
    yield harness.ratio(f"{against}: run time", harness.interleaved(config, harness.each(functions, *arguments)), 0, 1, most=most, **more)
    config = dataclasses.replace(config, compiles=min(config.compiles, compiles or config.compiles))
    compiled = harness.compilations(config, functions, [arguments] * 2)
    yield harness.ratio(f"{against}: compile time", compiled, 0, 1, most=compile_most, **more)


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
        idx, t, dt = interval
        keys_step = jax.vmap(jax.random.fold_in, (0, None))(keys, idx)
        epsilon = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys_step)
        return x + dt * model.apply(params, x, t) + jnp.sqrt(dt) * SIGMA * epsilon, None

    return lax.scan(body, x_0, (jnp.arange(len(grid) - 1), grid[:-1], jnp.diff(grid)))[0]


def ode(config):
    """`sample_ode` over Euler's method written by hand."""
    model, params = network(config)
    functions, grid = [functools.partial(our_ode, model), functools.partial(hand_ode, model)], times.uniform_grid(config.steps)
    for batch in config.batches:
        against, arguments = f"sample_ode over a scan by hand, batch {batch}", (params, start_at(config, batch, 2)[1], grid)
        yield harness.difference(f"{against}: results", harness.each(functions, *arguments))
        yield from compared(config, against, functions, *arguments, most=1.03, compile_most=1.2)


def sde(config):
    """`sample_sde` over Euler and Maruyama's method written by hand, with one key and with a key per example."""
    model, params = network(config)
    pairs = {"": (our_sde, hand_sde), " with a key per example": (our_sde_key_each, hand_sde_key_each)}
    for batch in config.batches:
        key, x_0 = start_at(config, batch, 2)
        arguments = params, key, x_0, times.uniform_grid(config.steps)
        for which, pair in pairs.items():
            against, functions = f"sample_sde over a scan by hand{which}, batch {batch}", [functools.partial(each, model) for each in pair]
            if which:
                yield harness.difference(f"{against}: results", harness.each(functions, *arguments))
            yield from compared(config, against, functions, *arguments, most=1.03, compile_most=1.2)


def guided(config, name, model, params, shape, steps):
    """Classifier-free guidance over none: the same work at scale 1, twice the batch at another."""
    _, x_0 = start_at(config, *shape)

    def none(params, x_0, y):
        return sampling.sample_ode(lambda x, t: model.apply(params, x, t, y), x_0, times.uniform_grid(steps), step=sampling.euler)[0]

    def scaled(scale, params, x_0, y):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, 10, scale)
        return sampling.sample_ode(field, x_0, times.uniform_grid(steps), step=sampling.euler)[0]

    makers = harness.each([functools.partial(scaled, 1.0), functools.partial(scaled, 3.0), none], params, x_0, jnp.arange(len(x_0)) % 10)
    yield harness.difference(f"guidance at scale 1 over none, {name}: results", makers[::2])
    ran = harness.interleaved(config, makers)
    yield harness.ratio(f"guidance at scale 1 over none, {name}: run time", ran, 0, 2, most=1.02)
    yield harness.ratio(f"guidance at scale 3 over none, {name}: run time", ran, 1, 2, most=2.05)


def guided_points(config):
    """Guidance of the MLP."""
    for batch in config.guidance_batches:
        yield from guided(config, f"MLP, batch {batch}", *network(config, classes=10), (batch, 2), config.steps)


def guided_images(config):
    """Guidance of a small diffusion transformer."""
    model = transformer(config, 0.05, (1, 8, 8, 1), jnp.zeros(1, int), patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10)
    for batch in config.image_batches:
        yield from guided(config, f"DiT, batch {batch}", *model, (batch, 8, 8, 1), config.image_steps)


def overhead(config):
    """Every solver over as many bare evaluations of a DiT-S/4 for one image of 32 x 32."""
    model, params = transformer(config, 0.02, (1, 32, 32, 4), patch_size=4, hidden_size=384, depth=config.solver_depth, num_heads=6)
    key, x_0 = start_at(config, 1, 32, 32, 4)

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
        yield from compared(config, against, functions, params, x_0, times.uniform_grid(config.solver_steps), most=1.05, compiles=2)


# The public solvers. They are imported by name and only where they are installed.


def diffrax_ode(config):
    """diffrax's Euler with constant steps, its other settings as they come, over `sample_ode`."""
    diffrax = importlib.import_module("diffrax")
    model, params = network(config)

    def theirs(params, x_0, grid):
        term, constant = diffrax.ODETerm(lambda t, x, _: model.apply(params, x, t)), diffrax.ConstantStepSize()
        ends = {"t0": 0.0, "t1": 1.0, "dt0": 1 / config.steps}
        return diffrax.diffeqsolve(term, diffrax.Euler(), **ends, y0=x_0, stepsize_controller=constant).ys[-1]

    functions, grid = [theirs, functools.partial(our_ode, model)], times.uniform_grid(config.steps)
    for batch in config.batches:
        against, arguments = f"diffrax over sample_ode, batch {batch}", (params, start_at(config, batch, 2)[1], grid)
        yield harness.difference(f"{against}: results", harness.each(functions, *arguments), packages=("diffrax",))
        yield from compared(config, against, functions, *arguments, compiles=3, packages=("diffrax",))


def diffrax_sde(config):
    """diffrax with a virtual Brownian tree over `sample_sde`."""
    diffrax, lineax = map(importlib.import_module, ("diffrax", "lineax"))
    model, params = network(config)

    def theirs(params, key, x_0, grid):
        motion = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / config.steps, shape=x_0.shape, key=key)
        drift = diffrax.ODETerm(lambda t, x, _: model.apply(params, x, t))
        diffusion = diffrax.ControlTerm(lambda t, x, _: lineax.DiagonalLinearOperator(jnp.full_like(x, SIGMA)), motion)
        terms, ends = diffrax.MultiTerm(drift, diffusion), {"t0": 0.0, "t1": 1.0, "dt0": 1 / config.steps}
        return diffrax.diffeqsolve(terms, diffrax.Euler(), **ends, y0=x_0).ys[-1]

    for batch in config.batches:
        key, x_0 = start_at(config, batch, 2)
        against, functions = f"diffrax, VirtualBrownianTree, over sample_sde, batch {batch}", [theirs, functools.partial(our_sde, model)]
        arguments = params, key, x_0, times.uniform_grid(config.steps)
        yield from compared(config, against, functions, *arguments, compiles=3, packages=("diffrax", "lineax"))


def torchdiffeq_ode(config):
    """torchdiffeq over `sample_ode`, eager as it comes."""
    torch, torchdiffeq = map(importlib.import_module, ("torch", "torchdiffeq"))
    grid = torch.linspace(0, 1, config.steps + 1)
    yield from torch_ode(config, lambda velocity, x_0: torchdiffeq.odeint(velocity, x_0, grid, method="euler")[-1], "torchdiffeq")


def flow_matching_ode(config):
    """flow_matching's `ODESolver` over `sample_ode`, eager as it comes."""
    solver = importlib.import_module("flow_matching.solver")

    def theirs(velocity, x_0):
        return solver.ODESolver(lambda x, t: velocity(t, x)).sample(x_0, step_size=1 / config.steps, method="euler")

    yield from torch_ode(config, theirs, "flow_matching")


DIFFUSERS = {
    "FlowMatchEulerDiscreteScheduler": (sampling.euler, {}),
    "DPMSolverMultistepScheduler": (OVERHEAD["dpm_solver_pp 2"][0], {"solver_order": 2}),
    "UniPCMultistepScheduler": (OVERHEAD["unipc 2"][0], {"solver_order": 2}),
}
"""Schedulers of diffusers, the solver of the same name here, and their settings."""


def scheduler_ends(name, settings, velocity, x, steps, heun=False):
    """Where a scheduler of diffusers takes x by a velocity (t, x) -> like x; they predict noise less data, and count time from data."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    scheduler = getattr(importlib.import_module("diffusers"), name)(**({**flow, **settings} if settings else {}))
    if settings or heun:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(-velocity(1 - sigma, x), t, x).prev_sample
    return x


def diffusers_ode(config):
    """diffusers' schedulers over `sample_ode` with the solver of the same name, eager as they come, their preparation included."""
    for name, (step, settings) in DIFFUSERS.items():

        def theirs(velocity, x, name=name, settings=settings):
            return scheduler_ends(name, settings, velocity, x, config.steps)

        yield from torch_ode(config, theirs, "diffusers", f"diffusers' {name}", step)


def torch_ode(config, theirs, package, name=None, step=sampling.euler):
    """A solver of PyTorch, with as many threads as there are cores, over `sample_ode`."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    model, params = network(config)
    layers = []
    for i in range(config.depth + 1):
        kernel, bias = (tensor(torch, params["params"][f"Dense_{i}"][name]) for name in ("kernel", "bias"))
        layers += [torch.nn.Linear(*kernel.shape), torch.nn.SiLU()]
        layers[-2].load_state_dict({"weight": kernel.T, "bias": bias})
    body = torch.nn.Sequential(*layers[:-1])

    def velocity(t, x):
        return body(torch.cat([t.expand(len(x), 1), x], dim=-1))

    for batch in config.batches:
        _, x_0 = start_at(config, batch, 2)
        ours = harness.each([functools.partial(our_ode, model, step=step)], params, x_0, times.uniform_grid(config.steps))
        torch_x = tensor(torch, x_0)
        makers = [lambda x=torch_x: functools.partial(theirs, velocity, x.clone()), *ours]
        against = f"{name or package}, {torch.get_num_threads()} threads, over sample_ode, batch {batch}"
        with torch.inference_mode():
            if step is sampling.euler:  # The others' polynomials are in another variable.
                yield harness.difference(f"{against}: results", makers, packages=(package, "torch"))
            measured = harness.interleaved(dataclasses.replace(config, seconds=config.seconds / 2), makers)
        yield harness.ratio(f"{against}: run time", measured, 0, 1, packages=(package, "torch"))


def tensor(torch, array):
    """An array of JAX's as one of PyTorch's."""
    return torch.tensor(np.asarray(array).copy())


PARTS = [ode, sde, guided_points, guided_images, overhead]
BASELINES = {
    diffrax_ode: ("diffrax",),
    diffrax_sde: ("diffrax",),
    torchdiffeq_ode: ("torch", "torchdiffeq"),
    flow_matching_ode: ("torch", "flow_matching"),
    diffusers_ode: ("torch", "diffusers"),
}


def main(config: Config):
    harness.start()
    harness.report(config, harness.chosen(config, PARTS, BASELINES))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.sampling")))
