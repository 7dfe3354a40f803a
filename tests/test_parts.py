"""Parts of a checkpoint: read alone, into another model, and with another optimiser; and what is said where that was not meant."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax import checkpoints, training
from fmjax.checkpoints import store

KEY, ADAM = jax.random.key(3), optax.adam(1e-2)


class Network(nn.Module):
    """A network of images of some channels and labels of some classes, with a row for none."""

    channels: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x, y):
        h = nn.Conv(4, (3, 3), name="first")(x) + nn.Embed(self.classes + 1, 4, name="label")(y)[:, None, None, :]
        return nn.Conv(self.channels, (3, 3), name="last")(nn.silu(h))


def init(network, optimizer=ADAM, **options):
    x = jnp.zeros((1, 4, 4, network.channels))
    return training.init(network.init(KEY, x, jnp.zeros(1, jnp.int32)), optimizer, **options)


def numbered(state):
    """A state in which every leaf is another number."""
    leaves, tree = jax.tree.flatten(state)
    return tree.unflatten([leaf + jnp.asarray(n, leaf.dtype) for n, leaf in enumerate(leaves)])


def equal(one, other):
    chex.assert_trees_all_equal(one, other)
    chex.assert_trees_all_equal_dtypes(one, other)


@pytest.fixture(scope="module")
def state():
    return numbered(init(Network()))


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """Where that state is saved. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    checkpoints.save(folder, state)
    return folder


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: init(Network(), optax.sgd(0.1)), r"is not of another model, .* but of another optimiser: opt_state\..*new_optimizer=True"),
        (lambda: init(Network(), emas=2), r"is not of another model, .* but of other averages: ema\..* as many emas"),
        (lambda: init(Network(), variables={"n": 0}), r"but of other variables: variables\.n is missing there"),
        (lambda: init(Network(), optax.sgd(0.1), emas=2), r"but of another optimiser and other averages"),
        (
            lambda: init(Network(classes=12)),
            r"is of another model: params\..* The parameters differ: .*restore_matching\(folder, params, part='ema'",
        ),
        (lambda: init(Network()).params, r"is of another model: .*restore_part\(folder, 'params', like\), or 'ema'"),
    ],
    ids=["optimiser", "averages", "variables", "both", "model", "parameters alone"],
)
def test_what_differs_is_said_and_what_to_do(folder, like, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(folder, like())


def test_a_part_alone(folder, state, monkeypatch):
    asked, load = [], store.ocp.load
    monkeypatch.setattr(store.ocp, "load", lambda path, leaves: asked.extend(leaves) or load(path, leaves))
    average = checkpoints.restore_part(folder, "ema")
    equal(average, state.ema)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(average))
    # Neither the optimiser's moments nor anything else is read.
    assert len(asked) == len(jax.tree.leaves(state.ema))
    assert all(name.startswith("ema.") for name in asked)
    equal(checkpoints.restore_part(folder, "params.params.label"), state.params["params"]["label"])
    equal(checkpoints.restore_part(folder, "step"), state.step)
    equal(checkpoints.restore_part(folder, "params", jax.eval_shape(lambda: state.params)), state.params)


