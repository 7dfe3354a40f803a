"""Marginals: the exact p_t, velocity and score where the data are a Gaussian mixture or a finite set.

With data sum_k w_k N(m_k, s_k^2) and the path x_t = alpha_t x_1 + beta_t x_0,

    p_t(x) = sum_k w_k N(x; alpha m_k, v_k),  v_k = alpha^2 s_k^2 + beta^2                        (1)
    r_k(x) = w_k N(x; alpha m_k, v_k) / p_t(x)                            posterior of k          (2)
    grad log p_t(x) = -sum_k r_k (x - alpha m_k) / v_k                                            (3)
    E[x_1 | x_t = x] = sum_k r_k (m_k + alpha s_k^2 (x - alpha m_k) / v_k)                        (4)
    E[x_0 | x_t = x] = -beta grad log p_t(x)                                                      (5)
    u_t(x) = alpha' E[x_1 | x] + beta' E[x_0 | x]                                                 (6)

which is the course's marginalization u_t(x) = int u_t(x|z) p_t(x|z) p_data(z) / p_t(x) dz done in closed form.
A finite data set is the mixture with s_k = 0. On the line the flow of (6) keeps the order of points, so where it carries x from the
time s to t is where p_t has as much mass on each side:

    F_t(x) = int_{-infinity}^x p_t(y) dy                                  distribution function   (7)
    F_t(X_{s,t}(x)) = F_s(x)                                              flow map                (8)

These are the oracle that everything else is tested against.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.scipy.special import log_ndtr, logsumexp, ndtr, ndtri

from fmjax import checks, paths, states, targets
from fmjax.paths import Field

__all__ = ["GaussianMixture", "Empirical", "velocity", "score", "log_density", "flow_map"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """A mixture of normal distributions.

    p(x) = sum_k w_k N(x; m_k, s_k^2)
    """

    weights: jax.Array
    """w_k, in proportion to probabilities, (K,)."""
    means: Any
    """m_k, (K, ...), or a pytree of such arrays, where the state is one."""
    scales: Any
    """s_k, at least 0: one standard deviation for all (), one per component (K,), or one per coordinate (K, ...), like the means."""

    def sample(self, key, n) -> Any:
        """Draws from the mixture.

        Args:
          key: a typed key.
          n: how many.
        Returns:
          Draws, (n, ...), or a pytree of them like the means.
        Raises:
          TypeError: if the key is not typed.
          ValueError: if n is not a whole number of at least 1, or the mixture's arrays do not go together, or are out of range.
        """
        if (layout := states.layout(self.means)) is not None:
            return layout.unflatten(_flat(self).sample(key, n), like=self.means)
        _check_data(self)
        checks.key(key)
        checks.whole("n", n, "how many draws are made")
        key_component, key_noise = jax.random.split(key)
        means = jnp.asarray(self.means)
        component = jax.random.categorical(key_component, jnp.log(jnp.asarray(self.weights)), shape=(n,))
        noise = jax.random.normal(key_noise, (n, *means.shape[1:]), means.dtype)
        return means[component] + _scales(self)[component] * noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Empirical:
    """The uniform distribution on a finite set of points."""

    points: Any
    """(N, ...), or a pytree of such arrays, where the state is one."""

    def sample(self, key, n) -> Any:
        """Draws from the points, with replacement.

        Args:
          key: a typed key.
          n: how many.
        Returns:
          Draws, (n, ...), or a pytree of them like the points.
        Raises:
          TypeError: if the key is not typed.
          ValueError: if n is not a whole number of at least 1, or there are no points, or one is not finite.
        """
        if (layout := states.layout(self.points)) is not None:
            return layout.unflatten(_flat(self).sample(key, n), like=self.points)
        _check_data(self)
        checks.key(key)
        checks.whole("n", n, "how many draws are made")
        return jax.random.choice(key, jnp.asarray(self.points), (n,))


def _check_data(distribution):
    """Raises unless a distribution's shapes go together, and its numbers are good wherever they are known.

    Here and not where it is made, since JAX rebuilds pytrees from objects that are no arrays.
    """
    if not isinstance(distribution, GaussianMixture | Empirical):
        raise TypeError(
            f"The distribution is {distribution!r}, but it is a GaussianMixture or an Empirical, after the path: "
            "marginals.velocity(path, distribution)."
        )
    distribution = _flat(distribution)
    # Evaluated now, also inside `jit`, and where the numbers are, since a training set is large.
    with jax.ensure_compile_time_eval():
        parts = {field.name: jnp.asarray(getattr(distribution, field.name)) for field in dataclasses.fields(distribution)}
        if isinstance(distribution, Empirical):
            if not parts["points"].ndim or not parts["points"].size:
                raise ValueError(f"points has shape {parts['points'].shape}, but a finite set has at least one point, (N, ...).")
        else:
            checks.floats("means", parts["means"])
            weights, means, scales = parts["weights"].shape, parts["means"].shape, parts["scales"].shape
            fits = len(scales) in (0, 1, len(means)) and all(size in (1, full) for size, full in zip(scales, means, strict=False))
            if len(weights) != 1 or weights != means[:1] or 0 in means or not fits:
                raise ValueError(
                    f"weights has shape {weights}, means {means} and scales {scales}, but a mixture has K weights, (K,), at least one, as "
                    "many means, (K, ...), and one scale for all, (), one per component, (K,), or one per coordinate, like the means."
                )
            for name in ("weights", "scales"):
                if jnp.issubdtype(parts[name].dtype, jnp.complexfloating):
                    raise TypeError(f"{name} has dtype {parts[name].dtype}, but they are real numbers: give its .real.")
        for name, part in parts.items():
            if isinstance(part, Tracer):
                continue
            if not jnp.isfinite(part).all():
                raise ValueError(f"{name} has numbers that are not finite, but all must be: look for what made them.")
            if name in ("weights", "scales") and (part < 0).any():
                least = f"the least {part.min():g}, but they are at least 0"
                raise ValueError(f"{name} has negative numbers, {least}: give the exponential of logarithms.")
            if name == "weights" and not 0 < part.sum() < jnp.inf:
                cure = "give at least one above 0, and numbers whose sum is finite"
                raise ValueError(f"weights sum to {part.sum():g}, but they are in proportion to probabilities: {cure}.")


def _layout(distribution):
    """The layout of a distribution's means or points."""
    return states.layout(distribution.points if isinstance(distribution, Empirical) else distribution.means)


