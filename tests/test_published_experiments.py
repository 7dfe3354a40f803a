"""Published networks drawn, measured and encoded by the experiments, in small sizes: what each image depends on, and what is refused.

`python test_published_experiments.py INDEX PORT FOLDER` is one of two processes that draw together.
"""

import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import tyro
from jax.tree_util import Partial
from PIL import Image
from test_collect import run_two

from experiments import encode, evaluate, imagenet, images
from fmjax import betas, guidance, metrics, paths, pretrained, sampling, targets, times
from fmjax.data import latents, resize
from fmjax.models import autoencoder, dit, layers, unet
from fmjax.pretrained import layouts, transformers, unets

SMALL_AUTOENCODER = functools.partial(autoencoder.Autoencoder, block_out_channels=(32, 64), layers_per_block=1)
ADM = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "head_dim": 16}


def tensors(name):
    """Of an official network in a small size, with its table of positions."""
    found, _ = official.load(name)
    if side := {"sit": 4, "dit": 4, "jit": 6}.get(name):
        found["pos_embed"] = layers.grid_positions(side, side, found["final_layer.linear.weight"].shape[1])
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files: sit, dit and jit with 4 heads, the last with 1 block before its class tokens, and an autoencoder."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("sit", "dit", "jit", "autoencoder_older"):
        pretrained.write(folder / f"{name}.safetensors", tensors(name))
    return folder


@pytest.fixture(autouse=True)
def small_autoencoder(monkeypatch):
    monkeypatch.setattr(autoencoder, "Autoencoder", SMALL_AUTOENCODER)


def sit(weights, folder, **changes):
    network = imagenet.Sit(weights / "sit.safetensors", num_heads=4)
    small = {"count": 11, "batch": 8, "sampler": imagenet.Euler(2), "guidance": 1.5, "guided_channels": 3, "save": True}
    return imagenet.Config(network, folder=folder, autoencoder=weights / "autoencoder_older.safetensors", **small | changes)


def dit_(weights, folder, **changes):
    network = imagenet.Dit(weights / "dit.safetensors", num_heads=4)
    return dataclasses.replace(sit(weights, folder), network=network, **{"sampler": imagenet.DDPM(3)} | changes)


def jit(weights, folder, **changes):
    network = imagenet.Jit(weights / "jit.safetensors", part=None, num_heads=4, context_start=1, noise_scale=2.0)
    small = {"count": 8, "batch": 8, "sampler": imagenet.Heun(3), "guidance": 2.9, "interval": (0.1, 1.0), "save": True}
    return imagenet.Config(network, folder=folder, **small | changes)


def saved(folder):
    """The images of a run by number."""
    return {int(file.stem): np.asarray(Image.open(file)) for file in sorted((folder / "images").iterdir())}


def assert_alike(ours, theirs):
    """But for single levels, of numbers that are rounded otherwise."""
    differences = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.01


def pixels(x):
    return np.clip(np.floor(127.5 * np.asarray(x) + 128), 0, 255).astype(np.uint8)


