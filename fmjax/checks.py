"""Checks of arguments, by all chapters: each error says what was given, what was expected and what to do.

What is known is checked now, also inside `jax.jit`; what is traced is checked in shape and dtype.
"""

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def path(path) -> None:
    """Raises unless path has the two methods of one."""
    if isinstance(path, dict | list | tuple):
        raise TypeError(f"path is {path!r}, a pytree: make it the path of a state by paths.joint(path, x_1).")
    if isinstance(path, type) or not callable(getattr(path, "alpha", None)) or not callable(getattr(path, "beta", None)):
        made = f", which is a class: make one with {path.__name__}()" if isinstance(path, type) else ""
        raise TypeError(f"path is {path!r}{made}; a path is an object with alpha(t) and beta(t), such as paths.Linear().")


def floats(name, x) -> chex.ArrayDevice:
    """Raises unless x is an array of real floats, and returns it as a jax array."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {x!r}, but it is an array of real floats, batch first.") from error
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = "scale images to floats in [-1, 1] first" if x.dtype == jnp.uint8 else "convert it with .astype(jnp.float32)"
        raise TypeError(f"{name} has dtype {x.dtype}, but noise, data and states are real floats: {hint}.")
    return x


def batch(name, x) -> chex.ArrayDevice:
    """Raises unless x is a batch of examples, (B, ...) with an axis at least beside the batch's, of real floats; returns it as an array."""
    x = floats(name, x)
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {x.shape}, but arrays are batch first, (B, ...): for one example give {name}[None], for a number per "
            f"example {name}[:, None], and at least one of them."
        )
    return x


def multiplier(name, value, x) -> chex.Numeric:
    """A number, one per example, or an array that multiplies x, shaped to multiply x: where weights meet examples, as times do in `lift`.

    Args:
      name: of the value, for errors.
      value: (), the first axes of x, as (B,) is, or as many axes as x, each of x's size or 1.
      x: (B, ...).
    Returns:
      The value; of shape (B, 1, ..., 1) where it was (B,).
    Raises:
      ValueError: if it has another shape.
    """
    real(name, value)
    shape = jnp.shape(value)
    if shape and len(shape) < x.ndim and shape == x.shape[: len(shape)]:
        return jnp.reshape(value, shape + (1,) * (x.ndim - len(shape)))
    if shape and (len(shape) != x.ndim or any(size not in (1, full) for size, full in zip(shape, x.shape, strict=True))):
        raise ValueError(
            f"{name} has shape {shape}, but it multiplies x of shape {x.shape}: give a number, one per example, {x.shape[:1]}, or an array "
            f"of shape {(x.shape[0], *(1,) * (x.ndim - 1))} or x's own."
        )
    return value


def real(name, value) -> None:
    """Raises unless value is a real number or an array of them."""
    given = value if hasattr(value, "dtype") else np.asarray(value)
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{name} is {value!r}, of dtype {given.dtype}, but it is a real number, or an array of them.")


def number(name, value, meaning, *, least=-np.inf, most=np.inf, above=False) -> None:
    """Raises unless value is one real number, finite and in a range wherever it is known; `above` leaves its lower end out."""
    real(name, value)
    axes = jnp.ndim(value) if isinstance(value, jax.Array) else np.ndim(value)
    within = isinstance(value, Tracer) or (not axes and (least < value if above else least <= value) and value <= most)
    if axes or not within or (not isinstance(value, Tracer) and not np.isfinite(value)):
        low = "" if least == -np.inf else f" {'above' if above else 'of at least'} {least:g}"
        high = "" if most == np.inf else f"{' and' if low else ''} of at most {most:g}"
        raise ValueError(f"{name} is {value}, but it is {meaning}: one finite number{low}{high}.")


def setting(owner, name, meaning, *, above=False) -> None:
    """The same for a field of a pytree, at least 0 or above it, where it is a number: JAX rebuilds pytrees from other objects too.

    A number of NumPy becomes one of Python, beside which times keep their dtype.
    """
    value = getattr(owner, name)
    if isinstance(value, int | float | complex | np.number | str):
        number(name, value, meaning, least=0, above=above)
    if isinstance(value, np.number):
        object.__setattr__(owner, name, value.item())


