"""Points in the plane: any toy set, from noise or from another set, by any path, target and sigma.

    python -m experiments.toy                                          a pinwheel from noise, in runs/toy
    python -m experiments.toy --data moons --target score --sigma 1    a score, sampled by a diffusion
    python -m experiments.toy --source circles --data checkerboard     a bridge from one set to another
    python -m experiments.toy --data spirals path:polynomial --path.power 3

About a minute on two CPU cores. The sliced Wasserstein distance of 10,000 samples to as many data, at scale 1, comes near
that of data to data, which is 0.02 to 0.03. Predicted noise and scores err most where alpha is small, predicted data
where beta is, since the velocity divides their errors by these. The folder of the run then holds config.json, metrics.json,
history.jsonl, tensorboard/, loss.png, density.png, trajectories.png, field.png and checkpoints/; a run that was killed goes on
with the same command.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

from experiments import run_folder
from fmjax import losses, metrics, paths, plots, sampling, targets, times, training
from fmjax.data import toy
from fmjax.models import mlp

matplotlib.use("agg")
import matplotlib.pyplot as plt

Name = Literal["gaussian", "mixture", "eight_gaussians", "moons", "circles", "checkerboard", "s_curve", "pinwheel", "spirals"]

# The energy distance is of all pairs, so of this many samples at most.
PAIRED = 4000
# Points that stand for an exact density in plots.
EXACT = 100_000

SOURCE, DATA = "#3b6fb6", "#e4632d"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a flow or a diffusion model on points of the plane, and draws its density, its trajectories and its field."""

    folder: Path = Path("runs/toy")
    """Folder of the run."""
    data: Name = "pinwheel"
    """Set to learn, centred and divided by its standard deviation."""
    source: Name = "gaussian"
    """Where samples start: noise, or another set, likewise of scale 1, for a bridge (velocity and sigma 0 only)."""
    target: Literal["velocity", "score", "noise", "data", "v"] = "velocity"
    """What the network predicts. Errors of the score count by beta^2, as errors of the noise: at the data it is infinite."""
    path: paths.Linear | paths.Cosine | paths.VariancePreserving | paths.Polynomial | paths.SquareRoot = paths.Linear()
    """Path from the source to the data."""
    start: float = 0.01
    """First time of training and of sampling: at 0, predicted noise or score has an infinite velocity where alpha is 0."""
    end: float = 0.999
    """Last time, from where a step goes to the expected data: at 1, some paths have an infinite velocity, and so has predicted data."""
    sigma: float = 0.0
    """Diffusion coefficient: 0 samples the ODE, more an SDE with the same marginals."""
    proportional: bool = True
    """Whether sigma is multiplied by beta_t; a constant one makes the SDE stiff near the data and needs many evaluations."""
    hidden_size: int = 128
    """Features per layer of the network."""
    depth: int = 4
    """Hidden layers of the network."""
    steps: int = 4000
    """Training steps."""
    batch: int = 512
    """Fresh points per training step."""
    learning_rate: float = 5e-3
    """Learning rate of Adam at first, before its cosine decay to zero."""
    ema_decay: float = 0.998
    """Decay, per training step, of the average of the parameters that is sampled."""
    log_every: int = 50
    """Training steps between two logs."""
    save_every: int = 1000
    """Training steps between two checkpoints."""
    evaluations: int = 100
    """Steps of the sampler (Euler or Euler-Maruyama), each one evaluation of the network."""
    samples: int = 10_000
    """Number of samples to measure and to plot."""
    seed: int = 0
    """Seed of all random numbers."""


FREE = ("sigma", "proportional", "evaluations", "samples", "save_every")


def main(config: Config):
    check(config, getattr(targets, config.target))
    with run_folder.claim(config, free=FREE):
        run(config)


