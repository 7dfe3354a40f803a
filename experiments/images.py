"""Class-conditional images: handwritten digits, Fashion-MNIST, a folder of images, or latents at the scale of ImageNet.

    python -m experiments.images --help                                the presets: what each trains, on what, how long
    python -m experiments.images digits                                the demo, in runs/digits
    python -m experiments.images digits --no-train --seed 1            samples again from its last checkpoint
    python -m experiments.images fashion-dit path:cosine               another path
    python -m experiments.images folder --data photos --size 64        images of one's own, a sub-folder for each class
    python -m experiments.encode photos --autoencoder sd-vae-ft-ema.safetensors --folder latents         makes latents of images
    python -m experiments.images latents --data latents --accumulate 2 --network.attention cudnn        on one GPU of 80 GB
    python -m experiments.images latents --data latents --sharding fully_sharded --batch 1024           on eight GPUs
    python -m experiments.images latents --data latents --sharding fully_sharded --batch 2048 --remat --distributed
                                                                       on every host of a TPU pod

A network learns the velocity of a path from noise to images, given their class. Its samples are classified, and compared with
images held out of training in Fréchet distance over the classifier's features, beside training images of the same labels. All
of the demo's 1,437 samples at guidance 3 are classified as the digits they should be, and without guidance they are 1.2 to 1.4
times as far from held-out digits as the training digits are.

The folder of the run then holds config.json, metrics.json, history.jsonl, tensorboard/, loss.png, samples.png,
trajectories.png and checkpoints/. A run that was killed goes on with the same command, on any number of devices; SIGTERM saves
it and ends it with status 75.
"""

import dataclasses
import functools
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

from experiments import encode, run_folder
from fmjax import checkpoints, guidance, losses, metrics, parallel, paths, plots, pretrained, sampling, targets, times, training
from fmjax.data import digits, fashion_mnist, images, latents, pipeline
from fmjax.models import dit, layers, unet

DRAWN = 10
"""Classes, and samples of each, that a plot shows at most."""


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A diffusion transformer. In hidden size, depth and heads S is 384, 12, 6; B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16."""

    patch_size: int = 4
    """Side of a patch, in pixels."""
    hidden_size: int = 128
    """Features per patch."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads of each block."""
    dropout: float = 0.0
    """Share of each block's output that training drops."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Implementation of attention: cudnn needs an NVIDIA GPU and --dtype bfloat16."""
    scan: bool = False
    """Whether to compile one block and loop over it, which compiles faster and takes less memory."""


@dataclasses.dataclass(frozen=True)
class UNet:
    """A U-Net of residual blocks, without attention."""

    base_channels: int = 16
    """Channels of the first level."""
    channel_mult: tuple[float, ...] = (1, 2, 4)
    """Channels of each level, as multiples of the first level's; each level halves the image."""
    blocks: int = 2
    """Residual blocks of each level."""
    groups: int = 4
    """Channel groups of the group normalisations."""
    dropout: float = 0.0
    """Share of each block's features that training drops."""


@dataclasses.dataclass(frozen=True)
class SupportVectors:
    """A support vector machine on pixels, which are its features; for small images and few of them."""

    penalty: float = 10.0
    """Penalty of a wrong training image, scikit-learn's C."""


