"""Error against evaluations for every solver: a JSON file of rows, and a plot.

    python -m benchmarks.solvers --out results/solvers.json
    make bench-solvers ARGS="--out results/solvers.json"        the same beside diffusers' schedulers; under an hour on two cores

Three flows on the linear path: (a) of one Gaussian in one dimension, whose map is known; (b) of a mixture in the plane and (c) in 64
dimensions, from the exact velocity and against a fine solution. An error is the mean of |x - x*| over points and coordinates from the same
noise, "W2" the Wasserstein distance to as many draws of the data. A solver has at most the evaluations that a row names.

Rows "uniform" follow equal steps, rows "quadratic" those of `times.quadratic`, which shrink towards data; rows "optimized" follow the
grid that `times.optimize_grid` found for that solver and number of evaluations from other noise; the map of (a) is two numbers, which a
grid can be made to meet, so (b) and (c) say more of them. diffusers' schedulers run on the uniform grid, as they come, in float32
with the same velocity.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.harness import row
from benchmarks.sampling import scheduler_ends
from fmjax import marginals, metrics, paths, sampling, times

PATH = paths.Linear()


def made(path):
    """Every solver of a flow on a path, with its evaluations per step."""
    return {
        "euler": (sampling.euler, 1),
        "heun": (sampling.heun, 2),
        "midpoint": (sampling.midpoint, 2),
        "ralston": (sampling.ralston, 2),
        "rk4": (sampling.rk4, 4),
        **{f"adams_bashforth {k}": (sampling.adams_bashforth(k), 1) for k in (2, 3, 4)},
        **{f"dpm_solver_pp {k}": (sampling.dpm_solver_pp(path, k), 1) for k in (2, 3)},
        **{f"unipc {k}": (sampling.unipc(path, k), 1) for k in (1, 2, 3)},
        **{f"deis {k}": (sampling.deis(path, k), 1) for k in (2, 3)},
    }


SOLVERS = made(PATH)
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
GRIDS = ("uniform", "quadratic", "optimized")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the error of every solver; prints one JSON line per number."""

    out: Path | None = None
    """File that the metrics are written to, with the plot beside it."""
    only: tuple[str, ...] = ()
    """Flows to measure, by name; all by default."""
    evaluations: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Evaluations of the field."""
    points: int = 4000
    """Noise points of the Gaussian flow; the others take a quarter, since W2 is slow."""
    fitting_points: int = 512
    """Noise points from which a grid is optimized."""
    iterations: int = 60
    """Iterations of `times.optimize_grid`."""
    seed: int = 0
    """Seed of the noise."""


def gaussian(config):
    """(a), N(3, 1/4) from its exact velocity, whose map is 3 + x / 2; beside diffusers."""
    data = marginals.GaussianMixture(jnp.ones(1), jnp.full((1, 1), 3.0), jnp.full(1, 0.5))
    x_0 = jax.random.normal(jax.random.key(config.seed), (config.points, 1))
    to_fit = (*NAMESAKES.values(), "adams_bashforth 2", "adams_bashforth 3")
    rows = list(flow(config, "gaussian", marginals.velocity(PATH, data), x_0, lambda x_0: 3 + x_0 / 2, None, to_fit))
    yield from rows
    if harness.ready(diffusers_errors, ("diffusers", "torch")):
        theirs = list(diffusers_errors(config, x_0))
        yield from theirs
        yield from verdicts(config, rows, theirs)


def mixture(config):
    """(b), eight Gaussians on a circle."""
    angle = jnp.arange(8) * jnp.pi / 4
    means = 2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    yield from exact_field(config, "mixture", marginals.GaussianMixture(jnp.ones(8) / 8, means, jnp.full(8, 0.2)))


def mixture_64(config):
    """(c), ten Gaussians in 64 dimensions."""
    means = jax.random.normal(jax.random.key(3), (10, 64))
    yield from exact_field(config, "mixture_64", marginals.GaussianMixture(jnp.ones(10) / 10, means, jnp.full(10, 0.3)))


def exact_field(config, name, data):
    """A mixture's flow, against a fine solution, by many steps that shrink towards noise and data, and against draws of the data."""
    n, field = config.points // 4, marginals.velocity(PATH, data)
    x_0 = jax.random.normal(jax.random.key(config.seed), (n, *data.means.shape[1:]))
    draws = data.sample(jax.random.key(config.seed + 1), n)
    fine = jax.jit(lambda x_0: sampling.sample_ode(field, x_0, times.cosine(times.uniform_grid(2000)), step=sampling.rk4)[0])
    to_fit = ("euler", "adams_bashforth 2", "adams_bashforth 3", "dpm_solver_pp 2", "unipc 2")
    yield from flow(config, name, field, x_0, fine, draws, to_fit)


def steps_of(name, evaluations):
    """How many steps a solver has from so many evaluations, or 0."""
    step, each = SOLVERS[name]
    # Above order 3 the first step is one of rk4, with four more.
    steps = evaluations // each - (4 if name == "adams_bashforth 4" else 0)
    return steps if steps >= (int(name[-1]) if isinstance(step, sampling.Multistep) else 1) else 0


