"""Couplings: which noise meets which data.

In a batch noise i meets datum j_i. As they are drawn, j_i = i and the two are independent: paths cross, and where they do the field bends.
The batch's optimal transport,

    j = argmin_j sum_i |x_0^i - x_1^(j_i)|^2        (1) (Pooladian et al. 2023, arXiv:2304.14772)

over permutations (Tong et al. 2023, arXiv:2302.00482), uses every example once and keeps both distributions, and paths cross less the
larger the batch is, so that few steps follow the field. A coupling gives indices, by which anything of any structure follows:

    j = couplings.optimal(x_0, x_1)
    x_1, y = jax.tree.map(lambda leaf: leaf[j], (x_1, y))

With conditions (1) does harm: noise then says what the condition is, and a model that is asked for one condition starts from noise that it
has never seen with it. The cost that sees conditions,

    |x_0^i - x_1^j|^2 + w |y^i - y^j|^2        (2) (Cheng and Schwing 2025, arXiv:2503.10636)

takes noise i for that of the condition beside it, of which it is independent; labels, with w infinite, are never exchanged for others.
"""

import concurrent.futures
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fmjax import checks, files, parallel, states

__all__ = ["independent", "optimal", "partial", "sinkhorn", "draw", "reflow"]


def independent(key, n) -> chex.ArrayDevice:
    """The coupling that knows nothing, for two sets that come paired: a random order, all alike likely.

    Args:
      key: a typed key.
      n: how many examples each side has.
    Returns:
      j, (n,), integers.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if n is not a whole number of at least 1.
    """
    checks.key(key)
    checks.whole("n", n, "how many examples are paired")
    return jax.random.permutation(key, n)


def optimal(x_0, x_1, *, y=None, weight: Any = None) -> Any:
    """The optimal transport of a batch, exactly, as a permutation: (1), or (2) with conditions.

    The assignment is solved on the host, by SciPy, under `jax.jit` through a callback, and under `jax.vmap` in threads; arrays that are
    divided among processes are gathered first, and all processes find the same. Its time grows with the cube of the examples, of the
    largest class where there are labels.

    Args:
      x_0: noise, or another source, (B, ...), or a pytree of them.
      x_1: data, like x_0.
      y: conditions as they stand beside x_0 and x_1: integers (B,) are labels and never exchanged for others; floats (B, ...) are vectors
        or images, where what is NaN is not given, and never exchanged for what is; or a pytree of them.
      weight: of vectors and images, how much their squared distance counts beside that of x_0 and x_1, both divided by their means over all
        pairs: 0 for not at all. A number, or a dict of numbers where y is one with vectors of these names.
    Returns:
      j, (B,), integers: x_0[i] goes with x_1[j[i]] and its condition y[j[i]]. A NumPy array, and one of JAX under `jax.jit`.
    Raises:
      TypeError: if an array is not of real floats, or conditions are neither labels nor vectors.
      ValueError: if x_0 and x_1 differ in shape, an example or its vector is not finite, there is no weight for vectors, or one for
        labels alone.
    """
    x_0, x_1 = _sides(x_0, x_1)
    if x_0.shape != x_1.shape:
        raise ValueError(
            f"x_0 has shape {x_0.shape} and x_1 {x_1.shape}, but every example is used once: take as many of both, or pair some of them by "
            "couplings.partial."
        )
    labels, vectors, weights = _conditions(y, weight, len(x_0))
    # Indices have no derivative.
    prepared = _prepare(*jax.lax.stop_gradient((x_0, x_1, labels, vectors, weights)))
    if any(isinstance(part, Tracer) for part in jax.tree.leaves(prepared)):
        shape = jax.ShapeDtypeStruct((len(x_0),), jnp.int32)
        return jax.pure_callback(_solve_all, shape, *prepared, vmap_method="broadcast_all")
    j = _solve_all(*prepared)
    return j if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(j))


