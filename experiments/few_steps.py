"""Samples in one, two and four evaluations: the objectives of `flow_maps` beside the flow, on points, digits, Fashion-MNIST and latents.

    python -m experiments.few_steps points                                   three sets, five seeds, in runs/few_steps/points
    python -m experiments.few_steps points --sets moons --steps 1000         a trial
    python -m experiments.few_steps digits                                   from scratch and by distillation, in runs/few_steps/digits
    python -m experiments.few_steps digits --folder runs/few_steps/demo --init runs/digits --time-scale 1000 --no-qk-norm
                                                                             from the field of the demo, `make demo`
    python -m experiments.few_steps fashion                                  Fashion-MNIST
    python -m experiments.few_steps latents --data latents                   SiT-B/4 with MeanFlow, on one GPU

All objectives have one network, m(x, s, t), one number of steps and batches of one size. `flow` is flow matching alone, sampled by UniPC
of order 2; distillations begin with its average, or with a trained field, --init, and the others from scratch. Maps are followed along a
uniform grid, those that lead to data alone with new noise between. Of points the report has W_2 to fresh points, exactly, beside that of
data to data; of images what a classifier says and the Fréchet distance to held-out images over that of training images. On moons
and the checkerboard one evaluation of a map that `lagrangian` distilled is as good as fifty of the flow. A part that is done is kept, and
the same command goes on after it.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import run_folder
from fmjax import checkpoints, couplings, files, flow_maps, guidance, losses, metrics, paths, plots, sampling, times, training
from fmjax.data import digits, fashion_mnist, latents, toy
from fmjax.models import dit, layers, mlp
from fmjax.training.progress import bar

PATH = paths.Linear()
LONGEST, SHORTEST = 0.1, 1 / 640
"""Steps of consistency training and distillation, at the beginning and at the end."""

# The objectives: functions of a mean velocity (x, s, t) and of what is given, one number per example.


@dataclasses.dataclass(frozen=True)
class Given:
    """What an objective has beside the network."""

    config: Any
    """Points or Images."""
    key: Any
    """A typed key."""
    x_0: Any
    """Noise."""
    x_1: Any
    """Data."""
    progress: Any
    """The share of the training that is done."""
    field: Callable
    """The trained velocity, (x, t) -> like x."""
    target: Callable | None = None
    """What stands for the velocity of a pair, (x, s, u) -> like x."""


def interval(given):
    """Beginnings and ends, and states at the beginnings."""
    s, t = flow_maps.draw_interval(given.key, len(given.x_1), equal=given.config.equal)
    return paths.interpolate(PATH, given.x_0, given.x_1, s), s, t


def neighbours(given):
    """Times a step apart, which is shorter the longer training lasts, and that step."""
    dt = LONGEST * (SHORTEST / LONGEST) ** given.progress
    s = (1 - dt) * times.stratified(given.key, len(given.x_1))
    return s, s + dt, dt


def flow(m, given):
    """Flow matching alone."""
    x, u = paths.flow(PATH, given.x_0, given.x_1, s := times.stratified(given.key, len(given.x_1)))
    return losses.regression(flow_maps.velocity(m), x, s, u if given.target is None else given.target(x, s, u))


def mean_flow(m, given, tangent=None):
    """MeanFlow."""
    _, s, t = interval(given)
    loss = flow_maps.mean_flow(m, PATH, given.x_0, given.x_1, s, t, tangent=tangent, target=given.target)
    return flow_maps.adaptive(loss, given.config.power)


def improved_mean_flow(m, given):
    """MeanFlow along the network's own velocity."""
    return mean_flow(m, given, flow_maps.velocity(m))


def beside_flow(m, given, objective):
    """Flow matching, and an objective that learns longer steps from it."""
    keys = jax.random.split(given.key)
    first, second = (dataclasses.replace(given, key=key) for key in keys)
    return flow(m, first) + objective(m, *interval(second))


