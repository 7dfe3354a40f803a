"""The benchmarks run, and say what each number is. Their timings are not tested: a shared machine would decide them."""

import json
import subprocess
import sys

import pytest

from benchmarks import aot, images, networks, parallel, rows, sampling, solvers, train_step

TINY = sampling.Config(
    batches=(4,),
    steps=3,
    width=8,
    depth=1,
    guidance_batches=(4,),
    image_batches=(4,),
    image_steps=2,
    solver_width=12,
    solver_depth=1,
    solver_steps=4,
    seconds=0.0,
    repeats=2,
    precision=1.0,
    compiles=1,
    peers=False,
)
pytestmark = pytest.mark.usefixtures("unoptimized")
FLAGS = ["--batches=4", "--steps=3", "--width=8", "--depth=1", "--seconds=0", "--repeats=2", "--precision=1", "--compiles=1", "--no-peers"]
FIELDS = {"name", "value", "unit", "device", "versions", "commit"}


def check(line):
    """A line as a row, after a look at its fields."""
    row = json.loads(line)
    assert row.keys() >= FIELDS
    assert {"python", "jax", "jaxlib", "flax"} <= row["versions"].keys()
    assert isinstance(row["name"], str)
    assert isinstance(row["value"], int | float)
    assert ("goal" in row) == ("met" in row)
    return row


def finished(found):
    """Rows as they are printed."""
    where = rows.describe()
    return [check(json.dumps(rows.finish(row, where))) for row in found]


@pytest.mark.parametrize("part", [sampling.ode, sampling.sde, sampling.control, sampling.guided_points, sampling.guided_images])
def test_part_runs(part):
    found = finished(part(TINY))
    assert any(row["unit"] == "ratio" for row in found)
    assert all(row["value"] == 0 for row in found if row["name"].endswith("results"))
    assert all(row["value"] == 1 for row in found if row["name"].endswith("programs equal"))


def test_what_solvers_add_is_measured(monkeypatch):
    monkeypatch.setattr(sampling, "OVERHEAD", {name: sampling.OVERHEAD[name] for name in ("heun", "unipc 3", "churn")})
    names = [row["name"] for row in finished(sampling.overhead(TINY))]
    assert names[0] == "heun, 4 steps, over its evaluations of DiT-S/4: run time"
    assert len(names) == 6


def test_compiled_size_does_not_grow_with_steps():
    found = list(sampling.sizes(TINY))
    assert len(found) >= 2 * (len(sampling.STEPS) + 1)
    assert all(row["met"] for row in found if "met" in row)
    assert sum("met" in row for row in found) == len(found) // 2


def test_missing_peer_is_named(capsys):
    assert not rows.ready(sampling.diffrax_ode, ("no_such_package",))
    assert "make bench-peers" in capsys.readouterr().err


def test_networks_without_pytorch(capsys, monkeypatch):
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    assert networks.transformer not in networks.chosen(networks.Config())
    assert "transformer: torch not installed; `make bench-networks`" in capsys.readouterr().err
    assert networks.transformer not in networks.chosen(networks.Config(peers=False))
    assert not capsys.readouterr().err


def test_command(tmp_path):
    out = tmp_path / "folder" / "sampling.jsonl"
    command = [sys.executable, "-m", "benchmarks.sampling", "--only", "ode", "--out", str(out), *FLAGS]
    printed = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True, check=True).stdout
    assert out.read_text() == printed
    assert all(check(line)["name"].startswith("sample_ode") for line in printed.splitlines())


@pytest.mark.parametrize("part", [networks.scan, networks.remat, networks.loop])
def test_part_of_networks_runs(part, monkeypatch):
    if part is networks.scan:
        # Compiles in a fraction of the time; the train step itself is compiled by the other part.
        monkeypatch.setattr(networks, "step", networks.forward)
    if part is networks.loop:
        monkeypatch.setattr(networks, "trainer", lambda model, params, key, batch: lambda: params)
    few = ("DiT-S/8",)
    config = networks.Config(
        scan_models=few, remat_models=few, model="DiT-S/8", depth=1, batch=2, seconds=0.0, repeats=2, precision=1.0, compiles=1, peers=False
    )
    found = finished(part(config))
    assert any(row["unit"] == "ratio" for row in found)
    assert all(row["value"] < 1e-5 for row in found if row["name"].endswith("largest difference"))


def test_train_step_runs(tmp_path, capsys):
    out = tmp_path / "folder" / "train_step.jsonl"
    config = train_step.Config(model="DiT-S/8", depth=1, dtype="float32", remat=True, repeats=1, peers=False)
    rows.report(train_step.measure(config), out)
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    found = [check(line) for line in printed.splitlines()]
    assert {"ms", "1/s", "GFLOP", "MiB"} <= {row["unit"] for row in found}
    assert all("batch 2" in row["name"] and "remat" in row["name"] for row in found)


def test_images_a_second():
    config = images.Config(model="DiT-S/8", depth=1, dtype="float32", repeats=1, peers=False)
    (found,) = finished(images.measure(config))
    assert found["name"] == "DiT-S/8, 2 Euler steps at guidance 1.5, batch 2, float32, attention xla, 1 blocks, fmjax: images"
    assert found["unit"] == "1/s"


