"""A state to a folder and back, bit for bit; a run that goes on; and what is said where that cannot be."""

import dataclasses
import gc
import os
import shutil
import signal
import time
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax import checkpoints, training
from fmjax.checkpoints import folders, store

# Orbax's readers that an error cuts off complain when they are collected, which may be in a later test of this file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]

ADAM, KEY = optax.adam(1e-3), jax.random.key(3)


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

    monkeypatch.setattr(store.ocp, "save_async", fail)
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


def test_a_checkpoint_of_orbax(tmp_path, state):
    """Of its own, as those were that had no checksums: it is not taken for none."""
    store.ocp.save(str(tmp_path / "7"), {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"7 is Orbax's own, without checksums: read it by orbax\.checkpoint"):
        checkpoints.restore(tmp_path / "7", {"a": jnp.ones(3)})
    with checkpoints.Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match=r"of Orbax's own, such as .*7: give another"):
        checkpointer.resume(begin())


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


@pytest.mark.parametrize("sliced", [False, True])
def test_devices_that_share_an_array_write_slices_of_a_large_one(tmp_path, caplog, sliced):
    rows = 8 * store.SMALLEST_SLICE // 4 // 1024 // (1 if sliced else 2)
    everywhere = NamedSharding(jax.make_mesh((8,), ("all",)), PartitionSpec())
    state = jax.device_put({"kernel": jnp.arange(rows * 1024.0).reshape(rows, 1024)}, everywhere)
    with jax.log_compiles():
        checkpoints.save(tmp_path / "run", state)
    assert ("Compiling jit(slice)" in caplog.text) == sliced
    assert_bits(checkpoints.restore(tmp_path / "run", state), state)


def a_run(state, step, loss=0.0, key=KEY):
    """A run at a step, logged there."""
    at = dataclasses.replace(state, step=jnp.int32(step))
    return training.Run(at, key, {"at": 10 * step}, ({"step": step, "loss": loss},), ())


def begin(key=KEY, **more):
    return training.Run(make(**more), key)


def assert_run(run, expected):
    assert_bits(run.state, expected.state)
    assert jnp.all(jax.random.key_data(run.key) == jax.random.key_data(expected.key))
    assert (run.position, run.history, run.unlogged) == (expected.position, expected.history, expected.unlogged)


def test_the_last_and_the_best_are_kept(tmp_path, state):
    runs = {step: a_run(state, step, loss) for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], 1)}
    with checkpoints.Checkpointer(tmp_path / "run", keep=2, best="loss") as checkpointer:
        for run in runs.values():
            checkpointer.save(run)
            # The second time it is there already.
            checkpointer.save(run, wait=True)
        assert checkpointer.steps() == [2, 4, 5]
    with checkpoints.Checkpointer(tmp_path / "run", keep=2, best="loss") as checkpointer:
        assert_run(checkpointer.resume(begin()), runs[5])
    assert_bits(checkpoints.restore(tmp_path / "run", make()), runs[5].state)
    assert_bits(checkpoints.restore(tmp_path / "run" / "2", make()), runs[2].state)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"2", "4", "5"}


def test_where_there_is_none_the_run_is_the_one_given(tmp_path):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        run = begin()
        assert checkpointer.resume(run) is run


def test_a_run_is_whole_between_two_logs(tmp_path, state):
    run = dataclasses.replace(a_run(state, 7), unlogged=({"loss": 0.1}, {"loss": 1 / 3}))
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run, wait=True)
        assert_run(checkpointer.resume(begin()), run)


def test_runs_that_are_none(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path, best="loss") as checkpointer:
        with pytest.raises(TypeError, match=r"The run is a TrainState.*give training\.Run\(state, key\)"):
            checkpointer.save(state)
        with pytest.raises(TypeError, match=r"get_state\(\) gives \(1, 2\), but a place in the data is what JSON can hold"):
            checkpointer.save(dataclasses.replace(a_run(state, 1), position=(1, 2)))
        with pytest.raises(ValueError, match="best is 'loss', but the metrics are 'step': name one of these"):
            checkpointer.save(dataclasses.replace(a_run(state, 1), history=({"step": 1},)))
        assert checkpointer.steps() == []


