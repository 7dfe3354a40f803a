"""Files that are whole or not there, and folders that one process at a time writes to, on one machine and on two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from fmjax import files


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "numbers"
    with files.replacing(file) as part:
        assert part.parent == tmp_path
        part.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"

    def fail():
        with files.replacing(file) as part:
            part.write_text("tw")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["numbers"]


def test_a_file_keeps_its_place_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    with files.replacing(tmp_path / "link") as part:
        part.write_text("one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "one"


def test_a_file_is_as_open_as_others(tmp_path):
    with files.replacing(tmp_path / "file") as part:
        part.write_text("one")
    (tmp_path / "other").write_text("one")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_checksums_of_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    (tmp_path / "ten").write_bytes(b"0123456789")
    (tmp_path / "none").write_bytes(b"")
    found = files.checksums(tmp_path, ["ten", "none", "missing"])
    assert [len(found["ten"]), len(found["none"]), found["missing"]] == [4, 2, None]
    (tmp_path / "ten").write_bytes(b"0123x56789")
    again = files.checksums(tmp_path, ["ten"])["ten"]
    assert [one == other for one, other in zip(found["ten"], again, strict=True)] == [True, True, False, True]


HOLD = "import sys, time; from fmjax import files; lock = files.Lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def test_two_processes(tmp_path):
    """The second learns who has the folder, and gets it once the first is gone, however it went."""
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=rf"run is written to by process {first.pid} on .*, since 20..-.* UTC: end that first"):
        files.Lock(tmp_path / "run")
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with files.Lock(tmp_path / "run") as lock:
        lock.check()
    assert list((tmp_path / "run").iterdir()) == []


def elsewhere(folder, **more):
    """A lock that a process on another machine has, whose locks this one does not see."""
    folder.mkdir(exist_ok=True)
    held = {"host": "node7", "machine": "another", "process": 7, "since": "2026-01-01 00:00:00 UTC", "token": "theirs", **more}
    (folder / files.LOCK).write_text(json.dumps(held))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.05)
    monkeypatch.setattr(files, "PATIENCE", 0.6)


def test_two_machines(tmp_path, quick):
    elsewhere(tmp_path)
    over = threading.Event()

    def live():
        while not over.wait(files.BEAT):
            os.utime(tmp_path / files.LOCK)

    other = threading.Thread(target=live)
    other.start()
    try:
        began = time.monotonic()
        with pytest.raises(BlockingIOError, match="is written to by process 7 on node7, since 2026-01-01"):
            files.Lock(tmp_path)
        assert time.monotonic() - began < 0.5
    finally:
        over.set()
        other.join()
    # It gives no sign of life any more.
    with files.Lock(tmp_path) as lock:
        lock.check()
        seen = (tmp_path / files.LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / files.LOCK).stat().st_mtime_ns == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / files.LOCK).stat().st_mtime_ns > seen


def test_two_machines_that_wait_for_a_dead_one(tmp_path, quick, monkeypatch):
    """Whoever writes last has it."""
    elsewhere(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: elsewhere(tmp_path, process=8, token="last") if seconds == 1.0 else None)
    with pytest.raises(BlockingIOError, match="by process 8 on node7"):
        files.Lock(tmp_path)


def test_a_lock_that_another_machine_took_over(tmp_path):
    with files.Lock(tmp_path) as lock:
        elsewhere(tmp_path)
        with pytest.raises(BlockingIOError, match="was taken over by process 7 on node7"):
            lock.check()
    # It is not ours to remove.
    assert (tmp_path / files.LOCK).exists()


def test_a_lock_whose_folder_was_deleted(tmp_path):
    with files.Lock(tmp_path / "run") as lock:
        shutil.rmtree(tmp_path / "run")
        lock.check()
        with pytest.raises(BlockingIOError, match="which is this one"):
            files.Lock(tmp_path / "run")


def test_where_the_system_cannot_lock(tmp_path, quick, monkeypatch):
    """A process on the same machine is known by its sign of life."""
    import fcntl

    def none(descriptor, operation):
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", none)
    with files.Lock(tmp_path), pytest.raises(BlockingIOError, match="which is this one"):
        files.Lock(tmp_path)
    files.Lock(tmp_path).release()


def test_a_lock_that_says_nothing(tmp_path):
    """A machine that died while it wrote: nobody holds it."""
    (tmp_path / files.LOCK).write_text('{"host": "no')
    files.Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


FORK = """
import os, sys, time
from fmjax import files
with files.Lock(sys.argv[1]) as lock:
    if os.fork() == 0:
        lock.release()
        # The child says so, so that it has begun.
        print("held", flush=True)
        time.sleep(20)
        os._exit(0)
    time.sleep(20)
"""


def test_a_child_does_not_have_the_lock_of_its_parent(tmp_path):
    """It neither lets it go nor keeps it when the parent dies."""
    first = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True, process_group=0
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"is written to by process {first.pid} on"):
            files.Lock(tmp_path)
        first.kill()
        first.wait()
        files.Lock(tmp_path).release()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.stdout.close()
