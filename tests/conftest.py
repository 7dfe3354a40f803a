"""Strict everywhere: warnings are errors (pyproject.toml), ranks never promote, and there are eight CPU devices.

Compiled programs are kept in .pytest_cache/ for pytest's other workers, for the processes that tests start and for the next run,
since most of the time is compilation. JAX writes there without a lock; who reads a half-written program compiles it (pyproject.toml).
Tests run on the CPU, or with FMJAX_TEST_PLATFORM=gpu where JAX finds a GPU (`make gpu`).
"""

import os
from pathlib import Path

# Before jax is imported: emulated devices starve each other on few cores otherwise (jax <= 0.11).
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

if os.environ.get("FMJAX_TEST_PLATFORM") != "gpu":
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Computes in float64 inside a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unoptimized():
    """Programs are compiled as they come: for tests that compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key():
    return jax.random.key(0)
