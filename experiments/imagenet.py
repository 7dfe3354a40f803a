"""Class-conditional samples of published networks: DiT, SiT, JiT, ADM or one trained here, as pictures, and their FID.

    python -m experiments.imagenet --autoencoder sd-vae-ft-ema.safetensors network:sit --network.weights SiT-XL-2-256x256.pt
    python -m experiments.imagenet --autoencoder sd-vae-ft-ema.safetensors --guidance 1.5 --guided-channels 3 \\
        network:dit --network.weights DiT-XL-2-256x256.pt sampler:ddpm --sampler.steps 250
    python -m experiments.imagenet --guidance 2.9 --interval 0.1 1 network:jit --network.weights jit-b-16.pth sampler:heun
    python -m experiments.imagenet --count 50000 --guidance 1.5 --guided-channels 3 --autoencoder sd-vae-ft-ema.safetensors \\
        --inception pt_inception.pth --reference VIRTUAL_imagenet256_labeled.npz network:sit --network.weights SiT-XL-2-256x256.pt

The last one is FID-50K: on one GPU, on eight, or with --distributed on every host of a TPU pod, by the same command. Image i depends on
the seed and on i alone, and its class is i modulo the number of classes. The folder holds samples.png, and with --save every image in
images/, by its number, and config.json, what they were drawn with; images that are there are not drawn again. Weights:
docs/published.md.
"""

import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import encode, evaluate, run_folder
from fmjax import betas, guidance, metrics, parallel, plots, pretrained, sampling, times
from fmjax.data import images
from fmjax.training.progress import bar


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint."""

    weights: Path
    """The file, of PyTorch or safetensors."""
    part: str | None = None
    """The part of the file, such as ema, where it holds several."""
    num_heads: int | None = None
    """Attention heads, where the size is no published one."""

    def tensors(self):
        return pretrained.read(self.weights, self.part)


@dataclasses.dataclass(frozen=True)
class Sit(Weights):
    """SiT: a velocity along the linear path."""

    time_scale: float | None = None
    """What the network multiplies its time with, where the file does not say it: 1 for SiT, the default."""

    def load(self):
        return pretrained.sit(self.tensors(), num_heads=self.num_heads, time_scale=self.time_scale)


@dataclasses.dataclass(frozen=True)
class Dit(Weights):
    """DiT: noise and a variance, in 1,000 discrete steps."""

    def load(self):
        return pretrained.dit(self.tensors(), num_heads=self.num_heads)


@dataclasses.dataclass(frozen=True)
class Jit(Weights):
    """JiT: the data, from pixels."""

    part: str | None = "model_ema1"
    """The part of the file: model, or one of its two averages, model_ema1 and model_ema2."""
    noise_scale: float = 1.0
    """Scale of the noise that it was trained with: 1 at 256 pixels, 2 at 512."""
    context_start: int | None = None
    """The block before which the class tokens join, where the size is no published one."""

    def load(self):
        tensors = self.tensors()
        if any(name.startswith("net.") for name in tensors):
            tensors = tensors.under("net.")
        return pretrained.jit(tensors, noise_scale=self.noise_scale, num_heads=self.num_heads, context_start=self.context_start)


@dataclasses.dataclass(frozen=True)
class Adm(Weights):
    """ADM: noise and a variance, in 1,000 discrete steps, from pixels."""

    size: Literal[64, 128, 256, 512] = 256
    """Side of its images."""

    def load(self):
        return pretrained.adm(self.tensors(), self.size)


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler's steps of the flow."""

    steps: int = 50
    """How many steps."""


