"""Trajectories through snapshots: a population seen at a few times, never the same individual twice, as cells are.

    python -m experiments.snapshots        in runs/snapshots, in about two minutes on two CPU cores

Individuals walk to the right and part into two, then four branches. 500 of them are seen at each of five times; the third time is left out.
A field of the state and of the time learns to carry each snapshot to the next, from pairs by optimal transport and from pairs by chance
(Tong et al. 2023, arXiv:2302.00482), with noise on the way. Followed from the first snapshot on, its W_2 to fresh individuals is
measured at each time, beside that of as many others, and so is the energy of the way. At the time that was left out both miss, for ways
between snapshots are straight and the population's is not. trajectories.png shows both.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tyro

from experiments import run_folder
from fmjax import bridges, couplings, losses, metrics, plots, sampling, times, training
from fmjax.models import layers, mlp

SEEN = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
"""The times of the snapshots."""
OUT = 2
"""The snapshot that is left out."""
NETWORK = mlp.MLP(hidden_size=128, depth=4, time_embedding=layers.Sinusoids(64, scale=20.0))


@dataclasses.dataclass(frozen=True)
class Config:
    """Learns trajectories through snapshots of a population, and measures them at a time that was left out."""

    folder: Path = Path("runs/snapshots")
    """Folder of the plot and the metrics."""
    count: int = 500
    """Individuals in a snapshot."""
    batch: int = 256
    """Pairs per training step."""
    steps: int = 5000
    """Training steps."""
    sigma: float = 0.1
    """The noise on the way from one snapshot to the next."""
    results: Path | None = None
    """JSON file that gets the metrics beside those of other runs."""
    seed: int = 0
    """Seed of all random numbers."""


def population(key, n, time):
    """n individuals at a time, (n, 2): at .35 they part into two, at .7 into four."""
    key_branch, key_noise = jax.random.split(key)
    first, second = jax.random.choice(key_branch, jnp.array([-1.0, 1.0]), (2, n))
    up = 4 * jnp.maximum(time - 0.35, 0) * first + 4 * jnp.maximum(time - 0.7, 0) * second
    return jnp.stack([jnp.full(n, 3 * time - 1.5), up], axis=-1) + 0.25 * jax.random.normal(key_noise, (n, 2))


def main(config: Config):
    with run_folder.claim(config, free=vars(config)):
        key = jax.random.key(config.seed)
        snapshots = jnp.stack([population(jax.random.fold_in(key, i), config.count, time) for i, time in enumerate(SEEN)])
        fresh = [population(jax.random.fold_in(key, 10 + i), config.count, time) for i, time in enumerate(SEEN)]
        other = [population(jax.random.fold_in(key, 20 + i), config.count, time) for i, time in enumerate(SEEN)]
        report: dict[str, Any] = {}
        ways, grid = {}, times.uniform_grid(80)
        for name, couple in {"optimal": couplings.optimal, "independent": lambda x_0, x_1: jnp.arange(len(x_0))}.items():
            field = train(config, snapshots, couple)
            saved = np.asarray(jax.jit(lambda x, field=field: sampling.sample_ode(field, x, grid, save=lambda x, t: x)[1])(fresh[0]))
            ways[name] = saved
            for i, time in enumerate(SEEN[1:], 1):
                at = saved[np.abs(np.asarray(grid) - time).argmin()]
                left_out = ", left out" if i == OUT else ""
                report[f"{name}: W2 at time {time:g}{left_out}"] = metrics.wasserstein(at, fresh[i])
            report[f"{name}: energy of the way"] = float(metrics.path_energy(saved, grid).mean())
        for i, time in enumerate(SEEN[1:], 1):
            report[f"other individuals: W2 at time {time:g}"] = metrics.wasserstein(other[i], fresh[i])
        plot(config, snapshots, ways)
        if config.results is not None:
            run_folder.record(config.results, config, report)
        run_folder.report(config.folder, report)


def train(config, snapshots, couple):
    """The field of the population, (x, t)."""
    kept = [i for i in range(len(SEEN)) if i != OUT]
    begin, end = jnp.array(kept[:-1]), jnp.array(kept[1:])
    bridge, at = bridges.Brownian(config.sigma), jnp.asarray(SEEN, jnp.float32)

    def loss_fn(params, key, _):
        key_part, key_0, key_1, key_s, key_z = jax.random.split(key, 5)
        part = jax.random.randint(key_part, (), 0, len(begin))
        x_0 = jax.random.choice(key_0, snapshots[begin[part]], (config.batch,), replace=False)
        x_1 = jax.random.choice(key_1, snapshots[end[part]], (config.batch,), replace=False)
        x_1 = x_1[couple(x_0, x_1)]
        s = jax.random.uniform(key_s, (config.batch,), minval=0.01, maxval=0.99)
        x, u = bridges.flow(bridge, x_0, x_1, jax.random.normal(key_z, x_0.shape), s)
        # From the time between two snapshots to that of the population.
        span = at[end[part]] - at[begin[part]]
        return losses.regression(lambda x, t: NETWORK.apply(params, x, t), x, at[begin[part]] + s * span, u / span).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, config.steps))
    params = NETWORK.init(jax.random.key(config.seed + 1), jnp.zeros((1, 2)), 0.5)
    run = training.Run(training.init(params, optimizer), jax.random.key(config.seed + 2))
    step = training.make_step(loss_fn, optimizer, ema_decay=0.99)
    run = training.fit(step, run, None, steps=config.steps, log_every=100, progress=sys.stderr.isatty())
    return lambda x, t: NETWORK.apply(run.state.ema, x, t)


def plot(config, snapshots, ways):
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    for i, (name, saved) in enumerate(ways.items(), 1):
        axes = figure.add_subplot(1, 2, i)
        for n, points in enumerate(snapshots):
            plots.points(axes, points, color="0.75" if n == OUT else f"C{n}", size=4)
        plots.lines(axes, saved[:, :80])
        axes.set(title=f"pairs: {name}; grey points were not seen", xticks=[], yticks=[])
    figure.savefig(config.folder / "trajectories.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.snapshots"))