@dataclasses.dataclass(frozen=True)
class Convolutional:
    """A small convolutional network, trained on the training images."""

    epochs: int = 4
    """Passes of the classifier's training over the training images."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a class-conditional flow model on images, draws samples from it, and measures them against held-out images."""

    folder: Path
    """Folder of the run; the same on all hosts."""
    data: str = "digits"
    """Training data: digits, fashion-mnist, synthetic, a folder with one sub-folder of images per class, or one of *.array_record files."""
    data_dir: Path | None = None
    """Folder with the four idx files of Fashion-MNIST; by default those of Debian's package, else a download."""
    size: int = 64
    """Side of the images read from a folder, or of synthetic data, in pixels."""
    channels: int = 3
    """Channels of the images read from a folder (1 for grey, 3 for RGB), or of synthetic data."""
    classes: int = 1000
    """Number of labels in *.array_record files or in synthetic data; other data name their classes."""
    held_out: float = 0.1
    """Share of the images that is held out of training, where the data have no test set of their own."""
    on_device: bool = False
    """Whether all training images stay on the device, which draws each batch at random; otherwise the host reads them epoch by epoch."""
    threads: int = 0
    """Threads that prefetch batches; 0 reads each when it is needed, best for data in memory."""

    network: tyro.conf.AvoidSubcommands[Transformer | UNet] = Transformer()
    """Network that learns the velocity."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's computation."""
    remat: bool = False
    """Whether to compute each block again in the backward pass, to save memory."""
    path: paths.Linear | paths.Cosine | paths.Polynomial = paths.Linear()
    """Path from noise to data."""

    steps: int = 5000
    """Training steps."""
    batch: int = 64
    """Images per training step, over all devices of all hosts."""
    accumulate: int = 1
    """Parts of each batch that are computed one after another, to save memory."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW after its warm-up."""
    warm_up: int = 150
    """Training steps over which the learning rate rises from zero."""
    decay: bool = True
    """Whether the learning rate falls to zero, as a cosine, until the last step; otherwise it stays constant after the warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    ema_decay: float = 0.998
    """Decay, per training step, of the average of the parameters that is sampled."""
    sigma_rel: tuple[float, ...] = ()
    """Relative standard deviations of power-function averages (EDM2) to keep in place of that of --ema-decay; the first is sampled."""
    label_drop: float = 0.1
    """Share of the labels replaced by none in training, which guidance needs (the notes' eta)."""
    sharding: Literal["replicated", "fully_sharded", "pmap"] = "replicated"
    """Layout of the training state over the devices: a copy on each, a part on each, or a copy on each by jax.pmap."""

    log_every: int = 25
    """Training steps between two logs."""
    save_every: int = 250
    """Training steps between two checkpoints; a multiple of --log-every."""
    eval_every: int | None = None
    """Training steps between two evaluations (held-out loss, a plot of samples), a multiple of --log-every; by default only at the end."""
    trace: bool = False
    """Whether to record a trace of the steps between the first two logs, for TensorBoard or Perfetto, in the folder."""

    guidance: tuple[float, ...] = (1.0, 3.0, 5.0)
    """Guidance scales to sample at; 1 is no guidance. Trajectories and saved images are of the middle one."""
    samples: int = 100
    """Samples per class that are measured at each guidance scale; at most as many as training images, with their labels."""
    sampling_steps: int = 20
    """Steps of the sampler (UniPC of order 2), each one evaluation of the network."""
    save_images: int = 0
    """Samples per class that are saved as PNG files in samples/ of the folder."""
    autoencoder: Path | None = None
    """Weights of the Stable Diffusion autoencoder, which makes pictures of latents for plots, --save-images and --export."""
    classifier: tyro.conf.AvoidSubcommands[SupportVectors | Convolutional | None] = Convolutional()
    """Classifier of the samples, whose features give the Frechet distance; with none, as for latents, samples are only drawn."""

    train: bool = True
    """Whether to train; otherwise the last checkpoint in the folder is sampled again (give the network's flags as then)."""
    export: Path | None = None
    """Folder that gets network.safetensors, the averaged transformer under SiT's names, and held_out.npz, the images held out."""
    results: Path | None = None
    """JSON file that gets this run's metrics, under the name of its folder, beside those of other runs."""
    distributed: bool = False
    """Whether this is one of several processes, on Slurm, Open MPI or a TPU pod, where they find each other."""
    coordinator: str | None = None
    """Address host:port of process 0, for several processes elsewhere; needs --processes and --index."""
    processes: int | None = None
    """Number of processes."""
    index: int | None = None
    """Index of this process, from 0."""
    seed: int = 0
    """Seed of all random numbers."""


SMALL = Config(Path("runs/fashion-dit"), "fashion-mnist")
LAB = dataclasses.replace(SMALL, samples=1000, sampling_steps=100, classifier=Convolutional(10))
LARGE = dataclasses.replace(SMALL, dtype="bfloat16", warm_up=1000, log_every=100, sampling_steps=50, threads=16)
LATENTS = dataclasses.replace(LARGE, learning_rate=1e-4, decay=False, sigma_rel=(0.05, 0.1), guidance=(4.0,), classifier=None)


def preset(sentence, base, folder, **changes):
    return sentence, dataclasses.replace(base, folder=Path("runs") / folder, **changes)


PRESETS: dict[str, tuple[str, Config]] = {
    "digits": preset(
        "The demo: handwritten digits of 8 x 8 pixels, a small transformer; 2 to 3 minutes on two CPU cores.",
        SMALL,
        "digits",
        data="digits",
        on_device=True,
        network=Transformer(4, 128, 4, 2),
        steps=2500,
        batch=128,
        warm_up=125,
        save_every=500,
        samples=150,
        classifier=SupportVectors(),
    ),
    "fashion-dit": ("Fashion-MNIST, a small transformer; under 40 minutes on two CPU cores.", SMALL),
    "fashion-unet": preset(
        "Fashion-MNIST, a narrow U-Net; under 40 minutes on two CPU cores.", SMALL, "fashion-unet", network=UNet(), steps=2000
    ),
    "fashion-lab-dit": preset(
        "Fashion-MNIST, the transformer of the course's third lab of 2026; for one GPU, not timed yet.",
        LAB,
        "fashion-lab-dit",
        network=Transformer(4, 256, 8, 8),
        steps=20_000,
        batch=256,
        learning_rate=4e-4,
        warm_up=500,
        weight_decay=1e-4,
        ema_decay=0.9995,
        label_drop=0.35,
    ),
    "fashion-lab-unet": preset(
        "Fashion-MNIST, the U-Net of the course's third lab of 2025; 4 minutes on one H100 GPU.",
        LAB,
        "fashion-lab-unet",
        network=UNet(32, (1, 2, 4), 2, 8),
        batch=250,
        learning_rate=1e-3,
        warm_up=0,
    ),
    "folder": preset(
        "Images of your own, --data FOLDER with one sub-folder per class, a transformer (DiT-S/4) at 64 x 64 pixels; for one GPU.",
        LARGE,
        "folder",
        data="photos",
        network=Transformer(4, 384, 12, 6, scan=True),
        steps=50_000,
        batch=128,
        learning_rate=2e-4,
        ema_decay=0.9995,
        save_every=1000,
        eval_every=5000,
        classifier=Convolutional(20),
    ),
    "latents": preset(
        "Latents of ImageNet's size, --data FOLDER of *.array_record, a transformer (SiT-XL/2); days on eight GPUs or a TPU pod.",
        LATENTS,
        "latents",
        data="latents",
        held_out=0.0002,
        network=Transformer(2, 1152, 28, 16, scan=True),
        steps=400_000,
        batch=256,
        save_every=5000,
        eval_every=10_000,
    ),
    "synthetic": preset(
        "Made-up latents, a transformer of two blocks: a trial of devices, processes and restarts; a minute anywhere.",
        LATENTS,
        "synthetic",
        data="synthetic",
        size=8,
        channels=4,
        classes=10,
        network=Transformer(2, 384, 2, 6, scan=True),
        dtype="float32",
        steps=60,
        batch=16,
        warm_up=10,
        log_every=10,
        save_every=20,
        eval_every=20,
        sampling_steps=10,
        threads=0,
    ),
}

FREE = (
    *("data_dir", "threads", "remat", "sharding", "save_every", "trace"),
    *("guidance", "samples", "sampling_steps", "save_images", "autoencoder", "classifier"),
    *("train", "export", "results", "distributed", "coordinator", "processes", "index"),
)
"""Flags that may change while a run goes on; so may --steps where the learning rate does not decay over them."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources of pairs (image, label) to train on and held out of it, the classes' names and the shape of an image."""

    train: Any
    held_out: Any
    names: tuple[str, ...]
    shape: tuple[int, ...]


def main(config: Config):
    check(config)
    if config.distributed or config.coordinator is not None or config.processes is not None or config.index is not None:
        parallel.initialize(config.coordinator, config.processes, config.index)
    data = open_data(config)
    if data.shape[-1] not in (1, 3) and (config.classifier is not None or (config.save_images and config.autoencoder is None)):
        raise SystemExit(
            f"The data have {data.shape[-1]} channels, so they are no images to save or to classify: use the preset latents, and "
            "--autoencoder to save."
        )
    if config.autoencoder is not None and data.shape[-1] != 4:
        raise SystemExit(f"The data have {data.shape[-1]} channels, but --autoencoder makes pictures of latents, which have 4: leave it.")
    step, what = cell(config.network)
    if any(side % step for side in data.shape[:2]):
        raise SystemExit(f"The images are of {data.shape[0]} x {data.shape[1]} pixels, which {what} of {step} does not divide: change one.")
    if config.train and len(data.train) < config.batch:
        raise SystemExit(f"--batch is {config.batch}, but there are {len(data.train)} images to train on: give a smaller batch.")
    with run_folder.claim(config, free=FREE if config.decay else (*FREE, "steps"), trains=config.train):
        run(config, data)


def check(config):
    """Stops, saying what to do, where flags do not go together."""
    for name in ("batch", "steps", "samples", "sampling_steps", "log_every", "save_every", "size", "channels"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(config, name)}: give at least 1.")
    if not 0 < config.held_out < 1:
        raise SystemExit(f"--held-out is {config.held_out}: give a share of the images, between 0 and 1.")
    for name in ("save_every", "eval_every"):
        if (getattr(config, name) or 0) % config.log_every:
            flag = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{flag} is {getattr(config, name)}: give a multiple of --log-every, {config.log_every}.")
    if config.export is not None and not (isinstance(config.network, Transformer) and isinstance(config.path, paths.Linear)):
        raise SystemExit("--export writes a transformer that follows the linear path, as SiT does: leave it for other networks and paths.")
    if config.decay and config.warm_up >= config.steps:
        raise SystemExit(f"--warm-up is {config.warm_up} steps of {config.steps} in all: give fewer, or more --steps.")


def cell(network):
    """The number of pixels that must divide an image's sides, and the flag that it comes from."""
    if isinstance(network, UNet):
        return 2 ** (len(network.channel_mult) - 1), "the reduction by --network.channel-mult"
    return network.patch_size, "--network.patch-size"


def open_data(config):
    """The data that --data names."""
    if config.data in ("digits", "fashion-mnist"):
        parts = digits.load() if config.data == "digits" else fashion_mnist.load(config.data_dir)
        names = tuple(map(str, range(digits.CLASSES))) if config.data == "digits" else fashion_mnist.NAMES
        train, held_out = (images.arrays(*part) for part in parts)
        return Data(train, held_out, names, train[0][0].shape)
    folder = Path(config.data)
    if config.data == "synthetic":
        rng = np.random.default_rng(config.seed)
        labels = np.arange(1024, dtype=np.int32) % config.classes
        centres = rng.normal(size=(config.classes, 1, 1, config.channels))
        made = centres[labels] + 0.3 * rng.normal(size=(len(labels), config.size, config.size, config.channels))
        source = images.arrays(made.astype(np.float32), labels)
    elif not folder.is_dir():
        raise SystemExit(f"There is no folder {config.data}: give --data a folder, or digits, fashion-mnist or synthetic.")
    elif files := sorted(folder.glob("*.array_record")):
        source = latents.read(files)
    else:
        try:
            source = images.folder(folder, size=config.size, channels=config.channels)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"--data is {config.data}: {error} Each class has a sub-folder of images.") from error
    names = source.classes or tuple(map(str, range(config.classes)))
    train, held_out = pipeline.split(source, max(1, round(config.held_out * len(source))))
    return Data(train, held_out, names, source[0][0].shape)


