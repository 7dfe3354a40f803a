"""The state, the step and the loop, on a small regression whose every number can be worked out."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import shutil
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
    """The state at the end, and what was logged."""
    run = training.fit(step, training.Run(state, KEY), data, **{"progress": False} | options)
    return run.state, list(run.history)


def keep(saved):
    """A save that keeps the states."""
    return lambda run, wait: saved.append(run.state)


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
    assert set(metrics) == {"loss", "grad_norm", "update_norm"}
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
    whole, history = fit(step, start, batches(), steps=6, log_every=2)
    part, first = fit(step, start, batches(), steps=4, log_every=2)
    assert int(part.step) == 4
    resumed, second = fit(step, part, batches(4), steps=6, log_every=2)
    assert_equal(resumed, whole)
    assert first + second == history


def test_fit_is_the_step_in_a_loop():
    traced = chex.assert_max_traces(noisy_loss, n=1)
    given = params()
    state = training.init(given, MOMENTUM)
    trained_state, history = fit(training.make_step(traced, MOMENTUM), state, batches(), steps=12, log_every=5)
    # The state given, and the parameters in it, are still there.
    assert_equal(state, training.init(params(), MOMENTUM))
    assert_equal(given, params())
    losses, take = [], jax.jit(training.make_step(noisy_loss, MOMENTUM))
    for n in range(12):
        state, metrics = take(state, jax.random.fold_in(KEY, n), batch(n))
        losses.append(float(metrics["loss"]))
    chex.assert_trees_all_close(trained_state, state, rtol=1e-5, atol=1e-6)
    assert int(trained_state.step) == 12
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
    _, history = fit(counting, training.init(params(), SGD), iter(np.arange(4.0, dtype=np.float32)), steps=4, log_every=1)
    drawn = [jax.random.uniform(jax.random.fold_in(KEY, n)) for n in range(4)]
    np.testing.assert_allclose([row["draw"] for row in history], drawn, rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_rows_callbacks_and_save(steps, every, start):
    losses = np.random.default_rng(steps).normal(size=12).astype(np.float32)
    state = dataclasses.replace(training.init(params(), SGD), step=jnp.int32(start))
    seen, more, saved = [], [], []
    callbacks = [lambda run, row: seen.append((int(run.state.step), row)), lambda run, row: more.append(row)]
    end, history = fit(counting, state, losses[start:], steps=steps, log_every=every, callbacks=callbacks, save=keep(saved))
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

    def interrupt(run, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            counting,
            training.init(params(), SGD),
            itertools.repeat(np.float32(1)),
            steps=9,
            log_every=4,
            callbacks=[interrupt],
            save=keep(saved),
        )
    assert [int(state.step) for state in saved] == [4]


def test_batches_that_end():
    saved = []
    with pytest.raises(ValueError, match=r"ended after 3 of 5 steps.*repeats"):
        fit(counting, training.init(params(), SGD), [np.float32(1)] * 3, steps=5, save=keep(saved))
    assert [int(state.step) for state in saved] == [3]


def test_parts_of_a_batch_in_double_precision(x64):
    double = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch(0)))
    ends = [training.make_step(loss_fn, SGD, accumulate=n)(training.init(double[0], SGD), KEY, double[1]) for n in (1, 2)]
    assert {leaf.dtype for leaf in jax.tree.leaves((ends[1][0].params, ends[1][1]["loss"]))} == {np.dtype(np.float64)}
    chex.assert_trees_all_close(*ends, rtol=1e-12)


ONES = np.ones((12, 3), np.float32)


@pytest.mark.parametrize(
    ("weights", "batch", "loss"),
    [
        (jnp.ones(3), None, lambda w, key, _: (jax.random.normal(key, (3,)) @ w) ** 2),
        ((1 + 1j) * jnp.ones(3), ONES, lambda w, key, x: (jnp.abs(x @ w) ** 2).mean()),
        (jnp.ones(3), {"x": ONES, "s": ONES[:4, 0]}, lambda w, key, batch: (batch["x"] @ w).mean() * batch["s"].mean()),
        (jnp.ones(3), ONES, lambda w, key, x: 1.0),
    ],
    ids=["drawn from the key", "complex parameters", "parts of two sizes", "a Python number"],
)
def test_any_batch_is_taken_in_parts(weights, batch, loss):
    """A step of two parts is that of the mean of both losses, each with a key of its own."""

    def halves(params, key, batch):
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i::2], batch) for i in range(2)]
        return sum(jnp.asarray(loss(params["w"], jax.random.fold_in(key, i), part)) for i, part in enumerate(parts)) / 2

    state = training.init({"w": weights}, SGD)
    in_parts = training.make_step(lambda params, key, batch: loss(params["w"], key, batch), SGD, accumulate=2)
    chex.assert_trees_all_close(in_parts(state, KEY, batch), training.make_step(halves, SGD)(state, KEY, batch), rtol=1e-5)


def test_a_training_that_takes_no_step_saves_nothing_over_what_was_there():
    saved, state = [], training.init(params(), SGD)

    def broken(state, key, batch):
        raise TypeError("not this batch")

    with pytest.raises(TypeError, match="not this batch"):
        fit(broken, state, [np.float32(1)], steps=5, save=keep(saved))
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(counting, state, [np.float32(np.nan)] * 2, steps=5, log_every=1, save=keep(saved))
    assert "saved" not in str(caught.value)
    assert saved == []
    # One that had ended already says so again.
    fit(counting, state, [], steps=0, save=keep(saved))
    assert_equal(saved[0], state)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_error_names_the_step(every, value):
    losses, saved = [np.float32(loss) for loss in [1, 2, 3] + [value] * 7], []
    with pytest.raises(training.NonFiniteLoss, match=f"loss {value} at step 3") as caught:
        fit(counting, training.init(params(), SGD), losses, steps=10, log_every=every, save=keep(saved))
    assert "saved" in str(caught.value)
    assert int(caught.value.run.state.step) == 3
    assert [int(state.step) for state in saved] == [3]
    assert [row["step"] for row in caught.value.run.history] == [n for n in (1, 2, 3) if n % every == 0]


def test_the_error_carries_the_last_good_state():
    step, state, saved = training.make_step(loss_fn, SGD), training.init(params(), SGD), []
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(step, state, [batch(0), batch(1), nan_batch(), nan_batch()], steps=4, save=keep(saved))
    assert "loss nan" in str(caught.value)
    assert "grad_norm nan" in str(caught.value)
    assert "at step 2" in str(caught.value)
    for n in range(2):
        state, _ = step(state, KEY, batch(n))
    chex.assert_trees_all_close(caught.value.run.state, state, rtol=1e-5)
    assert_equal(caught.value.run.state, saved[0])


def test_without_save_the_error_promises_none():
    with pytest.raises(training.NonFiniteLoss) as caught:
        fit(counting, training.init(params(), SGD), [np.float32(np.nan)], steps=1)
    assert "saved" not in str(caught.value)


def test_progress_bar(capsys):
    losses = [np.float32(loss) for loss in (1, 2, 3, 4.5)]
    _, shown = fit(counting, training.init(params(), SGD), losses, steps=4, log_every=2, progress=True)
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "loss 3.7500" in out
    assert "steps/s" in out
    _, quiet = fit(counting, training.init(params(), SGD), losses, steps=4, log_every=2)
    assert capsys.readouterr().out == ""
    assert shown == quiet


def test_it_learns(key):
    x = jax.random.normal(key, (64, 3))
    data = (x, x @ jnp.array([0.5, 1.0, -1.0]) + 2.0)
    state, history = fit(training.make_step(loss_fn, SGD), training.init(params(), SGD), itertools.repeat(data), steps=90, log_every=30)
    np.testing.assert_allclose(state.params["w"], [0.5, 1.0, -1.0], atol=0.01)
    np.testing.assert_allclose(state.params["b"], 2.0, atol=0.01)
    assert history[0]["loss"] > history[1]["loss"] > history[2]["loss"]


def test_no_step_is_taken_after_one_that_was_not_finite():
    step = training.make_step(loss_fn, SGD)
    with pytest.raises(training.NonFiniteLoss, match="at step 1") as caught:
        fit(step, training.init(params(), SGD), [batch(0), nan_batch(), batch(1), batch(2)], steps=4)
    undisturbed, _ = fit(step, training.init(params(), SGD), [batch(0)], steps=1)
    assert caught.value.run.state.step == 1
    chex.assert_trees_all_equal(caught.value.run.state, undisturbed)


def test_rows_as_lines_and_in_tensorboard(tmp_path):
    from tensorboard_events import scalars

    callbacks = [training.json_lines(tmp_path / "run" / "rows.jsonl"), training.tensorboard(tmp_path / "events")]
    step = training.make_step(loss_fn, SGD)
    run = training.Run(training.init(params(), SGD), KEY)
    for steps in (4, 6):
        run = training.fit(step, run, batches(int(run.state.step)), steps=steps, log_every=2, callbacks=callbacks, progress=False)
    written = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert written == list(run.history)
    # Its own thread writes.
    deadline = time.monotonic() + 20
    while len((seen := scalars(tmp_path / "events")).get("loss", ())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [row["step"] for row in list(run.history)] == [step for step, _ in seen["loss"]]
    np.testing.assert_allclose([value for _, value in seen["loss"]], [row["loss"] for row in list(run.history)], rtol=1e-6)


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"tensorboardX: pip install 'fmjax\[tensorboard\]'"):
        training.tensorboard(tmp_path)


def test_a_trace_of_the_second_row(tmp_path):
    fit(training.make_step(loss_fn, SGD), training.init(params(), SGD), batches(), steps=6, log_every=2, trace=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_the_loop_waits_for_the_device_once_per_log(monkeypatch):
    """What comes back from the device: the step at the start, and the metrics of every row in one transfer."""
    step, state = training.make_step(loss_fn, SGD), training.init(params(), SGD)
    data = [jax.device_put(batch(seed)) for seed in range(12)]
    got, reads = [], []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: got.append(1) or get(tree))
    array = type(jnp.zeros(()))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda self: reads.append(self.shape) or value.fget(self)))
    fit(step, state, data, steps=12, log_every=4)
    assert len(got) == 3 + 2
    # The step once; three metrics of each step and whether it was taken; at first and last how much of four arrays is not finite.
    assert len(reads) <= 1 + 4 * 12 + 2 * 4


@pytest.mark.parametrize("steps", [9, 4])
def test_a_signal_ends_it_between_two_steps_and_after_the_last(steps):
    saved, step = [], training.make_step(loss_fn, SGD)

    def signalled(run, metrics):
        if metrics["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(training.Preempted) as caught:
        fit(step, training.init(params(), SGD), batches(), steps=steps, log_every=2, callbacks=[signalled], save=keep(saved))
    assert caught.value.code == training.PREEMPTED == 75
    assert int(caught.value.run.state.step) == 4
    assert [row["step"] for row in caught.value.run.history] == [2, 4]
    assert_equal(saved[-1], caught.value.run.state)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_is_off_the_main_thread_has_no_signals():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        step = training.make_step(loss_fn, SGD)
        state, _ = pool.submit(fit, step, training.init(params(), SGD), batches(), steps=2).result()
    assert int(state.step) == 2


class Stream:
    """Batches whose place is a number, as those of data.pipeline."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.data[self.at - 1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def whole(step, data, **options):
    """A training that nothing disturbs."""
    start = training.Run(training.init(params(), MOMENTUM), KEY)
    return training.fit(step, start, Stream(data), **{"steps": 12, "log_every": 5, "progress": False} | options)


