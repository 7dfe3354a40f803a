"""Networks in Flax Linen: (x, t) or (x, t, y) to an array like x."""
