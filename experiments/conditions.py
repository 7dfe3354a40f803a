"""Networks under every kind of condition, against the exact conditional distribution, with and without guidance.

    python -m experiments.conditions         in runs/conditions, in about six minutes on two CPU cores

The data given a condition y are N(m(y), 0.5^2 I), where m is read from a label, a vector, both, a sequence of tokens of any length (their
mean) or an image (itself), and y is drawn so that the data without a condition are a Gaussian, or a mixture of three. So the conditional,
the unconditional and the guided velocity are known. A network learns each kind by flow matching with a fifth of the conditions dropped;
the mean and the standard deviation of its samples under three conditions are compared with the exact flow's, in standard errors. Without
guidance all are within 4. Guidance takes samples where no data were, and makes them narrow, so an error of the mean of .05, or .3 of an
image, is many standard errors there. guidance.png shows the samples beside circles of two exact standard deviations.
"""

import dataclasses
import functools
import sys
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
from fmjax import guidance, losses, marginals, paths, sampling, times, training
from fmjax.models import conditions, dit, layers, mlp

PATH, SCALE, CLASSES, TOKENS = paths.Linear(), 0.5, 3, 4
CENTRES = jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])
"""The mean of the data of each class."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network under every kind of condition, and compares its samples with the exact conditional distribution."""

    folder: Path = Path("runs/conditions")
    """Folder of the plot and the metrics."""
    steps: int = 3000
    """Training steps of each network."""
    batch: int = 256
    """Examples per training step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam at the start; it falls to zero as a cosine."""
    drop: float = 0.2
    """Share of the conditions replaced by none in training."""
    samples: int = 1000
    """Samples per condition and guidance scale."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """Guidance scales; 1 is no guidance."""
    results: Path | None = None
    """JSON file that gets the metrics beside those of other runs."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of condition: its network, how y is drawn, what stands for none, and what the data are."""

    network: nn.Module
    draw: Callable[..., Any]
    """(key, n) -> y."""
    null: Any
    mean: Callable[..., Any]
    """y -> m(y), like the state."""
    whole: marginals.GaussianMixture
    """The data without a condition."""
    chosen: Any
    """Three conditions to sample under."""


def draw_labels(key, n):
    return jax.random.randint(key, (n,), 0, CLASSES)


def draw_vectors(key, n):
    return jax.random.normal(key, (n, 2))


def draw_both(key, n):
    key_label, key_vector = jax.random.split(key)
    return {"label": draw_labels(key_label, n), "vector": draw_vectors(key_vector, n)}


def draw_tokens(key, n):
    """One to four tokens, whose mean is N(0, I) however many there are; the rest is nan."""
    key_count, key_tokens = jax.random.split(key)
    count = jax.random.randint(key_count, (n, 1, 1), 1, TOKENS + 1)
    tokens = jnp.sqrt(count.astype(float)) * jax.random.normal(key_tokens, (n, TOKENS, 2))
    return jnp.where(jnp.arange(TOKENS)[None, :, None] < count, tokens, jnp.nan)


def draw_images(key, n):
    return jax.random.normal(key, (n, 4, 4, 1))


def gaussian(shape):
    """The data without a condition where m(y) is N(0, I)."""
    return marginals.GaussianMixture(jnp.ones(1), jnp.zeros((1, *shape)), (1 + SCALE**2) ** 0.5)


EMBEDDING = layers.Fourier(64)
MLP = functools.partial(mlp.MLP, hidden_size=128, depth=3, time_embedding=EMBEDDING, layer=mlp.Residual)
DIT = functools.partial(dit.DiT, hidden_size=64, depth=2, num_heads=4, time_embedding=EMBEDDING)
LABEL, VECTOR = conditions.Label(CLASSES), conditions.Vector()
POINTS = jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])
KINDS = {
    "label": Kind(
        MLP(condition=LABEL),
        draw_labels,
        CLASSES,
        lambda y: CENTRES[y],
        marginals.GaussianMixture(jnp.ones(CLASSES), CENTRES, SCALE),
        jnp.arange(CLASSES),
    ),
    "vector": Kind(MLP(condition=VECTOR), draw_vectors, jnp.nan, lambda y: y, gaussian((2,)), POINTS),
    "label and vector": Kind(
        MLP(condition=conditions.Several({"label": LABEL, "vector": VECTOR})),
        draw_both,
        {"label": CLASSES, "vector": jnp.nan},
        lambda y: CENTRES[y["label"]] + y["vector"],
        marginals.GaussianMixture(jnp.ones(CLASSES), CENTRES, (1 + SCALE**2) ** 0.5),
        {"label": jnp.arange(CLASSES), "vector": POINTS / 2},
    ),
    "tokens": Kind(
        DIT(patch_size=1, condition=conditions.Tokens()),
        draw_tokens,
        jnp.nan,
        lambda y: jnp.nanmean(y, axis=1)[:, None],
        gaussian((1, 2)),
        jnp.stack([POINTS, POINTS - 1, POINTS + 1, jnp.full((3, 2), jnp.nan)], axis=1),
    ),
    "image": Kind(
        DIT(patch_size=2, condition=conditions.Image()),
        draw_images,
        jnp.nan,
        lambda y: y,
        gaussian((4, 4, 1)),
        draw_images(jax.random.key(1), 3),
    ),
}


