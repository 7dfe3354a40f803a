"""Stochastic: diffusion models on a path, for any sigma_t, and steps that know the path.

Every sigma_t >= 0 gives (3) of `fmjax.sampling` the marginals of the flow. With D = E[x_1 | x] and E = E[x_0 | x] held over a step from
t to s, (3) is solved exactly by

    x_s = alpha_s D + beta_s (k E + sqrt(1 - k^2) epsilon),   k = exp(-tau / 2),   tau = int_t^s sigma^2 / beta^2      (5)

which is DDIM for sigma = 0 and DDPM's posterior for the reverse SDE, `sampling.sigma_sbdm`, whose k is rho, the noise level at s over
that at t. (5) takes away (1 - k)^2 beta^2 g of the variance, g the part of x_0 that x does not tell: of the order of the step squared
for k >= rho. A larger sigma, such as a constant near data, where tau grows without bound, would make that of the step's order 1. So
k is held at rho at least, and what sigma asks beyond it is Langevin dynamics at s, whose drift and noise balance for any data,

    ... - beta_s a E + sqrt(2 a beta_s alpha_s beta_t / alpha_t) epsilon,   a = min((tau + 2 log rho) / 2, 1 / 2)        (6)

with noise of one draw. A step resolves no more than a = 1/2, where the noise that it renews is no longer small beside what it adds; so
much noise is left out where sigma asks for more, in times that shrink with the step. Neither (5) nor (6) divides by beta: what a
network gets wrong in E is not multiplied near data, as the drift of (3) does.
"""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fmjax import checks, paths, states, targets
from fmjax.paths import Field
from fmjax.sampling.checks import (
    SDE,
    check_domain,
    check_drift,
    check_ends,
    check_range,
    check_sde,
    check_sigma,
    check_step,
    check_steps,
    coefficient,
    drift_at_end,
    evaluated_at_end,
)
from fmjax.sampling.reparametrisation import (
    NODES,
    WEIGHTS,
    Position,
    anywhere,
    basis_weights,
    combine,
    elapsed,
    enter,
    leave,
    noise_kept,
    path_heun,
    per_coordinate,
    position,
    size,
    squared_noise,
)
from fmjax.sampling.scan import follow_sde
from fmjax.sampling.steps import DiffusionStep, Multistep, PathStep, noise


def sde_extension(velocity_field, score_field, sigma) -> Field:
    """The SDE extension trick from a velocity and a score: a drift for `sample_sde` with the velocity's marginals.

    u_t(x) + sigma_t^2 / 2 grad log p_t(x)    (MIT 6.S184, "SDE extension trick")

    which is that of (3) of `fmjax.sampling`.

    Args:
      velocity_field: (x, t) -> u_t(x), like x.
      score_field: (x, t) -> grad log p_t(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x.
    Raises:
      TypeError: if a field is no function, or sigma neither a number nor a function.
    """
    checks.function("velocity_field", velocity_field, checks.FIELD)
    checks.function("score_field", score_field, checks.FIELD)
    sigma = coefficient(sigma)

    def drift(x, t, velocity_field, score_field):
        velocity, score = velocity_field(x, t), score_field(x, t)
        checks.like("The velocity", velocity, x)
        checks.like("The score", score, x)
        return velocity + sigma(paths.lift(t, x)) ** 2 / 2 * score

    return paths.on_states(drift, velocity_field, score_field)


