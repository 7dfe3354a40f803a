"""Guidance: the notes' closed forms on a mixture, the number of evaluations, and labels dropped one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BOUNDED, name

from fmjax import guidance, inverse, marginals, paths, sampling, targets

MEANS = jnp.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])
WEIGHTS = jnp.array([0.2, 0.5, 0.3])
SCALES = jnp.array([0.5, 0.6, 0.4])
NULL = 3
each_path = pytest.mark.parametrize("path", BOUNDED, ids=name)


def classes(quantity, path):
    """The exact quantity of each class's data, and last of all of them."""
    single = [marginals.GaussianMixture(jnp.ones(1), MEANS[k : k + 1], SCALES[k : k + 1]) for k in range(3)]
    return [quantity(path, data) for data in (*single, marginals.GaussianMixture(WEIGHTS, MEANS, SCALES))]


def conditional(quantity, path, calls=None):
    """(x, t, y) -> the exact quantity of class y, or of all data at the null label."""
    fields = classes(quantity, path)

    def field(x, t, y):
        if calls is not None:
            calls.append(len(x))
        return jax.vmap(lambda x, t, y: jax.lax.switch(y, [lambda x, t, f=f: f(x[None], t)[0] for f in fields], x, t))(
            x, jnp.broadcast_to(t, x.shape[:1]), y
        )

    return field


@each_path
@pytest.mark.parametrize("quantity", [marginals.velocity, marginals.score], ids=name)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_classifier_free_is_the_notes_combination(path, quantity, scale, key, x64):
    """(1 - w) f(x) + w f(x | y), for velocities and for scores."""
    x, t, y = jax.random.normal(key, (6, 2)), jnp.linspace(0.1, 0.9, 6), jnp.array([0, 1, 2, 0, 1, 2])
    fields = classes(quantity, path)
    plain = fields[-1](x, t)
    guided = jnp.stack([fields[k](x, t)[i] for i, k in enumerate(y)])
    field = guidance.classifier_free(conditional(quantity, path), y, NULL, scale)
    np.testing.assert_allclose(field(x, t), (1 - scale) * plain + scale * guided, rtol=1e-10, atol=1e-12)


def test_scale_one_is_no_guidance_in_one_evaluation(key):
    calls = []
    x, y = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    field_y = conditional(marginals.velocity, paths.Linear(), calls)
    value = guidance.classifier_free(field_y, y, NULL, 1.0)(x, 0.4)
    assert calls == [6]
    np.testing.assert_array_equal(value, field_y(x, 0.4, y))


def test_any_other_scale_is_one_batched_call(key):
    calls = []
    x, y = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    field_y = conditional(marginals.velocity, paths.Linear(), calls)
    for t in (0.4, jnp.full(6, 0.4)):
        guidance.classifier_free(field_y, y, NULL, 3.0)(x, t)
    assert calls == [12, 12]


def test_scale_may_be_traced_or_one_an_example(key):
    x, y = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    field_y = conditional(marginals.velocity, paths.Linear())
    at = lambda scale: guidance.classifier_free(field_y, y, NULL, scale)(x, 0.4)
    np.testing.assert_allclose(jax.jit(at)(1.0), at(1.0), rtol=1e-5, atol=1e-6)
    scales = jnp.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(at(scales[:, None]), [at(float(w))[i] for i, w in enumerate(scales)], rtol=1e-4, atol=1e-5)


def test_conditions_may_be_arrays(key):
    """A condition per example and a null of any shape: text embeddings, say."""
    x, y, null = jax.random.normal(key, (4, 2)), jnp.ones((4, 5, 3)), jnp.zeros((5, 3))
    field = guidance.classifier_free(lambda x, t, y: x * y.sum((1, 2))[:, None], y, null, 3.0)
    np.testing.assert_allclose(field(x, 0.5), 45 * x, rtol=1e-6)
    dropped = guidance.drop_labels(key, jnp.ones((1000, 5, 3)), null, 0.3)
    assert set(np.unique(dropped.sum((1, 2)))) == {0, 15}


@each_path
def test_classifier_guidance_is_classifier_free_on_exact_fields(path, key, x64):
    """u(x) + w b_t grad log p_t(y | x) = (1 - w) u(x) + w u(x | y), with the notes' b_t, and the same for scores."""
    x, t, w, k = jax.random.normal(key, (6, 2)), jnp.linspace(0.1, 0.9, 6), 2.5, 1
    y = jnp.full(6, k)
    densities = classes(marginals.log_density, path)

    def log_probability(x, t):
        return densities[k](x, t) + jnp.log(WEIGHTS[k]) - densities[-1](x, t)

    scales = {
        marginals.score: w,
        marginals.velocity: lambda t: w * targets.coefficients(path, t, source=targets.score, target=targets.velocity)[1],
    }
    for quantity, scale in scales.items():
        by_classifier = guidance.classifier(classes(quantity, path)[-1], log_probability, scale)(x, t)
        classifier_free = guidance.classifier_free(conditional(quantity, path), y, NULL, w)(x, t)
        np.testing.assert_allclose(by_classifier, classifier_free, rtol=1e-9, atol=1e-9)


