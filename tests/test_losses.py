"""Losses: their definitions, and the notes' theorem that conditional and marginal losses have one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PATHS, TARGETS, mixture, name

from fmjax import losses, marginals, paths, targets
from fmjax.models import layers


def draws(key, shape=(6, 4, 4, 3)):
    key_0, key_1, key_t = jax.random.split(key, 3)
    t = jax.random.uniform(key_t, shape[:1], minval=0.1, maxval=0.9)
    return jax.random.normal(key_0, shape), jax.random.normal(key_1, shape), t


def guess(x, t):
    return jnp.sin(x) + paths.lift(t, x)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_flow_matching_is_the_notes_l_cfm(path, key, x64):
    x_0, x_1, t = draws(key)
    x_t = paths.interpolate(path, x_0, x_1, t)
    expected = ((guess(x_t, t) - paths.conditional_velocity(path, x_t, x_1, t)) ** 2).mean((1, 2, 3))
    loss = losses.flow_matching(guess, path, x_0, x_1, t)
    assert loss.shape == (6,)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(losses.denoising(guess, path, x_0, x_1, t, target=targets.velocity), loss, rtol=1e-12)


def test_condot_loss_regresses_data_minus_noise(key, x64):
    """The notes' training procedure: |u(t z + (1 - t) eps) - (z - eps)|^2."""
    x_0, x_1, t = draws(key)
    lifted = t[:, None, None, None]
    expected = ((guess(lifted * x_1 + (1 - lifted) * x_0, t) - (x_1 - x_0)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(losses.flow_matching(guess, paths.Linear(), x_0, x_1, t), expected, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_denoising_losses_are_the_notes_l_csm_and_l_ddpm(path, key, x64):
    x_0, x_1, t = draws(key)
    x_t, beta = paths.interpolate(path, x_0, x_1, t), path.beta(t[:, None, None, None])
    prediction = guess(x_t, t)
    of = lambda target: losses.denoising(guess, path, x_0, x_1, t, target=target)
    np.testing.assert_allclose(of(targets.score), ((prediction + x_0 / beta) ** 2).mean((1, 2, 3)), rtol=1e-11)
    np.testing.assert_allclose(of(targets.score), ((beta * prediction + x_0) ** 2 / beta**2).mean((1, 2, 3)), rtol=1e-11)
    # Notes 000 print |eps_theta + eps|^2: the minus sign is the definition's, eps_theta = -beta s_theta.
    np.testing.assert_allclose(of(targets.noise), ((prediction - x_0) ** 2).mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(of(targets.data), ((prediction - x_1) ** 2).mean((1, 2, 3)), rtol=1e-12)


def features(params, x, t):
    """A small nonlinear field."""
    hidden = jnp.tanh(x @ params["in"] + t[:, None] * params["time"][None] + params["bias"][None])
    return hidden @ params["out"]


@pytest.mark.parametrize(
    ("target", "marginal"),
    [(targets.velocity, marginals.velocity), (targets.score, marginals.score)],
    ids=["L_FM and L_CFM", "L_SM and L_CSM"],
)
@pytest.mark.parametrize("path", [paths.Linear(), paths.Cosine()], ids=name)
def test_marginal_and_conditional_losses_have_one_gradient(path, target, marginal, key, x64):
    """The notes' theorem: paired over 200,000 draws, the gradients differ by their noise only, in every parameter."""
    n, chunks = 200_000, 20
    key_params, key_data = jax.random.split(key)
    keys = jax.random.split(key_params, 4)
    shapes = {"in": (2, 4), "time": (4,), "bias": (4,), "out": (4, 2)}
    params = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    data = mixture()

    def example_gradients(params, x_0, x_1, t):
        def conditional(params):
            return losses.denoising(lambda x, t: features(params, x, t), path, x_0, x_1, t, target=target).mean()

        def marginalised(params):
            x_t = paths.interpolate(path, x_0, x_1, t)
            return losses.regression(lambda x, t: features(params, x, t), x_t, t, marginal(path, data)(x_t, t)).mean()

        return [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(params))]) for loss in (conditional, marginalised)]

    @jax.jit
    def sums(key):
        key_0, key_1, key_t = jax.random.split(key, 3)
        x_1, x_0 = data.sample(key_1, n // chunks), jax.random.normal(key_0, (n // chunks, 2))
        t = jax.random.uniform(key_t, (n // chunks,), maxval=0.95)
        conditional, marginalised = jax.vmap(lambda *each: example_gradients(params, *(a[None] for a in each)))(x_0, x_1, t)
        difference = conditional - marginalised
        return marginalised.sum(0), difference.sum(0), (difference**2).sum(0)

    total, difference, square = (sum(parts) for parts in zip(*map(sums, jax.random.split(key_data, chunks)), strict=True))
    error = np.sqrt((square / n - (difference / n) ** 2) / n)
    assert (np.abs(difference / n) < 4 * error).all()
    # The gradients are far larger than that error, so a wrong constant in the target would show.
    assert (np.abs(total / n) > 20 * error).mean() > 0.6


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_the_exact_conditional_answer_has_no_loss(target, key, x64):
    x_0, x_1, t = draws(key)
    path = paths.Cosine()

    def field(x, t):
        a, b = target(path, paths.lift(t, x))
        return a * x_1 + b * x_0

    np.testing.assert_allclose(losses.denoising(field, path, x_0, x_1, t, target=target), 0, atol=1e-20)


def test_half_precision_is_compared_in_float32(key):
    x_0, x_1, t = (a.astype(jnp.bfloat16) for a in draws(key))
    loss = losses.flow_matching(lambda x, t: jnp.zeros_like(x), paths.Linear(), x_0, x_1, t)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (paths.flow(paths.Linear(), x_0, x_1, t)[1].astype(jnp.float32) ** 2).mean((1, 2, 3)), rtol=1e-6)


def test_bad_input_is_named():
    x, path = jnp.zeros((4, 3)), paths.Linear()
    same = lambda x, t: x
    with pytest.raises(ValueError, match=r"The field's output has shape \(4, 1\), but must be like x, \(4, 3\)"):
        losses.flow_matching(lambda x, t: x[:, :1], path, x, x, 0.5)
    with pytest.raises(ValueError, match=r"The field's output has shape \(3,\)"):
        losses.denoising(lambda x, t: x[0], path, x, x, 0.5, target=targets.noise)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        losses.flow_matching(same, path, x, x, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"x_0 has shape \(2, 3\)"):
        losses.flow_matching(same, path, x[:2], x, 0.5)
    with pytest.raises(TypeError, match="x_1 has dtype int32"):
        losses.denoising(same, path, x, jnp.zeros((4, 3), int), 0.5, target=targets.noise)
    with pytest.raises(TypeError, match="target"):
        losses.denoising(same, path, x, x, 0.5)


# Weights and masks.


def test_weights_multiply_squared_errors(key, x64):
    x_0, x_1, t = draws(key)
    path = paths.Linear()
    x_t, u = paths.flow(path, x_0, x_1, t)
    square, weight = (guess(x_t, t) - u) ** 2, jax.random.uniform(jax.random.key(1), x_1.shape)
    of = lambda **options: losses.flow_matching(guess, path, x_0, x_1, t, **options)
    np.testing.assert_allclose(of(weight=weight), (weight * square).mean((1, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(of(weight=weight[:, :1, :1]), (weight[:, :1, :1] * square).mean((1, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(of(weight=t), t * square.mean((1, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(of(weight=2.0), 2 * of(), rtol=1e-10)
    mask = weight > 0.3
    expected = (mask * weight * square).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    # The data are 0 behind the mask, so the network sees other states there.
    hidden = losses.regression(guess, x_t, t, u, weight=weight, mask=mask)
    np.testing.assert_allclose(hidden, expected, rtol=1e-10)


def test_leaves_have_weights_of_their_own(key, x64):
    x_0, x_1 = ({"a": jax.random.normal(k, (5, 2, 3)), "b": jax.random.normal(k, (5, 1))} for k in jax.random.split(key))
    t, path = jnp.linspace(0.1, 0.9, 5), paths.joint({"a": paths.Linear(), "b": paths.Cosine()}, x_1)
    x_t, u = paths.flow(path, x_0, x_1, t)
    same = lambda x, t: x
    squares = {name: ((x_t[name] - u[name]) ** 2).reshape(5, -1) for name in x_t}
    of = lambda **options: losses.flow_matching(same, path, x_0, x_1, t, **options)
    np.testing.assert_allclose(of(), (squares["a"].sum(1) + squares["b"].sum(1)) / 7, rtol=1e-10)
    weighted = (squares["a"].sum(1) + 10 * squares["b"].sum(1)) / 7
    np.testing.assert_allclose(of(weight={"a": 1.0, "b": 10.0}), weighted, rtol=1e-10)
    counts = {"a": jnp.ones((5, 2, 3), bool).at[:, 1].set(False), "b": jnp.array([True, True, False, True, True])}
    of_a = ((x_t["a"] - u["a"]) ** 2)[:, 0].sum(1)
    expected = (of_a + jnp.where(counts["b"], squares["b"][:, 0], 0)) / (3 + counts["b"])
    np.testing.assert_allclose(losses.regression(same, x_t, t, u, mask=counts), expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"weight is .*, but it is one number, one per example, or a pytree like the state, \{'a'"):
        of(weight={"a": 1.0})


def nan_behind(mask, x):
    return jnp.where(mask, x, jnp.nan)


@pytest.mark.parametrize("masked", ["coordinates", "examples"])
def test_nan_behind_a_mask_does_not_matter(masked, key):
    """In no value and no gradient, whatever the loss and the network, which sees data of 0 there."""
    x_0, x_1, t = draws(key, (6, 5))
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, x_1.shape) if masked == "coordinates" else jnp.arange(6) < 4
    full = jnp.broadcast_to(mask.reshape(6, -1), x_1.shape)
    params = {"w": jax.random.normal(jax.random.key(4), (5, 5)), "b": jnp.ones(5)}

    def total(params, x_1):
        field = lambda x, t: jnp.tanh(x @ params["w"]) + params["b"][None]
        each = [losses.flow_matching(field, paths.Cosine(), x_0, x_1, t, mask=mask)]
        each += [losses.denoising(field, paths.Cosine(), x_0, x_1, t, target=target, mask=mask) for target in (targets.noise, targets.v)]
        return losses.pseudo_huber(sum(each), 0.1).sum()

    clean, dirty = (jax.value_and_grad(total)(params, x) for x in (jnp.where(full, x_1, 7.0), nan_behind(full, x_1)))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))
    into_data = jax.grad(total, 1)(params, nan_behind(full, x_1))
    np.testing.assert_array_equal(np.asarray(into_data)[~np.asarray(full)], 0)
    if masked == "examples":
        each = losses.flow_matching(lambda x, t: x, paths.Linear(), x_0, nan_behind(full, x_1), t, mask=mask)
        alone = losses.flow_matching(lambda x, t: x, paths.Linear(), x_0[:4], x_1[:4], t[:4])
        np.testing.assert_allclose(losses.masked_mean(each, mask), alone.mean(), rtol=1e-6)
        np.testing.assert_array_equal(each[4:], 0)


def test_nan_in_noise_and_weights_behind_a_mask(key):
    x_0, x_1, t = draws(key, (4, 6, 3))
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 1, 5])[:, None]
    full = jnp.broadcast_to(mask[..., None], x_1.shape)
    weight = jax.random.uniform(jax.random.key(1), x_1.shape)
    of = lambda x_0, x_1, weight, mask: losses.flow_matching(guess, paths.Linear(), x_0, x_1, t, weight=weight, mask=mask)
    clean = of(x_0, x_1, weight, full)
    # A mask of the first axes is that of all that is left.
    np.testing.assert_array_equal(of(nan_behind(full, x_0), nan_behind(full, x_1), nan_behind(full, weight), mask), clean)
    assert jnp.isfinite(jax.grad(lambda weight: of(x_0, nan_behind(full, x_1), weight, mask).sum())(nan_behind(full, weight))).all()

    def of_power(power):
        return losses.flow_matching(guess, paths.Polynomial(power), nan_behind(full, x_0), nan_behind(full, x_1), t, mask=mask).sum()

    # Of the path too, whose gradient sums over noise and data.
    assert jnp.isfinite(jax.grad(of_power)(2.0))


def test_a_masked_mean_counts_what_is_there():
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    assert losses.masked_mean(values, mask) == 2
    np.testing.assert_array_equal(jax.grad(losses.masked_mean)(values, mask), [0.5, 0, 0.5])
    assert jnp.isnan(losses.masked_mean(values, jnp.zeros(3, bool)))
    with pytest.raises(TypeError, match=r"mask has dtype float32, but it is True for what counts"):
        losses.masked_mean(values, jnp.ones(3))
    with pytest.raises(TypeError, match=r"mask has dtype int32, but it is True for what counts: give numbers as `weight`"):
        losses.regression(lambda x, t: x, jnp.ones((3, 2)), 0.5, jnp.ones((3, 2)), mask=jnp.ones((3, 2), jnp.int32))


def test_pseudo_huber_is_the_papers(x64):
    """sqrt(|x - y|^2 + c^2) - c with c = 0.00054 sqrt(d), over sqrt(d); of large errors their size, of small ones their square."""
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 30))
    c = 0.00054 * np.sqrt(30)
    theirs = (np.sqrt(((x - y) ** 2).sum(1) + c**2) - c) / np.sqrt(30)
    np.testing.assert_allclose(losses.pseudo_huber(((x - y) ** 2).mean(1), 0.00054), theirs, rtol=1e-10)
    np.testing.assert_allclose(losses.pseudo_huber(jnp.array(1e-12), 1e-2), 1e-12 / 2e-2, rtol=1e-6)
    assert jax.grad(losses.pseudo_huber)(0.0, 0.1) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="c is 0"):
        losses.pseudo_huber(x, 0.0)


def test_learnt_uncertainty_is_least_at_the_log_of_the_loss(x64):
    loss = jnp.array([0.1, 1.0, 7.0])
    u = jnp.log(loss)
    np.testing.assert_allclose(jax.grad(lambda u: losses.learnt_uncertainty(loss, u).sum())(u), 0, atol=1e-12)
    np.testing.assert_allclose(losses.learnt_uncertainty(loss, u), 1 + u)


def test_a_network_learns_the_size_of_the_loss(key):
    """u(t) of `layers.LogVariance` comes near the log of the expected loss, here 1 + 9 t^2 times a chi-squared of one."""
    model, optimizer = layers.LogVariance(), optax.adam(optax.cosine_decay_schedule(0.05, 300))
    params = model.init(key, jnp.zeros(1))
    np.testing.assert_array_equal(model.apply(params, jnp.linspace(0, 1, 5)), 0)

    def body(carry, key):
        params, state = carry
        key_t, key_z = jax.random.split(key)
        t = jax.random.uniform(key_t, (512,))
        loss = (1 + 9 * t**2) * jax.random.normal(key_z, (512,)) ** 2
        grads = jax.grad(lambda params: losses.learnt_uncertainty(loss, model.apply(params, t)).mean())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, 300)
    (params, _), _ = jax.jit(lambda params: jax.lax.scan(body, (params, optimizer.init(params)), keys))(params)
    t = jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(model.apply(params, t), jnp.log(1 + 9 * t**2), atol=0.3)


# Weightings in time, against their formulas in the log signal-to-noise ratio, written anew.


def log_snr(path, t):
    return 2 * (jnp.log(path.alpha(t)) - jnp.log(path.beta(t)))


FORMULAS = {
    "min_snr": (losses.min_snr, lambda path, t: jnp.minimum(jnp.exp(log_snr(path, t)), 5.0)),
    "edm": (losses.edm_weighting, lambda path, t: (jnp.exp(-log_snr(path, t)) + 0.25) / (jnp.exp(-log_snr(path, t)) * 0.25)),
    "sigmoid": (
        lambda path, t, **options: losses.sigmoid_weighting(path, t, bias=-3.0, **options),
        # Of the noise's error, which is the data's times alpha / beta.
        lambda path, t: (
            jax.vmap(jax.grad(lambda t: log_snr(path, t)))(t) / 2 * jax.nn.sigmoid(-3.0 - log_snr(path, t)) * jnp.exp(log_snr(path, t))
        ),
    ),
}


@pytest.mark.parametrize("weighting", FORMULAS)
@pytest.mark.parametrize("path", PATHS, ids=name)
def test_weightings_are_their_formulas(path, weighting, x64):
    """On the data's error, and on every other target's, where the loss of one network is the same, whatever it predicts."""
    ours, formula = FORMULAS[weighting]
    t = jnp.linspace(0.05, 0.95, 7)
    weights = formula(path, t)
    np.testing.assert_allclose(ours(path, t, target=targets.data), weights, rtol=1e-9)
    for target in TARGETS:
        expected = weights * targets.weight(path, t, source=target, target=targets.data)
        np.testing.assert_allclose(ours(path, t, target=target), expected, rtol=1e-8, err_msg=name(target))
    if path in PATHS[:2]:
        # Of the velocity they are finite from noise to data, also in the float that a uniform draw may give.
        assert jnp.isfinite(ours(path, jnp.array([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0], jnp.float32))).all()


def test_weightings_have_their_limits_at_the_ends():
    """A uniform draw may be 0; where there is no limit a known time is an error, and a traced one is not finite."""
    linear, steep = paths.Linear(), paths.Polynomial(3.0)
    assert losses.min_snr(linear, 0.0, target=targets.noise) == 1
    assert losses.min_snr(linear, 1.0, target=targets.data) == 5
    assert losses.min_snr(steep, 0.0) == 0
    assert losses.sigmoid_weighting(steep, 0.0) == 0
    assert losses.sigmoid_weighting(paths.VariancePreserving(), 1.0) == 0
    for path in (linear, paths.Cosine(), paths.SquareRoot(), paths.VariancePreserving()):
        ends = jnp.array([0.0, 1.0])
        for target in (targets.noise, targets.score, targets.data, targets.v, targets.velocity):
            near = losses.min_snr(path, jnp.array([1e-5, 1 - 1e-5]), target=target)
            if target is not targets.score and not (
                path in (paths.SquareRoot(), paths.VariancePreserving()) and target is targets.velocity
            ):
                np.testing.assert_allclose(losses.min_snr(path, ends, target=target), near, atol=0.02)
    for weighting, t, target in ((losses.edm_weighting, 0.0, targets.noise), (losses.sigmoid_weighting, 1.0, targets.data)):
        with pytest.raises(ValueError, match=f"at t = {t:g} for this target: draw times inside"):
            weighting(linear, t, target=target)
        assert not jnp.isfinite(jax.jit(lambda t, weighting=weighting, target=target: weighting(linear, t, target=target))(t))
    # Half precision is widened, as times are everywhere.
    half = losses.min_snr(steep, jnp.asarray(0.01, jnp.float16), target=targets.noise)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, 1, rtol=1e-3)


def test_edm_weighting_of_its_own_target_is_one(x64):
    for path in PATHS:
        np.testing.assert_allclose(losses.edm_weighting(path, jnp.linspace(0.05, 0.95, 9), target=targets.edm(0.5)), 1, rtol=1e-9)


def test_joint_paths_have_no_one_noise_level():
    path = paths.joint(paths.Linear(), {"a": jnp.ones((2, 3))})
    for weighting in (losses.min_snr, losses.edm_weighting, losses.sigmoid_weighting):
        with pytest.raises(TypeError, match="weight each leaf by the weighting of its own path"):
            weighting(path, 0.5)