def assert_same_run(one, other):
    assert_equal(one.state, other.state)
    assert (one.position, one.history, one.unlogged) == (other.position, other.history, other.unlogged)


@pytest.mark.parametrize("bad", [0, 3, 7, 11])
def test_after_a_loss_that_was_not_finite_the_batches_are_where_the_state_is(bad):
    """And once the batch is mended, what follows is what would have been."""
    step, data, saved = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)], []
    start = training.Run(training.init(params(), MOMENTUM), KEY)
    broken = [nan_batch() if n == bad else one for n, one in enumerate(data)]
    with pytest.raises(training.NonFiniteLoss, match=f"at step {bad}") as caught:
        training.fit(step, start, Stream(broken), steps=12, log_every=5, progress=False, save=lambda run, wait: saved.append(run))
    run = caught.value.run
    assert (int(run.state.step), run.position, len(run.unlogged)) == (bad, {"at": bad}, bad % 5)
    assert [(each.position, each.history) for each in saved] == [(run.position, run.history)] * (bad > 0)
    assert_same_run(training.fit(step, run, Stream(data), steps=12, log_every=5, progress=False), whole(step, data))


@pytest.mark.parametrize("at", [1, 4, 5, 8])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_between_two_logs_goes_on_as_if_it_had_not_been(at, number):
    step, data, saved = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)], []

    class Signals(Stream):
        def __next__(self):
            if self.at == at - 1:
                signal.raise_signal(number)
            return super().__next__()

    start = training.Run(training.init(params(), MOMENTUM), KEY)
    with pytest.raises((training.Preempted, training.Interrupted)) as caught:
        training.fit(step, start, Signals(data), steps=12, log_every=5, progress=False, save=lambda run, wait: saved.append((run, wait)))
    ((run, wait),) = saved
    assert wait
    assert_same_run(caught.value.run, run)
    assert int(run.state.step) == at
    assert_same_run(training.fit(step, run, Stream(data), steps=12, log_every=5, progress=False), whole(step, data))


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_what_is_logged_is_logged_once_whatever_fails(calls):
    """A callback that fails: those before it are called again when the run goes on, and what they add is kept."""
    step, data, saved, seen = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)], [], []

    def adds(run, metrics):
        metrics["more"] = jnp.float32(metrics["step"])
        seen.append(metrics["step"])

    def fails(run, metrics):
        assert run.history[-1] is metrics
        assert type(metrics["more"]) is float
        if len(seen) == calls and not saved:
            raise OSError("the disk is full")

    options = {"steps": 12, "log_every": 5, "progress": False, "callbacks": [adds, fails]}
    start = training.Run(training.init(params(), MOMENTUM), KEY)
    with pytest.raises(OSError, match="the disk is full"):
        training.fit(step, start, Stream(data), save=lambda run, wait: saved.append(run), **options)
    at = [5, 10, 12][calls - 1]
    assert (int(saved[0].state.step), len(saved[0].history), len(saved[0].unlogged)) == (at, calls - 1, at - [0, 5, 10][calls - 1])
    ended = training.fit(step, saved[0], Stream(data), **options)
    assert seen == sorted([5, 10, 12, at])
    assert [metrics.pop("more") for metrics in ended.history] == [5, 10, 12]
    assert_same_run(ended, whole(step, data))


