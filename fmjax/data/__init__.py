"""Data: toy distributions of the plane, real images, and the batches of a training."""

from fmjax.data import digits, fashion_mnist, images, latents, pipeline, resize, toy

__all__ = ["digits", "fashion_mnist", "images", "latents", "pipeline", "resize", "toy"]
