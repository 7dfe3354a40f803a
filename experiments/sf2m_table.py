"""Table 2 of [SF]^2M (Tong et al. 2023, arXiv:2307.03672): four tasks in the plane, four methods, five seeds trained as one program.

    python -m experiments.sf2m_table                              the whole table, in runs/sf2m_table
    python -m experiments.sf2m_table --seeds 1                    one seed
    python -m experiments.sf2m_table --tasks n_to_moons --epochs 20

The paper's settings: dense layers 3 x 64 with SELU on [t, x], AdamW at 1e-3 with weight decay 1e-5, batches of 512, 1,000 epochs of 20
batches, sigma .1, 10,000 points to train on and as many to test on, 100 Euler steps. Metrics are W_2 between samples and test data,
exactly, and NPE, the energy of the flow against that of optimal transport. Beside each stands the same W_2 of data against data. Methods
that pair alike are trained in one pass. A pass that is done is kept in the folder, and the same command goes on after it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

from experiments import run_folder
from fmjax import bridges, couplings, files, losses, marginals, metrics, paths, sampling, times, training
from fmjax.data import toy
from fmjax.models import mlp
from fmjax.training.progress import bar

PAPER = {
    "OT-CFM": {"W2": [0.303, 0.601, 0.130, 0.144], "std": [0.043, 0.027, 0.016, 0.028], "NPE": [0.031, 0.015, 0.083, 0.027]},
    "I-CFM": {"W2": [0.373, 1.557, 0.178, 0.242], "std": [0.103, 0.407, 0.014, 0.141], "NPE": [0.202, 2.680, 0.891, 0.856]},
    "FM": {"W2": [0.343, None, 0.209, 0.198], "std": [0.058, None, 0.055, 0.037], "NPE": [0.190, None, 0.762, 0.743]},
    "SF2M-Exact": {"W2": [0.275, 0.726, 0.124, 0.128], "std": [0.058, 0.137, 0.023, 0.005], "NPE": [0.016, 0.045, 0.053, 0.034]},
}
"""Of the paper, in the order of the tasks below: the mean of W_2 and its standard deviation over five seeds, and the mean of NPE."""
POINTS, BATCH, BATCHES, STEPS = 10_000, 512, 20, 100
"""Points to train on and to test on, examples in a batch, batches in an epoch, Euler's steps."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the table's methods on its tasks, and compares them with the paper."""

    folder: Path = Path("runs/sf2m_table")
    """Folder of what is done, of config.json and of the picture."""
    tasks: tuple[str, ...] = ("n_to_8gaussians", "moons_to_8gaussians", "n_to_moons", "n_to_scurve")
    """Tasks."""
    seeds: int = 5
    """How many seeds, from 0 on."""
    epochs: int = 1000
    """Epochs of 20 batches."""
    sigma: float = 0.1
    """The noise on the way."""
    results: Path | None = None
    """JSON file that gets the table beside the paper's."""


def standardised(x):
    return (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True)


def even_moons(key, n):
    """Moons as the paper's data are: half of the points on each, at even angles, so that two sets differ by their noise alone."""
    angle = jnp.linspace(0, jnp.pi, n // 2)
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    points = jnp.concatenate([upper, jnp.array([[1.0, 0.5]]) - upper])
    return 2 * (points + 0.05 * jax.random.normal(key, points.shape)) - 1


RING = 12 * jnp.stack([jnp.cos(jnp.arange(8) * jnp.pi / 4), jnp.sin(jnp.arange(8) * jnp.pi / 4)], axis=-1)
WIDE = marginals.GaussianMixture(jnp.ones(8), RING, 1.5)
TASKS: dict[str, tuple[Callable, Callable]] = {
    "n_to_8gaussians": (toy.gaussian, toy.eight_gaussians),
    "moons_to_8gaussians": (lambda key, n: 7 * standardised(toy.moons(key, n)), WIDE.sample),
    "n_to_moons": (toy.gaussian, even_moons),
    "n_to_scurve": (toy.gaussian, toy.s_curve),
}
"""Source and target, each (key, n) -> (n, 2)."""
PASSES = {"coupled": ("OT-CFM", "SF2M-Exact"), "independent": ("I-CFM", "FM")}
NETWORK = mlp.MLP(hidden_size=64, depth=3, activation=nn.selu)
OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-5)


def field(params):
    return lambda x, t: NETWORK.apply(params, x, t)


def loss_of(method, sigma):
    """(params, key, (x_0, x_1)) -> the loss of a method."""

    def loss(params, key, batch):
        x_0, x_1 = batch
        key_t, key_z = jax.random.split(key)
        # The Brownian bridge's velocity is infinite at the ends.
        t = jax.random.uniform(key_t, x_1.shape[:1], minval=1e-6)
        z = jax.random.normal(key_z, x_1.shape)
        if method == "FM":
            return losses.flow_matching(field(params), paths.Lipman(sigma), x_0, x_1, t).mean()
        if method == "SF2M-Exact":
            x_t, u_t = bridges.flow(bridges.Brownian(sigma), x_0, x_1, z, t)
            noise = losses.regression(field(params["noise"]), x_t, t, z)
            return (losses.regression(field(params["velocity"]), x_t, t, u_t) + noise).mean()
        x_t, u_t = bridges.flow(bridges.Constant(sigma), x_0, x_1, z, t)
        return losses.regression(field(params), x_t, t, u_t).mean()

    return loss


