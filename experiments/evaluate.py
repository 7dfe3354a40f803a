"""How far images are from others: FID, sFID, KID, Inception score, precision and recall, and FD-DINOv2.

    python -m experiments.evaluate samples --reference VIRTUAL_imagenet256_labeled.npz \\
        features:inception --features.weights pt_inception.pth
    python -m experiments.evaluate samples.npz --reference photos --size 256 features:dino --features.weights dinov2_vitl14_pretrain.pth
    python -m experiments.evaluate samples --reference held_out.npz --channels 1 features:pixels         small images, no weights

Images are a folder of files, or an .npz of them in `arr_0`, (N, H, W, 3), uint8, as ADM's evaluator takes them. The reference is either, or
an .npz of statistics: `mu` and `sigma` as EDM's, pytorch-fid's and clean-fid's have, with `mu_s` and `sigma_s` for sFID as ADM's have; its
own images, in `arr_0`, then give precision and recall. `--save` writes the statistics of the images, to be a reference later.

What is printed stands in metrics.json of the run's folder too.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.tree_util import Partial

from experiments import run_folder
from fmjax import files, metrics, parallel, pretrained
from fmjax.data import images, resize
from fmjax.models import dinov2, inception
from fmjax.training.progress import bar

NEAREST = 3
"""Which neighbour precision and recall reach."""


class Network(NamedTuple):
    """What the features are of."""

    distance: str
    """The name of the Frechet distance."""
    extract: Callable
    """images (B, H, W, C) -> a dict of features; a `Partial`, so that weights are no constants of a program."""
    moments: tuple[str, ...]
    """Features whose moments are compared."""
    prepare: Callable = lambda images: images
    """What is done to uint8 images on the host."""


@dataclasses.dataclass(frozen=True)
class Inception:
    """FID, sFID, KID, the Inception score, precision and recall, of the Inception network of the published FID."""

    weights: Path
    """pt_inception-2015-12-05-6726825d.pth, of pytorch-fid and torch-fidelity."""

    def load(self):
        with run_folder.explained("The weights of Inception"):
            params = pretrained.inception(pretrained.read(self.weights))

        def extract(params, images):
            found: Any = inception.Inception().apply(params, images)
            return {"features": found.features, "spatial": found.spatial, "logits": found.logits_unbiased}

        def prepare(images):
            inception.check_images(images)
            return images

        return Network("FID", Partial(extract, params), ("features", "spatial"), prepare)


@dataclasses.dataclass(frozen=True)
class Dino:
    """FD-DINOv2, KID, precision and recall, of the class tokens of DINOv2."""

    weights: Path
    """dinov2_vitl14_pretrain.pth, or that of another size."""

    def load(self):
        with run_folder.explained("The weights of DINOv2"):
            tensors = pretrained.read(self.weights)
            sizes = {384: dinov2.DINOv2_S, 768: dinov2.DINOv2_B, 1024: dinov2.DINOv2_L, 1536: dinov2.DINOv2_G}
            hidden_size = tensors.shape("cls_token")[-1] if "cls_token" in tensors else 0
            if hidden_size not in sizes:
                raise ValueError(f"{self.weights} is of no published size: its tensors are {', '.join(list(tensors)[:4])} and so on.")
            model = sizes[hidden_size](register_tokens=tensors.shape("register_tokens")[1] if "register_tokens" in tensors else 0)
            params = pretrained.dinov2(tensors, model)

        def extract(params, images):
            return {"features": model.apply(params, dinov2.preprocess(images))}

        def prepare(images):
            from PIL import Image

            return resize.pillow(images, (224, 224), Image.Resampling.BICUBIC)

        return Network("FD-DINOv2", Partial(extract, params), ("features",), prepare)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The Frechet distance, KID, precision and recall of pixels themselves, from 0 to 1, for small images."""

    def load(self):
        extract = lambda images: {"features": images.reshape(len(images), -1) / 255}  # noqa: E731
        return Network("Frechet distance of pixels", extract, ("features",))


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares images with others."""

    images: tyro.conf.Positional[Path]
    """Folder of images, or an .npz with them in arr_0."""
    features: Inception | Dino | Pixels
    """What is compared."""
    reference: Path | None = None
    """Folder of images, an .npz with them, or one of statistics; without it only the Inception score is printed."""
    size: int | None = None
    """Side that images of folders are cropped and resized to, as ADM does; None takes them as they are, all of one size."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    count: int | None = None
    """How many of the images are taken, the first ones; None for all. Of the reference all are."""
    batch: int = 64
    """Images at a time, over all devices; filled up to a multiple of them."""
    neighbours: bool = True
    """Whether precision, recall and KID are computed where the reference has images; their memory and time grow with its number."""
    save: Path | None = None
    """An .npz that gets the statistics of the images, mu and sigma."""
    folder: Path = Path("runs/evaluate")
    """Folder of metrics.json."""
    results: Path | None = None
    """JSON file that gets the metrics, under the name of the folder."""


