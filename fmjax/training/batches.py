"""Batches one by one, and the place in the data that a run keeps."""

import copy
from typing import Any


class Batches:
    """Batches of an iterable, or of a function of the step, and where they are."""

    def __init__(self, batches: Any, position, step):
        # Without data every step is where the next one is, as with a function of the step.
        batches = (lambda n: None) if batches is None else batches
        shape = getattr(batches, "shape", None)
        # One of more axes, or of one, may be batches one after the other.
        if (shape is not None and len(shape) == 2) or isinstance(batches, dict):
            given = "a dict" if shape is None else f"an array of shape {shape}"
            raise TypeError(
                f"batches is {given}, but it is an iterable of batches or a function of the step: lambda n: "
                "jax.random.choice(jax.random.fold_in(key, n), data, (256,)) draws from one array."
            )
        self._position = step if callable(batches) and not hasattr(batches, "__iter__") else None
        self._start = step
        self._batches: Any = batches
        if self._position is None:
            self._batches = iter(batches)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if position is None:
            return
        if self._position is not None:
            if position != step:
                raise TypeError(
                    f"The run's place in its batches is {position!r}, but the batches are a function of the step: give those it had."
                )
        elif not hasattr(self._batches, "set_state"):
            raise TypeError(
                f"The run's place in its batches is {position!r}, but a {type(self._batches).__name__} has no set_state: give batches that "
                "can be set, as data.pipeline makes them, or Run(..., position=None) where they are in their place."
            )
        else:
            try:
                self._batches.set_state(copy.deepcopy(position))
            except Exception as error:
                raise TypeError(
                    f"The batches could not be set to the run's place in them, {position!r} ({type(error).__name__}: {error}): give "
                    "batches of the kind that it was saved with."
                ) from error

    def draw(self, n, steps):
        if self._position is not None:
            self._position = n + 1
            return self._batches(n)
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                f"The batches ended after {n - self._start} of {steps - self._start} steps: give an iterable that repeats."
            ) from None

    def position(self):
        """Where the next batch is."""
        if self._position is not None or not hasattr(self._batches, "get_state"):
            return self._position
        return copy.deepcopy(self._batches.get_state())
