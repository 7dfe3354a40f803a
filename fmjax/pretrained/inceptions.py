"""The published weights of `models.inception`, whose features Frechet distances are of    (Heusel et al. 2017, arXiv:1706.08500).

pytorch-fid and torch-fidelity give the weights of TensorFlow's graph of 2015-12-05 by the same names, in
`pt_inception-2015-12-05-6726825d.pth` and `weights-inception-2015-12-05-6726825d.pth`.
"""

import chex
import jax
import jax.numpy as jnp

from fmjax.models.inception import Inception
from fmjax.pretrained import layouts

__all__ = ["inception"]

_NETWORK = Inception()
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def inception(tensors, model=_NETWORK) -> chex.ArrayTree:
    """The parameters that a file of the Inception network holds.

    Args:
      tensors: by name, as the file has them; the counts of batches beside the statistics are left out.
      model: the network, of any dtype.
    Returns:
      {"params": ...}, float32.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite; it is named. torchvision's own Inception is another
        network, of 1000 classes.
    """
    shapes = _shapes(model)
    return layouts.from_tensors(_rows(shapes), shapes, tensors, ignore=lambda name: name.endswith(".num_batches_tracked"))


def _shapes(model):
    return layouts.shapes_of(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8))


def _rows(paths):
    """Which tensor of the file each parameter is: `Mixed_5b/branch1x1/conv/kernel` is `Mixed_5b.branch1x1.conv.weight`."""
    found = [*layouts.layer("fc", "fc", bias=False), layouts.Row(("fc_bias",), "fc.bias", layouts.same)]
    for path in paths:
        *parts, leaf = path
        if leaf == "kernel" and parts != ["fc"]:
            found.append(layouts.Row(path, ".".join([*parts, "weight"]), layouts.convolution))
        elif leaf in _NORM:
            found.append(layouts.Row(path, ".".join([*parts, "bn", _NORM[leaf]]), layouts.same))
    return found
