"""The moments of features that come in batches are those of all at once, on one device, on several and in several processes.

`python test_collect.py INDEX PORT FOLDER` is one of two processes, which writes to INDEX.npz what it collected.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from fmjax import metrics, parallel

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3), np.uint8)
MATRIX = np.random.default_rng(1).standard_normal((48, 5)).astype(np.float32)


def extract(images):
    flat = images.reshape(len(images), -1) / 256
    return {"features": flat @ MATRIX, "logits": flat[:, :7]}


def batches(images, size=8):
    return (images[start : start + size] for start in range(0, len(images), size))


def assert_of_all(means, kept, images=IMAGES):
    whole = extract(images)
    expected = metrics.moments(whole["features"])
    assert means.keys() == {"features"}
    assert means["features"].count == len(images)
    np.testing.assert_allclose(means["features"].mean, expected.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(means["features"].covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    assert kept.keys() == {"logits"}
    assert kept["logits"].dtype == np.float32
    np.testing.assert_array_equal(kept["logits"], np.asarray(whole["logits"], np.float32))


@pytest.mark.parametrize("devices", [None, 2, 8])
def test_batches_are_as_all_at_once(devices):
    """The last one is shorter; and the devices divide neither it nor, where there are two, batches of five."""
    mesh, done = devices and parallel.mesh(devices), []
    for size in (8, 5, 30):
        assert_of_all(*metrics.collect(extract, batches(IMAGES, size), moments=["features"], keep=["logits"], mesh=mesh, show=done.append))
    assert done == [8, 16, 21, 5, 10, 15, 20, 21, 21]


def test_one_program_is_compiled_for_all_batches():
    traces = []

    def counted(images):
        traces.append(images.shape)
        return extract(images)

    metrics.collect(counted, batches(IMAGES), moments=["features"], mesh=parallel.mesh(4))
    assert traces == [(8, 4, 4, 3)]


def test_weights_of_a_partial_are_no_constants():
    seen = []

    def network(matrix, images):
        seen.append(isinstance(matrix, jax.core.Tracer))
        return {"features": images.reshape(len(images), -1) / 256 @ matrix}

    means, kept = metrics.collect(Partial(network, jnp.asarray(MATRIX)), batches(IMAGES), moments=["features"], mesh=parallel.mesh(2))
    assert seen == [True]
    assert not kept
    np.testing.assert_allclose(means["features"].mean, metrics.moments(extract(IMAGES)["features"]).mean, rtol=1e-5, atol=1e-6)


def test_nothing_is_summed_in_half_precision():
    halves = lambda images: {"features": extract(images)["features"].astype(jnp.bfloat16)}
    found = metrics.collect(halves, batches(IMAGES), moments=["features"])[0]["features"]
    expected = metrics.moments(np.asarray(halves(IMAGES)["features"], np.float64))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


def not_finite(images):
    found = extract(images)
    return found | {"logits": jnp.where(images.sum((1, 2, 3))[:, None] == IMAGES[9].sum(), jnp.nan, found["logits"])}


@pytest.mark.parametrize(
    ("given", "images", "names", "error", "message"),
    [
        (not_finite, batches(IMAGES), {"keep": ["logits"]}, ValueError, "logits of images 8 to 15 has numbers that are not finite"),
        (not_finite, batches(IMAGES), {"moments": ["logits"]}, ValueError, "logits of images 8 to 15 has numbers that are not finite"),
        (extract, batches(IMAGES), {"keep": ["spatial", "pool"]}, ValueError, "extract gave features, logits, but not pool and spatial"),
        (extract, [], {"moments": ["features"]}, ValueError, "There are no images: the batches are empty"),
        (extract, [IMAGES[:8], IMAGES[:0]], {"keep": ["logits"]}, ValueError, r"A batch is of shape \(0, .*\), of no images: leave it out"),
        (extract, [IMAGES[:8], IMAGES], {"keep": ["logits"]}, ValueError, "A batch has 21 images, but the first one had 8"),
        (lambda images: images, batches(IMAGES), {}, TypeError, "extract gave a .*, but it gives a dict of arrays, by name"),
        (lambda images: {"a": images.sum(0)}, batches(IMAGES), {"keep": ["a"]}, ValueError, r"a of shape \(4, 4, 3\) for 8 images"),
        ("inception", batches(IMAGES), {}, TypeError, "extract"),
    ],
)
def test_wrong_calls_are_explained(given, images, names, error, message):
    with pytest.raises(error, match=message):
        metrics.collect(given, images, **names)


def run_two(file, *arguments):
    """What two processes print: `python file INDEX PORT *arguments`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with contextlib.ExitStack() as stack:
        commands = ([sys.executable, file, str(index), str(port), *map(str, arguments)] for index in range(2))
        started = [stack.enter_context(subprocess.Popen(command, **options)) for command in commands]
        try:
            printed = [process.communicate(timeout=600)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    return printed


def test_two_processes_have_what_one_has(tmp_path):
    """Of 21 images one has 16 and the other 5; then one has none, which both say."""
    for printed in run_two(__file__, tmp_path):
        assert "There are no images" in printed
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as found:
            means = metrics.Moments(found["mean"], found["covariance"], int(found["count"]))
            assert_of_all({"features": means}, {"logits": found["logits"]})


def main(index, port, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    parallel.initialize(f"localhost:{port}", 2, int(index))
    mesh = parallel.mesh(devices=jax.local_devices())
    own = [IMAGES[:16], IMAGES[16:]][int(index)]
    means, kept = metrics.collect(extract, batches(own), moments=["features"], keep=["logits"], mesh=mesh)
    of = means["features"]
    np.savez(Path(folder) / f"{index}.npz", mean=of.mean, covariance=of.covariance, count=of.count, logits=kept["logits"])
    try:
        metrics.collect(extract, batches(own) if index == "0" else [], moments=["features"], mesh=mesh)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