def _sides(x_0, x_1):
    """Both sides of a coupling as arrays (B, D), in whole."""
    layout = states.layout(x_1)
    sides = (x_0, x_1) if layout is None else (layout.flatten("x_0", x_0), layout.flatten("x_1", x_1))
    sides = [checks.batch(name, _whole(side)) for name, side in zip(("x_0", "x_1"), sides, strict=True)]
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise ValueError(
            f"x_0 has examples of shape {sides[0].shape[1:]} and x_1 of {sides[1].shape[1:]}, but distances join like to like."
        )
    return [side.reshape(len(side), -1).astype(jnp.promote_types(side.dtype, jnp.float32)) for side in sides]


def _whole(array):
    """An array that is divided among devices or processes, in whole."""
    if isinstance(array, Tracer):
        mesh = jax.typeof(array).sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec())) if explicit else array
    if isinstance(array, jax.Array):
        return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
    return array


def _conditions(y, weight, size):
    """The labels, (B, K), the vectors, each (B, F), and the vectors' weights."""
    labels: list[Any] = [np.zeros((size, 0), np.int32)]
    vectors, weights = [], []
    names = dict(weight) if isinstance(weight, dict) else None
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        name = jax.tree_util.keystr(path)
        leaf = _whole(leaf if hasattr(leaf, "dtype") else np.asarray(leaf))
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise ValueError(f"y{name} has shape {leaf.shape}, but there is a condition for each example, ({size}, ...).")
        if jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.issubdtype(leaf.dtype, jnp.bool_):
            if leaf.dtype.itemsize > 4:
                # Its two halves: int32 does not hold every label.
                halves = (
                    jax.lax.bitcast_convert_type
                    if isinstance(leaf, Tracer)
                    else lambda a, dtype: np.ascontiguousarray(a)[..., None].view(dtype)
                )
                leaf = halves(leaf, np.int32)
            labels.append(leaf.reshape(size, -1))
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            given = names.pop(getattr(path[0], "key", None), None) if names is not None and path else weight
            if given is None or isinstance(given, dict):
                raise ValueError(
                    f"y{name} is of floats and has no weight: give weight, how much its squared distance counts beside that of the states, "
                    "such as 10.0; 0 for not at all."
                )
            checks.number(f"The weight of y{name}", given, "how much the distance of conditions counts", least=0)
            vectors.append(leaf.reshape(size, -1))
            weights.append(given)
        else:
            raise TypeError(f"y{name} has dtype {leaf.dtype}, but conditions are integers, which are labels, or floats, which are vectors.")
    if names or (weight is not None and not weights):
        raise ValueError(
            f"weight is {weight!r}, but it is of vectors and images, of which y has none so named: labels are never exchanged."
        )
    return labels, vectors, weights


