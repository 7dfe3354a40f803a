"""Runs every module here and compares what it writes with what is committed: `make parity OFFICIAL=folder`.

The folder holds the official code by the names of its repositories: DiT, SiT, JiT, guided-diffusion, edm, conditional-flow-matching,
latent-diffusion, dinov2 and dgm-eval. Nothing that is committed changes; `python -m official.NAME` alone writes it anew.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

COMMITTED = Path(__file__).parent
MODULES = sorted(file.stem for file in COMMITTED.glob("[!_]*.py"))
TOLERANCE = 1e-5
"""Of the largest number of an array: another processor rounds otherwise."""


def contents(file):
    """Arrays by name, of files whose bytes depend on more; else the bytes, but for addresses in memory."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if file.suffix == ".pt":
        import torch

        return {name: tensor.float().numpy() for name, tensor in torch.load(file, weights_only=False)["ema"].items()}
    return {"bytes": np.frombuffer(re.sub(rb"\d{8,}", b"", file.read_bytes()), np.uint8)}


def difference(fresh, committed):
    """The largest one, of the largest number; of what are no floats, infinity for any."""
    if fresh.shape != committed.shape or fresh.dtype != committed.dtype:
        return np.inf
    if committed.dtype.kind != "f" or not committed.size:
        return 0.0 if np.array_equal(fresh, committed) else np.inf
    scale = np.abs(committed).max()
    return float(np.abs(fresh.astype(np.float64) - committed).max() / (scale if scale else 1))


def compare(folder):
    """Prints a line per file; whether all are as committed."""
    names = {file.name for of in (folder, COMMITTED) for file in of.iterdir() if file.suffix in (".npz", ".pt", ".pkl", ".safetensors")}
    largest = 0.0
    for name in sorted(names):
        if not all((of / name).exists() for of in (folder, COMMITTED)):
            print(f"{name:32} is {'not committed' if (folder / name).exists() else 'not written'}")
            largest = np.inf
            continue
        fresh, committed = contents(folder / name), contents(COMMITTED / name)
        found = {key: difference(fresh[key], committed[key]) if key in fresh and key in committed else np.inf for key in fresh | committed}
        worst = max(found, key=found.__getitem__)
        print(f"{name:32} {len(found):3} arrays, largest difference {found[worst]:.1e} ({worst})")
        largest = max(largest, found[worst])
    return largest <= TOLERANCE


def main():
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OFFICIAL_RESULTS": folder, "PYTHONPATH": str(COMMITTED.parent)}
        for module in MODULES:
            print(f"official.{module}", flush=True)
            subprocess.run([sys.executable, "-m", f"official.{module}"], env=environment, stdout=subprocess.DEVNULL, check=True)
        if not compare(Path(folder)):
            sys.exit(f"Some differ by more than {TOLERANCE:g}.")


if __name__ == "__main__":
    if not os.environ.get("OFFICIAL"):
        sys.exit("OFFICIAL is not set: give the folder of the official code, make parity OFFICIAL=folder.")
    main()