def test_saves_on_the_way():
    saved, data = [], [np.float32(n) for n in range(9)]
    start = training.Run(training.init(params(), SGD), KEY)
    training.fit(
        counting, start, Stream(data), steps=9, log_every=4, save_every=3, progress=False, save=lambda run, wait: saved.append((run, wait))
    )
    assert [(run.position["at"], len(run.history), len(run.unlogged), wait) for run, wait in saved] == [
        (3, 0, 3, False),
        (6, 1, 2, False),
        (9, 3, 0, True),
    ]
    with pytest.raises(TypeError, match=r"save is called with a run and whether to wait, which .* does not take: too many positional"):
        training.fit(counting, start, Stream(data), steps=9, save=lambda run: None)
    with pytest.raises(ValueError, match="save_every is 3, but there is no save"):
        training.fit(counting, start, Stream(data), steps=9, save_every=3)


def test_batches_that_are_a_function_of_the_step():
    step, data = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)]
    start = training.Run(training.init(params(), MOMENTUM), KEY)
    part = training.fit(step, start, lambda n: data[n], steps=7, log_every=5, progress=False)
    assert part.position == 7
    ended = training.fit(step, dataclasses.replace(part, history=(), unlogged=()), lambda n: data[n], steps=12, progress=False)
    assert_equal(ended.state, whole(step, data).state)
    with pytest.raises(TypeError, match=r"place in its batches is 7, but a list_iterator has no set_state: .*Run\(..., position=None\)"):
        training.fit(step, part, data, steps=12)
    with pytest.raises(TypeError, match=r"place in its batches is \{'at': 3\}, but the batches are a function of the step"):
        training.fit(step, dataclasses.replace(part, position={"at": 3}), lambda n: data[n], steps=12)


