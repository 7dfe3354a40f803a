"""The experiments run, at a size of seconds: their files, their numbers against theory, their errors."""

import dataclasses
import functools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from PIL import Image

from experiments import conditions, dynamics, gallery, images, predictions, run_folder, series, sf2m_table, snapshots, toy
from fmjax import files, paths, pretrained, training
from fmjax.data import latents
from fmjax.models import unet

SMALL = {"hidden_size": 16, "depth": 2, "steps": 10, "batch": 64, "evaluations": 10, "samples": 200}


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
def coarse_plots(monkeypatch):
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
    assert (tmp_path / "history.jsonl").read_text()
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


@pytest.mark.parametrize(
    "parse",
    [
        *(
            functools.partial(tyro.cli, experiment.Config)
            for experiment in (conditions, dynamics, gallery, predictions, series, sf2m_table, snapshots, toy)
        ),
        lambda args: images.parse(["digits", *args]),
    ],
    ids=["conditions", "dynamics", "gallery", "predictions", "series", "sf2m_table", "snapshots", "toy", "images"],
)
def test_unknown_flags_are_refused(parse, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(args=["--no-such-flag", "1"])
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


def small_series(folder, **changes):
    """Windows of a series at a size of seconds."""
    small = {"network": series.UNet(8, (1,), groups=4), "steps": 4, "batch": 8, "log_every": 2, "save_every": 2, "sampling_steps": 2}
    return series.Config(folder=folder, **small | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": series.Sunspots(), "network": series.Transformer(8, 16, 1, 2), "path": paths.Cosine()}],
    ids=["temperatures by a U-Net", "sunspots by a transformer"],
)
def test_series(tmp_path, changes):
    small = small_series(tmp_path / "run", results=tmp_path / "results.json", **changes)
    series.main(small)
    report = read(tmp_path / "run", ["series.png", "statistics.png", "loss.png", "config.json"], ["checkpoints", "tensorboard"])
    assert all(value > 0 for name, value in report.items())
    pairs = ("samples to held-out", "training to held-out (the floor)", "samples to training")
    assert report.keys() > {f"mean difference of {what}, {pair}" for what in ("autocorrelation", "log spectrum") for pair in pairs}
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert history[-1]["held-out loss per value"] == report["held-out loss per value"]
    assert json.loads((tmp_path / "results.json").read_text())["run"].items() >= report.items()


def test_statistics_of_a_series():
    """Of sine waves of any phase: the autocorrelation is a cosine, and the power is where it should be."""
    t, phase = np.arange(48), np.linspace(0, 2 * np.pi, 100, endpoint=False)[:, None]
    x = 20 + np.sin(2 * np.pi * t / 12 + phase)
    np.testing.assert_allclose(series.autocorrelation(x, 24), np.cos(2 * np.pi * np.arange(1, 25) / 12), atol=1e-12)
    frequencies, power = series.spectrum(x, 12)
    assert frequencies[power.argmax()] == pytest.approx(1)
    # The integral of the power density is the variance.
    assert power.sum() * frequencies[0] == pytest.approx(0.5, rel=1e-6)
    assert series.mean_difference(lambda x: series.autocorrelation(x, 24), x, 3 * x - 5) < 1e-12


def test_held_out_windows_of_a_series_share_no_value_with_training():
    train, held_out = (series.windows(part, 8) for part in series.split(np.arange(100), 0.2))
    assert (train.min(), train.max(), len(train)) == (0, 79, 73)
    assert (held_out.min(), held_out.max(), len(held_out)) == (80, 99, 13)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "--batch is 0: give at least 1"),
        ({"held_out": 1.0}, "--held-out is 1.0: give a share of the series"),
        ({"held_out": 0.05}, "the held-out part has 37 values: give a shorter window"),
        ({"held_out": 0.95}, "the training part has 37 values: give a shorter window"),
        ({"data": series.ElNino(48, 48)}, "--data.max-lag is 48: give at least 1, and less than --data.window, 48"),
        (
            {"data": series.Sunspots(30), "network": series.UNet()},
            "is 30, which the reduction by --network.channel-mult of 4 does not divide",
        ),
        ({"network": series.Transformer(5)}, "--data.window is 48, which --network.patch-size of 5 does not divide"),
    ],
    ids=str,
)
def test_wrong_flags_of_a_series_are_named(tmp_path, changes, said):
    with pytest.raises(SystemExit, match=said):
        series.main(small_series(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_series_without_statsmodels_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(ImportError, match=r"statsmodels: pip install 'fmjax\[series\]'"):
        series.main(small_series(tmp_path / "run"))


PLOTS = ["samples.png", "trajectories.png", "loss.png", "history.jsonl", "config.json"]


def config(name, folder, *, network=(), **changes):
    """A preset at a size of seconds."""
    (_, preset) = images.PRESETS[name]
    small = {"steps": 4, "batch": 16, "warm_up": 1, "log_every": 2, "save_every": 2, "sampling_steps": 2, "guidance": (2.0,), "samples": 12}
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2} if isinstance(preset.network, images.Transformer) else {}
    network = dataclasses.replace(preset.network, **sizes | dict(network))
    return dataclasses.replace(preset, folder=folder, network=network, **small | changes)


def images_in(folder, size, classes=("ant", "bee"), count=12):
    """A folder of PNG files in colour by class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_every_preset_has_a_sentence(capsys):
    with pytest.raises(SystemExit):
        images.parse(["--help"])
    printed = capsys.readouterr().out
    for name, (sentence, preset) in images.PRESETS.items():
        assert f"• {name}" in printed
        assert sentence.endswith(".")
        assert preset.folder == Path("runs") / name
    assert {preset.folder for _, preset in images.PRESETS.values()} == {Path("runs") / name for name in images.PRESETS}


def test_every_flag_has_a_sentence(capsys):
    with pytest.raises(SystemExit):
        images.parse(["digits", "--help"])
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(images.Config):
        if field.name not in ("network", "path", "classifier"):
            assert re.search(rf"--{field.name.replace('_', '-')}\b.*? [A-Z]\w* .*?\. \(default: ", printed), field.name


def test_flags_reach_an_experiment_of_images():
    args = ["digits", "--network.depth", "2", "--guidance", "2", "path:polynomial", "--path.power", "3"]
    (_, digits) = images.PRESETS["digits"]
    network = dataclasses.replace(digits.network, depth=2)
    assert images.parse(args) == dataclasses.replace(digits, network=network, guidance=(2.0,), path=paths.Polynomial(3.0))


def test_digits_sample_again_from_their_checkpoint(tmp_path):
    small = config("digits", tmp_path, save_images=2)
    images.main(small)
    trained = read(tmp_path, PLOTS, ["checkpoints", "tensorboard", "samples"])
    (tmp_path / "samples.png").unlink()
    images.main(dataclasses.replace(small, train=False, save_images=1, export=tmp_path / "export"))
    assert {path.name for path in (tmp_path / "samples").rglob("*.png")} == {"0000.png"}
    network = pretrained.sit(pretrained.read(tmp_path / "export" / "network.safetensors"), num_heads=2, time_scale=1000.0)
    assert (network.size, network.model.num_classes, network.model.depth) == ((8, 8, 1), 10, 1)
    with np.load(tmp_path / "export" / "held_out.npz") as arrays:
        held_out = np.stack([image for image, _ in images.open_data(small).held_out])
        np.testing.assert_allclose(arrays["arr_0"] / 127.5 - 1, held_out, atol=0.01)
    again = read(tmp_path, PLOTS, ["checkpoints"])
    measured = {name for name in again if "seconds" not in name}
    assert trained.keys() - again.keys() == {"training steps per second", "training loss per pixel, last tenth"}
    assert {name: again[name] for name in measured} == pytest.approx({name: trained[name] for name in measured}, rel=1e-5)
    with pytest.raises(ValueError, match=r"is of another model: .* is float32\[.*there and float32\["):
        images.main(config("digits", tmp_path, network={"hidden_size": 32}, train=False))


def test_digits_go_on_bit_for_bit(tmp_path, monkeypatch):
    """SIGTERM between two logs and two checkpoints ends them with the status that says so; the same command goes on."""
    small = config("digits", tmp_path / "run")
    images.main(dataclasses.replace(small, folder=tmp_path / "whole"))
    make_batches = images.make_batches

    def make_batches_and_end(*arguments):
        batches = make_batches(*arguments)

        def batch(n):
            if n == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return batches(n)

        return batch

    with monkeypatch.context() as patched:
        patched.setattr(images, "make_batches", make_batches_and_end)
        with pytest.raises(SystemExit) as exit:
            images.main(small)
    assert exit.value.code == training.PREEMPTED
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    images.main(small)
    for name in ("history.jsonl", "samples.png", "trajectories.png", "loss.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_gallery_draws_a_run(tmp_path, monkeypatch, capsys):
    images.main(config("digits", tmp_path))
    few = {"FLOWS": ["unipc 2"], "NOISY": ["euler_maruyama", "churn"], "GUIDANCE": ["apg", "interval", "compose"]}
    for table, names in few.items():
        monkeypatch.setattr(gallery, table, {name: getattr(gallery, table)[name] for name in names})
    gallery.main(gallery.Config(run=tmp_path, folder=tmp_path / "gallery", columns=2, scales=(2.0,)))
    assert {file.name for file in (tmp_path / "gallery").iterdir()} == {"solvers.png", "guidance.png", "config.json", "metrics.json"}
    assert re.search(r"unipc 2 +\d\.\d{3}\n", capsys.readouterr().out)


def test_digits_without_a_checkpoint_say_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no checkpoint at .*train it first, in the same --folder"):
        images.main(config("digits", tmp_path, train=False))


def test_a_gallery_without_a_run_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no run in .*: train one by `make demo`"):
        gallery.main(gallery.Config(run=tmp_path / "none", folder=tmp_path / "gallery"))


def test_labels_are_dropped_in_training(tmp_path, monkeypatch):
    """At the rate of --label-drop, for the null row; labels outside the table, which is what they become here, are refused."""
    drops = []

    def drop_labels(key, y, null, rate):
        drops.append((null, rate))
        return jax.numpy.full_like(y, null + 1)

    monkeypatch.setattr(images.guidance, "drop_labels", drop_labels)
    with pytest.raises(training.NonFiniteLoss):
        images.main(config("digits", tmp_path, label_drop=0.25))
    assert set(drops) == {(10, 0.25)}


def test_a_damaged_checkpoint_is_not_sampled(tmp_path):
    """And training goes on from the one before it."""
    small = config("digits", tmp_path)
    images.main(small)
    history = (tmp_path / "history.jsonl").read_bytes()
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(SystemExit, match=r"4 is damaged: .* is of another content"):
        images.main(dataclasses.replace(small, train=False))
    with pytest.warns(UserWarning, match=r"4 is damaged: .*The one before it is used"):
        images.main(small)
    assert (tmp_path / "history.jsonl").read_bytes() == history


@pytest.fixture
def few_images(monkeypatch):
    """Noise in the form of Fashion-MNIST: 260 images to train on, 40 held out."""
    rng = np.random.default_rng(0)

    def part(count):
        return rng.uniform(-1, 1, (count, 28, 28, 1)).astype(np.float32), np.arange(count, dtype=np.int32) % 10

    parts = part(260), part(40)
    monkeypatch.setattr(images.fashion_mnist, "load", lambda folder: parts)


def test_fashion_mnist(tmp_path, few_images):
    small = {"results": tmp_path / "results.json", "classifier": images.Convolutional(0), "save_images": 1}
    (tmp_path / "results.json").write_text('{"another": {"loss": 1.0}}')
    images.main(config("fashion-lab-dit", tmp_path / "run", network={"patch_size": 14}, **small))
    report = read(tmp_path / "run", PLOTS, ["checkpoints", "samples/Ankle boot", "samples/T-shirt-top"])
    assert report["training steps per second"] > 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"another", "run"}
    assert results["run"].items() >= report.items()
    assert results["run"].keys() >= {"device", "commit", "versions", "settings"}
    assert results["run"]["settings"]["network"]["patch_size"] == 14


def test_fashion_mnist_of_the_course():
    (_, lab_dit), (_, lab_unet), (_, small) = (images.PRESETS[f"fashion-{name}"] for name in ("lab-dit", "lab-unet", "dit"))
    assert lab_dit.network == images.Transformer(patch_size=4, hidden_size=256, depth=8, num_heads=8)
    made, published = images.make_network(lab_unet, 10), unet.LabUNet(num_classes=10)
    assert all(getattr(made, name) == getattr(published, name) for name in unet.UNet.__dataclass_fields__ if name not in ("parent", "name"))
    args = [
        "fashion-lab-unet",
        "--steps",
        "7",
        "--samples",
        "5",
        "--folder",
        "F",
        "--results",
        "R",
        "--data-dir",
        str(Path(__file__).parent),
    ]
    chosen = images.parse(args)
    changes = {"steps": 7, "samples": 5, "folder": Path("F"), "results": Path("R"), "data_dir": Path(__file__).parent}
    assert chosen == dataclasses.replace(lab_unet, **changes)
    with pytest.raises(SystemExit, match=r"--warm-up is 150 steps of 20 in all"):
        images.main(dataclasses.replace(small, steps=20))
    with pytest.raises(FileNotFoundError, match="has neither train-images-idx3-ubyte"):
        images.main(chosen)


@pytest.mark.parametrize("sharding", ["replicated", "fully_sharded"])
def test_a_folder_of_colour_images(tmp_path, sharding):
    """Of 64 x 64 pixels, on eight devices; saved samples can be trained on again."""
    photos = images_in(tmp_path / "photos", 64)
    small = config(
        *("folder", tmp_path / "run"),
        **dict(data=str(photos), threads=0, batch=8, network={"patch_size": 16}, dtype="float32", held_out=0.25, eval_every=2),
        **dict(sharding=sharding, samples=4, save_images=2, classifier=images.Convolutional(1)),
    )
    images.main(small)
    report = read(tmp_path / "run", [*PLOTS, "samples_2.png", "samples_4.png"], ["checkpoints"])
    assert 0 <= report["label accuracy at guidance 2"] <= 1
    data = images.open_data(dataclasses.replace(small, data=str(tmp_path / "run" / "samples")))
    assert (data.names, data.shape, len(data.train) + len(data.held_out)) == (("ant", "bee"), (64, 64, 3), 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "--batch is 0: give at least 1"),
        ({"batch": 1000}, "--batch is 1000, but there are 18 images to train on"),
        ({"held_out": 1.5}, "--held-out is 1.5: give a share"),
        ({"network": images.Transformer(5)}, "64 x 64 pixels, which --network.patch-size of 5 does not divide"),
        ({"network": images.UNet(channel_mult=(1,) * 8)}, "which the reduction by --network.channel-mult of 128 does not divide"),
        ({"data": "empty"}, "--data is empty: .* Each class has a sub-folder of images"),
    ],
    ids=str,
)
def test_wrong_flags_of_a_folder_are_named(tmp_path, monkeypatch, changes, said):
    """And the folder of the run is free for another try."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    small = config("folder", tmp_path / "run", data=str(images_in(tmp_path / "photos", 16)), threads=0, held_out=0.25)
    small = dataclasses.replace(small, **changes)
    with pytest.raises(SystemExit, match=said):
        images.main(small)
    with run_folder.claim(dataclasses.replace(small, batch=4)):
        pass
    with run_folder.claim(dataclasses.replace(small, batch=5)):
        pass


def test_latents_go_on_where_they_ended(tmp_path, capsys):
    """And without a terminal they print their flags and their logs."""
    small = config("synthetic", tmp_path / "run", sharding="pmap", network={"patch_size": 4}, batch=8, eval_every=4)
    images.main(dataclasses.replace(small, steps=2))
    printed = capsys.readouterr().out
    assert re.search(r"^batch +8\n", printed, re.MULTILINE)
    assert re.search(r"^step 2  loss \d", printed, re.MULTILINE)
    images.main(small)
    read(tmp_path / "run", [*PLOTS, "samples_4.png"], ["tensorboard"])
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [metrics["step"] for metrics in history] == [2, 4]
    assert ["held-out loss per pixel" in metrics for metrics in history] == [False, True]
    assert 0 < history[1]["held-out loss per pixel"] < 10
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    # In one part it is the same, to the plots.
    images.main(dataclasses.replace(small, folder=tmp_path / "whole"))
    for name in ("history.jsonl", "samples.png", "samples_4.png", "loss.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(SystemExit, match=r"run has a run of another configuration: --batch was 8 and is 16; --seed was 0 and is 1\. Give"):
        images.main(dataclasses.replace(small, batch=16, seed=1))
    with files.Lock(tmp_path / "run"), pytest.raises(SystemExit, match=r"run is written to by process .*, which is this one"):
        images.main(small)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config\.json cannot be read .*: remove it, or give another --folder"):
        images.main(small)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"2", "4"}


def test_data_from_files_and_folders(tmp_path):
    latents.write(tmp_path / "0.array_record", np.zeros((20, 8, 8, 4), np.float16), range(20))
    small = config("latents", tmp_path / "run", data=str(tmp_path), classes=20)
    data = images.open_data(small)
    assert (len(data.train), len(data.held_out), data.shape, len(data.names)) == (19, 1, (8, 8, 4), 20)
    with pytest.raises(SystemExit, match=r"There is no folder nowhere: give --data a folder"):
        images.main(dataclasses.replace(small, data="nowhere"))
    with pytest.raises(SystemExit, match=r"The data have 4 channels, so they are no images to save or to classify"):
        images.main(dataclasses.replace(small, save_images=1))
    with pytest.raises(SystemExit, match=r"--save-every is 15: give a multiple of --log-every, 10"):
        images.main(dataclasses.replace(small, log_every=10, save_every=15))
    for changes in ({"path": paths.Cosine()}, {"network": images.UNet()}):
        with pytest.raises(SystemExit, match="--export writes a transformer that follows the linear path"):
            images.main(dataclasses.replace(small, export=tmp_path / "export", **changes))
    with pytest.raises(SystemExit, match=r"--eval-every is 15: give a multiple of --log-every, 10"):
        images.main(dataclasses.replace(small, log_every=10, save_every=20, eval_every=15))
    assert not (tmp_path / "run").exists()


def test_conditions_against_the_exact_distribution(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "KINDS", {"label and vector": conditions.KINDS["label and vector"]})
    small = conditions.Config(tmp_path, steps=4, batch=16, samples=8, guidance=(2.0,), results=tmp_path / "results.json")
    conditions.main(small)
    report = read(tmp_path, ["guidance.png", "config.json"])
    whats = ("mean, largest error", "mean, largest error in standard errors", "deviation, largest error in standard errors")
    assert set(report) == {f"label and vector at guidance 2: {what}" for what in whats}
    assert json.loads((tmp_path / "results.json").read_text())[tmp_path.name].items() >= report.items()


@pytest.mark.parametrize("kind", conditions.KINDS)
def test_conditions_draw_what_they_say(kind):
    """The data without a condition have the mean and the covariance that the exact field is of."""
    kind = conditions.KINDS[kind]
    mean = np.asarray(kind.mean(kind.draw(jax.random.key(0), 4000))).reshape(4000, -1)
    weights, means = (np.asarray(part, np.float64) for part in (kind.whole.weights, kind.whole.means))
    weights, means = weights / weights.sum(), means.reshape(len(means), -1)
    within = float(kind.whole.scales) ** 2 - conditions.SCALE**2
    expected = (
        within * np.eye(means.shape[1]) + np.einsum("k,ki,kj->ij", weights, means, means) - np.outer(weights @ means, weights @ means)
    )
    np.testing.assert_allclose(mean.mean(0), weights @ means, atol=0.12)
    np.testing.assert_allclose(np.cov(mean.T), expected, atol=0.2)


def test_predictions_side_by_side(tmp_path, monkeypatch):
    of_all = predictions.predictions
    monkeypatch.setattr(predictions, "predictions", lambda sigma: {"EDM": of_all(sigma)["EDM"]})
    predictions.main(predictions.Config(tmp_path, sets=("pinwheel",), steps=20, samples=50, evaluations=3))
    report = read(tmp_path, ["samples.png", "config.json"])
    assert set(report) == {"pinwheel, EDM: distance over that of data to data"}
    data = predictions.handwritten(predictions.Config(tmp_path, samples=50))
    x_1, y = data.draw(jax.random.key(0), 4)
    assert (x_1.shape, y[0].shape, len(data.labels[0])) == ((4, 8, 8, 1), (4,), 50)
    assert data.distance(np.asarray(data.draw(jax.random.key(0), 50)[0])) < 3


def test_the_table_of_sf2m_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    for name, value in {"POINTS": 200, "BATCH": 32, "BATCHES": 3, "STEPS": 4}.items():
        monkeypatch.setattr(sf2m_table, name, value)
    config = sf2m_table.Config(tmp_path / "run", tasks=("n_to_moons",), seeds=2, epochs=60)
    sf2m_table.main(config)
    kept = json.loads((tmp_path / "run" / "done.json").read_text())
    assert set(kept) == {f"n_to_moons, {name}" for name in ("data", "OT-CFM", "SF2M-Exact", "I-CFM", "FM")}
    assert all(len(kept[name]["W2"]) == 2 for name in kept if name != "n_to_moons, data")
    # Of even moons two sets differ by their noise alone.
    assert np.mean(kept["n_to_moons, data"]["data to data"]) < 0.15
    # Straighter ways are learnt sooner than those of chance pairs.
    assert np.mean(kept["n_to_moons, OT-CFM"]["W2"]) < np.mean(kept["n_to_moons, I-CFM"]["W2"])
    train = sf2m_table.train
    monkeypatch.setattr(sf2m_table, "train", lambda task, *rest: pytest.fail("again") if task == "n_to_moons" else train(task, *rest))
    report = tmp_path / "report.json"
    sf2m_table.main(dataclasses.replace(config, tasks=("n_to_moons", "moons_to_8gaussians"), results=report))
    said = capsys.readouterr().out
    assert "moons_to_8gaussians, SF2M-Exact" in said
    assert "moons_to_8gaussians, FM" not in said
    assert "n_to_moons, OT-CFM: published W2, mean" in report.read_text()


def test_ways_through_snapshots(tmp_path):
    snapshots.main(snapshots.Config(tmp_path, steps=150, count=200, batch=64))
    report = read(tmp_path, ["trajectories.png", "config.json"])
    assert len(report) == 14
    left_out = "optimal: W2 at time 0.5, left out"
    assert report["other individuals: W2 at time 0.5"] < report[left_out] < 1.5
    assert report["optimal: energy of the way"] > 0


def test_another_process_of_any_experiment_is_named(tmp_path):
    with files.Lock(tmp_path), pytest.raises(SystemExit, match=r"is written to by process .*, which is this one"):
        dynamics.main(dynamics.Config(folder=tmp_path))


def test_a_copy_without_its_history_says_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert run_folder.commit() is None
    monkeypatch.setenv("COMMIT", "abc1234")
    assert run_folder.commit() == "abc1234"
