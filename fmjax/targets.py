"""Targets: what a network may predict about (x_0, x_1) when it sees only x_t.

Each target is a row (a, b) of coefficients, a function of the path and the time,

    y = a x_1 + b x_0                                                            (1)

and x_t = alpha_t x_1 + beta_t x_0 is one row more. Two rows determine x_1 and x_0, so any target z = c x_1 + d x_0 follows from
any other and x by one 2x2 solve,

    z = p x + q y,   (c, d) = p (alpha_t, beta_t) + q (a, b)                     (2)

which holds for expectations given x_t = x too, hence for the marginal velocity and the marginal score, and for
networks. A target of your own is a function `(path, t) -> (a, b)`.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, paths, states
from fmjax.paths import Field

__all__ = [
    "velocity",
    "score",
    "noise",
    "data",
    "v",
    "edm",
    "convert",
    "convert_field",
    "coefficients",
    "weight",
    "change_path",
    "scale_input",
    "c_noise",
]


def velocity(path, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The velocity, the derivative of x_t in t.

    u = alpha'_t x_1 + beta'_t x_0    (MIT 6.S184, "Flow Matching")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      The row (alpha'_t, beta'_t), each like t; infinite where the path's derivative is.
    """
    t = jnp.asarray(t, jnp.result_type(float, t))
    return jax.jvp(lambda t: (path.alpha(t), path.beta(t)), (t,), (jnp.ones_like(t),))[1]


