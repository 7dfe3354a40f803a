"""What the networks of guided-diffusion, torchcfm and EDM gave: `OFFICIAL=folder python -m official.unets`.

The folder holds the official code in guided-diffusion, conditional-flow-matching and edm.
"""

import os
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

import official

FOLDER = Path(os.environ["OFFICIAL"])
sys.path[:0] = [str(FOLDER / name) for name in ("guided-diffusion", "conditional-flow-matching/torchcfm/models", "edm")]

# What makes its networks by their flags also imports what makes their noise.
sys.modules["guided_diffusion.gaussian_diffusion"] = types.ModuleType("gaussian_diffusion")
sys.modules["guided_diffusion.respace"] = types.SimpleNamespace(SpacedDiffusion=None, space_timesteps=None)
import guided_diffusion

guided_diffusion.gaussian_diffusion = None
from guided_diffusion.script_util import create_classifier, create_model, sr_create_model
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel
from training.networks import DhariwalUNet, EDMPrecond
from unet.unet import UNetModelWrapper

LABELS = np.array([4, 1])
STEPS = np.array([31, 873], np.float32)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def channels_first(x):
    return torch.as_tensor(x).movedim(-1, 1).contiguous()


def write(name, module, shapes, call, **inputs):
    """Runs a network, and saves what it gave, channels last, beside its inputs."""
    with torch.no_grad():
        y = call(module).movedim(1, -1).numpy()
    assert np.abs(y).max() > 0.1
    official.save(f"unets_{name}", shapes, out=y, **inputs)


def adm(name, x, fields, *, network=UNetModel, **inputs):
    """A network of guided-diffusion, which is called with k and what else it takes."""
    model = network(image_size=x.shape[1], num_res_blocks=1, **fields)
    rest = {key: channels_first(value) if key == "low_res" else torch.as_tensor(value) for key, value in inputs.items()}
    write(name, model, official.fill(model), lambda m: m(channels_first(x), torch.as_tensor(STEPS), **rest), x=x, t=STEPS, **inputs)


published = {"use_scale_shift_norm": True, "resblock_updown": True, "num_classes": 5, "in_channels": 3, "out_channels": 6}
square, oblong = drawn(2, 8, 8, 3), drawn(2, 12, 8, 3)
wide = {"model_channels": 64, "channel_mult": (0.5, 1, 1.5), "attention_resolutions": (2, 4), "num_head_channels": 16}
adm("adm", oblong, published | wide, y=LABELS)
adm("adm_new_order", square, published | wide | {"use_new_attention_order": True}, y=LABELS)
plain = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": (2, 3), "num_heads": 4}
adm("adm_plain", oblong, plain | {"attention_resolutions": (1,)})
adm("adm_middle", square, plain | {"attention_resolutions": (16,)})
small = {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,), "num_heads": 2}
adm("adm_upsampler", square, published | small, network=SuperResModel, y=LABELS, low_res=drawn(2, 4, 4, 3, seed=1))

fields = {"use_scale_shift_norm": True, "resblock_updown": True, "pool": "attention", "num_head_channels": 16}
classifier = {"in_channels": 3, "out_channels": 7, "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,)}
adm("classifier", drawn(2, 12, 12, 3), fields | classifier, network=EncoderUNetModel)

times = np.array([0.13, 0.92], np.float32)
for name, x, fields, labels in (
    (
        "cifar10",
        square,
        {"channel_mult": [2, 4], "num_heads": 4, "num_head_channels": 64, "attention_resolutions": "4", "dropout": 0.1},
        None,
    ),
    ("mnist", drawn(2, 28, 28, 1), {"channel_mult": None, "class_cond": True, "num_classes": 5}, LABELS),
):
    model = UNetModelWrapper(dim=(x.shape[-1], *x.shape[1:-1]), num_channels=32, num_res_blocks=1, **fields)
    y = {} if labels is None else {"y": labels}
    rest = {key: torch.as_tensor(value) for key, value in y.items()}
    write(
        name, model, official.fill(model), lambda m, x=x, rest=rest: m(torch.as_tensor(times), channels_first(x), **rest), x=x, t=times, **y
    )

# Its normalisations have fewer groups below 128 channels, and its heads 64 channels.
size = {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}
model = EDMPrecond(8, 3, label_dim=5, model_type=DhariwalUNet.__name__, **size)
filters = [name for name in model.state_dict() if name.endswith("resample_filter")]
shapes = official.fill(model, keep=filters)
state = model.state_dict()
one_hot = torch.nn.functional.one_hot(torch.as_tensor(LABELS), 5).float()
noise = np.log(np.array([0.02, 35.0], np.float32)) / 4
write("edm_adm", model, shapes, lambda m: m.model(channels_first(square), torch.as_tensor(noise), one_hot), x=square, t=noise, y=LABELS)


def checksum(model):
    """Of the names and shapes of a network's tensors, and of the heads of its attention, which are in none."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith("resample_filter")}
    state |= {f"{name}.num_heads": module.num_heads for name, module in model.named_modules() if hasattr(module, "qkv")}
    return zlib.crc32("\n".join(f"{name} {state[name]}" for name in sorted(state)).encode())


# The flags of the README of guided-diffusion, and what the scripts of torchcfm and EDM make their networks with.
flags = {"learn_sigma": True, "use_scale_shift_norm": True, "resblock_updown": True}
imagenet = flags | {"num_res_blocks": 2, "num_channels": 256, "attention_resolutions": "32,16,8", "num_head_channels": 64}
others = {"use_checkpoint": False, "num_heads_upsample": -1, "dropout": 0, "use_fp16": False, "class_cond": True, "num_res_blocks": 2}
upsampler = flags | others | {"small_size": 64, "num_channels": 192, "num_heads": 4}
with torch.device("meta"):
    sizes = {
        "ADM_64": create_model(
            64, class_cond=True, **imagenet | {"num_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True}
        ),
        "ADM_128": create_model(128, class_cond=True, **imagenet | {"num_head_channels": -1, "num_heads": 4}),
        "ADM_256": create_model(256, class_cond=True, **imagenet),
        "ADM_256_unconditional": create_model(256, **imagenet),
        "ADM_512": create_model(512, class_cond=True, **imagenet),
        "ADM_LSUN": create_model(256, dropout=0.1, **imagenet),
        "ADM_64_to_256": sr_create_model(256, attention_resolutions="32,16,8", num_head_channels=-1, **upsampler),
        "ADM_128_to_512": sr_create_model(512, attention_resolutions="32,16", num_head_channels=64, **upsampler),
        "ADM_classifier_64": create_classifier(64, False, 128, 4, "32,16,8", True, True, "attention"),
        "ADM_classifier_128": create_classifier(128, False, 128, 2, "32,16,8", True, True, "attention"),
        "ADM_classifier_256": create_classifier(256, False, 128, 2, "32,16,8", True, True, "attention"),
        "ADM_classifier_512": create_classifier(512, False, 128, 2, "32,16,8", True, True, "attention"),
        "TORCHCFM_CIFAR10": UNetModelWrapper((3, 32, 32), 128, 2, [1, 2, 2, 2], num_heads=4, num_head_channels=64, dropout=0.1),
        "TORCHCFM_MNIST": UNetModelWrapper((1, 28, 28), 32, 1),
        "EDM_ADM_64": DhariwalUNet(64, 3, 3, label_dim=1000),
    }
official.save("unets_sizes", {}, **{name: checksum(model) for name, model in sizes.items()})
