"""Flow matching and diffusion models as pure functions in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING

from fmjax import betas, bridges, flow_maps, guidance, inverse, likelihood, losses, marginals, paths, sampling, states, targets, times

if TYPE_CHECKING:
    from fmjax import checkpoints, couplings, data, export, metrics, models, parallel, plots, pretrained, training

__version__ = "0.1.0"

__all__ = [
    "betas",
    "bridges",
    "checkpoints",
    "couplings",
    "data",
    "export",
    "flow_maps",
    "guidance",
    "inverse",
    "likelihood",
    "losses",
    "marginals",
    "metrics",
    "models",
    "parallel",
    "paths",
    "plots",
    "pretrained",
    "sampling",
    "states",
    "targets",
    "times",
    "training",
]


def __getattr__(name):
    # Chapters that import flax, optax, orbax or NumPy's friends are imported when they are first asked for.
    if name in __all__:
        return importlib.import_module(f"fmjax.{name}")
    raise AttributeError(f"fmjax has no chapter {name!r}: the chapters are {', '.join(__all__)}.")


def __dir__():
    return [*__all__, "__version__"]