def _flat(distribution) -> Any:
    """The same distribution of one array, where it is of a pytree."""
    if (layout := _layout(distribution)) is None:
        return distribution
    if isinstance(distribution, Empirical):
        return Empirical(layout.flatten("points", distribution.points))
    scales, means = distribution.scales, distribution.means
    if jax.tree.structure(scales) == layout.structure:
        each = jax.tree.map(lambda mean, scale: _scales(GaussianMixture(distribution.weights, jnp.asarray(mean), scale)), means, scales)
        scales = layout.flatten("scales", jax.tree.map(lambda mean, scale: jnp.broadcast_to(scale, jnp.shape(mean)), means, each))
    return GaussianMixture(distribution.weights, layout.flatten("means", distribution.means), scales)


def _state(path, distribution, x):
    """The state as one array, and its layout where it is a pytree, which the distribution is then too."""
    paths.fits(path, x)
    layout, data = states.layout(x), _layout(distribution)
    if layout != data:
        shapes = [f"a pytree {each}" if each else "one array" for each in (layout, data)]
        raise ValueError(f"The state is {shapes[0]}, but the distribution is of {shapes[1]}: make its means or points like the state.")
    return (checks.batch("x", x) if layout is None else layout.flatten("x", x)), layout


def _scales(mixture):
    """Scales that broadcast against the means."""
    means, scales = jnp.asarray(mixture.means), jnp.asarray(mixture.scales)
    if scales.ndim == means.ndim:
        return jnp.broadcast_to(scales, means.shape)
    return jnp.broadcast_to(scales, means.shape[:1]).reshape((-1,) + (1,) * (means.ndim - 1))


def _components(distribution):
    """Log weights (K,), means (K, D) and scales (K, 1) or (K, D)."""
    _check_data(distribution)
    distribution = _flat(distribution)
    if isinstance(distribution, Empirical):
        means = checks.floats("points", distribution.points)
        log_weights, scales = jnp.full(len(means), -jnp.log(len(means)), means.dtype), jnp.zeros((len(means), 1), means.dtype)
    else:
        means, weights = jnp.asarray(distribution.means), jnp.asarray(distribution.weights)
        log_weights = jnp.log(weights / weights.sum())
        scales = _scales(distribution).reshape(len(means), -1)
    return log_weights, means.reshape(len(means), -1), scales


