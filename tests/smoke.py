"""What an installed wheel must do with the core dependencies alone: `make package` runs it in an empty environment.

    python smoke.py README.md

The README's program learns two moons, and whatever needs an extra says which.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import fmjax
from fmjax import checkpoints, couplings, data, export, metrics, pretrained, sampling, training

EXTRAS = {
    "data": data.digits.load,
    "images": lambda: data.pipeline.batches([(0, 0)], 1),
    "metrics": lambda: metrics.wasserstein(jnp.ones((3, 2)), jnp.zeros((3, 2))),
    "couplings": lambda: couplings.sinkhorn(jnp.ones((3, 2)), jnp.zeros((3, 2)), 1.0),
    "tensorboard": lambda: training.tensorboard("runs"),
    "adaptive": lambda: sampling.sample_ode_adaptive(lambda x, t: x, jnp.ones((3, 2))),
    "export": lambda: export.load("sampler.jax"),
}


def main(readme):
    assert Path(fmjax.__file__).is_relative_to(sys.prefix), f"fmjax is imported from {fmjax.__file__}, not from the wheel."
    names = {}
    for program in re.findall(r"```python\n(.*?)```", Path(readme).read_text(), re.DOTALL):
        exec(program, names)
    distance = float(metrics.sliced_wasserstein(jax.random.key(1), names["x_1"], names["data"]))
    assert distance < 0.06, f"The samples are {distance} from the data."
    checkpoints.save("checkpoint", names["state"])
    pretrained.write("points.safetensors", {"x_1": names["x_1"]})
    assert metrics.frechet_distance(pretrained.read("points.safetensors")["x_1"], names["x_1"]) < 1e-6
    for extra, call in EXTRAS.items():
        said = "nothing: the environment is not of the core dependencies alone"
        try:
            call()
        except ImportError as error:
            said = str(error)
        assert f"fmjax[{extra}]" in said, f"Without the extra {extra} the call says {said}."
    print(f"fmjax {fmjax.__version__}: samples {distance:.4f} from the data; {len(EXTRAS)} missing extras named")


if __name__ == "__main__":
    main(*sys.argv[1:])