def test_another_key_is_another_run(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(a_run(state, 1), wait=True)
        for key in (jax.random.key(4), jax.random.key(3, impl="rbg")):
            with pytest.raises(ValueError, match=r"was begun with the key .* is given: give its seed or another folder"):
                checkpointer.resume(begin(key))


def test_a_run_without_a_place_in_the_data_says_so(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(dataclasses.replace(a_run(state, 1), position=None), wait=True)
        with pytest.warns(UserWarning, match=r"knows no place in the data.*Set them to what comes after step 1"):
            checkpointer.resume(begin())


def test_a_run_of_another_model_names_the_leaf(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(a_run(state, step), wait=True)
        with pytest.raises(ValueError, match=r"of another model.*dense\.kernel"):
            checkpointer.resume(begin(rows=16))
        # It is no damage: nothing is renamed.
        assert checkpointer.steps() == [1, 2]


def test_a_step_that_is_damaged_twice(tmp_path, state):
    for _ in range(2):
        with checkpoints.Checkpointer(tmp_path / "run") as checkpointer:
            for step in (1, 2):
                checkpointer.save(a_run(state, step), wait=True)
        for file in (tmp_path / "run" / "2").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with checkpoints.Checkpointer(tmp_path / "run") as checkpointer, pytest.warns(UserWarning, match=r"The one before it is used"):
            assert_run(checkpointer.resume(begin()), a_run(state, 1))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"1", "2.damaged", "2.damaged-2"}


@pytest.mark.parametrize("moment", ["replace", "rename"])
@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_is_killed_at_its_end(tmp_path, state, monkeypatch, moment, first):
    """Either side of the rename by which it becomes the checkpoint; nothing runs after a kill, so no cleaning either."""
    runs = tmp_path / "run" / "1", tmp_path / "run" / "2"
    saved = [checkpoints.save(folder, a_run(state, 1).state) for folder in runs[: 1 if first else 2]]
    assert saved

    class Killed(BaseException):
        pass

    def killed(*arguments, **keywords):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(store.Path, moment, killed)
        patched.setattr(store.Path, "unlink", lambda *arguments, **keywords: None)
        patched.setattr(store.shutil, "rmtree", lambda *arguments, **keywords: None)
        with pytest.raises(Killed):
            checkpoints.save(runs[1], a_run(state, 2).state)
    if first:
        assert folders.steps_in(tmp_path / "run") == [1]
    else:
        assert int(checkpoints.restore(runs[1], make()).step) == 1
    (runs[1] / "fmjax.lock").unlink()
    checkpoints.save(runs[1], a_run(state, 3).state)
    assert int(checkpoints.restore(runs[1], make()).step) == 3
    assert sorted(path.name.partition("-")[0] for path in runs[1].iterdir()) == ["checkpoint.json", "data"]


def test_what_is_not_ours_stays(tmp_path, state):
    """Files beside a checkpoint, in its folder, and in a run's folder; and a folder of something else is refused."""
    for name in ("run.old", "run.new", "run.part", "run.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    for step in (1, 2):
        checkpoints.save(tmp_path / "run", a_run(state, step).state)
        (tmp_path / "run" / "thesis.tex").write_text("mine")
        (tmp_path / "run" / "data-of-mine").mkdir(exist_ok=True)
    assert int(checkpoints.restore(tmp_path / "run", make()).step) == 2
    (tmp_path / "run" / "notes").mkdir(parents=True)
    (tmp_path / "run" / "7").mkdir()
    (tmp_path / "run" / "7" / "thesis.tex").write_text("mine")
    with checkpoints.Checkpointer(tmp_path / "run", keep=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(a_run(state, step), wait=True)
            (tmp_path / "run" / str(step) / "thesis.tex").write_text("mine")
        with pytest.raises(OSError, match=r"7 has thesis\.tex in it and is no checkpoint"):
            checkpointer.save(a_run(state, 7), wait=True)
    assert len(list(tmp_path.rglob("thesis.tex"))) == 4 + 1 + 1 + 3
    assert (tmp_path / "run" / "data-of-mine").is_dir()
    with pytest.raises(FileExistsError, match=r"has .* in it and is no checkpoint: give a folder of its own"):
        checkpoints.save(tmp_path, state)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file, but a checkpoint is a folder"):
        checkpoints.save(tmp_path / "file", state)


@pytest.mark.parametrize("blocked", ["file", "file/checkpoints"])
def test_a_run_where_a_file_is(tmp_path, blocked):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"Checkpoints cannot be written to .*{blocked}: (Not a directory|File exists)"):
        checkpoints.Checkpointer(tmp_path / blocked)


def test_two_at_once(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match=r"is written to by process \d+ on .*, which is this one: end that first"):
            checkpoints.Checkpointer(tmp_path / "run")
        # Who only reads needs no lock.
        with pytest.raises(FileNotFoundError, match=r"There is no checkpoint in .*run yet"):
            checkpoints.restore(tmp_path / "run", make())
    checkpoints.Checkpointer(tmp_path / "run").close()


def test_another_course_of_training_is_set_aside(tmp_path, state):
    """A run that was taken back to an earlier step, and one of another key in a folder that was not asked."""
    with checkpoints.Checkpointer(tmp_path, keep=10) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(a_run(state, step), wait=True)
        back = dataclasses.replace(a_run(state, 3), position={"at": 7})
        with pytest.warns(
            UserWarning, match=r"another course of training than the run that is saved at step 3; they are now 3\.other, 4\.other"
        ):
            checkpointer.save(back, wait=True)
        assert checkpointer.steps() == [1, 2, 3]
        assert_run(checkpointer.resume(begin()), back)
        checkpointer.save(back, wait=True)
    other = a_run(state, 9, key=jax.random.key(8))
    with checkpoints.Checkpointer(tmp_path, keep=10) as checkpointer:
        with pytest.warns(UserWarning, match=r"they are now 1\.other, 2\.other, 3\.other-2"):
            checkpointer.save(other, wait=True)
        assert checkpointer.steps() == [9]
    assert len(list(tmp_path.glob("*.other*"))) == 5
    with pytest.raises(RuntimeError, match="was closed: save within its context"):
        checkpointer.save(other)


def test_a_run_that_ended_between_two_logs_and_is_logged_now_is_the_same(tmp_path, state):
    """As `fit` to the step that it has reached does; nothing is set aside, and no warning given."""
    ended = dataclasses.replace(a_run(state, 3), history=(), unlogged=({"loss": 2.0},))
    logged = dataclasses.replace(ended, history=({"step": 3, "loss": 2.0},), unlogged=())
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(ended, wait=True)
        checkpointer.save(logged, wait=True)
        assert checkpointer.steps() == [3]
    assert not list(tmp_path.glob("*.other*"))


def test_what_is_read_while_it_is_removed(tmp_path, state, monkeypatch):
    """The last one may go between the look and the read."""
    with checkpoints.Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(a_run(state, 1), wait=True)
        read = store.read

        def late(folder, like):
            if folder.name == "1":
                checkpointer.save(a_run(state, 2), wait=True)
            return read(folder, like)

        monkeypatch.setattr(store, "read", late)
        assert int(checkpoints.restore(tmp_path, make()).step) == 2


def test_a_pytree_is_no_run(tmp_path, state):
    checkpoints.save(tmp_path / "5", state)
    with (
        checkpoints.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match=r"5 is no run's, but a pytree of checkpoints\.save"),
    ):
        checkpointer.resume(begin())


def test_one_failed_write_is_one(tmp_path, state, monkeypatch):
    """The next save says so and is made, the one of the same step too."""
    failures, sums = [], store.files.checksums

    def fail(*arguments):
        if failures:
            raise OSError(failures.pop())
        return sums(*arguments)

    monkeypatch.setattr(store.files, "checksums", fail)
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(a_run(state, 1), wait=True)
        failures.append("No space left on device")
        checkpointer.save(a_run(state, 2))
        message = r"at step 2: No space left on device\. The last whole one there is of step 1\. That of step {} is written now"
        with pytest.warns(UserWarning, match=message.format(3)):
            checkpointer.save(a_run(state, 3))
        assert checkpointer.steps() == [1, 3]
        failures.append("No space left on device")
        checkpointer.save(a_run(state, 4))
        with pytest.warns(UserWarning, match="That of step 4 is written now"):
            checkpointer.save(a_run(state, 4), wait=True)
        assert checkpointer.steps() == [1, 3, 4]
        failures.extend(["No space left on device"] * 2)
        checkpointer.save(a_run(state, 5))
        with pytest.warns(UserWarning, match="That of step 6"), pytest.raises(OSError, match=r"at step 6: No space.* of step 4"):
            checkpointer.save(a_run(state, 6))
        failures.append("No space left on device")
        checkpointer.save(a_run(state, 7))
        with pytest.raises(OSError, match="at step 7: No space"):
            checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]


def test_a_folder_that_is_deleted_is_made_again(tmp_path, state):
    with checkpoints.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(a_run(state, 1), wait=True)
        shutil.rmtree(tmp_path / "run")
        checkpointer.save(a_run(state, 2), wait=True)
        assert checkpointer.steps() == [2]
        shutil.rmtree(tmp_path / "run")
        # That of this step was there, and is gone.
        checkpointer.save(a_run(state, 2), wait=True)
        assert_run(checkpointer.resume(begin()), a_run(state, 2))
        with pytest.raises(BlockingIOError, match="which is this one"):
            checkpoints.Checkpointer(tmp_path / "run")


def test_signals_wait_for_the_last_save(tmp_path, state, monkeypatch, capfd):
    """SIGTERM and Ctrl-C, twice each, while it is written; they are delivered after it."""
    sums, got = store.files.checksums, []
    before = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}

    def slow(*arguments):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return sums(*arguments)

    try:
        monkeypatch.setattr(store.files, "checksums", slow)
        with checkpoints.Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(a_run(state, 1), wait=True)
            assert checkpointer.steps() == [1]
            assert sorted(got) == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "A checkpoint is being written: the process ends when it is there" in capfd.readouterr().err