@each_path
def test_guided_velocity_and_guided_score_are_one(path, key, x64):
    """Guidance commutes with conversion, so the notes' guided SDE may take its score from the guided velocity."""
    x, y, t = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2]), 0.4
    velocity, score = (
        guidance.classifier_free(conditional(quantity, path), y, NULL, 3.0) for quantity in (marginals.velocity, marginals.score)
    )
    converted = targets.convert_field(path, velocity, source=targets.velocity, target=targets.score)
    np.testing.assert_allclose(converted(x, t), score(x, t), rtol=1e-9, atol=1e-9)
    both = sampling.sde_extension(velocity, score, 0.7)(x, t)
    np.testing.assert_allclose(sampling.sde_drift(path, velocity, 0.7)(x, t), both, rtol=1e-9, atol=1e-9)


def test_sampling_a_class_gives_that_class(key):
    """Without guidance the exact conditional flow ends at the class's mean; with it, further from the others."""
    n, path = 4_000, paths.Linear()
    x_0, y = sampling.noise(key, (n, 2)), jnp.zeros(n, int)
    field_y = conditional(marginals.velocity, path)
    means = [sampling.sample_ode(guidance.classifier_free(field_y, y, NULL, w), x_0, jnp.linspace(0, 1, 26))[0].mean(0) for w in (1.0, 3.0)]
    np.testing.assert_allclose(means[0], MEANS[0], atol=4 * 0.5 / np.sqrt(n) + 5e-3)
    assert means[1][0] > MEANS[0, 0] + 0.1


def test_labels_are_dropped_one_by_one(key):
    y = jnp.arange(100_000) % 10
    dropped = guidance.drop_labels(key, y, 10, 0.1)
    assert dropped.dtype == y.dtype
    kept = dropped != 10
    np.testing.assert_array_equal(dropped[kept], y[kept])
    assert abs(float(kept.mean()) - 0.9) < 4 * np.sqrt(0.09 / 1e5)
    np.testing.assert_array_equal(guidance.drop_labels(key, y, 10, 0.0), y)
    np.testing.assert_array_equal(guidance.drop_labels(key, y, 10, 1.0), 10)


