"""What a loss function gives a step beside its gradient: extra arguments for the optimiser, numbers for the log, variables to keep."""

import dataclasses
import json
import math
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from fmjax import checkpoints, parallel, training

KEY = jax.random.key(7)


def fit(step, run, data, **options):
    return training.fit(step, run, data, **{"progress": False} | options)


def rosenbrock(params, key, batch):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def quadratic(params, key, batch):
    return ((params["w"] - batch) ** 2).mean()


PLATEAU = optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=3))
BACKTRACKING = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(40, store_grad=True))


@pytest.mark.parametrize(
    ("optimizer", "loss_fn", "start", "steps", "minimum"),
    [
        (optax.lbfgs(), rosenbrock, {"x": -1.0, "y": 1.5}, 60, {"x": 1.0, "y": 1.0}),
        (optax.polyak_sgd(), quadratic, {"w": jnp.zeros(3)}, 60, {"w": jnp.arange(3.0)}),
        (
            optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=3)),
            quadratic,
            {"w": jnp.zeros(3)},
            60,
            {"w": jnp.arange(3.0)},
        ),
        (
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(40, store_grad=True)),
            rosenbrock,
            {"x": 0.5, "y": 0.5},
            1,
            None,
        ),
        (optax.MultiSteps(optax.polyak_sgd(), 2), quadratic, {"w": jnp.zeros(3)}, 120, {"w": jnp.arange(3.0)}),
    ],
    ids=["lbfgs", "polyak_sgd", "reduce_on_plateau", "backtracking", "MultiSteps"],
)
def test_optimisers_with_extra_arguments_reach_the_minimum(optimizer, loss_fn, start, steps, minimum):
    run = training.Run(training.init(start, optimizer), KEY)
    ended = fit(training.make_step(loss_fn, optimizer), run, lambda n: jnp.arange(3.0), steps=steps, log_every=steps // 2 or 1)
    if minimum is None:
        assert float(loss_fn(ended.state.params, KEY, None)) < float(loss_fn(run.state.params, KEY, None))
    else:
        chex.assert_trees_all_close(ended.state.params, jax.tree.map(jnp.asarray, minimum), atol=1e-3)


def test_a_plateau_lowers_the_scale():
    optimizer = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    state, step = training.init({"w": jnp.zeros(3)}, optimizer), jax.jit(training.make_step(quadratic, optimizer))
    for _ in range(7):
        state, _ = step(state, KEY, jnp.arange(3.0))
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.125


def noisy(params, key, batch):
    """Of the mean of the batch, and the key."""
    return ((batch @ params["w"] - 1.0) ** 2).mean() + (params["w"] * jax.random.normal(key, (3,))).sum() / 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_line_search_sees_the_loss_of_all_parts_and_devices(dtype):
    """Its value and gradient are those of the step: in parts, and under pmap, where each device draws for its own part."""
    seen = []

    def spy(updates, state, params=None, *, value, grad, value_fn, **extra):
        again, of = jax.value_and_grad(value_fn)(params)
        forward = jax.jvp(value_fn, (params,), (jax.tree.map(jnp.ones_like, params),))[0]
        number = lambda tree: jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]).sum()
        # As updates, so that what every device has comes out.
        return {"w": jnp.stack([value - again, value - forward, number(jax.tree.map(jnp.subtract, grad, of))])}, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    state = training.init({"w": jnp.ones(3, dtype)}, optimizer)
    many = parallel.pmap(training.make_step(noisy, optimizer, axis_name=parallel.AXIS, accumulate=2), parallel.mesh(4))
    steps = [training.make_step(noisy, optimizer), training.make_step(noisy, optimizer, accumulate=4), many]
    for step in steps if dtype == jnp.float32 else steps[1:2]:
        _, metrics = step(state, KEY, x)
        seen.append(float(metrics["update_norm"]))
    assert max(seen) < (1e-6 if dtype == jnp.float32 else 0.05), seen