class Images:
    """Images of a folder or of an .npz, in batches of uint8."""

    def __init__(self, path, config, count=None):
        self.path, self.config, self.array, self.files, self.shapes = path, config, None, [], set()
        if path.is_dir():
            self.files = images.files(path)
        elif "arr_0" in (held := stored(path)):
            if len(held["arr_0"].shape) != 4 or held["arr_0"].dtype != np.uint8:
                raise ValueError(
                    f"arr_0 of {path} is {held['arr_0'].shape} of {held['arr_0'].dtype}, but images are (N, H, W, C) of uint8."
                )
            self.array = held["arr_0"].read()
        else:
            raise ValueError(f"{path} is neither a folder of images nor an .npz with them in arr_0.")
        self.count = min(len(self.files if self.array is None else self.array), count or sys.maxsize)
        if not self.count:
            raise ValueError(f"{path} has no images.")

    def batches(self):
        for start in range(0, self.count, self.config.batch):
            yield self.slice(start, min(start + self.config.batch, self.count))

    def slice(self, start, stop):
        return self.array[start:stop] if self.array is not None else self.read(self.files[start:stop])

    def read(self, files):
        found = [images.read(file, self.config.channels) for file in files]
        if self.config.size is not None:
            found = [resize.adm_center_crop(image, self.config.size) for image in found]
        self.shapes |= {image.shape for image in found}
        if len(self.shapes) > 1:
            sizes = " and ".join(map(str, sorted(self.shapes)))
            raise ValueError(f"{self.path} has images of {sizes}, but metrics are of one size: give --size.")
        return np.stack(found)