def sde_drift(path, velocity_field, sigma) -> Field:
    """The SDE extension trick from a velocity alone: on a path, the score follows from it.

    u_t(x) + sigma_t^2 / 2 (alpha_t u_t(x) - alpha'_t x) / (beta_t (beta_t alpha'_t - alpha_t beta'_t))
    (MIT 6.S184, "Denoising Diffusion Models", whose s_t(x) prints alpha_t for alpha'_t in the denominator)

    which is the drift of (3) of `fmjax.sampling`. From a score alone, or from predicted noise or data, convert first:
    `sde_drift(path, targets.convert_field(path, score_field, source=targets.score, target=targets.velocity), sigma)`.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity_field: (x, t) -> u_t(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x, of one evaluation of `velocity_field`; its domain is beta_t > 0. It divides by beta: an error e of the
        velocity is one of about (1 + sigma_t^2 / (2 beta_t)) e near data on the linear path, and more where the velocity comes to rest
        there, so that a sigma which does not fall with beta asks for `sample_diffusion(..., times.uniform_grid(100))`, whose
        `ancestral` does not follow this drift.
    Raises:
      TypeError: if `path` is no path, the field is no function, or sigma is neither a number nor a function.
    """

    checks.path(path)
    checks.function("velocity_field", velocity_field, checks.FIELD)
    sigma = coefficient(sigma)

    def drift(x, t, velocity_field):
        checks.times(checks.on_path(t), checks.floats("x", x))
        u = velocity_field(x, t)
        score = targets.convert(path, u, x, t, source=targets.velocity, target=targets.score)
        return sde_extension(lambda x, t: u, lambda x, t: score, sigma)(x, t)

    return paths.on_states(drift, velocity_field, path=path)


def langevin(score_field, sigma) -> Field:
    """The drift of Langevin dynamics, under which the distribution with that score stays as it is.

    sigma_t^2 / 2 grad log p(x)    (MIT 6.S184, "Langevin dynamics")

    which is that of (4) of `fmjax.sampling`.

    Args:
      score_field: (x, t) -> grad log p(x), like x.
      sigma: the diffusion coefficient, a number or a function of t; at least 0.
    Returns:
      A field, (x, t) -> like x, for `sample_sde` with the same sigma.
    Raises:
      TypeError: if the field is no function, or sigma neither a number nor a function.
    """
    return sde_extension(lambda x, t: jax.tree.map(jnp.zeros_like, x), score_field, sigma)


_RESOLVED = 0.5
"""The largest a of (6)."""


def _renewal(path, sigma, t, dt):
    """log k of (5), the a of (6), and the noise that sigma asks for over what (5) may renew, at least 1."""
    here, there = position(path, t), position(path, t + dt)
    inner = t + dt * jnp.asarray(NODES, dt.dtype)
    sigmas, betas = jax.vmap(sigma)(inner), jax.vmap(path.beta)(inner)
    # Either may be of every coordinate of a joint path, (8, 1, D).
    axes = max(sigmas.ndim, betas.ndim)
    rates = (sigmas.reshape(*sigmas.shape, *(1,) * (axes - sigmas.ndim)) / betas.reshape(*betas.shape, *(1,) * (axes - betas.ndim))) ** 2
    # More than e^-100 of the noise never stays, and a sum without end would have no derivative.
    tau = jnp.minimum(dt * (jnp.asarray(WEIGHTS, dt.dtype).reshape(-1, *(1,) * (rates.ndim - 1)) * rates).sum(0), 200)
    rho = noise_kept(here, there)
    between_ends = rho > 0
    log_rho = jnp.log(jnp.where(between_ends, rho, 1))
    beyond = jnp.where(between_ends, tau + 2 * log_rho, 0)
    log_kept = jnp.where(beyond > 0, log_rho, -tau / 2)
    asked = jnp.where(beyond > 0, tau / jnp.where(beyond > 0, -2 * log_rho, 1), 1)
    return here, there, log_kept, jnp.clip(beyond / 2, 0, _RESOLVED), asked


def _renewed(z, slope, here, there, log_kept, excess, epsilon):
    """How (5) and (6) move z = x / (alpha + beta)."""
    lost = -jnp.expm1(log_kept) + excess
    # The shares of (6)'s beta_s alpha_s beta_t / alpha_t; without an excess nothing is divided.
    balanced = jnp.where(excess > 0, here.noise / jnp.where(excess > 0, here.data, 1), 0)
    variance = there.noise**2 * -jnp.expm1(2 * log_kept) + 2 * excess * there.noise * there.data * balanced
    fresh = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    moved = elapsed(here, there) + there.noise * here.data * lost
    return moved * slope - there.noise * lost * z + fresh * epsilon