def test_a_run_is_asked_for():
    state = training.init(params(), SGD)
    with pytest.raises(TypeError, match=r"The run is a TrainState.*give training\.Run\(state, key\)"):
        training.fit(counting, state, [], steps=1)
    with pytest.raises(TypeError, match="The state is a dict"):
        training.fit(counting, training.Run({}, KEY), [], steps=1)


def nan_rate(n):
    return jnp.where(n == 3, jnp.nan, 0.01)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("optimizer", "scale"),
    [
        (optax.sgd(nan_rate), 1.0),
        (optax.adam(nan_rate), 1.0),
        (optax.adam(1e-3, mu_dtype=jnp.float16), 1e6),
        (optax.adam(1e-3), 1e25),
        (optax.sgd(3e38), 3e5),
    ],
    ids=["a rate that is nan", "the same with moments", "a moment that overflows", "one that makes the update 0", "a large update"],
)
def test_a_new_state_that_is_not_finite_is_not_taken(dtype, optimizer, scale):
    """The loss and its gradient are finite; the moment would be infinite, and the update so zero for ever."""

    def loss(params, key, batch):
        return (params["w"].astype(jnp.float32) * batch).sum()

    saved = []
    start = training.Run(training.init({"w": jnp.ones(3, dtype)}, optimizer), KEY)
    step = training.make_step(loss, optimizer)
    data = lambda n: jnp.ones(3) * (scale if n == 3 else 1.0)
    if scale == 3e5:
        data = lambda n: jnp.ones(3) * (scale if n == 3 else 1e-38)
    with pytest.raises(
        training.NonFiniteLoss, match=r"^(grad_norm inf and )?update_norm (nan|inf) at step 3: the step was not taken"
    ) as caught:
        training.fit(step, start, data, steps=6, log_every=6, progress=False, save=lambda run, wait: saved.append(run))
    assert int(caught.value.run.state.step) == 3
    for run in (caught.value.run, *saved):
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(run.state))


