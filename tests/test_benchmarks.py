"""The benchmarks run, and say what each number is. Their timings are not tested: a shared machine would decide them."""

import json
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot, couplings, flow_maps, gpu, harness, other_libraries, parallel, published, sampling, solvers, train_step

TINY = sampling.Config(
    batches=(4,),
    steps=3,
    width=8,
    depth=1,
    guidance_batches=(4,),
    image_batches=(4,),
    image_steps=2,
    solver_depth=1,
    solver_steps=4,
    seconds=0.0,
    repeats=2,
    precision=1.0,
    compiles=1,
    baselines=False,
)
FLAGS = [
    "--batches=4",
    "--steps=3",
    "--width=8",
    "--depth=1",
    "--seconds=0",
    "--repeats=2",
    "--precision=1",
    "--compiles=1",
    "--no-baselines",
]
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
    where = harness.describe()
    return [check(json.dumps(harness.finish(row, where))) for row in found]


@pytest.mark.parametrize("part", [sampling.ode, sampling.sde, sampling.guided_points, sampling.guided_images])
def test_part_runs(part):
    found = finished(part(TINY))
    assert any(row["unit"] == "ratio" for row in found)
    assert all(row["value"] == 0 for row in found if row["name"].endswith("results"))


def test_couplings_are_measured_beside_pot(monkeypatch):
    monkeypatch.setattr(couplings, "SIZES", (40,))
    (row,) = finished(couplings.assignment(TINY))
    assert row["cost"] < 1e-5


def test_published_networks_are_measured():
    config = published.Config(
        model="DiT-S/8", depth=1, size=16, widths=(32, 64), inception_batch=1, seconds=0.0, repeats=1, precision=1.0, baselines=False
    )
    time, memory = finished(published.safetensors(config))
    assert time["name"] == "DiT-S/8, 1 blocks, 4 M parameters from .safetensors: time"
    assert memory["value"] > 0.5
    (images,) = finished(published.decoder(config))
    assert images["name"] == "decoder, 16 x 16, batch 1, fmjax: images"


def test_steps_and_samples_of_flow_maps_are_measured():
    config = flow_maps.Config(model="DiT-S/8", depth=1, batch=2, seconds=0.0, repeats=2, precision=1.0)
    found = {row["name"].removeprefix("DiT-S/8, 1 blocks, batch 2, float32, "): row for row in finished(flow_maps.train(config))}
    assert found["a step of MeanFlow over one of flow matching: time"]["goal"] == "<= 2.2"
    assert found["a step of improved MeanFlow over one of flow matching: temporary memory"]["unit"] == "ratio"
    assert found["a step of flow matching: compile time"]["unit"] == "s"
    (row,) = finished(flow_maps.sample(config))
    assert row["value"] < 1


def test_what_solvers_add_is_measured(monkeypatch):
    monkeypatch.setattr(sampling, "OVERHEAD", {name: sampling.OVERHEAD[name] for name in ("heun", "unipc 3", "churn")})
    names = [row["name"] for row in finished(sampling.overhead(TINY))]
    assert names[0] == "heun, 4 steps, over its evaluations of DiT-S/4: run time"
    assert len(names) == 6


def test_missing_baseline_is_named(capsys):
    parts = {sampling.diffrax_ode: ("no_such_package",)}
    assert harness.chosen(harness.Config(baselines=False), [sampling.ode], parts) == [sampling.ode]
    assert not capsys.readouterr().err
    assert harness.chosen(harness.Config(), [sampling.ode], parts) == [sampling.ode]
    assert "diffrax_ode: no_such_package not installed; `make bench-baselines`" in capsys.readouterr().err


def test_command(tmp_path):
    out = tmp_path / "folder" / "sampling.jsonl"
    command = [sys.executable, "-m", "benchmarks.sampling", "--only", "ode", "--out", str(out), *FLAGS]
    printed = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True).stdout
    assert out.read_text() == printed
    assert all(check(line)["name"].startswith("sample_ode") for line in printed.splitlines())