# Arrays of (batch, block, dimension) hold at most this many numbers, 32 MiB of float32.
_BLOCK_NUMBERS = 2**23


def _posterior(path, distribution, x, t):
    """log p_t(x), E[x_1 | x] and grad log p_t(x): (1), (4) and (3)."""
    shape = x.shape
    x = x.reshape(x.shape[0], -1)
    t = paths.lift(checks.on_path(t), x)
    log_weights, means, scales = _components(distribution)
    if means.shape[1] != x.shape[1]:
        raise ValueError(f"x has shape {shape}, that is {x.shape[1]} numbers per example, but the distribution has {means.shape[1]}.")
    # A batch of any size, as `export` has it, is taken for a large one.
    numbers = x.size if isinstance(x.shape[0], int) else 1024 * x.shape[1]
    block = max(1, min(len(means), _BLOCK_NUMBERS // max(1, numbers)))
    log_p, data, score = _over_components(path.alpha(t), path.beta(t), log_weights, means, scales, x.astype(t.dtype), block)
    return log_p, data.reshape(shape), score.reshape(shape)


# Compiled for those who call a field outside `jit`, where each of its many operations would be compiled alone.
@functools.partial(jax.jit, static_argnums=6)
def _over_components(alpha, beta, log_weights, means, scales, x, block):
    """log p_t(x), E[x_1 | x] and grad log p_t(x), in one pass over blocks of so many components."""
    # Along a joint path each coordinate has its own.
    alpha, beta = (jnp.reshape(value, (-1, 1, value.shape[1] if jnp.ndim(value) == 2 else 1)) for value in (alpha, beta))
    padding = -len(means) % block
    log_weights = jnp.pad(log_weights, (0, padding), constant_values=-jnp.inf)
    means, scales = jnp.pad(means, ((0, padding), (0, 0))), jnp.pad(scales, ((0, padding), (0, 0)), constant_values=1)
    blocks = jax.tree.map(lambda a: a.reshape(-1, 1, block, *a.shape[1:]).astype(x.dtype), (log_weights, means, scales))

    product = functools.partial(jnp.einsum, precision="highest")

    def merge(carry, components):
        # A softmax over all components, block by block: sums are kept relative to the largest exponent so far.
        largest, total, data, score = carry
        log_weights, means, scales = components
        variance = alpha**2 * scales**2 + beta**2
        difference = x[:, None] - alpha * means
        log_normals = -0.5 * (difference**2 / variance + jnp.log(2 * jnp.pi * variance)).sum(-1)
        exponents = log_weights + log_normals
        new_largest = jnp.maximum(largest, exponents.max(-1))
        rescale = jnp.exp(largest - new_largest)
        weights = jnp.exp(exponents - new_largest[:, None])
        whitened = difference / variance
        total = rescale * total + weights.sum(-1)
        data = rescale[:, None] * data + product("bk,bkd->bd", weights, means + alpha * scales**2 * whitened)
        score = rescale[:, None] * score - product("bk,bkd->bd", weights, whitened)
        return (new_largest, total, data, score), None

    start = (jnp.full(x.shape[0], jnp.finfo(x.dtype).min), jnp.zeros(x.shape[0], x.dtype), jnp.zeros_like(x), jnp.zeros_like(x))
    (largest, total, data, score), _ = lax.scan(merge, start, blocks)
    return largest + jnp.log(total), data / total[:, None], score / total[:, None]


def _check_known(path, distribution, t):
    """Raises where a path's derivative is infinite, or points have no noise, at a time whose value is known."""
    scales = 0 if isinstance(distribution, Empirical) else _flat(distribution).scales
    known = np.asarray(t, np.float32)
    try:
        with jax.ensure_compile_time_eval():
            infinite = ~np.isfinite(np.asarray(targets.velocity(path, known))).all(0)
            if np.any(np.asarray(scales) == 0):
                infinite |= np.asarray(path.beta(known)) == 0
    except (jax.errors.JAXTypeError, TypeError):
        # A path or data of numbers that are not known.
        return
    if infinite.any():
        at = known.reshape(-1)[int(np.nonzero(infinite.reshape(known.size, -1))[0][0])]
        raise ValueError(
            f"The velocity of {path} to these data is infinite at t = {at:g}: let the grid end earlier or start later, or evaluate "
            "nothing there, as last=sampling.euler and steps that know the path do (sampling.path_heun(path))."
        )


def velocity(path, distribution) -> Field:
    """The exact marginal velocity, whose flow carries N(0, I) to the data.

    u_t(x) = alpha'_t E[x_1 | x] + beta'_t E[x_0 | x]        (6) (MIT 6.S184, "Training Target for Flow Model")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      distribution: a `GaussianMixture` or an `Empirical`.
    Returns:
      A field, (x, t) -> like x. Of a finite set it exists for beta_t > 0; of a mixture wherever the path's derivative does.
    Raises:
      TypeError: if `path` is no path, or `distribution` none of these two.
      ValueError: if the distribution's arrays do not go together or are out of range; of the field, if the
        state is not like them, or t is known and the velocity infinite there.
    """

    checks.path(path)
    _check_data(distribution)

    def field(x, t):
        like, (x, layout) = x, _state(path, distribution, x)
        _, data, score = _posterior(path, distribution, x, t)
        if not isinstance(t, Tracer):
            _check_known(path, distribution, t)
        a, b = targets.velocity(path, paths.lift(t, x))
        value = (a * data - b * path.beta(paths.lift(t, x)) * score).astype(x.dtype)
        return value if layout is None else layout.unflatten(value, like=like)

    return field


def score(path, distribution) -> Field:
    """The exact marginal score.

    grad log p_t(x) = -sum_k r_k (x - alpha_t m_k) / v_k        (3) (MIT 6.S184, "Training Target for Diffusion Model")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      distribution: a `GaussianMixture` or an `Empirical`.
    Returns:
      A field, (x, t) -> like x. Of a finite set it exists for beta_t > 0, of a mixture for all t.
    Raises:
      TypeError: if `path` is no path, or `distribution` none of these two.
      ValueError: if the distribution's arrays do not go together or are out of range; of the field, if the
        state is not like them.
    """

    checks.path(path)
    _check_data(distribution)

    def field(x, t):
        like, (x, layout) = x, _state(path, distribution, x)
        value = _posterior(path, distribution, x, t)[2].astype(x.dtype)
        return value if layout is None else layout.unflatten(value, like=like)

    return field


def log_density(path, distribution) -> Field:
    """The exact log density of x_t.

    log p_t(x) = log sum_k w_k N(x; alpha_t m_k, v_k)        (1) (MIT 6.S184, "Probability Path")

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      distribution: a `GaussianMixture` or an `Empirical`.
    Returns:
      (x, t) -> (B,), in nats. Of a finite set it exists for beta_t > 0.
    Raises:
      TypeError: if `path` is no path, or `distribution` none of these two.
      ValueError: if the distribution's arrays do not go together or are out of range; of the density, if the
        state is not like them.
    """
    checks.path(path)
    _check_data(distribution)
    return lambda x, t: _posterior(path, distribution, _state(path, distribution, x)[0], t)[0]


def _excess(y, x, log_weights, centers, widths, new_centers, new_widths):
    """A function that rises in y, and is 0 where F_t(y) = F_s(x): the logarithm of one side of (8) over the other.

    A component counts by its mass on that side of x where it has less, which keeps its digits in tails and in gaps between components.

    Args:
      y, x: (B, D).
      log_weights: log w_k, (K,).
      centers, widths, new_centers, new_widths: alpha m_k and sqrt(v_k) at s and at t, (B, D, K).
    Returns:
      (B, D).
    """
    # The square of a standard score is finite below it.
    most = jnp.asarray(jnp.finfo(x.dtype).max ** 0.5 / 8, x.dtype)
    z, new_z = _scores(x, centers, widths, most), _scores(y, new_centers, new_widths, most)
    below = z < 0
    side = jnp.where(below, 1, -1)
    # Enough terms of the series of a far tail for float64.
    tail, new_tail = (log_weights[None, None] + log_ndtr(side * jnp.clip(each, -most, most), series_order=8) for each in (z, new_z))
    excess = logsumexp(jnp.where(below, new_tail, tail), axis=-1) - logsumexp(jnp.where(below, tail, new_tail), axis=-1)
    # Farther out the component with most of the mass is all of it.
    nearest, new_nearest = (jnp.max(side * each, axis=-1) for each in (z, new_z))
    return jnp.where((jnp.abs(z) < most).any(-1), excess, jnp.where(below.all(-1), new_nearest - nearest, nearest - new_nearest))


def _scores(x, centers, widths, most):
    """Standard scores (B, D, K), about points without a width on the one side or the other."""
    points = widths == 0
    apart = x[..., None] - centers
    return jnp.where(points, jnp.where(apart < 0, -most, most), apart / jnp.where(points, 1, widths))


def _alone(x, centers, widths, new_centers, new_widths):
    """Where each component alone would carry x, (B, D, K)."""
    return new_centers + new_widths * ((x[..., None] - centers) / widths)


# Compiled for those who call a map outside `jit`.
@jax.custom_jvp
@jax.jit
def _transport(x, same, log_weights, centers, widths, new_centers, new_widths):
    """(8), by bisection: `same`, (B, D), says where the two times are one; the others are those of `_excess`."""
    # All components together carry x to a point between those of each.
    alone = _alone(x, centers, widths, new_centers, new_widths)

    # To the last digit, of a number or of the narrowest component; a component that is narrow at s sends x far away, alone.
    digits = jnp.finfo(x.dtype).eps / 2

    def apart(ends):
        low, high = ends
        middle, fine = low + (high - low) / 2, digits * jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), new_widths.min(-1) / 4)
        return (~same & (high - low > fine) & (low < middle) & (middle < high)).any()

    def halve(ends):
        low, high = ends
        middle = low + (high - low) / 2
        short = _excess(middle, x, log_weights, centers, widths, new_centers, new_widths) < 0
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    low, high = lax.while_loop(apart, halve, (alone.min(-1), alone.max(-1)))
    return jnp.where(same, x, low + (high - low) / 2)


