"""Networks in Flax Linen: (x, t) or (x, t, y) to an array like x."""

from fmjax.models import autoencoder, conditions, dinov2, dit, inception, layers, mlp, unet

__all__ = ["autoencoder", "conditions", "dinov2", "dit", "inception", "layers", "mlp", "unet"]
