"""States: one array, or any pytree of arrays, batch first, such as an image and a vector, or a dict of three.

Every function that takes a state takes both. A pytree is laid out as one array (B, D), its leaves side by side in the order of
`jax.tree.leaves`, where it enters a sampler, a loss or a conversion, and is a pytree again for the field and in what is returned. So a step
of your own is written for arrays, and one array passes as it is.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import checks

__all__ = ["layout", "Layout"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the leaves of a pytree lie side by side in one array (B, D)."""

    structure: Any
    """The pytree's structure, as `jax.tree.structure` gives it."""
    shapes: tuple[tuple[int, ...], ...]
    """Of one example of each leaf."""

    def __str__(self):
        """The pytree with the shapes of its leaves."""
        shapes = iter(f"({', '.join(map(str, ('B', *shape)))})" for shape in self.shapes)
        whole = str(self.structure).removeprefix("PyTreeDef(").removesuffix(")")
        return "".join(next(shapes, part) if part == "*" else part for part in re.split(r"(\*)", whole))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers one example of each leaf has."""
        return tuple(map(math.prod, self.shapes))

    def flatten(self, name, tree) -> chex.ArrayDevice:
        """A pytree of arrays (B, ...) as one array (B, D), of the widest of their dtypes.

        Args:
          name: of the pytree, for errors.
          tree: arrays, of real floats.
        Returns:
          (B, D).
        Raises:
          TypeError: if a leaf is not of real floats.
          ValueError: if the structure is another, or the shape of an example of a leaf, or leaves have not the same number of examples.
        """
        structure = jax.tree.structure(tree)
        if structure != self.structure:
            if layout(tree) is None:
                given = f"one array or number, of shape {jnp.shape(tree)}" if tree is not None else "None"
                raise ValueError(f"{name} is {given}, but must be a pytree like the state, {self}.")
            raise ValueError(f"{name} is the pytree {structure}, but must be like the state, {self}.")
        leaves = [checks.floats(f"{name}{path}", leaf) for path, leaf in _named(tree)]
        for (path, _), leaf, shape in zip(_named(tree), leaves, self.shapes, strict=True):
            if leaf.shape[1:] != shape or not leaf.ndim or leaf.shape[:1] != leaves[0].shape[:1]:
                wanted = (*(leaves[0].shape[:1] or ("B",)), *shape)
                raise ValueError(
                    f"{name}{path} has shape {leaf.shape}, but must be like the state, {wanted}: arrays are batch first and "
                    "never broadcast."
                )
        dtype = jnp.result_type(*leaves)
        return jnp.concatenate([leaf.astype(dtype).reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)

    def unflatten(self, flat, like=None) -> Any:
        """The pytree of an array.

        Args:
          flat: (B, D), or of more leading axes (..., D).
          like: a pytree whose leaves say the dtypes; None for that of the array.
        Returns:
          The pytree, of arrays (B, ...).
        """
        parts = jnp.split(flat, np.cumsum(self.sizes)[:-1], axis=-1)
        leaves = [part.reshape(*flat.shape[:-1], *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        if like is not None:
            leaves = [leaf.astype(other.dtype) for leaf, other in zip(leaves, jax.tree.leaves(like), strict=True)]
        return self.structure.unflatten(leaves)

    def field(self, field) -> Callable:
        """A function of the pytree and the time as one of the array.

        Args:
          field: (x, t) -> like x, of the pytree.
        Returns:
          (x, t) -> like x, of an array (B, D).
        Raises:
          TypeError: if the field is no function.
        """
        checks.function("field", field, checks.FIELD)
        return lambda x, t: self.flatten("The field's output", field(self.unflatten(x), t))

    def of_state(self, function) -> Callable | None:
        """A function of the pytree and more, to anything, as one of the array.

        Args:
          function: of the pytree first; or None.
        Returns:
          A function of an array (B, D) first; None of None.
        """
        return None if function is None else lambda x, *more: function(self.unflatten(x), *more)


def layout(x) -> Layout | None:
    """The layout of a state: None for one array.

    Args:
      x: an array, (B, ...), or a pytree of them.
    Returns:
      A `Layout`, or None where x is one array, or what NumPy makes one of.
    Raises:
      ValueError: if a pytree has no leaves.
    """
    # None is no pytree here but something left out, for the checks of arrays to name.
    if x is None or hasattr(x, "shape") or jax.tree.structure(x) == jax.tree.structure(0):
        return None
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError(f"The state is {x!r}, a pytree without arrays: give one array, (B, ...), or a pytree of them.")
    # A list of numbers is an array that is not made yet.
    if not all(hasattr(leaf, "shape") for leaf in leaves):
        return None
    return Layout(jax.tree.structure(x), tuple(tuple(jnp.shape(leaf)[1:]) for leaf in leaves))


def _named(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def example_shape(x) -> tuple[int, ...]:
    """The number of examples of a state, as a shape: (B,)."""
    return tuple(jnp.shape(jax.tree.leaves(x)[0])[:1])
