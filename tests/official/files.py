"""Files of tensors by PyTorch, EDM and the package safetensors: `OFFICIAL=folder python -m official.files`.

files_zip.pt and files_legacy.pt are checkpoints of a training; files_module.pkl is a module that is pickled with its source, this file.
"""

import argparse
import os
import pickle
import sys
from pathlib import Path

import numpy as np

import official

SHAPES = {
    **{"layer.weight": (3, 5), "layer.bias": (3,), "low.weight": (4, 6), "brain.weight": (2, 7), "exact.weight": (2, 2)},
    **{"turned.weight": (5, 4), "rows.weight": (3, 4), "none.weight": (0, 3), "one.gamma": (), "norm.num_batches_tracked": ()},
}
DTYPES = {"low.weight": "float16", "brain.weight": "bfloat16", "exact.weight": "float64", "norm.num_batches_tracked": "int64"}
MODULE = {"weight": (2, 3), "count": (), "inner.first.weight": (4, 2), "inner.first.bias": (4,)}


def arrays(seed=0):
    """What a checkpoint holds by names, in float32 where PyTorch had `DTYPES`; two names share their numbers."""
    found = {name: np.float32(value) for name, value in official.weights(SHAPES, seed).items()}
    return found | {"tied.weight": found["layer.weight"]}


if __name__ == "__main__":
    import safetensors.torch
    import torch

    sys.path.insert(0, str(Path(os.environ["OFFICIAL"]) / "edm"))
    from torch_utils import persistence

    def tensors(seed):
        found = {name: torch.as_tensor(x).to(getattr(torch, DTYPES.get(name, "float32"))) for name, x in arrays(seed).items()}
        found["turned.weight"] = found["turned.weight"].T.contiguous().T
        found["rows.weight"] = torch.nn.functional.pad(found["rows.weight"], (2, 3, 1, 0))[1:, 2:6]
        return found | {"tied.weight": found["layer.weight"]}

    class Model(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            for name, value in tensors(seed).items():
                layer, _, kind = name.partition(".")
                if layer not in self._modules:
                    self.add_module(layer, torch.nn.Module())
                self.get_submodule(layer).register_buffer(kind, value)

    def checkpoint():
        trained = torch.nn.Parameter(tensors(0)["layer.bias"])
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        args = argparse.Namespace(model="small", lr=1e-4, betas=(0.9, 0.95))
        return {
            **{"model": Model(0).state_dict() | {"layer.bias": trained}, "ema": Model(1).state_dict(), "opt": optimizer.state_dict()},
            **{"args": args, "epoch": 3, "loss": np.float64(0.5), "size": torch.Size([2]), "device": torch.device("cpu"), "names": {"a"}},
        }

    @persistence.persistent_class
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(4))

    @persistence.persistent_class
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2, 3))
            self.register_parameter("bias", None)
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("passing", torch.ones(2), persistent=False)
            self.inner = torch.nn.ModuleDict({"first": Layer(), "act": torch.nn.SiLU()})

    torch.save(checkpoint(), official.FOLDER / "files_zip.pt")
    torch.save(checkpoint(), official.FOLDER / "files_legacy.pt", _use_new_zipfile_serialization=False)
    network = Network()
    network.load_state_dict({name: torch.as_tensor(value) for name, value in official.weights(MODULE).items()})
    with (official.FOLDER / "files_module.pkl").open("wb") as file:
        pickle.dump({"ema": network, "loss_fn": None, "dataset_kwargs": {"resolution": 32}}, file)
    apart = {name: value.clone().contiguous() for name, value in tensors(0).items()}
    safetensors.torch.save_file(apart, official.FOLDER / "files.safetensors", {"format": "pt"})