class Mixed(NamedTuple):
    first: Any
    second: Any


STATES = {
    "half precision": {"bf16": jnp.array([1.5, -0.0, 3e38], jnp.bfloat16), "f16": jnp.float16(0.1), "f8": jnp.ones(2, jnp.float8_e4m3fn)},
    "small integers": {"int4": jnp.array([-8, 7], jnp.int4), "uint8": jnp.array([255], jnp.uint8), "bool": jnp.array([True, False])},
    "complex": [jnp.array([1 + 2j, jnp.nan])],
    "typed keys": Mixed(jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 3)),
    "numbers and strings": {"rate": 0.1, "count": 2**60, "on": True, "name": "adam", "inf": float("inf")},
    "NumPy's": {"wide": np.arange(3.0), "long": np.int64(2**40), "one": np.float32(0.1)},
    "nothing in them": {"empty": jnp.zeros((0, 4), jnp.bfloat16), "numpy": np.zeros((3, 0), np.int8), "none": None},
    "no arrays at all": {},
    "names with dots": {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1), "b.c/d e%": jnp.full(1, 2.0)}, "": jnp.full(1, 3.0)},
    "numbers as names": {1: jnp.ones(1), 2: [jnp.zeros(1), {"0": jnp.full(1, 2.0)}]},
    "one array": jnp.arange(3.0),
}


