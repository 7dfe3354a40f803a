"""Targets: what a network may predict about (x_0, x_1) when it sees only x_t.

Each target is a row (a, b) of coefficients, a function of the path and the time,

    value = a x_1 + b x_0                                                            (1)

and x_t = alpha_t x_1 + beta_t x_0 is one row more. Two rows determine x_1 and x_0, so any target follows from
any other and x by one 2x2 solve,

    value' = p x + q value,   (a', b') = p (alpha_t, beta_t) + q (a, b)              (2)

which holds for expectations given x_t = x too, hence for the marginal velocity and the marginal score, and for
networks. A target of your own is a function `(path, t) -> (a, b)`.
"""

import jax
import jax.numpy as jnp

from fmjax import paths


def velocity(path, t):
    """u = alpha'_t x_1 + beta'_t x_0, the derivative of x_t    (notes 004, "Flow Matching")."""
    t = jnp.asarray(t, jnp.result_type(float, t))
    return jax.jvp(lambda t: (path.alpha(t), path.beta(t)), (t,), (jnp.ones_like(t),))[1]


def score(path, t):
    """grad log p_t(x | x_1) = -x_0 / beta_t, infinite at beta_t = 0    (notes 004, "Score Matching")."""
    beta = jnp.asarray(path.beta(t))
    return jnp.zeros_like(beta), -1 / beta


def noise(path, t):
    """x_0, the notes' epsilon    (notes 004, "Denoising Diffusion Models", L_DDPM)."""
    beta = jnp.asarray(path.beta(t))
    return jnp.zeros_like(beta), jnp.ones_like(beta)


def data(path, t):
    """x_1, the notes' z."""
    alpha = jnp.asarray(path.alpha(t))
    return jnp.ones_like(alpha), jnp.zeros_like(alpha)


def v(path, t):
    """alpha_t x_0 - beta_t x_1    (Salimans and Ho 2022, section 4, whose alpha and sigma are alpha and beta here)."""
    return -path.beta(t), path.alpha(t)


def _unit(a, b):
    """The row (a, b) divided by its largest entry, and one over that entry: an infinite row keeps its direction."""
    size = jnp.maximum(jnp.abs(a), jnp.abs(b))
    size = jnp.where(size == 0, 1, size)
    a, b = (jnp.where(jnp.isinf(entry), jnp.sign(entry), entry / size) for entry in (a, b))
    return a, b, 1 / size


def coefficients(path, t, *, source, target):
    """The p and q of (2), value' = p x + q value.

    With source `score` and target `velocity` these are the notes' (a_t, b_t), u = a_t x + b_t grad log p_t
    (notes 004, "Classifier-Free Guidance").

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
      source: the target that is known, a function `(path, t) -> (a, b)`.
      target: the target that is wanted, likewise.
    Returns:
      p and q, each like t. They are finite wherever their limit is, with one exception: where alpha_t = 0 the noise
      and the score say nothing of the data, and where beta_t = 0 the data say nothing of the noise.
    """
    t = jnp.asarray(t, jnp.result_type(float, t))
    if source is target:
        return jnp.zeros_like(t), jnp.ones_like(t)
    alpha, beta = path.alpha(t), path.beta(t)
    a, b, scale = _unit(*source(path, t))
    c, d = target(path, t)
    p, q = c * b - d * a, alpha * d - beta * c
    # Parallel rows need no solve, and at the ends of a path the solve would divide zero by zero there.
    is_value = (p == 0) & ((a != 0) | (b != 0))
    is_x = (q == 0) & ~is_value
    determinant = jnp.where(is_value | is_x, 1, alpha * b - beta * a)
    value_norm = jnp.where(is_value, a**2 + b**2, 1)
    x_norm = jnp.where(is_x, alpha**2 + beta**2, 1)
    p = jnp.where(is_value, 0, jnp.where(is_x, (alpha * c + beta * d) / x_norm, p / determinant))
    q = jnp.where(is_value, (a * c + b * d) / value_norm, jnp.where(is_x, 0, q / determinant))
    return p, q * scale


def convert(path, value, x, t, *, source, target):
    """The value of one target from that of another: `targets.convert(path, u, x, t, source=targets.velocity, target=targets.score)`.

    value' = p x + q value        (2)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      value: of the target `source`, (B, ...).
      x: states x_t, like value, any float dtype.
      t: times, () or (B,).
      source: the target that value is, a function `(path, t) -> (a, b)`.
      target: the target that is wanted, likewise.
    Returns:
      The value of `target`, like x; see `coefficients` for the times at which it is finite.
    Raises:
      TypeError: if an array is not of floats.
      ValueError: if the shapes differ, or t is neither one time nor one an example.
    """
    value, x = paths.check_float("value", value), paths.check_float("x", x)
    paths.check_like("value", value, x)
    p, q = coefficients(path, paths.lift(t, x), source=source, target=target)
    return (p * x + q * value).astype(x.dtype)


def convert_field(path, field, *, source, target):
    """The field of one target from the field of another: a network that predicts noise, say, as a velocity.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      field: (x, t) -> the target `source`, like x.
      source: what field predicts, a function `(path, t) -> (a, b)`.
      target: what is wanted, likewise.
    Returns:
      A field, (x, t) -> the target `target`, like x, of one evaluation of `field`.
    """
    return lambda x, t: convert(path, field(x, t), x, t, source=source, target=target)


def weight(path, t, *, source, target):
    """Turns a squared error on source into one on target: at the same x, |error'|^2 = q^2 |error|^2.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
      source: what the network predicts, a function `(path, t) -> (a, b)`.
      target: the target whose squared error is wanted, likewise.
    Returns:
      q^2 of (2), like t.
    """
    return coefficients(path, t, source=source, target=target)[1] ** 2
