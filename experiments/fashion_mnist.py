"""Clothes by class: the course's third lab on Fashion-MNIST, with a diffusion transformer or with a U-Net.

    python -m experiments.fashion_mnist dit          a small transformer, for two CPU cores
    python -m experiments.fashion_mnist unet         a narrow U-Net, for two CPU cores
    python -m experiments.fashion_mnist lab-dit      the course's transformer of 2026, for a GPU
    python -m experiments.fashion_mnist lab-unet     the course's U-Net of 2025, for a GPU
    python -m experiments.fashion_mnist dit --no-train --seed 1      samples again from the last checkpoint

The first two take under an hour on two CPU cores; the others have the course's settings, 20,000 steps of 256 images and 5,000
of 250. A small convolutional network, trained here on the real images, reads the labels of samples back, and its features
give the Frechet distance; its own accuracy on held-out clothes stands beside. The folder of the run then holds config.json,
metrics.json, loss.png, samples.png, trajectories.png and checkpoints/; a run that was killed goes on with the same command. What came out
is in results/fashion_mnist.json.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from flax import linen as nn

from benchmarks import rows
from experiments import folder
from fmjax import checkpoints, files, guidance, losses, metrics, paths, pictures, sampling, targets, times, training
from fmjax.data import fashion_mnist, images, pipeline
from fmjax.models import dit, layers, unet


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A DiT."""

    patch: int = 4
    """Side of a patch, in pixels."""
    width: int = 128
    """Features of a patch."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Heads of the attention."""


@dataclasses.dataclass(frozen=True)
class UNet:
    """A U-Net without attention, as the course's."""

    channels: tuple[int, ...] = (16, 32, 64)
    """A level each."""
    blocks: int = 2
    """Residual blocks per level."""
    groups: int = 4
    """Of the normalisation."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a class-conditional flow model on Fashion-MNIST, draws its samples and measures them against data."""

    folder: Path
    """Where the run is written."""
    data_dir: Path | None = None
    """A folder with the four idx files; otherwise Debian's package, otherwise a download."""
    results: Path | None = None
    """A JSON file that gets this run's numbers, under the name of its folder, beside those of other runs."""
    train: bool = True
    """Whether to train; otherwise the last checkpoint in the folder is sampled again (with the network's flags as then)."""
    network: Transformer | UNet = Transformer()
    """What learns the velocity."""
    path: paths.Linear | paths.Cosine | paths.Polynomial = paths.Linear()
    """How noise becomes data."""
    steps: int = 5000
    """Training steps."""
    batch: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Of AdamW, after its warm-up, before its cosine decay to zero."""
    warm_up: int = 150
    """Steps until then."""
    weight_decay: float = 0.0
    """Of AdamW."""
    ema_decay: float = 0.998
    """Of the average of the parameters that is sampled."""
    label_drop: float = 0.1
    """The notes' eta: how often a label is replaced by none, for guidance."""
    guidance: tuple[float, ...] = (1.0, 3.0, 5.0)
    """The guidance scales to draw and to measure; 1 is none."""
    samples: int = 100
    """Samples of each class at every scale."""
    sampling_steps: int = 20
    """Of UniPC for a sample, one evaluation each."""
    judge_epochs: int = 4
    """Passes over the real images of the network that reads labels."""
    seed: int = 0
    """Of everything random."""


RUNS = Path("runs/fashion_mnist")
CONFIGS = {
    "dit": ("A small transformer: under an hour on two CPU cores.", Config(RUNS / "dit")),
    "unet": ("A narrow U-Net: under an hour on two CPU cores.", Config(RUNS / "unet", network=UNet(), steps=2000)),
    "lab-dit": (
        "The course's transformer of 2026, for a GPU.",
        Config(
            RUNS / "lab-dit",
            network=Transformer(4, 256, 8, 8),
            steps=20_000,
            batch=256,
            learning_rate=4e-4,
            warm_up=500,
            weight_decay=1e-4,
            ema_decay=0.9995,
            label_drop=0.35,
            samples=1000,
            sampling_steps=100,
            judge_epochs=10,
        ),
    ),
    "lab-unet": (
        "The course's U-Net of 2025, for a GPU.",
        Config(
            RUNS / "lab-unet",
            network=UNet((32, 64, 128), 2, 8),
            steps=5000,
            batch=250,
            learning_rate=1e-3,
            warm_up=0,
            samples=1000,
            sampling_steps=100,
            judge_epochs=10,
        ),
    ),
}


