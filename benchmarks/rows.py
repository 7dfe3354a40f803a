"""Rows of the benchmarks: what a line says, and how it is measured.

A timing is a ratio of two programs that ran in turns (A B, B A, ...) in the same process, so that what slows the machine
down slows both. It is taken in rounds. Before each, small programs are compiled anew and their arguments copied, because
where memory happens to lie decides several percent, for as long as it lies there: equal programs have read 1.05 in one
process and .95 in the next. A round's ratio is the median of its pairs of runs, the row's the median of its rounds;
`error` is half the width of that median's 68% interval, from order statistics; `fastest` is the ratio of the shortest
times, whose `milliseconds` stand beside it; `cpu` is the ratio of processor seconds of this process; `load` is the
machine's, and above its number of cores the wall clock of any one row means little. A row with a `goal` says whether it
was `met`; where two programs compile to the same instructions, a row beside it says so.
"""

import functools
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

import jax
import jax.numpy as jnp
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


def fresh(function, *arguments):
    """A call of the function, compiled anew, on copies of its arguments."""
    return functools.partial(jax.jit(lambda *arguments: function(*arguments)), *jax.tree.map(jnp.copy, arguments))


def each(functions, *arguments):
    """What `in_turns` takes, for functions of the same arguments."""
    return [functools.partial(fresh, function, *arguments) for function in functions]


def results(makers):
    """What the calls return."""
    return [np.asarray(make()()) for make in makers]


def in_turns(config, makers, least=3e-3):
    """Seconds of the calls, and processor seconds, (rounds, pairs, calls) both; a maker takes nothing and gives a call.

    A round makes the calls anew, in this order and in the reverse by turns, and runs them A B, B A, A B ... Short calls are
    repeated within a turn for at least `least` seconds, after one that is not counted. The pause lets the other library's
    threads, which spin for a moment after their work, go to sleep. There are `repeats` rounds, and more where they still
    scatter, until ten times `seconds` have passed.
    """

    def made(backwards):
        calls = [make() for make in makers[:: -1 if backwards else 1]]
        for call in calls:
            jax.block_until_ready(call())
        return calls[:: -1 if backwards else 1]

    def timed(call, count):
        if count > 1:  # The first call after a pause finds cold caches; a long one does not notice.
            jax.block_until_ready(call())
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            jax.block_until_ready(call())
        return (time.perf_counter() - start) / count, (time.process_time() - start_cpu) / count

    start = time.perf_counter()
    calls = made(False)
    making = time.perf_counter() - start
    single = [min(timed(call, 1)[0] for _ in range(3)) for call in calls]
    inner = [math.ceil(least / seconds) for seconds in single]
    turn = sum(count * seconds for count, seconds in zip(inner, single, strict=True))
    # As long as the making at least, or most of the time would go into it.
    pairs = max(2, 2 * round(max(config.seconds / config.repeats, min(making, config.seconds)) / (2 * turn)))

    rounds, began = [], time.perf_counter()
    while len(rounds) < 2 or (
        time.perf_counter() - began < 10 * config.seconds
        and (len(rounds) < config.repeats or spread(np.array(rounds)[..., 0]) > config.precision)
    ):
        calls = made(len(rounds) % 2)
        rounds.append(np.zeros((pairs, len(calls), 2)))
        for i in range(pairs):
            for j in range(len(calls))[:: -1 if i % 2 else 1]:
                time.sleep(2e-3)
                rounds[-1][i, j] = timed(calls[j], inner[j])
    return np.moveaxis(np.array(rounds), -1, 0)


def interval(values):
    """The 68% interval of the median, from order statistics."""
    values, n = np.sort(values), len(values)
    return values[max(0, math.floor(n / 2 - math.sqrt(n) / 2))], values[min(n - 1, math.ceil(n / 2 + math.sqrt(n) / 2))]


def spread(wall):
    """The largest relative error of a ratio of the other calls' times to the first's."""
    rounds = np.median(wall[..., 1:] / wall[..., :1], axis=1)
    return max((np.subtract(*interval(ratios)[::-1]) / (2 * np.median(ratios)) for ratios in rounds.T), default=0.0)


def compilations(config, functions, arguments, most=5):
    """Seconds to trace and compile each function, and processor seconds, (n, 1, functions) both, in turns, each time as a new
    function; and the programs of the last time. n is `compiles`, and up to `most` times as many while the ratios scatter by more
    than 5%, or than `precision` where that is coarser."""

    def once(function, arguments):
        fresh = jax.jit(lambda *arguments: function(*arguments))
        start, start_cpu = time.perf_counter(), time.process_time()
        compiled = fresh.lower(*arguments).compile()
        return (time.perf_counter() - start, time.process_time() - start_cpu), compiled

    rounds, programs = [], []
    while (
        len(rounds) <= config.compiles
        or (
            len(rounds) <= most * config.compiles  # The first is not counted.
            and spread(np.array(rounds)[1:, None, :, 0]) > max(0.05, config.precision)
        )
    ):
        order = range(len(functions))[:: -1 if len(rounds) % 2 else 1]
        found = {j: once(functions[j], arguments[j]) for j in order}
        rounds.append([found[j][0] for j in range(len(functions))])
        programs = [found[j][1] for j in range(len(functions))]
    return np.moveaxis(np.array(rounds)[1:, None], -1, 0), programs


def ratio(name, measured, over, under, **more):
    """The row of a ratio of two of the calls that `in_turns` or `compilations` measured."""
    wall, cpu = (seconds[..., [over, under]] for seconds in measured)
    rounds = np.median(wall[..., 0] / wall[..., 1], axis=1)
    extra = {
        "error": short(np.subtract(*interval(rounds)[::-1]) / 2, 2),
        "fastest": short(wall[..., 0].min() / wall[..., 1].min()),
        "cpu": short(cpu[..., 0].sum() / max(cpu[..., 1].sum(), 1e-9)),
        "milliseconds": [short(1e3 * wall[..., i].min()) for i in range(2)],
        "rounds": len(rounds),
        "pairs": wall.shape[0] * wall.shape[1],
        "load": short(os.getloadavg()[0], 2),
    }
    return row(name, float(np.median(rounds)), "ratio", **extra, **more)


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