def test_bad_input_is_named(key):
    field_y = lambda x, t, y: x
    x, y = jnp.zeros((4, 2)), jnp.zeros(4, int)
    for scale in (jnp.nan, jnp.inf, jnp.array([1.0, jnp.nan])):
        with pytest.raises(ValueError, match=r"The guidance scale is .*must be finite"):
            guidance.classifier_free(field_y, y, NULL, scale)
        with pytest.raises(ValueError, match=r"The guidance scale is .*must be finite"):
            guidance.classifier(lambda x, t: x, lambda x, t: x.sum(1), scale)
    with pytest.raises(ValueError, match=r"y has shape \(3,\), but it must hold one condition per example"):
        guidance.classifier_free(field_y, y[:3], NULL, 2.0)(x, 0.5)
    plain, thin = lambda x, t: x, lambda x, t: x[:1]
    for field in (
        guidance.classifier_free(field_y, y, NULL, jnp.ones(3)),
        guidance.compose(field_y, [y], NULL, [jnp.ones((1, 3))]),
        guidance.autoguidance(plain, plain, jnp.ones((2, 2))),
        guidance.classifier(plain, lambda x, t: x.sum(1), jnp.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"scale has shape .*, but it multiplies x of shape \(4, 2\): .* one per example, \(4,\)"):
            field(x, 0.5)
    for field in (
        guidance.autoguidance(plain, thin, 2.0),
        guidance.autoguidance(thin, plain, 2.0),
        guidance.classifier(thin, lambda x, t: x.sum(1), 2.0),
        guidance.classifier_free(lambda x, t, y: x[:, :1], y, NULL, 2.0),
        sampling.sde_extension(plain, thin, 1.0),
    ):
        with pytest.raises(ValueError, match=r"has shape .*, but must be like x"):
            field(x, 0.5)
    for value in (lambda x, t: x, lambda x, t: x.sum(), lambda x, t: x.sum(1, keepdims=True)):
        with pytest.raises(ValueError, match=r"log_probability gives shape .* one number per example"):
            guidance.classifier(plain, value, 2.0)(x, 0.5)
    with pytest.raises(TypeError, match=r"The guidance scale is 'strong', .* but it is a real number"):
        guidance.classifier_free(field_y, y, NULL, "strong")
    with pytest.raises(ValueError, match="The guidance's weight is infinite at t = 0"):
        sampling.sample_ode(inverse.linear_inverse(paths.Linear(), plain, lambda x: x[:1], x[:, :1]), x, jnp.linspace(0, 1, 5))
    with pytest.raises(ValueError, match=r"y has shape \(\), but it must hold one condition per example"):
        guidance.drop_labels(key, 3, NULL, 0.5)
    for rate in (-0.1, 1.5, jnp.nan):
        with pytest.raises(ValueError, match=r"rate is .*the probability"):
            guidance.drop_labels(key, y, NULL, rate)


def test_a_null_that_labels_cannot_hold_is_named(key):
    """Cast to the labels' type, 256 would be class 0, and so would 0.7."""
    small, y = jnp.zeros(4, jnp.uint8), jnp.zeros(4, int)
    for labels, null, error, message in (
        (small, 256, ValueError, r"null is 256, but y has dtype uint8, which cannot hold it: give y.astype"),
        (jnp.zeros(4, jnp.int8), 300, ValueError, "null is 300, but y has dtype int8"),
        (small, -1, ValueError, "null is -1, but y has dtype uint8"),
        (y, 0.7, TypeError, r"null is 0.7, but y has dtype int32: a label for no class is a whole number"),
        (y, jnp.zeros(3, int), ValueError, r"null has shape \(3,\), but it is one condition, \(\), or one per example, \(4,\)"),
    ):
        for call in (
            lambda labels=labels, null=null: guidance.drop_labels(key, labels, null, 0.5),
            lambda labels=labels, null=null: guidance.classifier_free(lambda x, t, y: x, labels, null, 2.0),
            lambda labels=labels, null=null: guidance.compose(lambda x, t, y: x, [labels], null, [2.0]),
        ):
            with pytest.raises(error, match=message):
                call()
    np.testing.assert_array_equal(guidance.drop_labels(key, small, 255, 1.0), 255)


@pytest.mark.parametrize("combine", [guidance.extrapolate, guidance.cfg_zero_star, guidance.apg(0.3, 0.5), guidance.cfg_rescale()])
def test_a_scale_per_example_is_per_example_where_the_batch_is_square(combine, key):
    """With B = D numbers of shape (B,) could as well scale columns."""
    guided, unguided = jax.random.normal(key, (2, 4, 4))
    scales = jnp.array([0.0, 1.0, 2.0, 3.0])
    expected = jnp.concatenate([combine(guided[i : i + 1], unguided[i : i + 1], float(w)) for i, w in enumerate(scales)])
    for given in (scales, scales[:, None]):
        np.testing.assert_allclose(combine(guided, unguided, given), expected, rtol=1e-5, atol=1e-6)


def three_conditions(key):
    x, y, z = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([1, 1, 0, 2, 2, 1])
    return x, y, z, lambda k, fields, x, t: jnp.stack([fields[j](x, t)[i] for i, j in enumerate(k)])


def test_several_conditions_are_their_weighted_sum_in_one_call(key, x64):
    x, y, z, at = three_conditions(key)
    calls, fields = [], classes(marginals.velocity, paths.Linear())
    field = guidance.compose(conditional(marginals.velocity, paths.Linear(), calls), [y, z], NULL, [2.0, -0.5])
    plain = fields[-1](x, 0.4)
    expected = plain + 2.0 * (at(y, fields, x, 0.4) - plain) - 0.5 * (at(z, fields, x, 0.4) - plain)
    np.testing.assert_allclose(field(x, 0.4), expected, rtol=1e-10, atol=1e-12)
    assert calls == [18]
    one = guidance.compose(conditional(marginals.velocity, paths.Linear()), [y], NULL, [3.0])
    np.testing.assert_allclose(
        one(x, 0.4), guidance.classifier_free(conditional(marginals.velocity, paths.Linear()), y, NULL, 3.0)(x, 0.4), rtol=1e-10
    )


def test_a_negative_condition_takes_the_place_of_none(key, x64):
    x, y, z, at = three_conditions(key)
    fields = classes(marginals.velocity, paths.Linear())
    field = guidance.classifier_free(conditional(marginals.velocity, paths.Linear()), y, z, 3.0)
    np.testing.assert_allclose(field(x, 0.4), -2 * at(z, fields, x, 0.4) + 3 * at(y, fields, x, 0.4), rtol=1e-10, atol=1e-12)


COMBINATIONS = {
    "extrapolate": guidance.extrapolate,
    "cfg_zero_star": guidance.cfg_zero_star,
    "projected": guidance.apg(),
    "projected short": guidance.apg(0.3, 0.1),
    "rescaled": guidance.cfg_rescale(),
}


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_combination_is_no_guidance_at_scale_one(combine, key, x64):
    guided, unguided = jax.random.normal(key, (2, 5, 4, 4, 1))
    np.testing.assert_allclose(combine(guided, unguided, 1.0), guided, rtol=1e-12)
    # No example sees another, and zeros are no trouble.
    np.testing.assert_allclose(combine(guided, unguided, 3.0)[2:4], combine(guided[2:4], unguided[2:4], 3.0), rtol=1e-12)
    assert jnp.isfinite(combine(jnp.zeros_like(guided), jnp.zeros_like(guided), 3.0)).all()
    # Nor are they in derivatives, as of a network that starts at zero; nor are values that agree, as under a dropped label.
    for value in (jnp.zeros_like(guided), guided):
        assert all(jnp.isfinite(each).all() for each in jax.grad(lambda *both: combine(*both, 3.0).sum(), (0, 1))(value, value))


def test_combinations_are_their_formulas(key, x64):
    guided, unguided = jax.random.normal(key, (2, 5, 7))
    dot = lambda a, b: (a * b).sum(1, keepdims=True)
    # The scaled unguided value is the projection of the guided one, so what is left is orthogonal to it.
    left = guidance.cfg_zero_star(guided, unguided, 3.0) - 3 * guided
    np.testing.assert_allclose(dot(guided + left / 2, unguided), 0, atol=1e-12)
    change = guidance.apg()(guided, unguided, 3.0) - guided
    np.testing.assert_allclose(dot(change, guided), 0, atol=1e-12)
    np.testing.assert_allclose(guidance.apg(1.0)(guided, unguided, 3.0), guidance.extrapolate(guided, unguided, 3.0), rtol=1e-10)
    change = guidance.apg(1.0, 0.25)(guided, unguided, 3.0) - guided
    np.testing.assert_allclose(jnp.linalg.norm(change, axis=1), 2 * 0.25, rtol=1e-10)
    np.testing.assert_allclose(guidance.cfg_rescale(1.0)(guided, unguided, 3.0).std(1), guided.std(1), rtol=1e-10)
    np.testing.assert_allclose(guidance.cfg_rescale(0.0)(guided, unguided, 3.0), guidance.extrapolate(guided, unguided, 3.0), rtol=1e-10)


def test_guidance_outside_its_interval_is_not_evaluated(key):
    """Ten steps of Euler, four of them inside: 4 x 12 and 6 x 6 examples through the network."""
    seen, inner = [], conditional(marginals.velocity, paths.Linear())
    x, y = jax.random.normal(key, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])

    def field_y(x, t, y):
        jax.debug.callback(lambda: seen.append(len(x)))
        return inner(x, t, y)

    plain = lambda x, t: field_y(x, t, y)
    guided = guidance.classifier_free(field_y, y, NULL, 3.0)
    field = guidance.interval(guided, plain, 0.25, 0.65)
    x_1, _ = jax.jit(lambda x: sampling.sample_ode(field, x, jnp.linspace(0, 1, 11), step=sampling.euler))(x)
    x_1.block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [6] * 6 + [12] * 4
    for t in (0.1, 0.9):
        np.testing.assert_allclose(field(x, t), plain(x, t), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(field(x, 0.5), guided(x, 0.5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"t has shape \(6,\), but guidance in an interval takes one time"):
        field(x, jnp.full(6, 0.5))
    with pytest.raises(ValueError, match=r"The interval from 0.6 to 0.5 is empty"):
        guidance.interval(guided, plain, 0.6, 0.5)


def test_autoguidance_is_its_formula(key):
    x = jax.random.normal(key, (4, 2))
    calls = []
    weak = lambda x, t: calls.append(1) or -2 * x
    np.testing.assert_allclose(guidance.autoguidance(lambda x, t: x, weak, 3.0)(x, 0.5), 3 * x + 4 * x, rtol=1e-6)
    assert calls == [1]
    np.testing.assert_array_equal(guidance.autoguidance(lambda x, t: x, weak, 1.0)(x, 0.5), x)
    assert calls == [1]


MEASURED = {
    "part": (np.eye(2, 3), 0.0),
    "mean": (np.full((1, 3), 1 / 3), 0.0),
    "noisy": (np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]), 0.5),
}