@pytest.mark.parametrize("unrolled", [False, True])
def test_train_step_runs(tmp_path, capsys, unrolled):
    out = tmp_path / "folder" / "train_step.jsonl"
    variants = ("scan", "unrolled") if unrolled else ("remat",)
    config = train_step.Config(out, model="DiT-S/8", depth=1, dtype="float32", variants=variants, repeats=1, baselines=False)
    harness.report(config, harness.chosen(config, [train_step.train, train_step.sample]))
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    found = [check(line) for line in printed.splitlines()]
    assert {"ms", "1/s", "GFLOP", "MiB", "s"} <= {row["unit"] for row in found}
    assert all("batch 2" in row["name"] for row in found)
    assert any("remat" in row["name"] for row in found) != unrolled
    assert [row["name"].rpartition(", ")[2] for row in found if row["unit"] == "ratio"] == unrolled * [
        f"scan over unrolled: {what}" for what in ("time", "temporary memory", "compile time")
    ]


def test_images_per_second():
    config = train_step.Config(model="DiT-S/8", depth=1, dtype="float32", repeats=1, baselines=False)
    _, found = finished(train_step.sample(config))
    assert found["name"] == "DiT-S/8, 2 Euler steps at guidance 1.5, batch 2, float32, attention xla, 1 blocks, fmjax: images"
    assert found["unit"] == "1/s"


def test_pytorch_reference_is_the_same_network(key):
    pytest.importorskip("torch")
    from benchmarks import pytorch

    model = train_step.network("DiT-S/8", 2)
    keys = jax.random.split(key, 3)
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(keys[0], leaf.shape), train_step.initial(model, keys[1]))
    x, t, y = jax.random.normal(keys[2], (2, *train_step.SHAPE)), jnp.array([0.2, 0.9]), jnp.array([3, 1000])
    theirs = pytorch.load(pytorch.DiT(model, train_step.SHAPE), params)(
        *(pytorch.torch.tensor(np.asarray(array).copy()) for array in (jnp.moveaxis(x, -1, 1), t, y))
    )
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1).detach(), model.apply(params, x, t, y), atol=1e-4)


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