def drawn(config, network, i, channels_guided, sample):
    """Image i by hand: its noise, of the seed and of i alone, followed under its class."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), i))
    y = jnp.array([i % 5])
    combine = guidance.extrapolate if channels_guided is None else guidance.channels(channels_guided)
    field = guidance.classifier_free(network.velocity, y, 5, config.guidance, combine=combine)
    return jax.jit(sample, static_argnums=0)(field, jax.random.normal(first, (1, *network.size)), second[None])


def test_images_depend_on_the_seed_and_their_number(tmp_path, weights, monkeypatch):
    """Not on the batch, nor on the devices; and those that are there are not drawn again."""
    config = sit(weights, tmp_path / "run")
    imagenet.main(config)
    found = saved(config.folder)
    assert list(found) == [*range(11)]
    assert {image.shape for image in found.values()} == {(16, 16, 3)}
    network = config.network.load()
    x = drawn(config, network, 10, 3, lambda field, x_0, _: sampling.sample_ode(field, x_0, times.uniform_grid(2), step=sampling.euler)[0])
    model, params = encode.load(config.autoencoder)
    assert_alike(found[10], pixels(model.apply(params, x, method="images")[0]))
    assert json.loads((config.folder / "metrics.json").read_text()) == {"images": 11}
    assert (config.folder / "samples.png").stat().st_size > 0

    ages = {i: (config.folder / "images" / f"{i:06}.png").stat().st_mtime_ns for i in range(11)}
    (config.folder / "images" / "000009.png").unlink()
    # Two devices, another batch, and more images.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    imagenet.main(dataclasses.replace(config, count=13, batch=6))
    again = saved(config.folder)
    assert list(again) == [*range(13)]
    for i in range(11):
        assert_alike(again[i], found[i])
    kept = {i for i, age in ages.items() if i != 9 and (config.folder / "images" / f"{i:06}.png").stat().st_mtime_ns == age}
    assert kept == {0, 1, 2, 3, 4, 5}

    with pytest.raises(
        SystemExit, match=r"run has images/\*\.png of another configuration: guidance was 1\.5 and is 2\.5; seed was 0 and is 1"
    ):
        imagenet.main(dataclasses.replace(config, guidance=2.5, seed=1))
    other = tmp_path / "sit.safetensors"
    pretrained.write(other, tensors("sit") | {"blocks.0.attn.proj.bias": np.ones(64, np.float32)})
    with pytest.raises(SystemExit, match=r"network was Sit.* and is Sit"):
        imagenet.main(dataclasses.replace(config, network=dataclasses.replace(config.network, weights=other)))
    (config.folder / "config.json").unlink()
    with pytest.raises(SystemExit, match="seed was None and is 0"):
        imagenet.main(config)
    assert {i: image.tolist() for i, image in saved(config.folder).items()} == {i: image.tolist() for i, image in again.items()}


def test_ddpm_draws_noise_of_every_image_alone(tmp_path, weights):
    config = dit_(weights, tmp_path, count=8, seed=3)
    imagenet.main(config)
    network = config.network.load()
    grid = betas.grid(network.path, 3)

    def sample(field, x_0, key):
        step = sampling.learned_variance(network.guided(jnp.array([2]), 5, 1.5, channels=3))
        return sampling.sample_diffusion(network.path, field, lambda t: t, key, network.path.beta(grid[0]) * x_0, grid, step=step)[0]

    model, params = encode.load(config.autoencoder)
    # Number 7 is of class 2.
    assert_alike(saved(tmp_path)[7], pixels(model.apply(params, drawn(config, network, 7, 3, sample), method="images")[0]))


def test_jit_is_followed_by_heun_with_guidance_in_an_interval(tmp_path, weights):
    """From classes that are asked for, one after another."""
    config = jit(weights, tmp_path, classes=(4, 1))
    imagenet.main(config)
    network = config.network.load()
    assert network.path == paths.ScaledNoise(paths.Linear(), 2.0)
    y, x_0 = jnp.array([1]), jax.random.normal(jax.random.split(jax.random.fold_in(jax.random.key(0), 3))[0], (1, 24, 24, 3))
    unguided = lambda x, t: network.velocity(x, t, y)
    field = guidance.interval(guidance.classifier_free(network.velocity, y, 5, 2.9), unguided, 0.1001, 1.0)
    sample = jax.jit(lambda x: sampling.sample_ode(field, x, times.uniform_grid(3), step=sampling.heun, last=sampling.euler)[0])
    assert_alike(saved(tmp_path)[3], pixels(sample(2 * x_0)[0]))


@pytest.mark.parametrize(
    "sampler",
    [imagenet.Euler(1), imagenet.Heun(1), imagenet.Heun(2), imagenet.DPMSolver(2), imagenet.SDE(2), imagenet.DDPM(1)],
    ids=str,
)
@pytest.mark.parametrize("name", ["sit", "dit", "jit", "adm", "unconditional"])
def test_every_sampler_follows_every_network(weights, name, sampler):
    """By shapes alone, at the fewest steps."""
    config = imagenet.Config(imagenet.Sit(weights / "sit.safetensors", num_heads=4), sampler=sampler, clip=True)
    if name in ("adm", "unconditional"):
        model = unets.ADM_256(**ADM) if name == "adm" else unets.ADM_256_unconditional(**ADM)
        shapes = layouts.shapes_of(model, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), *([jnp.zeros(1, int)] if name == "adm" else []))
        params = {"params": layouts.traverse_util.unflatten_dict(shapes)}
        network = pretrained.Published(params, betas.cosine(), model, targets.noise, transformers.discrete_time, (8, 8, 3), variance=True)
    else:
        made = {"sit": sit, "dit": dit_, "jit": jit}[name](weights, weights, sampler=sampler)
        network, config = made.network.load(), dataclasses.replace(made, sampler=sampler, interval=(0.0, 1.0), clip=True)
    if isinstance(sampler, imagenet.DDPM) and not network.variance:
        with pytest.raises(SystemExit, match="sampler:ddpm needs the variance that DiT and ADM predict"):
            imagenet.check_network(config, network)
        return
    imagenet.check(config)
    imagenet.check_network(dataclasses.replace(config, batch=8), network)
    y = None if imagenet.classes_of(network.model)[0] is None else jnp.zeros(2, int)
    draw = lambda network, keys: imagenet.follow(config, network, keys, y)
    found = jax.eval_shape(draw, network, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2)))
    assert (found.shape, found.dtype) == ((2, *network.size), jnp.float32)


def test_adm_is_read_in_its_size(weights, monkeypatch):
    monkeypatch.setattr(pretrained, "adm", lambda tensors, size: (len(tensors), size))
    assert imagenet.Adm(weights / "sit.safetensors", size=64).load() == (len(tensors("sit")), 64)
    assert imagenet.classes_of(unets.ADM_64()) == (1000, None)
    assert imagenet.classes_of(unets.ADM_256_unconditional()) == (None, None)
    assert imagenet.classes_of(dit.DiT(num_classes=7)) == imagenet.classes_of(unet.UNet(condition=unet.conditions.Label(7))) == (7, 7)


def field(x, t, y):
    """A velocity of a network of five classes, of which label 5 is none."""
    return x * (1.0 + y[:, None, None, None])


FAKE = types.SimpleNamespace(
    velocity=field,
    velocity_and_variance=lambda x, t, y: (field(x, t, y), 0 * x),
    path=betas.linear(),
    model=types.SimpleNamespace(condition=None, num_classes=5),
    variance=True,
    size=(2, 2, 3),
)


@pytest.mark.parametrize(
    ("interval", "guided_at"), [((0.1, 0.5), [0.12, 0.5]), ((0.0, 0.3), [0.0, 0.1, 0.12]), ((0.0, 1.0), [0.0, 0.1, 0.12, 0.5, 0.9])]
)
def test_guidance_is_in_the_interval(interval, guided_at):
    """Which does not have its first time, as JiT's."""
    x, y = jnp.ones((2, 1, 1, 4)), jnp.array([0, 1])
    config = imagenet.Config(imagenet.Sit(Path("none")), guidance=3.0, guided_channels=2, interval=interval)
    velocity = imagenet.guided(config, FAKE, y)
    for t in (0.0, 0.1, 0.12, 0.5, 0.9):
        own = np.array([[1.0] * 4, [2.0] * 4])
        if t in guided_at:
            own[:, :2] = 6 + 3 * (own[:, :2] - 6)
        np.testing.assert_allclose(velocity(x, jnp.float32(t))[:, 0, 0], own, rtol=1e-6)