def test_lbfgs_on_devices_is_lbfgs_on_one():
    def loss_fn(params, key, batch):
        return ((batch @ params["w"] - 1.0) ** 2).mean()

    x, optimizer = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32), optax.lbfgs()
    one = jax.jit(training.make_step(loss_fn, optimizer))
    many = parallel.pmap(training.make_step(loss_fn, optimizer, axis_name=parallel.AXIS), parallel.mesh(2))
    state = other = training.init({"w": jnp.zeros(3)}, optimizer)
    for _ in range(4):
        (state, metrics), (other, others) = one(state, KEY, x), many(other, KEY, x)
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-4)
    chex.assert_trees_all_close(others["loss"], metrics["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(1e-3), optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)))],
    ids=["adamw", "sam in a chain, which takes other arguments"],
)
def test_optimisers_without_extra_arguments_have_the_program_they_had(optimizer):
    """That of the same optimiser as a transformation that takes none."""
    plain = optax.GradientTransformation(optimizer.init, lambda grads, state, params=None: optimizer.update(grads, state, params))
    state = training.init({"w": jnp.ones(3)}, optimizer)
    programs = [jax.jit(training.make_step(quadratic, each)).lower(state, KEY, jnp.arange(3.0)).as_text() for each in (optimizer, plain)]
    assert programs[0] == programs[1]


def measured(params, key, batch):
    """A loss with numbers beside it."""
    loss = noisy(params, key, batch)
    return loss, {"error": jnp.abs(batch @ params["w"]).mean(), "draw": jax.random.uniform(key), "rows": len(batch)}


def batches(n):
    return jnp.asarray(np.random.default_rng(n).normal(size=(16, 3)), jnp.float32)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_numbers_beside_the_loss_are_averaged_as_it_is(accumulate):
    state = training.init({"w": jnp.ones(3)}, optax.sgd(0.1))
    new, metrics = training.make_step(measured, optax.sgd(0.1), accumulate=accumulate)(state, KEY, batches(0))
    alone, without = training.make_step(noisy, optax.sgd(0.1), accumulate=accumulate)(state, KEY, batches(0))
    chex.assert_trees_all_equal(new, alone)
    assert metrics.keys() - without.keys() == {"error", "draw", "rows"}
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), jnp.float32)
    keys = [KEY] if accumulate == 1 else [jax.random.fold_in(KEY, i) for i in range(accumulate)]
    np.testing.assert_allclose(metrics["draw"], np.mean([jax.random.uniform(key) for key in keys]), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], np.abs(batches(0).sum(-1)).mean(), rtol=1e-5)
    assert metrics["rows"] == 16 // accumulate
    # Part i of the batch of one device and device i take other examples; the mean over all is the same.
    many = parallel.pmap(training.make_step(measured, optax.sgd(0.1), accumulate=accumulate, axis_name=parallel.AXIS), parallel.mesh(2))
    np.testing.assert_allclose(many(state, KEY, batches(0))[1]["error"], metrics["error"], rtol=1e-5)


def test_numbers_beside_the_loss_are_logged(tmp_path):
    from tensorboard_events import scalars

    run = training.Run(training.init({"w": jnp.ones(3)}, optax.sgd(0.1)), KEY)
    callbacks = [training.json_lines(tmp_path / "lines"), training.tensorboard(tmp_path / "events")]
    ended = fit(training.make_step(measured, optax.sgd(0.1)), run, batches, steps=4, log_every=2, callbacks=callbacks)
    draws = [float(jax.random.uniform(jax.random.fold_in(KEY, n))) for n in range(4)]
    np.testing.assert_allclose([metrics["draw"] for metrics in ended.history], [np.mean(draws[:2]), np.mean(draws[2:])], rtol=1e-6)
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == list(ended.history)
    np.testing.assert_allclose([value for _, value in scalars(tmp_path / "events")["draw"]], [m["draw"] for m in ended.history], rtol=1e-6)


