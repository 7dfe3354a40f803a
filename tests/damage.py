"""Damages files of checkpoints and exported samplers, one fault at a time, and says what reading them makes of it.

python -m tests.damage --count 1000        every fault is named or harmless; it fails if one is silently wrong
"""

import argparse
import collections
import dataclasses
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import checkpoints, export, training
from fmjax.checkpoints import folders

PAGE = 4096
ADAM, KEY = optax.adam(1e-3), jax.random.key(3)


def delete(content, rng):
    return None


def truncate(content, rng):
    return content[: rng.randrange(len(content))]


def flip(content, rng):
    """One bit."""
    at = rng.randrange(8 * len(content))
    return content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :]


def swap(content, rng):
    """Two pages, or two spans of a file of fewer."""
    size = min(PAGE, len(content) // 2)
    first, second = sorted(rng.sample(range(len(content) // size), 2))
    first, second = (slice(size * each, size * (each + 1)) for each in (first, second))
    changed = bytearray(content)
    changed[first], changed[second] = content[second], content[first]
    return bytes(changed)


def zero(content, rng):
    """A page, or as much as there is."""
    size = min(PAGE, len(content))
    start = size * rng.randrange(len(content) // size)
    return content[:start] + bytes(size) + content[start + size :]


FAULTS = [delete, truncate, flip, swap, zero]


def state(step):
    """A state in which every leaf is another number at every step."""
    random = np.random.default_rng(step)
    params = {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(7), "scale": jnp.zeros((), jnp.bfloat16)}
    leaves, tree = jax.tree.flatten(training.init(params, ADAM))
    made = tree.unflatten([jnp.asarray(random.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])
    return dataclasses.replace(made, step=jnp.int32(step))


def run(step):
    history = tuple({"step": each, "loss": 1 / each} for each in range(1, step + 1))
    return training.Run(state(step), KEY, {"next_index": 16 * step}, history, ({"loss": 0.1},))


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(*([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)), strict=True)
    )


class Steps:
    """Three checkpoints of a run, the last of which it goes on from."""

    def write(self, folder):
        with checkpoints.Checkpointer(folder) as checkpointer:
            for step in (1, 2, 3):
                checkpointer.save(run(step), wait=True)

    def read(self, folder, file):
        damaged = file.relative_to(folder).parts[0]
        with checkpoints.Checkpointer(folder) as checkpointer, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = checkpointer.resume(training.Run(state(0), KEY))
        step = int(found.state.step)
        whole = step > 0 and same(found.state, run(step).state)
        beside = dataclasses.replace(found, state=None) == dataclasses.replace(run(step), state=None, key=found.key)
        named = any(f"{folder}/{damaged} is damaged" in str(each.message) for each in said)
        if whole and beside and (step == 3 or (named and step == 2)):
            return "named" if named else "harmless"
        return "silently wrong"


class One:
    """A single checkpoint."""

    def write(self, folder):
        checkpoints.save(folder, state(1))

    def read(self, folder, file):
        try:
            return "harmless" if same(checkpoints.restore(folder, state(0)), state(1)) else "silently wrong"
        except checkpoints.CorruptCheckpoint as error:
            return "named" if str(folder) in str(error) else "obscure"


class Exported:
    """An exported sampler."""

    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

    @staticmethod
    def function(x):
        return jnp.tanh(x @ jnp.arange(9.0).reshape(3, 3) / 7) + 0.1

    def write(self, folder):
        export.save(folder / "sampler.jax", self.function, self.x, platforms=("cpu",))

    def read(self, folder, file):
        try:
            return "harmless" if np.allclose(export.load(file)(self.x), self.function(self.x)) else "silently wrong"
        except (ValueError, FileNotFoundError) as error:
            return "named" if str(file) in str(error) else "obscure"


def measure(count, seed=0):
    """Outcomes of so many faults, by what they were done to, counted."""
    rng, outcomes = random.Random(seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as root:
        kinds = [Steps(), One(), Exported()]
        for kind in kinds:
            (Path(root) / type(kind).__name__).mkdir()
            kind.write(Path(root) / type(kind).__name__)
        for number in range(count):
            kind, fault = kinds[number % len(kinds)], FAULTS[number // len(kinds) % len(FAULTS)]
            folder = Path(root) / "damaged"
            shutil.copytree(Path(root) / type(kind).__name__, folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1)
            last = [path for path in files if path.is_relative_to(folder / "3")] or files
            while True:
                # Any file; of the last checkpoint the largest, where the arrays are; and that in which the rest stands.
                largest = max(last, key=lambda path: path.stat().st_size)
                file = rng.choice([rng.choice(files), largest, *[path for path in last if path.name == folders.INDEX]])
                content = file.read_bytes()
                changed = fault(content, rng)
                if changed != content:
                    break
            if changed is None:
                file.unlink()
            else:
                file.write_bytes(changed)
            outcomes[f"{type(kind).__name__}, {fault.__name__}"][kind.read(folder, file)] += 1
            shutil.rmtree(folder)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Damages checkpoints and exported samplers, and counts what is said of it.")
    parser.add_argument("--count", type=int, default=1000, help="How many faults.")
    parser.add_argument("--seed", type=int, default=0, help="Of their choice.")
    given = parser.parse_args()
    total = collections.Counter()
    for name, counts in sorted(measure(given.count, given.seed).items()):
        print(f"{name:24} {dict(counts)}")
        total += counts
    print(f"{'in all':24} {dict(total)}")
    sys.exit(bool(total["silently wrong"] + total["obscure"]))