def test_ddpm_clips_the_data_of_what_is_guided():
    path = betas.linear()
    network = types.SimpleNamespace(**vars(FAKE) | {"guided": lambda y, null, scale, channels: lambda x, t: (scale * field(x, t, y), x)})
    config = imagenet.Config(imagenet.Sit(Path("none")), guidance=3.0, clip=True)
    x, t, y = 3 * jnp.ones((2, 1, 1, 3)), jnp.float32(0.5), jnp.array([0, 4])
    velocity, v = imagenet.guided_with_variance(config, network, y)(x, t)
    np.testing.assert_array_equal(v, x)
    data = targets.convert(path, velocity, x, t, source=targets.velocity, target=targets.data)
    unclipped = targets.convert(path, 3 * field(x, t, y), x, t, source=targets.velocity, target=targets.data)
    assert np.abs(unclipped).max() > 2
    np.testing.assert_allclose(data, np.clip(unclipped, -1, 1), atol=1e-4)


LATENTS = types.SimpleNamespace(**vars(FAKE) | {"size": (8, 8, 4), "variance": False, "path": paths.Linear()})
NO_NULL = types.SimpleNamespace(**vars(FAKE) | {"model": unets.ADM_256()})
UNCONDITIONAL = types.SimpleNamespace(**vars(FAKE) | {"model": unets.ADM_256_unconditional()})
GREY = types.SimpleNamespace(**vars(FAKE) | {"size": (8, 8, 1)})


