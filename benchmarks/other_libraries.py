"""The programs of docs/guides/from_other_libraries.md, theirs beside ours: a JSON line per library, two minutes on two cores.

    PYTHONPATH=../hackable_diffusion make others ARGS="--out results/other_libraries.jsonl"

hackable_diffusion is on no package index: without a checkout of it on the PYTHONPATH it is left out. The page's blocks of class `theirs`
run in order, in a namespace per library; so do its comments that begin with `theirs`, which call `agree` on what the page says is
the same: `differences` has the largest of each. Every name in the page's tables is looked up. `value` is the sliced Wasserstein distance of
their samples to held-out moons, `ours` that of ours, `moons` that of as many other moons; `seconds` are of one run, with its compilation
and with PyTorch on one thread.
"""

import functools
import os
import pkgutil
import re
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro

import fmjax
from benchmarks import harness
from fmjax import metrics
from fmjax.data import toy

PAGE = harness.ROOT / "docs" / "guides" / "from_other_libraries.md"
THEIRS = r"```{code-block} python\n:class: theirs\n(?P<theirs>.*?)^```$"
BLOCK = re.compile(rf"^```python\n(?P<ours>.*?)^```$|^{THEIRS}|^<!-- theirs\n(?P<same>.*?)^-->$", re.DOTALL | re.MULTILINE)
CHAPTERS = "|".join(module.name for module in pkgutil.iter_modules(fmjax.__path__))
LIBRARIES = {name: name for name in ("flow_matching", "torchcfm", "diffusers")} | {"hackable_diffusion": "hackable_diffusion.hd"}
"""The page's headings, and the modules that have the names in their tables."""


def section(heading):
    """The page's text under a heading."""
    return PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def programs(heading):
    """Every program under a heading and whose it is: ours, theirs, or what is the same in both."""
    return [(str(found.lastgroup), found[str(found.lastgroup)]) for found in BLOCK.finditer(section(heading))]


def names(library):
    """What a library's table names: theirs on the left, ours on the right."""
    for left, right in re.findall(r"^\| (.*) \| (.*) \|$", section(library), re.MULTILINE):
        yield from (f"{LIBRARIES[library]}.{name}" for name in re.findall(r"`([A-Za-z_][\w.]*)", left))
        yield from (f"fmjax.{name}" for name in re.findall(rf"(?<![\w.])((?:{CHAPTERS})(?:\.[A-Za-z_]\w*)+)", right))


def compared(library, config):
    """The row of a library: what its programs draw beside ours, and how far apart the rest is that the page says is the same."""
    differences, seconds = {}, {}

    def agree(name, a, b, rtol=1e-5, atol=1e-5):
        a, b = (np.asarray(each.detach() if hasattr(each, "detach") else each) for each in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=f"{library}: {name}")
        differences[name] = harness.short(float(np.abs(a - b).max()), 2)

    ours: dict[str, Any] = {"__name__": "__main__"}
    theirs: dict[str, Any] = {"agree": agree}
    in_torch = library != "hackable_diffusion"
    for whose, code in [each for each in programs("Here") if in_torch or each[0] == "ours"] + programs(library):
        # Theirs begin with what ours have; the names that they give stay theirs.
        theirs.update({name: ours[name] for name in ours.keys() - theirs.keys()})
        space = ours if whose == "ours" else theirs
        before, began = space.get("samples"), time.perf_counter()
        exec(compile(code, f"{PAGE.name}, {library}, {whose}", "exec"), space)
        if space.get("samples") is not before:
            jax.block_until_ready(space["samples"])
            seconds[whose] = harness.short(time.perf_counter() - began, 3)
    for name in names(library):
        pkgutil.resolve_name(name)
    held_out, moons = (toy.moons(jax.random.key(seed), 2_000) for seed in (4, 6))
    drawn = {"theirs": theirs["samples"], "ours": ours["samples"], "moons": moons}
    far = {name: float(metrics.sliced_wasserstein(jax.random.key(5), held_out, np.asarray(x))) for name, x in drawn.items()}
    more: dict[str, Any] = {name: harness.short(far[name]) for name in ("ours", "moons")}
    more |= {"seconds": seconds, "load": harness.short(os.getloadavg()[0], 2), "differences": differences}
    if not in_torch:
        command = ("git", "-C", theirs["hd"].__file__.rsplit("/", 2)[0], "rev-parse", "--short", "HEAD")
        more["checkout"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    packages = ("torch", library) if in_torch else ()
    yield harness.row(f"{library}: samples of moons", far["theirs"], "sliced Wasserstein distance", **more, packages=packages)


def main(config: harness.Config):
    # On a machine that others use, threads of PyTorch that wait for each other make it twenty times slower than one alone.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    harness.start()
    parts = {functools.partial(compared, library): (library,) for library in LIBRARIES}
    for part, (library,) in parts.items():
        vars(part)["__name__"] = library
    harness.report(config, harness.chosen(config, [], parts, target="others"))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(harness.Config, prog="python -m benchmarks.other_libraries")))