def test_an_optimiser_that_begins_at_infinity_is_none_of_that():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = training.init(params(), optimizer)
    assert any(not np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state))
    new = training.make_step(loss_fn, SGD)
    frozen = dataclasses.replace(state, params=state.params | {"b": jnp.float32(np.inf)}, opt_state=SGD.init(params()))
    # What was infinite before says nothing of the step: here the loss does.
    _, metrics = new(frozen, KEY, batch(0))
    assert not np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: dataclasses.replace(new, ema=new.ema | {"b": jnp.float32(np.nan)}), "1 numbers of the state are not finite at step 6"),
        (lambda new: dataclasses.replace(new, opt_state=jax.tree.map(lambda x: x * jnp.nan, new.opt_state)), "4 numbers of the state"),
        (lambda new: dataclasses.replace(new, step=new.step * 0), "a state whose step is not one more than before at step 0"),
    ],
    ids=["an average that is nan", "moments that are", "a step that is not counted"],
)
def test_what_a_step_of_ones_own_does_wrong(change, message):
    saved = []

    def step(state, key, batch):
        new, metrics = training.make_step(loss_fn, MOMENTUM)(state, key, batch)
        return change(new), metrics

    with pytest.raises(training.NonFiniteLoss, match=message):
        fit(step, training.init(params(), MOMENTUM), batches(), steps=6, log_every=3, save=keep(saved))
    assert saved == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_half_precision_keeps_its_dtypes(dtype, accumulate):
    """Averages, moments and sums of gradients are float32 from the start, so small changes are not lost, and stay so."""
    optimizer = optax.adam(0.0)
    state = training.init({"w": jnp.ones(64, dtype), "n": 1.0}, optimizer)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {str(jnp.dtype(dtype)), "float32"}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves((state.ema, state.opt_state)))

    def loss(params, key, batch):
        return ((params["w"].astype(jnp.float32)[None] * params["n"] - batch) ** 2).mean()

    step = training.make_step(loss, optimizer, ema_decay=0.999, accumulate=accumulate)
    data = jnp.linspace(0.0, 1.0, 4)[:, None] * jnp.ones((1, 64))
    new, metrics = step(state, KEY, data)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}
    # Moments gather what they would of float32 parameters: in half precision a thousandth more would be lost.
    exact = training.init({"w": jnp.ones(64), "n": 1.0}, optimizer)
    for _ in range(20):
        state, _ = step(state, KEY, data)
        exact, _ = step(exact, KEY, data)
    for name in ("mu", "nu"):
        one, other = (getattr(each.opt_state[0], name)["w"] for each in (state, exact))
        np.testing.assert_allclose(one, other, rtol=2 ** -(6 if dtype == jnp.bfloat16 else 9))