@pytest.mark.parametrize(
    ("network", "changes", "said"),
    [
        (FAKE, {"count": 0}, "--count is 0: give at least 1"),
        (FAKE, {"batch": 0}, "--batch is 0: give at least 1"),
        (FAKE, {"batch": 12}, "--batch is 12, which does not divide among 8 devices: give a multiple"),
        (FAKE, {"sampler": imagenet.SDE(1)}, "--sampler.steps is 1: give at least 2"),
        (FAKE, {"sampler": imagenet.DPMSolver(1)}, "--sampler.steps is 1: give at least 2"),
        (FAKE, {"sampler": imagenet.Euler(0)}, "--sampler.steps is 0: give at least 1"),
        (FAKE, {"sampler": imagenet.DDPM(1001)}, "--sampler.steps is 1001, but the network knows 1000 steps"),
        (FAKE, {"interval": (0.5, 0.5)}, "--interval is 0.5 0.5: give two times that increase"),
        (FAKE, {"interval": (0.1, 1.0), "sampler": imagenet.DDPM()}, "sampler:ddpm is guided at all times: leave --interval"),
        (FAKE, {"inception": Path("pt.pth")}, "--inception and --reference go together"),
        (FAKE, {"classes": (0, 5)}, "--classes has 5, but the network's classes are 0 to 4"),
        (FAKE, {"autoencoder": Path("vae.pt")}, "The network is of 2 x 2 x 3 pictures: leave --autoencoder"),
        (LATENTS, {}, "The network is of 8 x 8 x 4 latents, of which an autoencoder makes pictures: give --autoencoder"),
        (LATENTS, {"sampler": imagenet.DDPM()}, "sampler:ddpm needs the variance that DiT and ADM predict"),
        (NO_NULL, {"guidance": 1.5}, "no label for no class, so it cannot be guided without a classifier: leave --guidance"),
        (UNCONDITIONAL, {"guidance": 1.5}, "no label for no class, so it cannot be guided without a classifier: leave --guidance"),
        (UNCONDITIONAL, {"classes": (0,)}, "The network has no classes: leave --classes"),
        (GREY, {"inception": Path("a"), "reference": Path("b")}, "Inception takes images in colour, but the network's are grey"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(network, changes, said):
    config = imagenet.Config(imagenet.Sit(Path("none")), **changes)
    with pytest.raises(SystemExit, match=said):
        (imagenet.check(config), imagenet.check_network(config, network))


def test_files_that_cannot_be_used_are_explained(tmp_path, weights):
    folder = Path(official.__file__).parent
    harmful = tmp_path / "harmful.pkl"
    harmful.write_bytes(b"\x80\x04cos\nsystem\n.")
    broken = {
        tmp_path / "none.pt": "--network.weights: .*No such file",
        harmful: "--network.weights: .*harmful.pkl",
        folder / "files_zip.pt": "--network.weights: .*several dictionaries of tensors.*as part",
        folder / "files.safetensors": "--network.weights: The file has no x_embedder.proj.weight",
        weights / "jit.safetensors": "--network.weights: .*Is it a checkpoint of another network",
        weights / "sit.safetensors": "--network.weights: No published size has 64 features, so num_heads is not known: give it",
    }
    for file, said in broken.items():
        with pytest.raises(SystemExit, match=said):
            imagenet.main(imagenet.Config(imagenet.Sit(file), folder=tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"has no part 'averaged'"):
        imagenet.main(imagenet.Config(imagenet.Sit(folder / "files_zip.pt", "averaged"), folder=tmp_path / "run"))
    config = sit(weights, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--autoencoder: The file has .* tensors .*give the file of an autoencoder"):
        imagenet.main(dataclasses.replace(config, autoencoder=weights / "sit.safetensors"))
    with pytest.raises(SystemExit, match=r"The weights of Inception: .*No such file"):
        imagenet.main(dataclasses.replace(config, inception=tmp_path / "none.pth", reference=tmp_path / "none.npz"))
    assert not (tmp_path / "run" / "images").exists()


def features(matrix, images):
    flat = images.reshape(len(images), -1) / 256
    return {"features": flat @ matrix[:, :4], "spatial": flat @ matrix[:, 4:7], "logits": flat @ matrix[:, 7:]}


def matrix(count):
    return np.random.default_rng(0).standard_normal((count, 12)).astype(np.float32) / np.sqrt(count)


@dataclasses.dataclass(frozen=True)
class SmallInception:
    weights: Path | None = None
    side: int = 24

    def load(self):
        return evaluate.Network("FID", Partial(features, matrix(3 * self.side**2)), ("features", "spatial"))


def reference(file, spatial=True):
    rng = np.random.default_rng(1)
    found = metrics.moments(rng.normal(size=(50, 4))), metrics.moments(rng.normal(size=(50, 3)))
    arrays = {"mu": found[0].mean, "sigma": found[0].covariance}
    arrays |= {"mu_s": found[1].mean, "sigma_s": found[1].covariance} if spatial else {}
    np.savez(file, **arrays)
    return found


def expected(pictures, references, side):
    """What a run with `SmallInception` reports."""
    found = {name: np.asarray(value) for name, value in features(matrix(3 * side**2), pictures).items()}
    of_features, of_spatial = references
    score = metrics.inception_score(found["logits"], splits=min(10, len(pictures)))
    return {
        "images": len(pictures),
        "FID": metrics.frechet(metrics.moments(found["features"]), of_features),
        "sFID": metrics.frechet(metrics.moments(found["spatial"]), of_spatial),
        **{"Inception score": score[0], "Inception score, standard deviation": score[1]},
    }


def test_samples_are_measured(tmp_path, weights, monkeypatch):
    """Those that are there, too, whether or not they are kept."""
    monkeypatch.setattr(evaluate, "Inception", SmallInception)
    references = reference(tmp_path / "reference.npz")
    config = jit(weights, tmp_path / "run", count=12, inception=Path("pt.pth"), reference=tmp_path / "reference.npz")
    imagenet.main(dataclasses.replace(config, results=tmp_path / "results.json"))
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    of_files = expected(np.stack([*saved(tmp_path / "run").values()]), references, 24)
    assert report == pytest.approx(of_files, rel=1e-4)
    assert json.loads((tmp_path / "results.json").read_text())["run"].items() >= report.items()
    monkeypatch.setattr(imagenet, "drawing", lambda *_: lambda *_: pytest.fail("drawn again"))
    imagenet.main(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == pytest.approx(report, rel=1e-6)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"--reference is .*images\.npz, which has no mu and sigma"):
        imagenet.main(dataclasses.replace(config, reference=tmp_path / "images.npz"))
    with pytest.raises(SystemExit, match=r"--reference: .*No such file"):
        imagenet.main(dataclasses.replace(config, reference=tmp_path / "none.npz"))


def test_two_processes_draw_together(tmp_path, weights):
    """Images that do not depend on the number of processes, and metrics of all of them."""
    references = reference(tmp_path / "reference.npz")
    for printed in run_two(__file__, tmp_path, weights):
        assert "another configuration: seed was 0 and is 1" in printed or "Process 0 of this job could not go on" in printed
    together = saved(tmp_path / "run")
    assert list(together) == [*range(10)]
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report == pytest.approx(expected(np.stack([*together.values()]), references, 24), rel=1e-4)
    alone = jit(weights, tmp_path / "alone", count=10)
    imagenet.main(alone)
    assert_alike(np.stack([*together.values()]), np.stack([*saved(alone.folder).values()]))


def main(index, port, folder, weights):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    imagenet.parallel.initialize(f"localhost:{port}", 2, int(index))
    evaluate.Inception = SmallInception
    folder = Path(folder)
    config = jit(Path(weights), folder / "run", count=10, batch=4, inception=Path("pt.pth"), reference=folder / "reference.npz")
    imagenet.main(config)
    try:
        imagenet.main(dataclasses.replace(config, seed=1))
    except SystemExit as error:
        print(error)


def photos(folder, sizes, classes=("ant", "bee")):
    """A folder of PNG files in colour by class, one of each size."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def read(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])


def evaluated(config):
    evaluate.main(config)
    return json.loads((config.folder / "metrics.json").read_text())


def test_images_are_compared_with_images(tmp_path):
    """In pixels, from a folder and from an .npz, of which the first ones may be asked for."""
    folder = photos(tmp_path / "photos", [(4, 4)] * 8)
    others = np.random.default_rng(1).integers(0, 200, (12, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "others.npz", arr_0=others)
    config = evaluate.Config(
        folder, evaluate.Pixels(), tmp_path / "others.npz", batch=5, folder=tmp_path / "run", save=tmp_path / "new" / "mean.npz"
    )
    report = evaluated(config)
    mine, theirs = (images.reshape(len(images), -1) / 255 for images in (read(folder), others))
    title = "Frechet distance of pixels"
    assert report[title] == pytest.approx(metrics.frechet(metrics.moments(mine), metrics.moments(theirs)), rel=1e-4)
    assert (report["images"], report["reference images"]) == (16, 12)
    assert (report["precision"], report["recall"]) == pytest.approx(metrics.precision_recall(theirs, mine))
    assert report["KID"] == pytest.approx(metrics.kernel_distance(jax.random.key(0), theirs, mine, subset_size=6)[0], rel=1e-4)
    of_few = evaluated(dataclasses.replace(config, count=7, neighbours=False, save=None))
    assert (of_few["images"], of_few["reference images"]) == (7, 12)
    assert of_few[title] == pytest.approx(metrics.frechet(metrics.moments(mine[:7]), metrics.moments(theirs)), rel=1e-4)
    # What was saved is a reference, without images.
    back = evaluated(dataclasses.replace(config, images=tmp_path / "others.npz", reference=config.save, save=None))
    assert back.keys() == {"images", title}
    assert back[title] == pytest.approx(report[title], rel=1e-4)
    grey = evaluated(dataclasses.replace(config, reference=folder, channels=1, save=None))
    assert grey[title] < 1e-6


def test_images_of_any_size_are_cropped(tmp_path):
    folder = photos(tmp_path / "photos", [(9, 5), (6, 14), (4, 4)])
    cropped = np.stack([resize.adm_center_crop(np.asarray(Image.open(file)), 4) for file in sorted(folder.rglob("*.png"))])
    np.savez(tmp_path / "cropped.npz", arr_0=cropped)
    config = evaluate.Config(folder, evaluate.Pixels(), tmp_path / "cropped.npz", size=4, folder=tmp_path / "run", neighbours=False)
    assert evaluated(config)["Frechet distance of pixels"] < 1e-6
    with pytest.raises(SystemExit, match=r"--reference: .*cropped.npz has images of another size than .*photos: give --size"):
        evaluate.main(dataclasses.replace(config, size=None))


def test_features_of_inception(tmp_path, monkeypatch):
    """With the statistics of a file, which has images of its own; the Inception score is of files in another order than their classes'."""
    monkeypatch.setattr(evaluate, "Inception", SmallInception)
    folder = photos(tmp_path / "photos", [(4, 4)] * 8, classes=("ant", "bee", "cat"))
    references = reference(tmp_path / "reference.npz")
    config = evaluate.Config(folder, SmallInception(side=4), tmp_path / "reference.npz", folder=tmp_path / "run")
    report, of_all = evaluated(config), expected(read(folder), references, 4)
    assert report.keys() == of_all.keys()
    assert report == pytest.approx(of_all | {name: report[name] for name in of_all if name.startswith("Inception")}, rel=1e-4)
    np.savez(tmp_path / "photos.npz", arr_0=read(folder))
    assert evaluated(dataclasses.replace(config, images=tmp_path / "photos.npz")) == pytest.approx(of_all, rel=1e-4)
    assert evaluated(dataclasses.replace(config, reference=None)).keys() == {
        "images",
        "Inception score",
        "Inception score, standard deviation",
    }
    with np.load(tmp_path / "reference.npz") as arrays:
        np.savez(tmp_path / "both.npz", arr_0=read(folder), **arrays)
    both = evaluated(dataclasses.replace(config, reference=tmp_path / "both.npz"))
    assert both == pytest.approx(
        report | {name: both[name] for name in ("reference images", "KID", "KID, standard deviation", "precision", "recall")}
    )
    assert (both["precision"], both["reference images"]) == (1.0, 24)
    # Classes one after another: every part of the files in their order is of one class, or two.
    classes = np.repeat(np.eye(20), 10, axis=0) * 20
    assert evaluate.inception_score(classes)["Inception score"] < 2.1
    assert evaluate.inception_score(classes, shuffled=True)["Inception score"] > 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "none"}, "The images: .*none is neither a folder of images nor an .npz"),
        ({"images": "none.npz"}, "The images: .*No such file"),
        ({"images": "empty"}, "The images: .*empty is no folder with images"),
        ({"images": "other.npz"}, "The images: arr_0 of .*other.npz is .* of float64, but images are"),
        ({"reference": "none.npz"}, "--reference: .*No such file"),
        ({"reference": "wrong.npz"}, "--reference: .*wrong.npz has mu, but not sigma"),
        ({"reference": "reference.npz"}, "--reference: .*reference.npz has statistics of 4 features, but the images have 48"),
        ({"reference": "spatial.npz"}, "--reference: .*spatial.npz has statistics of spatial alone, but those of features are compared"),
        ({"reference": "large.npz"}, "--reference: large.npz has images of another size than photos: give --size"),
        ({"reference": "cut.npz"}, "--reference: cut.npz is no .npz file, or a damaged one .*: write it by numpy.savez, or fetch"),
        ({"images": "cut.npz"}, "The images: cut.npz is no .npz file, or a damaged one"),
        ({"images": "some.npz"}, "The images: some.npz is no .npz file, or a damaged one"),
        ({"images": "no_images.npz"}, "The images: no_images.npz has no images"),
        ({"images": "three.npz"}, "There are 3 images on one side, but .* 3 nearest others: give more, or --no-neighbours"),
        ({"save": Path("photos.npz/")}, "--save is photos.npz: give the name of an .npz file"),
        ({"save": Path("photos2.npz"), "images": "photos2.npz"}, "--save is photos2.npz, which is read: give another name"),
        ({"channels": 2}, "--channels is 2: give 3 for RGB, or 1 for grey"),
        ({"results": Path("photos")}, "--results is photos, a folder"),
        ({"images": "one.npz", "neighbours": False}, "There is one image on one side, but a covariance is of two at least"),
        ({"save": Path("mean")}, "--save is mean: give the name of an .npz file, which --reference reads"),
        ({"save": Path("other.npz/mean.npz")}, "--save: .*exists"),
        ({"reference": None}, "Without --reference there is only the Inception score: give --reference"),
        ({"batch": 0}, "--batch is 0: give at least 1"),
        ({"count": 0}, "--count is 0: give at least 1"),
        ({"features": evaluate.Inception(Path("none.pth"))}, "The weights of Inception: .*No such file"),
        ({"features": evaluate.Dino(Path("none.pth"))}, "The weights of DINOv2: .*No such file"),
        ({"features": evaluate.Dino(Path("small.safetensors"))}, "The weights of DINOv2: small.safetensors is of no published size"),
    ],
)
def test_what_cannot_be_compared_is_explained(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", [(4, 4)] * 2)
    reference(tmp_path / "reference.npz")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((3, 4, 4, 3)))
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3))
    np.savez(tmp_path / "spatial.npz", mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 5, 4, 3), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "photos2.npz", arr_0=np.zeros((4, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "three.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "no_images.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "three.npz").read_bytes()[:-40])
    (tmp_path / "some.npz").write_bytes(b"")
    (tmp_path / "photos.npz").mkdir()
    pretrained.write(tmp_path / "small.safetensors", {"cls_token": np.zeros((1, 1, 48), np.float32)})
    given = {"images": "photos", "reference": "photos", "features": evaluate.Pixels(), "folder": tmp_path / "run"} | changes
    given |= {name: Path(given[name]) for name in ("images", "reference") if given[name] is not None}
    with pytest.raises(SystemExit, match=said):
        evaluate.main(evaluate.Config(**given))


