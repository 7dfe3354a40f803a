"""What official networks gave for weights that are drawn from names: tests compare with the files here.

Each module builds the official network in a small size, gives it `weights`, and saves its shapes, inputs and outputs. Only the files it
writes are needed by the tests: no official code is here. `make parity` runs all modules and compares what they write with the files.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("OFFICIAL_RESULTS", Path(__file__).parent))
"""Where files are written and read; `make parity` writes to a folder of its own, and compares."""


def weights(shapes, seed=0):
    """Tensors by name, the same wherever they are drawn; buffers of counts are zeros.

    Matrices keep the size of what they multiply; scales are near 1, running variances above 0, and gates and biases not zero.
    """
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
        drawn = rng.standard_normal(tuple(shape), dtype=np.float32)
        if name.endswith("num_batches_tracked"):
            found[name] = np.zeros(tuple(shape), np.int64)
        elif name.endswith("running_var"):
            found[name] = 1 + 0.5 * np.tanh(drawn)
        elif len(shape) > 1:
            found[name] = drawn / np.float32(np.sqrt(np.prod(shape[1:])))
        elif name.endswith("weight") or name.endswith("gamma"):
            found[name] = 1 + np.float32(0.1) * drawn
        else:
            found[name] = np.float32(0.1) * drawn
    return found


def fill(module, seed=0, keep=()):
    """Gives a PyTorch module the weights, but for buffers whose names are in `keep`, and returns the shapes of all that it was given."""
    import torch

    state = module.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name not in keep}
    drawn = {name: torch.as_tensor(value) for name, value in weights(shapes, seed).items()}
    module.load_state_dict({**{name: state[name] for name in keep if name in state}, **drawn}, strict=True)
    module.eval()
    return shapes


def save(name, shapes, **arrays):
    """Writes <name>.npz."""
    np.savez_compressed(FOLDER / f"{name}.npz", shapes=json.dumps(shapes), **arrays)


def load(name):
    """The weights, by their official names, and the arrays of a file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return weights(json.loads(str(arrays.pop("shapes")))), arrays