@DiffusionStep
def ancestral(path, velocity, sigma, key, x, t, dt) -> chex.ArrayDevice:
    """Data held over a step, noise renewed as sigma says: a step for `sample_diffusion`, one evaluation, weak order 1 for every sigma.

    x_s = alpha_s D + beta_s (sqrt(1 - k^2) epsilon + k E),  k = exp(-tau / 2),  tau = int_t^s sigma^2 / beta^2

    with D = E[x_1 | x_t] and E = E[x_0 | x_t], as long as k is at least the share of the noise level that is left; more noise is renewed by
    Langevin dynamics at s, (6) of `fmjax.sampling.stochastic`. It is DDPM's posterior where sigma is `sampling.sigma_sbdm`
    (Ho et al. 2020, arXiv:2006.11239, eq. 7).

    It is finite at noise and data, and multiplies no error of a network. Derivatives in the times of the grid hold for its inner ones; in
    an end at noise or data they leave out how much noise is kept.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity: (x, t) -> u_t(x), like x.
      sigma: the diffusion coefficient, a function of t.
      key: a typed key, or one per example, (B,).
      x: the state, (B, ...).
      t: its time, ().
      dt: how long the step is, ().
    Returns:
      The state at t + dt, like x.
    """
    z, slope = enter(path, velocity, x, t)
    here, there, log_kept, excess, _ = _renewal(path, sigma, t, dt)
    return leave(path, x, z, _renewed(z, slope, here, there, log_kept, excess, noise(key, x.shape, x.dtype)), t, dt)


def _begin(path, x, times):
    check_steps(2, times)
    check_domain(path, times)
    start = jnp.full((1, *jnp.shape(path.beta(times[0]))), 0.5, times.dtype)
    return jnp.zeros((), int), Position(start, start), jnp.zeros((1, *x.shape), x.dtype)


@functools.partial(DiffusionStep, init=_begin)
def sde_dpm_solver_pp(path, velocity, sigma, key, state, x, t, dt) -> tuple[chex.ArrayDevice, Any]:
    """SDE-DPM-Solver++ 2M: `ancestral` with D a line through its last two values, a step for `sample_diffusion` of one evaluation.

    z_s = z_a + w (D_j - D),  w = min(1, -2 (log rho) / tau) s int_c^s (1 - rho_r^(1 + kappa)) l'_j(r) dr
    kappa = min(-tau / (2 log rho), 1)
    (Lu et al. 2022, arXiv:2211.01095, appendix A; the integral exact, the line in (1 - c)^2)

    with z_a where `ancestral` arrives, in the coordinates of `dpm_solver_pp`, and rho the noise level at the end over that at the start.

    It is of weak order 2 for sigma up to `sampling.sigma_sbdm`, of order 1 beyond, where the last values differ by noise that a line would
    multiply, so it is taken in the share that (5) of `fmjax.sampling.stochastic` has of the noise. There is none of a higher order, for the
    same reason.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity: (x, t) -> u_t(x), like x.
      sigma: the diffusion coefficient, a function of t.
      key: a typed key, or one per example, (B,).
      state: how many steps there were, and where and what the last value was.
      x: the state, (B, ...).
      t: its time, ().
      dt: how long the step is, ().
    Returns:
      The state at t + dt, like x, and the step's own.
    """
    index, nodes, values = state
    z, slope = enter(path, velocity, x, t)
    here, there, log_kept, excess, asked = _renewal(path, sigma, t, dt)
    data = z + here.noise * slope
    rho = noise_kept(here, there)
    log_rho = jnp.where(rho > 0, jnp.log(jnp.where(rho > 0, rho, 0.5)), -1)
    kappa = jnp.where(rho > 0, log_kept / log_rho, 0)

    def kernel(there, kappa, r, share):
        rho_r = noise_kept(r, there)
        return there.data * (1 - jnp.where(rho_r > 0, jnp.exp((1 + kappa) * jnp.log(jnp.where(rho_r > 0, rho_r, 1))), 0))

    known = jnp.asarray([index > 0])

    def line(nodes, here, there, kappa, asked):
        return basis_weights(squared_noise, nodes, known, here, there, functools.partial(kernel, there, kappa)) / asked

    weights = per_coordinate(line)(nodes, here, there, kappa, asked)
    moved = _renewed(z, slope, here, there, log_kept, excess, noise(key, x.shape, x.dtype))
    moved = moved + combine(weights, values - data[None])
    return leave(path, x, z, moved, t, dt), (index + 1, jax.tree.map(lambda a: a[None], here), data[None])


