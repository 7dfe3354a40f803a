"""Targets: every pair converts there and back, by the notes' formulas, up to the ends of the path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, PATHS, TARGETS, mixture, name

from fmjax import losses, marginals, paths, sampling, targets, times

each_path = pytest.mark.parametrize("path", PATHS, ids=name)
each_source = pytest.mark.parametrize("source", TARGETS, ids=name)
each_target = pytest.mark.parametrize("target", TARGETS, ids=name)


def draws(key, shape=(6, 4, 4, 3)):
    key_0, key_1, key_t = jax.random.split(key, 3)
    t = jax.random.uniform(key_t, shape[:1], minval=0.1, maxval=0.9)
    return jax.random.normal(key_0, shape), jax.random.normal(key_1, shape), t


def value_of(target, path, x_0, x_1, t):
    a, b = target(path, paths.lift(t, x_0))
    return a * x_1 + b * x_0


@each_path
@each_source
@each_target
def test_conversions_are_exact_and_round_trip(path, source, target, key, x64):
    x_0, x_1, t = draws(key)
    x = paths.interpolate(path, x_0, x_1, t)
    value, wanted = (value_of(row, path, x_0, x_1, t) for row in (source, target))
    converted = targets.convert(path, value, x, t, source=source, target=target)
    back = targets.convert(path, converted, x, t, source=target, target=source)
    scale = max(1, float(jnp.abs(wanted).max()), float(jnp.abs(value).max()))
    np.testing.assert_allclose(back, value, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(converted, wanted, rtol=0, atol=1e-12 * scale)


@each_path
def test_rows_are_the_definitions(path, key, x64):
    x_0, x_1, t = draws(key)
    np.testing.assert_allclose(value_of(targets.velocity, path, x_0, x_1, t), paths.flow(path, x_0, x_1, t)[1], rtol=1e-12, atol=1e-12)
    x = paths.interpolate(path, x_0, x_1, t)
    np.testing.assert_allclose(value_of(targets.score, path, x_0, x_1, t), paths.conditional_score(path, x, x_1, t), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(value_of(targets.noise, path, x_0, x_1, t), x_0)
    np.testing.assert_array_equal(value_of(targets.data, path, x_0, x_1, t), x_1)
    alpha, beta = (schedule(paths.lift(t, x)) for schedule in (path.alpha, path.beta))
    np.testing.assert_allclose(value_of(targets.v, path, x_0, x_1, t), alpha * x_0 - beta * x_1, rtol=1e-12)


@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine(), paths.Polynomial(2.0)], ids=name)
def test_velocity_and_score_convert_by_the_notes(path, x64):
    t = jnp.linspace(0.05, 0.95, 19)
    alpha, beta = path.alpha(t), path.beta(t)
    d_alpha, d_beta = targets.velocity(path, t)
    a, b = targets.coefficients(path, t, source=targets.score, target=targets.velocity)
    np.testing.assert_allclose(a, d_alpha / alpha, rtol=1e-12)
    np.testing.assert_allclose(b, beta**2 * d_alpha / alpha - d_beta * beta, rtol=1e-12)
    p, q = targets.coefficients(path, t, source=targets.velocity, target=targets.score)
    # Notes 004 print alpha_t for alpha'_t in the first term of the denominator: the closed form has the derivative.
    denominator = beta**2 * d_alpha - alpha * d_beta * beta
    np.testing.assert_allclose(p, -d_alpha / denominator, rtol=1e-12)
    np.testing.assert_allclose(q, alpha / denominator, rtol=1e-12)


def test_noise_is_minus_beta_score(key, x64):
    x_0, x_1, t = draws(key)
    path = paths.Cosine()
    x = paths.interpolate(path, x_0, x_1, t)
    noise = targets.convert(path, -x_0 / path.beta(paths.lift(t, x)), x, t, source=targets.score, target=targets.noise)
    np.testing.assert_allclose(noise, x_0, rtol=1e-12)


@each_source
@each_target
@pytest.mark.parametrize("path", BOUNDED, ids=name)
def test_coefficients_at_the_ends_are_their_limits(path, source, target):
    """At t = 0 noise and score say nothing of the data, at t = 1 data say nothing of the noise; all else has a limit."""
    for end, inside in ((0.0, 1e-4), (1.0, 1 - 1e-4)):
        with jax.enable_x64(True):
            limit = targets.coefficients(path, jnp.array(inside), source=source, target=target)
        at_end = targets.coefficients(path, jnp.array(end), source=source, target=target)
        if all(abs(float(value)) < 100 for value in limit):
            np.testing.assert_allclose(at_end, [float(value) for value in limit], atol=3e-3)


def test_derivatives_of_coefficients_in_time(x64):
    """Of the linear path in closed form, to the second order: at its ends, and where a coefficient is 0 in passing."""
    known = {
        (targets.velocity, targets.score): lambda t: (-1 / (1 - t), t / (1 - t)),
        (targets.velocity, targets.noise): lambda t: (1.0 + 0 * t, -t),
        (targets.velocity, targets.data): lambda t: (1.0 + 0 * t, 1 - t),
        (targets.velocity, targets.v): lambda t: (2 * t - 1, -(t**2) - (1 - t) ** 2),
        (targets.noise, targets.velocity): lambda t: (1 / t, -1 / t),
        (targets.data, targets.velocity): lambda t: (-1 / (1 - t), 1 / (1 - t)),
        (targets.data, targets.noise): lambda t: (1 / (1 - t), -t / (1 - t)),
    }

    def derivatives(f):
        return jax.jit(lambda t: [derivative(f)(t) for derivative in (jax.jacfwd, jax.jacrev, lambda f: jax.jacfwd(jax.jacrev(f)))])

    for (source, target), formula in known.items():
        ours = functools.partial(targets.coefficients, paths.Linear(), source=source, target=target)
        for t in (0.0, 0.5, 1.0):
            with np.errstate(divide="ignore", invalid="ignore"):
                expected = formula(np.float64(t))
            if not np.isfinite(expected).all():
                continue
            np.testing.assert_allclose(ours(t), expected, atol=1e-12)
            for one, other in zip(derivatives(ours)(t), derivatives(formula)(t), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-12)


def test_ends_that_matter_are_finite():
    """What a sampler evaluates at t = 0, and a score network's velocity at t = 1."""
    for path in BOUNDED:
        for source in (targets.velocity, targets.noise, targets.v, targets.data):
            assert np.isfinite(targets.coefficients(path, 0.0, source=source, target=targets.score)).all()
        for source in (targets.score, targets.noise, targets.v):
            assert np.isfinite(targets.coefficients(path, 1.0, source=source, target=targets.velocity)).all()