KINDS = [
    (kind, like)
    for kind in STATES
    for like in ("itself", "shapes")
    if (kind, like)
    not in {
        # They have no shapes that JAX would keep.
        ("numbers and strings", "shapes"),
        ("NumPy's", "shapes"),
    }
]


@pytest.mark.parametrize(("kind", "like"), KINDS)
def test_states_of_any_kind(tmp_path, kind, like):
    tree = STATES[kind]
    checkpoints.save(tmp_path / "run", tree)
    if like == "shapes":
        restored = checkpoints.restore(tmp_path / "run", jax.eval_shape(lambda: tree))
    else:
        restored = checkpoints.restore(tmp_path / "run", tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        if isinstance(other, jax.Array) and jnp.issubdtype(other.dtype, jax.dtypes.prng_key):
            assert one.dtype == other.dtype
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        if isinstance(other, np.ndarray | np.generic | jax.Array):
            assert (one.dtype, np.shape(one), np.asarray(one).tobytes()) == (other.dtype, np.shape(other), np.asarray(other).tobytes())
            assert like == "shapes" or isinstance(one, jax.Array) == isinstance(other, jax.Array)
        else:
            assert type(one) is type(other)
            assert one == other


def test_a_number_becomes_an_array_in_training(tmp_path):
    checkpoints.save(tmp_path / "run", {"rate": jnp.float32(0.1)})
    assert checkpoints.restore(tmp_path / "run", {"rate": 1.0})["rate"] == jnp.float32(0.1)
    with pytest.raises(ValueError, match=r"rate is float32\[\] there and int here"):
        checkpoints.restore(tmp_path / "run", {"rate": 1})


def test_leaves_that_cannot_be_saved(tmp_path):
    deleted = jnp.ones(3)
    deleted.delete()
    for leaf, message in {
        "a function, but a checkpoint holds arrays": lambda: 1,
        "dtype object, but": np.array([None]),
        "dtype <U1, but": np.array(["a"]),
        "dtype datetime64": np.zeros(1, "datetime64[s]"),
        "dtype float128": np.zeros(1, np.longdouble),
        "deleted: a training with donate=True took its memory": deleted,
    }.items():
        with pytest.raises(TypeError, match=f"rate (is|has|was) {leaf}"):
            checkpoints.save(tmp_path / "run", {"rate": message})
    with pytest.raises(TypeError, match=r"rate is a .*Tracer, but a checkpoint holds arrays"):
        jax.jit(lambda x: checkpoints.save(tmp_path / "run", {"rate": x}))(jnp.ones(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "optimizer",
    [optax.noisy_sgd(0.1, key=jax.random.key(1)), optax.contrib.prodigy(), optax.contrib.sam(ADAM, ADAM), optax.MultiSteps(ADAM, 2)],
    ids=["noisy_sgd", "prodigy", "sam", "MultiSteps"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_training_of_any_optimiser_goes_on(tmp_path, optimizer, dtype):
    """In two parts, donated, through a checkpoint: bit for bit what it is in one."""

    def loss_fn(params, key, batch):
        return ((params["w"].astype(jnp.float32) - batch) ** 2).sum()

    def start():
        return training.Run(training.init({"w": jnp.ones(3, dtype)}, optimizer), KEY)

    step, data = training.make_step(loss_fn, optimizer, ema_decay=0.5), lambda n: jnp.arange(3.0) + n
    whole = training.fit(step, start(), data, steps=4, log_every=3, progress=False)
    for _ in range(2):
        with checkpoints.Checkpointer(tmp_path) as checkpointer:
            run = checkpointer.resume(start())
            run = training.fit(
                step, run, data, steps=min(4, 2 + int(run.state.step)), log_every=3, progress=False, donate=True, save=checkpointer.save
            )
    assert_bits_of_any(run.state, whole.state)
    assert whole.state.ema["w"].dtype == jnp.float32
    assert whole.state.params["w"].dtype == dtype


def assert_bits_of_any(one, other):
    data = [
        jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, each) for each in (one, other)
    ]
    assert_bits(*data)


def test_too_little_memory_is_said_before_anything_is_read(folder, state, monkeypatch):
    asked = []

    def none(shapes):
        asked.append([(x.shape, x.sharding.num_devices) for x in shapes])
        raise MemoryError("no room")

    monkeypatch.setattr(store.parallel, "require_memory", none)
    monkeypatch.setattr(store.ocp, "load", lambda *arguments: pytest.fail("read all the same"))
    spread = NamedSharding(Mesh(np.array(jax.devices()[:2]), "x"), PartitionSpec())
    with pytest.raises(MemoryError, match="no room"):
        checkpoints.restore(folder, jax.device_put(state, spread))
    assert asked == [[(x.shape, 2) for x in jax.tree.leaves(state)]]
