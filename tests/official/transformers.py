"""What DiT, SiT and JiT gave, and runs of their samplers: `OFFICIAL=folder python -m official.transformers`.

The folder holds the official code in DiT, SiT and JiT. Their networks of classes are guided as their samplers do.
"""

import contextlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np

import official

LABELS, STEPS, JIT_STEPS = np.array([1, 3]), 50, 10


@contextlib.contextmanager
def source(name):
    """The modules of one of the folders."""
    before = set(sys.modules)
    sys.path.insert(0, str(Path(os.environ["OFFICIAL"]) / name))
    try:
        yield
    finally:
        sys.path.pop(0)
        for module in set(sys.modules) - before:
            if module.split(".")[0] in ("models", "diffusion", "transport", "model_jit", "util", "denoiser", "torchdiffeq"):
                del sys.modules[module]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def channels_first(x):
    import torch

    return torch.as_tensor(x).movedim(-1, 1).contiguous()


def channels_last(x):
    return x.detach().movedim(1, -1).contiguous().numpy()


def forward(model, x, t, y):
    import torch

    with torch.no_grad():
        return channels_last(model(channels_first(x), torch.as_tensor(t), torch.as_tensor(y)))


def dit():
    import torch

    with source("DiT"):
        from diffusion import create_diffusion
        from models import DiT

        # An unusual width, and a larger image.
        wide = DiT(input_size=12, patch_size=4, hidden_size=72, depth=2, num_heads=6, num_classes=5)
        official.save(
            "dit_wide",
            official.fill(wide, keep=("pos_embed",)),
            y=forward(wide, drawn(2, 12, 12, 4), np.array([999.0, 0.0], np.float32), LABELS),
        )
        model = DiT(input_size=8, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=5)
        shapes = official.fill(model, keep=("pos_embed",))
        shapes["pos_embed"] = list(model.pos_embed.shape)
        y = forward(model, drawn(2, 8, 8, 4), np.array([731.0, 4.0], np.float32), LABELS)
        diffusion = create_diffusion("250")
        noises = iter(drawn(250, 2, 8, 8, 4, seed=1))
        torch.randn_like = lambda x: torch.cat([channels_first(next(noises))] * 2)
        x = torch.cat([channels_first(drawn(2, 8, 8, 4, seed=2))] * 2)
        arguments = {"y": torch.as_tensor(np.append(LABELS, [5, 5])), "cfg_scale": 1.5}
        sampled = diffusion.p_sample_loop(model.forward_with_cfg, x.shape, x, clip_denoised=False, model_kwargs=arguments, device="cpu")
        official.save("dit", shapes, y=y, ddpm=channels_last(sampled[:2]))


def sit():
    import torch

    with source("SiT"):
        from models import SiT

        model = SiT(input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=5)
        shapes = official.fill(model, keep=("pos_embed",))
        y = forward(model, drawn(2, 8, 8, 4), np.array([0.3, 0.9], np.float32), LABELS)
        # Its Euler: the states of a grid of so many points.
        x = torch.cat([channels_first(drawn(2, 8, 8, 4, seed=2))] * 2)
        labels, times = torch.as_tensor(np.append(LABELS, [5, 5])), np.linspace(0, 1, STEPS + 1, dtype=np.float32)
        with torch.no_grad():
            for t, s in itertools.pairwise(times):
                x = x + float(s - t) * model.forward_with_cfg(x, torch.full((4,), float(t)), labels, 4.0)
        official.save("sit", shapes, y=y, euler=channels_last(x[:2]))


def jit():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import types

    import torch

    with source("JiT"):
        from denoiser import Denoiser
        from model_jit import JiT

        model = JiT(
            input_size=24,
            patch_size=4,
            hidden_size=96,
            depth=3,
            num_heads=4,
            num_classes=5,
            bottleneck_dim=20,
            in_context_len=5,
            in_context_start=1,
        )
        shapes = official.fill(model, keep=("pos_embed",))
        x = drawn(2, 24, 24, 3)
        y = forward(model, x, np.array([0.3, 0.9], np.float32), LABELS)
        # Its sampler with this network, whose class makes a published one.
        settings = {"num_classes": 5, "t_eps": 0.05, "noise_scale": 2.0, "method": "heun", "steps": JIT_STEPS, "cfg_scale": 2.9}
        denoiser = types.SimpleNamespace(net=model, img_size=24, data_channels=3, cfg_interval=(0.1, 1.0), **settings)
        for name in ("_forward_sample", "_euler_step", "_heun_step"):
            setattr(denoiser, name, types.MethodType(getattr(Denoiser, name), denoiser))
        torch.randn = lambda *shape, device: channels_first(drawn(2, 24, 24, 3, seed=2))
        heun = channels_last(Denoiser.generate(denoiser, torch.as_tensor(LABELS)))
        official.save("jit", shapes, y=y, heun=heun)


if __name__ == "__main__":
    dit()
    sit()
    jit()
