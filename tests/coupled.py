"""One of two processes that pair a batch, of which each holds half: `python coupled.py index port folder`."""

import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

from fmjax import couplings, parallel


def main(index, port, folder):
    parallel.initialize(f"localhost:{port}", 2, int(index))
    sharding = parallel.batch_sharding(parallel.mesh())
    with np.load(f"{folder}/given.npz") as given:
        arrays = {name: given[name] for name in given.files}
    x_0, x_1, y = (jax.make_array_from_callback(each.shape, sharding, lambda part, each=each: each[part]) for each in arrays.values())
    np.savez(f"{folder}/{index}.npz", plain=couplings.optimal(x_0, x_1), labels=couplings.optimal(x_0, x_1, y=y))


if __name__ == "__main__":
    main(*sys.argv[1:])
