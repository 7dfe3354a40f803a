"""The state, the step and the loop, on a small regression whose every number can be worked out."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import signal
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import training

KEY = jax.random.key(7)
SGD = optax.sgd(0.1)
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.float32(0.25)}


def loss_fn(params, key, batch):
    """A linear regression that ignores the key."""
    x, y = batch
    return ((x @ params["w"] + params["b"] - y) ** 2).mean()


def noisy_loss(params, key, batch):
    """The same, with noise from the key on the target."""
    x, y = batch
    return loss_fn(params, key, (x, y + jax.random.uniform(key)))


def batch(seed, n=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=n).astype(np.float32)


def batches(start=0, n=8):
    return (batch(seed, n) for seed in itertools.count(start))


def nan_batch(n=8):
    x, y = batch(0, n)
    return x, np.full_like(y, np.nan)


def grads_by_hand(values, batch):
    x, y = (np.asarray(part, np.float64) for part in batch)
    error = x @ values["w"] + values["b"] - y
    return (error**2).mean(), {"w": 2 * x.T @ error / len(y), "b": 2 * error.mean()}


def counting(state, key, batch):
    """A step that compiles at once: its loss is its batch, and it counts what is finite."""
    taken = jnp.where(jnp.isfinite(batch), state.step + 1, state.step)
    return dataclasses.replace(state, step=taken), {"loss": batch, "draw": jax.random.uniform(key)}


def assert_equal(one, other):
    """Bit for bit."""
    chex.assert_trees_all_equal(one, other)
    chex.assert_trees_all_equal_dtypes(one, other)


def fit(step, state, data, **options):
    return training.fit(step, state, data, KEY, **{"progress": False} | options)


def test_state_is_a_pytree():
    state = training.init(params(), MOMENTUM)
    leaves, tree = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = tree.unflatten(leaves)
    assert isinstance(again, training.TrainState)
    assert_equal(state, again)
    names = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names == {"step", "params", "opt_state", "ema"}
    moved = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))(state)
    assert isinstance(moved, training.TrainState)
    assert int(moved.step) == 1


def test_init():
    given = params()
    state = training.init(given, MOMENTUM)
    assert state.step.shape == ()
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 0
    assert_equal(state.params, given)
    assert_equal(state.ema, given)
    assert_equal(state.opt_state, MOMENTUM.init(given))


def test_the_average_is_a_copy():
    state = training.init(params(), SGD)
    for average, value in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        assert average.unsafe_buffer_pointer() != value.unsafe_buffer_pointer()
    # One buffer given twice cannot be donated twice.
    step = jax.jit(training.make_step(loss_fn, SGD), donate_argnums=0)
    new, _ = step(state, KEY, batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema)))
    assert int(new.step) == 1


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 5, 1000, 50_000]), st.sampled_from([0.0, 0.3, 0.9, 0.999]))
def test_step_by_hand(seed, n, ema_decay):
    rng = np.random.default_rng(seed)
    average = {"w": rng.normal(size=3).astype(np.float32), "b": np.float32(rng.normal())}
    state = training.TrainState(jnp.int32(n), params(), SGD.init(params()), jax.tree.map(jnp.asarray, average))
    new, metrics = training.make_step(loss_fn, SGD, ema_decay=ema_decay)(state, KEY, batch(seed))
    loss, grads = grads_by_hand(params(), batch(seed))
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * g, params(), grads)
    decay = min(ema_decay, (1 + n) / (10 + n))
    assert int(new.step) == n + 1
    chex.assert_trees_all_close(new.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new.ema, jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, expected), rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"loss", "grad_norm"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum((np.asarray(g) ** 2).sum() for g in grads.values())), rtol=1e-5)
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), jnp.float32)


def test_step_keeps_shapes_and_dtypes():
    state = training.init(params(), MOMENTUM)
    new, _ = jax.eval_shape(training.make_step(loss_fn, MOMENTUM), state, KEY, batch(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("ema_decay", [-0.1, 1, 1.5])
def test_decay_out_of_range(ema_decay):
    with pytest.raises(ValueError, match=str(ema_decay)):
        training.make_step(loss_fn, SGD, ema_decay=ema_decay)


def test_a_batch_with_nan_changes_nothing():
    step = jax.jit(training.make_step(loss_fn, MOMENTUM))
    state, _ = step(training.init(params(), MOMENTUM), KEY, batch(0))
    same, metrics = step(state, KEY, nan_batch())
    assert_equal(same, state)
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["grad_norm"])
    assert int(step(same, KEY, batch(1))[0].step) == 2


def test_an_infinite_gradient_changes_nothing():
    def root_loss(params, key, batch):
        return jnp.sqrt(params["b"]) + params["w"].sum()

    state = training.init(params() | {"b": jnp.float32(0)}, SGD)
    same, metrics = training.make_step(root_loss, SGD)(state, KEY, batch(0))
    assert math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert_equal(same, state)


def on_eight_devices(loss, optimizer):
    step = training.make_step(loss, optimizer, axis_name="devices")
    return jax.pmap(step, axis_name="devices", in_axes=(None, None, 0), out_axes=None)


def split(batch):
    return jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)


def test_eight_devices_equal_one():
    assert jax.device_count() == 8
    one, eight = jax.jit(training.make_step(loss_fn, MOMENTUM)), on_eight_devices(loss_fn, MOMENTUM)
    state = other = training.init(params(), MOMENTUM)
    for seed in range(3):
        state, metrics = one(state, KEY, batch(seed, 16))
        other, others = eight(other, KEY, split(batch(seed, 16)))
        chex.assert_trees_all_close(others, metrics, rtol=1e-5)
    chex.assert_trees_all_close(other, state, rtol=1e-5, atol=1e-6)
    assert int(other.step) == 3
    # A device without nan must not step alone.
    x, y = split(batch(3, 16))
    y[5, 0] = np.nan
    same, metrics = eight(other, KEY, (x, y))
    assert_equal(same, other)
    assert math.isnan(metrics["loss"])


def test_each_device_has_its_key():
    def draw(params, key, batch):
        """The gradient of weight i on device i is a number drawn from the key."""
        return (params["w"][None] * batch * jax.random.uniform(key)).sum()

    state = training.init({"w": jnp.zeros(8)}, SGD)
    rows = np.eye(8, dtype=np.float32)[:, None]
    new, _ = on_eight_devices(draw, SGD)(state, KEY, rows)
    drawn = -80 * np.asarray(new.params["w"])
    assert len(np.unique(drawn)) == 8
    expected = [jax.random.uniform(jax.random.fold_in(KEY, i)) for i in range(8)]
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)


def test_fit_resumes_where_it_would_have_been():
    step, start = training.make_step(noisy_loss, MOMENTUM), training.init(params(), MOMENTUM)
    whole, history = fit(step, start, batches(), steps=6, every=2)
    part, first = fit(step, start, batches(), steps=4, every=2)
    assert int(part.step) == 4
    resumed, second = fit(step, part, batches(4), steps=6, every=2)
    assert_equal(resumed, whole)
    assert first + second == history


def test_fit_is_the_step_in_a_loop():
    traced = chex.assert_max_traces(noisy_loss, n=1)
    given = params()
    state = training.init(given, MOMENTUM)
    fitted, history = fit(training.make_step(traced, MOMENTUM), state, batches(), steps=12, every=5)
    # The state given, and the parameters in it, are still there.
    assert_equal(state, training.init(params(), MOMENTUM))
    assert_equal(given, params())
    losses, take = [], jax.jit(training.make_step(noisy_loss, MOMENTUM))
    for n in range(12):
        state, metrics = take(state, jax.random.fold_in(KEY, n), batch(n))
        losses.append(float(metrics["loss"]))
    chex.assert_trees_all_close(fitted, state, rtol=1e-5, atol=1e-6)
    assert int(fitted.step) == 12
    assert [row["step"] for row in history] == [5, 10, 12]
    np.testing.assert_allclose(
        [row["loss"] for row in history], [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])], rtol=1e-4
    )


def test_fit_trains_in_the_memory_of_a_donated_state():
    step, kept, given = training.make_step(noisy_loss, MOMENTUM), training.init(params(), MOMENTUM), training.init(params(), MOMENTUM)
    states = [fit(step, state, batches(), steps=3, donate=state is given)[0] for state in (kept, given)]
    assert_equal(*states)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    # Parameters from elsewhere are NumPy's.
    loaded = training.init(jax.tree.map(np.asarray, params()), MOMENTUM)
    assert_equal(fit(step, loaded, batches(), steps=3, donate=True)[0], states[0])


def test_fit_gives_a_step_the_key_of_its_number():
    _, history = fit(counting, training.init(params(), SGD), iter(np.arange(4.0, dtype=np.float32)), steps=4, every=1)
    drawn = [jax.random.uniform(jax.random.fold_in(KEY, n)) for n in range(4)]
    np.testing.assert_allclose([row["draw"] for row in history], drawn, rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_rows_callbacks_and_save(steps, every, start):
    losses = np.random.default_rng(steps).normal(size=12).astype(np.float32)
    state = dataclasses.replace(training.init(params(), SGD), step=jnp.int32(start))
    seen, more, saved = [], [], []
    callbacks = [lambda state, row: seen.append((int(state.step), row)), lambda state, row: more.append(row)]
    end, history = fit(counting, state, losses[start:], steps=steps, every=every, callbacks=callbacks, save=saved.append)
    at = [n for n in range(start + 1, steps + 1) if n % every == 0 or n == steps]
    assert [row["step"] for row in history] == at
    means = [losses[first:last].mean() for first, last in itertools.pairwise([start, *at])]
    np.testing.assert_allclose([row["loss"] for row in history], means, rtol=1e-4, atol=1e-6)
    assert all(set(row) == {"step", "loss", "draw"} and type(row["loss"]) is float for row in history)
    assert [step for step, _ in seen] == at
    assert [row for _, row in seen] == more == history
    # Where there is nothing left to do the state comes back as it was.
    assert int(end.step) == max(start, steps)
    assert len(saved) == 1
    assert_equal(saved[0], end)


def test_an_interrupt_saves():
    saved = []

    def interrupt(state, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            counting,
            training.init(params(), SGD),
            itertools.repeat(np.float32(1)),
            steps=9,
            every=4,
            callbacks=[interrupt],
            save=saved.append,
        )
    assert [int(state.step) for state in saved] == [4]


def test_batches_that_end():
    saved = []
    with pytest.raises(ValueError, match=r"ended after 3 of 5 steps.*repeats"):
        fit(counting, training.init(params(), SGD), [np.float32(1)] * 3, steps=5, save=saved.append)
    assert [int(state.step) for state in saved] == [3]


def test_parts_of_a_batch_in_double_precision(x64):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch(0)))
    ends = [training.make_step(loss_fn, SGD, accumulate=n)(training.init(wide[0], SGD), KEY, wide[1]) for n in (1, 2)]
    assert {leaf.dtype for leaf in jax.tree.leaves((ends[1][0].params, ends[1][1]["loss"]))} == {np.dtype(np.float64)}
    chex.assert_trees_all_close(*ends, rtol=1e-12)


def test_a_training_that_takes_no_step_saves_nothing_over_what_was_there():
    saved, state = [], training.init(params(), SGD)

    def broken(state, key, batch):
        raise TypeError("not this batch")

    with pytest.raises(TypeError, match="not this batch"):
        fit(broken, state, [np.float32(1)], steps=5, save=saved.append)
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(counting, state, [np.float32(np.nan)] * 2, steps=5, every=1, save=saved.append)
    assert "saved" not in str(caught.value)
    assert saved == []
    # One that had ended already says so again.
    fit(counting, state, [], steps=0, save=saved.append)
    assert_equal(saved[0], state)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_error_names_the_step(every, value):
    losses, saved = [np.float32(loss) for loss in [1, 2, 3] + [value] * 7], []
    with pytest.raises(training.NonFiniteLoss, match=f"loss {value} at step 3") as caught:
        fit(counting, training.init(params(), SGD), losses, steps=10, every=every, save=saved.append)
    assert "saved" in str(caught.value)
    assert int(caught.value.state.step) == 3
    assert [int(state.step) for state in saved] == [3]
    assert [row["step"] for row in caught.value.history] == [n for n in (1, 2, 3) if n % every == 0]


def test_the_error_carries_the_last_good_state():
    step, state, saved = training.make_step(loss_fn, SGD), training.init(params(), SGD), []
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(step, state, [batch(0), batch(1), nan_batch(), nan_batch()], steps=4, save=saved.append)
    assert "loss nan" in str(caught.value)
    assert "grad_norm nan" in str(caught.value)
    assert "at step 2" in str(caught.value)
    for n in range(2):
        state, _ = step(state, KEY, batch(n))
    chex.assert_trees_all_close(caught.value.state, state, rtol=1e-5)
    assert_equal(caught.value.state, saved[0])


def test_without_save_the_error_promises_none():
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(counting, training.init(params(), SGD), [np.float32(np.nan)], steps=1)
    assert "saved" not in str(caught.value)


def test_progress_bar(capsys):
    losses = [np.float32(loss) for loss in (1, 2, 3, 4.5)]
    _, shown = fit(counting, training.init(params(), SGD), losses, steps=4, every=2, progress=True)
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "loss 3.7500" in out
    assert "steps/s" in out
    _, quiet = fit(counting, training.init(params(), SGD), losses, steps=4, every=2)
    assert capsys.readouterr().out == ""
    assert shown == quiet


def test_it_learns(key):
    x = jax.random.normal(key, (64, 3))
    data = (x, x @ jnp.array([0.5, 1.0, -1.0]) + 2.0)
    state, history = fit(training.make_step(loss_fn, SGD), training.init(params(), SGD), itertools.repeat(data), steps=90, every=30)
    np.testing.assert_allclose(state.params["w"], [0.5, 1.0, -1.0], atol=0.01)
    np.testing.assert_allclose(state.params["b"], 2.0, atol=0.01)
    assert history[0]["loss"] > history[1]["loss"] > history[2]["loss"]


def test_no_step_is_taken_after_one_that_was_not_finite():
    step = training.make_step(loss_fn, SGD)
    with pytest.raises(training.NonFiniteLoss, match="at step 1") as caught:
        fit(step, training.init(params(), SGD), [batch(0), nan_batch(), batch(1), batch(2)], steps=4)
    undisturbed, _ = fit(step, training.init(params(), SGD), [batch(0)], steps=1)
    assert caught.value.state.step == 1
    chex.assert_trees_all_equal(caught.value.state, undisturbed)


def test_rows_as_lines_and_in_tensorboard(tmp_path):
    from tensorboard_events import scalars

    callbacks = [training.json_lines(tmp_path / "run" / "rows.jsonl"), training.tensorboard(tmp_path / "events")]
    step = training.make_step(loss_fn, SGD)
    state, first = fit(step, training.init(params(), SGD), batches(), steps=4, every=2, callbacks=callbacks)
    _, second = fit(step, state, batches(4), steps=6, every=2, callbacks=callbacks)
    written = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert written == first + second
    # Its own thread writes.
    deadline = time.monotonic() + 20
    while len((seen := scalars(tmp_path / "events")).get("loss", ())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [row["step"] for row in first + second] == [step for step, _ in seen["loss"]]
    np.testing.assert_allclose([value for _, value in seen["loss"]], [row["loss"] for row in first + second], rtol=1e-6)


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"tensorboardX: pip install 'fmjax\[tensorboard\]'"):
        training.tensorboard(tmp_path)


def test_a_trace_of_the_second_row(tmp_path):
    fit(training.make_step(loss_fn, SGD), training.init(params(), SGD), batches(), steps=6, every=2, trace=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_the_loop_waits_for_the_device_once_a_row(monkeypatch):
    """What comes back from the device: the step at the start, and the metrics of every row in one transfer."""
    step, state = training.make_step(loss_fn, SGD), training.init(params(), SGD)
    data = [jax.device_put(batch(seed)) for seed in range(12)]
    got, reads = [], []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: got.append(1) or get(tree))
    array = type(jnp.zeros(()))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda self: reads.append(self.shape) or value.fget(self)))
    fit(step, state, data, steps=12, every=4)
    assert len(got) == 3
    # The step once, and two metrics a step.
    assert len(reads) <= 1 + 2 * 12


@pytest.mark.parametrize("steps", [9, 4])
def test_a_signal_ends_it_between_two_steps_and_after_the_last(steps):
    saved, step = [], training.make_step(loss_fn, SGD)

    def signalled(state, row):
        if row["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(training.Preempted) as caught:
        fit(step, training.init(params(), SGD), batches(), steps=steps, every=2, callbacks=[signalled], save=saved.append)
    assert caught.value.code == training.PREEMPTED == 75
    assert int(caught.value.state.step) == 4
    assert [row["step"] for row in caught.value.history] == [2, 4]
    assert_equal(saved[-1], caught.value.state)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_is_off_the_main_thread_has_no_signals():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        step = training.make_step(loss_fn, SGD)
        state, _ = pool.submit(fit, step, training.init(params(), SGD), batches(), steps=2).result()
    assert int(state.step) == 2
