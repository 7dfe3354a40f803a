"""Pipeline: batches from a source to the device, in a reproducible order that can be stopped and resumed.

    source = images.folder("photos", size=64)
    stream = pipeline.to_device(pipeline.batches(source, 128))

Keep `stream.get_state()` with a checkpoint, and give it to `set_state` of a stream made in the same way: the next batch is
the one that would have come.
"""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fmjax import checks

__all__ = ["batches", "to_device", "in_order", "split"]


def batches(source, size, *, seed=0, epochs=None, shuffle=True, threads=4, process_index=None, process_count=None) -> Iterator:
    """An iterator of batches, prefetched.

    Each epoch is another permutation of the source, of which the last `len(source) % size` are left out. The parts of all
    processes, one after another, are the same batches for any number of them.

    Args:
      source: has a length and gives pairs `(image, label)` of numpy, as those of `data.images` do.
      size: of the batch over all processes.
      seed: of the order.
      epochs: how many, or None to go on for ever.
      shuffle: whether to; else the order is the source's.
      threads: how many read, one batch each; 0 reads when asked, which is quickest for arrays in memory.
      process_index: of this process, by default JAX's.
      process_count: by default JAX's.
    Returns:
      An iterator of `(images, labels)`, numpy arrays of size / process_count, with grain's `get_state()`, which JSON can
      hold, `set_state(state)` and `close()`. A state counts the batches given: it is good for an iterator of the same
      arguments, whatever its threads and processes, and refused by another.
    Raises:
      ImportError: if grain is not installed (`pip install fmjax[images]`).
      ValueError: if the batch does not divide among the processes, or is larger than the source.
    """
    grain = _grain()
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; expected one in [0, {process_count}), the number of processes.")
    if size < 1 or size % process_count:
        raise ValueError(f"size is {size}; expected a positive multiple of the {process_count} processes.")
    if len(source) < size:
        raise ValueError(f"size is {size}; expected at most the {len(source)} examples of the source: give a smaller batch or more data.")
    order = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        order = order.shuffle()
    # A process takes its part of every batch, as a sharding over devices does, so that examples meet the same random numbers.
    parts = order[: len(source) // size * size].batch(size // process_count)
    order = parts[process_index::process_count].repeat(epochs)
    iterator = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    return _Batches(iterator, {"examples": len(source), "size": size, "seed": seed, "shuffle": shuffle})


def in_order(source, size) -> Iterator:
    """Every example of a source once, in its order, as `training.evaluate` takes them; the last batch may be smaller.

    Args:
      source: has a length and gives examples, pytrees of numpy such as pairs `(image, label)`.
      size: of a batch.
    Returns:
      An iterator of batches, pytrees of arrays (size, ...).
    Raises:
      ValueError: if size is not a whole number of at least 1, or the source is empty.
    """
    checks.whole("size", size, "how many examples a batch has")
    if not len(source):
        raise ValueError("The source has no examples, so there are no batches of it.")

    def stacked(start):
        examples = [source[i] for i in range(start, min(start + size, len(source)))]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    return map(stacked, range(0, len(source), size))


class _Batches:
    """Grain's iterator, whose state says of which batches it is."""

    def __init__(self, iterator, of):
        self._iterator, self._of = iterator, of

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    def get_state(self):
        return self._iterator.get_state() | {"of": self._of}

    def set_state(self, state):
        of = state.get("of")
        different = [name for name in self._of if not isinstance(of, dict) or of.get(name) != self._of[name]]
        if different:
            was = ", ".join(f"{name} {of.get(name) if isinstance(of, dict) else None}" for name in different)
            raise ValueError(f"The state is of batches with {was}; expected {', '.join(f'{name} {self._of[name]}' for name in different)}.")
        self._iterator.set_state({name: value for name, value in state.items() if name != "of"})

    def close(self):
        self._iterator.close()


def split(source, count, *, seed=0) -> tuple[Any, Any]:
    """A source in two: examples to train on, and `count` at random that are held out.

    Args:
      source: has a length and gives examples.
      count: how many to hold out.
      seed: of the choice.
    Returns:
      Two sources, of `len(source) - count` and of `count` examples.
    Raises:
      ImportError: if grain is not installed (`pip install fmjax[images]`).
      ValueError: if nothing would be left on either side.
    """
    if not 0 < count < len(source):
        raise ValueError(f"count is {count}; expected at least 1 and fewer than the {len(source)} examples of the source.")
    shuffled = _grain().MapDataset.source(source).seed(seed).shuffle()
    return shuffled[count:], shuffled[:count]


def _grain():
    try:
        import grain
    except ImportError as error:
        raise ImportError("data.pipeline needs grain: pip install 'fmjax[images]'") from error
    return grain


def to_device(iterator, *, prefetch=2, sharding=None) -> Iterator:
    """The batches of an iterator as JAX arrays, in their order, prefetched to the device.

    Args:
      iterator: of pytrees of numpy arrays; those of `batches` can be resumed.
      prefetch: how many batches are sent to the device while one is used.
      sharding: of the global arrays, of which each process holds its part; by default they go to the default device.
    Returns:
      An iterator. Where the given one has `get_state()` and `set_state(state)`, as those of `batches` have, so has this: the state is that
      after the batch it gave last, whatever is prefetched.
    Raises:
      ValueError: if prefetch is negative.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch is {prefetch}; expected 0 or more.")
    iterator = iter(iterator)
    return (_Resumable if hasattr(iterator, "get_state") else _Prefetched)(iterator, prefetch, sharding)


class _Prefetched:
    def __init__(self, iterator, prefetch, sharding):
        self._iterator, self._prefetch, self._sharding = iterator, prefetch, sharding
        self._waiting = collections.deque()
        # None while nothing was drawn: then the iterator's own state holds.
        self._state = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._state is None:
            self._state = self._drawn()
        while len(self._waiting) <= self._prefetch:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            self._waiting.append((self._put(batch), self._drawn()))
        if not self._waiting:
            raise StopIteration
        batch, self._state = self._waiting.popleft()
        return batch

    def _drawn(self):
        return self._iterator.get_state() if hasattr(self._iterator, "get_state") else None

    def _put(self, batch):
        if self._sharding is None:
            return jax.device_put(batch)
        return jax.tree.map(lambda part: jax.make_array_from_process_local_data(self._sharding, part), batch)


class _Resumable(_Prefetched):
    def get_state(self):
        return self._drawn() if self._state is None else self._state

    def set_state(self, state):
        self._iterator.set_state(state)
        self._waiting.clear()
        self._state = None
