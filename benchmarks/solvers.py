"""Error against evaluations for every solver: a JSON file of rows, and a picture.

    python -m benchmarks.solvers --out results/solvers.json
    make bench-solvers ARGS="--out results/solvers.json"        the same beside diffusers' schedulers; about an hour on two cores

Four flows: (a) of one Gaussian in one dimension, whose map is known; (b) of a mixture in the plane and (c) in 64 dimensions,
from the exact velocity and against a fine solution; (d) of the digits that `make demo` learnt to draw, against its own fine
solution. An error is the mean of |x - x*| over points and coordinates from the same noise, "W2" the Wasserstein distance to as many
draws of the data. All on the linear path. A solver has at most the evaluations that a row names, each step as many as it takes.

Rows "uniform" follow equal steps, rows "quadratic" those of `times.quadratic`, which shrink towards data; rows "fitted" follow the
grid that `times.optimize_grid` found for that solver and number of evaluations from other noise; the map of (a) is two numbers, which a
grid can be made to meet, so (b) and (c) say more of them. diffusers' schedulers run on the uniform grid, as they come, in float32
with the same velocity; ratios to them are rounded to four digits.
"""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.rows import describe, finish, ready, row, short, start
from experiments import gallery
from fmjax import guidance, marginals, metrics, paths, sampling, times
from fmjax.data import digits

PATH = paths.Linear()
SOLVERS = {
    "euler": (sampling.euler, 1),
    "heun": (sampling.heun, 2),
    "midpoint": (sampling.midpoint, 2),
    "ralston": (sampling.ralston, 2),
    "rk4": (sampling.rk4, 4),
    **{f"adams_bashforth {k}": (sampling.adams_bashforth(k), 1) for k in (2, 3, 4)},
    **{f"dpm_solver_pp {k}": (sampling.dpm_solver_pp(PATH, k), 1) for k in (2, 3)},
    **{f"unipc {k}": (sampling.unipc(PATH, k), 1) for k in (1, 2, 3)},
    **{f"deis {k}": (sampling.deis(PATH, k), 1) for k in (2, 3)},
}
"""Each with its evaluations per step."""
NAMESAKES = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler 2": "dpm_solver_pp 2",
    "DPMSolverMultistepScheduler 3": "dpm_solver_pp 3",
    "UniPCMultistepScheduler 1": "unipc 1",
    "UniPCMultistepScheduler 2": "unipc 2",
    "UniPCMultistepScheduler 3": "unipc 3",
}
"""Schedulers of diffusers, and the solver of the same name here."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the error of every solver; prints one JSON line a number."""

    out: Path | None = None
    """Where the rows are written, and the picture beside them."""
    evaluations: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Evaluations of the field."""
    points: int = 4000
    """Of (a); the others have a quarter, since W2 is slow."""
    fitting_points: int = 512
    """Of the grids that are fitted, from other noise."""
    iterations: int = 60
    """Of the fit of a grid."""
    only: tuple[str, ...] = ()
    """Flows to measure, by name; all of them where none is named."""
    digits: Path = Path("runs/digits")
    """The run of `make demo`."""
    scale: float = 3.0
    """Guidance of the digits."""
    images: int = 100
    """Digits."""
    seed: int = 0
    """Of the noise."""


def main(config: Config):
    start()
    jax.config.update("jax_enable_x64", True)
    where = describe()
    began, rows = time.perf_counter(), []
    for make in (gaussian, mixture, mixture_64, of_digits):
        if not config.only or make.__name__ in config.only:
            print(f"{time.perf_counter() - began:6.0f} s  {make.__name__}", file=sys.stderr, flush=True)
            for each in make(config):
                rows.append(finish(each, where))
                print(json.dumps(rows[-1]), flush=True)
    print(f"{time.perf_counter() - began:6.0f} s  done", file=sys.stderr)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        draw(config.out.with_suffix(".png"), rows)


def gaussian(config):
    """(a), N(3, 1/4) from its exact velocity, whose map is 3 + x / 2; beside diffusers."""
    data = marginals.GaussianMixture(jnp.ones(1), jnp.full((1, 1), 3.0), jnp.full(1, 0.5))
    x_0 = jax.random.normal(jax.random.key(config.seed), (config.points, 1))
    to_fit = (*NAMESAKES.values(), "adams_bashforth 2", "adams_bashforth 3")
    rows = list(flow(config, "gaussian", marginals.velocity(PATH, data), x_0, lambda x_0: 3 + x_0 / 2, None, to_fit))
    yield from rows
    if not ready(diffusers_errors, ("diffusers", "torch"), "bench-solvers"):
        return
    theirs = list(diffusers_errors(config, x_0))
    yield from theirs
    yield from verdicts(config, rows, theirs)


def mixture(config):
    """(b), eight Gaussians on a circle."""
    angle = jnp.arange(8) * jnp.pi / 4
    data = marginals.GaussianMixture(jnp.ones(8) / 8, 2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1), jnp.full(8, 0.2))
    yield from exact_field(config, "mixture", data)


def mixture_64(config):
    """(c), ten Gaussians in 64 dimensions."""
    means = jax.random.normal(jax.random.key(3), (10, 64))
    yield from exact_field(config, "mixture_64", marginals.GaussianMixture(jnp.ones(10) / 10, means, jnp.full(10, 0.3)))


def exact_field(config, name, data):
    """A mixture's flow, against a fine solution and against draws of the data."""
    n, field = config.points // 4, marginals.velocity(PATH, data)
    x_0 = jax.random.normal(jax.random.key(config.seed), (n, *data.means.shape[1:]))
    draws = data.sample(jax.random.key(config.seed + 1), n)
    floor = metrics.wasserstein(data.sample(jax.random.key(config.seed + 2), n), draws)
    yield row(f"{name}: W2 of draws to draws", floor, "distance")
    yield from flow(
        config, name, field, x_0, fine(field), draws, ("euler", "adams_bashforth 2", "adams_bashforth 3", "dpm_solver_pp 2", "unipc 2")
    )