def takes(function, arguments) -> bool:
    """Whether a function can be called with so many arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        # Some callables, such as NumPy's, do not say what they take.
        return True
    return True


def function(name, value, wanted) -> None:
    """Raises unless value can be called, with as many arguments as a lambda expression that is wanted."""
    if not callable(value):
        # A tree of parameters is long.
        given = repr(value) if value is None or isinstance(value, str | int | float | type) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {given}, but it is a function, such as {wanted}.")
    if hasattr(value, "apply") and getattr(value, "scope", value) is None:
        raise TypeError(f"{name} is the module {type(value).__name__}, without its parameters: give a function of them, such as {wanted}.")
    if wanted.startswith("lambda ") and not takes(value, (arguments := wanted[7:].partition(":")[0]).split(",")):
        raise TypeError(
            f"{name} is a function of {inspect.signature(value)}, but it is called with ({arguments}), as in {wanted}: give it those "
            "arguments, in this order."
        )


FIELD = "lambda x, t: model.apply(params, x, t)"
"""What a field may be."""
MAP = "lambda x, s, t: x + (t - s) * model.apply(params, x, s, end=t)"
"""What a flow map may be."""


def whole(name, value, meaning, least=1) -> None:
    """Raises unless value is a whole number, at least so much."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}, but it is {meaning}: a whole number, at least {least}.")


def like(name, value, x) -> None:
    """Raises unless value is an array of the shape of x."""
    if not hasattr(value, "shape") and not isinstance(value, int | float):
        raise TypeError(f"{name} is of {type(value)}, but must be one array like x, {jnp.shape(x)}: take the part that is.")
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(x):
        raise TypeError(f"{name} is complex, but states are real: take the part that is meant.")
    if jnp.shape(value) != jnp.shape(x):
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}, but must be like x, {jnp.shape(x)}: arrays are batch first and never broadcast."
        )


def like_state(field, name="The field's output") -> Callable:
    """The field with its output held to the state: its shape checked, its dtype the state's."""

    def checked(x, t):
        value = field(x, t)
        like(name, value, x)
        return jnp.asarray(value, x.dtype)

    return checked


_ROUNDING = 1e-4
"""How far sums of steps may end from 0 or 1."""


def on_path(t, name="t") -> chex.Numeric:
    """Raises unless times of a path are in [0, 1], up to rounding, wherever they are known; returns them, held to it there."""
    _of_floats(t, name)
    if isinstance(t, Tracer):
        return t
    if not ((np.asarray(t) >= -_ROUNDING) & (np.asarray(t) <= 1 + _ROUNDING)).all():
        if np.size(t) == 1:
            raise ValueError(f"{name} is {t}, but times go from 0, noise, to 1, data: divide the numbers of steps by how many there are.")
        raise ValueError(
            f"{name} has shape {np.shape(t)} and numbers from {np.min(t)} to {np.max(t)}, but times go from 0, noise, to 1, data, one for "
            "all or one per example: divide the numbers of steps by how many there are, and a field is a function (x, t), in this order."
        )
    # Beyond its ends a path may have no numbers.
    within = ((np.asarray(t) >= 0) & (np.asarray(t) <= 1)).all()
    return t if within else np.clip(np.asarray(t), 0, 1)


def _of_floats(t, name="t"):
    dtype = t.dtype if hasattr(t, "dtype") else np.asarray(t).dtype
    if not isinstance(t, int | float) and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {dtype}, but times are floats with 0 noise and 1 data, not step numbers.")


def times(t, x, name="t") -> chex.ArrayDevice:
    """t as floats of at least 32 bits, () or (B,)."""
    _of_floats(t, name)
    t = jnp.asarray(t, jnp.result_type(x.dtype, jnp.float32))
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {t.shape}, but it must be () or one time per example, {x.shape[:1]}, for x of shape {x.shape}.")
    return t