@_transport.defjvp
def _transport_jvp(primals, tangents):
    """Derivatives by the implicit function theorem, of any order since the map is in them."""
    x, same, *laws = primals
    y = _transport(x, same, *laws)
    moved = jax.jvp(lambda x, *laws: _excess(y, x, *laws), (x, *laws), (tangents[0], *tangents[2:]))[1]
    slope = jax.jvp(lambda y: _excess(y, x, *laws), (y,), (jnp.ones_like(y),))[1]
    # Where y is a point of data, all of x nearby is carried to it.
    log_weights, centers, widths, new_centers, new_widths = laws
    eps, points, apart = jnp.finfo(y.dtype).eps, new_widths == 0, y[..., None] - new_centers
    at = points & (log_weights > -jnp.inf)[None, None] & (jnp.abs(apart) <= 8 * (eps * jnp.abs(new_centers) + jnp.finfo(y.dtype).tiny))
    found, weights = at.any(-1), jnp.exp(log_weights)[None, None]
    # In time it moves with its component, and with that share of its noise which lies below x.
    below = jnp.where(points, apart > 0, ndtr(apart / jnp.where(points, 1, new_widths)))
    own = (weights * (ndtr((x[..., None] - centers) / widths) - jnp.where(at, 0, below))).sum(-1, keepdims=True)
    share = own / jnp.where(found[..., None], jnp.where(at, weights, 0).sum(-1, keepdims=True), 1)
    carried = tangents[5] + tangents[6] * ndtri(jnp.clip(share, eps, 1 - eps))
    ended = jnp.where(at, carried, 0).sum(-1) / jnp.maximum(at.sum(-1), 1)
    return y, jnp.where(found, ended, -moved / jnp.where(found, 1, slope))