def score(path, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The score of the path to x_1, the gradient of its log density.

    grad log p_t(x_t | x_1) = -x_0 / beta_t    (MIT 6.S184, "Score Matching")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      The row (0, -1 / beta_t), each like t; infinite where beta_t = 0.
    """
    beta = jnp.asarray(path.beta(t))
    return jnp.zeros_like(beta), -1 / beta


def noise(path, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The noise x_0, the course's epsilon    (MIT 6.S184, "Denoising Diffusion Models", L_DDPM).

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      The row (0, 1), each like t.
    """
    beta = jnp.asarray(path.beta(t))
    return jnp.zeros_like(beta), jnp.ones_like(beta)


def data(path, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The data x_1, the course's z.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      The row (1, 0), each like t.
    """
    alpha = jnp.asarray(path.alpha(t))
    return jnp.ones_like(alpha), jnp.zeros_like(alpha)


def v(path, t) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The v of progressive distillation.

    v = alpha_t x_0 - beta_t x_1    (Salimans and Ho 2022, arXiv:2202.00512, section 4, whose alpha and sigma are alpha and beta here)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
    Returns:
      The row (-beta_t, alpha_t), each like t.
    """
    return -path.beta(t), path.alpha(t)


def edm(sigma_data=0.5) -> Callable:
    """EDM's target: what is left of the data when the best linear guess from x_t is taken away, of unit variance; for any path.

    F = (beta_t x_1 - alpha_t sigma_data^2 x_0) / (sigma_data sqrt(beta_t^2 + alpha_t^2 sigma_data^2))
    D = c_skip x + c_out F,  c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),  c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    (Karras et al. 2022, arXiv:2206.00364, section 5)

    with D the data, sigma = beta_t / alpha_t and x = x_t / alpha_t. Its variance is 1 where the data's is sigma_data^2; with
    sigma_data = 1 on a path with alpha^2 + beta^2 = 1 it is -v.

    Args:
      sigma_data: the data's standard deviation, above 0.
    Returns:
      A target, `(path, t) -> (a, b)`; the network's input is scaled by `scale_input`.
    Raises:
      ValueError: if `sigma_data` is not above 0.
    """
    checks.number("sigma_data", sigma_data, "the data's standard deviation", least=0, above=True)

    def row(path, t):
        alpha, beta = path.alpha(t), path.beta(t)
        size = jnp.sqrt(beta**2 + (alpha * sigma_data) ** 2)
        return beta / (sigma_data * size), -alpha * sigma_data / size

    row.__name__ = "edm"
    return row


def scale_input(path, network, sigma_data=0.5, *, time=None) -> Field:
    """A network that sees states of unit variance, as EDM's do.

    f(x, t) = network(c_in x, t),  c_in = 1 / sqrt(alpha_t^2 sigma_data^2 + beta_t^2)    (Karras et al. 2022, arXiv:2206.00364, section 5)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      network: (x, t) -> like x.
      sigma_data: the data's standard deviation, above 0.
      time: what the network sees of the time, a function of t: `lambda t: targets.c_noise(path, t)` is EDM's; by default t itself.
    Returns:
      A field, (x, t) -> like x, for `losses.denoising(..., target=targets.edm(sigma_data))` and other targets.
    Raises:
      TypeError: if `path` is no path, or the network or the time is no function.
      ValueError: if `sigma_data` is not above 0.
    """
    checks.path(path)
    checks.function("network", network, checks.FIELD)
    checks.number("sigma_data", sigma_data, "the data's standard deviation", least=0, above=True)
    if time is not None:
        checks.function("time", time, "lambda t: targets.c_noise(path, t)")

    def scaled(x, t, network):
        x = checks.floats("x", x)
        lifted = paths.lift(checks.on_path(t), x)
        c_in = 1 / jnp.sqrt((path.alpha(lifted) * sigma_data) ** 2 + path.beta(lifted) ** 2)
        return network((c_in * x).astype(x.dtype), t if time is None else time(t))

    return paths.on_states(scaled, network, path=path)


def c_noise(path, t) -> chex.ArrayDevice:
    """EDM's noise level for a network.

    c_noise = 1/4 log(beta_t / alpha_t)    (Karras et al. 2022, arXiv:2206.00364, table 1)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times with alpha_t > 0 and beta_t > 0, any shape.
    Returns:
      Numbers like t.
    Raises:
      TypeError: if `path` is no path, or joint.
      ValueError: if it is infinite at a known time.
    """
    checks.path(path)
    if isinstance(path, paths.Joint):
        raise TypeError("A joint path has no one noise level at a time: give the network t itself, or the noise level of one leaf's path.")

    def level(t):
        t = jnp.asarray(t, jnp.promote_types(jnp.result_type(float, t), jnp.float32))
        return (jnp.log(path.beta(t)) - jnp.log(path.alpha(t))) / 4

    known: Any = 0
    if not isinstance(t, Tracer):
        with jax.ensure_compile_time_eval():
            known = level(np.asarray(t))
    if not isinstance(known, Tracer) and not np.isfinite(np.asarray(known)).all():
        raise ValueError(
            f"log(beta / alpha) is infinite on {path} at one of t = {np.asarray(t)}: let the grid start later and evaluate nothing at "
            "data, as times.karras and sampling.edm_heun do, or let the network see t itself."
        )
    return level(t)


def _unit(a, b):
    """The row (a, b) divided by its largest entry, and one over that entry: an infinite row keeps its direction."""
    size = jnp.maximum(jnp.abs(a), jnp.abs(b))
    size = jnp.where(size == 0, 1, size)
    a, b = (jnp.where(jnp.isinf(entry), jnp.sign(entry), entry / size) for entry in (a, b))
    return a, b, 1 / size


def coefficients(path, t, *, source, target) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """The p and q by which one target follows from another.

    z = p x + q y,   (c, d) = p (alpha_t, beta_t) + q (a, b)        (2)

    With source `score` and target `velocity` these are the course's (a_t, b_t), u = a_t x + b_t grad log p_t
    (MIT 6.S184, "Classifier-Free Guidance").

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
      source: the target that is known, a function `(path, t) -> (a, b)`.
      target: the target that is wanted, a function `(path, t) -> (c, d)`.
    Returns:
      p and q, each like t. They are finite wherever their limit is, with these exceptions: where alpha_t = 0 the noise and the
      score say nothing of the data, and a velocity that is 0 there neither (`paths.Polynomial` at noise, for a power above 1);
      where beta_t = 0 the data say nothing of the noise.
    Raises:
      TypeError: if `path` is no path, or a target is no function.
    """
    checks.path(path)
    _check_targets(source, target)
    t = jnp.asarray(t, jnp.result_type(float, t))
    if source is target:
        return jnp.zeros_like(t), jnp.ones_like(t)
    return _solve(path.alpha(t), path.beta(t), *source(path, t), *target(path, t))


def _check_targets(source, target):
    checks.function("source", source, "targets.velocity")
    checks.function("target", target, "targets.velocity")


# Compiled for those who convert outside `jit`, where each of its many operations would be compiled alone.
@jax.jit
def _solve(alpha, beta, a, b, c, d):
    """The p and q of (2), from the row of x, of the source and of the target."""
    a, b, scale = _unit(a, b)
    p, q, determinant = c * b - d * a, alpha * d - beta * c, alpha * b - beta * a
    # Where the rows of x and of the source are parallel there is nothing to solve: the target is the one or the other, or unknown.
    # Nowhere else, since a branch that is right at one time alone has the wrong derivative there.
    is_value = (determinant == 0) & (p == 0) & ((a != 0) | (b != 0))
    is_x = (determinant == 0) & (q == 0) & ~is_value
    determinant = jnp.where(is_value | is_x, 1, determinant)
    value_norm, x_norm = (jnp.where(norm == 0, 1, norm) for norm in (a**2 + b**2, alpha**2 + beta**2))
    p = jnp.where(is_value, 0, jnp.where(is_x, (alpha * c + beta * d) / x_norm, p / determinant))
    q = jnp.where(is_value, (a * c + b * d) / value_norm, jnp.where(is_x, 0, q / determinant))
    return p, q * scale


def _check_known(path, t, source, target):
    """Raises where a conversion is infinite at a time whose value is known."""
    try:
        with jax.ensure_compile_time_eval():
            infinite = ~np.isfinite(np.asarray(coefficients(path, t, source=source, target=target))).all(0)
    except (jax.errors.JAXTypeError, TypeError, ValueError):
        # A path or a target of numbers that are not known.
        return
    if infinite.any():
        name, other = (getattr(each, "__name__", str(each)).strip("<>") for each in (source, target))
        at = t.reshape(-1)[int(np.nonzero(infinite.reshape(t.size, -1))[0][0])]
        raise ValueError(
            f"On {path} the {other} does not follow from the {name} at t = {at:g}, where it would be infinite: let the grid start later or "
            "end earlier, as times.uniform_grid(20, start=1e-3, end=0.999) does, or evaluate nothing there: last=sampling.euler for a last "
            "step, sampling.path_heun(path) and other steps that know the path."
        )


def convert(path, value, x, t, *, source, target) -> chex.ArrayDevice:
    """The value of one target from that of another: `targets.convert(path, u, x, t, source=targets.velocity, target=targets.score)`.

    z = p x + q value        (2)

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
      ValueError: if the shapes differ, t is neither one time nor one per example, or a known t is one at which the target does not follow.
    """
    paths.fits(path, x)
    _check_targets(source, target)
    if (layout := states.layout(x)) is not None:
        value = layout.flatten("value", value)
        return layout.unflatten(convert(path, value, layout.flatten("x", x), t, source=source, target=target), like=x)
    value, x = checks.floats("value", value), checks.floats("x", x)
    checks.like("value", value, x)
    lifted = paths.lift(checks.on_path(t), x)
    if not isinstance(t, Tracer):
        _check_known(path, np.asarray(t, np.float32).reshape(lifted.shape), source, target)
    p, q = coefficients(path, lifted, source=source, target=target)
    return (p * x + q * value).astype(x.dtype)


def convert_field(path, field, *, source, target) -> Field:
    """The field of one target from the field of another: a network that predicts noise, say, as a velocity.

    g(x, t) = p x + q f(x, t)        (2)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      field: (x, t) -> the target `source`, like x.
      source: what field predicts, a function `(path, t) -> (a, b)`.
      target: what is wanted, likewise.
    Returns:
      A field, (x, t) -> the target `target`, like x, of one evaluation of `field`.
    Raises:
      TypeError: if `path` is no path, or the field or a target is no function.
    """
    checks.path(path)
    checks.function("field", field, checks.FIELD)
    _check_targets(source, target)

    def converted(x, t, field):
        checks.times(checks.on_path(t), checks.floats("x", x))
        return convert(path, field(x, t), x, t, source=source, target=target)

    return paths.on_states(converted, field, path=path)


def change_path(field, *, source, target) -> Field:
    """The velocity along one path from the velocity that was learned along another, with the same noise and data at every x.

    u_t(x) = alpha'_t E[x_1 | x_s] + beta'_t E[x_0 | x_s],   x_s = (alpha_s + beta_s) / (alpha_t + beta_t) x
    (Pokle et al. 2023, arXiv:2310.04432, lemma 2; Lipman et al. 2024, arXiv:2412.06264, section 4.7)

    at the times s of the source and t of the target at which alpha / beta is the same, where the states are in proportion.

    Args:
      field: (x, t) -> u_t(x) along `source`; from another prediction by `convert_field`.
      source: the path that it was learned along, anything with `alpha(t)` and `beta(t)`.
      target: the path to go along, likewise; where its noise is larger than all of the source's, the source's end stands in.
    Returns:
      A field, (x, t) -> u_t(x) along `target`, of one evaluation of `field`.
    Raises:
      TypeError: if the field is no function, or one of the paths is none, or joint.
    """

    checks.function("field", field, checks.FIELD)
    for path in (source, target):
        checks.path(path)
        if isinstance(path, paths.Joint):
            raise TypeError("A joint path has no one time for a noise level: change the path of one leaf, or train on the other path.")

    def changed(x, t, field):
        known, t = not isinstance(t, Tracer), paths.lift(checks.on_path(t), x)
        # A time that is known stays so, for the field's own check and the conversion's.
        with jax.ensure_compile_time_eval():
            s = paths.time_from_signal_fraction(source, paths.signal_fraction(target, t))
        s = np.asarray(s) if known and not isinstance(s, Tracer) else s
        x_s = ((source.alpha(s) + source.beta(s)) / (target.alpha(t) + target.beta(t)) * x).astype(x.dtype)
        s = s.reshape(-1) if s.ndim else s
        return convert(source, field(x_s, s), x_s, s, source=velocity, target=lambda *_: velocity(target, t))

    return paths.on_states(changed, field)


def weight(path, t, *, source, target) -> chex.ArrayDevice:
    """Turns a squared error on source into one on target, at the same x.

    |e_target|^2 = q^2 |e_source|^2        (2)

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      t: times, any shape.
      source: what the network predicts, a function `(path, t) -> (a, b)`.
      target: the target whose squared error is wanted, likewise.
    Returns:
      q^2, like t.
    Raises:
      TypeError: if `path` is no path, or a target is no function.
    """
    return coefficients(path, t, source=source, target=target)[1] ** 2
