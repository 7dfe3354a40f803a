"""Handwritten digits by class: a flow model with classifier-free guidance, trained here and now.

    python -m experiments.digits                       trains, samples and draws, in runs/digits
    python -m experiments.digits --no-train --seed 1   samples again from the last checkpoint there

A small DiT learns the velocity of the linear path on scikit-learn's 1,437 training digits of 8 x 8 pixels. Two to
five minutes on two CPU cores. At guidance 3 and 5 all labels are read back right; without guidance the samples are 1.1 to 1.3
times as far from held-out digits, in Fréchet distance, as the training digits are, and no closer to these than held-out
digits. The folder of the run then holds config.json, metrics.json, loss.png, samples.png, trajectories.png, checkpoints/.
A run that was killed goes on with the same command.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.svm import SVC

from experiments import folder
from fmjax import checkpoints, guidance, losses, metrics, paths, pictures, sampling, times, training
from fmjax.data import digits
from fmjax.models import dit


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a class-conditional flow model on handwritten digits, and draws its samples."""

    folder: Path = Path("runs/digits")
    """Where the run is written."""
    train: bool = True
    """Whether to train; otherwise the last checkpoint in the folder is sampled again (with the network's flags as then)."""
    path: paths.Linear | paths.Cosine | paths.Polynomial = paths.Linear()
    """How noise becomes data."""
    patch: int = 4
    """Side of a patch, in pixels."""
    width: int = 128
    """Features of a patch."""
    depth: int = 4
    """Blocks of the transformer."""
    heads: int = 2
    """Heads of its attention."""
    dropout: float = 0.0
    """Share of a block's output that training drops."""
    steps: int = 2500
    """Training steps."""
    batch: int = 128
    """Digits a step."""
    learning_rate: float = 2e-3
    """Of AdamW, after a warm-up over 5% of the steps, before its cosine decay to zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    ema_decay: float = 0.998
    """Of the average of the parameters that is sampled."""
    label_drop: float = 0.1
    """The notes' eta: how often a label is replaced by none, for guidance."""
    guidance: tuple[float, ...] = (1.0, 3.0, 5.0)
    """The guidance scales to draw and to measure; 1 is none."""
    samples: int = 50
    """Samples of each digit at every scale, for the accuracy of labels."""
    sampling_steps: int = 20
    """Heun steps of a sample, two evaluations each."""
    seed: int = 0
    """Of everything random."""


FREE = ("train", "guidance", "samples", "sampling_steps")


def main(config: Config):
    with folder.claim(config, free=FREE, trains=config.train):
        run(config)


def run(config):
    start = time.perf_counter()
    (train, train_labels), (test, test_labels) = digits.load()
    model = dit.DiT(config.patch, config.width, config.depth, config.heads, digits.CLASSES, dropout=config.dropout)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 20, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))
    key_init, key_batch, key_train, key_sample = jax.random.split(jax.random.key(config.seed), 4)

    def loss_fn(params, key, batch):
        x_1, y = batch
        key_0, key_t, key_drop, key_dropout = jax.random.split(key, 4)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        y = guidance.drop_labels(key_drop, y, digits.CLASSES, config.label_drop)

        def field(x, t):
            return model.apply(params, x, t, y, deterministic=False, rngs={"dropout": key_dropout})

        return losses.flow_matching(field, config.path, x_0, x_1, t).mean()

    pool = jnp.asarray(train), jnp.asarray(train_labels)

    @jax.jit
    def batch(step):
        index = jax.random.choice(jax.random.fold_in(key_batch, step), len(train), (config.batch,), replace=False)
        return tuple(part[index] for part in pool)

    def initial():
        return training.init(model.init(key_init, train[:1], 0.5, train_labels[:1]), optimizer)

    if config.train:
        step = training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay)
        with checkpoints.Checkpointer(config.folder / "checkpoints", keep=1) as checkpointer:
            begun = checkpointer.resume(training.Run(jax.jit(initial)(), key_train))
            ended = training.fit(step, begun, batch, steps=config.steps, log_every=25, save=checkpointer.save, save_every=500)
        pictures.loss(config.folder / "loss.png", ended.history, "flow matching loss per pixel")
        state = ended.state
    else:
        state = checkpoints.restore(config.folder / "checkpoints", jax.eval_shape(initial))
    trained = time.perf_counter()

    grid = times.uniform_grid(config.sampling_steps)

    @functools.partial(jax.jit, static_argnames=("scale", "save"))
    def sample(params, x_0, y, scale, save=None):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, digits.CLASSES, scale)
        return sampling.sample_ode(field, x_0, grid, step=sampling.heun, save=save)

    judge = SVC(C=10).fit(flat(train), train_labels)
    y = jnp.repeat(jnp.arange(digits.CLASSES), config.samples)
    x_0 = sampling.noise(key_sample, (len(y), *train.shape[1:]))
    report = {"classifier accuracy on held-out digits": judge.score(flat(test), test_labels)}
    drawn = {}
    for scale in config.guidance:
        x_1 = sample(state.ema, x_0, y, scale)[0]
        drawn["no guidance" if scale == 1 else f"guidance {scale:g}"] = x_1.reshape(digits.CLASSES, config.samples, *x_1.shape[1:])
        report[f"label accuracy at guidance {scale:g}"] = judge.score(flat(x_1), y)

    # As many samples as training digits, with their labels, so that both distances have the same bias.
    noise = sampling.noise(jax.random.fold_in(key_sample, 1), train.shape)
    unguided = sample(state.ema, noise, jnp.asarray(train_labels), 1.0)[0]
    of_samples, of_train = (metrics.frechet_distance(images, test) for images in (unguided, train))
    report |= {
        "Frechet distance, samples to held-out": of_samples,
        "Frechet distance, training to held-out": of_train,
        "Frechet distance, ratio": of_samples / of_train,
        "nearest training digit, median distance of samples": float(jnp.median(metrics.nearest_distance(unguided, train))),
        "nearest training digit, median distance of held-out": float(jnp.median(metrics.nearest_distance(test, train))),
    }
    pictures.samples(config.folder / "samples.png", drawn, range(digits.CLASSES))
    moments = sample(state.ema, x_0[:: config.samples], y[:: config.samples], config.guidance[len(config.guidance) // 2], keep)[1]
    pictures.trajectories(config.folder / "trajectories.png", moments, grid, range(digits.CLASSES))
    report |= {"seconds to train": trained - start, "seconds in all": time.perf_counter() - start}
    folder.report(config.folder, report, "samples.png, trajectories.png, loss.png, metrics.json, config.json, checkpoints/")


def flat(images):
    return np.asarray(images).reshape(len(images), -1)


def keep(x, t):
    return x


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
