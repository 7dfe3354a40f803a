"""Orders: every step with noise converges for every sigma on every path, exactly; every flow falls to rounding in float32."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks import orders
from fmjax import paths, sampling

# The velocities are exact, which the warning cannot know.
pytestmark = pytest.mark.filterwarnings("ignore:At t = .* one step of the drift multiplies")
RESULTS = Path(__file__).parents[1] / "results" / "orders.json"
SECOND = ("sde_dpm_solver_pp", "churn", "stochastic_heun")
"""Of weak order 2 for sigmas up to the reverse SDE's."""


def check(row):
    """Errors fall as they should from the first to the last; order 1/4, as before, would take a third off."""
    coarse, fine, more = row["errors"][0], row["errors"][-1], row["steps"][-1] / row["steps"][0]
    name = f"{row['path']}, sigma {row['sigma']}, {row['step']}: {row['errors']}"
    assert np.isfinite(row["errors"]).all(), name
    # Where an error changes its sign on the way down it is small before.
    assert fine < max(1.5 / more**0.7 * coarse, 3.5e-3), name
    assert fine < 0.03, name
    if row["step"] in SECOND and row["sigma"] in ("0", "2 beta") and row["path"] != "square root":
        assert fine < max(2.64 / more**2 * coarse, 2e-4), name


@pytest.mark.parametrize("path", ["variance preserving", "flat ends"])
def test_noisy_steps_converge(path):
    """The law of the samples is exact (see the benchmark) and comes to the data's."""
    for row in orders.noise(orders.Config(steps=(50, 200), paths=(path,))):
        check(row)


def test_what_was_measured_converges():
    """Every step for every sigma on every path, as the page on solvers draws it."""
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["kind"] == "noise"]
    assert {(row["path"], row["step"], row["sigma"]) for row in rows} == set(product(orders.PATHS, orders.NOISY, orders.SIGMAS))
    for row in rows:
        check(row)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("path", "fine", "most", "steps"),
    [
        ("flat ends", 4000, 4e-6, ("heun", "sampling.path_heun", "adams_bashforth 4", "dpm_solver_pp 3", "unipc 3", "deis 3")),
        ("polynomial 3", 1000, 3e-5, ("dpm_solver_pp 2", "unipc 2")),
    ],
)
def test_flows_fall_to_rounding(path, fine, most, steps, monkeypatch):
    """In float32 and many steps, some so close in the path's time that their numbers are one."""
    monkeypatch.setattr(orders, "FLOWS", {name: orders.FLOWS[name] for name in steps})
    for row in orders.flow(orders.Config(fine=(fine,), points=64, paths=(path,))):
        assert max(row["errors"]) < most, row


def test_learnt_velocities_are_sampled(monkeypatch):
    monkeypatch.setattr(orders, "NOISY", {"ancestral": sampling.ancestral})
    rows = list(orders.learnt(orders.Config(train=2, samples=20, paths=("linear",))))
    assert [row["step"] for row in rows] == ["data", *4 * ["ancestral", "euler_maruyama to .99, tweedie"]]
    assert all(row["energy_distance"] > 0 for row in rows)


def test_a_learnt_velocity_is_safe_with_steps_that_know_the_path():
    """And not with the drift of a constant sigma, whatever the grid: what the warning and the page on solvers say."""
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["kind"] == "learnt" and row["step"] != "data"]
    drifts = ("euler_maruyama", "stochastic_heun", "euler_maruyama to .99, tweedie")
    assert len(rows) == 2 * 4 * (len(orders.NOISY) + 1)
    for row in rows:
        if row["step"] not in drifts or row["sigma"] in ("0", "2 beta"):
            assert row["energy_distance"] < 0.08, row
    lost = [row["energy_distance"] for row in rows if row["path"] == "flat ends" and row["sigma"] == "2" and row["step"] in drifts]
    assert all(distance is None or distance > 1 for distance in lost)


def test_the_plots_are_drawn(tmp_path):
    rows = [orders.summary("noise", "linear", "ancestral", (10, 20), (0.2, 0.1), sigma="1", begin=0.0)]
    orders.draw(tmp_path / "noise.png", orders.curves(rows), "steps")
    assert (tmp_path / "noise.png").stat().st_size > 1000
    assert json.loads(json.dumps(rows[0]))["order"] == 1.0
    assert isinstance(orders.PATHS["linear"], paths.Linear)