def shortcut(m, given):
    """A step as two steps of half its length are."""
    return beside_flow(m, given, lambda m, x, s, t: flow_maps.self_consistency(m, x, s, (s + t) / 2, t))


def self_distillation(m, given):
    """The end of the map moves with the network's own velocity."""
    return beside_flow(m, given, lambda m, x, s, t: flow_maps.lagrangian(m, flow_maps.velocity(m), x, s, t))


def consistency_training(m, given):
    """Neighbours on the straight line of a pair lead to the same data."""
    s, r, dt = neighbours(given)
    x, y = (paths.interpolate(PATH, given.x_0, given.x_1, time) for time in (s, r))
    return flow_maps.consistency(m, x, s, y, r, jnp.ones_like(s)) / dt


def consistency_distillation(m, given):
    """Neighbours on the way of the trained field lead to the same data."""
    s, r, dt = neighbours(given)
    x = paths.interpolate(PATH, given.x_0, given.x_1, s)
    y = flow_maps.from_velocity(given.field)(x, s, r)
    return flow_maps.consistency(m, x, s, y, r, jnp.ones_like(s)) / dt


def eulerian(m, given):
    """The end of the map stays where its beginning moves with the trained field."""
    return flow_maps.adaptive(flow_maps.eulerian(m, given.field, *interval(given)), given.config.power)


def progressive_distillation(m, given):
    """A step as two steps of the trained field's map are."""
    teacher = flow_maps.mean_velocity(flow_maps.from_velocity(given.field, 2))
    return beside_flow(m, given, lambda m, x, s, t: flow_maps.self_consistency(m, x, s, (s + t) / 2, t, teacher=teacher))


def lagrangian(m, given):
    """The end of the map moves with the trained field."""
    return flow_maps.lagrangian(m, given.field, *interval(given))


Name = Literal[
    "flow",
    "mean_flow",
    "improved_mean_flow",
    "shortcut",
    "self_distillation",
    "consistency_training",
    "consistency_distillation",
    "progressive_distillation",
    "eulerian",
    "lagrangian",
]
OBJECTIVES: dict[Name, Callable] = {
    "flow": flow,
    "mean_flow": mean_flow,
    "improved_mean_flow": improved_mean_flow,
    "shortcut": shortcut,
    "self_distillation": self_distillation,
    "consistency_training": consistency_training,
    "consistency_distillation": consistency_distillation,
    "progressive_distillation": progressive_distillation,
    "eulerian": eulerian,
    "lagrangian": lagrangian,
}
DISTILLED = "consistency_distillation", "progressive_distillation", "eulerian", "lagrangian"
"""Those that need a trained field."""
TO_DATA = "consistency_training", "consistency_distillation"
"""Those that learn maps to data alone."""


def follow(objective, m, key, x_0, evaluations):
    """Samples of a map in so many evaluations."""
    grid = times.uniform_grid(evaluations)
    if objective in TO_DATA:
        return sampling.sample_map_renewed(PATH, flow_maps.flow_map(m), key, x_0, grid)
    return sampling.sample_map(flow_maps.flow_map(m), x_0, grid)[0]


def solve(field, x_0, steps):
    """Samples of a field."""
    return sampling.sample_ode(field, x_0, times.uniform_grid(steps), step=sampling.unipc(PATH, min(2, steps)))[0]


# Points: five seeds are one program.