def run(config):
    begin = time.perf_counter()
    path, target = config.path, getattr(targets, config.target)
    key_scale, key_init, key_train, key_source, key_sde, key_fresh, key_floor, key_metric, key_exact = jax.random.split(
        jax.random.key(config.seed), 9
    )
    source, data = standard(config.source, key_scale), standard(config.data, key_scale)

    model = mlp.MLP(config.hidden_size, config.depth)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    measured = targets.noise if target is targets.score else target

    def field(params):
        return lambda x, t: model.apply(params, x, t)

    def loss_fn(params, key, _):
        key_0, key_1, key_t = jax.random.split(key, 3)
        x_0, x_1 = source(key_0, config.batch), data(key_1, config.batch)
        t = config.start + (config.end - config.start) * times.stratified(key_t, config.batch)
        weight = targets.weight(path, t, source=target, target=measured)
        return (weight * losses.denoising(field(params), path, x_0, x_1, t, target=target)).mean()

    state = training.init(jax.jit(model.init)(key_init, jnp.zeros((1, 2)), 0.5), optimizer)
    step = training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay)
    # The points are drawn in the loss.
    state, numbers = run_folder.train(
        config, step, training.Run(state, key_train), lambda step: None, f"loss of the {config.target}, per coordinate"
    )
    trained = time.perf_counter()

    grid = times.uniform_grid(config.evaluations, config.start, config.end)
    velocity = targets.convert_field(path, field(state.ema), source=target, target=targets.velocity)
    expected_data = targets.convert_field(path, field(state.ema), source=target, target=targets.data)

    @jax.jit
    def sample(key, x_0):
        """Where x_0 goes, and the states on the way: at every time of the grid, then the data expected at its end."""
        x = paths.interpolate(path, x_0, jnp.zeros_like(x_0), config.start)
        if config.sigma:
            sigma = (lambda t: config.sigma * path.beta(t)) if config.proportional else config.sigma
            x, saved = sampling.sample_diffusion(path, velocity, sigma, key, x, grid, save=keep)
        else:
            x, saved = sampling.sample_ode(velocity, x, grid, step=sampling.euler, save=keep)
        x_1 = expected_data(x, config.end)
        return x_1, jnp.concatenate([jnp.asarray(saved), x_1[None]])

    x_1, states = sample(key_sde, source(key_source, config.samples))
    fresh, again = data(key_fresh, config.samples), data(key_floor, config.samples)
    report = {
        "sliced Wasserstein, samples to data": float(metrics.sliced_wasserstein(key_metric, x_1, fresh)),
        "sliced Wasserstein, data to data (the floor)": float(metrics.sliced_wasserstein(key_metric, again, fresh)),
        "energy distance, samples to data": float(metrics.energy_distance(x_1[:PAIRED], fresh[:PAIRED])),
        "energy distance, data to data (the floor)": float(metrics.energy_distance(again[:PAIRED], fresh[:PAIRED])),
        **numbers,
    }
    exact = tuple(draw(key, EXACT) for draw, key in zip((source, data), jax.random.split(key_exact), strict=True))
    draw_density(config.folder / "density.png", np.asarray(states), np.append(grid, 1.0), path, exact)
    draw_trajectories(config.folder / "trajectories.png", np.asarray(states), config)
    draw_field(config.folder / "field.png", jax.jit(velocity), path, exact, config)
    report |= {"seconds to train": trained - begin, "seconds in all": time.perf_counter() - begin}
    run_folder.report(config.folder, report)


