"""Adaptive steps: errors below tolerance, samples on their own, evaluations as said, and what happens when steps run out."""

import functools
import importlib

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture

from fmjax import marginals, paths, sampling, times

FIELD = marginals.velocity(paths.Linear(), mixture())
SOLVERS = {"tsit5": None, "dopri5": diffrax.Dopri5()}


@pytest.mark.parametrize("each", [True, False], ids=["each", "batch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_error_follows_the_tolerance(solver, each, key, x64):
    x_0 = jax.random.normal(key, (16, 2))
    exact = sampling.sample_ode(FIELD, x_0, times.cosine(times.uniform_grid(1000)), step=sampling.rk4)[0]
    run = jax.jit(
        lambda x, tolerance: sampling.sample_ode_adaptive(
            FIELD, x, rtol=tolerance, atol=tolerance, solver=SOLVERS[solver], per_example=each
        )
    )
    errors, steps = [], []
    for tolerance in (1e-3, 1e-6):
        found = run(x_0, tolerance)
        errors.append(float(jnp.abs(found.x - exact).max()))
        steps.append(float(found.steps.mean()))
        np.testing.assert_array_equal(found.reached, 1.0)
        assert found.steps.shape == ((16,) if each else ())
    # The tolerance is of a step; the flow stretches what came before.
    assert errors[0] < 100 * 1e-3
    assert errors[1] < 100 * 1e-6
    assert steps[1] > 2 * steps[0]


def test_a_sample_does_not_depend_on_its_batch(key):
    x_0 = jax.random.normal(key, (8, 2))
    # One that turns quickly changes its batch mates' steps where they share them, and not where each has its own.
    field = lambda x, t: FIELD(x, t) + jnp.where(jnp.abs(x[:, :1]) > 50, 30 * jnp.cos(60 * t), 0.0)
    hard = x_0.at[0].set(1e3)
    each, shared = (jax.jit(lambda x, each=each: sampling.sample_ode_adaptive(field, x, per_example=each)) for each in (True, False))
    one, other = each(x_0), each(hard)
    np.testing.assert_array_equal(other.steps[1:], one.steps[1:])
    np.testing.assert_allclose(other.x[1:], one.x[1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(each(x_0[3:4]).x, one.x[3:4], rtol=1e-5, atol=1e-6)
    assert len(np.unique(one.steps)) > 1
    assert shared(hard).steps > shared(x_0).steps


def test_six_evaluations_a_step(key):
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return FIELD(x, t)

    found = sampling.sample_ode_adaptive(field, jax.random.normal(key, (3, 2)), per_example=False)
    jax.effects_barrier()
    # And two before the first, which choose its size.
    assert 0 <= len(calls) - 6 * int(found.steps) <= 3


def test_the_way_back(key, x64):
    x_0 = jax.random.normal(key, (8, 2))
    there = sampling.sample_ode_adaptive(FIELD, x_0, rtol=1e-8, atol=1e-8).x
    np.testing.assert_allclose(sampling.sample_ode_adaptive(FIELD, there, start=1.0, end=0.0, rtol=1e-8, atol=1e-8).x, x_0, atol=1e-6)


def test_half_precision_is_followed_in_float32(key):
    x_0 = jax.random.normal(key, (4, 2), jnp.bfloat16)
    assert sampling.sample_ode_adaptive(FIELD, x_0).x.dtype == jnp.bfloat16


def test_steps_that_run_out_say_how_far(key):
    x_0 = jax.random.normal(key, (4, 2))
    with pytest.raises(RuntimeError, match=r"4 of 4 trajectories did not arrive at t = 1 in 3 steps; example 0 came to t = 0\.\d+"):
        sampling.sample_ode_adaptive(FIELD, x_0, rtol=1e-6, atol=1e-6, max_steps=3)
    found = jax.jit(lambda x: sampling.sample_ode_adaptive(FIELD, x, rtol=1e-6, atol=1e-6, max_steps=3))(x_0)
    assert np.isnan(found.x).all()
    assert ((found.reached > 0) & (found.reached < 1)).all()


def test_a_missing_diffrax_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"fmjax\[adaptive\]"):
        sampling.sample_ode_adaptive(FIELD, jnp.zeros((1, 2)))


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"The field's output has shape \(2,\)"):
        sampling.sample_ode_adaptive(lambda x, t: x[:, 0], jnp.zeros((2, 2)))
    with pytest.raises(TypeError, match="x_0 has dtype int32"):
        sampling.sample_ode_adaptive(FIELD, jnp.zeros((2, 2), int))


def test_derivatives_backwards_and_forwards(key, x64):
    """Of where a flow ends, in its start and in a parameter, by diffrax's adjoints, against the closed form."""
    x_0 = jax.random.normal(key, (3, 2))

    def end(scale, x_0, adjoint):
        return sampling.sample_ode_adaptive(lambda x, t: scale * x, x_0, rtol=1e-8, atol=1e-8, adjoint=adjoint).x

    def total(scale, adjoint=None):
        return end(scale, x_0, adjoint).sum()

    exact = float((x_0 * jnp.exp(0.7)).sum())
    assert float(jax.jit(jax.grad(total))(0.7)) == pytest.approx(exact, rel=1e-6)
    forwards = jax.jit(jax.jacfwd(functools.partial(total, adjoint=diffrax.ForwardMode())))
    assert float(forwards(0.7)) == pytest.approx(exact, rel=1e-6)
    pushed = jax.jit(lambda x: jax.jvp(lambda x: end(0.7, x, diffrax.DirectAdjoint()), (x,), (jnp.ones_like(x),))[1])(x_0)
    np.testing.assert_allclose(pushed, np.exp(0.7), rtol=1e-6)
