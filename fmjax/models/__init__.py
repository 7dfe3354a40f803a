"""Networks in Flax Linen: (x, t) or (x, t, y) to an array like x."""

from fmjax.models import conditions, dit, layers, mlp, unet

__all__ = ["conditions", "dit", "layers", "mlp", "unet"]