class Judge(nn.Module):
    """A small convolutional classifier: its logits, and the features before them."""

    @nn.compact
    def __call__(self, x):
        for channels in (32, 64):
            x = nn.avg_pool(nn.relu(layers.GroupNorm(8)(unet.Conv(channels)(x))), (2, 2), (2, 2))
        features = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(fashion_mnist.CLASSES)(features), features


FREE = ("data_dir", "results", "train", "guidance", "samples", "sampling_steps", "judge_epochs")


def main(config: Config):
    if config.warm_up >= config.steps:
        raise SystemExit(f"--warm-up is {config.warm_up} steps of {config.steps} in all: give fewer, or more --steps.")
    data = fashion_mnist.load(config.data_dir)
    with folder.claim(config, free=FREE, trains=config.train):
        run(config, data)


def run(config, data):
    start = time.perf_counter()
    (train, train_labels), (test, test_labels) = data
    classes = fashion_mnist.CLASSES
    model = make_network(config.network)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warm_up, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))
    key_init, key_train, key_judge, key_test, key_sample = jax.random.split(jax.random.key(config.seed), 5)

    def loss_fn(params, key, batch):
        x_1, y = batch
        key_0, key_t, key_drop = jax.random.split(key, 3)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        y = guidance.drop_labels(key_drop, y, classes, config.label_drop)
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), config.path, x_0, x_1, t).mean()

    def batches(size, seed):
        return pipeline.to_device(pipeline.batches(images.arrays(train, train_labels), size, seed=seed, threads=0))

    state = training.init(jax.jit(model.init)(key_init, train[:1], 0.5, train_labels[:1]), optimizer)
    report: dict[str, float] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    if config.train:
        step = training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay)
        with checkpoints.Checkpointer(config.folder / "checkpoints", keep=1) as checkpointer:
            begun = checkpointer.resume(training.Run(state, key_train))
            began, left = time.perf_counter(), config.steps - int(begun.state.step)
            stream = batches(config.batch, config.seed)
            ended = training.fit(step, begun, stream, steps=config.steps, log_every=25, save=checkpointer.save, save_every=250)
        state, history = ended.state, ended.history
        last = [row["loss"] for row in history[-max(1, len(history) // 10) :]]
        report["training loss per pixel, last tenth"] = float(np.mean(last))
        if left > 0:
            report["steps per second"] = left / (time.perf_counter() - began)
        pictures.loss(config.folder / "loss.png", history, "flow matching loss per pixel")
    else:
        state = checkpoints.restore(config.folder / "checkpoints", state)
    trained = time.perf_counter()

    @jax.jit
    def held_out_loss(params, key, x_1, y):
        key_0, key_t = jax.random.split(key)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), config.path, x_0, x_1, t).mean()

    held_out = [
        len(some) / len(test) * held_out_loss(state.ema, jax.random.fold_in(key_test, i), test[some], test_labels[some])
        for i, some in enumerate(np.array_split(np.arange(len(test)), 20))
    ]
    report["held-out loss per pixel"] = float(sum(held_out))

    read = make_judge(config, batches, key_judge)
    report["judge's accuracy on held-out clothes"] = float((read(test)[0].argmax(-1) == test_labels).mean())
    # As many held-out clothes as there are samples and training clothes, so that the distances have the same bias.
    chosen = [balanced(labels, config.samples) for labels in (train_labels, test_labels)]
    of_train, of_test = (read(clothes[some])[1] for clothes, some in zip((train, test), chosen, strict=True))
    floor = report["Frechet distance, training to held-out"] = metrics.frechet_distance(of_train, of_test)

    # Where a path's velocity is 0 at noise, what it says of the data begins later.
    grid = times.uniform_grid(config.sampling_steps, start=0.0 if np.any(targets.velocity(config.path, 0.0)) else 0.01)

    @functools.partial(jax.jit, static_argnames=("scale", "save"))
    def sample(params, x_0, y, scale, save=None):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, classes, scale)
        return sampling.sample_ode(field, x_0, grid, step=sampling.unipc(config.path, 2), save=save)

    y = np.repeat(np.arange(classes), config.samples)
    x_0 = sampling.noise(key_sample, (len(y), *train.shape[1:]))
    drawn = {}
    for scale in config.guidance:
        x_1 = np.concatenate([sample(state.ema, x_0[some], y[some], scale)[0] for some in np.split(np.arange(len(y)), classes)])
        logits, features = read(x_1)
        drawn["no guidance" if scale == 1 else f"guidance {scale:g}"] = x_1.reshape(classes, config.samples, *x_1.shape[1:])
        distance = metrics.frechet_distance(features, of_test)
        report |= {
            f"label accuracy at guidance {scale:g}": float((logits.argmax(-1) == y).mean()),
            f"Frechet distance at guidance {scale:g}": distance,
            f"Frechet distance at guidance {scale:g}, over training to held-out": distance / floor,
        }
    pictures.samples(config.folder / "samples.png", drawn, fashion_mnist.NAMES)
    middle = config.guidance[len(config.guidance) // 2]
    moments = sample(state.ema, x_0[:: config.samples], y[:: config.samples], middle, keep)[1]
    pictures.trajectories(config.folder / "trajectories.png", moments, grid, fashion_mnist.NAMES)
    report |= {"seconds to train": trained - start, "seconds in all": time.perf_counter() - start}
    if config.results is not None:
        record(config, report)
    made = "samples.png, trajectories.png, loss.png, metrics.json, config.json, checkpoints/"
    folder.report(config.folder, report, made)


def make_network(network):
    if isinstance(network, Transformer):
        return dit.DiT(network.patch, network.width, network.depth, network.heads, fashion_mnist.CLASSES)
    width = network.channels[0]
    multipliers = tuple(channels / width for channels in network.channels)
    return unet.UNet(
        width, multipliers, network.blocks, attention_resolutions=(), groups=network.groups, num_classes=fashion_mnist.CLASSES, dropout=0.0
    )


def make_judge(config, batches, key):
    """Trains the classifier on the real images; gives a function from images to logits and features."""
    judge, size = Judge(), 250
    steps = max(1, config.judge_epochs * 60_000 // size)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss_fn(params, key, batch):
        clothes, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(judge.apply(params, clothes)[0], labels).mean()

    stream = batches(size, config.seed + 1)
    clothes, _ = next(stream)
    state = training.init(jax.jit(judge.init)(key, clothes[:1]), optimizer)
    params = training.fit(training.make_step(loss_fn, optimizer), training.Run(state, key), stream, steps=steps).state.params
    apply = jax.jit(judge.apply)

    def read(clothes):
        parts = [apply(params, part) for part in np.array_split(clothes, max(1, len(clothes) // 1000))]
        return tuple(np.concatenate(values) for values in zip(*parts, strict=True))

    return read


def balanced(labels, count):
    """The first `count` places of every class."""
    return np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(fashion_mnist.CLASSES)])


def record(config, report):
    """Puts the run's numbers, its settings and its machine into the file of results."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in ("folder", "data_dir", "results")]
    settings = {name: repr(getattr(config, name)) for name in names}
    lab = {"loss per pixel that the course publishes for MNIST": [0.128, 0.137]}
    runs = json.loads(config.results.read_text()) if config.results.exists() else {}
    runs[config.folder.name] = rows.describe() | {"jax": jax.__version__, "settings": settings} | report | lab
    config.results.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(config.results) as part:
        part.write_text(json.dumps(runs, indent=2) + "\n")


def keep(x, t):
    return x


if __name__ == "__main__":
    sys.exit(main(tyro.extras.overridable_config_cli(CONFIGS)))
