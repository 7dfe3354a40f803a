"""Objectives of flow maps: each has a gradient of 0 at the exact map, in its limit, and wrong ones do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATHS, name
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fmjax import betas, flow_maps, guidance, losses, marginals, paths, sampling, targets, times
from fmjax.models import dit, layers, mlp, unet

MIXTURE = marginals.GaussianMixture(jnp.array([0.3, 0.7]), jnp.array([[-1.5], [1.0]]), jnp.array([0.5, 0.3]))
GAUSSIAN = marginals.GaussianMixture(jnp.ones(1), jnp.array([[0.7]]), jnp.array([0.4]))
# Intervals within every path's finite velocities, one of them of length 0.
S, T = np.array([0.2, 0.35, 0.5, 0.6]), np.array([0.7, 0.55, 0.9, 0.6])


def basis(x, s, t):
    """Smooth functions, in whose direction a map is changed, (..., K)."""
    s, t = (jnp.broadcast_to(paths.lift(time, x), x.shape) for time in (s, t))
    return jnp.stack([jnp.ones_like(x), x, jnp.sin(2 * x + s), (t - s) * jnp.cos(x), s * t * x, jnp.exp(-((x / 4) ** 2))], axis=-1)


def near(path, distribution, theta):
    """The exact mean velocity, changed by theta."""
    exact = flow_maps.mean_velocity(marginals.flow_map(path, distribution))
    return lambda x, s, t: exact(x, s, t) + basis(x, s, t) @ theta


def gradient(path, loss, distribution=MIXTURE, at=0.0):
    """Of the mean of a loss of a changed map, in the directions of the basis; of several losses by their names."""

    @jax.jit
    def found(theta):
        means = lambda theta: jax.tree.map(jnp.mean, loss(near(path, distribution, theta)))
        return jax.jacobian(means)(theta)

    return found(jnp.full(6, at)) if isinstance(at, float) else [found(jnp.full(6, each)) for each in at]


def pairs(distribution, s, t, nodes=48):
    """All pairs of noise and data of quadratures, at each of the intervals, and their weights."""
    roots, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    means, scales = np.asarray(distribution.means)[:, 0], np.asarray(distribution.scales)
    of = np.asarray(distribution.weights) / np.asarray(distribution.weights).sum()
    data = (means[:, None] + scales[:, None] * roots[None]).ravel()
    x_0, x_1 = (grid.ravel() for grid in np.meshgrid(roots, data, indexing="ij"))
    w = (weights[:, None] * (of[:, None] * weights[None]).ravel()[None]).ravel()
    n, k = len(w), len(s)
    return np.tile(x_0, k)[:, None], np.tile(x_1, k)[:, None], np.repeat(s, n), np.repeat(t, n), np.tile(w, k) * n


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


X = np.linspace(-2, 2, 4)[:, None]
R = S + 0.4 * (T - S)


def pointwise(path):
    """Losses of a mean velocity that are 0 at the exact map of the mixture, state by state."""
    field, exact = marginals.velocity(path, MIXTURE), marginals.flow_map(path, MIXTURE)
    teacher = flow_maps.mean_velocity(exact)
    return {
        "eulerian": lambda m: flow_maps.eulerian(m, field, X, S, T),
        "lagrangian": lambda m: flow_maps.lagrangian(m, field, X, S, T),
        "self_consistency": lambda m: flow_maps.self_consistency(m, X, S, R, T),
        "progressive": lambda m: flow_maps.self_consistency(m, X, S, R, T, teacher=teacher),
        "consistency distillation": lambda m: flow_maps.consistency(m, X, S, exact(X, S, R), R, T),
    }


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_distillations_have_no_gradient_at_the_exact_map(path, wide):
    all_losses = pointwise(path)
    at_exact, beside = gradient(path, lambda m: {kind: loss(m) for kind, loss in all_losses.items()}, at=(0.0, 0.1))
    for kind in all_losses:
        assert np.abs(at_exact[kind]).max() < 1e-9 * max(1, np.abs(beside[kind]).max()), kind
        assert np.abs(beside[kind]).max() > 1e-3, kind


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("improved", [False, True])
def test_mean_flow_has_no_gradient_at_the_exact_map(path, improved, wide):
    x_0, x_1, s, t, w = pairs(GAUSSIAN, S, T, nodes=24)

    def loss(m):
        tangent = (lambda x, s: flow_maps.velocity(m)(x, s)) if improved else None
        return flow_maps.mean_flow(m, path, x_0, x_1, s, t, tangent=tangent) * w

    at_exact, beside = (np.abs(found).max() for found in gradient(path, loss, GAUSSIAN, at=(0.0, 0.1)))
    assert at_exact < 1e-7 * max(1, beside)
    assert beside > 1e-3


def wrong(kind, path, m, x_0, x_1, s, t):
    """MeanFlow with one thing wrong."""
    x, u = paths.flow(path, x_0, x_1, s)
    tangent = jnp.zeros_like(u) if kind == "no tangent" else u
    value, slope = jax.jvp(lambda x, s: m(x, s, t), (x, s), (tangent, jnp.ones_like(s) * (0 if kind == "time held" else 1)))
    length = paths.lift(s - t if kind == "sign" else t - s, x)
    target = u + length * slope
    return losses.regression(lambda x, t: value, x, s, target if kind == "not held" else lax.stop_gradient(target))


@pytest.mark.parametrize("kind", ["sign", "no tangent", "time held", "not held"])
def test_wrong_objectives_have_a_gradient_there(kind, wide):
    path = paths.Linear()
    x_0, x_1, s, t, w = pairs(GAUSSIAN, S, T, nodes=24)
    right = gradient(path, lambda m: flow_maps.mean_flow(m, path, x_0, x_1, s, t) * w, GAUSSIAN)
    found = gradient(path, lambda m: wrong(kind, path, m, x_0, x_1, s, t) * w, GAUSSIAN)
    assert np.abs(found).max() > 1e-2 > 1e4 * np.abs(right).max()


def test_consistency_training_has_it_in_the_limit_of_second_order(wide):
    path = paths.Linear()
    x_0, x_1, s, t, w = pairs(GAUSSIAN, S[:3], np.ones(3), nodes=24)

    def at(length):
        r = s + length
        x, y = paths.interpolate(path, x_0, x_1, s), paths.interpolate(path, x_0, x_1, r)
        return np.abs(gradient(path, lambda m: flow_maps.consistency(m, x, s, y, r, t) * w, GAUSSIAN)).max()

    found = [at(length) for length in (0.02, 0.01, 0.005)]
    orders = np.log2(np.array(found[:-1]) / found[1:])
    np.testing.assert_allclose(orders, 2, atol=0.1)


def test_gradients_go_through_the_prediction_alone(wide):
    """Beside the exact map, where what is compared with is not the prediction, its derivative would show."""
    path, theta = paths.Cosine(), jnp.full(6, 0.3)
    field = marginals.velocity(path, MIXTURE)
    held = near(path, MIXTURE, theta)
    x_0, x_1 = np.linspace(-1, 1, 4)[:, None], X
    for tangent in (None, lambda x, s: field(x, s)):
        x, u = paths.flow(path, x_0, x_1, S)
        along = u if tangent is None else tangent(x, S)
        slope = jax.jvp(lambda x, s: held(x, s, T), (x, S), (along, np.ones(4)))[1]
        error = held(x, S, T) - u - (T - S)[:, None] * slope
        by_hand = (2 * error[..., None] * basis(x, S, T)).mean((0, 1))
        found = gradient(path, lambda m, tangent=tangent: flow_maps.mean_flow(m, path, x_0, x_1, S, T, tangent=tangent), at=0.3)
        np.testing.assert_allclose(found, by_hand, rtol=1e-9)
    end = flow_maps.flow_map(held)(X, S, T)
    target = field(end, T)
    by_hand = jax.grad(
        lambda theta: (
            (jax.jvp(lambda t: flow_maps.flow_map(near(path, MIXTURE, theta))(X, S, t), (T,), (np.ones(4),))[1] - target) ** 2
        ).mean()
    )(theta)
    np.testing.assert_allclose(gradient(path, lambda m: flow_maps.lagrangian(m, field, X, S, T), at=0.3), by_hand, rtol=1e-9)
    first = held(X, S, R)
    second = held(X + (R - S)[:, None] * first, R, T)
    share = np.where(T > S, (R - S) / np.where(T > S, T - S, 1), 0.5)[:, None]
    by_hand = (2 * (held(X, S, T) - share * first - (1 - share) * second)[..., None] * basis(X, S, T)).mean((0, 1))
    np.testing.assert_allclose(gradient(path, lambda m: flow_maps.self_consistency(m, X, S, R, T), at=0.3), by_hand, rtol=1e-9)
    y = 0.9 * X
    apart = flow_maps.flow_map(held)(X, S, T) - flow_maps.flow_map(held)(y, R, T)
    by_hand = (2 * (apart * (T - S)[:, None])[..., None] * basis(X, S, T)).mean((0, 1))
    np.testing.assert_allclose(gradient(path, lambda m: flow_maps.consistency(m, X, S, y, R, T), at=0.3), by_hand, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_a_map_and_its_mean_velocity_are_each_others(path, wide):
    exact = marginals.flow_map(path, MIXTURE)
    mean = flow_maps.mean_velocity(exact)
    np.testing.assert_allclose(flow_maps.flow_map(mean)(X, S, T), exact(X, S, T), atol=1e-12)
    np.testing.assert_allclose(mean(X, S, S), marginals.velocity(path, MIXTURE)(X, S), atol=1e-9)
    np.testing.assert_allclose(flow_maps.velocity(mean)(X, 0.4), marginals.velocity(path, MIXTURE)(X, 0.4), atol=1e-9)
    fine = flow_maps.from_velocity(marginals.velocity(path, MIXTURE), 200, step=sampling.rk4)
    # The second derivative of a table's path jumps.
    atol = 2e-4 if isinstance(path, betas.Betas) else 1e-6
    np.testing.assert_allclose(fine(X, S, T), exact(X, S, T), atol=atol)
    np.testing.assert_allclose(fine(X, T, S), exact(X, T, S), atol=atol)


@pytest.mark.parametrize("source", [targets.data, targets.noise, targets.velocity, targets.v], ids=name)
def test_other_predictions_are_converted(source):
    path = paths.Cosine()
    field = marginals.velocity(path, MIXTURE)
    predicted = targets.convert_field(path, field, source=targets.velocity, target=source)
    m = flow_maps.convert(path, lambda x, s, t: predicted(x, s), source=source)
    np.testing.assert_allclose(m(jnp.asarray(X), 0.3, 0.3), field(jnp.asarray(X), 0.3), atol=1e-5)
    # Over an interval by the coefficients of its beginning.
    far = flow_maps.convert(path, lambda x, s, t: predicted(x, s) + t - s, source=source)
    at = lambda value: targets.convert(path, value, jnp.asarray(X), 0.3, source=source, target=targets.velocity)
    np.testing.assert_allclose(far(jnp.asarray(X), 0.3, 0.8), at(predicted(jnp.asarray(X), 0.3) + 0.5), atol=1e-5)


def test_losses_are_those_of_flow_matching_where_intervals_are_empty():
    x_0, x_1, s = jnp.ones((3, 2)), jnp.zeros((3, 2)), jnp.array([0.1, 0.5, 0.9])
    m = lambda x, s, t: jnp.sin(x) + paths.lift(s, x)
    expected = losses.flow_matching(flow_maps.velocity(m), paths.Linear(), x_0, x_1, s)
    np.testing.assert_allclose(flow_maps.mean_flow(m, paths.Linear(), x_0, x_1, s, s), expected, rtol=1e-6)
    x = paths.interpolate(paths.Linear(), x_0, x_1, s)
    np.testing.assert_array_equal(flow_maps.self_consistency(m, x, s, s, s), 0)
    np.testing.assert_array_equal(flow_maps.consistency(m, x, s, x, s, s), 0)


def test_pytrees_are_states():
    state = {"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 1))}
    noise = jax.tree.map(lambda leaf: leaf - 1, state)
    m = lambda x, s, t: jax.tree.map(lambda leaf: jnp.sin(leaf) * paths.lift(t, leaf), x)
    s, t = jnp.array([0.1, 0.3]), jnp.array([0.5, 0.3])
    flat = lambda x: jnp.concatenate([x["a"], x["b"]], axis=1)
    found = flow_maps.mean_flow(m, paths.Linear(), noise, state, s, t)
    np.testing.assert_allclose(found, flow_maps.mean_flow(m, paths.Linear(), flat(noise), flat(state), s, t), rtol=1e-6)
    field = flow_maps.velocity(m)
    for loss in (
        lambda x: flow_maps.eulerian(m, field, x, s, t),
        lambda x: flow_maps.lagrangian(m, field, x, s, t),
        lambda x: flow_maps.self_consistency(m, x, s, (s + t) / 2, t),
    ):
        np.testing.assert_allclose(loss(state), loss(flat(state)), rtol=1e-6)
    sampled, _ = sampling.sample_map(flow_maps.flow_map(m), state, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(
        flat(sampled), sampling.sample_map(flow_maps.flow_map(m), flat(state), jnp.array([0.0, 0.5, 1.0]))[0], rtol=1e-6
    )


def test_samples_of_the_exact_map_are_the_data_in_any_number_of_steps_and_back():
    path, exact = paths.Linear(), marginals.flow_map(paths.Linear(), MIXTURE)
    x_0 = jax.random.normal(jax.random.key(0), (64, 1))
    ends = [sampling.sample_map(exact, x_0, times.uniform_grid(n))[0] for n in (1, 2, 7)]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=2e-5)
    backwards, grid = sampling.reverse_map(exact, times.uniform_grid(3))
    np.testing.assert_allclose(sampling.sample_map(backwards, ends[0], grid)[0], x_0, atol=1e-4)
    _, saved = sampling.sample_map(exact, x_0, times.uniform_grid(4), save=lambda x, t: x)
    assert saved.shape == (5, 64, 1)
    renewed = jax.jit(lambda key, x_0: sampling.sample_map_renewed(path, exact, key, x_0, times.uniform_grid(4)))
    keys = jax.random.split(jax.random.key(1), 20_000)
    x_1 = renewed(keys, sampling.noise(keys, (20_000, 1)))
    np.testing.assert_allclose([x_1.mean(), x_1.std()], [0.25, np.sqrt(0.3 * 0.25 + 0.7 * 0.09 + 0.3 * 0.7 * 2.5**2)], atol=0.03)
    alone = renewed(keys[:5], sampling.noise(keys[:5], (5, 1)))
    np.testing.assert_array_equal(alone, x_1[:5])


def test_noise_is_renewed_between_steps_and_not_after_the_last():
    """On a grid that ends before data, too, where the map leads to no noise-free state."""
    asked = []

    def follow(x, s, t):
        asked.append((s, t))
        return 0 * x + 5

    key, x_0, grid = jax.random.key(0), jnp.ones((3, 2)), np.float32([0, 0.4, 0.75])
    with jax.disable_jit():
        x_1 = sampling.sample_map_renewed(paths.Linear(), follow, key, x_0, grid)
    np.testing.assert_array_equal(x_1, 5)
    np.testing.assert_allclose(asked[-2:], [(0, 0.75), (0.4, 0.75)])
    seen = sampling.sample_map_renewed(paths.Linear(), lambda x, s, t: x, key, x_0, grid)
    expected = 0.4 * x_0 + 0.6 * sampling.noise(jax.random.fold_in(key, 0), x_0.shape)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    # Another noise each time.
    seen, grid = sampling.sample_map_renewed(paths.Linear(), lambda x, s, t: x, key, x_0, [0.0, 0.4, 0.75, 1.0]), (0.4, 0.75)
    expected = x_0
    for i, t in enumerate(grid):
        expected = t * expected + (1 - t) * sampling.noise(jax.random.fold_in(key, i), x_0.shape)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_both_ways_are_learnt():
    """Distillations have their minimum at the exact map on intervals that go back to noise, too."""
    with jax.enable_x64(True):
        path = paths.Cosine()
        field = marginals.velocity(path, MIXTURE)
        for objective in (flow_maps.lagrangian, flow_maps.eulerian):
            slopes = [gradient(path, lambda m, o=objective: o(m, field, X, T, S), at=at) for at in (0.0, 0.3)]
            assert np.abs(slopes[0]).max() < 1e-9 < 1e-3 < np.abs(slopes[1]).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mean_velocities_of_half_precision_states(dtype):
    """Of short intervals, whose ends are one number in half precision."""
    mean = flow_maps.mean_velocity(flow_maps.from_velocity(lambda x, t: jnp.sin(x)))
    x = jnp.array([[3.0, 1.0]], dtype)
    for t in (0.501, 0.51, 0.9):
        found = mean(x, 0.5, t)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float32), mean(x.astype(jnp.float32), 0.5, t), rtol=1e-2, atol=2e-3)


def test_a_map_over_an_interval_has_derivatives_where_its_velocity_is_infinite():
    path, data = paths.VariancePreserving(), marginals.GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), 0.5)
    exact = marginals.flow_map(path, data)
    x = jnp.array([[0.3, -2.0]])
    mean = flow_maps.mean_velocity(exact)
    np.testing.assert_allclose(mean(x, 0, 1), exact(x, 0.0, 1.0) - x, rtol=1e-6)
    gradient_of = lambda f: jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_allclose(gradient_of(lambda x: mean(x, 0, 1)), gradient_of(lambda x: exact(x, 0.0, 1.0)) - 1, rtol=1e-5)
    np.testing.assert_allclose(flow_maps.flow_map(mean)(x, 0, 1), exact(x, 0.0, 1.0), rtol=1e-6)


def test_guidance_is_learnt_into_the_map():
    """Two classes of one Gaussian each: the map of the guided velocity is what the objective has no gradient at."""
    velocity = {
        label: marginals.velocity(paths.Linear(), marginals.GaussianMixture(jnp.ones(1), jnp.array([[mean]]), jnp.array([0.5])))
        for label, mean in ((0, 1.0), (2, 0.0))
    }

    def m(x, s, t, y):
        assert s is t or (s == t).all()
        return jnp.where((y == 0)[:, None], velocity[0](x, s), velocity[2](x, s))

    x, s, u = jnp.linspace(-1, 1, 4)[:, None], jnp.full(4, 0.4), jnp.full((4, 1), 3.0)
    y = jnp.array([0, 0, 2, 2])
    found = flow_maps.guided_target(m, y, 2, 2.0, 0.5)(x, s, u)
    by_hand = 2 * u + 0.5 * velocity[0](x, s) - 1.5 * velocity[2](x, s)
    np.testing.assert_allclose(found[:2], by_hand[:2], rtol=1e-6)
    np.testing.assert_array_equal(found[2:], u[2:])
    # In the mean u is the conditional velocity, and the scale is w / (1 - k).
    mean = flow_maps.guided_target(m, y, 2, 2.0, 0.5)(x, s, velocity[0](x, s))[:2]
    guided = guidance.extrapolate(velocity[0](x, s), velocity[2](x, s), 2.5)
    np.testing.assert_allclose(mean, guided[:2], rtol=1e-5)


def test_what_is_none_is_not_guided():
    """Where it is NaN, too, as conditions of real numbers have it; a label that its dtype does not hold is refused."""
    x, u = jnp.ones((2, 1)), jnp.ones((2, 1))
    m = lambda x, s, t, y: 7 * x
    found = flow_maps.guided_target(m, jnp.array([0.5, jnp.nan]), jnp.nan, 3.0)(x, 0.1, u)
    np.testing.assert_allclose(found[:, 0], [3 - 2 * 7, 1])
    vectors = jnp.array([[0.5, 0.1], [jnp.nan, jnp.nan]])
    np.testing.assert_allclose(flow_maps.guided_target(m, vectors, jnp.nan, 3.0)(x, 0.1, u), found)
    with pytest.raises(ValueError, match="which cannot hold it"):
        flow_maps.guided_target(m, jnp.zeros(2, jnp.uint8), 1000, 2.0)
    with pytest.raises(TypeError, match="a label for no class is a whole number"):
        flow_maps.guided_target(m, jnp.zeros(2, int), 2.7, 2.0)
    with pytest.raises(ValueError, match="The output of mean_velocity_y has shape"):
        flow_maps.guided_target(lambda x, s, t, y: x[:1], jnp.zeros(2, int), 2, 2.0)(x, 0.1, u)


@given(st.integers(1, 64), st.floats(0, 1), st.integers(0, 2**30))
@settings(max_examples=15, deadline=None)
def test_intervals_are_in_order_and_as_many_are_empty_as_were_asked_for(n, equal, seed):
    s, t = flow_maps.draw_interval(jax.random.key(seed), n, equal=equal)
    assert ((s >= 0) & (s <= t) & (t <= 1)).all()
    assert (s == t).sum() >= round(equal * n)


def test_intervals_have_the_density_of_two_draws():
    s, t = flow_maps.draw_interval(jax.random.key(0), 200_000, equal=0.0)
    np.testing.assert_allclose([s.mean(), t.mean()], [1 / 3, 2 / 3], atol=3e-3)


def test_adaptive_weights():
    loss = jnp.array([0.0, 1.0, 100.0])
    np.testing.assert_allclose(flow_maps.adaptive(loss, 1.0, 1.0), loss / (loss + 1))
    np.testing.assert_allclose(jax.jacobian(flow_maps.adaptive)(loss).diagonal(), 1 / (loss + 1e-3), rtol=1e-6)
    np.testing.assert_array_equal(flow_maps.adaptive(loss, 0.0), loss)


SLOW = layers.Sinusoids(8, scale=1.0)
TOKENS = {"patch_size": 2, "hidden_size": 16, "num_heads": 2, "time_embedding": SLOW}
LEVELS = {"model_channels": 8, "channel_mult": (2,), "num_res_blocks": 1, "head_dim": 8, "attention_resolutions": (1,), "groups": 4}
NETWORKS = {
    "mlp": (mlp.MLP(end_time=True), (2,)),
    "mlp embedded": (mlp.MLP(time_embedding=layers.LearnableFourier(16), end_time=True), (2,)),
    "dit": (dit.DiT(depth=1, **TOKENS, end_time=True), (4, 4, 1)),
    "dit, bfloat16": (dit.DiT(depth=1, **TOKENS, dtype=jnp.bfloat16, end_time=True), (4, 4, 1)),
    "dit looped": (dit.DiT(depth=2, **TOKENS, scan=True, remat=True, qk_norm=layers.RMSNorm, end_time=True), (4, 4, 1)),
    "unet": (unet.UNet(**LEVELS, dropout=0.0, time_embedding=SLOW, end_time=True), (4, 4, 1)),
    "unet, bfloat16": (unet.UNet(**LEVELS, dropout=0.0, dtype=jnp.bfloat16, end_time=True), (4, 4, 1)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_have_a_second_time(kind):
    model, shape = NETWORKS[kind]
    alone = model.clone(end_time=False)
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    params = jax.jit(lambda key: model.init(key, x, 0.5, end=0.7))(jax.random.key(1))
    without = {"params": {name: part for name, part in params["params"].items() if name != "interval"}}
    apply, s, t = jax.jit(model.apply), jnp.full(3, 0.3), jnp.full(3, 0.9)
    if kind != "mlp":
        # As it begins, it is the network of one time.
        np.testing.assert_allclose(apply(params, x, s, end=t), jax.jit(alone.apply)(without, x, s), atol=1e-6)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    near, far = (apply(params, x, s, end=end) for end in (s, t))
    np.testing.assert_array_equal(near, apply(params, x, s))
    assert np.abs(far - near).max() > 1e-3
    with pytest.raises(ValueError, match="end_time=True"):
        alone.apply(without, x, 0.3, end=0.9)

    @jax.jit
    def trained(params):
        def loss(params):
            return flow_maps.mean_flow(lambda x, s, t: model.apply(params, x, s, end=t), paths.Linear(), x, -x, s, t).mean()

        slope = jax.jvp(lambda x, s: model.apply(params, x, s, end=t), (x, s), (x, jnp.ones(3)))[1]
        return jax.value_and_grad(loss)(params), slope

    (value, found), slope = trained(params)
    for leaf in jax.tree.leaves((value, found, slope)):
        assert np.isfinite(leaf).all()
    if "bfloat16" not in kind:
        there, here = (apply(params, x + a * x, s + a, end=t) for a in (1e-3, -1e-3))
        np.testing.assert_allclose(slope, (there - here) / 2e-3, rtol=0.1, atol=0.05 * np.abs(slope).max())


def first(x, *times):
    """One example in the place of all, which would broadcast."""
    return x[:1]


POINTS = marginals.flow_map(paths.Linear(), marginals.GaussianMixture(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.0))
INFINITE = targets.convert_field(paths.VariancePreserving(), lambda x, t: x, source=targets.noise, target=targets.velocity)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: flow_maps.mean_flow(m, paths.Linear(), X, X, T, S), "s <= t"),
        (lambda m: flow_maps.consistency(m, X, 0.9, X, 0.1, 1.0), "s <= t"),
        (lambda m: flow_maps.self_consistency(m, X, S, T, R), "s <= t"),
        (lambda m: flow_maps.mean_flow(m, paths.Linear(), X, X, 300, 400), "0, noise, to 1, data"),
        (lambda m: flow_maps.mean_flow(jnp.ones(3), paths.Linear(), X, X, S, T), "function"),
        (lambda m: flow_maps.flow_map(mlp.MLP(end_time=True)), "mean_velocity is the module MLP, without its parameters"),
        (lambda m: sampling.sample_ode(mlp.MLP(), jnp.asarray(X), [0.0, 1.0]), "field is the module MLP, without its parameters"),
        (lambda m: flow_maps.lagrangian(m, jnp.ones(3), X, S, T), "function"),
        (lambda m: flow_maps.from_velocity(lambda x, t: x, 0), "steps"),
        *(
            (call, rf"The output of {of} has shape \(1, 1\), but must be like x, \(4, 1\)")
            for of, call in [
                ("mean_velocity", lambda m: flow_maps.flow_map(first)(X, S, T)),
                ("mean_velocity", lambda m: flow_maps.velocity(first)(X, S)),
                ("mean_velocity", lambda m: flow_maps.mean_flow(first, paths.Linear(), X, X, S, T)),
                ("mean_velocity", lambda m: flow_maps.eulerian(first, lambda x, t: x, X, S, T)),
                ("mean_velocity", lambda m: flow_maps.lagrangian(first, lambda x, t: x, X, S, T)),
                ("mean_velocity", lambda m: flow_maps.self_consistency(first, X, S, S, T)),
                ("mean_velocity", lambda m: flow_maps.consistency(first, X, S, X, S, T)),
                ("flow_map", lambda m: flow_maps.mean_velocity(first)(X, S, T)),
                ("teacher", lambda m: flow_maps.self_consistency(m, X, S, S, T, teacher=first)),
                ("teacher", lambda m: flow_maps.consistency(m, X, S, X, S, T, teacher=first)),
                ("field", lambda m: flow_maps.lagrangian(m, first, X, S, T)),
                ("field", lambda m: flow_maps.eulerian(m, first, X, S, T)),
                ("tangent", lambda m: flow_maps.mean_flow(m, paths.Linear(), X, X, S, T, tangent=first)),
                ("target", lambda m: flow_maps.mean_flow(m, paths.Linear(), X, X, S, T, target=first)),
            ]
        ),
        (
            lambda m: flow_maps.flow_map(lambda x, s, t: {"a": x["a"][:1]})({"a": X}, S, T),
            r"The output of mean_velocity has shape \(1, 1\)",
        ),
        (lambda m: jax.jit(lambda x: flow_maps.self_consistency(m, x, 0.5, 0.9, 0.7))(X), "intervals go forward"),
        *(
            (lambda m, times=times: flow_maps.from_velocity(INFINITE)(X, *times), "where it would be infinite")
            for times in [(0.0, 1.0), (0.5, np.float32([0.9, 1.0, 0.9, 0.6])), (1.0, 0.5)]
        ),
        (lambda m: flow_maps.from_velocity(lambda x, t: x, 4, step=sampling.ddim(paths.Linear())), "which knows the times of a path"),
        (lambda m: flow_maps.from_velocity(lambda x, t: x, 4, step=sampling.deis(paths.Linear(), 2)), "which knows the times of a path"),
        (lambda m: flow_maps.flow_map(flow_maps.flow_map(m)), "mean_velocity is a flow map, but a mean velocity is taken"),
        (
            lambda m: flow_maps.self_consistency(m, X, S, S, T, teacher=flow_maps.from_velocity(lambda x, t: x)),
            "teacher is a flow map, but a mean velocity is taken",
        ),
        (lambda m: flow_maps.lagrangian(m, lambda x, t: x, X, -0.5, T), "s is -0.5, but times go from 0"),
        (lambda m: flow_maps.eulerian(m, lambda x, t: x, X.astype(int), S, T), "x has dtype int"),
        (lambda m: flow_maps.eulerian(m, lambda x, t: x, {}, S, T), "a pytree without arrays"),
        (lambda m: flow_maps.eulerian(lambda x, s, t: 1j * x, lambda x, t: x, X, S, T), "The output of mean_velocity is complex"),
        (
            lambda m: flow_maps.draw_interval(jax.random.key(0), 4, draw=lambda key, n: jnp.ones((n, 1))),
            r"draw gave times of shape \(4, 1\)",
        ),
        (lambda m: flow_maps.draw_interval(jax.random.key(0), 4, draw=lambda key, n: 0.5), r"draw gave times of shape \(\)"),
        (lambda m: flow_maps.draw_interval(jax.random.key(0), 4, draw=lambda key, n: 2 + jnp.ones(n)), "What draw gave has shape"),
        (lambda m: flow_maps.guided_target(lambda x, s, t: x, jnp.zeros(3, int), 2, 1.5), r"it is called with \(x, s, t, y\)"),
        (lambda m: sampling.sample_map(lambda x, s, t: 1j * x, X, [0.0, 1.0]), "The map's output is complex"),
        (lambda m: sampling.sample_map(m, X, [0.0, 2.0]), "times go from 0 to 2, but a path goes from 0"),
        (lambda m: sampling.sample_map_renewed(paths.Linear(), m, jax.random.key(0), X, [0.0, 1.0, 2.0]), "but a path goes from 0"),
        (lambda m: sampling.sample_map(*sampling.reverse_map(POINTS, [0.0, 1.0])[:1], X, [0.0, 1.0]), "at which no noise is left"),
        (lambda m: flow_maps.adaptive(jnp.ones(3), constant=0.0), "constant"),
        (lambda m: flow_maps.draw_interval(jax.random.key(0), 4, equal=1.5), "equal"),
        (lambda m: flow_maps.guided_target(lambda x, s, t, y: x, jnp.zeros(3, int), 2, 1.0, 1.0), "mix"),
        (lambda m: sampling.sample_map(jnp.ones(3), X, [0.0, 1.0]), "function"),
        (lambda m: sampling.sample_map(lambda x, s, t: x[:1], X, [0.0, 1.0]), "like x"),
        (lambda m: sampling.sample_map(m, X, [1.0, 0.0]), "increase"),
    ],
)
def test_wrong_calls_are_explained(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(lambda x, s, t: x)
