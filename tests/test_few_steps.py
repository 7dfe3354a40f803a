"""Samples in few evaluations: every objective runs, goes on where it was, begins with a trained field, and stops where it diverges."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import few_steps
from fmjax import checkpoints, flow_maps, marginals, paths, training
from fmjax.data import latents
from fmjax.models import dit

TINY = {"patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "batch": 4, "warm_up": 1, "log_every": 2, "save_every": 2}
"""Networks for digits at a size of seconds."""


def points(folder, **changes):
    small = {"sets": ("moons",), "seeds": 2, "steps": 4, "batch": 8, "hidden_size": 8, "depth": 1, "samples": 20}
    return few_steps.Points(folder, **small | {"evaluations": (1, 2), "flow_evaluations": (4,)} | changes)


def images(folder, **changes):
    return few_steps.Images(folder, **TINY | {"steps": 2, "samples": 2, "evaluations": (1, 2), "flow_evaluations": (4,)} | changes)


def test_every_objective_on_points(tmp_path, monkeypatch):
    config = points(tmp_path / "run", results=tmp_path / "results.json")
    few_steps.main(config)
    report = json.loads((config.folder / "metrics.json").read_text())
    assert json.loads(config.results.read_text())["run"].items() >= report.items()
    assert (config.folder / "moons.png").stat().st_size > 1000
    for name in few_steps.OBJECTIVES:
        assert report[f"moons, {name} in {4 if name == 'flow' else 2} evaluations: W2, mean"] > 0
    assert [name for name in report if name.endswith("over that of the flow in 4")]
    monkeypatch.setattr(training, "make_step", lambda *args, **more: pytest.fail("trained again"))
    few_steps.main(config)
    assert json.loads((config.folder / "metrics.json").read_text()) == report
    with pytest.raises(SystemExit, match="--steps was 4 and is 5"):
        few_steps.main(dataclasses.replace(config, steps=5))


def test_objectives_are_least_at_the_exact_map(optimized, x64):
    """Of a Gaussian: a step along the gradient of any objective leads away from maps that are off, and not from the exact one."""
    distribution = marginals.GaussianMixture(jnp.ones(1), jnp.array([[0.7, 0.7]]), jnp.array([0.4]))
    field = marginals.velocity(few_steps.PATH, distribution)
    exact = flow_maps.mean_velocity(marginals.flow_map(few_steps.PATH, distribution))
    key_0, key_1, key = jax.random.split(jax.random.key(0), 3)
    x_0, x_1 = jax.random.normal(key_0, (40_000, 2)), distribution.sample(key_1, 40_000)
    given = few_steps.Given(few_steps.Points(power=0.0), key, x_0, x_1, 1.0, field)

    def slope(objective, off):
        return jax.grad(lambda off: objective(lambda x, s, t: exact(x, s, t) + off, given).mean())(off)

    for name, objective in few_steps.OBJECTIVES.items():
        here, beside = (float(jax.jit(slope, static_argnums=0)(objective, off)) for off in (0.0, 0.3))
        assert beside > 0.01, name
        assert abs(here) < 0.1 * beside, name


def test_objectives_on_digits(tmp_path):
    names = ("flow", "improved_mean_flow", "consistency_training", "lagrangian")
    config = images(tmp_path / "run", objectives=names, mix=0.5, flow_evaluations=(2, 4), results=tmp_path / "results.json")
    with pytest.raises(SystemExit, match=r"--flow-evaluations has odd numbers, but a step of the flow at guidance 1.1 is two"):
        few_steps.main(dataclasses.replace(config, flow_evaluations=(1, 2)))
    few_steps.main(config)
    report = json.loads((config.folder / "metrics.json").read_text())
    assert json.loads(config.results.read_text())["run"].items() >= report.items()
    assert (config.folder / "samples.png").stat().st_size > 1000
    for name in names:
        assert report[f"{name} in {4 if name == 'flow' else 1} evaluations: Frechet distance, ratio"] > 0
        assert (config.folder / name / "checkpoints" / "2").is_dir()


def test_a_trained_field_is_where_maps_begin(tmp_path):
    network = dit.DiT(4, 8, 1, 1, 10)
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), 0.5, jnp.zeros(1, jnp.int32))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    checkpoints.save(tmp_path / "demo" / "checkpoints" / "1", training.init(params, optax.adam(1e-3)))
    config = images(tmp_path / "run", init=tmp_path / "demo", objectives=("eulerian",), guidance=1.0, time_scale=1000.0, qk_norm=False)
    settings = tmp_path / "demo" / "config.json"
    settings.write_text(json.dumps({"path": {"type": "Cosine"}}))
    with pytest.raises(SystemExit, match="whose path is Cosine, and here it is Linear"):
        few_steps.main(config)
    settings.write_text(json.dumps({"path": {"type": "Linear"}}))
    for changes, said in (({"time_scale": 1.0}, "--time-scale is 1000.0, and here it is 1.0"), ({"qk_norm": True}, "--qk-norm is False")):
        with pytest.raises(SystemExit, match=said):
            few_steps.main(dataclasses.replace(config, **changes))
    with pytest.warns(UserWarning, match="interval is new"):
        few_steps.main(dataclasses.replace(config, learning_rate=0.0))
    trained = checkpoints.restore_part(config.folder / "eulerian" / "checkpoints", "ema")
    trained = {"params": {name: part for name, part in trained["params"].items() if name != "interval"}}
    # Up to the rounding of the average.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trained, jax.device_get(params))
    with pytest.raises(SystemExit, match="--init is"):
        few_steps.main(dataclasses.replace(config, init=tmp_path / "none"))


def test_latents_are_drawn_as_they_are(tmp_path):
    latents.write(tmp_path / "0.array_record", np.zeros((6, 8, 8, 4), np.float16), [0, 1] * 3)
    preset = few_steps.PRESETS["latents"][1]
    small = TINY | {"depth": 2, "steps": 2, "data": str(tmp_path), "classes": 2, "evaluations": (1,)}
    few_steps.main(dataclasses.replace(preset, folder=tmp_path / "run", **small))
    with np.load(tmp_path / "run" / "samples.npz") as drawn:
        assert drawn["mean flow, 1"].shape == (8, 8, 8, 4)
        assert np.isfinite(drawn["mean flow, 1"]).all()


@pytest.mark.parametrize(("make", "rate"), [(points, 1e9), (images, 1e3)])
def test_training_that_diverges_stops_and_says_so(make, rate, tmp_path):
    config = make(tmp_path / "run", objectives=("mean_flow",), steps=200, learning_rate=rate, depth=4)
    with pytest.raises(training.NonFiniteLoss, match=r"learning rate|lower rate") as stopped:
        few_steps.main(config)
    if make is images:
        # The run before it is kept, and it is finite.
        assert 0 < stopped.value.run.state.step < 200
        assert (config.folder / "mean_flow" / "checkpoints").is_dir()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stopped.value.run.state.params))


def test_what_cannot_be_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match="put flow before"):
        few_steps.main(points(tmp_path, objectives=("lagrangian", "flow")))
    with pytest.raises(SystemExit, match="digits, fashion-mnist, or a folder"):
        few_steps.main(images(tmp_path, data="elephants"))
    with pytest.raises(SystemExit):
        few_steps.parse(["points", "--no-such-flag"])
    assert "no-such-flag" in capsys.readouterr().err
    assert few_steps.parse(["digits", "--steps", "3"]) == dataclasses.replace(few_steps.PRESETS["digits"][1], steps=3)
    assert isinstance(few_steps.PATH, paths.Linear)