@dataclasses.dataclass(frozen=True)
class Points:
    """Trains objectives on points of the plane, and compares their samples in few evaluations with those of the flow."""

    folder: Path = Path("runs/few_steps/points")
    """Folder of what is done, of the pictures and of metrics.json."""
    sets: tuple[Literal["moons", "checkerboard", "eight_gaussians"], ...] = ("moons", "checkerboard", "eight_gaussians")
    """Data sets."""
    objectives: tuple[Name, ...] = tuple(OBJECTIVES)
    """Objectives; flow before those that distil it."""
    seeds: int = 5
    """How many seeds, from 0 on."""
    steps: int = 5000
    """Training steps of each objective."""
    batch: int = 256
    """Points per training step, drawn anew for each."""
    hidden_size: int = 128
    """Features of each layer."""
    depth: int = 4
    """Layers besides the last."""
    learning_rate: float = 5e-3
    """Learning rate of Adam, which falls to zero as a cosine."""
    ema_decay: float = 0.998
    """Decay, per training step, of the average of the parameters that is sampled."""
    equal: float = 0.5
    """Share of the intervals that are empty, where the velocity is learnt."""
    power: float = 0.0
    """How strongly large losses of MeanFlow and of Eulerian distillation count less."""
    evaluations: tuple[int, ...] = (1, 2, 4)
    """Evaluations of the network for a sample by a map."""
    flow_evaluations: tuple[int, ...] = (4, 10, 50)
    """Evaluations for a sample by the flow."""
    samples: int = 2000
    """Samples whose exact W_2 to as many fresh points is measured."""
    results: Path | None = None
    """JSON file that gets the metrics beside those of other runs."""


SETS = {"moons": toy.moons, "checkerboard": toy.checkerboard, "eight_gaussians": toy.eight_gaussians}
CHUNK = 250
"""Steps between two moves of the progress bar."""


def draw_points(name):
    """(key, n) -> points of mean 0 and variance 1, and the standard deviation that they are divided by."""
    points = SETS[name](jax.random.key(0), 100_000)
    mean, scale = points.mean(0, keepdims=True), float(points.std())
    return lambda key, n: (SETS[name](key, n) - mean) / scale, scale


def points_main(config):
    require_flow(config, config.objectives)
    with run_folder.claim(config, free=("sets", "objectives", "evaluations", "flow_evaluations", "results")):
        done = config.folder / "done.json"
        kept = json.loads(done.read_text()) if done.exists() else {}

        def keep(cell, found):
            kept[cell] = found
            with files.replacing(done) as part:
                part.write_text(json.dumps(kept, indent=1) + "\n")

        for name in config.sets:
            draw, scale = draw_points(name)
            keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
            fresh = [[np.asarray(draw(jax.random.fold_in(key, i), config.samples)) for i in (1, 2)] for key in keys]
            x_0 = jax.vmap(lambda key: sampling.noise(jax.random.fold_in(key, 3), (config.samples, 2)))(keys)
            if f"{name}, data to data" not in kept:
                keep(f"{name}, data to data", {"W2": [scale * distance(*each) for each in fresh]})
            drawn: dict[Any, Any] = {"data": np.stack([each[0] for each in fresh])}
            params = {}
            for objective in config.objectives:
                cell, start = f"{name}, {objective}", time.perf_counter()
                network = mlp.MLP(hidden_size=config.hidden_size, depth=config.depth, end_time=True)
                params[objective] = learn_points(config, network, draw, cell, objective, keys, params.get("flow"))
                if cell not in kept:
                    keep(cell, {"seconds": round(time.perf_counter() - start, 1)})
                for count in config.flow_evaluations if objective == "flow" else config.evaluations:
                    x = drawn[objective, count] = np.asarray(sample_points(network, objective, count, params[objective], keys, x_0))
                    if (of := f"{cell}, {count}") not in kept:
                        keep(of, {"W2": [scale * distance(*pair) for pair in zip(x, (each[0] for each in fresh), strict=True)]})
                        print(f"{cell} in {count} evaluations: W2 to data {np.mean(kept[of]['W2']):.3f}", flush=True)
            plot_points(config, name, drawn)
        report = points_report(config, kept)
        if config.results is not None:
            run_folder.record(config.results, config, report)
        run_folder.report(config.folder, report)


def require_flow(config, objectives):
    """Stops where a distillation has no field."""
    wanting = [name for name in objectives if name in DISTILLED and "flow" not in objectives[: objectives.index(name)]]
    if wanting and getattr(config, "init", None) is None:
        other = ", or give --init" if isinstance(config, Images) else ""
        sys.exit(f"--objectives has {' and '.join(wanting)}, which distil a trained field: put flow before{other}.")


