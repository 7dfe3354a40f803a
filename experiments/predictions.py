"""What a network predicts: velocity, noise, data or EDM's preconditioned target, on points and on handwritten digits, side by side.

    python -m experiments.predictions                     in runs/predictions, in about fifteen minutes on two CPU cores
    python -m experiments.predictions --sets pinwheel     points alone, a minute

One network, one number of steps, one sampler (20 steps of UniPC of order 2); EDM also has its scaling of the input, its noise levels
for training and its weighting. Of points the sliced Wasserstein distance of samples to fresh data is divided by that of data to data, of
digits the Fréchet distance of pixels to held-out digits by that of as many training digits with the same labels: 1 is as near as data.
samples.png has what each draws from the same noise.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import run_folder
from fmjax import losses, metrics, paths, plots, sampling, targets, times, training
from fmjax.data import digits, toy
from fmjax.models import dit, layers, mlp

PATH = paths.Linear()


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains networks that predict different targets on the same data, and compares their samples."""

    folder: Path = Path("runs/predictions")
    """Folder of the plot and the metrics."""
    sets: tuple[Literal["pinwheel", "digits"], ...] = ("pinwheel", "digits")
    """Data sets."""
    steps: int = 2500
    """Training steps of each network."""
    learning_rate: float = 2e-3
    """Learning rate of Adam after its warm-up; it falls to zero as a cosine."""
    evaluations: int = 20
    """Steps of the sampler, each one evaluation of the network."""
    samples: int = 1000
    """Samples of digits that are measured, in all classes alike; of points ten times as many."""
    results: Path | None = None
    """JSON file that gets the metrics beside those of other runs."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A target, what the network sees, and the density of the times in training."""

    target: Callable[..., Any]
    scaled: Callable[..., Any]
    """The network's field, to the field of the target."""
    draw: Callable[..., Any]
    """(key, n) -> times."""


def predictions(sigma_data):
    """By name, for data of this standard deviation."""
    edm = functools.partial(targets.scale_input, PATH, sigma_data=sigma_data, time=lambda t: targets.c_noise(PATH, t))
    return {
        "velocity": Prediction(targets.velocity, lambda field: field, times.stratified),
        "noise": Prediction(targets.noise, lambda field: field, times.stratified),
        "data": Prediction(targets.data, lambda field: field, times.stratified),
        "EDM": Prediction(targets.edm(sigma_data), edm, lambda key, n: times.log_normal(key, n, PATH)),
    }


@dataclasses.dataclass(frozen=True)
class Set:
    """Data, a network for them, and how far samples are from them."""

    network: Any
    batch: int
    draw: Callable[..., Any]
    """(key, n) -> (x_1, y), y an empty tuple or labels."""
    sigma_data: float
    labels: Any
    """The y of the samples, (), or (labels,)."""
    distance: Callable[..., Any]
    """Samples to the distance over that of data to data."""


def pinwheel(config):
    points = toy.pinwheel(jax.random.key(config.seed), 100_000)
    mean, scale = points.mean(0, keepdims=True), points.std()
    key_fresh, key_other, key_metric = jax.random.split(jax.random.key(config.seed + 1), 3)

    def draw(key, n):
        return (toy.pinwheel(key, n) - mean) / scale, ()

    (fresh, _), (other, _) = draw(key_fresh, 10 * config.samples), draw(key_other, 10 * config.samples)
    floor = metrics.sliced_wasserstein(key_metric, other, fresh)
    network = mlp.MLP(hidden_size=128, depth=3, time_embedding=layers.Fourier(64), layer=mlp.Residual)
    return Set(network, 512, draw, 1.0, (), lambda x: float(metrics.sliced_wasserstein(key_metric, x, fresh) / floor))