def run(config, data):
    begin = time.perf_counter()
    classes, mesh = len(data.names), parallel.mesh()
    model = make_network(config, classes)
    key_init, key_batch, key_train, key_sample, key_classifier, key_held_out = jax.random.split(jax.random.key(config.seed), 6)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(config), weight_decay=config.weight_decay))

    def loss_fn(params, key, batch):
        x_1, y = batch
        key_0, key_t, key_drop, key_dropout = jax.random.split(key, 4)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        y = guidance.drop_labels(key_drop, y, classes, config.label_drop)

        def field(x, t):
            return model.apply(params, x, t, y, deterministic=False, rngs={"dropout": key_dropout})

        return losses.flow_matching(field, config.path, x_0, x_1, t).mean()

    def make():
        params = model.init(key_init, jnp.zeros((1, *data.shape)), 0.5, jnp.zeros(1, jnp.int32))
        return training.init(params, optimizer, emas=len(config.sigma_rel) or None)

    decays = tuple(training.power_ema(width) for width in config.sigma_rel) or config.ema_decay
    axis = parallel.AXIS if config.sharding == "pmap" else None
    step = training.make_step(loss_fn, optimizer, ema_decay=decays, axis_name=axis, accumulate=config.accumulate)
    if config.sharding == "pmap":
        step = parallel.pmap(step, mesh)
    elif config.sharding == "fully_sharded":
        step = parallel.constrain_activations(step, mesh)
    state = parallel.create(make, mesh, parallel.fully_sharded if config.sharding == "fully_sharded" else parallel.replicated)
    report: dict[str, float] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}

    held_out_loss = make_held_out_loss(config, data, model, mesh, key_held_out)
    sample = make_sampler(config, data, model, mesh, key_sample)
    decode = make_decoder(config, mesh)

    def average(state):
        return state.ema[0] if config.sigma_rel else state.ema

    def evaluate(run, metrics):
        if config.eval_every is not None and metrics["step"] % config.eval_every == 0:
            metrics["held-out loss per pixel"] = held_out_loss(average(run.state))
            plot_samples(config, data, decoded(decode, sample, average(run.state)), f"samples_{metrics['step']}.png")

    if config.train:
        begun, batches = training.Run(state, key_train), make_batches(config, data, mesh, key_batch)
        trace = config.folder / "trace" if config.trace else None
        state, numbers = run_folder.train(config, step, begun, batches, "loss per pixel", callbacks=[evaluate], trace=trace)
        report |= numbers
    else:
        try:
            state = checkpoints.restore(config.folder / "checkpoints", state)
        except (FileNotFoundError, checkpoints.CorruptCheckpoint) as error:
            raise SystemExit(f"{error} --no-train samples a run that is there: train it first, in the same --folder.") from error
    trained, pictures = time.perf_counter(), decoded(decode, sample, average(state))

    report["held-out loss per pixel"] = held_out_loss(average(state))
    plot_samples(config, data, pictures, "samples.png")
    plot_trajectories(config, data, pictures)
    save_images(config, data, pictures)
    if config.classifier is not None:
        report |= measure(config, data, functools.partial(sample, average(state)), key_classifier)
    report |= {"seconds to train": trained - begin, "seconds in all": time.perf_counter() - begin}
    if config.export is not None:
        export(config, data, model, average(state), decode, mesh)
    if config.results is not None:
        run_folder.record(config.results, config, report)
    run_folder.report(config.folder, report)