def learn_points(config, network, draw, cell, objective, keys, flow_params):
    """The averaged parameters of each seed, read where they are there."""

    def m(params):
        return lambda x, s, t: network.apply(params, x, s, end=t)

    def loss_fn(params, key, batch):
        progress, teacher = batch
        key_0, key_1, key = jax.random.split(key, 3)
        x_1 = draw(key_1, config.batch)
        field = flow_maps.velocity(m(params if teacher is None else teacher))
        given = Given(config, key, sampling.noise(key_0, x_1.shape), x_1, progress, field)
        return OBJECTIVES[objective](m(params), given).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 20, config.steps)),
    )
    teacher = flow_params if objective in DISTILLED else None
    # Of the key by which data are drawn to be measured others are folded in.
    begin = jax.vmap(lambda key: network.init(jax.random.fold_in(key, 4), jnp.zeros((1, 2)), 0.5, end=0.5))
    params = jax.jit(begin)(keys) if teacher is None else teacher
    # A number first, so that the folder is known to hold a run of this configuration.
    folder = config.folder / "checkpoints" / f"{config.seeds}_seeds_{cell.replace(', ', '_')}"
    if folder.exists():
        return checkpoints.restore(folder, params)
    step = jax.vmap(training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay), in_axes=(0, 0, (None, 0)))

    @functools.partial(jax.jit, static_argnames="count")
    def learn(states, teacher, start, count):
        def once(states, n):
            each = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 5), n))(keys)
            states, logged = step(states, each, (n / config.steps, teacher))
            return states, logged["loss"]

        return jax.lax.scan(once, states, start + jnp.arange(count))

    states = jax.vmap(lambda params: training.init(params, optimizer))(params)
    with bar(cell, "steps", config.steps, loss=float("nan")) as show:
        for start in range(0, config.steps, CHUNK):
            count = min(CHUNK, config.steps - start)
            states, loss = learn(states, teacher, start, count)
            if not np.isfinite(loss).all():
                raise training.NonFiniteLoss(
                    f"{cell}: the loss is not finite before step {start + count}: try a lower learning rate.", None
                )
            show(start + count, loss=float(loss.mean()))
    checkpoints.save(folder, states.ema)
    return states.ema


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sample_points(network, objective, count, params, keys, x_0):
    def one(params, key, x_0):
        m = lambda x, s, t: network.apply(params, x, s, end=t)  # noqa: E731
        if objective == "flow":
            return solve(flow_maps.velocity(m), x_0, count)
        return follow(objective, m, jax.random.fold_in(key, 6), x_0, count)

    return jax.vmap(one)(params, keys, x_0)


def distance(x, y):
    """W_2 of two sets of one size, exactly."""
    return float(np.sqrt(((x - y[couplings.optimal(x, y)]) ** 2).sum(1).mean()))


def points_report(config, kept):
    """Means and standard deviations over the seeds, and the best of one evaluation over the flow in most."""
    report, mean = {}, {}
    for name in config.sets:
        for cell, found in kept.items():
            if cell.startswith(f"{name}, ") and "W2" in found:
                what = cell if cell.endswith("data to data") else "{}, {} in {} evaluations".format(*cell.split(", "))
                report[f"{what}: W2, mean"] = mean[cell] = float(np.mean(found["W2"]))
                if config.seeds > 1:
                    report[f"{what}: W2, standard deviation"] = float(np.std(found["W2"]))
            elif cell.startswith(f"{name}, "):
                report[f"{cell}: seconds of training"] = found["seconds"]
        once = {each: mean[f"{name}, {each}, 1"] for each in config.objectives if f"{name}, {each}, 1" in mean}
        if once and (most := mean.get(f"{name}, flow, {max(config.flow_evaluations)}")):
            best = min(once, key=once.__getitem__)
            report[f"{name}: W2 of the best in one evaluation, {best}, over that of the flow in {max(config.flow_evaluations)}"] = (
                once[best] / most
            )
    return report


