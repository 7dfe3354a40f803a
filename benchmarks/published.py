"""Published networks: seconds and memory to load one, and images per second beside PyTorch: one JSON line per number.

    make bench-published ARGS="--out results/published.jsonl"
    python -m benchmarks.published --only safetensors inception

- `safetensors` and `pt`: `pretrained.dit` of a drawn file with the names and the shapes of DiT-XL-2-256x256.pt, which is in the system's
  memory of files. A process of its own loads a small file and then this one; its peak is counted from what it held in between.
- `decoder`: latents to images by `models.Autoencoder` in the size of Stable Diffusion's, beside diffusers' AutoencoderKL.
- `inception`: images to the features of the FID by `models.Inception`, beside torch-fidelity's network.

Both sides have the same drawn weights, in float32. PyTorch is on CUDA if JAX has a GPU, and runs as these libraries come and after
`torch.compile`. On a GPU the products of the decoder may be rounded to TF32, on both sides; those of Inception are not. Where a library is
missing, a line on the standard error says so, and the others are measured. Memory is read from /proc, so on Linux.
"""

import dataclasses
import functools
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness, train_step
from fmjax import pretrained
from fmjax.models import autoencoder
from fmjax.models import inception as inceptions

TARGET = "bench-published"


@dataclasses.dataclass(frozen=True)
class Config(harness.Config):
    """Measures published networks; prints one JSON line per number."""

    repeats: int = 3
    """Processes that load a file, and the least number of rounds of a comparison, unless it takes ten times --seconds."""
    model: str = "DiT-XL/2"
    """The transformer to load, DiT-{S,B,L,XL}/{2,4,8}."""
    depth: int | None = None
    """Blocks in place of the model's, for a quick trial."""
    batch: int = 1
    """Images that are decoded at once; more on a GPU."""
    size: int = 256
    """Their sides."""
    widths: tuple[int, ...] = autoencoder.Autoencoder.block_out_channels
    """Channels of the autoencoder's levels, the largest images first."""
    inception_batch: int = 8
    """Images of 299 x 299 that Inception takes at once; more on a GPU."""


# Loading.


def safetensors(config):
    """A file of safetensors."""
    yield from loading(config, ".safetensors")


def pt(config):
    """A file of PyTorch."""
    yield from loading(config, ".pt", packages=("torch",))


def loading(config, suffix, packages=()):
    """Rows of the time and the memory to load a transformer."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = (Path(folder, name + suffix) for name in ("small", "large"))
        harness.apart(draw, {small: ("DiT-S/8", 1), large: (config.model, config.depth)}, config.seed)
        found = [harness.apart(load, small, large) for _ in range(config.repeats)]
        size = large.stat().st_size
    seconds, held, count = np.array(found).T
    blocks = f", {config.depth} blocks" if config.depth is not None else ""
    name = f"{config.model}{blocks}, {count[0] / 1e6:.0f} M parameters from {suffix}"
    more = {"file": f"{size / 1e9:.3g} GB", "processes": config.repeats, "packages": packages}
    yield harness.row(f"{name}: time", float(np.median(seconds)), "s", load=harness.short(os.getloadavg()[0], 2), **more)
    yield harness.row(f"{name}: peak memory over the file's size", float(held.max() / size), "ratio", most=1.2, **more)


def draw(files, seed):
    """Writes checkpoints of transformers, by their names and blocks, as DiT's code names their tensors."""
    rng = np.random.default_rng(seed)
    for path, named in files.items():
        model = train_step.network(*named, learn_sigma=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *train_step.arguments((1, *train_step.SHAPE)))
        params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
        tensors = pretrained.sit_tensors(params, model, train_step.SHAPE)
        if path.suffix == ".pt":
            torch = importlib.import_module("torch")
            torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path)
        else:
            pretrained.write(path, tensors)


def load(small, large):
    """Seconds to load the second file, by how many bytes the process grew for it at most, and how many parameters it has."""

    def params(path):
        return jax.block_until_ready(pretrained.dit(pretrained.read(path)).params)

    params(small)
    before, start = resident("VmRSS"), time.perf_counter()
    found = params(large)
    return time.perf_counter() - start, resident("VmHWM") - before, sum(leaf.size for leaf in jax.tree.leaves(found))


