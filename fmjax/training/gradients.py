"""The gradient of a batch: what a loss function gives, at once or in parts one by one, and how it is averaged over devices."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

OURS = ("loss", "grad_norm", "update_norm", "step")
"""Names of metrics that a loss function cannot give."""


def float32(tree) -> Any:
    """A pytree with floats of less than float32 in float32."""

    def cast(leaf):
        small = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if small else leaf

    return jax.tree.map(cast, tree)


def evaluate(loss_fn, params, variables, key, batch):
    """(loss, (numbers, variables)): what a loss function gives, checked."""
    # New containers, since NNX's are of the trace that made them and the loss may change them.
    variables = jax.tree.map(lambda leaf: leaf, variables)
    if variables is None:
        given, form = loss_fn(params, key, batch), 'one number, or a pair (loss, {"name": number})'
    else:
        given = loss_fn(params, variables, key, batch)
        form = '(loss, variables) or (loss, {"name": number}, variables), since the state has variables'
    parts: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    least = 1 if variables is None else 2
    numbers = parts[1] if len(parts) == least + 1 else {}
    if not least <= len(parts) <= least + 1 or not _is_number(parts[0]) or not isinstance(numbers, dict):
        what = f"a tuple of {len(parts)}: {', '.join(map(_described, parts))}" if isinstance(given, tuple) else _described(given)
        raise ValueError(f"loss_fn gives {what}, but it gives {form}: take .mean() of the losses, and name what stands beside it.")
    numbers = {name: _number(name, value) for name, value in numbers.items()}
    return parts[0], (numbers, variables if variables is None else _like(parts[-1], variables))


def gradient(loss_fn, count, params, variables, key, batch):
    """(loss, (numbers, variables)) and the gradient of the loss; of parts of the batch one by one, averaged, where there are several."""
    value_and_grad = jax.value_and_grad(lambda *arguments: evaluate(loss_fn, *arguments), has_aux=True)
    if count == 1:
        return value_and_grad(params, variables, key, batch)

    def body(carry, part):
        (total, variables), (i, batch) = carry, part
        (loss, (numbers, variables)), grads = value_and_grad(params, variables, jax.random.fold_in(key, i), batch)
        return (jax.tree.map(jnp.add, total, (loss, grads)), variables), numbers

    parts = _parts(batch, count)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), float), float32(params)))
    (total, variables), numbers = lax.scan(body, (zeros, variables), (jnp.arange(count), parts))
    loss, grads = jax.tree.map(lambda x: x / count, total)
    return (loss, (jax.tree.map(lambda x: x.mean(0), numbers), variables)), grads


def value_function(loss_fn, count, axis_name, like, variables, key, batch):
    """The loss as a function of the parameters alone, in float32, that line searches evaluate and differentiate."""

    def part_loss(params, variables, key, batch):
        loss, (_, variables) = evaluate(loss_fn, params, variables, key, batch)
        return float32(jnp.asarray(loss)), variables

    def loss(params):
        params = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), params, like)
        if count == 1:
            return part_loss(params, variables, key, batch)[0]

        # Its gradient computes each part again, rather than keep what all of them need.
        @jax.checkpoint
        def body(variables, part):
            i, batch = part
            loss, variables = part_loss(params, variables, jax.random.fold_in(key, i), batch)
            return variables, loss

        return lax.scan(body, variables, (jnp.arange(count), _parts(batch, count)))[1].mean()

    # Parameters are the same on every device, and the mean's transpose is the mean of the devices' gradients.
    return loss if axis_name is None else lambda params: lax.pmean(loss(lax.pmean(params, axis_name)), axis_name)


def mean_of_floats(tree, axis_name):
    """A pytree whose floats are averaged over an axis of devices; counts and keys are the same on each."""
    return jax.tree.map(lambda leaf: lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree)


def check_arguments(loss_fn, variables) -> None:
    """Raises unless a loss function takes variables where the state has them, and none where it has not."""
    arguments = ("params", "key", "batch") if variables is None else ("params", "variables", "key", "batch")
    try:
        inspect.signature(loss_fn).bind(*arguments)
    except TypeError as error:
        have = "no variables" if variables is None else "variables"
        cure = "give them to init(params, optimizer, variables=...)" if variables is None else "give back (loss, variables) from it"
        raise TypeError(
            f"The state has {have}, so loss_fn is called with ({', '.join(arguments)}): {error}. Take these, or {cure}."
        ) from error
    except ValueError:
        # It has no signature, as some of C have none.
        pass


def _parts(batch, count):
    def parts(leaf):
        if len(leaf) % count:
            raise ValueError(f"The batch of {len(leaf)} does not divide into the {count} parts of accumulate.")
        # Every count-th example, so that a part of a batch that is spread over devices is spread over them too.
        return leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(parts, batch)


def _is_number(value):
    return jnp.shape(value) == () if hasattr(value, "shape") else isinstance(value, int | float | complex)


def _described(value):
    return f"shape {jnp.shape(value)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _number(name, value):
    """A number that a loss function gives beside its loss, as a metric."""
    if not isinstance(name, str):
        raise TypeError(f"loss_fn names a number {name!r}, but the names of metrics are strings.")
    if name in OURS:
        raise ValueError(f"loss_fn names a number {name!r}, which a step has already: name it otherwise.")
    if not _is_number(value) or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ValueError(f"loss_fn gives {_described(value)} as {name!r}, but metrics are real numbers: take its mean.")
    return lax.stop_gradient(float32(jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))))


def _like(new, old):
    """The new variables in the dtypes of the old ones."""
    there, here = ({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (new, old))

    def kind(leaf):
        return jnp.shape(leaf), "float" if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else str(leaf.dtype)

    different = [name for name in here | there if name not in here or name not in there or kind(here[name]) != kind(there[name])]
    if different or jax.tree.structure(new) != jax.tree.structure(old):
        more = f", which differ in {', '.join(different[:3])}" if different else ""
        raise ValueError(
            f"loss_fn gives variables of another structure than the state's{more}: where the state has variables, the last that it gives "
            'are those to keep, as they came or changed: (loss, variables) or (loss, {"name": number}, variables).'
        )
    return jax.tree.map(lambda new, old: new if new.dtype == old.dtype else jnp.asarray(new, old.dtype), new, old)