def test_a_part_in_another_process(folder, state, tmp_path):
    """Which knows the folder and the network's function."""
    program = f"""
import sys, jax, numpy
from flax import linen as nn
from fmjax import checkpoints

class Network(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        h = nn.Conv(4, (3, 3), name="first")(x) + nn.Embed(11, 4, name="label")(y)[:, None, None, :]
        return nn.Conv(1, (3, 3), name="last")(nn.silu(h))

params = checkpoints.restore_part({str(folder)!r}, "ema")
numpy.save({str(tmp_path / "out.npy")!r}, Network().apply(params, numpy.ones((2, 4, 4, 1), "float32"), numpy.array([3, 10])))
print(sum(x.nbytes for x in jax.live_arrays()))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    expected = Network().apply(state.ema, jnp.ones((2, 4, 4, 1)), jnp.array([3, 10]))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5)
    assert int(ended.stdout) <= sum(leaf.nbytes for leaf in jax.tree.leaves(state.ema)) + 8


def test_a_part_of_any_kind(tmp_path):
    tree = {
        "half": jnp.array([1.5, -0.0], jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3),
        "key": jax.random.key(1),
        "plain": {"rate": 0.1, "name": "adam", "on": True},
        "wide": np.arange(3.0),
        "small": jnp.array([-8, 7], jnp.int4),
        "empty": jnp.zeros((0, 4)),
        "a.b": {"c/d e%": jnp.ones(1)},
    }
    checkpoints.save(tmp_path / "tree", {"part": tree, "other": [jnp.ones(2)]})
    read = checkpoints.restore_part(tmp_path / "tree", "part")
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(tree), strict=True):
        if hasattr(other, "dtype") and jnp.issubdtype(other.dtype, jax.dtypes.prng_key):
            assert one.dtype == other.dtype
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert type(one) is type(other) or isinstance(one, jax.Array)
        np.testing.assert_array_equal(one, other)
    assert list(checkpoints.restore_part(tmp_path / "tree", "other")) == ["0"]
    equal(checkpoints.restore_part(tmp_path / "tree", "other", [jnp.zeros(2)]), [jnp.ones(2)])


def test_parts_of_several_averages_of_nnx_and_on_devices(tmp_path):
    graph, params = nnx.split(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    state = numbered(training.init(params, ADAM, emas=2))
    checkpoints.save(tmp_path / "run", state)
    equal(checkpoints.restore_part(tmp_path / "run", "ema", state.ema), state.ema)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("devices"))), params)
    second = checkpoints.restore_part(tmp_path / "run", "ema.1", like)
    equal(jax.device_get(second), jax.device_get(state.ema[1]))
    assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(second))
    assert nnx.merge(graph, second)(jnp.ones((1, 8))).shape == (1, 8)


def test_the_last_whole_checkpoint_of_a_run(tmp_path):
    start = init(Network())
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            at = dataclasses.replace(start, step=jnp.int32(step))
            checkpointer.save(training.Run(at, KEY, step), wait=True)
    assert int(checkpoints.restore_part(tmp_path, "step")) == 2
    for file in (tmp_path / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 is damaged: .*The one before it is used"):
        assert int(checkpoints.restore_part(tmp_path, "step")) == 1
    # Who only reads changes nothing.
    assert (tmp_path / "2").is_dir()
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="is used"), pytest.raises(checkpoints.CorruptCheckpoint, match="1 is damaged"):
        checkpoints.restore_part(tmp_path, "step")


def test_parts_that_there_are_not(folder):
    with pytest.raises(ValueError, match=r"has no 'emma': its parts are step, params, opt_state, ema; did you mean 'ema'\?"):
        checkpoints.restore_part(folder, "emma")
    with pytest.raises(TypeError, match="part is None, but it is the name of a part, such as 'ema'"):
        checkpoints.restore_part(folder, None)
    with pytest.raises(ValueError, match=r"ema of the checkpoint at .* is of another structure: params\.first\.kernel is .*_matching"):
        checkpoints.restore_part(folder, "ema", init(Network(3)).params)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        checkpoints.restore_part(folder / "nowhere", "ema")


NEW = ("params.label", "params.first.kernel", "params.last")


def test_a_model_of_more_classes_and_channels_begins_from_one_that_was_trained(folder, state):
    """Ten labels and one channel become twelve and three; training goes on, and its loss falls."""
    like = init(Network(3, 12)).params
    with pytest.warns(UserWarning, match=r"params\.first\.kernel, params\.label, params\.last are new\.$"):
        params = checkpoints.restore_matching(folder, like, part="ema", new=NEW)
    equal(params["params"]["first"]["bias"], state.ema["params"]["first"]["bias"])
    for name in ("label", "last"):
        equal(params["params"][name], like["params"][name])

    def loss_fn(params, key, batch):
        x, y = batch
        return ((Network(3, 12).apply(params, x + jax.random.normal(key, x.shape), y) - x) ** 2).mean()

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 3)), jnp.float32)
    run = training.Run(training.init(params, ADAM), KEY)
    step = training.make_step(loss_fn, ADAM)
    run = training.fit(step, run, itertools.repeat((x, jnp.arange(8) + 4)), steps=30, log_every=10, progress=False)
    assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]


def test_what_is_not_named_is_an_error_that_shows_the_call(folder):
    like = init(Network(3, 12)).params
    with pytest.raises(ValueError, match="what differs is not named") as caught:
        checkpoints.restore_matching(folder, like, part="ema")
    for line in (
        "params.first.kernel is float32[3, 3, 1, 4] there and float32[3, 3, 3, 4] here",
        "params.label.embedding is float32[11, 4] there and float32[13, 4] here",
    ):
        assert line in str(caught.value)
    call = str(caught.value).rpartition("the call is ")[2].rstrip(".")
    with pytest.warns(UserWarning, match="are new"):
        eval(call, {"checkpoints": checkpoints, "folder": folder, "like": like})
    with pytest.raises(ValueError, match=r"new has 'params\.lable', which no leaf of like is under: did you mean 'params\.label'\?"):
        checkpoints.restore_matching(folder, like, part="ema", new=(*NEW, "params.lable"))
    with pytest.raises(TypeError, match=r"new is 'params\.label', but it is a tuple of names of leaves"):
        checkpoints.restore_matching(folder, like, part="ema", new="params.label")
    with pytest.raises(ValueError, match=r"params\.first\.kernel is new, so it keeps .* a shape alone: give an array"):
        checkpoints.restore_matching(folder, jax.eval_shape(lambda: like), part="ema", new=NEW)


def test_what_is_left_in_the_checkpoint_is_named(folder, state):
    like = {"params": {name: part for name, part in init(Network()).params["params"].items() if name != "label"}}
    with pytest.raises(ValueError, match=r"params\.label\.embedding is .* there and missing here\.\n.*unused=\('params\.label',\)\)"):
        checkpoints.restore_matching(folder, like, part="params")
    with pytest.raises(ValueError, match=r"unused has 'params\.first', which no leaf of what like has not is under"):
        checkpoints.restore_matching(folder, like, part="params", unused=("params.label", "params.first"))
    with pytest.warns(UserWarning, match=r"params\.label is left in the checkpoint"):
        params = checkpoints.restore_matching(folder, like, part="params", unused=("params.label",))
    equal(params["params"]["first"], state.params["params"]["first"])
    # Nothing is left and nothing is new: no warning.
    equal(checkpoints.restore_matching(folder, init(Network())), state)


def trained(optimizer, steps=3):
    """A run of a quadratic whose moments and counts are all other than at first."""

    def loss_fn(params, key, batch):
        return ((params["w"] - batch) ** 2).sum() + params["b"]["w"].sum()

    run = training.Run(training.init({"w": jnp.ones(3), "b": {"w": jnp.ones(2)}}, optimizer), KEY)
    return training.fit(training.make_step(loss_fn, optimizer), run, lambda n: jnp.arange(3.0), steps=steps, log_every=2, progress=False)


ADAMW, DECAY, CLIP = optax.adamw(1e-2), optax.linear_schedule(1e-2, 0, 100), optax.clip_by_global_norm(1.0)
CLIPPED, CONSTANT = optax.chain(CLIP, optax.adamw(DECAY)), optax.adamw(optax.constant_schedule(1.0))
MOMENTUM, HELD = optax.sgd(1e-2, momentum=0.9), optax.inject_hyperparams(optax.adam)


@pytest.mark.parametrize(
    ("before", "after", "carried", "message"),
    [
        (ADAMW, optax.chain(CLIP, ADAMW), {"opt_state.1.0": "opt_state.0"}, None),
        (CLIPPED, CONSTANT, {"opt_state.0": "opt_state.1.0", "opt_state.2": "opt_state.1.2"}, None),
        (ADAM, optax.adam(DECAY), {"opt_state.0": "opt_state.0", "opt_state.1.count": "opt_state.0.count"}, None),
        (ADAM, MOMENTUM, {}, r"opt_state\.0\.trace is new, and opt_state\.0\.count, opt_state\.0\.mu, opt_state\.0\.nu are left in the"),
        (ADAM, optax.amsgrad(1e-2), {f"opt_state.0.{name}": f"opt_state.0.{name}" for name in ("count", "mu", "nu")}, r"0\.nu_max is new"),
        (optax.lion(1e-2), ADAM, {}, r"opt_state\.0\.count, opt_state\.0\.mu, opt_state\.0\.nu are new"),
        (optax.sgd(DECAY), ADAM, {}, r"opt_state\.0\.count, opt_state\.0\.mu, opt_state\.0\.nu are new"),
        (ADAMW, optax.MultiSteps(ADAMW, 2), {"opt_state.inner_opt_state.0": "opt_state.0"}, r"opt_state\.mini_step, .* are new"),
        (ADAM, optax.sgd(1e-2), {}, r"opt_state\.0\.count, .* are left in the checkpoint"),
        (ADAM, optax.adafactor(1e-2), {}, r"\.count.* are new"),
        (
            HELD(1e-3),
            HELD(1e-4),
            {"opt_state.count": "opt_state.count", "opt_state.inner_state": "opt_state.inner_state"},
            r"hyperparams.* new",
        ),
    ],
    ids=[
        *("clipping added", "a schedule changed, without clipping", "a schedule", "sgd with momentum", "amsgrad"),
        *("moments without their squares", "a count without moments", "MultiSteps", "sgd"),
        *("Adafactor", "another rate in inject_hyperparams"),
    ],
)
def test_a_run_goes_on_with_another_optimiser(tmp_path, before, after, carried, message):
    run, start = trained(before), training.Run(dataclasses.replace(trained(after, 0).state), KEY)
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run, wait=True)
        if jax.tree.structure(run.state) != jax.tree.structure(start.state):
            with pytest.raises(ValueError, match=r"not of another model, .* another optimiser: .*resume\(run, new_optimizer=True\)"):
                checkpointer.resume(start)
        if message is None:
            resumed = checkpointer.resume(start, new_optimizer=True)
        else:
            with pytest.warns(UserWarning, match=f"Of the optimiser's state .*{message}.*; the rest of the run is as it was saved"):
                resumed = checkpointer.resume(start, new_optimizer=True)
    assert jax.tree.structure(resumed.state) == jax.tree.structure(start.state)
    assert (resumed.position, resumed.history, resumed.unlogged) == (run.position, run.history, run.unlogged)
    for part in ("step", "params", "ema"):
        equal(getattr(resumed.state, part), getattr(run.state, part))
    was, new, now = (store.leaves_of(each.state) for each in (run, start, resumed))
    for name in now:
        at = [was_at + name[len(now_at) :] for now_at, was_at in carried.items() if name == now_at or name.startswith(f"{now_at}.")]
        if name.startswith("opt_state."):
            np.testing.assert_array_equal(now[name], was[at[0]] if at and at[0] in was else new[name], err_msg=name)
    # Each leaf is an array of its own, and a step takes them all.
    assert len({id(leaf) for leaf in now.values()}) == len(now)


def test_another_optimiser_is_no_other_model(tmp_path):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(trained(ADAM), wait=True)
        other = training.Run(training.init({"w": jnp.ones(4), "b": {"w": jnp.ones(2)}}, optax.sgd(0.1)), KEY)
        with pytest.raises(ValueError, match=r"is of another model: params\.w is float32\[3\] there .* The parameters differ"):
            checkpointer.resume(other, new_optimizer=True)