@jax.jit
def _prepare(x_0, x_1, labels, vectors, weights):
    """What `_solve` takes: both sides, the labels, prices of all examples, from which the search is short, and which are not finite.

    (2) is the squared distance of states that are longer by sqrt(w) y. The prices are near those of the optimal transport, by iterations of
    Sinkhorn's with an entropy that falls: less than a third of the search without them. Any prices lead to the same optimum.
    """
    lost = (*(~jnp.isfinite(side).all(1) for side in (x_0, x_1)), sum(jnp.isinf(y).any(1) for y in vectors) + jnp.zeros(len(x_0), int))
    # Squares of very large and very small numbers are not numbers of float32.
    x_0, x_1 = (side / _largest(x_0, x_1) for side in (x_0, x_1))
    between = _mean_square(x_0, x_1)
    for vector, weight in zip(vectors, weights, strict=True):
        given = ~jnp.isnan(vector)
        labels = [*labels, given]
        vector = jnp.where(given, vector, 0).astype(x_0.dtype)
        vector = vector / _largest(vector)
        among = _mean_square(vector, vector)
        scaled = vector * jnp.sqrt(weight * between / jnp.where(among > 0, among, 1))
        x_0, x_1 = jnp.concatenate([x_0, scaled], axis=1), jnp.concatenate([x_1, scaled], axis=1)
    labels = jnp.concatenate([part.astype(jnp.int32) for part in labels], axis=1)
    # To move either side changes all permutations by the same.
    x_0, x_1 = x_0 - x_0.mean(0, keepdims=True), x_1 - x_1.mean(0, keepdims=True)
    squares = (x_0**2).sum(1), (x_1**2).sum(1)
    unit = squares[0].mean() + squares[1].mean()
    cost = (squares[0][:, None] + squares[1][None] - 2 * jnp.matmul(x_0, x_1.T, precision="highest")) / jnp.where(unit > 0, unit, 1)
    cost = jnp.where((labels[:, None] == labels[None]).all(-1), cost, jnp.inf)

    def iterate(n, prices):
        epsilon = 0.5 ** (n + 1)
        of_x_0 = -epsilon * jax.nn.logsumexp((prices[1][None] - cost) / epsilon, axis=1)
        return of_x_0, -epsilon * jax.nn.logsumexp((of_x_0[:, None] - cost) / epsilon, axis=0)

    prices = jax.lax.fori_loop(0, 10, iterate, (jnp.zeros(len(cost), cost.dtype),) * 2)
    return x_0, x_1, labels, tuple(unit * price - square for price, square in zip(prices, squares, strict=True)), lost


def _largest(*arrays):
    """The largest number, or 1 where all are 0 or one is not finite."""
    largest = jnp.stack([jnp.abs(array).max() for array in arrays]).max()
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def _mean_square(x, y):
    """E |x_i - y_j|^2 over all pairs."""
    middle = x.mean(0, keepdims=True)
    return ((x - middle) ** 2).sum(1).mean() + ((y - middle) ** 2).sum(1).mean()


def _require_finite(name, lost):
    (bad,) = np.nonzero(lost)
    if len(bad):
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError(f"{name} has numbers that are not finite in the examples {bad[:8].tolist()}{more}: their distances say nothing.")


def _solve_all(*prepared):
    """The permutations of problems that `jax.vmap` put together, each in a thread: SciPy's search works beside others."""
    # What JAX does in here would wait for what waits for this.
    prepared = jax.tree.map(np.asarray, prepared)
    axes = prepared[0].shape[:-2]
    if not axes:
        return _solve(*prepared)
    flat = jax.tree.map(lambda part: part.reshape(math.prod(axes), *part.shape[len(axes) :]), prepared)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        orders = list(threads.map(lambda n: _solve(*jax.tree.map(lambda part: part[n], flat)), range(len(flat[0]))))
    return np.stack(orders).reshape(*axes, -1)


def _solve(x_0, x_1, labels, prices, lost):
    """The permutation, on the host, in float64: class by class."""
    from scipy.optimize import linear_sum_assignment

    for name, each in zip(("x_0", "x_1", "y"), lost, strict=True):
        _require_finite(name, each)
    x_0, x_1 = (np.asarray(side, np.float64) for side in (x_0, x_1))
    # Those of numbers beyond float32 are not finite, and only make the search short.
    of_x_0, of_x_1 = (np.nan_to_num(np.asarray(price, np.float64), nan=0, posinf=0, neginf=0)[:, None] for price in prices)
    # The cost as one product: -2 x_0 x_1 - price - price.
    x_0 = np.concatenate([-2 * x_0, of_x_0, np.ones_like(of_x_0)], axis=1)
    x_1 = np.concatenate([x_1, -np.ones_like(of_x_1), -of_x_1], axis=1)
    # BLAS has threads of its own, which a small product is not worth.
    product = (lambda x, y: np.einsum("id,jd->ij", x, y)) if x_0.shape[1] < 16 else (lambda x, y: x @ y.T)
    j = np.arange(len(x_0), dtype=np.int32)
    labels = np.asarray(labels)
    classes = np.unique(labels, axis=0, return_inverse=True)[1].ravel() if labels.shape[1] else np.zeros(len(x_0), int)
    for label in range(classes.max() + 1):
        (members,) = np.nonzero(classes == label)
        if len(members) > 1:
            j[members] = members[linear_sum_assignment(product(x_0[members], x_1[members]))[1]]
    return j


