"""Two processes of one job on this machine, for what is divided among processes: `python test_x.py index port ...`."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def two(script, *arguments, timeout=120):
    """Runs a test's file as two processes, each with its index, the job's port and the arguments; gives what they printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, script, str(index), str(port), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=timeout)[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return printed