def initial(method, key):
    make = functools.partial(NETWORK.init, x=jnp.zeros((1, 2)), t=0.5)
    if method == "SF2M-Exact":
        velocity, noise = jax.random.split(key)
        return training.init({"velocity": make(velocity), "noise": make(noise)}, OPTIMIZER)
    return training.init(make(key), OPTIMIZER)


@contextlib.contextmanager
def timed(clock, part):
    began = time.perf_counter()
    yield
    clock[part] += time.perf_counter() - began


def train(task, name, methods, config, clock):
    """The states of a pass after training, each with a leading axis of seeds."""
    source, target = TASKS[task]
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    sets = jax.vmap(lambda key: (source(jax.random.fold_in(key, 0), POINTS), target(jax.random.fold_in(key, 1), POINTS)))(keys)
    fresh = source is toy.gaussian

    def at(purpose, n):
        """The seeds' keys for one purpose at step n."""
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, purpose), n))(keys)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(epoch, count):
        """The pairs of an epoch as they come, (count, seeds, batch, 2) each: each point once, and the first few once more."""

        def one(key, x_0, x_1):
            keys = jax.random.split(key, 4)
            orders = jax.vmap(lambda key: jax.random.permutation(key, POINTS))(keys).reshape(2, -1)[:, : count * BATCH]
            return source(keys[0], count * BATCH) if fresh else x_0[orders[0]], x_1[orders[1]]

        return [x.reshape(len(keys), count, BATCH, 2).swapaxes(0, 1) for x in jax.vmap(one)(at(2, epoch), *sets)]

    def pair(x_0, x_1):
        """Data in the order of a coupling: batches in threads, since under `jax.vmap` only SciPy's part would be."""
        x_0, x_1 = (np.asarray(x).reshape(-1, BATCH, 2) for x in (x_0, x_1))
        with concurrent.futures.ThreadPoolExecutor() as threads:
            orders = threads.map(couplings.optimal, x_0, x_1)
            return np.stack([x[j] for x, j in zip(x_1, orders, strict=True)]).reshape(BATCHES, -1, BATCH, 2)

    steps = {method: jax.vmap(training.make_step(loss_of(method, config.sigma), OPTIMIZER)) for method in methods}

    @functools.partial(jax.jit, donate_argnums=0)
    def learn(states, epoch, x_0, x_1):
        def step(states, each):
            i, *batch = each
            n = epoch * len(x_0) + i
            after = {method: steps[method](state, at(5 + list(PAPER).index(method), n), tuple(batch)) for method, state in states.items()}
            return {method: state for method, (state, _) in after.items()}, {m: logged["loss"] for m, (_, logged) in after.items()}

        return jax.lax.scan(step, states, (jnp.arange(len(x_0)), x_0, x_1))

    states = {method: jax.jit(jax.vmap(functools.partial(initial, method)))(keys) for method in methods}
    with bar(f"{task}, {name}", "epochs", config.epochs) as show:
        for epoch in range(config.epochs):
            with timed(clock, "coupling"):
                x_0, x_1 = draw(epoch, BATCHES)
                x_1 = pair(x_0, x_1) if name == "coupled" else jax.block_until_ready(x_1)
            with timed(clock, "training"):
                states, logged = jax.block_until_ready(learn(states, epoch, x_0, x_1))
            show(epoch + 1)
    for method, values in logged.items():
        if not np.isfinite(values).all():
            raise FloatingPointError(f"{task}, {method}: the last losses are {values[-1]}.")
    return states


def test_sets(task, config):
    source, target = TASKS[task]
    keys = [jax.random.fold_in(jax.random.key(seed), 4) for seed in range(config.seeds)]
    folds = [[jax.random.fold_in(key, i) for i in range(3)] for key in keys]
    return [(source(a, POINTS), target(b, POINTS), target(c, POINTS)) for a, b, c in folds]


