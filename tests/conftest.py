"""Strict everywhere: warnings are errors (pyproject.toml), ranks never promote, and there are eight CPU devices."""

import os

# Before jax is imported: emulated devices starve each other on few cores otherwise (jax <= 0.11).
os.environ.setdefault("PJRT_NPROC", "16")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Computes in float64 inside a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
