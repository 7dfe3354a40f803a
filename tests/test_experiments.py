"""The experiments run, at a size of seconds: their files, their numbers against theory, their errors."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from experiments import digits, dynamics, fashion_mnist, gallery, latents, toy
from fmjax import files, paths
from fmjax.models import unet

pytestmark = pytest.mark.usefixtures("unoptimized")
SMALL = {"width": 16, "depth": 2, "steps": 10, "batch": 64, "evaluations": 10, "samples": 200}


def run_toy(folder, **changes):
    """The metrics of a small run, after a look at its files."""
    toy.main(toy.Config(folder=folder, **SMALL | changes))
    return read(folder, ["loss.png", "density.png", "trajectories.png", "field.png", "config.json"], ["checkpoints"])


def read(folder, files, folders=()):
    for name in files:
        assert (folder / name).stat().st_size > 0, name
    for name in folders:
        assert (folder / name).is_dir(), name
    json.loads((folder / "config.json").read_text())
    report = json.loads((folder / "metrics.json").read_text())
    assert report
    assert all(math.isfinite(value) for value in report.values()), report
    return report


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    monkeypatch.setattr(toy, "EXACT", 2000)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "score", "sigma": 1.0},
        {"target": "noise", "path": paths.VariancePreserving(), "sigma": 0.5, "proportional": False, "end": 0.9},
        {"source": "circles", "data": "checkerboard", "start": 0.0, "end": 1.0},
    ],
    ids=["score by SDE", "noise by SDE of constant sigma", "bridge on the whole path"],
)
def test_toy_runs(tmp_path, changes):
    report = run_toy(tmp_path, **changes)
    assert report["sliced Wasserstein, data to data (the floor)"] < 0.5


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"source": "circles", "target": "score"}, "--target velocity"),
        ({"source": "circles", "target": "noise"}, "--target velocity"),
        ({"source": "circles", "target": "data"}, "--target velocity"),
        ({"source": "circles", "sigma": 1.0}, "--sigma 0"),
        ({"sigma": -1.0}, "at least 0"),
        ({"target": "noise", "start": 0.0}, "--start"),
        ({"target": "score", "end": 1.0}, "--end"),
        ({"target": "data", "end": 1.0}, "--end"),
        ({"path": paths.VariancePreserving(), "end": 1.0}, "--end"),
        ({"path": paths.SquareRoot(), "end": 1.0}, "--end"),
        ({"path": paths.Polynomial(0.5), "start": 0.0}, "--start"),
        ({"sigma": 1.0, "end": 1.0}, "--end"),
    ],
)
def test_toy_says_what_to_do_instead(tmp_path, changes, advice):
    with pytest.raises(SystemExit, match=advice):
        toy.main(toy.Config(folder=tmp_path / "run", **SMALL | changes))
    assert not (tmp_path / "run").exists()


def test_dynamics(tmp_path):
    dynamics.main(dynamics.Config(folder=tmp_path, samples=500, ou_steps=500, langevin_steps=100, langevin_longer=2))
    report = read(tmp_path, ["brownian.png", "ornstein_uhlenbeck.png", "langevin.png", "config.json"])
    names = [name.removesuffix(": variance") for name in report if name.endswith(": variance")]
    assert len(names) == 5
    for name in names:
        assert abs(report[f"{name}: variance"] - report[f"{name}: in theory"]) < 4 * report[f"{name}: standard error"], name


@pytest.mark.parametrize("experiment", [digits, dynamics, fashion_mnist, gallery, toy])
def test_unknown_flags_are_refused(experiment, capsys):
    with pytest.raises(SystemExit) as exit:
        tyro.cli(experiment.Config, args=["--no-such-flag", "1"])
    assert exit.value.code
    assert "no-such-flag" in capsys.readouterr().err


def test_unknown_data_are_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        tyro.cli(toy.Config, args=["--data", "elephant"])
    assert exit.value.code
    assert "elephant" in capsys.readouterr().err


def test_flags_reach_the_configuration():
    config = tyro.cli(toy.Config, args=["--data", "spirals", "--sigma", "1", "path:polynomial", "--path.power", "3"])
    assert config == toy.Config(data="spirals", sigma=1.0, path=paths.Polynomial(3.0))


def test_digits_samples_again_from_its_checkpoint(tmp_path):
    small = {
        "folder": tmp_path,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "steps": 3,
        "batch": 16,
        "samples": 12,
        "sampling_steps": 2,
        "guidance": (2.0,),
    }
    files = ["samples.png", "trajectories.png", "loss.png", "config.json"]
    digits.main(digits.Config(**small))
    trained = read(tmp_path, files, ["checkpoints"])
    (tmp_path / "samples.png").unlink()
    digits.main(digits.Config(**small, train=False))
    again = read(tmp_path, files, ["checkpoints"])
    assert {name: value for name, value in again.items() if "seconds" not in name} == pytest.approx(
        {name: value for name, value in trained.items() if "seconds" not in name}, rel=1e-5
    )
    with pytest.raises(ValueError, match=r"is of another model: .* is float32\[.*there and float32\["):
        digits.main(digits.Config(**small | {"width": 32}, train=False))


def test_the_gallery_draws_a_run(tmp_path, monkeypatch, capsys):
    small = {"width": 16, "depth": 1, "heads": 2, "steps": 2, "batch": 16, "samples": 11, "sampling_steps": 2}
    digits.main(digits.Config(folder=tmp_path, guidance=(2.0,), **small))
    few = {"FLOWS": ["unipc 2"], "NOISY": ["euler_maruyama", "churn"], "GUIDANCE": ["projected", "interval", "weighted"]}
    for table, names in few.items():
        monkeypatch.setattr(gallery, table, {name: getattr(gallery, table)[name] for name in names})
    gallery.main(gallery.Config(run=tmp_path, folder=tmp_path / "gallery", columns=2, scales=(2.0,)))
    assert {file.name for file in (tmp_path / "gallery").iterdir()} == {"solvers.png", "guidance.png"}
    assert re.search(r"unipc 2 \d\.\d{3}\n", capsys.readouterr().out)


def test_digits_without_a_checkpoint_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*train first"):
        digits.main(digits.Config(folder=tmp_path, train=False))


@pytest.fixture
def few_clothes(monkeypatch):
    """Noise in the form of Fashion-MNIST: 260 images to train on, 40 held out."""
    rng = np.random.default_rng(0)

    def part(count):
        return rng.uniform(-1, 1, (count, 28, 28, 1)).astype(np.float32), np.arange(count, dtype=np.int32) % 10

    parts = part(260), part(40)
    monkeypatch.setattr(fashion_mnist.fashion_mnist, "load", lambda folder: parts)


def test_fashion_mnist(tmp_path, few_clothes):
    network = fashion_mnist.Transformer(patch=14, width=16, depth=1, heads=2)
    small = dict(network=network, steps=3, batch=16, warm_up=1, guidance=(2.0,), samples=2, sampling_steps=2, judge_epochs=0)
    config = fashion_mnist.Config(tmp_path / "run", results=tmp_path / "results.json", **small)
    (tmp_path / "results.json").write_text('{"another": {"loss": 1.0}}')
    fashion_mnist.main(config)
    files = ["samples.png", "trajectories.png", "loss.png", "config.json"]
    report = read(tmp_path / "run", files, ["checkpoints"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"another", "run"}
    assert results["run"].items() >= report.items()


def test_fashion_mnist_of_the_course():
    configs = {name: config for name, (_, config) in fashion_mnist.CONFIGS.items()}
    assert configs["lab-dit"].network == fashion_mnist.Transformer(patch=4, width=256, depth=8, heads=8)
    assert fashion_mnist.make_network(configs["lab-unet"].network).clone(num_classes=None) == unet.LabUNet()
    chosen = tyro.extras.overridable_config_cli(fashion_mnist.CONFIGS, args=["lab-unet", "--steps", "7"])
    assert chosen == dataclasses.replace(configs["lab-unet"], steps=7)
    with pytest.raises(SystemExit, match=r"--warm-up is 150 steps of 20 in all"):
        fashion_mnist.main(dataclasses.replace(configs["dit"], steps=20))
    with pytest.raises(FileNotFoundError, match="has neither train-images-idx3-ubyte"):
        fashion_mnist.main(dataclasses.replace(chosen, data_dir=Path(__file__).parent))


def test_latents_go_on_where_they_ended(tmp_path):
    (_, small) = latents.CONFIGS["small"]
    config = dataclasses.replace(
        small,
        folder=tmp_path / "run",
        way="pmap",
        patch=4,
        depth=1,
        batch=8,
        steps=4,
        every=2,
        save_every=2,
        look_every=4,
        sampling_steps=1,
    )
    latents.main(dataclasses.replace(config, steps=2))
    latents.main(config)
    for name in ("samples.png", "samples_4.png", "loss.png", "config.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert ["held-out loss" in row for row in rows] == [False, True]
    assert 0 < rows[1]["held-out loss"] < 10
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    # In one part it is the same, to the pictures.
    latents.main(dataclasses.replace(config, folder=tmp_path / "whole"))
    for name in ("rows.jsonl", "samples.png", "samples_4.png", "loss.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(SystemExit, match=r"run has a run of another configuration: --batch was 8 and is 16; --seed was 0 and is 1\. Give"):
        latents.main(dataclasses.replace(config, batch=16, seed=1))
    with files.Lock(tmp_path / "run"), pytest.raises(SystemExit, match=r"run is written to by process .*, which is this one"):
        latents.main(config)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config\.json cannot be read .*: remove it, or give another --folder"):
        latents.main(config)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"2", "4"}


def test_latents_from_files_and_folders(tmp_path):
    from fmjax.data import latents as written

    (_, small) = latents.CONFIGS["small"]
    written.write(tmp_path / "0.array_record", np.zeros((3, 8, 8, 4), np.float16), [0, 1, 2])
    source = latents.open_data(dataclasses.replace(small, data=str(tmp_path)))
    assert (len(source), source[1][0].shape, int(source[1][1])) == (3, (8, 8, 4), 1)
    with pytest.raises(SystemExit, match=r"--data is nowhere, which is no folder"):
        latents.open_data(dataclasses.replace(small, data="nowhere"))
    with pytest.raises(SystemExit, match=r"The data are of shape \(8, 8, 4\): give --size and --channels so"):
        latents.main(dataclasses.replace(small, folder=tmp_path / "run", data=str(tmp_path), channels=3))
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "a.png")
    photos = dataclasses.replace(small, folder=tmp_path / "run", data=str(tmp_path / "photos"))
    with pytest.raises(SystemExit, match=r"photos, a folder of images, but --channels is 4: give 3 for RGB or 1"):
        latents.main(photos)
    with pytest.raises(SystemExit, match=r"The data have 2 classes: give --classes 2, not 10"):
        latents.main(dataclasses.replace(photos, channels=3))
    with pytest.raises(SystemExit, match=r"--save-every is 15: give a multiple of --every, 10"):
        latents.main(dataclasses.replace(small, folder=tmp_path / "run", save_every=15))
    with pytest.raises(SystemExit, match=r"--look-every is 15: give a multiple of --every, 10"):
        latents.main(dataclasses.replace(small, folder=tmp_path / "run", look_every=15))