def export(config, data, model, params, decode, mesh):
    """Writes the network for experiments.imagenet, and held-out images for experiments.evaluate."""
    # All processes take part, since each may have a part of the parameters.
    params = jax.jit(lambda params: params, out_shardings=parallel.replicated(params, mesh))(params)
    held_out = decode(read(data.held_out)[0])
    if jax.process_index() != 0:
        return
    config.export.mkdir(parents=True, exist_ok=True)
    params = jax.device_get(params)
    params = dit.unstack(params) if config.network.scan else params
    pretrained.write(
        config.export / "network.safetensors", pretrained.sit_tensors(params, model, data.shape), pretrained.sit_metadata(model)
    )
    if held_out.shape[-1] in (1, 3):
        np.savez(config.export / "held_out.npz", arr_0=bytes_of(held_out))


def bytes_of(x):
    """Images in [-1, 1] as uint8."""
    return np.clip(127.5 * (x + 1), 0, 255).round().astype(np.uint8)


def make_network(config, classes):
    net = config.network
    options = {"num_classes": classes, "dropout": net.dropout, "dtype": jnp.dtype(config.dtype), "remat": config.remat}
    if isinstance(net, UNet):
        return unet.UNet(net.base_channels, net.channel_mult, net.blocks, attention_resolutions=(), groups=net.groups, **options)
    options |= {"attention": net.attention, "scan": net.scan}
    return dit.DiT(net.patch_size, net.hidden_size, net.depth, net.num_heads, **options)