def _time_of_map(name, t, x):
    """A time by its own name, shaped to multiply x."""
    try:
        return paths.lift(checks.on_path(t), x)
    except (TypeError, ValueError) as error:
        raise type(error)(name + str(error).removeprefix("t")) from error


def _check_start(path, parts, s):
    """Raises where a map would start from points without noise, at a time whose value is known."""
    try:
        with jax.ensure_compile_time_eval():
            ended = np.any(np.asarray(path.beta(np.asarray(s, jnp.result_type(float)))) == 0)
            points = any(np.any(np.asarray(_flat(part).scales) == 0) for part in parts)
    except (jax.errors.JAXTypeError, TypeError):
        # A path or data of numbers that are not known.
        return
    if ended and points:
        raise ValueError(
            f"s has a time of {path} at which no noise is left, where components with a scale of 0 are points and nothing flows from them: "
            "start the map earlier, or give scales above 0."
        )


def _carry(mixture, x, same, alpha, beta, new_alpha, new_beta):
    """The map of one distribution; all but it (B, D)."""
    log_weights, means, scales = (part.astype(x.dtype) for part in _components(mixture))
    means, scales = means.T[None], jnp.broadcast_to(scales, means.shape).T[None]

    def law(alpha, beta):
        alpha, beta = alpha[..., None], beta[..., None]
        # The root has no derivative at 0, where the width of a point is that of its noise.
        points = scales == 0
        # Squares of small scales are 0.
        width = jnp.hypot(jnp.where(points, 1, alpha * scales), jnp.where(points, 0, beta))
        return alpha * means, jnp.where(points, beta, width)

    (centers, widths), new_law = law(alpha, beta), law(new_alpha, new_beta)
    if len(log_weights) == 1:
        y = _alone(x, centers, jnp.where(same[..., None] & (widths == 0), 1, widths), *new_law)[..., 0]
        # To the last bit x where the times are one, with derivatives in both.
        return lax.stop_gradient(jnp.where(same, x, y)) + (y - lax.stop_gradient(y))
    return _transport(x, same, log_weights, centers, widths, *new_law)