def plot_points(config, name, drawn):
    """Data and the flow in a row, then a row of each objective, of the first seed."""
    from matplotlib.figure import Figure

    rows = [["data", *(("flow", count) for count in config.flow_evaluations if ("flow", count) in drawn)]]
    rows += [[(each, count) for count in config.evaluations] for each in config.objectives if each != "flow"]
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.9 * columns, 2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.ravel():
        axes.axis("off")
    for row, keys in zip(panels, rows, strict=True):
        for axes, key in zip(row, keys, strict=False):
            axes.scatter(*drawn[key][0].T, s=1, linewidths=0, color="0.3" if key == "data" else "C0")
            title = key if key == "data" else f"{key[0].replace('_', ' ')}, {key[1]}"
            axes.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
            axes.set_title(title, fontsize=7)
    figure.savefig(config.folder / f"{name}.png", dpi=plots.DPI)


# Images.


@dataclasses.dataclass(frozen=True)
class Images:
    """Trains objectives on images with labels, guidance learnt with the map, and compares their samples with those of the flow."""

    folder: Path
    """Folder of the runs, one for each objective, of the picture and of metrics.json."""
    data: str = "digits"
    """Training data: digits, fashion-mnist, or a folder of latents in *.array_record files."""
    classes: int = 1000
    """Number of labels of latents; other data name their classes."""
    objectives: tuple[Name, ...] = ("flow", "improved_mean_flow", "lagrangian")
    """Objectives; flow before those that distil it, unless there is --init."""
    init: Path | None = None
    """Folder of a run of experiments.images with the same network, whose average all objectives begin with, and which is the flow."""

    patch_size: int = 4
    """Side of a patch, in pixels."""
    hidden_size: int = 128
    """Features per patch."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 2
    """Attention heads of each block."""
    # MeanFlow differentiates in the time, and waves of 1000 t would have derivatives of 1000.
    time_scale: float = 1.0
    """Multiplies the times before their cosines and sines; 1000 in experiments.images."""
    qk_norm: bool = True
    """Whether to normalise queries and keys, which keeps the derivatives of attention bounded; not in experiments.images."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's computation."""
    scan: bool = False
    """Whether to compile one block and loop over it."""

    steps: int = 5000
    """Training steps of each objective."""
    batch: int = 128
    """Images per training step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam after its warm-up."""
    warm_up: int = 125
    """Training steps over which the learning rate rises from zero."""
    decay: bool = True
    """Whether the learning rate falls to zero, as a cosine, until the last step."""
    ema_decay: float = 0.998
    """Decay, per training step, of the average of the parameters that is sampled."""
    label_drop: float = 0.1
    """Share of the labels replaced by none in training."""
    guidance: float = 1.1
    """Guidance scale that maps learn and the flow is sampled at, where each step is two evaluations; 1 is no guidance."""
    mix: float = 0.0
    """Share of the network's own velocity in the target of MeanFlow, which lowers its variance; the guidance scale stays."""
    equal: float = 0.5
    """Share of the intervals that are empty, where the velocity is learnt."""
    power: float = 1.0
    """How strongly large losses of MeanFlow and of Eulerian distillation count less."""

    log_every: int = 25
    """Training steps between two logs."""
    save_every: int = 500
    """Training steps between two checkpoints; a multiple of --log-every."""
    evaluations: tuple[int, ...] = (1, 2, 4)
    """Evaluations of the network for a sample by a map."""
    flow_evaluations: tuple[int, ...] = (4, 10, 50)
    """Evaluations for a sample by the flow."""
    samples: int = 150
    """Samples per class that are measured, with the labels of as many training images."""
    results: Path | None = None
    """JSON file that gets the metrics beside those of other runs."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Images with labels."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    count: int
    read: Callable
    """Indices of training images -> (images, labels)."""
    train: Any = None
    """All of them, where they are few, and those held out."""
    held_out: Any = None
    fit: Callable | None = None
    """(images, labels) -> a function of images that gives labels and features."""


def support_vectors(x, y):
    """A support vector machine; the features are pixels."""
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(x.reshape(len(x), -1), y)
    return lambda x: (classifier.predict(x.reshape(len(x), -1)), x.reshape(len(x), -1))


def perceptron(x, y):
    """A network of one hidden layer; the features are that layer."""
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier((128,), max_iter=10, n_iter_no_change=10, early_stopping=True, random_state=0)
    classifier.fit(x.reshape(len(x), -1), y)

    def classify(x):
        pixels = x.reshape(len(x), -1)
        return classifier.predict(pixels), np.maximum(pixels @ classifier.coefs_[0] + classifier.intercepts_[0], 0)

    return classify


def open_data(config):
    if config.data in ("digits", "fashion-mnist"):
        small = config.data == "digits"
        train, held_out = digits.load() if small else fashion_mnist.load()
        names = tuple(map(str, range(digits.CLASSES))) if small else fashion_mnist.NAMES
        fit = support_vectors if small else perceptron
        return Data(train[0].shape[1:], names, len(train[0]), lambda i: (train[0][i], train[1][i]), train, held_out, fit)
    found = sorted(Path(config.data).glob("*.array_record"))
    if not found:
        sys.exit(f"--data is {config.data}: give digits, fashion-mnist, or a folder with *.array_record files.")
    source = latents.read(found)
    names = source.classes or tuple(map(str, range(config.classes)))
    return Data(
        source[0][0].shape,
        names,
        len(source),
        lambda index: tuple(np.stack(part) for part in zip(*(source[int(i)] for i in index), strict=True)),
    )


def images_main(config):
    require_flow(config, config.objectives)
    if config.guidance != 1 and any(count % 2 for count in config.flow_evaluations):
        sys.exit(f"--flow-evaluations has odd numbers, but a step of the flow at guidance {config.guidance:g} is two: give even ones.")
    data = open_data(config)
    # Attention of cuDNN has no derivative forwards, which most objectives take.
    network = dit.DiT(
        config.patch_size,
        config.hidden_size,
        config.depth,
        config.num_heads,
        len(data.names),
        time_embedding=layers.Sinusoids(scale=config.time_scale),
        qk_norm=layers.RMSNorm if config.qk_norm else None,
        dtype=jnp.dtype(config.dtype),
        scan=config.scan,
        end_time=True,
    )
    x_1, y = jnp.zeros((1, *data.shape)), jnp.zeros(1, jnp.int32)
    params = jax.jit(lambda key: network.init(key, x_1, 0.5, y, end=0.5))(jax.random.key(config.seed))
    field = None
    if config.init is not None:
        params = field = trained_field(config, params)
    classify = None if data.fit is None else data.fit(*data.train)
    report: dict[str, float] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    drawn, measured = {}, None if classify is None else references(config, data, classify, report)
    for objective in config.objectives:
        if objective == "flow" and field is not None:
            trained = field
        else:
            trained, numbers = learn_images(config, data, network, objective, params if field is None else field, field)
            report |= {f"{objective}: {name}": value for name, value in numbers.items()}
        if objective == "flow":
            field = trained if any(each in DISTILLED for each in config.objectives) else None
        for count in config.flow_evaluations if objective == "flow" else config.evaluations:
            drawn[objective, count] = sampler = functools.partial(sample_images, config, data, network, objective, count, trained)
            if measured is not None:
                measure(config, f"{objective} in {count} evaluations", classify, sampler, measured, report)
    config.folder.mkdir(parents=True, exist_ok=True)
    plot_images(config, data, drawn)
    if config.results is not None:
        run_folder.record(config.results, config, report)
    run_folder.report(config.folder, report)


def trained_field(config, params):
    """The average of --init, where its network and its path are those here."""
    try:
        before = json.loads((config.init / "config.json").read_text())
        # No parameter shows these; runs of experiments.images have but one value of the first two.
        given = {"--time-scale": config.time_scale, "--qk-norm": config.qk_norm, "path": "Linear"}
        was = {"--time-scale": before.get("time_scale", 1000.0), "--qk-norm": before.get("qk_norm", False)}
        was["path"] = before.get("path", {}).get("type", "Linear")
        for name, value in was.items():
            if value != given[name]:
                sys.exit(f"--init is {config.init}, whose {name} is {value}, and here it is {given[name]}: the field would be another.")
        return checkpoints.restore_matching(config.init / "checkpoints", params, part="ema", new=("params.interval",))
    except FileNotFoundError as error:
        sys.exit(f"{error} --init is {config.init}: give the folder of a run of experiments.images.")


def learn_images(config, data, network, objective, params, teacher):
    """The averaged parameters after training, and numbers for the report."""
    null, own = len(data.names), dataclasses.replace(config, folder=config.folder / objective)
    if objective not in DISTILLED and config.init is None:
        teacher = None

    def loss_fn(params, key, batch):
        x_1, y, progress, teacher = batch
        key_0, key_drop, key = jax.random.split(key, 3)
        y = guidance.drop_labels(key_drop, y, null, config.label_drop)
        m_y = lambda x, s, t, y: network.apply(params, x, s, y, end=t)  # noqa: E731
        trained = lambda x, t, y: network.apply(params if teacher is None else teacher, x, t, y)  # noqa: E731
        field = guidance.classifier_free(trained, y, null, config.guidance) if config.guidance != 1 else lambda x, t: trained(x, t, y)
        target = None
        if config.guidance != 1 and objective != "flow":
            target = flow_maps.guided_target(m_y, y, null, config.guidance * (1 - config.mix), config.mix)
        given = Given(config, key, sampling.noise(key_0, x_1.shape), x_1, progress, field, target)
        return OBJECTIVES[objective](lambda x, s, t: m_y(x, s, t, y), given).mean()

    schedule = optax.linear_schedule(0.0, config.learning_rate, config.warm_up)
    if config.decay:
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warm_up, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    step = training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay)

    def batch(n):
        index = np.random.default_rng((config.seed, n)).choice(data.count, config.batch)
        x_1, y = data.read(index)
        return jnp.asarray(x_1), jnp.asarray(y, jnp.int32), jnp.float32(n / config.steps), teacher

    # Training takes the memory of what it is given.
    state = training.init(jax.tree.map(jnp.copy, params), optimizer)
    run = training.Run(state, jax.random.key(config.seed + 1))
    free = "objectives", "evaluations", "flow_evaluations", "samples", "results", "save_every"
    with run_folder.claim(own, free=free):
        start = time.perf_counter()
        state, numbers = run_folder.train(own, step, run, batch, "loss")
    return state.ema, numbers | {"seconds to train": time.perf_counter() - start}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def draw_images(config, network, objective, count, params, key, x_0, y):
    null = network.num_classes
    if objective != "flow":
        return follow(objective, lambda x, s, t: network.apply(params, x, s, y, end=t), key, x_0, count)
    field_y = lambda x, t, y: network.apply(params, x, t, y)  # noqa: E731
    if config.guidance == 1:
        return solve(lambda x, t: field_y(x, t, y), x_0, count)
    # The null label is another evaluation.
    return solve(guidance.classifier_free(field_y, y, null, config.guidance), x_0, count // 2)


def sample_images(config, data, network, objective, count, params, y):
    """Samples with labels, of the same noise whatever draws them."""
    key_0, key = jax.random.split(jax.random.key(config.seed + 2))
    x_0 = sampling.noise(key_0, (len(y), *data.shape))
    return np.asarray(draw_images(config, network, objective, count, params, key, x_0, jnp.asarray(y)))


def first(labels, classes, count):
    """The indices of the first `count` examples of each class, or of as many as there are."""
    return np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(classes)])


def references(config, data, classify, report):
    """Labels to draw, features of training images of these labels and of held-out ones, and the distance of the two."""
    (x, y), (held_out, held_out_y) = data.train, data.held_out
    chosen, other = first(y, len(data.names), config.samples), first(held_out_y, len(data.names), config.samples)
    of_train, of_held_out = classify(x[chosen])[1], classify(held_out[other])[1]
    report["classifier accuracy on held-out images"] = float((classify(held_out)[0] == held_out_y).mean())
    report["Frechet distance, training to held-out"] = floor = metrics.frechet_distance(of_train, of_held_out)
    report["median distance to nearest training image, held-out"] = nearest(of_held_out, of_train)
    return y[chosen], of_train, of_held_out, floor


def measure(config, name, classify, sampler, measured, report):
    y, of_train, of_held_out, floor = measured
    labels, features = classify(sampler(y))
    report[f"{name}: label accuracy"] = float((labels == y).mean())
    report[f"{name}: Frechet distance, ratio"] = metrics.frechet_distance(features, of_held_out) / floor
    report[f"{name}: median distance to nearest training image"] = nearest(features, of_train)


def nearest(features, of_train):
    return float(jnp.median(metrics.nearest_distance(features, of_train)))


def plot_images(config, data, drawn):
    """A row per class; latents are written as they are, to samples.npz."""
    rows = min(10, len(data.names))
    y = np.repeat(np.arange(rows), 4)
    blocks = {f"{name.replace('_', ' ')}, {count}": sampler(y) for (name, count), sampler in drawn.items()}
    if data.shape[-1] in (1, 3):
        # Names that are wider than their columns would run into each other.
        shown = {name.replace(" ", "\n"): x.reshape(rows, 4, *data.shape) for name, x in blocks.items()}
        plots.samples(shown, data.names[:rows], columns=4).savefig(config.folder / "samples.png")
    else:
        np.savez(config.folder / "samples.npz", labels=y, **blocks)


PRESETS: dict[str, tuple[str, Points | Images]] = {
    "points": (
        "Moons, a checkerboard and eight Gaussians, all objectives, five seeds; half an hour on two CPU cores.",
        Points(),
    ),
    "digits": (
        "Handwritten digits, the demo's transformer; half an hour on two CPU cores.",
        Images(Path("runs/few_steps/digits")),
    ),
    "fashion": (
        "Fashion-MNIST, a small transformer; under an hour on two CPU cores.",
        Images(
            Path("runs/few_steps/fashion"),
            "fashion-mnist",
            objectives=("flow", "improved_mean_flow"),
            depth=6,
            num_heads=4,
            steps=2500,
            batch=64,
            warm_up=150,
            flow_evaluations=(2, 4, 10, 20),
            samples=100,
        ),
    ),
    "latents": (
        "Latents of ImageNet's size, --data FOLDER of *.array_record, a transformer (SiT-B/4); for one GPU, not run yet.",
        Images(
            Path("runs/few_steps/latents"),
            "latents",
            objectives=("mean_flow",),
            hidden_size=768,
            depth=12,
            num_heads=12,
            dtype="bfloat16",
            scan=True,
            steps=400_000,
            batch=256,
            learning_rate=1e-4,
            warm_up=1000,
            decay=False,
            ema_decay=0.9999,
            guidance=2.0,
            mix=0.5,
            equal=0.75,
            log_every=100,
            save_every=5000,
        ),
    ),
}


def parse(args=None) -> Points | Images:
    """The configuration that a command line says."""
    presets = {name: config for name, (_, config) in PRESETS.items()}
    descriptions = {name: sentence for name, (sentence, _) in PRESETS.items()}
    kind: Any = tyro.extras.subcommand_type_from_defaults(presets, descriptions, prefix_names=False)
    return tyro.cli(kind, prog="python -m experiments.few_steps", args=args)


def main(config: Points | Images):
    (points_main if isinstance(config, Points) else images_main)(config)


if __name__ == "__main__":
    sys.exit(main(parse()))