def test_another_shape_of_optimiser_state_is_named():
    state = training.init({"w": jnp.ones(3)}, MOMENTUM)
    other = dataclasses.replace(state, opt_state=MOMENTUM.init({"w": jnp.ones(1)}))
    with pytest.raises(ValueError, match="opt_state is of another optimiser or of other parameters"):
        training.make_step(lambda params, key, batch: params["w"].sum(), MOMENTUM)(other, KEY, batch(0))


@pytest.mark.parametrize("optimizer", [optax.contrib.prodigy(), optax.contrib.sam(SGD, SGD)], ids=["prodigy", "sam"])
@pytest.mark.parametrize("built", ["by init", "by hand"])
def test_optimisers_that_keep_the_parameters_are_donated(optimizer, built):
    """A buffer that stands in a state twice cannot be donated twice."""
    step = training.make_step(loss_fn, optimizer)
    given = params()
    state = training.init(given, optimizer)
    if built == "by hand":
        state = training.TrainState(jnp.zeros((), jnp.int32), given, optimizer.init(given), given)
    expected, _ = fit(step, training.init(params(), optimizer), batches(), steps=3)
    assert_equal(fit(step, state, batches(), steps=3, donate=True)[0], expected)


def test_a_second_interrupt_does_not_wait_for_a_batch():
    saved = []

    class Stuck(Stream):
        def __next__(self):
            if self.at == 4:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("it waited")
            return super().__next__()

    start = training.Run(training.init(params(), SGD), KEY)
    with pytest.raises(KeyboardInterrupt):
        training.fit(
            counting,
            start,
            Stuck([np.float32(1)] * 9),
            steps=9,
            log_every=3,
            progress=False,
            save=lambda run, wait: saved.append(run),
        )
    assert [(int(run.state.step), run.position, len(run.unlogged)) for run in saved] == [(4, {"at": 4}, 1)]


def test_interrupts_while_it_saves_wait(capfd):
    done = []

    def save(run, wait):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        done.append(int(run.state.step))

    def interrupt(run, metrics):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(training.Preempted):
        fit(counting, training.init(params(), SGD), itertools.repeat(np.float32(1)), steps=9, log_every=3, callbacks=[interrupt], save=save)
    assert done == [3]
    assert signal.getsignal(signal.SIGINT) is before
    assert "A checkpoint is being written" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["torn", "from another run", "longer than the run", "gone", "nothing"])