@pytest.mark.parametrize("part", [parallel.loop, parallel.sharding, parallel.stall, parallel.verified, parallel.memory])
def test_part_of_parallel_runs(part, monkeypatch):
    monkeypatch.setattr(parallel, "STEPS", 2)
    config = parallel.Config(
        batch=2, width=16, model="DiT-S/8", depth=1, logs=2, saves=1, examples=512, seconds=0.0, repeats=2, precision=1.0
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
    assert aot.too_large(RuntimeError(message)) == {"fits": False, "needs per chip, GB": 21.5, "of, GB": 16.9}
    with pytest.raises(RuntimeError, match="no such thing"):
        aot.too_large(RuntimeError("no such thing as 3.00G"))


def test_solvers_err_less_with_more_evaluations(tmp_path, monkeypatch, x64):
    """Rows of the Gaussian flow on the uniform grid, one optimized grid, and the plot."""
    monkeypatch.setattr(solvers, "SOLVERS", {name: solvers.SOLVERS[name] for name in ("euler", "heun", "adams_bashforth 4", "unipc 3")})
    monkeypatch.setattr(solvers, "NAMESAKES", {})
    monkeypatch.setattr(harness, "ready", lambda *_: False)
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
    solvers.draw(tmp_path / "solvers.png", solvers.curves(found), "evaluations")
    assert (tmp_path / "solvers.png").stat().st_size > 1000


def test_gpu_parts_on_a_cpu(tmp_path, monkeypatch):
    """Everything is small, and a file says what was run, where, and why Fashion-MNIST was not."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert gpu.main(gpu.Config(minutes=15, only=("tests", "sample", "fashion"), out=tmp_path)) == 0
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert found.keys() == {"tests", "sample", "fashion"}
    for part in found.values():
        assert part.keys() >= {"part", "device", "commit", "versions", "seconds", "seconds given"}
        assert "failed" not in part
    assert found["tests"]["outcomes"]["passed"] > 0
    assert found["tests"]["failed tests"] == []
    assert [row["unit"] for row in found["sample"]["rows"]] == ["ms", "1/s"]
    assert "CPU" in found["fashion"]["skipped"]


STUB = """
import json, pathlib, signal, sys, time
if "--variants=remat" in sys.argv:
    sys.exit("out of memory")
print(json.dumps({"name": "images", "value": 2.0, "unit": "1/s", "versions": {"torch": "2"}}), flush=True)
if "--variants=unrolled" in sys.argv:
    time.sleep(60)
if "--folder" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
    if "fashion-lab-dit" in sys.argv and "--no-train" not in sys.argv:
        def end(number, frame):
            (folder / "checkpoints" / "700").mkdir(parents=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, end)
        time.sleep(60)
    (folder / "checkpoints" / "500").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"trained": "--no-train" not in sys.argv}))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A report whose commands run a stub, and what it said."""
    (tmp_path / "stub.py").write_text(STUB)
    command = (sys.executable, str(tmp_path / "stub.py"))
    monkeypatch.setattr(gpu, "PYTHON", command)
    monkeypatch.setattr(gpu, "EXPERIMENT", command)
    return gpu.Report(tmp_path / "part.json", print, None, False, 30.0, found={"versions": {}})


def test_gpu_part_goes_on_after_a_crash_and_is_cut_by_its_clock(stub):
    stub.seconds = 6.0
    gpu.train(stub)
    found = json.loads(stub.file.read_text())
    assert [row["variant"] for row in found["rows"]] == ["scan", "unrolled"]
    assert found["versions"] == {"torch": "2"}
    assert "out of memory" in found["failed"]["remat"]
    assert found["cut"].keys() == {"unrolled", "scan, XLA's attention", "remat, XLA's attention"}
    assert "stopped after" in found["cut"]["unrolled"]
    assert found["seconds"] < 12


def test_gpu_fashion_is_trained_while_there_is_time(stub, monkeypatch):
    """A preset that ends in time is whole; one that does not is told to end, and evaluated as it was saved."""
    monkeypatch.setattr(gpu, "LEAST", 2)
    stub.seconds = 8.0
    gpu.fashion(stub)
    found = json.loads(stub.file.read_text())
    assert found["lab-unet"] | {"steps": 500, "of": 5_000, "trained": True} == found["lab-unet"]
    assert found["lab-dit"] | {"steps": 700, "of": 20_000, "trained": False} == found["lab-dit"]
    assert found["cut"].keys() == {"lab-dit, training"}
    assert "failed" not in found


def test_gpu_names_missing_packages(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in ("ot", "tyro", "torch") else name)
    assert gpu.missing(["fashion"]).endswith("python -m pip install tyro POT; optional: torch")
    assert "POT" not in gpu.missing(["train"])


@pytest.mark.parametrize("library", other_libraries.LIBRARIES)
def test_page_for_users_of_other_libraries(library):
    """Its programs are found and compile, ours exists, and its distances are those of the file."""
    kinds = {whose for whose, code in other_libraries.programs(library) if compile(code, library, "exec")}
    assert kinds >= {"theirs", "same"}
    ours = [name for name in other_libraries.names(library) if name.startswith("fmjax.")]
    assert len(ours) > 5
    for name in ours:
        pkgutil.resolve_name(name)
    rows = map(json.loads, (harness.ROOT / "results" / "other_libraries.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if row["name"].startswith(library))
    page = other_libraries.section("What the programs draw")
    assert f"| {library} | {row['value']:.2f} | {row['ours']:.2f} |" in page
    assert f"{row['moons']:.2f}" in page
