"""A state to a folder and back, bit for bit; and what is said where that cannot be."""

import dataclasses
import gc
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax import checkpoints, training

# Orbax's readers that an error cuts off complain when they are collected, which may be in a later test of this file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]

ADAM = optax.adam(1e-3)


@pytest.fixture(scope="module")
def collected():
    """Leaves no such reader to the next file."""
    yield
    for _ in range(3):
        time.sleep(0.1)
        gc.collect()


def params(rows=8, **more):
    return {"dense": {"kernel": jnp.arange(rows * 8.0).reshape(rows, 8) / 7, "bias": jnp.array([0.1, jnp.nan, -jnp.inf])}} | more


def make(rows=8, optimizer=ADAM, **more):
    return training.init(params(rows, **more), optimizer)


@pytest.fixture(scope="module")
def state():
    """A state in which every leaf is another number."""
    leaves, tree = jax.tree.flatten(make())
    return tree.unflatten([leaf + jnp.asarray(n, leaf.dtype) for n, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """Where that state is saved. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    checkpoints.save(folder, state)
    return folder


def assert_bits(restored, state):
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_round_trip(folder, state):
    restored = checkpoints.restore(folder, make())
    assert isinstance(restored, training.TrainState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert_bits(restored, state)


def test_restore_into_shapes_alone(folder, state):
    assert_bits(checkpoints.restore(folder, jax.eval_shape(make)), state)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = {"a": jnp.arange(3.0)}
    checkpoints.save(tmp_path / "run", old)

    def fail(*arguments, **keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.ocp, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path / "run", {"a": jnp.ones(3)})
    assert_bits(checkpoints.restore(tmp_path / "run", old), old)


def test_any_pytree_and_float_type(tmp_path):
    tree = {
        "half": jnp.array([1.5, -0.0, 3e38], jnp.bfloat16),
        "counts": (jnp.int32(-3), jnp.array([True, False])),
        "one": [jnp.float16(0.1)],
    }
    checkpoints.save(tmp_path / "tree", tree)
    assert_bits(checkpoints.restore(tmp_path / "tree", tree), tree)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def loss_fn(params, key, batch):
        return ((params["w"] - batch) ** 2).sum() + jax.random.uniform(key) * params["w"].sum()

    key, step = jax.random.key(0), jax.jit(training.make_step(loss_fn, ADAM))
    half, _ = step(training.init({"w": jnp.ones(3)}, ADAM), key, jnp.arange(3.0))
    checkpoints.save(tmp_path / "half", half)
    restored = checkpoints.restore(tmp_path / "half", half)
    assert_bits(step(restored, key, jnp.ones(3))[0], step(half, key, jnp.ones(3))[0])


def test_save_replaces_what_was_there(tmp_path):
    old, new = {"a": jnp.zeros(3), "b": jnp.zeros(2)}, {"a": jnp.ones(4)}
    checkpoints.save(tmp_path / "run", old)
    checkpoints.save(tmp_path / "run", new)
    assert_bits(checkpoints.restore(tmp_path / "run", new), new)


def test_save_makes_parents_and_takes_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"a": jnp.arange(3.0)}
    checkpoints.save("runs/first/last", tree)
    assert (tmp_path / "runs" / "first" / "last").is_dir()
    assert_bits(checkpoints.restore("runs/first/last", tree), tree)
    assert_bits(checkpoints.restore(tmp_path / "runs/first/last", tree), tree)


@pytest.mark.parametrize("saved_sharded", [False, True])
def test_onto_eight_devices_and_back(tmp_path, folder, state, saved_sharded):
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    assert mesh.size == 8

    def sharding(leaf):
        return NamedSharding(mesh, PartitionSpec("devices") if leaf.ndim == 2 else PartitionSpec())

    if saved_sharded:
        folder = tmp_path / "sharded"
        checkpoints.save(folder, jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), state))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state)
    restored = checkpoints.restore(folder, like)
    assert_bits(restored, state)
    assert all(leaf.sharding == sharding(leaf) for leaf in jax.tree.leaves(restored))
    assert {shard.data.shape for shard in restored.params["dense"]["kernel"].addressable_shards} == {(1, 8)}
    one = checkpoints.restore(folder, make())
    assert_bits(one, state)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(one))


@pytest.mark.parametrize(
    ("like", "leaf"),
    [
        (lambda: make(extra=jnp.zeros(2)), "extra"),
        (lambda: training.init({"dense": {"kernel": jnp.zeros((8, 8))}}, ADAM), "dense.bias"),
        (lambda: make(optimizer=optax.sgd(0.1)), "opt_state"),
        (lambda: make().params, "dense"),
    ],
    ids=["a leaf more", "a leaf less", "another optimiser", "parameters alone"],
)
def test_another_structure_names_the_leaf(folder, like, leaf):
    with pytest.raises(ValueError, match="of another model") as caught:
        checkpoints.restore(folder, like())
    assert leaf in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("rows", [4, 16])
def test_another_shape_names_the_leaf(folder, rows):
    with pytest.raises(ValueError, match=r"of another model.*dense\.kernel") as caught:
        checkpoints.restore(folder, make(rows))
    assert str(folder) in str(caught.value)
    assert f"[{rows}, 8]" in str(caught.value)
    assert "[8, 8]" in str(caught.value)


def test_another_type_names_the_leaf(folder, state):
    with pytest.raises(ValueError, match=r"of another model.*dense\.kernel.*float32.*bfloat16"):
        checkpoints.restore(folder, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim == 2 else leaf, state))


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint") as caught:
        checkpoints.restore(tmp_path / "nowhere", make())
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is none") as caught:
        checkpoints.restore(tmp_path, make())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("which", ["largest", "all"])
def test_truncated_files(tmp_path, which, half):
    tree = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.ones(3)}
    checkpoints.save(tmp_path / "run", tree)
    files = sorted((path for path in (tmp_path / "run").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for path in files if which == "all" else files[-1:]:
        content = path.read_bytes()
        path.write_bytes(content[: half * len(content) // 2])
    with pytest.raises(ValueError, match="damaged" if which == "largest" else "damaged|of another model") as caught:
        checkpoints.restore(tmp_path / "run", tree)
    assert str(tmp_path / "run") in str(caught.value)


class Stream:
    """Batches whose place is a number."""

    def __init__(self):
        self.at = 0

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def test_a_series_keeps_the_last_and_the_best(tmp_path, state):
    key, stream = jax.random.key(3), Stream()
    with checkpoints.Series(tmp_path / "series", keep=2, best="loss") as series:
        assert series.resume(state, key, stream) == (state, key)
        for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], 1):
            stream.at = 10 * step
            series.save(at_step(state, step), jax.random.fold_in(key, step), stream, {"step": step, "loss": loss})
            # The second time it is there already.
            series.save(at_step(state, step), key, stream, wait=True)
        assert series.steps() == [2, 4, 5]
    with checkpoints.Series(tmp_path / "series", keep=2, best="loss") as series:
        other = Stream()
        restored, restored_key = series.resume(make(), jax.random.key(0), other)
    assert_bits(restored, at_step(state, 5))
    assert other.at == 50
    assert jnp.all(jax.random.key_data(restored_key) == jax.random.key_data(jax.random.fold_in(key, 5)))


@pytest.mark.parametrize("sliced", [False, True])
def test_devices_that_share_an_array_write_slices_of_a_large_one(tmp_path, caplog, sliced):
    rows = 8 * checkpoints.SMALLEST_SLICE // 4 // 1024 // (1 if sliced else 2)
    everywhere = NamedSharding(jax.make_mesh((8,), ("all",)), PartitionSpec())
    state = jax.device_put({"kernel": jnp.arange(rows * 1024.0).reshape(rows, 1024)}, everywhere)
    with jax.log_compiles():
        checkpoints.save(tmp_path / "run", state)
    assert ("Compiling jit(slice)" in caplog.text) == sliced
    assert_bits(checkpoints.restore(tmp_path / "run", state), state)


def test_a_series_of_another_model_names_the_leaf(tmp_path, state):
    with checkpoints.Series(tmp_path) as series:
        series.save(at_step(state, 1), jax.random.key(0))
        series.save(at_step(state, 2), jax.random.key(0), wait=True)
        with pytest.raises(ValueError, match=r"of another model.*dense\.kernel"):
            series.resume(make(16), jax.random.key(0))
        # It is no damage: nothing is renamed.
        assert series.steps() == [1, 2]


def test_a_step_that_is_damaged_twice(tmp_path, state):
    for _ in range(2):
        with checkpoints.Series(tmp_path / "series") as series:
            for step in (1, 2):
                series.save(at_step(state, step), jax.random.key(0), wait=True)
        for file in (tmp_path / "series" / "2").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with checkpoints.Series(tmp_path / "series") as series, pytest.warns(UserWarning, match=r"The one before it is used"):
            restored, _ = series.resume(make(), jax.random.key(0))
        assert int(restored.step) == 1


def test_a_save_that_is_killed_between_its_renames(tmp_path, state, monkeypatch):
    def killed(path, target):
        if path.name == "run.new":
            raise KeyboardInterrupt
        path.replace(target)

    for recover in (lambda: None, lambda: checkpoints.save(tmp_path / "run", at_step(state, 3))):
        checkpoints.save(tmp_path / "run", at_step(state, 1))
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints.Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(tmp_path / "run", at_step(state, 2))
        assert not (tmp_path / "run").exists()
        recover()
        assert int(checkpoints.restore(tmp_path / "run", make()).step) in (1, 3)
    assert int(checkpoints.restore(tmp_path / "run", make()).step) == 3


def test_a_series_where_a_file_is(tmp_path, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Checkpoints cannot be written to .*file/checkpoints: Not a directory"):
        checkpoints.Series(tmp_path / "file" / "checkpoints")


def test_too_little_memory_is_said_before_anything_is_read(folder, state, monkeypatch):
    asked = []

    def none(tree):
        asked.append(jax.tree.map(lambda x: (x.shape, x.sharding.num_devices), tree))
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoints.parallel, "require_memory", none)
    monkeypatch.setattr(checkpoints.ocp, "load", lambda *arguments: pytest.fail("read all the same"))
    spread = NamedSharding(Mesh(np.array(jax.devices()[:2]), "x"), PartitionSpec())
    with pytest.raises(MemoryError, match="no room"):
        checkpoints.restore(folder, jax.device_put(state, spread))
    assert asked == [jax.tree.map(lambda x: (x.shape, 2), state)]