def test_logs_are_the_history_whatever_was_there(tmp_path, damage):
    from tensorboard_events import scalars

    step, data = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)]
    lines, events = tmp_path / "run" / "rows.jsonl", tmp_path / "run" / "events"

    def logs(history=()):
        return [training.json_lines(lines, history), training.tensorboard(events, history)]

    start = training.Run(training.init(params(), MOMENTUM), KEY)
    part = training.fit(step, start, Stream(data), steps=6, log_every=3, progress=False, callbacks=logs())
    if damage == "longer than the run":
        training.fit(step, part, Stream(data), steps=12, log_every=3, progress=False, callbacks=logs(part.history))
    for file in [lines, *events.iterdir()]:
        content = file.read_bytes()
        if damage == "torn":
            file.write_bytes(content[:-5])
        elif damage == "from another run":
            file.write_bytes(b'{"step": 1}\n' + content)
    if damage == "gone":
        shutil.rmtree(tmp_path / "run")
    (tmp_path / "run" / "events").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "events" / "events.out.tfevents.mine").write_bytes(b"")

    def delete(run, metrics):
        """In the middle of it, too."""
        if metrics["step"] == 9 and damage == "gone":
            lines.unlink()
            shutil.rmtree(events)

    ended = training.fit(step, part, Stream(data), steps=12, log_every=3, progress=False, callbacks=[*logs(part.history), delete])
    assert [json.loads(line) for line in lines.read_text().splitlines()] == list(ended.history)
    seen = scalars(events)["loss"]
    assert [at for at, _ in seen] == [3, 6, 9, 12]
    np.testing.assert_allclose([value for _, value in seen], [metrics["loss"] for metrics in ended.history], rtol=1e-6)
    assert len(list(events.iterdir())) == (1 if damage == "gone" else 2)


