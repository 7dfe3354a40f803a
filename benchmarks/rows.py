"""Rows of the benchmarks: what a line says, and how it is measured.

A timing is a ratio of two programs that ran in turns (A B, B A, ...) in the same process: the median over the
pairs of one's time over the other's, so that what slows the machine down slows both. `error` is half the width of the
median's 68% interval, from order statistics; `fastest` is the ratio of the shortest times, whose `milliseconds` stand
beside it; `cpu` is the ratio of processor seconds of this process; `load` is the machine's, and above its number of
cores the wall clock of any one row means little. A row with a `goal` says whether it was `met`; where two programs
compile to the same instructions, a row beside it says so.
"""

import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def start(asynchronous=False):
    """Settings of JAX for measurements, before its first use."""
    # Where it is set for emulated devices it would only give XLA more threads than there are cores.
    os.environ.pop("PJRT_NPROC", None)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)


def report(rows, out=None):
    """Prints rows as they come, one JSON line each, and writes them to a file once all are there."""
    where = describe()
    lines = []
    for row in rows:
        lines.append(json.dumps(finish(row, where)))
        print(lines[-1], flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")


def measure(config, parts):
    """All rows, part by part: each is a function of the configuration."""
    start = time.perf_counter()
    for part in parts:
        print(f"{time.perf_counter() - start:6.0f} s  {part.__name__}", file=sys.stderr, flush=True)
        yield from part(config)
    print(f"{time.perf_counter() - start:6.0f} s  done", file=sys.stderr, flush=True)


def ready(part, peers, target="bench-peers"):
    """Whether a part's peers are installed; a line says so where not."""
    missing = [name for name in peers if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{part.__name__}: {' and '.join(missing)} not installed; `make {target}` makes the environment", file=sys.stderr)
    return not missing


# What a line says.


def row(name, value, unit, *, most=None, least=None, equal=None, packages=(), **more):
    """A number, the most or the least it may be or what it must be equal to, and the peers that it involves."""
    verdict = {}
    if most is not None:
        verdict = {"goal": f"<= {most:g}", "met": bool(value <= most)}
    if least is not None:
        verdict = {"goal": f">= {least:g}", "met": bool(value >= least)}
    if equal is not None:
        verdict = {"goal": f"== {equal}", "met": bool(value == equal)}
    return {"name": name, "value": value, "unit": unit, **verdict, **more, "packages": packages}


def describe():
    """What every line has: the device and the commit, as they are before anything is written."""
    device = jax.devices()[0]
    kind = f"cpu {platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return {"device": kind, "commit": commit()}


def commit():
    """The checkout's commit, with -dirty where files differ from it."""

    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "--verify", "HEAD") or "none") + ("-dirty" if git("status", "--porcelain") else "")


def finish(row, where):
    """A row with the device, the versions and the commit; one from another process has them."""
    if "versions" in row:
        return row
    row = dict(row)
    packages = ("jax", "jaxlib", "flax", *row.pop("packages"))
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    value = row.pop("value")
    value = short(value) if isinstance(value, float) else value
    return {"name": row.pop("name"), "value": value, **row, **where, "versions": versions}


# How a line is measured.


def in_turns(config, calls, least=3e-3):
    """Seconds of each call, and processor seconds of each, (n, len(calls)) both, in turns: A B, B A, A B ...

    Short calls are repeated within a turn for at least `least` seconds. The pause lets the other library's threads, which
    spin for a moment after their work, go to sleep.
    """
    single = []
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        single.append(time.perf_counter() - start)
    inner = [max(1, math.ceil(least / seconds)) for seconds in single]
    round_trip = sum(count * seconds for count, seconds in zip(inner, single, strict=True))
    least_n = max(2, min(config.repeats, int(10 * config.seconds / round_trip)))
    n = min(max(least_n, int(config.seconds / round_trip)), 20 * config.repeats)
    wall, cpu, began = [], [], time.perf_counter()
    # More pairs than that where they still scatter, whatever the ratio is, up to ten times as long.
    while len(wall) < n or (spread(np.array(wall)) > config.precision and time.perf_counter() - began < 10 * config.seconds):
        for seconds in (wall, cpu):
            seconds.append([0.0] * len(calls))
        for j in range(len(calls))[:: 1 if len(wall) % 2 else -1]:
            time.sleep(2e-3)
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(inner[j]):
                jax.block_until_ready(calls[j]())
            wall[-1][j], cpu[-1][j] = (time.perf_counter() - start) / inner[j], (time.process_time() - start_cpu) / inner[j]
    return np.array(wall), np.array(cpu)