def partial(x_0, x_1, count) -> tuple[np.ndarray, np.ndarray]:
    """The so many pairs of least cost, of two sets of any sizes; what is far from everything stays alone.

    (i, j) = argmin sum_n |x_0^(i_n) - x_1^(j_n)|^2        (3) (Chapel et al. 2020, arXiv:2002.08276)

    What is left out of a batch of data is not learnt: it is for data with outliers. Not for use under `jax.jit`.

    Args:
      x_0: noise, or another source, (N, ...), or a pytree of them.
      x_1: data, (M, ...), with examples like those of x_0.
      count: how many pairs.
    Returns:
      i and j, (count,) each, integers, none of them twice: x_0[i] goes with x_1[j].
    Raises:
      TypeError: if an array is not of real floats.
      ValueError: if examples differ in shape or are not finite, or there are not so many.
    """
    from scipy.optimize import linear_sum_assignment

    x, y = (np.asarray(side, np.float64) for side in _sides(x_0, x_1))
    n, m = len(x), len(y)
    checks.whole("count", count, "how many pairs there are")
    if count > min(n, m):
        raise ValueError(f"count is {count}, but there are {n} and {m} examples, each of which is used once at most.")
    for name, side in (("x_0", x), ("x_1", y)):
        _require_finite(name, ~np.isfinite(side).all(axis=1))
    # Others that cost nothing take what is left, and are not for each other.
    cost = np.zeros((n + m - count, n + m - count))
    cost[:n, :m] = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    cost[n:, m:] = np.inf
    i, j = linear_sum_assignment(cost)
    pairs = (i < n) & (j < m)
    return i[pairs].astype(np.int32), j[pairs].astype(np.int32)


def sinkhorn(x_0, x_1, epsilon, *, keep: tuple[float, float] = (1.0, 1.0), iterations: int = 10_000, tolerance: float = 1e-3) -> Any:
    """The entropic plan of a batch, on the device, by ott-jax (`pip install 'fmjax[couplings]'`).

    P = argmin_P sum_ij P_ij |x_0^i - x_1^j|^2 - epsilon H(P)        (4) (Cuturi 2013, arXiv:1306.0895)

    The Schrödinger bridge of dX = sigma dW has epsilon = 2 sigma^2. Below 1 in `keep`, a marginal is kept less strictly, and
    mass is lost or made (unbalanced transport, Chizat et al. 2018, arXiv:1607.05816). `draw` pairs by it.

    Args:
      x_0: noise, or another source, (N, ...), or a pytree of them.
      x_1: data, (M, ...), with examples like those of x_0.
      epsilon: of the cost's unit, above 0: the smaller, the more iterations are needed.
      keep: how strictly the marginals of x_0 and of x_1 are kept, each above 0 and at most 1, which is exactly: ott's tau.
      iterations: at most.
      tolerance: of the marginals, summed absolute errors.
    Returns:
      P, (N, M); under `jax.jit` it is NaN where it has not come within the tolerance.
    Raises:
      ImportError: if ott-jax is not installed.
      TypeError: if an array is not of real floats.
      ValueError: if examples differ in shape, a number is out of its range, or the plan has not come within the tolerance.
    """
    try:
        with warnings.catch_warnings():
            # Of jaxopt, which ott imports.
            warnings.simplefilter("ignore", DeprecationWarning)
            from ott.geometry import pointcloud
            from ott.problems.linear import linear_problem
            from ott.solvers.linear import sinkhorn as solver
    except ImportError as error:
        raise ImportError("couplings.sinkhorn needs ott-jax: pip install 'fmjax[couplings]'") from error
    x, y = _sides(x_0, x_1)
    checks.number("epsilon", epsilon, "the weight of the entropy, in the unit of the cost", least=0, above=True)
    if not isinstance(keep, tuple | list) or len(keep) != 2:
        raise ValueError(f"keep is {keep!r}, but it is two numbers, for the marginals of x_0 and of x_1: (1.0, 1.0) keeps both.")
    for side, kept in zip(("x_0", "x_1"), keep, strict=True):
        checks.number(f"keep of {side}", kept, "how strictly a marginal is kept", least=0, above=True, most=1)
    checks.whole("iterations", iterations, "how many iterations there are at most")
    checks.number("tolerance", tolerance, "the error of the marginals that is let pass", least=0, above=True)
    with jax.numpy_rank_promotion("allow"):
        # Distances are those of the points about one middle, which squares have more digits for.
        middle = (x.mean(0, keepdims=True) + y.mean(0, keepdims=True)) / 2
        points = pointcloud.PointCloud(x - middle, y - middle, epsilon=epsilon)
        problem = linear_problem.LinearProblem(points, tau_a=keep[0], tau_b=keep[1])
        found = solver.Sinkhorn(threshold=tolerance, max_iterations=iterations)(problem)
        plan, converged = found.matrix, found.converged
    if not isinstance(converged, Tracer) and not converged:
        raise ValueError(
            f"The plan has not come within {tolerance} of its marginals in {iterations} iterations: take a larger epsilon than {epsilon}, "
            "more iterations, or states of the size 1 that are finite."
        )
    return jnp.where(converged, plan, jnp.nan)


