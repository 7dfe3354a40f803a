"""The benchmarks run, and say what each number is. Their timings are not tested: a shared machine would decide them."""

import json
import subprocess
import sys

import pytest

from benchmarks import sampling

TINY = sampling.Config(
    batches=(4,),
    steps=3,
    width=8,
    depth=1,
    guidance_batch=4,
    image_batch=4,
    image_steps=2,
    seconds=0.0,
    repeats=2,
    compiles=1,
    peers=False,
)
FLAGS = ["--batches=4", "--steps=3", "--width=8", "--depth=1", "--seconds=0", "--repeats=2", "--compiles=1", "--no-peers"]
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


@pytest.mark.parametrize("part", [sampling.ode, sampling.sde, sampling.control, sampling.guided_points, sampling.guided_images])
def test_part_runs(part):
    where = sampling.describe()
    rows = [check(json.dumps(sampling.finish(row, where))) for row in part(TINY)]
    assert any(row["unit"] == "ratio" for row in rows)
    assert all(row["value"] == 0 for row in rows if row["name"].endswith("results"))
    assert all(row["value"] == 1 for row in rows if row["name"].endswith("programs equal"))


def test_compiled_size_does_not_grow_with_steps():
    rows = list(sampling.sizes(TINY))
    assert len(rows) >= 2 * (len(sampling.STEPS) + 1)
    assert all(row["met"] for row in rows if "met" in row)
    assert sum("met" in row for row in rows) == len(rows) // 2


def test_missing_peer_is_named(capsys):
    assert not sampling.ready(sampling.diffrax_ode, ("no_such_package",))
    assert "make bench-peers" in capsys.readouterr().err


def test_command(tmp_path):
    out = tmp_path / "folder" / "sampling.jsonl"
    command = [sys.executable, "-m", "benchmarks.sampling", "--only", "ode", "--out", str(out), *FLAGS]
    printed = subprocess.run(command, cwd=sampling.ROOT, capture_output=True, text=True, check=True).stdout
    assert out.read_text() == printed
    assert all(check(line)["name"].startswith("sample_ode") for line in printed.splitlines())
