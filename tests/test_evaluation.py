"""Means over all examples whatever the batches, and losses by their times."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import losses, parallel, paths, sampling, training
from fmjax.data import images, pipeline

KEY, N = jax.random.key(7), 101
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
Y = np.arange(N, dtype=np.int32)
SOURCE = images.arrays(X, Y)


def metric(params, keys, batch):
    """A flow-matching loss, whose noise and times are drawn for each example."""
    x_1, y = batch
    key_0, key_t = jax.vmap(jax.random.split, out_axes=1)(keys)
    x_0, t = sampling.noise(key_0, x_1.shape), jax.vmap(jax.random.uniform)(key_t)
    return {"loss": losses.flow_matching(lambda x, t: params * x, paths.Linear(), x_0, x_1, t), "t": t, "label": y}


def test_every_example_counts_once_whatever_the_batches():
    expected = metric(0.5, jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(N)), (X, Y))
    for size in (7, 32, 101, 500):
        found = training.evaluate(metric, 0.5, KEY, pipeline.in_order(SOURCE, size))
        for name, values in expected.items():
            values = np.asarray(values, np.float64)
            np.testing.assert_allclose(found[name].mean, values.mean(), rtol=1e-6)
            np.testing.assert_allclose(found[name].standard_error, values.std(ddof=1) / np.sqrt(N), rtol=1e-6)
            assert found[name].count == N
    parts = list(training.per_example(metric, 0.5, KEY, pipeline.in_order(SOURCE, 32)))
    assert [len(part["label"]) for part in parts] == [32, 32, 32, 5]
    np.testing.assert_array_equal(np.concatenate([part["label"] for part in parts]), Y)
    assert {part["loss"].dtype for part in parts} == {np.dtype(np.float64)}


def test_on_devices_it_is_the_same():
    mesh = parallel.mesh(4)
    one = training.evaluate(metric, 0.5, KEY, pipeline.in_order(SOURCE, 30))
    params = parallel.shard(jnp.float32(0.5), mesh)
    many = training.evaluate(metric, params, KEY, pipeline.in_order(SOURCE, 30), sharding=parallel.batch_sharding(mesh))
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-6)
    shapes = []

    def seen(params, keys, batch):
        shapes.append(batch[0].shape)
        return batch[0].sum(1)

    # Filled up to 32, for a batch of 30 and for the last, of 11; and compiled once.
    training.evaluate(seen, None, KEY, pipeline.in_order(SOURCE, 30), sharding=parallel.batch_sharding(mesh))
    assert shapes == [(32, 3)]


def test_nothing_compiles_twice():
    traces = []

    def counted(params, keys, batch):
        traces.append(batch[0].shape)
        return (batch[0] * params).sum(1)

    for params in (1.0, 2.0):
        found = training.evaluate(counted, params, KEY, pipeline.in_order(SOURCE, 16))
        np.testing.assert_allclose(found.mean, params * X.sum(1, dtype=np.float64).mean(), rtol=1e-5)
    assert traces == [(16, 3)]


def test_nan_of_an_example_shows_and_that_of_what_fills_up_does_not():
    batches = [np.ones((4, 2), np.float32), np.zeros((1, 2), np.float32)]

    def metric(_, keys, x):
        """What fills up the second batch, which is all but its first example, is nan."""
        return jnp.where(x[:, 0] > 0, 1.0, jnp.where(jnp.arange(4) > 0, jnp.nan, 2.0))

    assert training.evaluate(metric, None, KEY, batches) == (1.2, pytest.approx(0.2), 5)
    batches[0][2] = np.nan
    assert np.isnan(training.evaluate(lambda _, keys, x: x.sum(1), None, KEY, batches).mean)
    single = training.evaluate(lambda _, keys, x: x.sum(1), None, KEY, [np.ones((1, 2))])
    assert (single.mean, single.count) == (2.0, 1)
    assert np.isnan(single.standard_error)


def test_a_mean_of_large_numbers_keeps_its_digits():
    values = (1e6 + np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    found = training.evaluate(lambda _, keys, x: x, None, KEY, [values[start : start + 64] for start in range(0, 1000, 64)])
    exact = values.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, exact.std(ddof=1) / np.sqrt(1000), rtol=1e-6)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_a_loss_by_time(array):
    t = np.array([0.0, 0.05, 0.1, 0.15, 0.95, 1.0, 0.5])
    loss = np.array([1.0, 3.0, 2.0, 4.0, 5.0, 9.0, 7.0])
    by_time = lambda: training.loss_by_time(array(loss), array(t), np.linspace(0, 1, 11))
    mean, error, count = by_time()
    assert isinstance(mean, jax.Array) == (array is jnp.asarray)
    np.testing.assert_array_equal(count, [2, 2, 0, 0, 0, 1, 0, 0, 0, 2])
    np.testing.assert_allclose(mean, [2, 3, *[np.nan] * 3, 7, *[np.nan] * 3, 7], rtol=1e-6)
    np.testing.assert_allclose(error, [1, 1, *[np.nan] * 7, 2], rtol=1e-6)
    if array is jnp.asarray:
        compiled = jax.jit(lambda loss, t: training.loss_by_time(loss, t, np.linspace(0, 1, 11)))(array(loss), array(t))
        for one, other in zip(compiled, (mean, error, count), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_loss_by_time_of_an_evaluation():
    parts = list(training.per_example(metric, 0.5, KEY, pipeline.in_order(SOURCE, 32)))
    loss, t = (np.concatenate([part[name] for part in parts]) for name in ("loss", "t"))
    mean, _, count = training.loss_by_time(loss, t, np.linspace(0, 1, 6))
    np.testing.assert_allclose((mean * count).sum() / count.sum(), loss.mean(), rtol=1e-12)
    loss[np.argmax(t)] = np.nan
    assert np.isnan(training.loss_by_time(loss, t, np.linspace(0, 1, 6))[0]).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "arrays": (lambda: training.evaluate(metric, 0.5, KEY, (X, Y)), r"batches is a tuple, .* pipeline\.in_order\(source, size\)"),
        "one array": (lambda: training.evaluate(metric, 0.5, KEY, X), "batches is a ndarray, but it is an iterable of batches"),
        "a stream used up": (lambda: training.evaluate(metric, 0.5, KEY, iter([])), "There are no batches"),
        "a larger batch": (lambda: training.evaluate(metric, 0.5, KEY, [(X[:4], Y[:4]), (X, Y)]), "has 101 examples, but the first had 4"),
        "a mean": (lambda: training.evaluate(lambda p, k, b: b[0].mean(), 0.5, KEY, [(X, Y)]), r"gives shape \(\) for a batch of 101"),
        "a dict with one": (lambda: training.evaluate(lambda p, k, b: {"m": b[0]}, 0.5, KEY, [(X, Y)]), r"shape \(101, 3\) as 'm'"),
        "a list": (lambda: training.evaluate(lambda p, k, b: [1.0], 0.5, KEY, [(X, Y)]), "gives a list for a batch of 101"),
        "two sizes": (lambda: training.evaluate(metric, 0.5, KEY, [(X, Y[:4])]), "arrays of 101, 4 examples"),
        "no arrays": (lambda: training.evaluate(metric, 0.5, KEY, [None]), "arrays of no examples"),
        "a seed": (lambda: training.evaluate(metric, 0.5, 0, [(X, Y)]), "key has dtype int"),
        "no metric": (lambda: training.evaluate(None, 0.5, KEY, [(X, Y)]), "metric is None, but it is a function"),
        "a time in no bin": (lambda: training.loss_by_time(X[:, 0], X[:, 1], np.linspace(0, 1, 3)), "times has .* in no bin from 0 to 1"),
        "edges that fall": (lambda: training.loss_by_time(X[:, 0], X[:, 0], [1, 0]), "edges must increase"),
        "other shapes": (lambda: training.loss_by_time(X, X[:, 0], [0, 1]), r"losses have shape \(101, 3\) and times \(101,\)"),
        "batches of nothing": (lambda: pipeline.in_order(SOURCE, 0), "size is 0"),
        "an empty source": (lambda: pipeline.in_order([], 4), "The source has no examples"),
    }.values(),
    ids=lambda value: "" if callable(value) else value[:30],
)
def test_wrong_evaluations_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_watched_numbers_are_those_of_the_average():
    def loss(params, key, batch):
        return ((params - batch) ** 2).mean()

    step = training.make_step(loss, optax.sgd(0.1), ema_decay=0.5)
    run = training.Run(training.init(jnp.zeros(2), optax.sgd(0.1)), KEY)
    seen = []
    watched = training.watch(lambda params: {"size": jnp.abs(params).sum(), "edge": params[0]}, every=2)
    look = lambda run, metrics: seen.append(float(jnp.abs(run.state.ema).sum()))
    run = training.fit(step, run, lambda n: jnp.ones(2), steps=8, log_every=2, progress=False, callbacks=[watched, look])
    assert ["size" in metrics for metrics in run.history] == [True, False, True, False]
    np.testing.assert_allclose([metrics["size"] for metrics in run.history if "size" in metrics], seen[::2], rtol=1e-6)
    for function, error, said in (
        (lambda params: params, TypeError, "gives .*, but it gives a dict of numbers"),
        (lambda params: {"x": params}, TypeError, "dict of numbers"),
        (lambda params: {"loss": params[0]}, ValueError, r"gives \['loss'\], which the metrics have already"),
    ):
        again = training.Run(training.init(jnp.zeros(2), optax.sgd(0.1)), KEY)
        with pytest.raises(error, match=said):
            training.fit(step, again, lambda n: jnp.ones(2), steps=1, progress=False, callbacks=[training.watch(function)])
    with pytest.raises(TypeError, match="function is None"):
        training.watch(None)