@each_source
@each_target
def test_marginal_expectations_convert_like_single_draws(source, target, key, x64):
    """E[a x_1 + b x_0 | x] is affine in the others too: the notes' conversion of marginals."""
    path, t = paths.Cosine(), 0.6
    x = jax.random.normal(key, (7, 2))
    score = marginals.score(path, mixture())(x, t)
    noise = -path.beta(t) * score
    data = (x - path.beta(t) * noise) / path.alpha(t)
    value, wanted = (row(path, t)[0] * data + row(path, t)[1] * noise for row in (source, target))
    np.testing.assert_allclose(targets.convert(path, value, x, t, source=source, target=target), wanted, rtol=1e-11, atol=1e-11)


@each_path
def test_converted_field_is_the_marginal_velocity(path, key, x64):
    x, t = jax.random.normal(key, (7, 2)), jnp.linspace(0.1, 0.9, 7)
    field = targets.convert_field(path, marginals.score(path, mixture()), source=targets.score, target=targets.velocity)
    np.testing.assert_allclose(field(x, t), marginals.velocity(path, mixture())(x, t), rtol=1e-9, atol=1e-9)


@each_path
@each_source
@each_target
def test_weight_turns_one_loss_into_another(path, source, target, key, x64):
    x_0, x_1, t = draws(key, (6, 5))
    guess = losses.denoising(lambda x, t: jnp.sin(x), path, x_0, x_1, t, target=source)
    field = targets.convert_field(path, lambda x, t: jnp.sin(x), source=source, target=target)
    expected = losses.denoising(field, path, x_0, x_1, t, target=target)
    np.testing.assert_allclose(guess * targets.weight(path, t, source=source, target=target), expected, rtol=1e-8)


def test_a_target_of_ones_own_converts(key, x64):
    """A target is a function, so a new one needs no registration: here the displacement x_1 - x_0."""

    def displacement(path, t):
        return jnp.ones_like(t), -jnp.ones_like(t)

    x_0, x_1, t = draws(key)
    path = paths.Cosine()
    x = paths.interpolate(path, x_0, x_1, t)
    value = targets.convert(path, x_1 - x_0, x, t, source=displacement, target=targets.velocity)
    np.testing.assert_allclose(value, paths.flow(path, x_0, x_1, t)[1], rtol=1e-11, atol=1e-11)


