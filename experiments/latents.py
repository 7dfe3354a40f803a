"""Latents or images of any size by class, on any number of devices: a scalable interpolant transformer    (Ma et al. 2024, "SiT").

    python -m experiments.latents gpu --data photos/ --channels 3 --classes 5   a folder of images by class, one GPU
    python -m experiments.latents gpus --data latents/                          *.array_record of data.latents, eight GPUs
    python -m experiments.latents pod --data latents/                           the same command on every host of a TPU pod
    python -m experiments.latents small                                         made-up latents: seconds, anywhere
    python -m experiments.latents small --data fashion-mnist --size 28 --channels 1

Started again with the same folder it goes on from its last checkpoint, on any number of devices; SIGTERM saves and ends it with status
75. The folder of the run then holds config.json, rows.jsonl, TensorBoard's files, loss.png, samples.png, pictures of the samples on
the way, and checkpoints/.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import folder
from fmjax import checkpoints, guidance, losses, parallel, paths, pictures, sampling, times, training
from fmjax.data import fashion_mnist, images, latents, pipeline
from fmjax.models import dit


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a class-conditional transformer on latents or images, and draws its samples."""

    folder: Path
    """Where the run is written; on all hosts the same."""
    data: str = "synthetic"
    """A folder of images with a folder a class, a folder with *.array_record, fashion-mnist, or synthetic."""
    size: int = 32
    """Height and width of an image or its latents."""
    channels: int = 4
    """Of an image or its latents."""
    classes: int = 1000
    """Labels of the data."""
    model: Literal["S", "B", "L", "XL"] = "XL"
    """The published sizes of the transformer."""
    patch: int = 2
    """Side of a patch."""
    depth: int | None = None
    """Blocks, in place of the model's."""
    way: Literal["replicated", "fully_sharded", "pmap"] = "replicated"
    """Where the state lies: on every device, in parts, or on every device by jax.pmap."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Implementation of attention: cudnn for bfloat16 on an NVIDIA GPU."""
    remat: bool = False
    """Whether to recompute blocks in the backward pass, to save memory."""
    steps: int = 400_000
    """Training steps."""
    batch: int = 256
    """Images a step, over all devices of all hosts."""
    accumulate: int = 1
    """Parts of a batch that are computed one after another, to save memory."""
    learning_rate: float = 1e-4
    """Of AdamW, constant after its warm-up."""
    warm_up: int = 1000
    """Steps until then."""
    label_drop: float = 0.1
    """The notes' eta: how often a label is replaced by none, for guidance."""
    widths: tuple[float, float] = (0.05, 0.1)
    """Relative widths of the two averages of the parameters that are kept; the first is sampled."""
    every: int = 100
    """Steps between two rows."""
    save_every: int = 5000
    """Steps between two checkpoints; a multiple of the rows'."""
    look_every: int = 10_000
    """Steps between two looks: the loss on images held out, and samples; a multiple of the rows'."""
    held_out: int = 256
    """Images that are not trained on; a multiple of the devices."""
    keep: int = 3
    """Checkpoints that are kept."""
    threads: int = 16
    """That read data."""
    guidance: float = 4.0
    """Of the samples that are drawn."""
    sampling_steps: int = 50
    """Heun steps of a sample."""
    trace: bool = False
    """Whether to trace the second row's steps by jax.profiler, into the folder."""
    cache: Path | None = None
    """A folder for compiled programs, which a second start then need not compile."""
    distributed: bool = False
    """Whether this is one of several processes, on Slurm, Open MPI or a TPU pod."""
    coordinator: str | None = None
    """Elsewhere: host:port of process 0, which goes with the next two."""
    processes: int | None = None
    """How many processes."""
    index: int | None = None
    """Of this process."""
    seed: int = 0
    """Of everything random."""


RUNS = Path("runs/latents")
CONFIGS = {
    "small": (
        "Anywhere, in a minute.",
        Config(
            RUNS / "small",
            size=8,
            classes=10,
            model="S",
            depth=2,
            dtype="float32",
            steps=60,
            batch=16,
            warm_up=10,
            every=10,
            save_every=20,
            look_every=20,
            held_out=64,
            threads=0,
            sampling_steps=10,
        ),
    ),
    "gpu": ("One GPU of 80 GB: SiT-XL/2.", Config(RUNS / "gpu", attention="cudnn", accumulate=2)),
    "gpus": ("Eight GPUs: SiT-XL/2, its state in eight parts.", Config(RUNS / "gpus", way="fully_sharded", attention="cudnn", batch=1024)),
    "pod": ("A TPU pod: SiT-XL/2.", Config(RUNS / "pod", way="fully_sharded", batch=2048, remat=True, distributed=True)),
}


FREE = ("steps", "way", "remat", "save_every", "keep", "threads", "trace", "cache", "distributed", "coordinator", "processes", "index")


def main(config: Config):
    for name in ("save_every", "look_every"):
        if getattr(config, name) % config.every:
            flag = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{flag} is {getattr(config, name)}: give a multiple of --every, {config.every}.")
    if config.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache))
    if config.distributed or config.coordinator is not None or config.processes is not None or config.index is not None:
        parallel.initialize(config.coordinator, config.processes, config.index)
    source = open_data(config)
    if source.classes and len(source.classes) != config.classes:
        raise SystemExit(f"The data have {len(source.classes)} classes: give --classes {len(source.classes)}, not {config.classes}.")
    shape = source[0][0].shape
    if shape != (config.size, config.size, config.channels):
        raise SystemExit(f"The data are of shape {shape}: give --size and --channels so.")
    with folder.claim(config, free=FREE):
        run(config, source)


