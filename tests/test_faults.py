"""Trainings that are killed, told to end, cut off from their disk or from each other: nothing is lost, and what went wrong is said.

Every training is a process of its own, `worker.py`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard_events import scalars

ROOT = Path(__file__).parent.parent
SECONDS = 120
"""That a process may take; a whole one takes a tenth of it."""


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process that trainings are forked from (`worker.py`)."""
    Worker.server, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdin=theirs, start_new_session=True):
        theirs.close()
        yield
        Worker.server.close()


class Worker:
    """A training in the background; its lines are read as they come."""

    server: socket.socket

    def __init__(self, folder, **config):
        (printed, theirs), (told, status) = os.pipe(), os.pipe()
        socket.send_fds(self.server, [json.dumps({"folder": str(folder), **config}).encode()], [theirs, status])
        for descriptor in (theirs, status):
            os.close(descriptor)
        self.printed, self.told = os.fdopen(printed, errors="replace"), os.fdopen(told)
        self.pid = int(self.told.readline())
        self.lines = []

    def until(self, wanted):
        """Reads until a line that begins so, or the end."""
        for line in self.printed:
            self.lines.append(line.rstrip())
            if line.startswith(wanted):
                return True
        return False

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, seconds=SECONDS):
        """The exit status and all that was printed."""
        late = threading.Timer(seconds, self.kill)
        late.daemon = True
        late.start()
        with self.printed, self.told:
            rest = self.printed.read()
            status = int(self.told.readline())
        assert late.is_alive(), f"not at its end after {seconds} seconds: {rest}"
        late.cancel()
        return status, "\n".join([*self.lines, rest])


def run(folder, **config):
    status, printed = Worker(folder, **config).end()
    assert status == 0, printed
    return printed


def final(folder):
    with np.load(folder / "final.npz") as leaves:
        return dict(leaves)


def assert_same(folder, undisturbed):
    """Final parameters, what was logged, and TensorBoard's scalars: nothing missing, nothing twice."""
    ours, theirs = final(folder), final(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].tobytes() == leaf.tobytes(), name
    assert (folder / "rows.jsonl").read_text() == (undisturbed / "rows.jsonl").read_text()
    assert scalars(folder / "tensorboard") == scalars(undisturbed / "tensorboard")


def assert_close(folder, other, tolerance=1e-6):
    ours, theirs = (np.concatenate([leaf.astype(np.float64).ravel() for leaf in final(f).values()]) for f in (folder, other))
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, which all of the trainings share."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, cache=cache)
    return folder


def newest(folder):
    steps = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit() and (path / "checkpoint.json").exists()]
    return max(steps, key=lambda path: int(path.name))