def schedule(config):
    """The learning rate by the number of steps taken."""
    if config.decay:
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warm_up, config.steps)
    return optax.linear_schedule(0.0, config.learning_rate, max(1, config.warm_up))


def make_batches(config, data, mesh, key):
    """Batches without end, divided among the devices, which go on where they ended."""
    sharding = parallel.batch_sharding(mesh, config.batch)
    if not config.on_device:
        return pipeline.to_device(pipeline.batches(data.train, config.batch, seed=config.seed, threads=config.threads), sharding=sharding)
    pool = parallel.shard(read(data.train), mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def batch(pool, step):
        index = jax.random.choice(jax.random.fold_in(key, step), len(data.train), (config.batch,), replace=False)
        return tuple(part[index] for part in pool)

    return functools.partial(batch, pool)


def make_held_out_loss(config, data, model, mesh, key):
    """params -> the loss on the images held out, at the same noise and times each time, none of the labels dropped."""
    x_1, y = read(data.held_out)
    key_0, key_t = jax.random.split(key)
    x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))

    @functools.partial(jax.jit, out_shardings=parallel.replicated(0, mesh))
    def each(params, x_0, x_1, t, y):
        x_0, x_1, t, y = jax.lax.with_sharding_constraint((x_0, x_1, t, y), parallel.batch_sharding(mesh))
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), config.path, x_0, x_1, t)

    return lambda params: float(in_chunks(functools.partial(each, params), config.batch, mesh, x_0, x_1, t, y).mean())


