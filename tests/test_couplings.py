"""Couplings: permutations of least cost, conditions that are never exchanged, plans with their marginals, pairs kept on disk."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fmjax import couplings, parallel, sampling
from fmjax.data import toy

KEY = jax.random.key(0)


def draw(seed, n, d=2, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d)).astype(np.float32)


def square(x, y):
    return ((x[:, None].astype(np.float64) - y[None]) ** 2).reshape(len(x), len(y), -1).sum(-1)


def cost(x, y, j):
    return ((x.astype(np.float64) - y[j]) ** 2).sum()


def least(x, y):
    return square(x, y)[linear_sum_assignment(square(x, y))].sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 3), st.integers(0, 10**6), st.booleans(), st.sampled_from([1.0, 1e-20, 1e15]))
def test_it_is_a_permutation_of_least_cost(n, d, seed, ties, scale):
    """Ties, a batch of one, and numbers whose squares float32 does not hold, too."""
    x, y = draw(seed, n, d, 3.0), draw(seed + 1, n, d)
    x, y = (np.float32(scale) * (side.round() if ties else side) for side in (x, y))
    j = couplings.optimal(x, y)
    assert sorted(j) == list(range(n))
    np.testing.assert_allclose(cost(x, y, j), least(x, y), rtol=1e-5)


def test_it_is_that_of_a_linear_program():
    import ot

    x, y = np.asarray(toy.gaussian(KEY, 512)), np.asarray(toy.eight_gaussians(jax.random.key(1), 512))
    np.testing.assert_allclose(cost(x, y, couplings.optimal(x, y)) / 512, ot.emd2([], [], square(x, y)), rtol=1e-5)


def test_any_batch_of_any_kind():
    x, y = draw(0, 12, 6), draw(1, 12, 6)
    j = couplings.optimal(x, y)
    images = lambda a: a.reshape(12, 2, 3, 1)
    trees = lambda a: {"a": jnp.asarray(a[:, :2]), "b": a[:, 2:].reshape(12, 2, 2)}
    for of in (images, trees, jnp.asarray, lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)):
        assert sorted(couplings.optimal(of(x), of(y))) == list(range(12))
    np.testing.assert_array_equal(couplings.optimal(images(x), images(y)), j)
    np.testing.assert_array_equal(couplings.optimal(trees(x), trees(y)), j)
    np.testing.assert_array_equal(jax.jit(couplings.optimal)(x, y), j)
    many = np.stack([x, y, x + 1]), np.stack([y, x, y[::-1]])
    for way in (jax.vmap(couplings.optimal), jax.jit(jax.vmap(couplings.optimal))):
        np.testing.assert_array_equal(way(*many), [couplings.optimal(*each) for each in zip(*many, strict=True)])
    assert couplings.optimal(x.astype(np.float16), y.astype(np.float16)).shape == (12,)


def test_labels_are_never_exchanged():
    x, y = draw(0, 60), draw(1, 60, shift=2.0)
    labels = np.random.default_rng(2).integers(0, 4, 60)
    j = couplings.optimal(x, y, y=labels)
    np.testing.assert_array_equal(labels[j], labels)
    assert sorted(j) == list(range(60))
    np.testing.assert_allclose(cost(x, y, j), sum(least(x[labels == label], y[labels == label]) for label in range(4)), rtol=1e-6)
    # Several: all of them together.
    both = couplings.optimal(x, y, y={"a": labels, "b": (x[:, :1] > 0)})
    np.testing.assert_array_equal(np.stack([labels, x[:, 0] > 0])[:, both], np.stack([labels, x[:, 0] > 0]))
    np.testing.assert_array_equal(jax.jit(lambda *a: couplings.optimal(*a[:2], y=a[2]))(x, y, labels), j)


@pytest.mark.parametrize("weight", [0.0, 0.5, 100.0])
def test_vectors_count_by_their_weight(weight):
    x, y, c = draw(0, 40), draw(1, 40, shift=2.0), draw(2, 40, 3)
    j = couplings.optimal(x, y, y=c, weight=weight)
    whole = square(x, y) + weight * square(x, y).mean() / square(c, c).mean() * square(c, c)
    np.testing.assert_allclose(whole[np.arange(40), j].sum(), whole[linear_sum_assignment(whole)].sum(), rtol=1e-5)
    if not weight:
        np.testing.assert_array_equal(j, couplings.optimal(x, y))
    # In other units and in a dict.
    np.testing.assert_array_equal(couplings.optimal(x, y, y={"text": 1000 * c}, weight={"text": weight}), j)
    # What is not given is of a kind of its own.
    missing = np.where(np.arange(40)[:, None] % 4 == 0, np.nan, c)
    j = couplings.optimal(x, y, y=missing, weight=weight)
    np.testing.assert_array_equal(np.isnan(missing[j]), np.isnan(missing))


def test_optimal_transport_says_the_condition_and_conditions_stop_it():
    """Of two classes left and right, plain transport gives each its side of the noise; with labels, noise is the same for both."""
    labels = np.random.default_rng(0).integers(0, 2, 1000)
    x_1 = draw(1, 1000) * 0.3 + np.stack([4.0 * labels - 2, 0 * labels], axis=1).astype(np.float32)
    x_0 = draw(2, 1000)
    plain, aware = couplings.optimal(x_0, x_1), couplings.optimal(x_0, x_1, y=labels)
    side = lambda j: [x_0[labels[j] == label, 0].mean() for label in (0, 1)]
    assert side(plain)[1] - side(plain)[0] > 1.5
    assert abs(side(aware)[1] - side(aware)[0]) < 0.2


def test_partial_is_the_least_of_all():
    x, y = draw(0, 4), draw(1, 5)
    for count in (1, 2, 3, 4):
        i, j = couplings.partial(x, y, count)
        assert len(set(i)) == len(set(j)) == count
        found = square(x, y)[i, j].sum()
        ways = itertools.product(itertools.combinations(range(4), count), itertools.permutations(range(5), count))
        np.testing.assert_allclose(found, min(square(x, y)[list(a), list(b)].sum() for a, b in ways), rtol=1e-6)
    # An outlier stays alone.
    y[2] += 100
    assert 2 not in couplings.partial(x, y, 4)[1]


def test_an_entropic_plan_has_its_marginals_and_ends_at_the_optimal_one():
    x, y = draw(0, 30), draw(1, 20, shift=1.0)
    plan = couplings.sinkhorn(x, y, 0.5, tolerance=1e-5)
    np.testing.assert_allclose(plan.sum(1), 1 / 30, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(0), 1 / 20, rtol=1e-3)
    # P = a_i b_j exp(-c / epsilon), so what is left of log P + c / epsilon without rows' and columns' means is 0.
    left = np.log(plan) + square(x, y) / 0.5
    left = left - left.mean(0) - left.mean(1, keepdims=True) + left.mean()
    np.testing.assert_allclose(left, 0, atol=1e-3)
    fine = couplings.sinkhorn(x[:20], y, 0.003, iterations=200_000)
    np.testing.assert_allclose((fine * square(x[:20], y)).sum(), least(x[:20], y) / 20, rtol=0.02)
    given_up = couplings.sinkhorn(x, y + 3, 0.5, keep=(0.5, 0.5))
    assert 1 - given_up.sum() > 0.05
    assert jnp.isnan(jax.jit(lambda x, y: couplings.sinkhorn(x, y, 1e-3, iterations=10))(x, y)).all()


def test_draws_are_those_of_the_plan():
    plan = jnp.array([[1.0, 2.0, 0.0], [0.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    i, j = couplings.draw(KEY, plan, 12_000)
    counts = np.zeros((3, 3))
    np.add.at(counts, (i, j), 1)
    # The noise in equal shares to one.
    np.testing.assert_allclose(counts.sum(1), [3000, 6000, 3000], atol=1)
    np.testing.assert_allclose(counts / 1000, plan, atol=0.15)
    once, _ = couplings.draw(KEY, couplings.sinkhorn(draw(0, 64), draw(1, 64), 1.0))
    np.testing.assert_array_equal(once, np.arange(64))
    np.testing.assert_array_equal(np.sort(couplings.independent(KEY, 9)), np.arange(9))


def test_pairs_are_kept_and_read(tmp_path, monkeypatch):
    def sampler(keys, i):
        x_0 = sampling.noise(keys, (len(i), 2))
        return {"x_0": x_0, "x_1": 2 * x_0, "label": i % 3}

    file = tmp_path / "pairs.npz"
    made = couplings.reflow(sampler, KEY, 10, chunk=4, file=file, progress=False)
    assert made["x_0"].shape == (10, 2)
    np.testing.assert_allclose(made["x_1"], 2 * made["x_0"])
    np.testing.assert_array_equal(made["label"], np.arange(10) % 3)
    monkeypatch.setattr(parallel, "sample", lambda *a, **k: pytest.fail("it was drawn again"))
    jax.tree.map(np.testing.assert_array_equal, couplings.reflow(sampler, KEY, 10, chunk=4, file=file), made)
    other = lambda keys, i: {"x_1": sampler(keys, i)["x_0"], "a_0": sampler(keys, i)["x_1"], "label": i}
    half = lambda keys, i: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), sampler(keys, i))
    for wrong in ({"key": jax.random.key(1)}, {"key": jax.random.key(0, impl="rbg")}, {"n": 11}, {"sampler": other}, {"sampler": half}):
        arguments = {"sampler": sampler, "key": KEY, "n": 10} | wrong
        with pytest.raises(ValueError, match=r"pairs.npz holds .* is asked for: name another file"):
            couplings.reflow(**arguments, chunk=4, file=file)
    content = file.read_bytes()
    for damaged in (b"", content[:200], b"words", content.replace(b"signature", b"signaturX")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pairs.npz cannot be read as pairs .*: delete it"):
            couplings.reflow(sampler, KEY, 10, chunk=4, file=file)
    monkeypatch.undo()
    brain = lambda keys, i: sampling.noise(keys, (len(i), 2)).astype(jnp.bfloat16)
    made, read = (couplings.reflow(brain, KEY, 6, chunk=3, file=tmp_path / "half.npz", progress=False) for _ in range(2))
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, made)
    with pytest.raises(ValueError, match="there is no folder"):
        couplings.reflow(sampler, KEY, 10, chunk=4, file=tmp_path / "none" / "pairs.npz")
    with pytest.raises(ValueError, match=r"The pairs \[3\] of 10 have numbers that are not finite"):
        couplings.reflow(lambda keys, i: jnp.where(i == 3, jnp.nan, 0.0), KEY, 10, chunk=5, progress=False)


def test_it_is_known_in_any_transformation():
    """Of a part of the arguments too; its indices have no derivative."""
    x, y = jnp.asarray(draw(0, 16)), jnp.asarray(draw(1, 16))
    j, labels = couplings.optimal(x, y), np.arange(16) % 2
    loss = lambda scale: ((x - (scale * y)[couplings.optimal(x, scale * y)]) ** 2).sum()
    np.testing.assert_allclose(jax.grad(loss)(1.0), (-2 * (x - y[j]) * y[j]).sum(), rtol=1e-4)
    np.testing.assert_array_equal(jax.vmap(couplings.optimal, (None, 0))(x, y[None]), j[None])
    aware = couplings.optimal(x, y, y=labels)
    np.testing.assert_array_equal(jax.vmap(lambda each: couplings.optimal(x, y, y=each))(labels[None])[0], aware)
    np.testing.assert_array_equal(couplings.optimal(x, y, y=labels * 2**40), aware)
    np.testing.assert_array_equal(couplings.optimal(x, y, y=np.int32(labels * 256)), aware)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.jit(lambda c: couplings.optimal(x, y, y=c))(jnp.asarray(labels * 2**40)), aware)


def test_many_calls_on_many_devices_wait_for_nothing():
    """The callback does nothing of JAX's, which would wait for programs that wait for it."""
    mesh = parallel.mesh()
    x, y = jax.device_put((draw(0, 64, 3), draw(1, 64, 3)), parallel.batch_sharding(mesh))
    pair = jax.jit(lambda x, y: y[couplings.optimal(x, y)])
    ends = [pair(x, y) for _ in range(60)]
    np.testing.assert_array_equal(ends[-1], np.asarray(y)[couplings.optimal(np.asarray(x), np.asarray(y))])


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_weight_counts_at_any_scale(scale):
    x, y, c = draw(0, 20), draw(1, 20), draw(2, 20, 3)
    wanted = couplings.optimal(x, y, y=c, weight=5.0)
    np.testing.assert_array_equal(couplings.optimal(x, y, y=np.float32(scale) * c, weight=5.0), wanted)
    np.testing.assert_array_equal(couplings.optimal(np.float32(scale) * x, np.float32(scale) * y, y=c, weight=5.0), wanted)