def run(config, source):
    shape = source[0][0].shape
    mesh = parallel.mesh()
    spread = parallel.batch_sharding(mesh, config.batch)
    sized = getattr(dit, f"DiT_{config.model}")
    model = sized(
        patch_size=config.patch,
        num_classes=config.classes,
        dtype=jnp.dtype(config.dtype),
        attention=config.attention,
        remat=config.remat,
        scan=True,
        **({} if config.depth is None else {"depth": config.depth}),
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, config.learning_rate, config.warm_up), weight_decay=0.0)
    )
    key_init, key_train, key_sample = jax.random.split(jax.random.key(config.seed), 3)

    def loss_fn(params, key, batch):
        x_1, y = batch
        key_0, key_t, key_drop = jax.random.split(key, 3)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        y = guidance.drop_labels(key_drop, y, config.classes, config.label_drop)
        return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), paths.Linear(), x_0, x_1, t).mean()

    def make():
        params = model.init(key_init, jnp.zeros((1, *shape)), 0.5, jnp.zeros(1, jnp.int32))
        return training.init(params, optimizer, emas=2)

    decays = tuple(training.power_ema(width) for width in config.widths)
    axis = parallel.AXIS if config.way == "pmap" else None
    step = training.make_step(loss_fn, optimizer, ema_decay=decays, axis_name=axis, accumulate=config.accumulate)
    rule = parallel.replicated
    if config.way == "pmap":
        step = parallel.pmap(step, mesh)
    elif config.way == "fully_sharded":
        step, rule = parallel.constrain_activations(step, mesh), parallel.fully_sharded
    state = parallel.create(make, mesh, rule)
    source, held = pipeline.split(source, config.held_out)
    held = next(
        pipeline.to_device(pipeline.batches(held, config.held_out, threads=0), sharding=parallel.batch_sharding(mesh, config.held_out))
    )
    stream = pipeline.to_device(pipeline.batches(source, config.batch, seed=config.seed, threads=config.threads), sharding=spread)

    first = jax.process_index() == 0
    count = -(-8 * 8 // mesh.size) * mesh.size
    y = np.arange(count, dtype=np.int32) % min(8, config.classes)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(0, mesh))
    def sample(params, key, y):
        x_0 = jax.lax.with_sharding_constraint(sampling.noise(key, (count, *shape)), parallel.batch_sharding(mesh))
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, config.classes, config.guidance)
        return sampling.sample_ode(field, x_0, times.uniform_grid(config.sampling_steps), step=sampling.heun)[0]

    def draw(state, name):
        x_1 = np.asarray(sample(state.ema[0], key_sample, y))
        if first:
            # Of latents, the first channel.
            shown = x_1 if config.channels in (1, 3) else x_1[..., :1]
            drawn = np.stack([shown[y == label][:8] for label in np.unique(y)])
            pictures.samples(config.folder / name, {f"guidance {config.guidance:g}": drawn}, np.unique(y), columns=8)

    evaluate = jax.jit(loss_fn, out_shardings=parallel.replicated(0, mesh))

    def look(run, metrics):
        if metrics["step"] % config.look_every == 0:
            # The same noise, times and labels at every look.
            metrics["held-out loss"] = float(evaluate(run.state.ema[0], jax.random.fold_in(key_sample, 1), held))
            draw(run.state, f"samples_{metrics['step']}.png")

    with checkpoints.Checkpointer(config.folder / "checkpoints", keep=config.keep, best="loss") as checkpointer:
        begun = checkpointer.resume(training.Run(state, key_train))
        ended = training.fit(
            step,
            begun,
            stream,
            steps=config.steps,
            log_every=config.every,
            callbacks=[
                look,
                training.json_lines(config.folder / "rows.jsonl", begun.history),
                training.tensorboard(config.folder / "tensorboard", begun.history),
            ],
            save=checkpointer.save,
            save_every=config.save_every,
            trace=config.folder / "trace" if config.trace else None,
            donate=True,
        )

    draw(ended.state, "samples.png")
    if first:
        pictures.loss(config.folder / "loss.png", ended.history, "flow matching loss per number")
        print(f"\nThe run is in {config.folder}/: samples.png, loss.png, rows.jsonl, tensorboard/, config.json, checkpoints/")


def open_data(config):
    """The source that --data names."""
    if config.data == "synthetic":
        rng = np.random.default_rng(config.seed)
        labels = np.arange(1024, dtype=np.int32) % config.classes
        centres = rng.normal(size=(config.classes, 1, 1, config.channels))
        made = centres[labels] + 0.3 * rng.normal(size=(len(labels), config.size, config.size, config.channels))
        return images.arrays(made.astype(np.float32), labels)
    if config.data == "fashion-mnist":
        return dataclasses.replace(images.arrays(*fashion_mnist.load()[0]), classes=fashion_mnist.NAMES)
    folder = Path(config.data)
    if not folder.is_dir():
        raise SystemExit(f"--data is {config.data}, which is no folder: give one, or fashion-mnist, or synthetic.")
    files = sorted(folder.glob("*.array_record"))
    if files:
        return latents.read(files)
    if config.channels not in (1, 3):
        raise SystemExit(f"--data is {config.data}, a folder of images, but --channels is {config.channels}: give 3 for RGB or 1 for grey.")
    return images.folder(folder, size=config.size, channels=config.channels)


if __name__ == "__main__":
    sys.exit(main(tyro.extras.overridable_config_cli(CONFIGS)))