def encoding(tmp_path, weights, **changes):
    small = {"size": 8, "batch": 8, "shard": 4, "threads": 2, "flip": True}
    return encode.Config(tmp_path / "photos", weights / "autoencoder_older.safetensors", tmp_path / "latents", **small | changes)


def test_latents_of_images(tmp_path, weights):
    """Each a draw of its own, followed by that of its mirror image, in files that are not written again."""
    folder = photos(tmp_path / "photos", [(8, 8), (13, 9), (20, 31)])
    config = encoding(tmp_path, weights)
    encode.main(config)
    files = sorted(config.folder.glob("*.array_record"))
    assert [file.name for file in files] == ["train-00000.array_record", "train-00001.array_record"]
    source = latents.read(files)
    found, labels = (np.stack(part) for part in zip(*(source[i] for i in range(len(source))), strict=True))
    assert labels.tolist() == [0] * 6 + [1] * 6
    assert found.shape == (12, 4, 4, 4)
    model, params = encode.load(config.autoencoder)
    draw = jax.jit(lambda key, x: model.apply(params, key, x, method="latents")[0])
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        x = resize.adm_center_crop(np.asarray(Image.open(file)), 8)[None] / np.float32(127.5) - 1
        for mirrored, given in ((0, x), (1, x[:, :, ::-1])):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), mirrored), i)
            np.testing.assert_allclose(found[2 * i + mirrored], draw(key[None], given), atol=2e-3)
    ages = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    # Not on the batch.
    encode.main(dataclasses.replace(config, batch=16))
    assert files[0].stat().st_mtime_ns == ages[0]
    again = latents.read(files)
    np.testing.assert_allclose(np.stack([again[i][0] for i in range(12)]), found, atol=2e-3)
    with pytest.raises(SystemExit, match=r"latents has \*\.array_record of another configuration: shard was 4 and is 6"):
        encode.main(dataclasses.replace(config, shard=6))
    (folder / "ant" / "0.png").rename(folder / "ant" / "3.png")
    with pytest.raises(SystemExit, match=r"images was 6 by the names .* and is 6 by the names"):
        encode.main(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": Path("nowhere")}, "The images: nowhere is not a folder"),
        ({"autoencoder": Path("none.pt")}, "--autoencoder: .*No such file"),
        ({"size": 9}, "--size is 9: give a multiple of 2"),
        ({"batch": 12}, "--batch is 12, which does not divide among 8 devices"),
        ({"shard": 0}, "--shard is 0: give at least 1"),
        ({}, r"The images: .*0\.png cannot be decoded"),
    ],
)
def test_what_cannot_be_encoded_is_explained(tmp_path, weights, changes, said):
    (photos(tmp_path / "photos", [(8, 8)] * 2, ["ant"]) / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=said):
        encode.main(dataclasses.replace(encoding(tmp_path, weights), **changes))
    assert not [*(tmp_path / "latents").glob("*.array_record")]