def resident(field):
    """Bytes of this process in memory: VmRSS now, VmHWM at most. `getrusage` would count those of the process that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# Images per second.


def decoder(config):
    """Latents to images."""
    model, packages = autoencoder.Autoencoder(block_out_channels=config.widths), ("torch", "diffusers")
    levels, side = len(config.widths), config.size // 2 ** (len(config.widths) - 1)
    z = jax.random.normal(jax.random.key(config.seed), (config.batch, side, side, model.latent_channels))
    if torch := pytorch(config, decoder, packages, tf32=True):
        network = importlib.import_module("diffusers").AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_num_groups=model.groups,
        )
        params, theirs = pretrained.autoencoder(arrays(network), model), lambda z: network.decode(z).sample
    else:
        params, theirs = initial(config, model, jnp.zeros((1, config.size, config.size, model.channels))), None
    name = f"decoder, {config.size} x {config.size}, batch {config.batch}"
    yield from images(config, name, functools.partial(model.apply, method="decode"), params, z, torch, theirs, packages)


def inception(config):
    """Images to features."""
    model, packages = inceptions.Inception(), ("torch", "torch_fidelity")

    def features(params, x):
        outputs: Any = model.apply(params, x)
        return outputs.features

    x = jax.random.randint(jax.random.key(config.seed), (config.inception_batch, 299, 299, 3), 0, 256, jnp.uint8)
    if torch := pytorch(config, inception, packages, tf32=False):
        network = fidelity(torch)
        params, theirs = pretrained.inception(arrays(network), model), lambda x: network(x)[0]
    else:
        params, theirs = initial(config, model, x[:1]), None
    name = f"Inception, 299 x 299, batch {config.inception_batch}"
    yield from images(config, name, features, params, x, torch, theirs, packages)


def fidelity(torch):
    """torch-fidelity's network, which reads its weights from a file, with PyTorch's first ones."""
    # Which its other networks need, and which must be built for the very PyTorch that is there.
    others = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules.update({name: mock.MagicMock() for name in others})
    library = importlib.import_module("torch_fidelity")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch.nn.Module, "load_state_dict"):
        torch.save({}, Path(folder, "weights.pth"))
        return library.FeatureExtractorInceptionV3("inception", ["2048"], Path(folder, "weights.pth"))


def pytorch(config, part, packages, *, tf32):
    """PyTorch, on JAX's kind of device and on all cores; None where a package, or its CUDA, is missing."""
    if not config.baselines or not harness.ready(part, packages, TARGET):
        return None
    torch, cuda = importlib.import_module("torch"), jax.devices()[0].platform == "gpu"
    if cuda and not torch.cuda.is_available():
        print(f"{part.__name__}: JAX has a GPU, and PyTorch has none", file=sys.stderr)
        return None
    torch.set_default_device("cuda" if cuda else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.manual_seed(config.seed)
    return torch


def arrays(network):
    """The tensors of a module of PyTorch."""
    return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}


def initial(config, model, x):
    """The parameters of a network, made by one program."""
    return jax.jit(model.init)(jax.random.key(config.seed), x)


def images(config, name, ours, params, x, torch, theirs, packages):
    """Rows of the images per second of a network, and of PyTorch's with the same weights where it is there."""
    makers = harness.each([ours], params, x)
    if theirs is None:
        measured = harness.interleaved(config, makers)
        yield harness.row(f"{name}, fmjax: images", len(x) / float(np.median(measured)), "1/s")
        return
    tensor = torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())

    def call(function):
        found = function(tensor)
        if found.is_cuda:
            torch.cuda.synchronize()
        return found

    calls = [functools.partial(call, function) for function in (theirs, torch.compile(theirs))]
    names = ("fmjax", "PyTorch", "PyTorch, compiled")
    with torch.inference_mode():
        a, b = np.asarray(makers[0]()()), call(theirs).cpu().numpy()
        measured = harness.interleaved(config, [*makers, *((lambda call=call: call) for call in calls)])
    for i, seconds in enumerate(np.median(measured, axis=(0, 1))):
        yield harness.row(f"{name}, {names[i]}: images", len(x) / float(seconds), "1/s", packages=packages if i else ())
    for i in (1, 2):
        yield harness.ratio(f"{name}, {names[i]} over fmjax: time", measured, i, 0, packages=packages)
    error = np.abs(a - np.moveaxis(b, 1, -1)).max() / np.abs(b).max()
    yield harness.row(f"{name}, PyTorch and fmjax: results", float(error), "max abs difference over max abs", packages=packages)


def main(config: Config):
    harness.start()
    return harness.report(config, harness.chosen(config, (safetensors, decoder, inception), {pt: ("torch",)}, TARGET))


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.published"))
