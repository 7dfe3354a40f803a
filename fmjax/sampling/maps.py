"""Maps: samples in few steps, each a flow map over an interval of any length."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmjax import checks, paths, states
from fmjax.sampling.checks import check_range
from fmjax.sampling.scan import follow
from fmjax.sampling.steps import noise


def sample_map(flow_map, x_0, times, *, save=None) -> tuple[chex.ArrayDevice, object]:
    """Follows a flow map along a grid: one evaluation for each interval, however long.

    X_{i+1} = X_{t_i, t_{i+1}}(X_i)    (Boffi et al. 2024, arXiv:2406.07507)

    One step is `jnp.array([0.0, 1.0])`. From data back to noise it goes by `reverse_map`. Outside `jax.jit` each call compiles anew.

    Args:
      flow_map: (x, s, t) -> like x, where the flow carries x from s to t; s and t are scalars here.
      x_0: where to start, (B, ...), any float dtype, or a pytree of such arrays; the state is float32 or wider.
      times: an increasing grid, (n + 1,).
      save: what to keep of every state, `(x, t) -> any pytree`.
    Returns:
      x_1, like x_0, and what was saved, with a leading axis of n + 1 (None without `save`).
    Raises:
      TypeError: if x_0 is not of floats, or the map is no function.
      ValueError: if the grid does not increase or leaves [0, 1], or the map's output has another shape than x.
    """
    checks.function("flow_map", flow_map, checks.MAP)
    if (layout := states.layout(x_0)) is not None:
        flat = lambda x, s, t: layout.flatten("The map's output", flow_map(layout.unflatten(x, like=x_0), s, t))  # noqa: E731
        x_1, saved = sample_map(flat, layout.flatten("x_0", x_0), times, save=layout.of_state(save))
        return layout.unflatten(x_1, like=x_0), saved
    _check_ends(flow_map, x_0, times)
    return follow(lambda index, state, x, t, dt: (None, _mapped(flow_map, x, t, t + dt)), lambda x, times: None, x_0, times, None, save, 1)


def _check_ends(flow_map, x_0, times):
    """Asks for the first and the last step where their times are known, for a map to say that it does not start or lead there."""
    x_0 = checks.batch("x_0", x_0)
    x_0 = x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32))
    times = checks.grid(times, x_0.dtype)
    check_range(times)
    if not isinstance(times, Tracer):
        for i in {0, len(times) - 2}:
            start, end = np.asarray(times)[[i, i + 1]]
            jax.eval_shape(lambda x, start=start, end=end: _mapped(flow_map, x, start, end), x_0)


def sample_map_renewed(path, flow_map, key, x_0, times) -> chex.ArrayDevice:
    """Samples of a map to data, with new noise between its steps, as consistency models take several.

    x^ = X_{t_i, t_n}(x),  x <- alpha_{t_{i+1}} x^ + beta_{t_{i+1}} epsilon    (Song et al. 2023, arXiv:2303.01469, algorithm 1)

    The last step adds none. Example i depends on the key and on i alone where there is a key per example.

    Args:
      path: anything with `alpha(t)` and `beta(t)`.
      flow_map: (x, s, t) -> like x; it is asked for the end of the grid alone.
      key: a typed key, or one per example, (B,).
      x_0: noise as the path has it where the grid starts, (B, ...).
      times: an increasing grid in [0, 1], (n + 1,).
    Returns:
      x_1, like x_0.
    Raises:
      TypeError: if x_0 is not of floats, the key is not typed, or the map is no function.
      ValueError: if the grid does not increase or leaves [0, 1], the keys are neither one nor one per example, or the map's output has
        another shape than x.
    """
    checks.path(path)
    checks.function("flow_map", flow_map, checks.MAP)
    x_0 = checks.batch("x_0", x_0)
    checks.key(key, len(x_0))
    times = checks.grid(times, jnp.promote_types(x_0.dtype, jnp.float32))
    _check_ends(flow_map, x_0, times)
    last = len(times) - 2

    fold_in = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in

    def advance(index, state, x, t, dt):
        data = _mapped(flow_map, x, t, times[-1])
        renewed = paths.interpolate(path, noise(fold_in(key, index), x.shape, x.dtype), data, t + dt)
        return None, jnp.where(index < last, renewed, data)

    return follow(advance, lambda x, times: None, x_0, times, None, None, 1)[0]


def reverse_map(flow_map, times) -> tuple[object, chex.ArrayDevice]:
    """The flow map and the grid from data back to noise, for `sample_map`: inversion, of a map that was learnt for s > t too.

    Y_{a,b} = X_{T - a, T - b},  T = t_0 + t_n

    Args:
      flow_map: (x, s, t) -> like x.
      times: an increasing grid, (n + 1,).
    Returns:
      A flow map and an increasing grid from t_0 to t_n, whose steps are those of `times` in the other order.
    Raises:
      TypeError: if the map is no function.
      ValueError: if the grid does not increase.
    """
    checks.function("flow_map", flow_map, checks.MAP)
    times = times if isinstance(times, Tracer) else np.asarray(checks.grid(times, jnp.result_type(float)))
    both = times[0] + times[-1]
    return lambda x, a, b: flow_map(x, both - a, both - b), both - times[::-1]


def _mapped(flow_map, x, s, t):
    value = flow_map(x, s, t)
    checks.like("The map's output", value, x)
    return jnp.asarray(value, x.dtype)
