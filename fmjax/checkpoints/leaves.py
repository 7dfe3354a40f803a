"""Leaves of a pytree: their names, kinds and shapes, and what they are restored into."""

import json
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np


def leaves_of(tree):
    """The leaves of a pytree by name: their keys joined by dots, those within a key written as %2E, so that no two names are the same."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(quote(jax.tree_util.keystr((key,), simple=True), safe="").replace(".", "%2E") for key in path)
        while name in named:
            name += "~"
        named[name] = leaf
    return named


def describe(name, leaf):
    """The kind and shape of a leaf, in a word."""
    if isinstance(leaf, bool | int | float | str) and not isinstance(leaf, np.generic):
        return type(leaf).__name__
    traced = isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    if traced or not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{name or 'The tree'} is a {type(leaf).__name__}, but a checkpoint holds arrays, typed keys, numbers and strings.")
    number = leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)
    if not is_key(leaf) and (not number or leaf.dtype in (np.longdouble, np.clongdouble)):
        raise TypeError(f"{name or 'The tree'} has dtype {leaf.dtype}, but a checkpoint's arrays have dtypes of JAX: convert it.")
    return f"{leaf.dtype}{list(leaf.shape)}"


def same(one, other):
    """Whether two things are the same in JSON, where nan is nan."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def plain_key(key):
    return {"impl": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()}


def is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf):
    """The generator of a typed key, or of its shape alone."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def abstract(leaf):
    """What Orbax restores a leaf into: arrays of NumPy stay those, since JAX may not have their dtype."""
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        leaf = jnp.asarray(leaf)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    if isinstance(leaf, np.ndarray | np.generic) or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
