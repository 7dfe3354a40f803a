"""Collecting: the features of many images, batch by batch, so that no more is held than the metrics need."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import Partial

from fmjax import checks, parallel
from fmjax.metrics import statistics
from fmjax.metrics.statistics import Moments


def collect(
    extract, batches, *, moments=(), keep=(), mesh=None, show: Callable | None = None
) -> tuple[dict[str, Moments], dict[str, np.ndarray]]:
    """The moments of a network's features over batches of images, and those features themselves that are wanted.

    Moments are summed in float64, batch by batch (6). What is kept takes the memory of all images: 400 MB for 50,000 of 2,048 features.
    In a job of several processes each gives images of its own, and all have the result of all.

    Args:
      extract: (images,) -> a dict of arrays (B, ...), compiled here: `lambda images: {"features": model.apply(params, images).features}`.
        Arrays that it closes over become constants of the program; those of a `jax.tree_util.Partial(function, params)` do not.
      batches: an iterable of arrays (B, H, W, C); the last may be shorter.
      moments: names of that dict whose moments are wanted.
      keep: names of those that are wanted themselves, float32.
      mesh: devices of this process to divide a batch among, which is filled up to a multiple of them; by default the one that JAX
        computes on.
      show: called with the number of images so far, such as what `training.progress.bar` gives.
    Returns:
      A dict of Moments, and one of arrays (N, ...).
    Raises:
      TypeError: if `extract` is no function, or gives no dict.
      ValueError: if there are no images, in one of the processes or in all, a name is none of the network's, or a feature is not finite.
    """
    checks.function("extract", extract, 'lambda images: {"features": network(images)}')
    network = extract if isinstance(extract, Partial) else Partial(extract)
    sharding = None if mesh is None else parallel.batch_sharding(mesh)
    devices = 1
    if mesh is not None:
        network, devices = parallel.shard(network, mesh), mesh.size
    compiled = jax.jit(lambda network, images: network(images))
    means: dict[str, Any] = dict.fromkeys(moments)
    kept: dict[str, list] = {name: [] for name in keep}
    size = done = 0
    for images in batches:
        images = np.asarray(images)
        count = len(images)
        if not count:
            raise ValueError(f"A batch is of shape {images.shape}, of no images: leave it out.")
        # One shape, so that all batches are one program.
        size = size or -(-count // devices) * devices
        if count > size:
            raise ValueError(f"A batch has {count} images, but the first one had {size}: only the last may differ, and be shorter.")
        images = np.concatenate([images, np.repeat(images[-1:], size - count, axis=0)])
        found = compiled(network, jnp.asarray(images) if sharding is None else jax.device_put(images, sharding))
        if not isinstance(found, dict):
            raise TypeError(f"extract gave a {type(found).__name__}, but it gives a dict of arrays, by name.")
        if missing := {*moments, *keep} - set(found):
            raise ValueError(f"extract gave {', '.join(found)}, but not {' and '.join(sorted(missing))}: name what it gives.")
        found = {name: np.asarray(found[name]) for name in {*moments, *keep}}
        for name, values in found.items():
            if values.shape[:1] != (size,):
                raise ValueError(f"extract gave {name} of shape {values.shape} for {size} images, but it has a row per image.")
            if not np.isfinite(values[:count]).all():
                raise ValueError(f"{name} of images {done} to {done + count - 1} has numbers that are not finite: find what made them.")
        for name in means:
            means[name] = statistics.update(means[name], found[name][:count])
        for name, each in kept.items():
            each.append(found[name][:count].astype(np.float32))
        done += count
        if show is not None:
            show(done)
    # Of all processes, which else would wait for each other.
    if parallel.anywhere(not done):
        raise ValueError("There are no images: the batches are empty, in one of the processes at least.")
    features = {name: np.concatenate(each) for name, each in kept.items()}
    if jax.process_count() == 1:
        return means, features
    for name, own in means.items():
        parts = zip(*(_of_all(np.asarray(part, np.float64)[None]) for part in (own.mean, own.covariance, own.count)), strict=True)
        means[name] = functools.reduce(statistics.merge, (Moments(mean, covariance, int(count)) for mean, covariance, count in parts))
    return means, {name: _of_all(each) for name, each in features.items()}


def _of_all(rows):
    """The rows of all processes, bit by bit: without 64 bits JAX would round float64."""
    counts = multihost_utils.process_allgather(np.int32(len(rows))).ravel()
    words = np.zeros((counts.max(), *rows.shape[1:], rows.itemsize // 4), np.uint32)
    words[: len(rows)] = np.ascontiguousarray(rows)[..., None].view(np.uint32)
    gathered = multihost_utils.process_allgather(words)
    return np.concatenate([part[:count].view(rows.dtype)[..., 0] for part, count in zip(gathered, counts, strict=True)])
