"""What one NVIDIA GPU makes of fmjax in nine minutes, without a network: a JSON file per part.

    make gpu                                    all parts, into results/gpu/
    make gpu ARGS="--only train sample"         some of them
    python -m benchmarks.gpu                    on a CPU everything is small and goes to runs/gpu/

The parts, in this order: `tests`, a tenth of the test suite on the GPU; `train`, the train step of DiT-XL/2 and its variants, beside
compiled PyTorch; `sample`, its guided sampler, beside PyTorch; `fashion`, the presets of `experiments.images` on Fashion-MNIST, which
`--data-dir` or Debian's package holds. A part has its share of the time that is left, and runs in processes of its own, so that memory is
given back and a crash stays in its part. Its file is written after each measurement and says what was cut and what failed; the exit
status is 1 where anything failed. PyTorch is measured where it is installed with CUDA.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-m")
EXPERIMENT = (*PYTHON, "experiments.images")
PRESETS = {"lab-unet": 5_000, "lab-dit": 20_000}
"""Of the experiment on Fashion-MNIST, and their training steps."""
EVALUATION = 0.45
"""The share of a preset's time that its evaluation may take."""
LEAST = 100
"""Seconds of a preset that trains for a moment."""
PREEMPTED = 75
"""The exit status of a training that saved what it had when it was told to end."""
VARIANTS = {
    "scan": ("--baselines",),
    "remat": ("--variants=remat", "--no-baselines"),
    "unrolled": ("--variants=unrolled", "--no-baselines"),
    "scan, XLA's attention": ("--attention=xla", "--no-baselines"),
    "remat, XLA's attention": ("--variants=remat", "--attention=xla", "--no-baselines"),
}
"""Of the train step, the most important first; that one has PyTorch beside it."""
LEFT_OUT = {
    r"test_(faults|parallel|damage)\.py": "starts processes that emulate several devices, or damages files",
    r"test_(benchmarks|orders|experiments|program)\.py": "runs programs that the other parts run",
    r"test_(docs|docstrings|formulas|imports|notes|plots|site)\.py": "reads documents, or draws",
    r"device|sharded|pmap|mesh|memory": "emulates several CPU devices, or counts what a program for a CPU holds",
    r"hugging_face|tfds": "reads data by large packages, on the CPU",
}
"""Tests that say nothing on one GPU, by a pattern in their names."""
EVERY = 10
SHARES = {"tests": 1.7, "train": 2.4, "sample": 1.2, "fashion": 3.7}
"""Minutes of nine."""
ALWAYS = ("jax", "flax", "optax", "chex", "orbax.checkpoint", "tyro")
NEEDS = {
    "tests": ("pytest", "hypothesis", "scipy", "diffrax", "sklearn", "grain", "PIL", "ot", "matplotlib", "flatbuffers", "tensorboardX"),
    "fashion": ("grain", "PIL", "ot", "matplotlib", "tensorboardX"),
}
NAMES = {"sklearn": "scikit-learn", "ot": "POT", "PIL": "pillow", "orbax.checkpoint": "orbax-checkpoint", "xdist": "pytest-xdist"}
"""For pip, of packages whose modules have another name."""
ABOUT = """import json, jax
from benchmarks import harness
print(json.dumps([jax.default_backend(), {**harness.describe(), "versions": harness.versions()}]))"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures fmjax on one GPU; writes a JSON file per part."""

    minutes: float = 9.0
    """The time for all parts; each has its share of what is left."""
    only: tuple[str, ...] = ()
    """Parts to run: tests, train, sample, fashion; all by default."""
    out: Path | None = None
    """The folder of the files; none is results/gpu, and runs/gpu on a CPU."""
    data_dir: Path | None = None
    """A folder with the four idx files of Fashion-MNIST; none is Debian's package."""