def test_a_number_that_is_nan_is_logged_and_said_and_training_goes_on():
    def loss_fn(params, key, batch):
        return quadratic(params, key, batch), {"odd": jnp.where(batch[0] == 3, jnp.nan, 1.0)}

    step, start = training.make_step(loss_fn, optax.sgd(0.1)), training.Run(training.init({"w": jnp.ones(3)}, optax.sgd(0.1)), KEY)
    with pytest.warns(UserWarning, match="The number 'odd' beside the loss is nan at a step: it is logged as it is") as said:
        run = fit(step, start, lambda n: jnp.full(3, n % 4, jnp.float32), steps=9, log_every=3)
    assert len([each for each in said if "'odd'" in str(each.message)]) == 1
    assert [math.isnan(metrics["odd"]) for metrics in run.history] == [False, True, True]
    assert int(run.state.step) == 9
    # A loss that is nan still ends it, and so does any number of a step that does not say whether its state is finite.
    with pytest.raises(training.NonFiniteLoss, match="at step 2"):
        fit(step, start, lambda n: jnp.full(3, jnp.nan if n == 2 else n, jnp.float32), steps=9)

    def own(state, key, batch):
        new, metrics = step(state, key, batch)
        return new, {"loss": metrics["loss"], "odd": metrics["odd"]}

    with pytest.raises(training.NonFiniteLoss, match="odd nan at step 3"):
        fit(own, start, lambda n: jnp.full(3, n, jnp.float32), steps=9)


class Network(nn.Module):
    """Normalises by the batch in training, and by its statistics afterwards."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))


class Module(nnx.Module):
    """The same in NNX, whose dropout counts its draws."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(4, momentum=0.9, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


def linen():
    """(params, variables, loss_fn)"""
    network = Network()
    variables = network.init({"params": KEY}, jnp.ones((2, 3)), train=False)
    params = variables.pop("params")

    def loss_fn(params, variables, key, batch):
        y, variables = network.apply({"params": params, **variables}, batch, mutable=["batch_stats"], rngs={"dropout": key})
        return ((y[:, 0] - batch.sum(-1)) ** 2).mean(), {"y": y.mean()}, variables

    return params, variables, loss_fn


def of_nnx():
    graph, params, variables = nnx.split(Module(nnx.Rngs(0, dropout=1)), nnx.Param, ...)

    def loss_fn(params, variables, key, batch):
        model = nnx.merge(graph, params, variables)
        loss = ((model(batch)[:, 0] - batch.sum(-1)) ** 2).mean()
        return loss, nnx.split(model, nnx.Param, ...)[2]

    return params, variables, loss_fn


ADAM = optax.adam(1e-2)


