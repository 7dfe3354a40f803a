"""Diffusers' AutoencoderKL by its names of today and of its first versions, and the encoder and decoder of the paper's code.

Needs diffusers, einops, and https://github.com/CompVis/latent-diffusion as $OFFICIAL/latent-diffusion.
"""

import os
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

import official

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


class CompVis(torch.nn.Module):
    """The two networks of the paper's code with its two layers between; its module for training needs a package for that."""

    def __init__(self, latent_channels=4, **sizes):
        from ldm.modules.diffusionmodules import model

        super().__init__()
        sizes |= {"out_ch": 3, "in_channels": 3, "z_channels": latent_channels, "attn_resolutions": [], "resolution": 32, "double_z": True}
        self.encoder, self.decoder = model.Encoder(**sizes), model.Decoder(**sizes)
        self.quant_conv = torch.nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = torch.nn.Conv2d(latent_channels, latent_channels, 1)

    def moments(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def kl(channels, **settings):
    levels = len(channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(block_out_channels=channels, norm_num_groups=32, **blocks, **settings).eval()


def run(moments, decode, sizes, factor, latent_channels=4):
    """What a network gives for images, and for latents, of these sizes."""
    arrays = {}
    for i, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(i)
        x = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
        z = rng.standard_normal((1, height // factor, width // factor, latent_channels), dtype=np.float32)
        with torch.no_grad():
            mean, log_variance = moments(torch.as_tensor(x).permute(0, 3, 1, 2)).chunk(2, dim=1)
            image = decode(torch.as_tensor(z).permute(0, 3, 1, 2))
        outputs = {"mean": mean, "log_variance": log_variance.clamp(-30, 20), "image": image}
        arrays |= {f"x_{i}": x, f"z_{i}": z}
        arrays |= {f"{name}_{i}": value.permute(0, 2, 3, 1).numpy() for name, value in outputs.items()}
    return arrays


def run_kl(network, sizes, factor, **settings):
    return run(lambda x: network.encode(x).latent_dist.parameters, lambda z: network.decode(z).sample, sizes, factor, **settings)


def main():
    network = kl((32, 64, 96), layers_per_block=2)
    official.save("autoencoder", official.fill(network), **run_kl(network, [(32, 48), (64, 64)], 4))

    # As Stable Diffusion 3 has it.
    network = kl((32, 64), layers_per_block=1, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    official.save("autoencoder_16", official.fill(network), **run_kl(network, [(16, 24)], 2, latent_channels=16))

    network = kl((32, 64), layers_per_block=1)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in [name for name in shapes if "attentions" in name]:
        for new, old in OLDER.items():
            if f".{new}." in name:
                shapes[name.replace(f".{new}.", f".{old}.")] = shapes.pop(name)
    state = {name: torch.as_tensor(value) for name, value in official.weights(shapes).items()}
    # Diffusers' own reading of the names of its first versions.
    network._fix_state_dict_keys_on_load(state)
    network.load_state_dict(state, strict=True)
    official.save("autoencoder_older", shapes, **run_kl(network, [(16, 24)], 2))

    sys.path.insert(0, os.path.join(os.environ["OFFICIAL"], "latent-diffusion"))
    network = CompVis(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1)
    shapes = official.fill(network)
    arrays = run(network.moments, network.decode, [(16, 24)], 4)
    official.save("autoencoder_compvis", shapes, **arrays)
    # Diffusers reads these names, too, and must find the same network.
    twin = kl((32, 64, 96), layers_per_block=1)
    twin.load_state_dict(convert_ldm_vae_checkpoint(network.state_dict(), twin.config), strict=True)
    for name, value in run_kl(twin, [(16, 24)], 4).items():
        np.testing.assert_allclose(value, arrays[name], rtol=0, atol=1e-5 * np.abs(arrays[name]).max(), err_msg=name)


if __name__ == "__main__":
    main()