def flow(config, name, field, x_0, exact, draws, to_fit):
    """Rows of one flow: every solver on the uniform grid and the quadratic one, some on grids optimized for them from noise of its own."""
    x_1 = exact(x_0)
    other = jax.random.normal(jax.random.key(config.seed + 7), (config.fitting_points, *x_0.shape[1:]), x_0.dtype)
    there = exact(other)
    for solver, (step, _) in SOLVERS.items():
        for evaluations in config.evaluations:
            steps = steps_of(solver, evaluations)
            if not steps:
                continue
            sample = jax.jit(lambda x_0, grid, step=step: sampling.sample_ode(field, x_0, grid, step=step)[0])
            grids = {"uniform": times.uniform_grid(steps), "quadratic": times.quadratic(times.uniform_grid(steps))}
            if solver in to_fit and steps > 1:

                def error(grid, sample=sample):
                    return ((sample(other, grid) - there) ** 2).mean()

                grids["optimized"] = times.optimize_grid(error, times.uniform_grid(steps), iterations=config.iterations)
            for grid, ts in grids.items():
                yield from errors(name, solver, grid, evaluations, sample(x_0, ts), x_1, draws)


def errors(name, solver, grid, evaluations, found, x_1, draws, **more):
    what = f"{name}: {solver}, {grid} grid, {evaluations} evaluations"
    about = {"flow": name, "solver": solver, "grid": grid, "evaluations": evaluations, **more}
    yield row(f"{what}: error", float(jnp.abs(found - x_1).mean()), "mean absolute error", **about)
    if draws is not None:
        yield row(f"{what}: W2", metrics.wasserstein(found, draws), "distance", **about)


def diffusers_errors(config, x_0):
    """diffusers' schedulers on (a)."""
    torch = importlib.import_module("torch")

    def velocity(t, x):
        variance = t**2 / 4 + (1 - t) ** 2
        return 3 + (t / 4 - (1 - t)) * (x - 3 * t) / variance

    for name, namesake in NAMESAKES.items():
        kind, *order = name.split()
        for evaluations in config.evaluations:
            # Heun's has one evaluation in its last step.
            steps = (evaluations + 1) // 2 if namesake == "heun" else evaluations
            x = torch.tensor(np.asarray(x_0, np.float32).copy())
            ends = scheduler_ends(kind, {"solver_order": int(order[0])} if order else {}, velocity, x, steps, heun=namesake == "heun")
            found, more = jnp.asarray(ends.numpy(), x_0.dtype), {"namesake": namesake, "packages": ("diffusers", "torch")}
            yield from errors("gaussian", name, "uniform", evaluations, found, 3 + x_0 / 2, None, **more)


def verdicts(config, ours, theirs):
    """Each solver against its namesake, and the best against the best."""
    packages = ("diffusers", "torch")
    for evaluations in config.evaluations:
        others = {each["solver"]: each["value"] for each in theirs if each["evaluations"] == evaluations}
        best_other = min(others, key=others.__getitem__)
        for grid in GRIDS:
            found = {each["solver"]: each["value"] for each in ours if (each["evaluations"], each["grid"]) == (evaluations, grid)}
            for name, namesake in NAMESAKES.items():
                if namesake in found:
                    what = f"gaussian: {namesake}, {grid} grid, over {name}, {evaluations} evaluations"
                    yield row(what, found[namesake] / others[name], "ratio", most=1, packages=packages)
            best = min(found, key=found.__getitem__)
            what = f"gaussian: best, {grid} grid, over diffusers' best, {evaluations} evaluations"
            yield row(what, found[best] / others[best_other], "ratio", most=0.5, solvers=[best, best_other], packages=packages)


def curves(rows):
    """What `draw` takes: a panel per flow and grid, a line per solver."""
    rows = [each for each in rows if each["unit"] == "mean absolute error"]
    found = {}
    for each in rows:
        found.setdefault((each["grid"], each["flow"], each["solver"]), []).append((each["evaluations"], each["value"]))
    return [(*key, *zip(*points, strict=True)) for key, points in found.items()]


def draw(file, curves, x_label):
    """A grid of panels with errors over numbers of steps: a curve is its panel's row and column, its label, and both coordinates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows, columns, labels = (list(dict.fromkeys(curve[i] for curve in curves)) for i in range(3))
    figure = Figure(figsize=(1.9 * len(columns) + 3, 1.8 * len(rows) + 1.2), layout="constrained")
    panels, handles = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False), {}
    for line, column, label, x, y in curves:
        i = labels.index(label)
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10], "linewidth": 1.2}
        (handles[label],) = panels[rows.index(line), columns.index(column)].loglog(x, np.maximum(y, 1e-9), **style)
    for i, j in np.ndindex(panels.shape):
        axes: Any = panels[i, j]
        axes.grid(alpha=0.3)
        # Those between the powers of ten would overlap.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=columns[j] * (i == 0), xlabel=x_label * (i == len(rows) - 1), ylabel=rows[i] * (j == 0))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=90)


def main(config: Config):
    harness.start()
    jax.config.update("jax_enable_x64", True)
    rows = harness.report(config, harness.chosen(config, [gaussian, mixture, mixture_64]))
    if config.out is not None:
        draw(config.out.with_suffix(".png"), curves(rows), "evaluations")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.solvers")))