@dataclasses.dataclass
class Report:
    """The file of a part, which is written anew whenever something is added, and its clock."""

    file: Path
    say: Callable[[str], None]
    data_dir: Path | None
    small: bool
    seconds: float
    began: float = dataclasses.field(default_factory=time.monotonic)
    found: dict = dataclasses.field(default_factory=dict)

    def left(self):
        """Seconds until the part has to end."""
        return self.began + self.seconds - time.monotonic()

    def add(self, **found):
        """Writes more of what was found."""
        self.found |= found
        content = self.found | {"seconds": round(time.monotonic() - self.began, 1), "seconds given": round(self.seconds, 1)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.file)

    def tell(self, kind, name, why):
        """Adds what was cut, or what failed."""
        self.say(f"{self.file.stem}: {kind}: {name}: {why}")
        self.add(**{kind: self.found.get(kind, {}) | {name: why}})

    def run(self, name, command, seconds=None, *, saves=False, **environment):
        """The output of a command, and its seconds; what it left unsaid because it failed or was stopped is told.

        One that saves is told to end (SIGTERM), and has 20 seconds more for it.
        """
        seconds, began = self.left() if seconds is None else seconds, time.monotonic()
        self.say(f"{self.file.stem}: {name}, at most {seconds:.0f} s")
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=os.environ | environment, start_new_session=True)
            try:
                process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                self.tell("cut", name, f"stopped after {seconds:.0f} s")
                if saves:
                    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        os.kill(process.pid, signal.SIGTERM)
                        process.wait(20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                stopped = process.wait() in (-signal.SIGKILL, PREEMPTED)
            out.seek(0)
            err.seek(0)
            printed, complaint = out.read(), err.read()
        if process.returncode and not (stopped and name in self.found.get("cut", {})):
            self.tell("failed", name, f"exit status {process.returncode}: {(complaint or printed)[-2000:]}")
        return printed, time.monotonic() - began


def main(config: Config):
    """Runs the parts; gives 1 where something failed."""
    began = time.monotonic()

    def say(what):
        print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)

    parts = [part for part in PARTS if not config.only or part in config.only]
    if not parts:
        sys.exit(f"There is no part {' or '.join(config.only)}: the parts are {', '.join(PARTS)}.")
    platform, about = json.loads(subprocess.run((sys.executable, "-c", ABOUT), cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    folder = config.out or ROOT / ("runs/gpu" if platform == "cpu" else "results/gpu")
    say(f"{about['device']}: {', '.join(parts)} in {config.minutes:g} minutes, into {folder}")
    failed = []
    for i, part in enumerate(parts):
        share = SHARES[part] / sum(SHARES[each] for each in parts[i:])
        given = share * (began + 60 * config.minutes - time.monotonic())
        report = Report(folder / f"{part}.json", say, config.data_dir, platform == "cpu", given, found={"part": part, **about})
        try:
            PARTS[part](report)
        except Exception as error:
            report.tell("failed", part, f"{type(error).__name__}: {error}")
        report.add()
        failed += [part] * ("failed" in report.found)
    say(f"done, and failures in {', '.join(failed)}" if failed else "done")
    return int(bool(failed))


def missing(parts):
    """What pip has to install for the parts, as one message, or None."""

    def absent(modules: Iterable[str]):
        return [NAMES.get(module, module) for module in modules if not found(module)]

    def found(module):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.util.find_spec(module) is not None
        return False

    needed = absent(dict.fromkeys((*ALWAYS, *(module for part in parts for module in NEEDS.get(part, ())))))
    if not needed:
        return None
    optional = absent(("torch", "xdist"))
    beside = f"; optional: {' '.join(optional)}" if optional else ""
    return f"Nothing was started: packages are missing. python -m pip install {' '.join(needed)}{beside}"


def tests(report):
    """Every tenth test that makes sense on one GPU; on a CPU, few. The plugin below leaves out the others and writes the outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        chosen = {"FMJAX_EVERY": str(EVERY), "FMJAX_OUTCOMES": str(outcomes), "FMJAX_DEADLINE": str(time.time() + report.left() - 10)}
        chosen["PYTEST_XDIST_WORKER"] = ""  # This may be one.
        command = (
            *PYTHON,
            "pytest",
            "-p",
            "benchmarks.gpu",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
            "--continue-on-collection-errors",
        )
        if report.small:
            command, chosen["FMJAX_EVERY"] = (*command, "tests/test_times.py"), "20"
        else:
            command = (*command, "tests", *(("-n", "4") if importlib.util.find_spec("xdist") else ()))
            # Products as exact as on a CPU, where the tests' tolerances are from; otherwise they are TF32's.
            chosen |= {"FMJAX_TEST_PLATFORM": "gpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        report.run("pytest", command, **chosen)
        said = [json.loads(line) for line in outcomes.read_text().splitlines()]
    counts = {outcome: sum(each["outcome"] == outcome for each in said) for outcome in ("passed", "failed", "skipped", "cut")}
    slowest = sorted(said, key=lambda each: -each["seconds"])[:10]
    report.add(
        **{"every": int(chosen["FMJAX_EVERY"]), "left out": LEFT_OUT, "outcomes": counts, "slowest": slowest},
        **{"failed tests": [each["test"] for each in said if each["outcome"] == "failed"]},
    )
    if counts["cut"]:
        report.tell("cut", "tests", f"{counts['cut']} of {len(said)} did not run, for want of time")


def train(report):
    """The train step, a process per variant; one is not begun in less time than the last one took."""
    last = 0.0
    for name, flags in list(VARIANTS.items())[: 2 if report.small else None]:
        if report.left() < last:
            report.tell("cut", name, f"{report.left():.0f} s were left")
            continue
        size = ("--depth=1", "--repeats=1") if report.small else ("--model=DiT-XL/2", "--batch=128", "--steps=5", "--repeats=3")
        seconds = measured(report, name, (*PYTHON, "benchmarks.train_step", *size, *flags))
        # The first has PyTorch in it.
        last = seconds / 2 if name == "scan" else seconds


def sample(report):
    """The guided sampler."""
    size = ("--depth=1", "--repeats=1") if report.small else ("--model=DiT-XL/2", "--batch=64", "--steps=50", "--repeats=2")
    measured(report, "sampler", (*PYTHON, "benchmarks.train_step", "--only=sample", *size))


def measured(report, name, command):
    """Adds the rows that a benchmark prints, those of one that was stopped too; its seconds."""
    # A process has the GPU to itself, but for PyTorch's, which has ended when JAX takes memory.
    printed, seconds = report.run(name, command, XLA_PYTHON_CLIENT_PREALLOCATE="false", XLA_PYTHON_CLIENT_MEM_FRACTION="0.95")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    kept = [{key: line[key] for key in ("name", "value", "unit", "goal", "met") if key in line} for line in lines]
    report.add(rows=[*report.found.get("rows", []), *({"variant": name, **row} for row in kept)])
    if any("torch" in line["versions"] for line in lines):
        report.add(versions=lines[-1]["versions"] | report.found["versions"])
    return seconds


def fashion(report):
    """The presets, each trained for as many of its steps as its time allows."""
    if report.small:
        report.add(skipped="It trains for minutes on a GPU and for hours on a CPU.")
        return
    with tempfile.TemporaryDirectory() as folder:
        for preset, full in PRESETS.items():
            # The U-Net first, whose steps are a quarter of the transformer's.
            if report.left() < LEAST:
                report.tell("cut", preset, f"{report.left():.0f} s were left, and it takes {LEAST} to compile and to evaluate")
                continue
            report.add(**{preset: fashion_run(report, preset, full, Path(folder) / preset, time.monotonic() + report.left())})


def fashion_run(report, preset, full, folder, deadline):
    """The numbers of a preset, trained until only the time for its evaluation is left: then it is told to end, and saves what it has."""
    folder.mkdir()
    command = (*EXPERIMENT, f"fashion-{preset}", "--folder", str(folder / "run"), "--samples", "100")
    command += () if report.data_dir is None else ("--data-dir", str(report.data_dir))
    # The second start finds the first one's programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    left = deadline - time.monotonic()
    _, seconds = report.run(f"{preset}, training", command, (1 - EVALUATION) * left, saves=True, **cache)
    checkpoints = [int(path.name) for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdecimal()]
    if checkpoints and not (folder / "run" / "metrics.json").exists():
        report.run(f"{preset}, evaluation", (*command, "--no-train"), deadline - time.monotonic(), **cache)
    if (picture := folder / "run" / "samples.png").exists():
        shutil.copyfile(picture, report.file.with_name(f"{preset}.png"))
    file = folder / "run" / "metrics.json"
    metrics = json.loads(file.read_text()) if file.exists() else {}
    return {"steps": max(checkpoints, default=0), "of": full, "seconds of training and compilation": seconds, **metrics}


PARTS = {"tests": tests, "train": train, "sample": sample, "fashion": fashion}


# This file is also a plugin of pytest's, for the part `tests`.


def pytest_ignore_collect(collection_path, config):
    """Leaves out whole files, which may need what this machine has not."""
    return True if any(re.search(pattern, collection_path.name) for pattern in LEFT_OUT if pattern.endswith(".py")) else None


def pytest_collection_modifyitems(config, items):
    """Keeps every nth of the tests that are not left out."""
    fit = [item for item in items if not any(re.search(pattern, item.nodeid) for pattern in LEFT_OUT)]
    kept = fit[:: int(os.environ["FMJAX_EVERY"])]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item):
    """Cuts the tests that there is no time for."""
    import pytest

    if time.time() > float(os.environ["FMJAX_DEADLINE"]):
        pytest.skip("no time")


def pytest_runtest_logreport(report):
    """Writes an outcome as a line of JSON."""
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.passed):
        return
    cut = report.skipped and "no time" in str(report.longrepr)
    line = {"test": report.nodeid, "outcome": "cut" if cut else report.outcome, "seconds": round(report.duration, 2)}
    with open(os.environ["FMJAX_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    wanted = [part for part in PARTS if part in sys.argv] or list(PARTS)
    if message := missing(wanted):
        sys.exit(message)
    import tyro

    sys.exit(main(tyro.cli(Config, prog="python -m benchmarks.gpu")))