def weight(weight, t) -> None:
    """Raises where a weight of guidance in time is infinite at a time whose value is known."""
    with jax.ensure_compile_time_eval():
        value = weight(np.asarray(t, np.float32))
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"The guidance's weight is infinite at t = {np.asarray(t)}, where it meets a gradient of 0: let the grid start later, as "
            "times.uniform_grid(n, start=1e-3) does, or guide in `interval`."
        )


def null(null, y) -> chex.ArrayDevice:
    """The null as conditions like y, whose dtype must hold it: cast, 256 is class 0 in uint8, and 0.7 in any integer."""
    given = jnp.asarray(null) if isinstance(null, Tracer) else np.asarray(null)
    real = given.dtype == bool or jnp.issubdtype(given.dtype, jnp.integer) or jnp.issubdtype(given.dtype, jnp.floating)
    if not real or (given.dtype == bool) != (y.dtype == bool):
        raise TypeError(
            f"null is {null!r}, but y has dtype {y.dtype}: it is the condition that stands for none, a label such as the number of "
            "classes, or an array like one example's y."
        )
    if given.shape not in ((), y.shape[1:], y.shape):
        raise ValueError(f"null has shape {given.shape}, but it is one condition, {y.shape[1:]}, or one per example, {y.shape}.")
    if jnp.issubdtype(y.dtype, jnp.integer):
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(f"null is {null!r}, but y has dtype {y.dtype}: a label for no class is a whole number too.")
        if not isinstance(given, Tracer):
            held = jnp.iinfo(y.dtype)
            if given.size and (given.min() < held.min or given.max() > held.max):
                raise ValueError(f"null is {null}, but y has dtype {y.dtype}, which cannot hold it: give y.astype(jnp.int32).")
    # What is NaN is not given, to the modules of `models.conditions`.
    if not isinstance(given, Tracer) and np.isinf(np.asarray(given.astype(y.dtype), np.float64)).any():
        raise ValueError(f"null is {null}, which is not finite in y's dtype, {y.dtype}: give a condition that the network was trained on.")
    return jnp.broadcast_to(jnp.asarray(given, y.dtype), y.shape)


def key(key, n=None) -> None:
    """Raises unless there is one typed key, or where n is given, one for each of n examples."""
    dtype = getattr(key, "dtype", type(key).__name__)
    if not isinstance(key, jax.Array) or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"key has dtype {dtype}, but keys are typed: make one with jax.random.key(seed).")
    if key.shape != () and (n is None or key.shape != (n,)):
        each = "" if n is None else f", or one per example, {(n,)}"
        raise ValueError(f"key has shape {key.shape}, but it must be one key, (){each}: jax.random.split makes more of one.")


def grid(times, dtype, name="times") -> chex.ArrayDevice:
    """The grid as an array of floats; its order is checked wherever its values are known, and there it stays known inside `jax.jit`."""
    if not hasattr(times, "shape"):
        times = np.asarray(times)
    if jnp.ndim(times) != 1 or len(times) < 2:
        raise ValueError(
            f"{name} has shape {jnp.shape(times)}, but a grid is one-dimensional with at least two times, such as jnp.linspace(0, 1, 51)."
        )
    if not jnp.issubdtype(times.dtype, jnp.number) or jnp.issubdtype(times.dtype, jnp.complexfloating):
        raise TypeError(f"{name} has dtype {times.dtype}, but a grid is of real numbers, such as jnp.linspace(0, 1, 51).")
    if not isinstance(times, Tracer):
        values = np.asarray(times).astype(dtype)
        backwards = np.flatnonzero(~(np.diff(values) > 0))
        if backwards.size:
            i = int(backwards[0])
            raise ValueError(
                f"{name} must increase, but {name}[{i}] is {values[i]:g} and {name}[{i + 1}] is {values[i + 1]:g} in {values.dtype}; "
                "0 is noise, 1 is data."
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, but they go from {values[0]:g} to {values[-1]:g}; 0 is noise, 1 is data.")
    with jax.ensure_compile_time_eval():
        return jnp.asarray(times, dtype)