def test_plans_far_away_and_in_half_precision():
    x, y = draw(0, 20), draw(1, 20)
    near = couplings.sinkhorn(x, y, 1.0, tolerance=1e-5)
    np.testing.assert_allclose(couplings.sinkhorn(x + 1e3, y + 1e3, 1.0, tolerance=1e-5), near, rtol=0.02, atol=1e-6)
    i, _ = couplings.draw(KEY, jnp.ones((512, 512), jnp.float16))
    np.testing.assert_array_equal(i, np.arange(512))
    i, j = jax.jit(couplings.draw)(KEY, jnp.full((3, 4), jnp.nan))
    assert (i == 3).all()
    assert (j == 4).all()


BAD = draw(0, 12)
BAD[[3, 7], 1] = np.nan


@pytest.mark.parametrize(
    ("call", "said"),
    {
        "sizes": (
            lambda x: couplings.optimal(x, x[:5]),
            r"x_0 has shape \(12, 2\) and x_1 \(5, 2\), but every example is used once: .*partial",
        ),
        "examples": (lambda x: couplings.optimal(x, x[:, :1]), r"x_0 has examples of shape \(2,\) and x_1 of \(1,\)"),
        "nan": (lambda x: couplings.optimal(x, BAD), r"x_1 has numbers that are not finite in the examples \[3, 7\]"),
        "inf": (lambda x: couplings.optimal(x / 0, x), r"x_0 has numbers that are not finite in the examples \[0, 1, .* and 4 more"),
        "no weight": (lambda x: couplings.optimal(x, x, y=x), "y is of floats and has no weight"),
        "no weight of one": (lambda x: couplings.optimal(x, x, y={"a": x}, weight={}), r"y\['a'\] is of floats and has no weight"),
        "a weight for labels": (lambda x: couplings.optimal(x, x, y=np.arange(12), weight=1.0), "weight is 1.0, but it is of vectors"),
        "a weight for none": (lambda x: couplings.optimal(x, x, y={"a": x}, weight={"a": 1.0, "b": 1.0}), "of which y has none so named"),
        "a negative weight": (lambda x: couplings.optimal(x, x, y=x, weight=-1.0), "The weight of y is -1.0"),
        "infinite conditions": (lambda x: couplings.optimal(x, x, y=x / (np.arange(12)[:, None] != 4), weight=1.0), r"y has .* \[4\]"),
        "two to keep": (lambda x: couplings.sinkhorn(x, x, 1.0, keep=0.5), "keep is 0.5, but it is two numbers"),
        "conditions": (lambda x: couplings.optimal(x, x, y=np.arange(5)), r"y has shape \(5,\), but there is a condition for each example"),
        "words": (lambda x: couplings.optimal(x, x, y=np.array(["a"] * 12)), "y has dtype <U1, but conditions are integers"),
        "integers": (lambda x: couplings.optimal(np.arange(12)[:, None], x[:, :1]), "x_0 has dtype int"),
        "too many": (lambda x: couplings.partial(x, x[:5], 6), "count is 6, but there are 12 and 5 examples"),
        "partial nan": (lambda x: couplings.partial(x, BAD, 2), r"x_1 has .* \[3, 7\]"),
        "epsilon": (lambda x: couplings.sinkhorn(x, x, 0.0), "epsilon is 0.0"),
        "keep": (lambda x: couplings.sinkhorn(x, x, 1.0, keep=(1.0, 1.5)), "keep of x_1 is 1.5"),
        "iterations": (lambda x: couplings.sinkhorn(x, x + 5, 1e-4, iterations=20), "not come within 0.001 of its marginals in 20"),
        "a plan": (lambda x: couplings.draw(KEY, x[0]), r"plan has shape \(2,\)"),
        "a plan of 0": (lambda x: couplings.draw(KEY, 0 * x), "plan has weights that are negative, not finite or all 0"),
        "a raw key": (lambda x: couplings.draw(jax.random.PRNGKey(0), jnp.ones((2, 2))), "typed"),
    }.values(),
    ids=lambda value: "" if callable(value) else value[:30],
)
def test_wrong_calls_are_named(call, said):
    with np.errstate(all="ignore"), pytest.raises((TypeError, ValueError), match=said):
        call(draw(5, 12))


def test_a_nan_inside_jit_is_named_too():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"x_1 has numbers that are not finite in the examples \[3, 7\]"):
        jax.block_until_ready(jax.jit(couplings.optimal)(draw(1, 12), BAD))


def test_two_processes_pair_the_global_batch_as_one_does(tmp_path):
    """Each holds half of the noise and of the data; the permutation is that of all."""
    x_0, x_1, y = draw(0, 24), draw(1, 24), np.arange(24, dtype=np.int32) % 3
    np.savez(tmp_path / "given.npz", x_0=x_0, x_1=x_1, y=y)
    processes.two(Path(__file__).with_name("coupled.py"), tmp_path)
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as found:
            np.testing.assert_array_equal(found["plain"], couplings.optimal(x_0, x_1))
            np.testing.assert_array_equal(found["labels"], couplings.optimal(x_0, x_1, y=y))