def of_digits(config):
    """(d), the guided velocity of the network that `make demo` trained, in its own precision."""
    with jax.enable_x64(False):
        y = jnp.arange(config.images) % digits.CLASSES
        field = guidance.classifier_free(gallery.network(config.digits), y, digits.CLASSES, config.scale)
        x_0 = sampling.noise(jax.random.key(config.seed), (config.images, 8, 8, 1))
        yield from flow(config, "digits", field, x_0, fine(field, 100), None, ())


def fine(field, steps=2000):
    """The map of a flow, by many steps that shrink towards noise and data."""
    return lambda x_0: jax.jit(lambda x_0: sampling.sample_ode(field, x_0, times.cosine(times.uniform_grid(steps)), step=sampling.rk4)[0])(
        x_0
    )


def steps_of(name, evaluations):
    """How many steps a solver has from so many evaluations, or 0."""
    step, each = SOLVERS[name]
    # Above order 3 the first step is one of rk4, with four more.
    steps = evaluations // each - (4 if name == "adams_bashforth 4" else 0)
    return steps if steps >= (int(name[-1]) if isinstance(step, sampling.Multistep) else 1) else 0


def flow(config, name, field, x_0, exact, draws, to_fit):
    """Rows of one flow: every solver on the uniform grid, some on grids fitted to them."""
    x_1 = exact(x_0)
    for solver, (step, _) in SOLVERS.items():
        for evaluations in config.evaluations:
            steps = steps_of(solver, evaluations)
            if not steps:
                continue
            sample = jax.jit(lambda x_0, grid, step=step: sampling.sample_ode(field, x_0, grid, step=step)[0])
            grids = {"uniform": times.uniform_grid(steps), "quadratic": times.quadratic(times.uniform_grid(steps))}
            if solver in to_fit and steps > 1:
                grids["fitted"] = fit(config, sample, exact, x_0, steps)
            for grid, ts in grids.items():
                yield from errors(name, solver, grid, evaluations, sample(x_0, ts), x_1, draws)


def fit(config, sample, exact, x_0, steps):
    """The grid that serves a solver best, from noise that is not measured."""
    other = jax.random.normal(jax.random.key(config.seed + 7), (config.fitting_points, *x_0.shape[1:]), x_0.dtype)
    there = exact(other)
    return times.optimize_grid(
        lambda grid: ((sample(other, grid) - there) ** 2).mean(), times.uniform_grid(steps), iterations=config.iterations
    )


def errors(name, solver, grid, evaluations, found, x_1, draws, **more):
    what = f"{name}: {solver}, {grid} grid, {evaluations} evaluations"
    about = {"flow": name, "solver": solver, "grid": grid, "evaluations": evaluations, **more}
    yield row(f"{what}: error", float(jnp.abs(found - x_1).mean()), "mean absolute error", **about)
    if draws is not None:
        yield row(f"{what}: W2", metrics.wasserstein(found, draws), "distance", **about)