def main(config: Config):
    with run_folder.claim(config, free=vars(config)):
        report, found = {}, {}
        for name, kind in KINDS.items():
            field_y = train(config, name, kind)
            found[name] = {scale: compare(config, kind, field_y, scale) for scale in config.guidance}
            for scale, each in found[name].items():
                of = f"{name} at guidance {scale:g}"
                report[f"{of}: mean, largest error"] = float(np.abs(each["samples"].mean(1) - each["mean"]).max())
                report[f"{of}: mean, largest error in standard errors"] = float(np.abs(each["mean error"]).max())
                report[f"{of}: deviation, largest error in standard errors"] = float(np.abs(each["std error"]).max())
        plot(config, found)
        if config.results is not None:
            run_folder.record(config.results, config, report)
        run_folder.report(config.folder, report)


def train(config, name, kind):
    """The network's velocity (x, t, y), trained."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

    def loss_fn(params, key, _):
        key_y, key_1, key_0, key_t, key_drop = jax.random.split(key, 5)
        y = kind.draw(key_y, config.batch)
        mean = kind.mean(y)
        x_1 = mean + SCALE * jax.random.normal(key_1, mean.shape)
        dropped = guidance.drop_labels(key_drop, y, kind.null, config.drop)
        x_0, t = sampling.noise_like(key_0, x_1), times.stratified(key_t, config.batch)
        return losses.flow_matching(lambda x, t: kind.network.apply(params, x, t, dropped), PATH, x_0, x_1, t).mean()

    y = kind.draw(jax.random.key(config.seed), 1)
    params = jax.jit(kind.network.init)(jax.random.key(config.seed), kind.mean(y), 0.5, y)
    run = training.Run(training.init(params, optimizer), jax.random.key(config.seed + 1))
    step = training.make_step(loss_fn, optimizer)
    run = training.fit(step, run, lambda n: jnp.zeros(()), steps=config.steps, log_every=200, progress=sys.stderr.isatty())
    print(f"{name}: loss {run.history[-1]['loss']:.4f}", flush=True)
    params = run.state.ema
    return lambda x, t, y: kind.network.apply(params, x, t, y)


def exact(kind, mean, scale):
    """The guided velocity itself, for means (B, ...) of the data given each condition."""
    whole = marginals.velocity(PATH, kind.whole)

    def of_one(x, mean, t):
        return marginals.velocity(PATH, marginals.GaussianMixture(jnp.ones(1), mean[None], SCALE))(x[None], t)[0]

    def field(x, t):
        given = jax.vmap(of_one, (0, 0, None))(x, mean, t)
        return (1 - scale) * whole(x, t) + scale * given

    return field


def compare(config, kind, field_y, scale):
    """Samples under the chosen conditions, (3, n, D), the exact mean and deviation, and how far from them the samples' are."""
    grid, mean = times.uniform_grid(50), kind.mean(kind.chosen)
    y = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.samples, axis=0), kind.chosen)
    x_0 = sampling.noise(jax.random.key(config.seed + 2), (3 * config.samples, *mean.shape[1:]))
    draw = jax.jit(lambda x_0, y: sampling.sample_ode(guidance.classifier_free(field_y, y, kind.null, scale), x_0, grid)[0])
    x = np.asarray(draw(x_0, y)).reshape(3, config.samples, -1)

    many = 20 * config.samples
    means, noise = jnp.repeat(mean, many, axis=0), sampling.noise(jax.random.key(config.seed + 3), (3 * many, *mean.shape[1:]))
    true = jax.jit(lambda x_0, means: sampling.sample_ode(exact(kind, means, scale), x_0, grid, step=sampling.rk4)[0])
    true = np.asarray(true(noise, means)).reshape(3, many, -1)
    # Of both, and of a Gaussian's deviation.
    error = true.std(1) * np.sqrt(1 / config.samples + 1 / many)
    return {
        "samples": x,
        "mean": true.mean(1),
        "std": true.std(1),
        "mean error": (x.mean(1) - true.mean(1)) / error,
        "std error": (x.std(1) - true.std(1)) / (error / np.sqrt(2)),
    }


def plot(config, found):
    """The first two coordinates of the samples, under each of the three conditions, and circles of two exact deviations."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    figure = Figure(figsize=(2.6 * len(found), 2.6 * len(config.guidance) + 0.5), layout="constrained")
    panels = figure.subplots(len(config.guidance), len(found), squeeze=False)
    for row, scale in zip(panels, config.guidance, strict=True):
        for axes, (name, each) in zip(row, found.items(), strict=True):
            for i, x in enumerate(each[scale]["samples"]):
                axes.scatter(*x[:300, :2].T, s=2, color=f"C{i}", alpha=0.4, linewidths=0)
                (width, height), centre = 4 * each[scale]["std"][i][:2], each[scale]["mean"][i][:2]
                axes.add_patch(Ellipse(centre, width, height, fill=False, edgecolor=f"C{i}"))
            axes.set(title=name if scale == config.guidance[0] else "", aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel("no guidance" if scale == 1 else f"guidance {scale:g}")
    figure.suptitle("Samples under three conditions, and two exact standard deviations around the exact mean")
    figure.savefig(config.folder / "guidance.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.conditions")))