@dataclasses.dataclass(frozen=True)
class Heun:
    """Heun's steps of the flow, of two evaluations, but for the last."""

    steps: int = 50
    """How many steps."""


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of order 2."""

    steps: int = 25
    """How many steps."""


@dataclasses.dataclass(frozen=True)
class SDE:
    """The SDE of sigma_t^2 = scale beta_t, with a last step to the expected data."""

    steps: int = 250
    """How many steps."""
    scale: float = 1.0
    """How much noise there is."""


@dataclasses.dataclass(frozen=True)
class DDPM:
    """DDPM with the variance that the network predicts."""

    steps: int = 250
    """How many steps."""


SHOWN = 32
"""Images in samples.png, at most."""
DRAWN = ("network", "sampler", "autoencoder", "classes", "guidance", "guided_channels", "interval", "clip", "bfloat16", "seed")
"""What images depend on."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws samples of a published network, and measures them."""

    network: Sit | Dit | Jit | Adm
    """The network."""
    sampler: Euler | Heun | DPMSolver | SDE | DDPM = Euler()
    """How it is followed."""
    folder: Path = Path("runs/imagenet")
    """Folder of samples.png, images/, config.json and metrics.json; the same on all hosts."""
    autoencoder: Path | None = None
    """Weights of the Stable Diffusion autoencoder, for networks of latents."""
    count: int = 32
    """How many images."""
    classes: tuple[int, ...] = ()
    """Classes that are drawn, one after another; all of the network's by default."""
    guidance: float = 1.0
    """Guidance scale; 1 is none."""
    guided_channels: int | None = None
    """How many channels are guided, the first ones: 3 in DiT's and SiT's code; all by default."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times after the first of which, and until the second, there is guidance; from 0 on where the first is 0."""
    clip: bool = False
    """Whether the expected data are clipped to [-1, 1], as ADM's sampler does."""
    batch: int = 32
    """Images at a time, over all devices of a process."""
    bfloat16: bool = False
    """Whether the network computes in bfloat16."""
    save: bool = False
    """Whether every image is written to images/."""
    inception: Path | None = None
    """Weights of Inception, for the FID and the sFID to --reference, and the Inception score."""
    reference: Path | None = None
    """An .npz with mu and sigma of the reference, and mu_s and sigma_s for sFID."""
    distributed: bool = False
    """Whether this is one of several processes, on Slurm, Open MPI or a TPU pod, where they find each other."""
    results: Path | None = None
    """JSON file that gets the metrics, under the name of the folder."""
    seed: int = 0
    """Seed of the noise."""


def main(config: Config):
    check(config)
    if config.distributed:
        parallel.initialize()
    with run_folder.claim(config, trains=False):
        report = run(config)
        run_folder.report(config.folder, report)
        if config.results is not None:
            run_folder.record(config.results, config, report)


def check(config):
    """Stops, saying what to do, where flags do not go together."""
    for name in ("count", "batch"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name} is {getattr(config, name)}: give at least 1.")
    least = 2 if isinstance(config.sampler, DPMSolver | SDE) else 1
    if config.sampler.steps < least:
        raise SystemExit(f"--sampler.steps is {config.sampler.steps}: give at least {least}.")
    if not 0 <= config.interval[0] < config.interval[1] <= 1:
        raise SystemExit(f"--interval is {config.interval[0]} {config.interval[1]}: give two times that increase, between 0 and 1.")
    if isinstance(config.sampler, DDPM) and config.interval != (0.0, 1.0):
        raise SystemExit("sampler:ddpm is guided at all times: leave --interval, or give another sampler.")
    if (config.inception is None) != (config.reference is None):
        raise SystemExit("--inception and --reference go together: the FID is of Inception's features, to those of a reference.")


def check_network(config, network):
    """Likewise, where flags do not go with the network."""
    classes, null = classes_of(network.model)
    if config.classes and classes is None:
        raise SystemExit("The network has no classes: leave --classes.")
    if bad := [label for label in config.classes if not 0 <= label < classes]:
        raise SystemExit(f"--classes has {', '.join(map(str, bad))}, but the network's classes are 0 to {classes - 1}.")
    if config.guidance != 1 and null is None:
        raise SystemExit("The network has no label for no class, so it cannot be guided without a classifier: leave --guidance.")
    if isinstance(config.sampler, DDPM) and not network.variance:
        raise SystemExit("sampler:ddpm needs the variance that DiT and ADM predict, and this network predicts none: give another sampler.")
    steps = len(network.path.betas) if isinstance(network.path, betas.Betas) else config.sampler.steps
    if config.sampler.steps > steps:
        raise SystemExit(f"--sampler.steps is {config.sampler.steps}, but the network knows {steps} steps: give at most as many.")
    if of_latents(network) != (config.autoencoder is not None):
        pictures = "latents, of which an autoencoder makes pictures: give" if of_latents(network) else "pictures: leave"
        raise SystemExit(f"The network is of {' x '.join(map(str, network.size))} {pictures} --autoencoder.")
    if config.inception is not None and network.size[-1] == 1:
        raise SystemExit("Inception takes images in colour, but the network's are grey: leave --inception.")
    devices, processes = len(jax.local_devices()), jax.process_count()
    if config.batch % devices:
        raise SystemExit(f"--batch is {config.batch}, which does not divide among {devices} devices: give a multiple.")
    if config.inception is not None and config.count <= config.batch * (processes - 1):
        raise SystemExit(f"--count is {config.count}: {processes} processes of {config.batch} at a time need more, or a smaller --batch.")