def interval(pairs):
    """The 68% interval of the median, from order statistics."""
    pairs, n = np.sort(pairs), len(pairs)
    return pairs[max(0, math.floor(n / 2 - math.sqrt(n) / 2))], pairs[min(n - 1, math.ceil(n / 2 + math.sqrt(n) / 2))]


def spread(wall):
    """The largest relative error of a ratio of the other columns' times to the first's."""
    ratios = [wall[:, j] / wall[:, 0] for j in range(1, wall.shape[1])]
    return max((np.subtract(*interval(pairs)[::-1]) / (2 * np.median(pairs)) for pairs in ratios), default=0.0)


def compilations(config, functions, arguments):
    """Seconds to trace and compile each function, and processor seconds, (n, len(functions)) both, in turns, each time as a new
    function; and the programs of the last time."""

    def once(function, arguments):
        fresh = jax.jit(lambda *arguments: function(*arguments))
        start, start_cpu = time.perf_counter(), time.process_time()
        compiled = fresh.lower(*arguments).compile()
        return time.perf_counter() - start, time.process_time() - start_cpu, compiled

    wall, cpu = np.zeros((2, config.compiles + 1, len(functions)))
    programs: list[Any] = [None] * len(functions)
    for i in range(config.compiles + 1):
        for j in range(len(functions))[:: 1 if i % 2 else -1]:
            wall[i, j], cpu[i, j], programs[j] = once(functions[j], arguments[j])
    return (wall[1:], cpu[1:]), programs


def ratio(name, measured, over, under, **more):
    """The row of a ratio of two columns of what `in_turns` or `compilations` measured."""
    wall, cpu = (seconds[:, [over, under]] for seconds in measured)
    pairs = wall[:, 0] / wall[:, 1]
    extra = {
        "error": short(np.subtract(*interval(pairs)[::-1]) / 2, 2),
        "fastest": short(wall[:, 0].min() / wall[:, 1].min()),
        "cpu": short(cpu[:, 0].sum() / max(cpu[:, 1].sum(), 1e-9)),
        "milliseconds": [short(1e3 * wall[:, i].min()) for i in range(2)],
        "pairs": len(pairs),
        "load": short(os.getloadavg()[0], 2),
    }
    return row(name, float(np.median(pairs)), "ratio", **extra, **more)


def short(value, digits=4):
    """A number of a few significant digits."""
    return float(f"{value:.{digits}g}")


def difference(name, a, b, **more):
    """The row of the largest absolute difference of two results."""
    return row(name, float(np.abs(np.asarray(a) - np.asarray(b)).max()), "max abs difference", **more)


def instructions(compiled):
    """The optimised program's instructions as text, less what depends on where the source stands."""
    lines = [line for line in (compiled.as_text() or "").splitlines() if re.match(r"\s*(ROOT )?%|ENTRY", line)]
    return re.sub(r", metadata=\{[^}]*\}", "", "\n".join(lines))


def program(function, *arguments):
    """The same for a function, less the names."""
    names = {}
    text = instructions(jax.jit(function).lower(*arguments).compile())
    return re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text)


def same_program(name, functions, *arguments):
    """The row that says whether two functions compile to the same program, so that their run times cannot differ."""
    ours, theirs = (program(function, *arguments) for function in functions)
    return row(f"{name}: compiled programs equal", int(ours == theirs), "1 or 0", equal=1)


def torch_threads(torch):
    """Sets PyTorch's number of threads, to one and to its default, and says which.

    Its threads wait for each other at every operation, so on busy cores several are slower than one by far.
    """
    default = torch.get_num_threads()
    for count in (1, default):
        torch.set_num_threads(count)
        yield f"{count} thread{'s' if count > 1 else ''}"