def make_sampler(config, data, model, mesh, key):
    """(params, labels, scale, stream=0, save=None) -> samples, (n, H, W, C), or the states that `save` keeps, (n, times, H, W, C)."""
    grid = sampling_times(config)

    @functools.partial(jax.jit, static_argnames=("scale", "save"), out_shardings=parallel.replicated(0, mesh))
    def draw(params, x_0, y, scale, save):
        x_0, y = jax.lax.with_sharding_constraint((x_0, y), parallel.batch_sharding(mesh))
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, len(data.names), scale)
        x_1, saved = sampling.sample_ode(field, x_0, grid, step=sampling.unipc(config.path, 2), save=save)
        return x_1 if saved is None else jnp.moveaxis(saved, 1, 0)

    def sample(params, y, scale, stream=0, save=None):
        x_0 = sampling.noise(jax.random.fold_in(key, stream), (len(y), *data.shape))
        return in_chunks(lambda x_0, y: draw(params, x_0, y, scale, save), config.batch, mesh, x_0, y)

    return sample


def make_decoder(config, mesh):
    """Latents (..., h, w, 4) -> pictures (..., H, W, 3), where there is an autoencoder; else what is given."""
    if config.autoencoder is None:
        return lambda x: x
    model, params = encode.load(config.autoencoder)
    params = parallel.shard(params, mesh)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(0, mesh))
    def draw(params, z):
        return model.apply(params, jax.lax.with_sharding_constraint(z, parallel.batch_sharding(mesh)), method="images")

    def decode(x):
        # Decoding an image takes far more memory than sampling its latents.
        flat = in_chunks(functools.partial(draw, params), mesh.size, mesh, x.reshape(-1, *x.shape[-3:]))
        return flat.reshape(*x.shape[:-3], *flat.shape[1:])

    return decode