def truncate(folder):
    """Cuts the largest file in half."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_killed_twelve_times(tmp_path, cache, undisturbed):
    """Four times anywhere, and eight times while a checkpoint is written, of which the end takes a while."""
    rng, reached, halves = random.Random(0), [], 0
    for attempt in range(12):
        in_a_write = attempt % 3 > 0
        worker = Worker(tmp_path, cache=cache, pause=0.1, write=0.4 if in_a_write else 0.0)
        assert worker.until("from"), worker.lines
        start = int(worker.lines[-1].split()[1])
        reached.append(start)
        # The second write ends after the first is whole, so every such attempt gets further, on a busy machine too.
        wanted = ["writing"] * 2 if in_a_write else [f"row {min(start + 2 * rng.randint(1, 2), 24)}"]
        if all(worker.until(line) for line in wanted):
            time.sleep(rng.uniform(0.0, 0.1))
        worker.kill()
        status, printed = worker.end()
        assert status in (-signal.SIGKILL, 0), printed
        halves += bool(list((tmp_path / "checkpoints").glob("*/writing-*")))
    assert reached == sorted(reached)
    assert len(set(reached)) > 2
    assert halves > 4
    run(tmp_path, cache=cache)
    assert_same(tmp_path, undisturbed)
    # Nothing that was half written is left.
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"20", "22", "24"}


@pytest.fixture(scope="module")
def by_five(tmp_path_factory, cache):
    """What nothing disturbs, logged at steps 5, 10, 15, 20 and 24."""
    folder = tmp_path_factory.mktemp("by_five")
    run(folder, cache=cache, log_every=5)
    return folder


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM] * 3, [signal.SIGINT], [signal.SIGINT] * 3], ids=str)
def test_told_to_end_between_two_logs(tmp_path, cache, by_five, signals):
    """And told again while it saves, which it does to the end."""
    worker = Worker(tmp_path, cache=cache, log_every=5, save_every=10, wait=0.1, write=0.5)
    assert worker.until("row 5")
    time.sleep(0.25)
    for again, number in enumerate(signals):
        worker.kill(number)
        if not again:
            assert worker.until("writing")
        time.sleep(0.1)
    status, printed = worker.end()
    assert (
        (status == 75) if signals[0] == signal.SIGTERM else (status != 0 and f"Interrupted: at step {newest(tmp_path).name}" in printed)
    ), printed
    assert ("the process ends when it is there" in printed) == (len(signals) > 1)
    assert "done" not in printed
    assert int(newest(tmp_path).name) % 5
    assert f"from {newest(tmp_path).name}" in run(tmp_path, cache=cache, log_every=5)
    assert_same(tmp_path, by_five)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("adamw", "clipped adamw", None),
        ("adam", "adam with a schedule", None),
        ("adam", "sgd with momentum", "opt_state.0.trace is new, and opt_state.0.count, opt_state.0.mu, opt_state.0.nu are left"),
    ],
)
def test_another_optimiser_when_it_goes_on(tmp_path, cache, before, after, said):
    """It is asked for by one argument, which the error without it names; a killed training goes on with the same call."""
    run(tmp_path, cache=cache, optimizer=before, steps=6)
    if said is None:
        status, printed = Worker(tmp_path, cache=cache, optimizer=after).end()
        assert status != 0
        assert "but of another optimiser" in printed
        assert "resume(run, new_optimizer=True)" in printed
    else:
        worker = Worker(tmp_path, cache=cache, optimizer=after, new_optimizer=True, pause=0.1)
        assert worker.until("row 14"), worker.lines
        worker.kill()
        _, printed = worker.end()
        assert "from 6" in printed
        assert said in printed
    # What was new is there then.
    assert "Of the optimiser's state" not in run(tmp_path, cache=cache, optimizer=after, new_optimizer=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 25, 2))
    assert int(final(tmp_path)[".step"]) == 24


def test_a_folder_that_is_deleted_on_the_way(tmp_path, cache, undisturbed):
    folder = tmp_path / "run"
    worker = Worker(folder, cache=cache, pause=0.1)
    assert worker.until("row 6")
    # Its writes must not make files where others are being deleted.
    shutil.rmtree(folder.rename(tmp_path / "deleted"))
    status, printed = worker.end()
    assert status == 0, printed
    assert_same(folder, undisturbed)
    assert newest(folder).name == "24"


def test_two_on_one_folder(tmp_path, cache, undisturbed):
    """The second says who has it and stops; the first goes on."""
    first = Worker(tmp_path, cache=cache, pause=0.3)
    assert first.until("row 4")
    status, printed = Worker(tmp_path, cache=cache).end()
    assert status == 1
    assert f"BlockingIOError: {tmp_path}/checkpoints is written to by process {first.pid} on " in printed
    status, printed = first.end()
    assert status == 0, printed
    assert_same(tmp_path, undisturbed)


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, cache, undisturbed):
    run(tmp_path, cache=cache, steps=12)
    truncate(newest(tmp_path))
    printed = run(tmp_path, cache=cache)
    assert f"The checkpoint at {tmp_path}/checkpoints/12 is damaged" in printed
    assert "The one before it is used; this one is now" in printed
    assert "from 10" in printed
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir()
    assert_same(tmp_path, undisturbed)


def test_without_a_whole_checkpoint_it_does_not_begin_anew(tmp_path, cache):
    run(tmp_path, cache=cache, steps=2, keep=1)
    truncate(newest(tmp_path))
    status, printed = Worker(tmp_path, cache=cache).end()
    assert status == 1
    assert f"CorruptCheckpoint: The checkpoint at {tmp_path}/checkpoints/2 is damaged" in printed


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a disk of its own needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(tmp_path, disk, cache, undisturbed):
    """Checkpoints are about 120 kB: the last that fits stays whole, and training goes on from it where there is room."""
    status, printed = Worker(disk, cache=cache, keep=100).end()
    assert status == 1
    assert f"A checkpoint could not be written to {disk}/checkpoints" in printed
    whole = newest(disk)
    assert f"The last whole one there is of step {whole.name}" in printed
    roomy = tmp_path / "roomy"
    shutil.copytree(disk, roomy)
    assert f"from {whole.name}" in run(roomy, cache=cache)
    assert final(roomy).keys() == final(undisturbed).keys()
    for name, leaf in final(undisturbed).items():
        assert final(roomy)[name].tobytes() == leaf.tobytes(), name


def fill(file):
    """Writes until the disk is full."""
    with file.open("wb", buffering=0) as more, contextlib.suppress(OSError):
        while True:
            more.write(bytes(4096))


def test_a_full_disk_of_the_log(tmp_path, disk, cache):
    """The run is saved where there is room, and the log is whole when it goes on."""
    run(tmp_path / "undisturbed", cache=cache, log_every=1, save_every=10, steps=48)
    worker = Worker(tmp_path / "run", logs=str(disk), cache=cache, log_every=1, save_every=10, steps=48, pause=0.05)
    assert worker.until("row 4")
    fill(disk / "more")
    status, printed = worker.end()
    assert status == 1, printed
    assert "No space left on device" in printed or "could not be written to the end: is the disk full?" in printed
    stopped = newest(tmp_path / "run").name
    assert 4 < int(stopped) < 48
    (disk / "more").unlink()
    assert f"from {stopped}" in run(tmp_path / "run", logs=str(disk), cache=cache, log_every=1, save_every=10, steps=48)
    for name in ("rows.jsonl", "tensorboard"):
        shutil.move(disk / name, tmp_path / "run" / name)
    assert_same(tmp_path / "run", tmp_path / "undisturbed")


def test_a_folder_that_cannot_be_written_to(disk, cache):
    run(disk, cache=cache, steps=2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    status, printed = Worker(disk, cache=cache).end()
    assert status == 1
    assert "checkpoints" in printed
    assert "Read-only file system" in printed


# Several processes.


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(folder, **config):
    at = port()
    return [Worker(folder, devices=4, processes=2, index=index, port=at, **config) for index in range(2)]


@pytest.fixture(scope="module")
def eight(tmp_path_factory, cache):
    """What eight devices of one process make of it by `pmap`."""
    folder = tmp_path_factory.mktemp("eight")
    run(folder, devices=8, sharding="pmap", cache=cache)
    return folder


@pytest.mark.parametrize("sharding", ["replicated", "fully_sharded", "pmap"])
def test_two_processes_train_as_one(tmp_path, undisturbed, eight, sharding):
    for worker in start_two(tmp_path, sharding=sharding):
        status, printed = worker.end()
        assert status == 0, printed
    assert_close(tmp_path, eight if sharding == "pmap" else undisturbed)
    if sharding == "replicated":
        # Both learn of a file that one of them reads.
        truncate(newest(tmp_path))
        for worker in start_two(tmp_path, sharding=sharding, steps=26):
            status, printed = worker.end()
            assert status == 0, printed
            assert "from 22" in printed
            assert f"The checkpoint at {tmp_path}/checkpoints/24 is damaged" in printed


def test_a_checkpoint_goes_on_elsewhere(tmp_path, cache, undisturbed):
    """Eight devices that share the state, then two that each have it, then one."""
    run(tmp_path, devices=8, sharding="fully_sharded", steps=8, cache=cache)
    assert "from 8" in run(tmp_path, devices=2, sharding="replicated", steps=16, cache=cache)
    assert "from 16" in run(tmp_path, cache=cache)
    assert_close(tmp_path, undisturbed)


def test_both_end_where_one_is_told_to(tmp_path, undisturbed):
    workers = start_two(tmp_path, pause=0.3, steps=200)
    assert all(worker.until("row 4") for worker in workers)
    workers[1].kill(signal.SIGTERM)
    for worker in workers:
        status, printed = worker.end()
        assert status == 75, printed
    assert int(newest(tmp_path).name) < 200


def test_one_of_two_is_killed(tmp_path):
    """The other ends within half a minute of it."""
    first, second = start_two(tmp_path, pause=0.3, steps=2000, timeout=20)
    # The checkpoint of step 4 has begun, which it does when that of step 2 is whole.
    assert first.until("row 6")
    second.kill()
    began = time.monotonic()
    status, printed = first.end(seconds=60)
    assert status != 0, printed
    assert time.monotonic() - began < 30
    second.end()
    assert newest(tmp_path).name.isdigit()


def test_a_process_that_does_not_come(tmp_path):
    status, printed = Worker(tmp_path, processes=2, index=1, port=port(), connect=5).end(seconds=60)
    assert status != 0
    assert "did not connect" in printed or "DEADLINE_EXCEEDED" in printed


def test_processes_that_disagree_about_their_number(tmp_path):
    at = port()
    first, second = (Worker(tmp_path, processes=count, index=index, port=at, timeout=20) for index, count in enumerate((2, 3)))
    assert second.until("RuntimeError: This job has 2 processes, but 3 were said: end the others and start again."), second.lines
    assert not any(line.startswith("row") for line in second.lines)
    for worker in (first, second):
        worker.kill()
        worker.end()