def draw(key, plan, n=None) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
    """Pairs from a plan: the noise in equal shares, as often as its row weighs, and the data by chance.

    (i, j) ~ P

    Args:
      key: a typed key.
      plan: weights of all pairs, (N, M), at least 0, in proportion to probabilities.
      n: how many pairs; None for N, where each noise of a balanced plan is drawn once.
    Returns:
      i and j, (n,) each, integers: x_0[i] goes with x_1[j]. Under `jax.jit`, where a plan is not finite, N and M, which are no examples.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if the plan is no matrix, or its weights are negative, not finite or all 0.
    """
    checks.key(key)
    plan = checks.floats("plan", plan)
    if plan.ndim != 2 or 0 in plan.shape:
        raise ValueError(f"plan has shape {plan.shape}, but it is a matrix of the weights of all pairs, (N, M).")
    n = plan.shape[0] if n is None else n
    checks.whole("n", n, "how many pairs are drawn")
    if not isinstance(plan, Tracer):
        known = np.asarray(plan)
        if not np.isfinite(known).all() or (known < 0).any() or not known.any():
            raise ValueError("plan has weights that are negative, not finite or all 0, but they are in proportion to probabilities.")
    key_i, key_j = jax.random.split(key)
    plan = plan.astype(jnp.promote_types(plan.dtype, jnp.float32))
    plan = plan / plan.max()
    rows = plan.sum(1)
    # One point in each of n equal parts of the rows' weights, all at one place of theirs.
    places = (jnp.arange(n) + jax.random.uniform(key_i)) / n
    i = jnp.searchsorted(jnp.cumsum(rows) / rows.sum(), places).clip(max=plan.shape[0] - 1)
    j = jax.random.categorical(key_j, jnp.log(plan[i]))
    # No example has the index that follows the last: what is taken there by `jnp.take(..., mode="fill")` is NaN.
    known = jnp.isfinite(rows).all()
    return jnp.where(known, i, plan.shape[0]), jnp.where(known, j, plan.shape[1])