def plain(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


@pytest.mark.parametrize("network", [linen, of_nnx])
def test_a_network_with_statistics_and_dropout_goes_on_bit_for_bit(network, tmp_path):
    """Told to end between two logs, twice; its averages are of parameters alone, and its loss falls."""
    variables, step = network()[1], training.make_step(network()[2], ADAM, ema_decay=0.9)

    def start():
        params, variables, _ = network()
        return training.Run(training.init(params, ADAM, variables=variables), KEY)

    undisturbed = fit(step, start(), batches, steps=40, log_every=5)
    for at in (7, 18, None):
        with checkpoints.Checkpointer(tmp_path) as checkpointer:
            run = checkpointer.resume(start())

            def data(n, at=at):
                if n == at:
                    signal.raise_signal(signal.SIGTERM)
                return batches(n)

            try:
                run = fit(step, run, data, steps=40, log_every=5, save=checkpointer.save, donate=True)
            except training.Preempted as ended:
                run = ended.run
            assert int(run.state.step) == (40 if at is None else at + 1)
    chex.assert_trees_all_equal(plain(run.state), plain(undisturbed.state))
    assert run.history == undisturbed.history
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    assert jax.tree.structure(run.state.ema) == jax.tree.structure(run.state.params)
    # The statistics are those of what was seen.
    start_leaves, end_leaves = (jax.tree.leaves(plain(each)) for each in (variables, run.state.variables))
    assert any(not np.array_equal(one, other) for one, other in zip(start_leaves, end_leaves, strict=True))


def test_statistics_go_from_part_to_part_and_are_averaged_over_devices():
    params, variables, _ = linen()
    network = Network()

    def loss_fn(params, variables, key, batch):
        given = {"params": params, **variables}
        y, variables = network.apply(given, batch, mutable=["batch_stats"], rngs={"dropout": KEY})
        return (y**2).mean(), variables

    x, state = batches(0), training.init(params, ADAM, variables=variables)
    means = lambda state: np.asarray(state.variables["batch_stats"]["BatchNorm_0"]["mean"])
    h = np.asarray(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    whole, _ = training.make_step(loss_fn, ADAM)(state, KEY, x)
    np.testing.assert_allclose(means(whole), 0.1 * h.mean(0), rtol=1e-4, atol=1e-6)
    parts, _ = training.make_step(loss_fn, ADAM, accumulate=2)(state, KEY, x)
    np.testing.assert_allclose(means(parts), 0.09 * h[::2].mean(0) + 0.1 * h[1::2].mean(0), rtol=1e-4, atol=1e-6)
    many, _ = parallel.pmap(training.make_step(loss_fn, ADAM, axis_name=parallel.AXIS), parallel.mesh(2))(state, KEY, x)
    np.testing.assert_allclose(means(many), 0.1 * h.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["loss", "variables"])
def test_variables_stay_as_they_were_where_something_is_not_finite(what):
    def loss_fn(params, variables, key, batch):
        bad = jnp.where(batch == 3, jnp.nan, 0.0)
        loss = ((params["w"] - batch) ** 2).sum() + (bad if what == "loss" else 0)
        return loss, {"seen": variables["seen"] + 1, "mean": variables["mean"] * 0.9 + batch + (bad if what == "variables" else 0)}

    state = training.init({"w": jnp.ones(3)}, ADAM, variables={"seen": 0, "mean": 0.0})
    with pytest.raises(training.NonFiniteLoss, match=f"{'loss' if what == 'loss' else 'update_norm'} nan.* at step 3") as caught:
        fit(training.make_step(loss_fn, ADAM), training.Run(state, KEY), lambda n: jnp.float32(n), steps=9)
    assert int(caught.value.run.state.variables["seen"]) == 3
    np.testing.assert_allclose(caught.value.run.state.variables["mean"], 0.9 + 2.0)


def test_a_state_without_variables_is_what_it_was():
    state = training.init({"w": jnp.ones(3)}, ADAM)
    old = training.TrainState(state.step, state.params, state.opt_state, state.ema)
    assert jax.tree.structure(state) == jax.tree.structure(old)
    assert {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(state)} == {"step", "params", "opt_state", "ema"}


def test_training_without_data(tmp_path):
    def loss_fn(params, key, batch):
        assert batch is None
        return ((params["w"] - jax.random.normal(key, (3,))) ** 2).sum()

    step = training.make_step(loss_fn, ADAM, accumulate=2)

    def start():
        return training.Run(training.init({"w": jnp.ones(3)}, ADAM), KEY)

    whole = fit(step, start(), None, steps=6, log_every=4)
    assert whole.position == 6
    for steps in (4, 6):
        # No warning of a place in the data that is not known.
        with checkpoints.Checkpointer(tmp_path) as checkpointer:
            run = fit(step, checkpointer.resume(start()), None, steps=steps, log_every=4, save=checkpointer.save)
    chex.assert_trees_all_equal(run.state, whole.state)
    assert (run.position, run.history) == (6, whole.history)
    with pytest.raises(TypeError, match="but the batches are a function of the step"):
        fit(step, dataclasses.replace(whole, position={"at": 3}), None, steps=8)