def decoded(decode, sample, params):
    """`sample` of these parameters, as pictures."""

    def draw(y, scale, save=None):
        return decode(sample(params, y, scale, save=save))

    return draw


def sampling_times(config):
    """The sampler's grid; where a path's velocity is 0 at noise, it says of the data only later."""
    return times.uniform_grid(config.sampling_steps, start=0.0 if np.any(targets.velocity(config.path, 0.0)) else 0.01)


def in_chunks(function, size, mesh, *arrays):
    """A function of arrays (n, ...), called on about `size` rows at a time, as many on each device; the last are filled up."""
    arrays = [np.asarray(array) for array in arrays]
    n = len(arrays[0])
    size = -(-min(n, size) // mesh.size) * mesh.size
    parts = [function(*(array[np.arange(start, start + size) % n] for array in arrays)) for start in range(0, n, size)]
    return np.concatenate(parts)[:n]


def keep(x, t):
    return x


def read(source, indices=None):
    """Examples of a source as arrays (images, labels)."""
    pairs = [source[int(index)] for index in (range(len(source)) if indices is None else indices)]
    return tuple(np.stack(part) for part in zip(*pairs, strict=True))


def measure(config, data, sample, key):
    """What a classifier says of samples, and how far they are from held-out images beside training images of the same labels."""
    classify = (fit_support_vectors if isinstance(config.classifier, SupportVectors) else fit_convolutional)(config, data, key)
    held_out, held_out_labels = read(data.held_out)
    report = {"classifier accuracy on held-out images": float((classify(held_out)[0] == held_out_labels).mean())}
    # As many of each as there are samples, so that their distances have the same bias.
    (train, y), (held_out, _) = (read(source, first(source, len(data.names), config.samples)) for source in (data.train, data.held_out))
    of_train, of_held_out = classify(train)[1], classify(held_out)[1]
    floor = report["Frechet distance, training to held-out"] = metrics.frechet_distance(of_train, of_held_out)
    for scale in config.guidance:
        labels, features = classify(sample(y, scale, stream=1))
        distance = metrics.frechet_distance(features, of_held_out)
        report |= {
            f"label accuracy at guidance {scale:g}": float((labels == y).mean()),
            f"Frechet distance at guidance {scale:g}": distance,
            f"Frechet distance at guidance {scale:g}, ratio": distance / floor,
            f"median distance to nearest training image at guidance {scale:g}": nearest(features, of_train),
        }
    report["median distance to nearest training image, held-out"] = nearest(of_held_out, of_train)
    return report


def nearest(features, of_train):
    """The median distance to the nearest of the training images measured: less than that of held-out images if samples are copies."""
    return float(jnp.median(metrics.nearest_distance(features, of_train)))


def first(source, classes, count):
    """The indices of the first `count` examples of every class, or of as many as there are, in the source's order."""
    chosen, left = [], np.full(classes, count)
    for index in range(len(source)):
        label = source[index][1]
        if left[label] > 0:
            left[label] -= 1
            chosen.append(index)
        if not left.any():
            break
    return chosen


def fit_support_vectors(config, data, key):
    """images -> (labels, features), the features being pixels."""
    from sklearn.svm import SVC

    x_1, y = read(data.train)
    classifier = SVC(C=config.classifier.penalty).fit(x_1.reshape(len(x_1), -1), y)

    def classify(x):
        features = x.reshape(len(x), -1)
        return classifier.predict(features), features

    return classify


class Classifier(nn.Module):
    """A small convolutional network: logits, and the features before them."""

    classes: int

    @nn.compact
    def __call__(self, x):
        channels = 32
        while channels < 128 or x.shape[1] > 16:
            x = nn.relu(layers.GroupNorm(8)(unet.Conv(min(channels, 64))(x)))
            x, channels = nn.avg_pool(x, (2, 2), (2, 2)), 2 * channels
        features = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(features), features


def fit_convolutional(config, data, key):
    """images -> (labels, features), by a network that every process trains for itself, on one device."""
    # Enough steps per epoch where there are few images.
    classifier, size = Classifier(len(data.names)), min(250, max(16, len(data.train) // 20), len(data.train))
    steps = max(1, config.classifier.epochs * len(data.train) // size)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss_fn(params, key, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(classifier.apply(params, x)[0], y).mean()

    state = training.init(jax.jit(classifier.init)(key, jnp.zeros((1, *data.shape))), optimizer)
    stream = pipeline.batches(data.train, size, seed=config.seed + 1, threads=config.threads, process_index=0, process_count=1)
    step, begun = training.make_step(loss_fn, optimizer), training.Run(state, key)
    run = training.fit(step, begun, pipeline.to_device(stream), steps=steps, progress=sys.stderr.isatty())
    apply, params = jax.jit(classifier.apply), run.state.params

    def classify(x):
        parts = [apply(params, part) for part in np.array_split(x, -(-len(x) // 1000))]
        logits, features = (np.concatenate(values) for values in zip(*parts, strict=True))
        return logits.argmax(-1), features

    return classify


def plot_samples(config, data, sample, name):
    y = np.repeat(np.arange(min(len(data.names), DRAWN)), DRAWN)
    blocks = {}
    for scale in config.guidance:
        x_1 = sample(y, scale)
        blocks["no guidance" if scale == 1 else f"guidance {scale:g}"] = x_1.reshape(-1, DRAWN, *x_1.shape[1:])
    if jax.process_index() == 0:
        plots.samples(blocks, data.names[:DRAWN], columns=DRAWN).savefig(config.folder / name)


def plot_trajectories(config, data, sample):
    y = np.arange(min(len(data.names), DRAWN))
    states = sample(y, middle(config), save=keep)
    if jax.process_index() == 0:
        figure = plots.trajectories(states.swapaxes(0, 1), sampling_times(config), data.names[:DRAWN])
        figure.savefig(config.folder / "trajectories.png")


def middle(config):
    """The guidance scale of trajectories and of saved images."""
    return config.guidance[len(config.guidance) // 2]


def save_images(config, data, sample):
    """Writes samples of each class as PNG files, in place of those that were there."""
    if not config.save_images:
        return
    y = np.repeat(np.arange(len(data.names)), config.save_images)
    x_1 = sample(y, middle(config))
    if jax.process_index() != 0:
        return
    from PIL import Image

    shutil.rmtree(config.folder / "samples", ignore_errors=True)
    for i, (label, image) in enumerate(zip(y, bytes_of(x_1), strict=True)):
        file = config.folder / "samples" / data.names[label].replace("/", "-") / f"{i % config.save_images:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file)


def parse(args=None) -> Config:
    """The configuration that a command line says."""
    presets = {name: config for name, (_, config) in PRESETS.items()}
    descriptions = {name: sentence for name, (sentence, _) in PRESETS.items()}
    kind = tyro.extras.subcommand_type_from_defaults(presets, descriptions, prefix_names=False)
    return tyro.cli(kind, prog="python -m experiments.images", description=Config.__doc__, args=args)


if __name__ == "__main__":
    sys.exit(main(parse()))