def main(config: Config):
    for name in ("batch", "count", "size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise SystemExit(f"--{name} is {getattr(config, name)}: give at least 1.")
    if config.channels not in (1, 3):
        raise SystemExit(f"--channels is {config.channels}: give 3 for RGB, or 1 for grey.")
    if config.save is not None and (config.save.suffix != ".npz" or config.save.is_dir()):
        raise SystemExit(f"--save is {config.save}: give the name of an .npz file, which --reference reads.")
    given = {config.images.resolve(), *([] if config.reference is None else [config.reference.resolve()])}
    if config.save is not None and config.save.resolve() in given:
        raise SystemExit(f"--save is {config.save}, which is read: give another name.")
    if config.results is not None and config.results.is_dir():
        raise SystemExit(f"--results is {config.results}, a folder: give the name of a JSON file.")
    if config.reference is None and config.save is None and not isinstance(config.features, Inception):
        raise SystemExit("Without --reference there is only the Inception score: give --reference, --save or features:inception.")
    with run_folder.claim(config, trains=False):
        report = compare(config, config.features.load())
        run_folder.report(config.folder, report)
        if config.results is not None:
            run_folder.record(config.results, config, report)


def compare(config, network):
    """The metrics, by name."""
    reference = config.reference
    with run_folder.explained("The images"):
        given = Images(config.images, config, config.count)
        sizes = dimensions(network, given.slice(0, 1))
    # What is wrong with the reference is said before hours of features.
    with run_folder.explained("--reference"):
        references = {} if reference is None else statistics(reference)
        images_too = reference is not None and (not references or (config.neighbours and "arr_0" in stored(reference)))
        others = Images(reference, config) if images_too else None
        require_alike(reference, references, sizes)
        if others is not None and dimensions(network, others.slice(0, 1)) != sizes:
            raise ValueError(f"{reference} has images of another size than {config.images}: give --size, which images of folders get.")
    if config.save is not None:
        with run_folder.explained("--save"):
            config.save.parent.mkdir(parents=True, exist_ok=True)
    near = ["features"] if config.neighbours and others is not None else []
    fewest = min(given.count, given.count if others is None else others.count)
    if near and fewest <= NEAREST:
        raise SystemExit(
            f"There are {fewest} images on one side, but precision and recall compare each with its {NEAREST} nearest others: give more, "
            "or --no-neighbours."
        )
    if reference is not None and fewest < 2:
        raise SystemExit("There is one image on one side, but a covariance is of two at least: give more.")
    if reference is not None and fewest < sizes["features"]:
        print(
            f"The {network.distance} of {fewest} images, fewer than the {sizes['features']} features of each, is above that of more images."
        )
    with run_folder.explained("The images"):
        logits = ["logits"] if isinstance(config.features, Inception) else []
        means, kept = collect(given, network, [*near, *logits])
    report: dict[str, float] = {"images": given.count}
    if logits:
        report |= inception_score(kept["logits"], shuffled=given.array is None)
    if config.save is not None:
        metrics.save_moments(config.save, means["features"])
    if others is not None:
        report["reference images"] = others.count
        with run_folder.explained("--reference"):
            of_others, real = collect(others, network, near)
        references = references or of_others
    with run_folder.explained("--reference"):
        report |= distances(network, means, references)
    if near:
        real, fake = real["features"], kept["features"]
        fewest = min(len(real), len(fake))
        # Half of few, so that subsets differ.
        size = 1000 if fewest > 1000 else fewest // 2
        with run_folder.explained("--neighbours"):
            report["KID"], report["KID, standard deviation"] = metrics.kernel_distance(jax.random.key(0), real, fake, subset_size=size)
            report["precision"], report["recall"] = metrics.precision_recall(real, fake, NEAREST)
    return report


def collect(source, network, keep):
    """The moments of the features of images, and those features that are kept."""
    batches = map(network.prepare, source.batches())
    with bar(str(source.path), "images", source.count) as show:
        return metrics.collect(network.extract, batches, moments=network.moments, keep=keep, mesh=parallel.mesh(), show=show)


def statistics(path):
    """The moments in an .npz by the names of the features; none where it has none."""
    names = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    return {name: metrics.load_moments(path, *pair) for name, pair in names.items() if pair[0] in stored(path)}


def dimensions(network, images):
    """How long the features of images are, by name; no network is computed."""
    found = jax.eval_shape(network.extract, network.prepare(images))
    return {name: int(np.prod(found[name].shape[1:])) for name in network.moments}


def require_alike(path, references, sizes):
    """Raises unless statistics are of features like these."""
    if references and not set(references) & set(sizes):
        raise ValueError(f"{path} has statistics of {' and '.join(references)} alone, but those of {' and '.join(sizes)} are compared.")
    for name in set(references) & set(sizes):
        if references[name].mean.size != sizes[name]:
            raise ValueError(
                f"{path} has statistics of {references[name].mean.size} {name}, but the images have {sizes[name]}: another network or size "
                "made them."
            )


def distances(network, means, references):
    """The Frechet distances, by name."""
    names = {"features": network.distance, "spatial": "sFID"}
    return {title: metrics.frechet(means[name], references[name]) for name, title in names.items() if name in means and name in references}


def inception_score(logits, *, shuffled=False):
    """The Inception score and its standard deviation over ten parts, which are to be alike: files may be sorted by their classes."""
    if shuffled:
        logits = np.random.default_rng(0).permutation(logits)
    score = metrics.inception_score(logits, splits=min(10, len(logits)))
    return dict(zip(("Inception score", "Inception score, standard deviation"), score, strict=True))


def stored(path):
    """The arrays of an .npz by name; none of what is another file or a folder."""
    return files.arrays(path) if path.suffix == ".npz" and not path.is_dir() else {}


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.evaluate"))