def flow_map(path, distribution) -> Callable:
    """The exact flow map, which carries a state along the probability flow from any time to any other, earlier or later.

    d/dt X_{s,t}(x) = u_t(X_{s,t}(x)),  X_{s,s}(x) = x        (8) (Boffi et al. 2024, arXiv:2406.07507)

    On the line it is solved for, of one component in any dimension it is X_{s,t}(x) = alpha_t m + sqrt(v_t / v_s) (x - alpha_s m).
    Its derivatives are exact too, of any order, forwards and in reverse, in x, in both times and in the numbers of the distribution and
    the path: in t the velocity at X_{s,t}(x), in s minus dX / dx times the velocity at x. In a time they exist where the path's do.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      distribution: a `GaussianMixture` of one component, or of any number of one coordinate; or a tuple of such, of a vector whose parts
        are independent.
    Returns:
      The map, (x, s, t) -> like x: states (B, ...) at s, and where they are at t, both times () or (B,). Of a tuple the states are
      (B, D), its parts side by side. With scales above 0 it exists from 0 to 1; points without noise go nowhere, and no map starts there.
    Raises:
      TypeError: if `path` is no path, or `distribution` none of these.
      ValueError: if several components have several coordinates, or a distribution's arrays do not go together or are out of range; of
        the map, if the state is not like them, or it is known to start from points.
    """
    checks.path(path)
    several, follow = isinstance(distribution, tuple), "follow marginals.velocity by sampling.sample_ode."
    parts = distribution if several else (distribution,)
    for part in parts:
        if not isinstance(part, GaussianMixture):
            raise TypeError(
                f"distribution, or a part of it, is of the type {type(part).__name__}, but an exact map is that of a GaussianMixture, or "
                f"of a tuple of them: of others {follow}"
            )
    shapes = [_components(part)[1].shape for part in parts]
    for count, numbers in shapes:
        if count > 1 and numbers > 1:
            raise ValueError(
                f"distribution has {count} components of {numbers} coordinates, but an exact map is that of one component, or of one "
                f"coordinate: give a tuple of distributions if the coordinates are independent, else {follow}"
            )
    if several and (not parts or any(_layout(part) is not None for part in parts)):
        raise ValueError("distribution is a tuple, but not of distributions of one array each: give one at least, with means (K, D).")
    sizes = [numbers for _, numbers in shapes]

    def flow(x, s, t):
        like, (x, layout) = x, _state(path, parts[0], x)
        if (several and x.ndim != 2) or x[0].size != sum(sizes):
            raise ValueError(
                f"x has shape {x.shape}, but the distribution is one of {sum(sizes)} numbers per example: give x as (B, {sum(sizes)})"
                + (", the parts of the tuple side by side." if several else ", or with as many on several axes.")
            )
        flat = x.reshape(x.shape[0], -1)
        start, end = _time_of_map("s", s, flat), _time_of_map("t", t, flat)
        if not isinstance(s, Tracer):
            _check_start(path, parts, checks.on_path(s))
        schedules = [jnp.asarray(value, end.dtype) for value in (path.alpha(start), path.beta(start), path.alpha(end), path.beta(end))]
        columns = [jnp.broadcast_to(each, flat.shape) for each in (flat.astype(end.dtype), start == end, *schedules)]
        blocks = zip(*(jnp.split(each, np.cumsum(sizes)[:-1], axis=1) for each in columns), strict=True)
        carried = [_carry(part, *block) for part, block in zip(parts, blocks, strict=True)]
        value = jnp.concatenate(carried, axis=1).reshape(x.shape).astype(x.dtype)
        return value if layout is None else layout.unflatten(value, like=like)

    return flow
