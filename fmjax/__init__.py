"""Flow matching and diffusion models as pure functions in JAX and Flax."""