@each_path
def test_inverse_problems_of_gaussian_data_are_solved_exactly(path, key, x64):
    """Data N(0, I): the guided velocity is that of the posterior, whose samples have its mean and covariance."""
    n, t, identity = 4_000, 0.6, jnp.eye(3)
    x = jax.random.normal(key, (n, 3))
    field = marginals.velocity(path, marginals.GaussianMixture(jnp.ones(1), jnp.zeros((1, 3)), jnp.ones(1)))

    def solved(matrix, noise):
        matrix, y = jnp.asarray(matrix), jnp.array([0.8, -0.3])[: len(matrix)]
        guided = inverse.linear_inverse(path, field, lambda x: matrix @ x, jnp.broadcast_to(y, (n, len(y))), noise=noise)
        # The posterior of x_1, and of x_t from it.
        gain = matrix.T @ jnp.linalg.inv(matrix @ matrix.T + noise**2 * jnp.eye(len(y)))
        mean, covariance = gain @ y, identity - gain @ matrix
        alpha, beta = path.alpha(t), path.beta(t)
        spread = jnp.linalg.inv(alpha**2 * covariance + beta**2 * identity)
        expected_data = mean[None] + alpha * (x - alpha * mean[None]) @ (covariance @ spread).T
        expected_noise = beta * (x - alpha * mean[None]) @ spread.T
        a, b = targets.velocity(path, t)
        x_1 = sampling.sample_ode(guided, path.beta(0.0) * x, jnp.linspace(1e-3, 1, 51), step=sampling.midpoint)[0]
        return y, mean, covariance, guided(x, t), a * expected_data + b * expected_noise, x_1

    found = jax.jit(lambda: {which: solved(*measured) for which, measured in MEASURED.items()})()
    for which, (y, mean, covariance, velocity, expected, x_1) in found.items():
        matrix, noise = MEASURED[which]
        np.testing.assert_allclose(velocity, expected, rtol=1e-6, atol=1e-6, err_msg=which)
        if not noise:
            np.testing.assert_allclose(x_1 @ matrix.T, jnp.broadcast_to(y, (n, len(y))), atol=0.02, err_msg=which)
        np.testing.assert_array_less(np.abs(x_1.mean(0) - mean), 4 * np.sqrt(np.diag(covariance) / n) + 0.01, err_msg=which)
        np.testing.assert_allclose(np.cov(x_1.T), covariance, atol=0.1, err_msg=which)


