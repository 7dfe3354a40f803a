"""Export: a sampler in one file, for machines that have JAX and none of its models (`pip install "fmjax[export]"`).

    sample = lambda x_0: sampling.sample_ode(lambda x, t: model.apply(params, x, t), x_0, grid)[0]
    export.save("sampler.jax", sample, x_0)
    x_1 = export.load("sampler.jax")(x_0)

The file holds StableHLO with the parameters, the grid and the guidance inside, for any size of the batch (`jax.export`). Without
fmjax it is loaded by `jax.export.deserialize(Path("sampler.jax").read_bytes()).call(x_0)`.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp


def save(file, function, *examples, platforms=("cpu", "cuda", "tpu")):
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
    part = file.with_name(file.name + ".part")
    part.write_bytes(written)
    part.replace(file)


def load(file):
    """The function that `save` wrote.

    Args:
      file: where it is.
    Returns:
      A function of arrays, compiled for this machine at its first call.
    Raises:
      ModuleNotFoundError: if flatbuffers is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not one that `save` wrote whole.
    """
    exporting, file = _exporting(), Path(file)
    content = bytearray(file.read_bytes())
    try:
        exported = exporting.deserialize(content)
    except Exception as error:
        raise ValueError(f"{file} is not an exported function, or not all of it: export it again.") from error
    return jax.jit(exported.call)


def _exporting():
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError('Exported programs are written with flatbuffers, which is not installed: pip install "fmjax[export]".')
    from jax import export

    return export
