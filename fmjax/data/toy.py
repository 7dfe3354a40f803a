"""Toy distributions of the plane: each a function `(key, n) -> (n, 2)`, float32, of a standard size.

They compile, so a training step can draw fresh data from its key.
"""

import chex
import jax
import jax.numpy as jnp

__all__ = ["gaussian", "mixture", "eight_gaussians", "moons", "circles", "checkerboard", "s_curve", "pinwheel", "spirals"]


def _ring(modes, radius):
    angles = 2 * jnp.pi * jnp.arange(modes) / modes
    return radius * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _jitter(key, points, noise):
    return points + noise * jax.random.normal(key, points.shape)


def gaussian(key, n) -> chex.ArrayDevice:
    """The standard normal distribution.

    x ~ N(0, I)

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    return jax.random.normal(key, (n, 2))


def mixture(key, n) -> chex.ArrayDevice:
    """Five normal modes of standard deviation 1 on a circle of radius 10, as in the course's second lab.

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_mode, key_noise = jax.random.split(key)
    return _jitter(key_noise, _ring(5, 10.0)[jax.random.randint(key_mode, (n,), 0, 5)], 1.0)


def eight_gaussians(key, n) -> chex.ArrayDevice:
    """Eight normal modes of standard deviation 1 on a circle of radius 5    (Tong et al. 2023, arXiv:2302.00482).

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_mode, key_noise = jax.random.split(key)
    return _jitter(key_noise, _ring(8, 5.0)[jax.random.randint(key_mode, (n,), 0, 8)], 1.0)


def moons(key, n) -> chex.ArrayDevice:
    """Two interleaved half circles, of noise 0.05, scaled by 2 and moved by -1    (Tong et al. 2023, arXiv:2302.00482).

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_moon, key_angle, key_noise = jax.random.split(key, 3)
    lower = jax.random.bernoulli(key_moon, 0.5, (n,))
    angle = jax.random.uniform(key_angle, (n,), maxval=jnp.pi)
    upper = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    points = jnp.where(lower[:, None], jnp.array([[1.0, 0.5]]) - upper, upper)
    return 2 * _jitter(key_noise, points, 0.05) - 1


def circles(key, n) -> chex.ArrayDevice:
    """Two circles about the origin, of radius 1 and 1/2, of noise 0.05.

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_circle, key_angle, key_noise = jax.random.split(key, 3)
    radius = jnp.where(jax.random.bernoulli(key_circle, 0.5, (n,)), 0.5, 1.0)
    angle = jax.random.uniform(key_angle, (n,), maxval=2 * jnp.pi)
    points = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return _jitter(key_noise, points, 0.05)


def checkerboard(key, n) -> chex.ArrayDevice:
    """Uniform on the eight black squares of a board of four by four, on [-2, 2] x [-2, 2].

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_square, key_point = jax.random.split(key)
    square = jax.random.randint(key_square, (n,), 0, 8)
    row, column = square // 2, 2 * (square % 2)
    corner = jnp.stack([column + row % 2, row], axis=-1)
    return corner + jax.random.uniform(key_point, (n, 2)) - 2


def s_curve(key, n) -> chex.ArrayDevice:
    """The letter S in the plane, of noise 0.05, scaled by 1.5    (Tong et al. 2023, arXiv:2302.00482).

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_angle, key_noise = jax.random.split(key)
    angle = 3 * jnp.pi * (jax.random.uniform(key_angle, (n,)) - 0.5)
    points = jnp.stack([jnp.sin(angle), jnp.sign(angle) * (jnp.cos(angle) - 1)], axis=-1)
    return 1.5 * _jitter(key_noise, points, 0.05)


def pinwheel(key, n) -> chex.ArrayDevice:
    """Five normal arms, bent by a rotation that grows with the radius    (Johnson et al. 2016, arXiv:1603.06277).

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_arm, key_point = jax.random.split(key)
    arm = jax.random.randint(key_arm, (n,), 0, 5)
    radial, tangential = jax.random.normal(key_point, (2, n)) * jnp.array([[0.3], [0.1]])
    radial = radial + 1
    angle = 2 * jnp.pi * arm / 5 + 0.25 * jnp.exp(radial)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return 2 * jnp.stack([radial * cos - tangential * sin, radial * sin + tangential * cos], axis=-1)


def spirals(key, n) -> chex.ArrayDevice:
    """Two spirals of one and a half turns, wound into each other, of noise 0.1, on a disc of radius 3.

    Args:
      key: a typed key.
      n: how many points.
    Returns:
      Points, (n, 2), float32.
    """
    key_arm, key_angle, key_noise = jax.random.split(key, 3)
    angle = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(key_angle, (n,)))
    sign = jnp.where(jax.random.bernoulli(key_arm, 0.5, (n,)), 1.0, -1.0)
    points = (sign * angle / jnp.pi)[:, None] * jnp.stack([-jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return _jitter(key_noise, points, 0.1)