def classes_of(model):
    """How many classes a network has, and its label for no class; None where it has none."""
    label = model if model.condition is None else model.condition
    return label.num_classes, label.num_classes if getattr(label, "null_label", True) else None


def of_latents(network):
    return network.size[-1] == 4


def run(config):
    with run_folder.explained("--network.weights"):
        network = config.network.load()
    if jax.process_index() == 0:
        print(network)
    check_network(config, network)
    decoder, params = (None, None) if config.autoencoder is None else encode.load(config.autoencoder)
    # Before images are drawn for hours.
    measure = None if config.inception is None else make_measure(config)
    if config.save:
        run_folder.keep(config.folder, settings(config), "images/*.png")
    if config.bfloat16:
        network = dataclasses.replace(network, model=network.model.clone(dtype=jnp.bfloat16))
    mesh = parallel.mesh(devices=jax.local_devices())
    network, params = parallel.shard((network, params), mesh)
    draw = functools.partial(drawing(config, decoder, mesh), network, params)

    shown = []
    batches = pictures(config, draw, 3 if of_latents(network) else network.size[-1], shown)
    report: dict[str, float] = {"images": config.count}
    if measure is not None:
        report |= measure(batches)
    else:
        for _ in batches:
            pass
    if jax.process_index() == 0 and shown:
        show(np.concatenate(shown)[:SHOWN]).savefig(config.folder / "samples.png")
    return report


def settings(config):
    """What images depend on, as strings; of files their contents."""
    network = dataclasses.replace(config.network, weights=run_folder.content(config.network.weights))
    decoder = None if config.autoencoder is None else run_folder.content(config.autoencoder)
    return {name: str(getattr(config, name)) for name in DRAWN} | {"network": str(network), "autoencoder": str(decoder)}


def drawing(config, decoder, mesh):
    """(network, parameters of the decoder, indices) -> uint8 images, compiled."""
    sharding = parallel.batch_sharding(mesh, config.batch)

    @jax.jit
    def draw(network, params, indices):
        indices = jax.lax.with_sharding_constraint(indices, sharding)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), indices)
        count, _ = classes_of(network.model)
        labels = None if count is None else jnp.asarray(config.classes or range(count))
        x = follow(config, network, keys, None if labels is None else labels[indices % len(labels)])
        if decoder is not None:
            x = decoder.apply(params, x, method="images")
        # As DiT's and SiT's code, and to the nearest.
        return jnp.clip(jnp.floor(127.5 * x + 128), 0, 255).astype(jnp.uint8)

    def on_devices(network, params, indices):
        return np.asarray(draw(network, params, jax.device_put(indices, sharding)))

    return on_devices


def follow(config, network, keys, y):
    """The samples of keys, and of classes where the network has any."""
    sampler, path = config.sampler, network.path
    discrete = isinstance(path, betas.Betas)
    grid = betas.grid(path, sampler.steps) if discrete else times.uniform_grid(sampler.steps)
    both = jax.vmap(functools.partial(jax.random.split, num=2))(keys)
    x_0 = path.beta(grid[0]) * sampling.noise(both[:, 0], (len(keys), *network.size))
    velocity = guided(config, network, y)
    if isinstance(sampler, DDPM):
        step = sampling.learned_variance(guided_with_variance(config, network, y))
        return sampling.sample_diffusion(path, velocity, sampling.sigma_sbdm(path), both[:, 1], x_0, grid, step=step)[0]
    if config.clip:
        velocity = sampling.clip_data(path, velocity)
    if isinstance(sampler, SDE):
        sigma = sampling.sigma_sqrt_beta(path, sampler.scale)
        return sampling.sample_diffusion(path, velocity, sigma, both[:, 1], x_0, grid, last=sampling.tweedie)[0]
    if isinstance(sampler, DPMSolver):
        return sampling.sample_ode(velocity, x_0, grid, step=sampling.dpm_solver_pp(path, 2))[0]
    # Data end where a path of betas has an infinite velocity: its steps know the path.
    last = sampling.ddim(path) if discrete else sampling.euler
    if isinstance(sampler, Euler) or sampler.steps == 1:
        return sampling.sample_ode(velocity, x_0, grid, step=last)[0]
    return sampling.sample_ode(velocity, x_0, grid, step=sampling.path_heun(path) if discrete else sampling.heun, last=last)[0]


