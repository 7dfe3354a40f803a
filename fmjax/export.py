"""Export: a sampler in one file, for machines that have JAX and none of its models (`pip install "fmjax[export]"`).

    sample = lambda x_0: sampling.sample_ode(lambda x, t: model.apply(params, x, t), x_0, grid)[0]
    export.save("sampler.jax", sample, x_0)
    x_1 = export.load("sampler.jax")(x_0)

The file holds StableHLO with the parameters, the grid and the guidance inside, for any size of the batch (`jax.export`), and its
SHA-256. Without fmjax it is loaded by `jax.export.deserialize(Path("sampler.jax").read_bytes()).call(x_0)`.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from fmjax import files

__all__ = ["save", "load"]

SEAL = b"fmjax sha256"
"""Before the digest at the end of a file."""
SEALED = len(SEAL) + 32


def save(file, function, *examples, platforms=("cpu", "cuda", "tpu")) -> None:
    """Writes a function of arrays to a file, its batch of any size.

    Args:
      file: where to; its folder is made.
      function: of arrays; random draws from an integer seed, as `jax.random.key(seed)` inside, since typed keys cannot be written.
      examples: what it is called with, or shapes (`jax.ShapeDtypeStruct`): the first axis of each array is the batch, a scalar has none.
      platforms: what it is compiled for where it is loaded.
    Raises:
      ModuleNotFoundError: if flatbuffers is not installed.
      TypeError: if an argument is a typed key.
    """
    exporting = _exporting()
    (batch,) = exporting.symbolic_shape("batch")
    specs = []
    for example in examples:
        shape, dtype = jnp.shape(example), jnp.result_type(example)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise TypeError("A typed key cannot be an argument of an exported function: take an integer seed and make the key inside.")
        specs.append(jax.ShapeDtypeStruct((batch, *shape[1:]) if shape else (), dtype))
    written = exporting.export(jax.jit(function), platforms=platforms)(*specs).serialize()
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as part:
        # What follows a program is not read with it.
        part.write_bytes(bytes(written) + SEAL + hashlib.sha256(written).digest())


def load(file) -> Callable:
    """The function that `save` wrote.

    Args:
      file: where it is.
    Returns:
      A function of arrays, compiled for this machine at its first call.
    Raises:
      ModuleNotFoundError: if flatbuffers is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not as `save` wrote it.
    """
    exporting, file = _exporting(), Path(file)
    content = file.read_bytes()
    written, seal, digest = content[:-SEALED], content[-SEALED : len(SEAL) - SEALED], content[len(SEAL) - SEALED :]
    # A damaged program is not for the reader, which may end the process.
    if seal != SEAL or hashlib.sha256(written).digest() != digest:
        raise ValueError(f"{file} is not an exported function as export.save wrote it: it is damaged or something else. Export it again.")
    exported = exporting.deserialize(bytearray(written))
    return jax.jit(exported.call)


def _exporting():
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError('Exported programs are written with flatbuffers, which is not installed: pip install "fmjax[export]".')
    from jax import export

    return export
