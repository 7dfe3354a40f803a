"""One JSON line per number: what a line says, and how it is measured.

A timing is a ratio of two programs that ran interleaved (A B, B A, ...) in one process, so that what slows the machine down slows both.
Before each round, small programs are compiled anew on copies of their arguments, because where memory happens to lie decides several
percent, for as long as it lies there. A round's ratio is the median of its pairs of runs, the row's the median of its rounds; `error` is
half the width of that median's 68% interval, from order statistics; `fastest` is the ratio of the shortest times, whose `milliseconds`
stand beside it; `load` is the machine's, and above its number of cores the wall clock of any one row means little. A row with a `goal`
says whether it was `met`.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """What every benchmark of ratios has."""

    out: Path | None = None
    """File that the metrics are also written to, at the end."""
    only: tuple[str, ...] = ()
    """Parts to measure, by the names on the progress lines; all by default."""
    seconds: float = 8.0
    """Seconds to measure one comparison, about; more are less noisy."""
    repeats: int = 7
    """Least number of rounds of a comparison, unless it takes ten times --seconds."""
    precision: float = 0.01
    """Relative error at which a ratio is precise enough; rounds go on until then, or for ten times --seconds."""
    compiles: int = 1
    """Least number of timed pairs of compilations; one before them is not counted."""
    baselines: bool = True
    """Whether to measure the other libraries that are installed."""
    seed: int = 0
    """Seed of the weights and the data."""


def start(asynchronous=False):
    """Settings of JAX for measurements, before its first use."""
    # Where it is set for emulated devices it would only give XLA more threads than there are cores.
    os.environ.pop("PJRT_NPROC", None)
    # So that memory that is not in use is left to other libraries.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)


def report(config, parts):
    """Prints the rows of the parts as they come, a JSON line each, writes them to `config.out` once all are there, and gives them."""
    began, where, rows = time.perf_counter(), describe(), []
    for part in parts:
        print(f"{time.perf_counter() - began:6.0f} s  {part.__name__}", file=sys.stderr, flush=True)
        for each in part(config):
            rows.append(finish(each, where))
            print(json.dumps(rows[-1]), flush=True)
    print(f"{time.perf_counter() - began:6.0f} s  done", file=sys.stderr, flush=True)
    if config.out is not None:
        lines = list(map(json.dumps, rows))
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("\n".join(lines) + "\n" if config.out.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n")
    return rows


def chosen(config, parts, baselines=None, target="bench-baselines"):
    """The parts to measure; of those that need other libraries, a dictionary of their packages, the ones that have them."""
    parts = [part for part in (*parts, *(baselines or {})) if not config.only or part.__name__ in config.only]
    unknown = set(config.only) - {part.__name__ for part in parts}
    if unknown:
        sys.exit(f"There is no part {' or '.join(sorted(unknown))}.")
    packages = {part: (baselines or {}).get(part, ()) for part in parts}
    return [part for part in parts if not packages[part] or (config.baselines and ready(part, packages[part], target))]


def ready(part, packages, target="bench-baselines"):
    """Whether the packages that a part needs are installed; a line says so where not."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{part.__name__}: {' and '.join(missing)} not installed; `make {target}` makes the environment", file=sys.stderr)
    return not missing


def row(name, value, unit, *, most=None, least=None, packages=(), **more):
    """A number, the most or the least it may be, and the other libraries that it involves."""
    if most is not None:
        more |= {"goal": f"<= {most:g}", "met": bool(value <= most)}
    if least is not None:
        more |= {"goal": f">= {least:g}", "met": bool(value >= least)}
    return {"name": name, "value": value, "unit": unit, **more, "packages": packages}


def describe():
    """What every line has: the device, the commit, as it is before anything is written, and what was set for the measurement."""
    device = jax.devices()[0]
    kind = f"cpu {platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    settings = {name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES") if os.environ.get(name)}
    return {"device": kind, "commit": commit(), **({"environment": settings} if settings else {})}


def commit():
    """The checkout's commit, with -dirty where files differ from it; a copy without its history has it from $COMMIT."""

    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    known = git("rev-parse", "--short", "--verify", "HEAD") or os.environ.get("COMMIT", "none")
    return known + ("-dirty" if git("status", "--porcelain") else "")


def versions(packages=()):
    """Those of Python, of JAX and of some packages."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", *packages)}}


def finish(row, where):
    """A row with the device, the commit and the versions."""
    row = row | {"value": short(row["value"])} | where
    return row | {"versions": versions(row.pop("packages"))}


def short(value, digits=4):
    """A number of a few significant digits."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


# How a line is measured.


