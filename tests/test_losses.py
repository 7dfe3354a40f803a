"""Losses: their definitions, and the notes' theorem that conditional and marginal losses have one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATHS, TARGETS, mixture, name

from fmjax import losses, marginals, paths, targets


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