def churn(make_step=path_heun) -> DiffusionStep:
    """EDM's stochastic sampler: noise is added, and a step of the flow goes on from the time that has so much noise.

    x_r = (alpha_r + beta_r) / (alpha_t + beta) (x_t + sigma_t sqrt(h) epsilon),   beta_r / alpha_r = beta / alpha_t
    beta^2 = beta_t^2 + min(sigma_t^2 h, beta_t^2)
    (Karras et al. 2022, arXiv:2206.00364, algorithm 2, whose gamma is a choice of beta, at most sqrt(2) - 1)

    Noise is exact, so the step has the flow's error from r to t + h: weak order 2 with steps of order 2 where sigma_t^2 h is small
    beside beta_t^2, and 1 where a constant sigma makes r go back by the root of h near data. No more noise is added than there is,
    as in the paper, nor than the path has.

    Args:
      make_step: a function of the path that makes the step of the flow from r to t + h, `(field, x, t, dt) -> x`: `sampling.path_heun`,
        `sampling.edm_heun`, `sampling.ddim`, or `lambda path: sampling.midpoint`.
    Returns:
      A step for `sample_diffusion`, with the evaluations of the flow's step.
    Raises:
      TypeError: if `make_step` is not a function of the path alone.
    """
    if not checks.takes(make_step, ("path",)):
        given = getattr(make_step, "__name__", repr(make_step))
        raise TypeError(f"make_step is {given}, but it is a function of the path that makes a step of the flow: lambda path: {given}.")

    def churned(path, velocity, sigma, key, x, t, dt):
        alpha, beta = path.alpha(t), path.beta(t)
        added = jnp.minimum(sigma(t + dt / 2) * jnp.sqrt(dt), beta)
        first = paths.signal_fraction(path, jnp.zeros_like(t))
        signal = alpha / (alpha + jnp.sqrt(beta**2 + added**2))
        # The path has no more noise than at its start, in proportion to the data.
        most = jnp.where(first > 0, alpha * (1 - first) / jnp.where(first > 0, first, 1), jnp.inf)
        beyond = signal < first
        added = jnp.where(beyond, jnp.sqrt(jnp.maximum(jnp.where(beyond, most, 0) ** 2 - beta**2, 0)), added)
        larger = alpha + jnp.sqrt(beta**2 + added**2)
        # Without noise time does not go back, not by a rounding either.
        r = jnp.where(added > 0, jnp.minimum(paths.time_from_signal_fraction(path, jnp.maximum(alpha / larger, first)), t), t)
        if jnp.ndim(r):
            # The leaves of a joint path go back to one time, the latest of theirs, by the noise that each has more of there.
            own, r = r, r.max()
            alpha_r = path.alpha(r)
            more = (alpha / jnp.where(alpha_r > 0, alpha_r, 1) * path.beta(r)) ** 2 - beta**2
            added = jnp.where((own == r) | (alpha_r == 0), added, jnp.sqrt(jnp.maximum(more, 0)))
            larger = alpha + jnp.sqrt(beta**2 + added**2)
        x_r = size(path, r) / larger * (x + added * noise(key, x.shape, x.dtype))
        return make_step(path)(velocity, x_r, r, t + dt - r)

    churned.__name__ = "churn"
    return DiffusionStep(churned, at_end=lambda path: not isinstance(make_step(path), PathStep) and evaluated_at_end(make_step(path)))