def each(functions, *arguments):
    """What `interleaved` takes, for functions of the same arguments: makers of calls, compiled anew, on copies of the arguments."""

    def make(function):
        return functools.partial(jax.jit(lambda *arguments: function(*arguments)), *jax.tree.map(jnp.copy, arguments))

    return [functools.partial(make, function) for function in functions]


def interleaved(config, makers, least=3e-3):
    """Seconds of the calls, (rounds, pairs, calls); a maker takes nothing and gives a call.

    Short calls are repeated within a turn for at least `least` seconds. The pause lets the other library's threads, which spin for a
    moment after their work, go to sleep. There are `repeats` rounds, and more where they still scatter.
    """

    def timed(call, count):
        if count > 1:  # The first call after a pause finds cold caches; a long one does not notice.
            jax.block_until_ready(call())
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(call())
        return (time.perf_counter() - start) / count

    def made(backwards):
        order = -1 if backwards else 1
        calls = [make() for make in makers[::order]]
        for call in calls:
            jax.block_until_ready(call())
        return calls[::order]

    start = time.perf_counter()
    calls = made(False)
    making = time.perf_counter() - start
    single = [min(timed(call, 1) for _ in range(3)) for call in calls]
    counts = [math.ceil(least / seconds) for seconds in single]
    # As long as the making at least, or most of the time would go into it.
    turns = max(config.seconds / config.repeats, min(making, config.seconds)) / np.dot(counts, single)

    def once(index):
        calls = made(index % 2)
        found = np.zeros((max(2, 2 * round(turns / 2)), len(calls)))
        for i in range(len(found)):
            for j in range(len(calls))[:: -1 if i % 2 else 1]:
                time.sleep(2e-3)
                found[i, j] = timed(calls[j], counts[j])
        return found

    return until(config, config.repeats, config.precision, once)


def compilations(config, functions, arguments):
    """Seconds to trace and compile each function, (rounds, 1, functions), interleaved, each time as a new function."""

    def seconds(function, arguments):
        start = time.perf_counter()
        jax.jit(lambda *arguments: function(*arguments)).lower(*arguments).compile()
        return time.perf_counter() - start

    def once(index):
        order = -1 if index % 2 else 1
        return [[seconds(*pair) for pair in list(zip(functions, arguments, strict=True))[::order]][::order]]

    return until(config, config.compiles + 1, max(0.05, config.precision), once)[1:]


def until(config, repeats, precision, once):
    """Rounds, two at least and until they are so precise or ten times `config.seconds` have passed."""
    rounds, began = [once(0)], time.perf_counter()
    while len(rounds) < 2 or (
        time.perf_counter() - began < 10 * config.seconds and (len(rounds) < repeats or spread(np.array(rounds)) > precision)
    ):
        rounds.append(once(len(rounds)))
    return np.array(rounds)


def interval(values):
    """Half the width of the 68% interval of the median, from order statistics."""
    values, n = np.sort(values), len(values)
    return (values[min(n - 1, math.ceil(n / 2 + math.sqrt(n) / 2))] - values[max(0, math.floor(n / 2 - math.sqrt(n) / 2))]) / 2


def spread(seconds):
    """The largest relative error of a ratio of the other calls' times to the first's."""
    rounds = np.median(seconds[..., 1:] / seconds[..., :1], axis=1)
    return max((interval(ratios) / np.median(ratios) for ratios in rounds.T), default=0.0)


def ratio(name, measured, over, under, **more):
    """The row of a ratio of two of the calls that `interleaved` or `compilations` measured."""
    rounds = np.median(measured[..., over] / measured[..., under], axis=1)
    fastest = [measured[..., i].min() for i in (over, under)]
    extra = {"error": short(float(interval(rounds)), 2), "fastest": short(float(fastest[0] / fastest[1]))}
    extra |= {"milliseconds": [short(float(1e3 * seconds)) for seconds in fastest], "rounds": len(rounds)}
    extra |= {"pairs": measured.shape[0] * measured.shape[1], "load": short(os.getloadavg()[0], 2)}
    return row(name, float(np.median(rounds)), "ratio", **extra, **more)


def difference(name, makers, **more):
    """The row of the largest absolute difference of what two calls return."""
    a, b = (np.asarray(make()()) for make in makers)
    return row(name, float(np.abs(a - b).max()), "max abs difference", **more)


def mean_seconds(steps, repeats, once, wait):
    """The median over the rounds of a step's mean seconds; the first, which compiles, does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(steps):
            out = once()
        wait(out)
        seconds.append((time.perf_counter() - start) / steps)
    return float(np.median(seconds[1:]))


def apart(function, *arguments):
    """What a function gives in a process of its own, whose end gives the memory back."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
