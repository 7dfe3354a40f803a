"""Averages of parameters: their profile against its integral, their recursion, and those made afterwards against those kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from fmjax import training
from fmjax.training.ema import _product

WIDTHS = st.floats(0.01, 0.28)


@settings(deadline=None)
@given(width=WIDTHS)
def test_the_exponent_gives_the_width(width):
    gamma = training.ema_exponent(width)
    assert gamma >= 0
    assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(width, rel=1e-6)
    # Which is the standard deviation of the profile.
    moments = [integrate.quad(lambda tau, n=n: tau**n * (gamma + 1) * tau**gamma, 0, 1, epsabs=1e-12)[0] for n in range(3)]
    assert moments[0] == pytest.approx(1, rel=1e-6)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, 1.0])
def test_no_such_width(width):
    with pytest.raises(ValueError, match=rf"sigma_rel is {width}"):
        training.ema_exponent(width)


@settings(deadline=None, max_examples=30)
@given(t_a=st.floats(0.5, 9.0), t_b=st.floats(0.5, 9.0), width_a=WIDTHS, width_b=WIDTHS)
def test_the_product_of_profiles_is_its_integral(t_a, t_b, width_a, width_b):
    a, b = training.ema_exponent(width_a), training.ema_exponent(width_b)
    top = min(t_a, t_b)

    def product(s):
        """In s with tau = top s^(1 / (a + b + 1)), where it is constant."""
        tau = top * s ** (1 / (a + b + 1))
        p = [(g + 1) / t * (tau / t) ** g for g, t in ((a, t_a), (b, t_b))]
        return p[0] * p[1] * tau / (s * (a + b + 1))

    expected = integrate.quad(product, 0, 1)[0]
    assert _product(t_a, a, t_b, b) == pytest.approx(expected, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_recursion_is_the_integral(width):
    """Of theta(tau) = tau / n the average at n is (gamma + 1) / (gamma + 2), up to the steps' length."""
    n, decay = 4000, training.power_ema(width)

    def body(ema, i):
        return decay(i) * ema + (1 - decay(i)) * (i + 1) / n, None

    ema, _ = jax.lax.scan(body, jnp.float32(7.0), jnp.arange(n))
    gamma = training.ema_exponent(width)
    assert float(ema) == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)


def test_post_hoc_makes_what_would_have_been_kept():
    """A walk of parameters: two widths are kept now and then, others are made from them and compared with their own recursion."""
    n, kept, wanted = 2000, (0.05, 0.1), (0.03, 0.07, 0.15)
    theta = np.cumsum(np.random.default_rng(0).normal(size=(n, 3)), axis=0) * 0.02 + np.linspace(0, 1, n)[:, None]
    averaged, snapshots = {width: np.zeros(3) for width in kept + wanted}, []
    for i in range(n):
        for width in averaged:
            d = (1 - 1 / (i + 1)) ** (training.ema_exponent(width) + 1)
            averaged[width] = d * averaged[width] + (1 - d) * theta[i]
        if (i + 1) % 100 == 0:
            snapshots += [(i + 1, width, {"w": np.asarray(averaged[width], np.float32)}) for width in kept]
    for width in wanted:
        made = training.post_hoc_ema(snapshots, width)["w"]
        assert made.dtype == np.float32
        error, near = (np.abs(other - averaged[width]).max() for other in (made, averaged[0.1 if width != 0.07 else 0.05]))
        assert error < 0.02
        assert error < 0.2 * near
    # One that was kept is itself, and an earlier step can be asked for.
    np.testing.assert_allclose(training.post_hoc_ema(snapshots, 0.1)["w"], averaged[0.1], rtol=1e-4)
    at_1000 = next(tree["w"] for step, width, tree in snapshots if (step, width) == (1000, 0.1))
    np.testing.assert_allclose(training.post_hoc_ema(snapshots, 0.1, step=1000)["w"], at_1000, rtol=1e-4)


def test_post_hoc_without_snapshots_or_beyond_them():
    with pytest.raises(ValueError, match="There are no snapshots"):
        training.post_hoc_ema([], 0.1)
    with pytest.raises(ValueError, match=r"step is 20 and the snapshots are of steps \[10\]"):
        training.post_hoc_ema([(10, 0.1, np.ones(2))], 0.1, step=20)


def test_a_step_keeps_several_averages():
    def loss_fn(params, key, batch):
        return ((params["w"] - batch) ** 2).sum()

    optimizer, decays = optax.sgd(0.1), (0.5, training.power_ema(0.1), training.power_ema(0.25))
    state = training.init({"w": jnp.zeros(2)}, optimizer, emas=3)
    step = jax.jit(training.make_step(loss_fn, optimizer, ema_decay=decays))
    thetas = []
    for _ in range(6):
        state, _ = step(state, jax.random.key(0), jnp.array([1.0, -2.0]))
        thetas.append(np.asarray(state.params["w"]))
    for decay, ema in zip(decays, state.ema, strict=True):
        expected = np.zeros(2)
        for n, theta in enumerate(thetas):
            d = float(decay(n)) if callable(decay) else min(decay, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * theta
        np.testing.assert_allclose(ema["w"], expected, rtol=1e-5)
    alone = training.init({"w": jnp.zeros(2)}, optimizer)
    with pytest.raises(ValueError, match=r"The step has 3 decays: make the state by init\(..., emas=3\)"):
        step(alone, jax.random.key(0), jnp.ones(2))
