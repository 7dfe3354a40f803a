"""The Inception network of torch-fidelity and pytorch-fid, and the resizings of torch-fidelity, clean-fid and guided-diffusion.

`PYTHONPATH=tests OFFICIAL=<folder with guided-diffusion in it> python -m official.inception`
"""

import os
import sys
import tempfile
from unittest import mock

import numpy as np

import official


def gained(tensors):
    """The weights, with convolutions that keep the size of what they get from a ReLU: else its last layers hardly see the images."""
    gain = np.float32(np.sqrt(2))
    return {name: value * gain if value.ndim == 4 else value for name, value in tensors.items()}


def make():
    import torch
    from pytorch_fid import inception as pytorch_fid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["768", "2048", "logits_unbiased", "logits"]
    with tempfile.NamedTemporaryFile() as file:
        torch.save({}, file.name)
        with mock.patch.object(torch.nn.Module, "load_state_dict"):
            network = FeatureExtractorInceptionV3("inception", names, file.name)
    shapes = official.fill(network)
    state = {name: torch.as_tensor(value) for name, value in gained(official.weights(shapes)).items()}
    network.load_state_dict(state, strict=True)
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url", return_value=state):
        other = pytorch_fid.InceptionV3(resize_input=False, normalize_input=False).eval()

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), np.uint8)
    # Smooth, unlike the first.
    images[1] = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).round()
    x = torch.as_tensor(images).permute(0, 3, 1, 2)
    inside = {}

    def keep(name):
        return lambda module, given, out: inside.__setitem__(name, out)

    network.Conv2d_1a_3x3.conv.register_forward_pre_hook(lambda module, given: inside.__setitem__("preprocessed", given[0]))
    network.Mixed_6d.branch1x1.register_forward_hook(keep("spatial"))
    with torch.no_grad():
        found = dict(zip(names, network(x), strict=True))
        (pool,) = other(inside["preprocessed"])
    official.save(
        "inception",
        shapes,
        images=images,
        mixed_6e=found["768"].numpy(),
        features=found["2048"].numpy(),
        spatial=inside["spatial"][:, :7].permute(0, 2, 3, 1).reshape(2, -1).numpy(),
        logits=found["logits"].numpy(),
        logits_unbiased=found["logits_unbiased"].numpy(),
        pytorch_fid=pool[..., 0, 0].numpy(),
    )


def resizings():
    import torch
    from cleanfid.resize import make_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    sys.modules |= {"blobfile": mock.Mock(), "mpi4py": mock.Mock()}
    sys.path.insert(0, f"{os.environ['OFFICIAL']}/guided-diffusion")
    from guided_diffusion.image_datasets import center_crop_arr
    from PIL import Image

    arrays = {}
    rng = np.random.default_rng(0)
    # Up, down, and one side of each; the last to the size it has.
    for i, (before, after) in enumerate([((5, 7), (13, 29)), ((40, 33), (17, 9)), ((12, 30), (31, 11)), ((10, 12), (10, 12))]):
        images = rng.integers(0, 256, (2, *before, 3), np.uint8)
        arrays[f"images_{i}"] = images
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float()
        arrays[f"tensorflow_{i}"] = interpolate_bilinear_2d_like_tensorflow1x(x, after, align_corners=False).permute(0, 2, 3, 1).numpy()
        clean = make_resizer("PIL", False, "bicubic", after[::-1])
        arrays[f"clean_{i}"] = np.stack([clean(image) for image in images])
    for i, (height, width, size) in enumerate([(70, 53, 16), (33, 64, 16), (20, 31, 24), (16, 16, 16), (25, 17, 16)]):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        arrays[f"uncropped_{i}"] = image
        arrays[f"cropped_{i}"] = center_crop_arr(Image.fromarray(image), size)
    official.save("resize", {}, **arrays)


if __name__ == "__main__":
    make()
    resizings()