def guided(config, network, y):
    """The velocity, under classes where there are any, guided in the interval."""
    if config.guidance == 1:
        return lambda x, t: network.velocity(x, t, *(() if y is None else (y,)))
    _, null = classes_of(network.model)
    combine = guidance.extrapolate if config.guided_channels is None else guidance.channels(config.guided_channels)
    field = guidance.classifier_free(network.velocity, y, null, config.guidance, combine=combine)
    if config.interval == (0.0, 1.0):
        return field
    start, end = config.interval
    # As JiT's code, which leaves out its first time, unless that is 0.
    start = float(np.nextafter(np.float32(start), np.float32(1))) if start else start
    return guidance.interval(field, guidance.classifier_free(network.velocity, y, null, 1.0), start, end)


def guided_with_variance(config, network, y):
    """The velocity and what the network says of the variance."""
    if config.guidance == 1:
        predict = lambda x, t: network.velocity_and_variance(x, t, *(() if y is None else (y,)))  # noqa: E731
    else:
        predict = network.guided(y, classes_of(network.model)[1], config.guidance, channels=config.guided_channels)
    if not config.clip:
        return predict

    def clipped(x, t):
        velocity, v = predict(x, t)
        return sampling.clip_data(network.path, lambda x, t: velocity)(x, t), v

    return clipped


def pictures(config, draw, channels, shown):
    """Batches of images of this process, drawn or read; the first ones are put into `shown`."""
    processes, index = jax.process_count(), jax.process_index()
    target = config.folder / "images"
    if config.save:
        target.mkdir(parents=True, exist_ok=True)
    with bar("sampling", "images", config.count) if index == 0 else contextlib.nullcontext(lambda done: None) as move:
        for start in range(index * config.batch, config.count, processes * config.batch):
            indices = np.arange(start, start + config.batch)
            names = [target / f"{i:06}.png" for i in indices if i < config.count]
            if config.save and all(name.exists() for name in names):
                found = np.stack([images.read(name, channels) for name in names])
            else:
                found = draw(indices)[: len(names)]
                if config.save:
                    for name, image in zip(names, found, strict=True):
                        write(name, image)
            if sum(map(len, shown)) < SHOWN:
                shown.append(found)
            move(min(config.count, start + config.batch * processes))
            yield found


def write(file, image):
    from PIL import Image

    # Whole or not at all, so that a run that was killed goes on.
    part = file.with_suffix(".part")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(part, format="png")
    part.replace(file)


def make_measure(config):
    """batches of images -> their FID, sFID and Inception score."""
    network = evaluate.Inception(config.inception).load()
    with run_folder.explained("--reference"):
        references = evaluate.statistics(config.reference)
    if "features" not in references:
        raise SystemExit(f"--reference is {config.reference}, which has no mu and sigma.")

    def measure(batches):
        batches, mesh = iter(batches), parallel.mesh(devices=jax.local_devices())
        first = list(itertools.islice(batches, 1))
        with run_folder.explained("--reference"):
            for found in first:
                evaluate.require_alike(config.reference, references, evaluate.dimensions(network, found[:1]))
        batches = itertools.chain(first, batches)
        means, kept = metrics.collect(network.extract, batches, moments=network.moments, keep=("logits",), mesh=mesh)
        return evaluate.distances(network, means, references) | evaluate.inception_score(kept["logits"])

    return measure


def show(pixels):
    """A grid of images."""
    columns = min(8, len(pixels))
    rows = len(pixels) // columns
    blocks = pixels[: rows * columns].reshape(rows, columns, *pixels.shape[1:])
    return plots.samples({"": blocks / 127.5 - 1}, [""] * rows, columns=columns)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.imagenet"))
