"""DINOv2 in four small sizes, from facebookresearch/dinov2: `OFFICIAL=<folder of its checkout> python -m official.dinov2`."""

import os
import sys

import numpy as np

import official

POSITIONS = 64
"""Multiplies the table of positions, which `weights` draws too small to matter."""
SIDES = {
    "plain": [(98, 126), (224, 224)],
    "registers": [(98, 126), (224, 224), (28, 532)],
    "swiglu": [(98, 126), (28, 532)],
    # As many patches as the table, in the same grid and in another.
    "native": [(56, 56), (28, 112)],
}
"""The sides of the images that each network is given."""


def images(height, width):
    """Two images of noise, bytes."""
    return np.random.default_rng([height, width]).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def _networks():
    from dinov2.models.vision_transformer import DinoVisionTransformer

    with_registers = {"num_register_tokens": 3, "interpolate_antialias": True, "interpolate_offset": 0.0}
    common = {"patch_size": 14, "depth": 2, "num_heads": 4, "init_values": 1.0}
    return {
        "plain": DinoVisionTransformer(img_size=518, embed_dim=48, block_chunks=0, **common),
        "registers": DinoVisionTransformer(img_size=518, embed_dim=24, block_chunks=0, **with_registers, **common),
        "swiglu": DinoVisionTransformer(img_size=518, embed_dim=44, block_chunks=2, ffn_layer="swiglufused", **common),
        "native": DinoVisionTransformer(img_size=56, embed_dim=40, block_chunks=1, **common),
    }


def main():
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, f"{os.environ['OFFICIAL']}/dinov2")
    import torch
    from torchvision import transforms

    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for name, network in _networks().items():
        shapes = official.fill(network)
        found = {}
        with torch.no_grad():
            network.pos_embed *= POSITIONS
            for sides in SIDES[name]:
                x = normalize(torch.as_tensor(images(*sides)).permute(0, 3, 1, 2) / 255)
                out = network(x, is_training=True)
                found[f"class_{sides[0]}_{sides[1]}"] = out["x_norm_clstoken"].numpy()
                found[f"patches_{sides[0]}_{sides[1]}"] = out["x_norm_patchtokens"].numpy()
        official.save(f"dinov2_{name}", shapes, **found)


if __name__ == "__main__":
    main()