def distance(x, y):
    """W_2 of two sets of one size, exactly."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.sqrt(((x - y[couplings.optimal(x.astype(np.float32), y.astype(np.float32))]) ** 2).sum(1).mean()))


def floors(task, config, clock):
    """W_2 of data to data, and from the source to the data, by seed."""
    sets = test_sets(task, config)
    with timed(clock, "W2"), concurrent.futures.ThreadPoolExecutor(2) as pool:
        among = list(pool.map(lambda each: distance(each[1], each[2]), sets))
        between = list(pool.map(lambda each: distance(each[0], each[1]), sets))
    return {"data to data": among, "source to data": between}


def evaluate(task, method, state, between, config, clock):
    """W_2 to the test data and NPE, by seed; SF2M by its SDE too."""
    grid = times.uniform_grid(STEPS)

    @jax.jit
    def follow(params, x_0):
        u = field(params["velocity"] if method == "SF2M-Exact" else params)
        return sampling.sample_ode(u, x_0, grid, step=sampling.euler, save=lambda x, t: x)

    @jax.jit
    def diffuse(params, key, x_0):
        score = bridges.score(bridges.Brownian(config.sigma), field(params["noise"]))
        # No score at the ends, where the bridge has no noise.
        drift = sampling.sde_extension(field(params["velocity"]), lambda x, t: score(x, jnp.clip(t, 1e-3, 1 - 1e-3)), config.sigma)
        return sampling.sample_sde(drift, config.sigma, key, x_0, grid)[0]

    drawn, npe = [], []
    with timed(clock, "sampling"):
        for seed, (x_0, x_1, _) in enumerate(test_sets(task, config)):
            params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state.params)
            end, saved = follow(params, x_0)
            npe.append(float(metrics.normalized_path_energy(saved, grid, between[seed])))
            drawn.append((end, x_1))
            if method == "SF2M-Exact":
                drawn.append((diffuse(params, jax.random.key(seed), x_0), x_1))
    with timed(clock, "W2"), concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: distance(*pair), drawn))
    if method == "SF2M-Exact":
        return {"W2": found[::2], "W2 by the SDE": found[1::2], "NPE": npe}
    return {"W2": found, "NPE": npe}


def main(config: Config):
    unknown = set(config.tasks) - set(TASKS)
    if unknown:
        sys.exit(f"There is no task {' or '.join(sorted(unknown))}: they are {', '.join(TASKS)}.")
    with run_folder.claim(config, free=("results", "tasks")):
        done = Path(config.folder) / "done.json"
        kept = json.loads(done.read_text()) if done.exists() else {}

        def keep(name, found, clock):
            kept[name] = {**found, "seconds": {part: round(value, 1) for part, value in clock.items()}}
            with files.replacing(done) as part:
                part.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{name:36} {summary(found)}   {kept[name]['seconds']}", flush=True)

        for task in config.tasks:
            if f"{task}, data" not in kept:
                clock = dict.fromkeys(("coupling", "training", "sampling", "W2"), 0.0)
                keep(f"{task}, data", floors(task, config, clock), clock)
            for name, methods in PASSES.items():
                methods = [method for method in methods if method != "FM" or TASKS[task][0] is toy.gaussian]
                if all(f"{task}, {method}" in kept for method in methods):
                    continue
                clock = dict.fromkeys(("coupling", "training", "sampling", "W2"), 0.0)
                states = train(task, name, methods, config, clock)
                for method, state in states.items():
                    between = kept[f"{task}, data"]["source to data"]
                    keep(f"{task}, {method}", evaluate(task, method, state, between, config, clock), clock)
                    # The pass is timed with its first method.
                    clock = dict.fromkeys(clock, 0.0)
        report = table(kept)
        print("", *rows(report), sep="\n")
        if config.results is not None:
            run_folder.record(config.results, config, report)


def summary(found):
    return "   ".join(f"{name} {np.mean(values):.3f} +- {np.std(values):.3f}" for name, values in found.items() if isinstance(values, list))


def table(kept) -> dict[str, Any]:
    """What was found beside the paper's, and the seconds of each part."""
    report, tasks = {}, list(TASKS)
    for name, found in kept.items():
        for metric, values in found.items():
            if metric != "seconds":
                report[f"{name}: {metric}, mean"] = float(np.mean(values))
                report[f"{name}: {metric}, standard deviation"] = float(np.std(values))
        task, method = name.split(", ")
        if method in PAPER:
            published = {key: PAPER[method][key][tasks.index(task)] for key in ("W2", "std", "NPE")}
            report[f"{name}: published W2, mean"], report[f"{name}: published W2, standard deviation"] = published["W2"], published["std"]
            report[f"{name}: published NPE, mean"] = published["NPE"]
    for part in ("coupling", "training", "sampling", "W2"):
        report[f"seconds of {part}"] = sum(found["seconds"][part] for found in kept.values())
    return report


def rows(report):
    """The table, for people."""
    yield f"{'':32}{'W2':>16}{'published':>16}{'data to data':>14}{'NPE':>8}{'published':>10}"
    for name in dict.fromkeys(key.split(":")[0] for key in report if ": W2, mean" in key):
        task = name.split(", ")[0]
        mean, std, published, published_std, npe, published_npe = (
            report[f"{name}: {key}"]
            for key in (
                *("W2, mean", "W2, standard deviation", "published W2, mean", "published W2, standard deviation"),
                *("NPE, mean", "published NPE, mean"),
            )
        )
        floor = report[f"{task}, data: data to data, mean"]
        yield f"{name:32}{mean:9.3f}±{std:.3f} {published:9.3f}±{published_std:.3f} {floor:13.3f}{npe:8.3f}{published_npe:10.3f}"


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.sf2m_table"))