def test_half_precision_converts_in_float32(key):
    x = jax.random.normal(key, (8, 3), jnp.bfloat16)
    value = targets.convert(paths.Linear(), x, x, 0.5, source=targets.noise, target=targets.velocity)
    assert value.dtype == jnp.bfloat16
    exact = targets.convert(
        paths.Linear(), x.astype(jnp.float32), x.astype(jnp.float32), 0.5, source=targets.noise, target=targets.velocity
    )
    np.testing.assert_array_equal(value, exact.astype(jnp.bfloat16))


def test_bad_input_is_named():
    x = jnp.zeros((4, 3))
    arguments = {"source": targets.noise, "target": targets.data}
    with pytest.raises(ValueError, match=r"value has shape \(4, 1\)"):
        targets.convert(paths.Linear(), jnp.zeros((4, 1)), x, 0.5, **arguments)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        targets.convert(paths.Linear(), x, x, jnp.zeros(3), **arguments)
    with pytest.raises(TypeError, match="value has dtype int32"):
        targets.convert(paths.Linear(), jnp.zeros((4, 3), int), x, 0.5, **arguments)


@pytest.mark.parametrize(
    ("source", "target"), [*((path, PATHS[0]) for path in PATHS), *((PATHS[1], path) for path in PATHS), (PATHS[-1], PATHS[-1])], ids=name
)
def test_a_field_of_one_path_along_another_is_that_paths(source, target, key, x64):
    """The velocity that would have been learned along `target`, where the source's noise is large enough."""
    data, x = mixture(), jax.random.normal(key, (6, 2))
    least = jnp.max(jnp.stack([path.alpha(0.0) / (path.alpha(0.0) + path.beta(0.0)) for path in (source, target)]).astype(float))
    t = paths.time_from_signal_fraction(target, jnp.linspace(least + 0.01, 0.98, 6))
    changed = targets.change_path(marginals.velocity(source, data), source=source, target=target)
    exact = marginals.velocity(target, data)(x, t)
    np.testing.assert_allclose(changed(x, t), exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(changed(x, t[2]), marginals.velocity(target, data)(x, t[2]), rtol=1e-6, atol=1e-6)


def test_a_changed_path_leads_to_the_same_data(key, x64):
    """A flow is its data's, whatever the path: each x_0 ends where it ended before."""
    data, x_0 = mixture(), jax.random.normal(key, (32, 2))
    ends = []
    for target in (paths.Linear(), paths.Cosine(), paths.Polynomial(2.0)):
        field = targets.change_path(marginals.velocity(paths.Linear(), data), source=paths.Linear(), target=target)
        ends.append(sampling.sample_ode(field, x_0, jnp.linspace(0, 1, 201), step=sampling.rk4)[0])
    np.testing.assert_allclose(ends[1:], [ends[0]] * 2, atol=1e-5)


def test_a_changed_path_from_predicted_noise_in_half_precision(key):
    """What a network of another prediction and dtype needs: convert first, then change."""
    data, x = mixture(), jax.random.normal(key, (6, 2))
    source, target = paths.VariancePreserving(), paths.Linear()
    noise = targets.convert_field(source, marginals.velocity(source, data), source=targets.velocity, target=targets.noise)
    learned = targets.convert_field(source, noise, source=targets.noise, target=targets.velocity)
    changed = targets.change_path(learned, source=source, target=target)
    np.testing.assert_allclose(changed(x, 0.5), marginals.velocity(target, data)(x, 0.5), rtol=1e-3, atol=1e-4)
    assert changed(x.astype(jnp.bfloat16), 0.5).dtype == jnp.bfloat16


# EDM's preconditioning, against its table 1 written anew.


@dataclasses.dataclass(frozen=True)
class EDM:
    """x = x_1 + sigma x_0 with sigma from 80 to 0.002 in EDM's own time, as a path."""

    def alpha(self, t):
        return jnp.ones_like(t)

    def beta(self, t):
        return (80.0 ** (1 / 7) + t * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7


def test_edm_target_and_scaling_are_edms_own(key, x64):
    """D = c_skip x + c_out F(c_in x; c_noise), and the loss lambda |D - x_1|^2 is that of F."""
    path, sigma_data = EDM(), 0.5
    t = jnp.linspace(0.0, 1.0, 9)
    sigma = path.beta(t)[:, None]
    x_1, x_0 = sigma_data * jax.random.normal(key, (9, 4)), jax.random.normal(jax.random.key(1), (9, 4))
    x = x_1 + sigma * x_0
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / jnp.sqrt(sigma**2 + sigma_data**2)
    c_in, c_noise = 1 / jnp.sqrt(sigma**2 + sigma_data**2), jnp.log(sigma) / 4
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

    def network(x, noise):
        return jnp.sin(x + paths.lift(noise, x))

    expected = c_skip * x + c_out * network(c_in * x, c_noise[:, 0])
    field = targets.scale_input(path, network, sigma_data, time=lambda t: targets.c_noise(path, t))
    found = targets.convert(path, field(x, t), x, t, source=targets.edm(sigma_data), target=targets.data)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    ours = losses.denoising(field, path, x_0, x_1, t, target=targets.edm(sigma_data))
    np.testing.assert_allclose(ours, (weight * (expected - x_1) ** 2).mean(1), rtol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_edm_target_has_unit_variance_and_says_nothing_of_the_state(path, x64):
    t = jnp.linspace(0.05, 0.95, 7)
    for sigma_data in (0.5, 1.0, 3.0):
        a, b = targets.edm(sigma_data)(path, t)
        alpha, beta = path.alpha(t), path.beta(t)
        np.testing.assert_allclose(a**2 * sigma_data**2 + b**2, 1, rtol=1e-9)
        np.testing.assert_allclose(a * alpha * sigma_data**2 + b * beta, 0, atol=1e-9)
        seen = targets.scale_input(path, lambda x, t: x, sigma_data)(jnp.ones((7, 3)), t)
        np.testing.assert_allclose(seen[:, 0] ** 2 * (alpha**2 * sigma_data**2 + beta**2), 1, rtol=1e-6)
    if path in (paths.Cosine(), paths.VariancePreserving()):
        np.testing.assert_allclose(targets.edm(1.0)(path, t), -np.asarray(targets.v(path, t)), rtol=1e-6)


def test_c_noise_is_finite_or_says_so():
    np.testing.assert_allclose(targets.c_noise(paths.Linear(), 0.25), np.log(3) / 4, rtol=1e-6)
    with pytest.raises(ValueError, match=r"log\(beta / alpha\) is infinite on Linear\(\) at one of t = 0"):
        targets.c_noise(paths.Linear(), 0.0)
    with pytest.raises(ValueError, match="let the network see t itself"):
        targets.c_noise(paths.Linear(), jnp.array([0.5, 1.0]))


def test_a_network_of_noise_levels_is_refused_where_they_are_infinite():
    """By a sampler, eager and compiled, rather than samples of NaN."""
    path, x_0 = paths.Linear(), jnp.ones((4, 2))
    scaled = targets.scale_input(path, lambda x, t: x * jnp.sin(t), time=lambda t: targets.c_noise(path, t))
    velocity = targets.convert_field(path, scaled, source=targets.edm(), target=targets.velocity)

    def sample(grid, step):
        return sampling.sample_ode(velocity, x_0, grid, step=step)[0]

    for grid, step in ((times.uniform_grid(5), sampling.euler), (times.karras(path, 5), sampling.heun)):
        with pytest.raises(ValueError, match=r"log\(beta / alpha\) is infinite on Linear\(\) at one of t"):
            sample(grid, step)
        with pytest.raises(ValueError, match="log"):
            jax.jit(lambda grid=grid, step=step: sample(grid, step))()
    assert jnp.isfinite(sample(times.karras(path, 5), sampling.edm_heun(path))).all()


def test_a_joint_path_has_no_one_noise_level():
    path = paths.joint(paths.Linear(), {"a": jnp.ones((2, 3))})
    for call in (
        lambda: targets.c_noise(path, 0.5),
        lambda: times.karras(path, 5),
        lambda: times.log_snr_grid(path, 5, 0.1, 0.9),
        lambda: times.log_normal(jax.random.key(0), 5, path),
    ):
        with pytest.raises(TypeError, match=r"A joint path has .* noise level"):
            call()
    with pytest.raises(TypeError, match="no one time for a noise level"):
        targets.change_path(lambda x, t: x, source=path, target=paths.Cosine())