# Billions of multiplications with their additions of a forward pass (Peebles and Xie 2023, table of all models).
PUBLISHED = {"S/8": 0.36, "S/4": 1.41, "S/2": 6.06, "B/8": 1.42, "B/4": 5.56, "B/2": 23.01}
PUBLISHED |= {"L/8": 5.01, "L/4": 19.70, "L/2": 80.71, "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_the_published_ones(name):
    # The published networks predict a variance too.
    model = train_step.network(f"DiT-{name}", learn_sigma=True, scan=True)
    assert train_step.flops(model, 32, 32) / 2e9 == pytest.approx(PUBLISHED[name], rel=0.001, abs=0.005)


def test_flops_of_a_training_image():
    assert 3 * train_step.flops(train_step.network("DiT-XL/2", scan=True), 32, 32) == pytest.approx(711.6e9, rel=0.01)


def test_flops_of_a_loop_are_those_of_its_blocks():
    loop, unrolled = (train_step.network("DiT-S/2", depth=2, scan=scan) for scan in (True, False))
    assert train_step.flops(loop, 16, 32) == train_step.flops(unrolled, 16, 32)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="There is no model 'DiT-M/2'"):
        train_step.network("DiT-M/2")


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989.4e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None)]
)
def test_peak_by_the_name_of_the_device(kind, peak):
    assert train_step.peak_of(kind) == peak


@pytest.mark.parametrize("part", [parallel.loop, parallel.ways, parallel.stall, parallel.verified, parallel.pictures])
def test_part_of_parallel_runs(part):
    config = parallel.Config(
        batch=2, width=16, every=2, model="DiT-S/8", depth=1, rows=2, saves=1, examples=512, seconds=0.0, repeats=2, precision=1.0
    )
    found = finished(part(config))
    assert any(row["unit"] == "ratio" for row in found)


COMPILED = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %grads = (bf16[4,2]{1,0:T(8,128)}, bf16[2]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %weights = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%c), channel_id=2, dimensions={0}
  %part = f32[16,8]{1,0} fusion(%c), kind=kCustom, calls=%piece
}

%piece (p: f32[2,8]) -> f32[16,8] {
  %again = f32[16,8]{1,0} all-gather(%p), channel_id=2, dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(28), metadata={op_name="loop"}
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  %loss = f32[]{:T(128)} all-reduce(%l), channel_id=3, to_apply=%add
  %sent = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1}}
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_goes_round():
    assert aot.collectives(COMPILED) == {
        "all-reduce": 28 * (4 * 2 + 2) * 2 + 4,
        # Once, though a piece of it stands elsewhere too.
        "all-gather": 28 * 16 * 8 * 4,
        "collective-permute": 12,
    }
    with pytest.raises(ValueError, match="rounds of a loop cannot be read from its condition, condition"):
        aot.collectives(COMPILED.replace("constant(28)", "parameter(0)"))
    known = 'body=%body, backend_config={"known_trip_count":{"n":"28"}}'
    text = COMPILED.replace("constant(28)", "parameter(0)").replace("body=%body", known)
    assert aot.collectives(text) == aot.collectives(COMPILED)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_does_not_fit(message):
    assert aot.too_large(RuntimeError(message)) == {"fits": False, "needs on a chip, GB": 21.5, "of, GB": 16.9}
    with pytest.raises(RuntimeError, match="no such thing"):
        aot.too_large(RuntimeError("no such thing as 3.00G"))


def test_bytes_on_the_wire():
    assert aot.on_the_wire("all-reduce", 80.0, 8) == 140.0
    assert aot.on_the_wire("all-gather", 80.0, 8) == 70.0
    assert aot.on_the_wire("reduce-scatter", 10.0, 8) == 70.0
    assert aot.on_the_wire("collective-permute", 10.0, 8) == 10.0


def test_solvers_err_less_with_more_evaluations(tmp_path, monkeypatch, x64):
    """Rows of the Gaussian flow on the uniform grid, one fitted grid, and the picture."""
    monkeypatch.setattr(solvers, "SOLVERS", {name: solvers.SOLVERS[name] for name in ("euler", "heun", "adams_bashforth 4", "unipc 3")})
    monkeypatch.setattr(solvers, "NAMESAKES", {})
    monkeypatch.setattr(solvers, "ready", lambda *_: False)
    config = solvers.Config(evaluations=(5, 20), points=64, fitting_points=16, iterations=3)
    found = list(solvers.gaussian(config))
    error = {(row["solver"], row["grid"], row["evaluations"]): row["value"] for row in finished(found)}
    assert ("adams_bashforth 4", "uniform", 5) not in error
    assert solvers.steps_of("heun", 5) == 2
    # Steps that shrink towards data do more there for a method that holds data.
    assert error["unipc 3", "quadratic", 20] < error["unipc 3", "uniform", 20]
    for solver in ("euler", "heun", "unipc 3"):
        assert error[solver, "uniform", 20] < error[solver, "uniform", 5]
    assert 0.09 < error["euler", "uniform", 5] < 0.12
    solvers.draw(tmp_path / "solvers.png", found)
    assert (tmp_path / "solvers.png").stat().st_size > 1000
