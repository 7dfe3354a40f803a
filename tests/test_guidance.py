"""Guidance: the notes' closed forms on a mixture, the number of evaluations, and labels dropped one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import BOUNDED, name

from fmjax import guidance, marginals, paths, sampling, targets

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
    """A condition an example and a null of any shape: text embeddings, say."""
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
    both = sampling.extend(velocity, score, 0.7)(x, t)
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
    with pytest.raises(ValueError, match=r"y has shape \(3,\), but it must hold one condition an example"):
        guidance.classifier_free(field_y, y[:3], NULL, 2.0)(x, 0.5)
    for rate in (-0.1, 1.5, jnp.nan):
        with pytest.raises(ValueError, match=r"rate is .*a probability"):
            guidance.drop_labels(key, y, NULL, rate)