def handwritten(config):
    (x, y), (held_out, held_out_y) = digits.load()
    count = config.samples // digits.CLASSES
    index = np.concatenate([np.flatnonzero(y == label)[:count] for label in range(digits.CLASSES)])
    other = np.concatenate([np.flatnonzero(held_out_y == label)[:count] for label in range(digits.CLASSES)])
    held = held_out[other].reshape(len(other), -1)
    floor = metrics.frechet_distance(x[index].reshape(len(index), -1), held)
    data = jnp.asarray(x), jnp.asarray(y)

    def draw(key, n):
        chosen = jax.random.choice(key, len(x), (n,), replace=False)
        return data[0][chosen], (data[1][chosen],)

    def distance(samples):
        return metrics.frechet_distance(samples.reshape(len(samples), -1), held) / floor

    network = dit.DiT(4, 128, 4, 2, digits.CLASSES, time_embedding=layers.Fourier(256))
    return Set(network, 128, draw, float(x.std()), (jnp.asarray(y[index]),), distance)


SETS = {"pinwheel": pinwheel, "digits": handwritten}


def main(config: Config):
    with run_folder.claim(config, free=vars(config)):
        report, drawn = {}, {}
        for name in config.sets:
            data = SETS[name](config)
            for kind, prediction in predictions(data.sigma_data).items():
                x = sample(config, data, prediction, train(config, f"{name}, {kind}", data, prediction))
                drawn[name, kind] = x
                report[f"{name}, {kind}: distance over that of data to data"] = data.distance(x)
        draw(config, drawn)
        if config.results is not None:
            run_folder.record(config.results, config, report)
        run_folder.report(config.folder, report)


def train(config, name, data, prediction):
    """The field of the target, (x, t, *y), trained."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 20, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def field(params, y):
        return prediction.scaled(lambda x, t: data.network.apply(params, x, t, *y))

    def loss_fn(params, key, _):
        key_1, key_0, key_t = jax.random.split(key, 3)
        x_1, y = data.draw(key_1, data.batch)
        x_0, t = sampling.noise_like(key_0, x_1), prediction.draw(key_t, data.batch)
        return losses.denoising(field(params, y), PATH, x_0, x_1, t, target=prediction.target).mean()

    x_1, y = data.draw(jax.random.key(config.seed), 1)
    params = jax.jit(data.network.init)(jax.random.key(config.seed), x_1, 0.5, *y)
    run = training.Run(training.init(params, optimizer), jax.random.key(config.seed + 2))
    step = training.make_step(loss_fn, optimizer, ema_decay=0.998)
    run = training.fit(step, run, lambda n: jnp.zeros(()), steps=config.steps, log_every=100, progress=sys.stderr.isatty())
    print(f"{name}: loss {run.history[-1]['loss']:.4f}", flush=True)
    return functools.partial(field, run.state.ema)


def sample(config, data, prediction, field):
    """Samples, from the same noise whatever is predicted."""
    n, shape = (len(data.labels[0]), (8, 8, 1)) if data.labels else (10 * config.samples, (2,))
    # Where alpha is 0 noise says nothing of the data.
    start, key = 0.01, jax.random.key(config.seed + 3)
    grid = times.quadratic(times.uniform_grid(config.evaluations, start=start))

    @jax.jit
    def draw(x_0):
        velocity = targets.convert_field(PATH, field(data.labels), source=prediction.target, target=targets.velocity)
        return sampling.sample_ode(velocity, PATH.beta(grid[0]) * x_0, grid, step=sampling.unipc(PATH, 2))[0]

    return np.asarray(draw(sampling.noise(key, (n, *shape))))


def draw(config, drawn):
    """What each draws: points as dots, digits as images."""
    from matplotlib.figure import Figure

    kinds = list(predictions(1.0))
    figure = Figure(figsize=(2.5 * len(kinds), 2.7 * len(config.sets)), layout="constrained")
    panels = figure.subplots(len(config.sets), len(kinds), squeeze=False)
    for row, name in zip(panels, config.sets, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            x = drawn[name, kind]
            if x.ndim == 2:
                axes.scatter(*x[:2000].T, s=1, linewidths=0, color="C0")
                axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            else:
                each = len(x) // digits.CLASSES
                shown = np.stack([x[label * each : label * each + min(each, 10)] for label in range(digits.CLASSES)])
                plots.images(axes, shown)
            axes.set(xticks=[], yticks=[], title=kind if name == config.sets[0] else "")
        row[0].set_ylabel(name)
    figure.savefig(config.folder / "samples.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.predictions")))