def diffusers_errors(config, x_0):
    """diffusers' schedulers on (a), with the times that they step between."""
    torch, diffusers = importlib.import_module("torch"), importlib.import_module("diffusers")
    noise = torch.tensor(np.asarray(x_0, np.float32).copy())

    def velocity(x, t):
        variance = t**2 / 4 + (1 - t) ** 2
        data, noise = 3 + t / 4 * (x - 3 * t) / variance, (1 - t) * (x - 3 * t) / variance
        return data - noise

    flow_settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    for name, namesake in NAMESAKES.items():
        kind, *order = name.split()
        for evaluations in config.evaluations:
            settings = {"solver_order": int(order[0]), **flow_settings} if order else {}
            scheduler = getattr(diffusers, kind)(**settings)
            # Heun's has one evaluation in its last step.
            steps = (evaluations + 1) // 2 if namesake == "heun" else evaluations
            if namesake == "euler":
                scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
            else:
                scheduler.set_timesteps(steps)
            x = noise.clone()
            for i, t in enumerate(scheduler.timesteps):
                # They predict noise less data, and count time from data.
                x = scheduler.step(-velocity(x, 1 - float(scheduler.sigmas[i])), t, x).prev_sample
            found = jnp.asarray(x.numpy(), x_0.dtype)
            yield from errors(
                "gaussian", name, "uniform", evaluations, found, 3 + x_0 / 2, None, namesake=namesake, packages=("diffusers", "torch")
            )


def verdicts(config, ours, theirs):
    """Each solver against its namesake, and the best against the best."""
    packages = ("diffusers", "torch")

    def of(rows, evaluations, grid):
        some = [one for one in rows if one["evaluations"] == evaluations and one["grid"] == grid]
        return {one["solver"]: one["value"] for one in some}

    for evaluations in config.evaluations:
        others = of(theirs, evaluations, "uniform")
        best_other = min(others, key=others.__getitem__)
        for grid in ("uniform", "quadratic", "fitted"):
            found = of(ours, evaluations, grid)
            for name, namesake in NAMESAKES.items():
                if namesake in found:
                    what = f"gaussian: {namesake}, {grid} grid, over {name}, {evaluations} evaluations"
                    yield row(what, short(found[namesake] / others[name]), "ratio", most=1, packages=packages)
            best = min(found, key=found.__getitem__)
            what = f"gaussian: best, {grid} grid, over diffusers' best, {evaluations} evaluations"
            of_best = short(found[best] / others[best_other])
            yield row(what, of_best, "ratio", most=0.5, solvers=[best, best_other], packages=packages)


DOTTED = {"mixture": "fitted", "mixture_64": "fitted", "digits": "quadratic"}
"""The grid of the picture's dotted lines; the grids that are fitted to (a) would leave no room for the rest."""


def draw(file, rows):
    """A panel a flow, a line a solver: solid on the uniform grid, dotted on another."""
    from matplotlib.figure import Figure

    rows = [one for one in rows if one["unit"] == "mean absolute error"]
    flows = list(dict.fromkeys(one["flow"] for one in rows))
    figure = Figure(figsize=(4.4 * len(flows), 5), layout="constrained")
    handles = {}
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(flows))), flows, strict=True):
        dotted = DOTTED.get(name)
        for solver, grid in dict.fromkeys((one["solver"], one["grid"]) for one in rows if one["flow"] == name):
            if grid not in ("uniform", dotted):
                continue
            points = [
                (one["evaluations"], one["value"]) for one in rows if (one["flow"], one["solver"], one["grid"]) == (name, solver, grid)
            ]
            if solver in NAMESAKES:
                label, style = "diffusers", {"color": "0.6", "linestyle": "--", "marker": "x"}
            else:
                number = list(SOLVERS).index(solver)
                label, style = solver, {"color": f"C{number % 10}", "marker": "osv^"[number // 4]}
            axes.loglog(*zip(*points, strict=True), markersize=4, linewidth=1, **{"linestyle": "-" if grid == "uniform" else ":", **style})
            handles.setdefault(label, axes.lines[-1])
        axes.set(title=f"{name}; dotted: {dotted} grid" if dotted else name, xlabel="evaluations", ylabel="mean absolute error")
        ticks = sorted({one["evaluations"] for one in rows})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