def reflow(sampler, key, n, *, chunk, file=None, mesh=None, progress=True) -> Any:
    """Noise and its own samples, to train on again: their paths cross no more, so the field that learns them is straighter.

    Liu et al. 2022, arXiv:2209.03003.

    Args:
      sampler: (keys (chunk,), indices (chunk,)) -> a pytree of arrays (chunk, ...), as `parallel.sample` takes it: noise, its samples and
        what they were made with, `lambda keys, i: (x_0 := sampling.noise(keys, (len(i), 2)), sample(params, x_0))`.
      key: a typed key; example i's is `jax.random.fold_in(key, i)`.
      n: how many.
      chunk: how many at a time.
      file: where they are kept, `runs/reflow.npz`, and read from where it is there; None for nowhere. It is of one field: another's pairs
        have another name.
      mesh: devices to divide a chunk among; by default the one that JAX computes on.
      progress: whether to show a bar.
    Returns:
      The pytree with NumPy arrays (n, ...), on every process.
    Raises:
      TypeError: if the key is not typed.
      ValueError: if the file holds pairs of another key, number or structure; and as `parallel.sample` does.
    """
    checks.key(key)
    checks.whole("n", n, "how many pairs are made")
    checks.whole("chunk", chunk, "how many pairs are made at a time")
    if file is not None and Path(file).exists():
        return _read(Path(file), sampler, key, n, chunk)
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"file is {str(file)!r}, but there is no folder {str(Path(file).absolute().parent)!r}: make it first.")
    pairs = parallel.sample(sampler, key, n, chunk=chunk, mesh=mesh, progress=progress)
    inexact = [leaf for leaf in jax.tree.leaves(pairs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    lost = sum((~np.isfinite(leaf.reshape(n, -1).astype(np.complex128)).all(1) for leaf in inexact), np.zeros(n, bool))
    if lost.any():
        (bad,) = np.nonzero(lost)
        raise ValueError(
            f"The pairs {bad[:8].tolist()} of {n} have numbers that are not finite: nothing is kept. Look at the field and its grid."
        )
    if file is not None:
        parallel.on_first(lambda: _write(Path(file), pairs, key))
    return pairs


def _signature(pairs, key, n):
    """What a file has to agree on with a call: the names, dtypes and shapes of the leaves, and the key."""
    named = jax.tree_util.tree_leaves_with_path(pairs)
    leaves = [f"{jax.tree_util.keystr(path)} {leaf.dtype} {(n, *leaf.shape[1:])}" for path, leaf in named]
    return json.dumps([*leaves, str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()])


def _write(file, pairs, key):
    # NumPy's files do not know bfloat16: bytes, whose dtype the signature has.
    leaves: dict[str, Any] = {f"leaf_{i}": np.frombuffer(leaf.tobytes(), np.uint8) for i, leaf in enumerate(jax.tree.leaves(pairs))}
    with files.replacing(file) as part, open(part, "wb") as out:
        np.savez(out, signature=_signature(pairs, key, len(jax.tree.leaves(pairs)[0])), **leaves)


def _read(file, sampler, key, n, chunk):
    """The pairs of a file, in the structure that the sampler gives."""
    wanted = jax.eval_shape(sampler, jax.random.split(key, chunk), jnp.arange(chunk))
    leaves, structure = jax.tree.flatten(wanted)
    try:
        # NumPy leaves a file open that it cannot read.
        with open(file, "rb") as opened, np.load(opened) as kept:
            found = str(kept["signature"])
            data = [kept[f"leaf_{i}"] for i in range(len(leaves))] if found == _signature(wanted, key, n) else None
    except Exception as error:
        raise ValueError(f"{file} cannot be read as pairs ({type(error).__name__}: {error}): delete it, or name another file.") from error
    if data is None:
        raise ValueError(f"{file} holds {found}, but {_signature(wanted, key, n)} is asked for: name another file, or delete this one.")
    return structure.unflatten([part.view(leaf.dtype).reshape(n, *leaf.shape[1:]) for part, leaf in zip(data, leaves, strict=True)])