def predictor_corrector(step=ancestral, *, rate=1.0, corrections=1) -> DiffusionStep:
    """A step, and Langevin dynamics at the time where it ends.

    x + beta_s (sqrt(1 - rho^2) epsilon + (rho - 1) E),   rho = exp(-rate h)    (Song et al. 2021, arXiv:2011.13456, algorithms 2 and 4)

    which is (4) of `fmjax.sampling` with sigma^2 = 2 rate beta_s^2 over a time h, the expected noise E evaluated once. The paper's steps
    have one size r whatever h, so that their bias, of r^2, stays however many there are; here rate h / 2 is r^2, its norms at their
    expectation, so that no example meets another.

    Args:
      step: the predictor: `ancestral`, `churn()`, or any other step for `sample_diffusion` without a state.
      rate: how fast noise is renewed, beside what sigma renews.
      corrections: how many after each step.
    Returns:
      A step for `sample_diffusion`, of weak order 1, with one evaluation per correction beside the predictor's.
    Raises:
      ValueError: if the rate is not positive or there is no correction.
      TypeError: if the step has a state.
    """
    if isinstance(step, Multistep) or getattr(step, "init", None) is not None:
        raise TypeError(f"step is {step!r}, which keeps its last values, but a correction changes them: take ancestral or churn().")
    checks.number("rate", rate, "how fast noise is renewed", least=0, above=True)
    checks.whole("corrections", corrections, "how many there are after each step")
    if not isinstance(step, DiffusionStep):
        check_step(step, SDE)

    def corrected(path, velocity, sigma, key, x, t, dt):
        split = jax.vmap(functools.partial(jax.random.split, num=1 + corrections)) if key.ndim else None
        keys = jnp.moveaxis(split(key), 1, 0) if split else jax.random.split(key, 1 + corrections)
        predict: Any = _bound(step, path, velocity, sigma)
        x, s = predict(sde_drift(path, velocity, sigma), sigma, keys[0], x, t, dt), t + dt
        lost = -jnp.expm1(-rate * dt)

        def correct(x, key):
            expected = targets.convert(path, velocity(x, s), x, s, source=targets.velocity, target=targets.noise)
            fresh = noise(key, x.shape, x.dtype)
            return x + path.beta(s) * (jnp.sqrt(lost * (2 - lost)) * fresh - lost * expected), None

        # At data there is nothing to correct, and a velocity may be infinite.
        return lax.cond(anywhere(path.beta(s) > 0), lambda x: lax.scan(correct, x, keys[1:])[0], lambda x: x, x)

    corrected.__name__ = "predictor_corrector"
    known = isinstance(step, DiffusionStep)
    return DiffusionStep(corrected, at_end=step.at_end if known else lambda path: False, within=step.within if known else step)


@DiffusionStep
def tweedie(path, velocity, sigma, key, x, t, dt) -> chex.ArrayDevice:
    """A last step to what the data are expected to be, where Tweedie's formula ends    (Efron 2011; SiT's last step).

    x_s = E[x_1 | x_t]

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity: (x, t) -> u_t(x), like x.
      sigma: the diffusion coefficient, not used.
      key: a typed key, not used.
      x: the state, (B, ...).
      t: its time, ().
      dt: not used.
    Returns:
      The expected data, like x.
    """
    return targets.convert(path, velocity(x, t), x, t, source=targets.velocity, target=targets.data)


def _bound(step, path, velocity, sigma):
    """A step of (2) of one that knows the path."""
    if not isinstance(step, DiffusionStep):
        return step
    known = functools.partial(step.step, path, velocity, sigma)
    if step.init is None:
        return lambda drift, sigma, key, x, t, dt: known(key, x, t, dt)
    return Multistep(functools.partial(step.init, path), lambda drift, sigma, key, state, x, t, dt: known(key, state, x, t, dt))


_MOST = 10
"""By how much a step may multiply what a velocity has wrong without a word."""


def _warn(path, sigma, times):
    """Warns where the drift of the last step multiplies the velocity's error by much, wherever that is known."""
    if isinstance(times, Tracer) or len(times) < 2:
        return
    t, s = np.asarray(times)[-2:]
    with jax.ensure_compile_time_eval():
        noise_at = sigma(t)
        by = (s - t) * noise_at**2 / 2 * jnp.abs(targets.coefficients(path, t, source=targets.velocity, target=targets.score)[1])
    if not isinstance(by, Tracer) and np.asarray(by).max() > _MOST:
        warnings.warn(
            f"At t = {t:g} one step of the drift multiplies what the velocity has wrong by {np.asarray(by).max():.2g}, since sigma is "
            f"{np.asarray(noise_at).max():.2g} where little noise is left. A learnt velocity asks for a step that knows the path, such as "
            "step=sampling.ancestral, or a sigma that falls with beta, such as sampling.sigma_beta(path).",
            stacklevel=3,
        )