@pytest.mark.parametrize("error", [OSError("No space left on device"), None], ids=["nothing is written", "half is written"])
def test_a_full_disk_in_a_log_ends_it(tmp_path, monkeypatch, error):
    """The run that is saved has not been logged there yet, and is when it goes on."""
    saved, lines, write = [], tmp_path / "rows.jsonl", os.write
    step, data = training.make_step(noisy_loss, MOMENTUM), [batch(n) for n in range(12)]

    def full(descriptor, content):
        if error is not None:
            raise error
        return write(descriptor, content[: len(content) // 2])

    def fill(run, metrics):
        if metrics["step"] == 9:
            monkeypatch.setattr(os, "write", full)

    options = {"steps": 12, "log_every": 3, "progress": False}
    start = training.Run(training.init(params(), MOMENTUM), KEY)
    callbacks = [fill, training.json_lines(lines)]
    with pytest.raises(OSError, match=r"No space left|rows\.jsonl could not be written to the end: is the disk full\?"):
        training.fit(step, start, Stream(data), **options, callbacks=callbacks, save=lambda run, wait: saved.append(run))
    monkeypatch.undo()
    (run,) = saved
    assert (int(run.state.step), len(run.history), len(run.unlogged)) == (9, 2, 3)
    ended = training.fit(step, run, Stream(data), **options, callbacks=[training.json_lines(lines, run.history)])
    assert [json.loads(line) for line in lines.read_text().splitlines()] == list(ended.history)


def test_parameters_of_float16_that_would_overflow():
    state = training.init({"w": jnp.full(3, 6e4, jnp.float16)}, optax.sgd(1e5))
    same, metrics = training.make_step(lambda params, key, batch: -params["w"].astype(jnp.float32).sum() * batch, optax.sgd(1e5))(
        state, KEY, jnp.float32(1.0)
    )
    assert not np.isfinite(metrics["update_norm"])
    assert_equal(same, state)


@pytest.mark.parametrize("decay", [lambda n: jnp.nan, lambda n: 1.5, lambda n: -0.1])
def test_a_decay_that_is_none_is_not_taken(decay):
    state = training.init(params(), SGD)
    same, metrics = training.make_step(loss_fn, SGD, ema_decay=decay)(state, KEY, batch(0))
    assert math.isnan(metrics["update_norm"])
    assert_equal(same, state)


def test_a_run_that_was_begun_with_other_metrics_goes_on():
    run = training.Run(training.init(params(), SGD), KEY, unlogged=({"loss": 3.0, "old": 1.0},))
    run = dataclasses.replace(run, state=dataclasses.replace(run.state, step=jnp.int32(1)))
    (metrics,) = training.fit(counting, run, lambda n: jnp.float32(1.0), steps=2, progress=False).history
    draw = jax.random.uniform(jax.random.fold_in(KEY, 1))
    assert metrics == {"step": 2, "loss": 2.0, "draw": float(draw)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_last_is_saved_ends_it_after_that(number):
    done = []

    def save(run, wait):
        signal.raise_signal(number)
        done.append(int(run.state.step))

    with pytest.raises((training.Preempted, training.Interrupted)) as caught:
        fit(counting, training.init(params(), SGD), itertools.repeat(np.float32(1)), steps=4, save=save)
    assert done == [4]
    assert int(caught.value.run.state.step) == 4


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt = lambda run, metrics: signal.raise_signal(signal.SIGINT)
        state, _ = fit(counting, training.init(params(), SGD), itertools.repeat(np.float32(1)), steps=4, log_every=2, callbacks=[interrupt])
        assert int(state.step) == 4
    finally:
        signal.signal(signal.SIGINT, before)


def test_logs_of_another_run_and_numbers_that_come_later(tmp_path):
    """The same callbacks in a second training, and before one that adds: the next line finds out."""
    log, state = training.json_lines(tmp_path / "lines"), training.init(params(), SGD)
    for _ in range(2):
        later = lambda run, metrics: metrics.update(more=1.0)
        options = {"steps": 6, "log_every": 2, "callbacks": [log, later]}
        _, history = fit(counting, state, itertools.repeat(np.float32(1)), **options)
        lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
        assert lines[:-1] == history[:-1]
        assert lines[-1] == {name: value for name, value in history[-1].items() if name != "more"}


def test_a_step_that_fails_on_the_device_is_what_is_said():
    saved = []

    def fails(x):
        if x > 2:
            raise RuntimeError("the device is on fire")
        return x

    def step(state, key, batch):
        new, metrics = counting(state, key, batch)
        return new, metrics | {"seen": jax.pure_callback(fails, jax.ShapeDtypeStruct((), jnp.float32), batch)}

    with pytest.raises(Exception, match="the device is on fire"):
        fit(step, training.init(params(), SGD), [np.float32(n) for n in range(6)], steps=6, log_every=1, save=keep(saved))


def test_places_that_cannot_be_saved_are_named_before_training():
    class Odd(Stream):
        def get_state(self):
            return (1, self.at)

    run = training.Run(training.init(params(), SGD), KEY)
    with pytest.raises(TypeError, match=r"get_state\(\) gives \(1, 0\), but a place in the data is what JSON can hold"):
        training.fit(counting, run, Odd([np.float32(1)] * 4), steps=4, save=lambda run, wait: None)
    with pytest.raises(TypeError, match=r"could not be set to the run's place in them, \{'other': 1\} \(KeyError: 'at'\)"):
        training.fit(counting, dataclasses.replace(run, position={"other": 1}), Stream([]), steps=4)


def test_a_callback_that_spoils_the_metrics():
    for spoil, error, message in (
        (lambda run, metrics: metrics.update(step=0), ValueError, "changed the step of the metrics to 0, which is 2"),
        (lambda run, metrics: metrics.update({1: 2.0}), TypeError, "added 1 to the metrics, whose names are strings"),
        (lambda run, metrics: metrics.update(more="much"), TypeError, "added 'much' as 'more' to the metrics, which are numbers"),
    ):
        with pytest.raises(error, match=message):
            fit(counting, training.init(params(), SGD), itertools.repeat(np.float32(1)), steps=4, log_every=2, callbacks=[spoil])