def check(config, target):
    """Stops, saying what to do, where the target, the path, the times and sigma do not go together."""
    if config.sigma < 0:
        raise SystemExit(f"--sigma is {config.sigma}, but a diffusion coefficient is at least 0: 0 samples the ODE.")
    if config.source != "gaussian" and target is not targets.velocity:
        raise SystemExit(
            f"A bridge from {config.source} has no noise to predict the {config.target} with: use --target velocity, or --source gaussian."
        )
    if config.source != "gaussian" and config.sigma:
        raise SystemExit(f"An SDE needs the score, which a bridge from {config.source} does not know: use --sigma 0, or --source gaussian.")
    wanted = (targets.velocity, targets.score) if config.sigma else (targets.velocity,)
    for flag, t, inside in (("start", config.start, 0.01), ("end", config.end, 0.999)):
        coefficients = [target(config.path, t), *(targets.coefficients(config.path, t, source=target, target=to) for to in wanted)]
        if not np.isfinite(coefficients).all():
            names = " or the ".join(to.__name__ for to in wanted)
            raise SystemExit(
                f"At t = {t:g} the {config.target} on {config.path}, or the {names} from it, is infinite: try --{flag} {inside}."
            )


def standard(name, key):
    """The toy set centred and divided by its standard deviation, as measured on many points; noise is so already."""
    draw = getattr(toy, name)
    if name == "gaussian":
        return draw
    points = draw(key, 100_000)
    mean, scale = points.mean(0, keepdims=True), points.std()
    return lambda key, n: (draw(key, n) - mean) / scale


def keep(x, t):
    return x


def window(*points):
    """Half the side of the square to draw."""
    return 1.08 * max(float(jnp.quantile(jnp.abs(x), 0.999)) for x in points)


def draw_density(file, states, grid, path, exact, frames=(0.0, 0.4, 0.7, 0.9, 1.0)):
    """The samples' p_t above the exact one, which is of points on the path between source and data."""
    x_0, x_1 = exact
    limit = window(x_0, x_1)
    figure, axes_grid = plt.subplots(2, len(frames), figsize=(2.4 * len(frames), 5.1), layout="constrained", sharex=True, sharey=True)
    for frame, (above, below) in zip(frames, axes_grid.T, strict=True):
        i = int(np.abs(grid - frame).argmin())
        top = plots.histogram(below, paths.interpolate(path, x_0, x_1, grid[i]), extent=limit, cmap="magma")
        plots.histogram(above, states[i], extent=limit, cmap="magma", top=top)
        above.set(title=f"t = {grid[i]:.2f}", xticks=[], yticks=[])
    axes_grid[0, 0].set_ylabel("model", fontsize=12)
    axes_grid[1, 0].set_ylabel("exact", fontsize=12)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_trajectories(file, states, config, count=400):
    """Lines from the source to the data."""
    states = states[:, :count]
    limit = window(states[0], states[-1])
    figure, axes = plt.subplots(figsize=(6.4, 6.6), layout="constrained")
    # Fewer lines of an SDE, which are rough.
    axes.plot(*states[:, : 60 if config.sigma else count].transpose(2, 0, 1), color="0.45", alpha=0.25, linewidth=0.6)
    axes.scatter(*states[0].T, s=9, color=SOURCE, linewidths=0, label=f"source: {config.source}", zorder=2)
    axes.scatter(*states[-1].T, s=9, color=DATA, linewidths=0, label=f"model of {config.data}", zorder=3)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, markerscale=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_field(file, velocity, path, exact, config, frames=(0.05, 0.3, 0.6, 0.9)):
    """Streamlines of the velocity, coloured by speed, over the exact density."""
    x_0, x_1 = exact
    limit = 1.1 * window(x_1)
    figure, row = plt.subplots(1, len(frames), figsize=(3.2 * len(frames), 3.6), layout="constrained", sharex=True, sharey=True)
    for axes, t in zip(row, frames, strict=True):
        plots.histogram(axes, paths.interpolate(path, x_0, x_1, t), extent=limit, cmap="Greys")
        lines = plots.streamlines(axes, velocity, np.clip(t, config.start, config.end), extent=limit)
        figure.colorbar(lines, ax=axes, location="bottom", shrink=0.8, aspect=30, label="speed")
        axes.set(title=f"velocity at t = {t:g}", xticks=[], yticks=[])
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.toy")))