def sample_diffusion(
    path, velocity, sigma, key, x_0, times, *, step: Any = ancestral, last: Any = None, save=None, save_every=1
) -> tuple[chex.ArrayDevice, Any]:
    """Samples a diffusion model: the SDE, (3) of `fmjax.sampling`, that has the marginals of a flow, for any sigma_t, along a grid.

    dX = (u_t + sigma_t^2 / 2 grad log p_t)(X) dt + sigma_t dW    (MIT 6.S184, "SDE extension trick")

    The score follows from the velocity on the path. `sampling.sigma_beta(path)` is a good sigma: it goes with the noise that is left. A
    constant one asks for more and more near data; `ancestral`, the default, and the other steps that know the path follow it safely on
    any grid, such as `times.uniform_grid(100)`. `euler_maruyama` multiplies the network's error by sigma^2 / (2 beta) there, and warns.
    Outside `jax.jit` each call compiles anew.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      velocity: (x, t) -> u_t(x), like x; t is a scalar here. Another prediction is one after `targets.convert_field`.
      sigma: the diffusion coefficient, a number or a function of t; at least 0. `fmjax.sampling` has choices.
      key: a typed key; or one per example, (B,), of which example i then depends on the i-th alone.
      x_0: noise as the path has it where the grid starts, (B, ...), any float dtype: N(0, I) where beta_0 = 1, as on all paths here,
        beta_0 times that on one of yours that has more. The state is float32 or wider.
      times: an increasing grid in [0, 1], (n + 1,).
      step: `ancestral`, `sde_dpm_solver_pp`, `churn()`, `predictor_corrector()` or a `DiffusionStep` of yours; or a step for any SDE, of
        the drift that is made here: `euler_maruyama`, `stochastic_heun`.
      last: the last step where it is another one, as `step`: `euler_maruyama_noiseless`, `tweedie`.
      save: what to keep of every state, `(x, t) -> any pytree`; `lambda x, t: x` keeps the trajectory.
      save_every: keep only every so many states, a divisor of the number of steps without the last one.
    Returns:
      x_1, like x_0, and what was saved, as `sample_sde` gives them.
    Raises:
      TypeError: if x_0 is not of floats, the key is not typed, or the step is of another kind.
      ValueError: if the grid does not increase or leaves the path, the keys are neither one nor one per example, the velocity's output has
        another shape than x, a known end of the grid is one at which the step would meet an infinite drift or sigma, a step that
        has a state needs more steps than there are, or `save_every` does not divide their number.
    """
    paths.fits(path, x_0)
    checks.function("velocity", velocity, checks.FIELD)
    if (layout := states.layout(x_0)) is not None:
        velocity, flat, save = layout.field(velocity), layout.flatten("x_0", x_0), layout.of_state(save)
        options = {"step": step, "last": last, "save": save, "save_every": save_every}
        x_1, saved = sample_diffusion(path, velocity, sigma, key, flat, times, **options)
        return layout.unflatten(x_1, like=x_0), saved
    x_0, sigma, velocity = checks.batch("x_0", x_0), coefficient(sigma), checks.like_state(velocity)
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    check_range(times)
    drift = checks.like_state(sde_drift(path, velocity, sigma))
    bound, bound_last = (each if each is None else _bound(each, path, velocity, sigma) for each in (step, last))
    check_sde(key, x_0, bound, bound_last)
    check_sigma(sigma, times)
    for each, end in ((step, 0), (step if last is None else last, -1)):
        knows = isinstance(each, DiffusionStep)
        if knows and end == 0:
            check_domain(path, times)
        if knows and (end == 0 or each.at_end(path)):
            check_ends(velocity, x_0.astype(times.dtype), times, (end,))
        plain = each.within if knows else each
        if plain is not None and (end == 0 or drift_at_end(plain)):
            check_drift(drift, sigma, x_0, times, (end,))
        if plain is not None and (end == 0 or last is not None):
            _warn(path, sigma, times[:-1] if end == 0 and last is not None else times)
    return follow_sde(drift, sigma, key, x_0, times, bound, bound_last, save, save_every)
