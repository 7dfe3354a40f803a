"""Strict everywhere: warnings are errors (pyproject.toml), ranks never promote, and there are eight CPU devices.

Most of the time is compilation. Compiled programs are kept in .pytest_cache/ for pytest's other workers, for the processes that tests
start and for the next run; JAX writes there without a lock, and who reads a half-written program compiles it (pyproject.toml). And they
are compiled in a quarter of the time and run slower: without LLVM's optimisations and, where jaxlib has a choice, without MLIR's
emitters, in these processes too. Where a test runs for longer than it compiles it asks for `optimized`.

Tests run on the CPU, or with FMJAX_TEST_PLATFORM=gpu where JAX finds a GPU (`make gpu`), optimised as by default.
"""

import os
from pathlib import Path

import jaxlib

# Before jax is imported: emulated devices starve each other on few cores otherwise (jax <= 0.11).
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
ON_GPU = os.environ.get("FMJAX_TEST_PLATFORM") == "gpu"
if not ON_GPU:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if jaxlib.version.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import pytest

if not ON_GPU:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours, which share programs, stay together until a worker has none left and takes the half of another's."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def x64():
    """Computes in float64 inside a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """Programs are optimised as they are by default: for tests that run for longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def fast_key():
    """For many draws from one key, of a generator that compiles and draws in half the time."""
    return jax.random.key(0, impl="unsafe_rbg")
