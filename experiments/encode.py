"""Latents of images, in files that the latents preset of experiments.images trains on.

    python -m experiments.encode photos --autoencoder sd-vae-ft-ema.safetensors --folder latents
    python -m experiments.images latents --data latents --autoencoder sd-vae-ft-ema.safetensors

The images have a sub-folder for each class, as those of ImageNet, and are cropped and resized as DiT's and SiT's code does. Each has one
draw of its latents, scaled, in float16: 8 kB for 256 pixels. A file has the latents of --shard images, and a call that was killed goes on
with the first file that is not there; with --distributed the hosts share the files.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import run_folder
from fmjax import parallel, pretrained
from fmjax.data import images, latents, resize
from fmjax.models import autoencoder
from fmjax.training.progress import bar


@dataclasses.dataclass(frozen=True)
class Config:
    """Encodes images as latents."""

    images: tyro.conf.Positional[Path]
    """Folder with one sub-folder of images per class, in the order of their names."""
    autoencoder: Path
    """Weights of the Stable Diffusion autoencoder."""
    folder: Path = Path("latents")
    """Folder of the files, and of config.json, what they were made with; the same on all hosts."""
    size: int = 256
    """Side of the images, in pixels, a multiple of 8."""
    flip: bool = False
    """Whether mirror images are encoded, too; those of images held out of training are then among the others."""
    batch: int = 64
    """Images at a time, over all devices of a process."""
    shard: int = 10_000
    """Images per file."""
    threads: int = 16
    """Threads that read images."""
    distributed: bool = False
    """Whether this is one of several processes, on Slurm, Open MPI or a TPU pod, where they find each other."""
    seed: int = 0
    """Seed of the draws."""


def main(config: Config):
    for name in ("size", "batch", "shard", "threads"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name} is {getattr(config, name)}: give at least 1.")
    if config.distributed:
        parallel.initialize()
    with run_folder.claim(config, trains=False):
        run(config)


def run(config):
    with run_folder.explained("The images"):
        classes = images.folder(config.images, size=config.size).classes
        found = images.files(config.images)
    model, params = load(config.autoencoder)
    if config.size % (side := 2 ** (len(model.block_out_channels) - 1)):
        raise SystemExit(f"--size is {config.size}: give a multiple of {side}, of whose squares the autoencoder makes one position each.")
    mesh = parallel.mesh(devices=jax.local_devices())
    if config.batch % mesh.size:
        raise SystemExit(f"--batch is {config.batch}, which does not divide among {mesh.size} devices: give a multiple.")
    names = hashlib.sha256("\n".join(str(Path(file).relative_to(config.images)) for file in found).encode()).hexdigest()[:16]
    settings = {"images": f"{len(found)} by the names {names}", "autoencoder": run_folder.content(config.autoencoder)}
    run_folder.keep(
        config.folder, settings | {name: str(getattr(config, name)) for name in ("size", "flip", "shard", "seed")}, "*.array_record"
    )

    # Images that are in no sub-folder are of one class.
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(Path(file).relative_to(config.images).parts[0], 0) for file in found]
    draw = functools.partial(drawing(config, model, mesh), parallel.shard(params, mesh))
    first = jax.process_index() == 0
    shards = range(jax.process_index(), -(-len(found) // config.shard), jax.process_count())
    with (
        concurrent.futures.ThreadPoolExecutor(config.threads) as pool,
        bar("encoding", "images", len(found)) if first else contextlib.nullcontext(lambda done: None) as move,
        run_folder.explained("The images"),
    ):
        for shard in shards:
            file = config.folder / f"train-{shard:05}.array_record"
            start = shard * config.shard
            stop = min(start + config.shard, len(found))
            if not file.exists():
                part = encoded(config, draw, pool, found, range(start, stop), move)
                latents.write(file, part, np.repeat(labels[start:stop], 1 + config.flip))
            move(stop)
    if first:
        print(f"The latents are in {config.folder}: python -m experiments.images latents --data {config.folder} --classes {len(classes)}")


def drawing(config, model, mesh):
    """(params, pixels, indices, mirrored) -> latents, compiled."""
    sharding = parallel.batch_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(params, pixels, indices, mirrored):
        key = jax.random.fold_in(jax.random.key(config.seed), mirrored)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        x = pixels.astype(jnp.float32) / 127.5 - 1
        return model.apply(params, keys, x, method="latents").astype(jnp.float16)

    def on_devices(params, pixels, indices, mirrored):
        return np.asarray(draw(params, *jax.device_put((pixels, indices), sharding), mirrored))

    return on_devices


def encoded(config, draw, pool, found, indices, move):
    """The latents of images, one after another, each before that of its mirror image."""

    def begin(start):
        return pool.map(lambda i: resize.adm_center_crop(images.read(found[i]), config.size), indices[start : start + config.batch])

    coming = begin(0)
    for start in range(0, len(indices), config.batch):
        pixels = np.stack([*coming])
        # Files are read while the device works.
        coming = begin(start + config.batch)
        count = len(pixels)
        # Always as many, so that all batches are one program.
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], config.batch - count, axis=0)])
        numbers = indices[start] + np.arange(config.batch)
        drawn = [draw(pixels, numbers, 0)] + ([draw(pixels[:, :, ::-1], numbers, 1)] if config.flip else [])
        move(indices[start])
        yield from np.stack(drawn, axis=1)[:count].reshape(-1, *drawn[0].shape[1:])


def load(file):
    """The autoencoder of a file, a module and its parameters."""
    model = autoencoder.Autoencoder()
    with run_folder.explained("--autoencoder"):
        return model, pretrained.autoencoder(pretrained.read(file), model)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.encode"))