def test_latents_are_trained_on_shown_and_exported(tmp_path, weights):
    """From photos to a network that experiments.imagenet draws."""
    photos(tmp_path / "photos", [(8, 8)] * 10)
    encode.main(encoding(tmp_path, weights, flip=False, shard=100))
    (_, preset) = images.PRESETS["latents"]
    config = dataclasses.replace(
        preset,
        folder=tmp_path / "run",
        data=str(tmp_path / "latents"),
        classes=2,
        autoencoder=weights / "autoencoder_older.safetensors",
        network=images.Transformer(2, 16, 1, 2, scan=True),
        sharding="fully_sharded",
        export=tmp_path / "export",
        save_images=1,
        held_out=0.2,
        eval_every=None,
        **{"dtype": "float32", "steps": 2, "batch": 8, "warm_up": 1, "log_every": 2, "save_every": 2},
        **{"sampling_steps": 2, "threads": 0},
    )
    images.main(config)
    assert read(tmp_path / "run" / "samples").shape == (2, 8, 8, 3)
    for name in ("samples.png", "trajectories.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    with np.load(tmp_path / "export" / "held_out.npz") as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((4, 8, 8, 3), np.uint8)
    exported = imagenet.Sit(tmp_path / "export" / "network.safetensors", num_heads=2, time_scale=1000.0).load()
    assert (exported.model, exported.size) == (dit.DiT(2, 16, 1, 2, num_classes=2), (4, 4, 4))
    with pytest.raises(SystemExit, match=r"--autoencoder: The file has .* tensors"):
        images.make_decoder(dataclasses.replace(config, autoencoder=weights / "sit.safetensors"), None)
    with pytest.raises(SystemExit, match="The data have 1 channels, but --autoencoder makes pictures of latents, which have 4: leave it"):
        images.main(dataclasses.replace(config, data="digits", network=images.Transformer(4, 16, 1, 2)))


COMMANDS = {
    imagenet: [
        "--autoencoder sd.pt --count 50000 network:sit --network.weights SiT.pt",
        "--guidance 1.5 --guided-channels 3 network:dit --network.weights DiT.pt sampler:ddpm --sampler.steps 250",
        "--guidance 2.9 --interval 0.1 1 network:jit --network.weights jit.pth sampler:heun",
        "network:adm --network.weights 64.pt --network.size 64 sampler:dpm-solver",
    ],
    evaluate: [
        "samples --reference V.npz features:inception --features.weights pt.pth",
        "samples.npz --reference photos --size 256 features:dino --features.weights dinov2.pth",
        "samples --reference held_out.npz --channels 1 features:pixels",
    ],
    encode: ["photos --autoencoder sd.pt --flip"],
}


@pytest.mark.parametrize(("module", "command"), [(module, command) for module, commands in COMMANDS.items() for command in commands])
def test_commands_are_understood(module, command, capsys):
    assert isinstance(tyro.cli(module.Config, args=command.split()), module.Config)
    with pytest.raises(SystemExit):
        tyro.cli(module.Config, args=[*command.split(), "--no-such-flag", "1"])
    assert "no-such-flag" in capsys.readouterr().err


if __name__ == "__main__":
    main(*sys.argv[1:])