def test_what_is_behind_a_mask_does_not_matter(key, x64):
    """Neither in the value nor in derivatives to the second order, with and without noise."""
    path, mask, x = paths.Linear(), jnp.array([1.0, 0.0, 1.0]), jax.random.normal(key, (2, 3))

    @functools.partial(jax.jit, static_argnums=1)
    def guided(y, noise):
        return inverse.linear_inverse(path, lambda x, t: jnp.sin(x), lambda x: mask * x, y, noise=noise)(x, 0.5)

    y = x + 1
    for noise in (0.0, 0.1):
        np.testing.assert_allclose(guided(y, noise), guided(mask[None] * y, noise), rtol=1e-12)
        loss = lambda y, noise=noise: (guided(y, noise) ** 2).sum()
        slope, h = jax.jit(jax.grad(loss)), 1e-5 * jnp.ones_like(y)
        gradient = slope(y)
        np.testing.assert_allclose(gradient[:, 1], 0, atol=1e-12)
        np.testing.assert_allclose((loss(y + h) - loss(y - h)) / 2e-5, gradient.sum(), rtol=1e-6)
        curved = jax.jit(lambda y, slope=slope: jax.jvp(slope, (y,), (jnp.ones_like(y),))[1])(y)
        np.testing.assert_allclose(curved, (slope(y + h) - slope(y - h)) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_measurement_of_another_shape_is_named(key):
    x = jax.random.normal(key, (4, 2))
    field = inverse.linear_inverse(paths.Linear(), lambda x, t: -x, lambda x: x[:1], jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"y has shape \(4, 2\), but the operator gives \(4, 1\)"):
        field(x, 0.5)


def test_bad_weights_are_named(key):
    with pytest.raises(ValueError, match="There are 1 conditions and 2 scales"):
        guidance.compose(lambda x, t, y: x, [jnp.zeros(4, int)], NULL, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"The guidance scale is nan"):
        guidance.compose(lambda x, t, y: x, [jnp.zeros(4, int)], NULL, [jnp.nan])
