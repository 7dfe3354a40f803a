"""Inverse problems: samples of data that agree with a linear measurement of them, from a field that knows the data alone.

y = A x_1 + s epsilon                                                                                  (1)
u~ = u + b_t (dD/dx)^T A^T (r_t^2 A A^T + s^2 I)^-1 (y - A D),   D = E[x_1 | x_t = x]                  (2)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, paths, targets
from fmjax.paths import Field

__all__ = ["linear_inverse"]


def _check_spread(spread, t):
    """Raises where what was measured without noise leaves no room for a correction, which is infinite there."""
    with jax.ensure_compile_time_eval():
        value = spread(np.asarray(t, np.float32))
    if not isinstance(value, Tracer) and not (np.asarray(value) > 0).all():
        raise ValueError(
            f"The spread r_t is {np.asarray(value)} at t = {np.asarray(t)}, where the correction is infinite: evaluate nothing there, as "
            "sampling.path_heun(path), sampling.midpoint and last=sampling.euler do, or say how much noise the measurement has."
        )


def linear_inverse(path, field, operator, y, *, noise=0.0, spread=None, iterations=10) -> Field:
    """Samples of data from a measurement of them, by a field that knows the data alone: inpainting, super-resolution.

    u~ = u + b_t (dD/dx)^T A^T (r_t^2 A A^T + noise^2 I)^-1 (y - A D),   D = E[x_1 | x_t = x]        (2)
    (Song et al. 2023, "PiGDM", eq. 8; Pokle et al. 2023, arXiv:2310.04432, for flows)

    which is (2) of `fmjax.guidance` with p(x_1 | x_t) taken as N(D, r_t^2 I): exact where the data are N(0, I), and a good guide elsewhere.
    A field that can give a finite set of data alone, as that of `marginals.Empirical`, ends at one of them, whatever was measured.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      field: (x, t) -> u_t(x), like x, in which no example depends on another.
      operator: A, of one example, a linear function of an array like x[0], or of a pytree of them: `lambda x: x * mask`,
        `lambda x: x[::2, ::2]`.
      y: what was measured of each example, (B, ...); what A cannot give, such as finite numbers behind a mask, does not matter.
      noise: its standard deviation, the s of (1).
      spread: r_t, a function of t; None for beta_t / sqrt(alpha_t^2 + beta_t^2), right for data N(0, I).
      iterations: of conjugate gradients for the inverse, one where A A^T has one eigenvalue beside 0.
    Returns:
      A velocity field, (x, t) -> like x, for 0 < alpha_t and 0 < beta_t: of one evaluation of `field` and its derivative.
    Raises:
      TypeError: if y is not of floats, the operator or the spread is no function, or the path is joint and no spread is given.
      ValueError: if A of an example and y have other shapes, y is not finite, A of 0 is not 0, or a number is out of its range.
    """
    checks.path(path)
    checks.function("field", field, checks.FIELD)
    y = checks.floats("y", y)
    checks.whole("iterations", iterations, "how many iterations of conjugate gradients there are")
    checks.number("noise", noise, "a standard deviation", least=0)
    if not isinstance(y, Tracer) and not np.isfinite(np.asarray(y)).all():
        raise ValueError("y has numbers that are not finite: put 0 where the operator cannot give anything, as behind a mask.")
    checks.function("operator", operator, "lambda x: x * mask")
    if spread is not None:
        checks.function("spread", spread, f"lambda t: {spread!r}")

    def default(t):
        return path.beta(t) / jnp.sqrt(path.alpha(t) ** 2 + path.beta(t) ** 2)

    def b(t):
        return targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1]

    def guided(x, t, field, operator):
        if not isinstance(t, Tracer):
            checks.weight(b, t)
            if not isinstance(noise, Tracer) and noise == 0:
                _check_spread(default if spread is None else spread, t)

        def data_and_velocity(x):
            u = field(x, t)
            return targets.convert(path, u, x, t, source=targets.velocity, target=targets.data), u

        expected, backward, u = jax.vjp(data_and_velocity, x, has_aux=True)
        measured = jax.vmap(operator)(expected)
        if measured.shape != jnp.shape(y):
            raise ValueError(f"y has shape {jnp.shape(y)}, but the operator gives {measured.shape} for x of shape {x.shape}.")
        try:
            with jax.ensure_compile_time_eval():
                of_zero = operator(jnp.zeros(x.shape[1:], expected.dtype))
        except jax.errors.JAXTypeError:  # It has numbers that are not known.
            of_zero = 0
        if not isinstance(of_zero, Tracer) and np.any(np.asarray(of_zero)):
            raise ValueError("The operator of 0 is not 0, but it is linear: take what it adds from y, and leave it out.")
        transpose = jax.linear_transpose(operator, expected[0])
        variance = (default if spread is None else spread)(t) ** 2
        if jnp.ndim(variance) == 2:
            raise TypeError("The path is joint, so the spread r_t is another for each leaf: give `spread`, one function of t for all.")
        variance = jnp.broadcast_to(variance, x.shape[:1])

        conjugate_gradients = functools.partial(jax.scipy.sparse.linalg.cg, tol=float(jnp.finfo(measured.dtype).eps), maxiter=iterations)

        def solve(variance, y, measured):
            if not isinstance(noise, Tracer) and noise == 0:
                # What A cannot give, such as numbers behind a mask, would leave the system without a solution.
                y = operator(conjugate_gradients(lambda v: transpose(operator(v))[0], transpose(y)[0])[0])
            residual = y - measured
            # The system depends on what it is solved for, since JAX has no second derivative of a solution where one of them is constant.
            variance = variance + 0 * residual.sum()
            return transpose(conjugate_gradients(lambda v: variance * operator(transpose(v)[0]) + noise**2 * v, residual)[0])[0]

        known = jnp.asarray(y, measured.dtype)
        solved = jax.vmap(solve)(variance, known, measured)
        # Conjugate gradients answer 0 where they are asked of NaN, which would be a sample without a measurement.
        finite = jnp.isfinite(known).reshape(len(x), -1).all(1)
        solved = jnp.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), solved, jnp.nan)
        return u + b(paths.lift(t, x)) * backward(solved)[0]

    return paths.on_states(guided, field, others=(operator,), path=path)
