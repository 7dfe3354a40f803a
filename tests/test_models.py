"""Networks: shapes, the start at zero, independence of examples, types, and sizes against the paper's layers."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.models import dit, layers, mlp

# The generator and the optimisation that compile fastest.
KEY = jax.random.key(0, impl="unsafe_rbg")
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLASSES = 5
B = 3
X = jax.random.normal(KEY, (B, 8, 6, 2))
T = jnp.array([0.0, 0.4, 1.0])
Y = jnp.array([1, 4, CLASSES])
NETWORKS = {
    "mlp": mlp.MLP(width=16, depth=2, classes=CLASSES),
    "dit": dit.DiT(patch=2, width=8, depth=2, heads=2, classes=CLASSES),
}
WITHOUT_CLASSES = {name: model.clone(classes=None) for name, model in NETWORKS.items()}
every_network = pytest.mark.parametrize("name", NETWORKS)


def shapes(model, *inputs):
    return jax.eval_shape(model.init, KEY, *inputs)


def random_parameters(model, *inputs):
    """Away from the zeros of the start, and without compiling it."""
    leaves, tree = jax.tree.flatten(shapes(model, *inputs))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


@pytest.fixture(scope="module")
def applied():
    """Parameters of each network with classes, and its compiled application."""
    return {name: (random_parameters(model, X, T, Y), quick_jit(model.apply)) for name, model in NETWORKS.items()}


def relative(one, other):
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@every_network
def test_output_is_like_x(applied, name):
    params, apply = applied[name]
    out = apply(params, X, T, Y)
    assert out.shape == X.shape
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert out.std() > 0.01


@every_network
def test_parameters_are_float32(name):
    chex.assert_type(jax.tree.leaves(shapes(NETWORKS[name], X, T, Y)), jnp.float32)


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2), (4, 2, 2, 1), (1, 7)])
def test_mlp_takes_points_of_any_shape(shape):
    model = WITHOUT_CLASSES["mlp"]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, variables = jax.eval_shape(lambda x: model.init_with_output(KEY, x, 0.5), x)
    assert out.shape == shape
    features = math.prod(shape[1:])
    assert variables["params"]["Dense_0"]["kernel"].shape == (features + 1, 16)


def test_mlp_by_hand():
    model = mlp.MLP(width=4, depth=2, activation=jnp.tanh)
    x, t = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), np.array([0.1, 0.9], np.float32)
    params = random_parameters(model, x, t)
    h = np.concatenate([t[:, None], x], axis=1)
    for i in range(3):
        layer = params["params"][f"Dense_{i}"]
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])[None]
        h = np.tanh(h) if i < 2 else h
    np.testing.assert_allclose(model.apply(params, x, t), h, rtol=1e-4)


def test_dit_starts_at_zero():
    model = NETWORKS["dit"].clone(scan=True)
    out, params = quick_jit(model.init_with_output)(KEY, X, T, Y)
    np.testing.assert_array_equal(out, np.zeros_like(X))
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    zero = {name for name, leaf in flat.items() if not np.any(leaf)}
    assert zero == {"blocks/Dense_0/kernel", "last/kernel", "last_modulation/kernel"} | {name for name in flat if name.endswith("bias")}
    np.testing.assert_allclose(np.std(flat["label/embedding"]), 0.02, rtol=0.4)
    # Each layer draws its own.
    kernel = flat["blocks/Attention_0/Dense_0/kernel"]
    assert kernel.shape == (2, 8, 24)
    assert not np.isclose(kernel[0], kernel[1]).any()


def gradient_of(model, params):
    """The output, and the gradients of its square."""

    def loss(params):
        out = model.apply(params, X, T, Y)
        return (out**2).sum(), out

    grads, out = quick_jit(jax.grad(loss, has_aux=True))(params)
    return out, grads


@pytest.fixture(scope="module")
def gradients(applied):
    return {name: gradient_of(NETWORKS[name], params) for name, (params, _) in applied.items()}


@every_network
def test_gradients_reach_every_parameter(gradients, name):
    _, grads = gradients[name]
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        if path.endswith("embedding"):
            # The rows of the labels in the batch, and no others.
            np.testing.assert_array_equal(np.abs(grad).sum(1) > 0, np.isin(np.arange(CLASSES + 1), Y))
        else:
            assert (np.abs(grad) > 0).mean() > 0.5, path


@every_network
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31 - 1))
def test_examples_do_not_meet(applied, name, seed):
    params, apply = applied[name]
    rng = np.random.default_rng(seed)
    mates = rng.normal(size=X.shape).astype(np.float32)
    t, y = rng.uniform(size=B).astype(np.float32), rng.integers(0, CLASSES + 1, B)
    place = seed % B
    x = mates.copy()
    x[place], t[place], y[place] = X[0], T[0], Y[0]
    np.testing.assert_allclose(apply(params, x, t, y)[place], apply(params, X, T, Y)[0], rtol=2e-4, atol=2e-5)


@every_network
def test_output_depends_on_each_input(applied, name):
    params, apply = applied[name]
    out = apply(params, X, T, Y)
    for other in (apply(params, X + 0.1, T, Y), apply(params, X, T + 0.01, Y), apply(params, X, T, (Y + 1) % CLASSES)):
        assert (np.abs(other - out).reshape(B, -1).max(1) > 1e-4).all()


@every_network
def test_one_time_for_all(applied, name):
    params, apply = applied[name]
    if name == "mlp":
        np.testing.assert_allclose(apply(params, X, 0.3, Y), apply(params, X, jnp.full((B,), 0.3), Y), rtol=1e-5, atol=1e-6)
    for t in (0.3, 1, np.float32(0.3), jnp.float32(0.3)):
        assert jax.eval_shape(lambda t=t: NETWORKS[name].apply(params, X, t, Y)).shape == X.shape


@every_network
@pytest.mark.parametrize("shape", [(1,), (B + 1,), (B, 1), (1, B)])
def test_times_of_another_shape(name, shape):
    with pytest.raises(ValueError, match="t has shape") as caught:
        shapes(NETWORKS[name], X, jnp.zeros(shape), Y)
    assert str(shape) in str(caught.value)
    assert str((B,)) in str(caught.value)


@every_network
@pytest.mark.parametrize("y", [None, jnp.zeros((), jnp.int32), jnp.zeros(B + 1, jnp.int32), jnp.zeros((B, 1), jnp.int32)])
def test_labels_missing_or_of_another_shape(name, y):
    with pytest.raises(ValueError, match="needs one label an example") as caught:
        shapes(NETWORKS[name], X, T, y)
    assert ("none" if y is None else str(y.shape)) in str(caught.value)


@every_network
def test_labels_that_are_not_integers(name):
    with pytest.raises(TypeError, match="float32"):
        shapes(NETWORKS[name], X, T, Y.astype(jnp.float32))
    with pytest.raises(TypeError, match="bool"):
        shapes(NETWORKS[name], X, T, Y > 0)


@every_network
def test_labels_out_of_range_in_a_program(applied, name):
    # The wrong example is nan, and its batch mates are right.
    params, apply = applied[name]
    right = apply(params, X, T, Y)
    for label in (-1, CLASSES + 1, 1000):
        out = apply(params, X, T, Y.at[1].set(label))
        assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(np.asarray(out)[[0, 2]], np.asarray(right)[[0, 2]])


@pytest.mark.parametrize("label", [-1, CLASSES + 1, 1000])
def test_labels_out_of_range(applied, label):
    params, _ = applied["mlp"]
    with pytest.raises(ValueError, match=f"label {label} is out of range"):
        NETWORKS["mlp"].apply(params, X, T, np.array([0, label, 1]))


def test_label_rows():
    table = jnp.arange(12.0).reshape(6, 2)
    out = layers.LabelEmbedding(5, 2).apply({"params": {"embedding": table}}, jnp.array([0, 5, 2]))
    np.testing.assert_array_equal(out, table[jnp.array([0, 5, 2])])


@pytest.mark.parametrize("name", WITHOUT_CLASSES)
def test_without_classes_there_is_no_table(name):
    paths = traverse_util.flatten_dict(shapes(WITHOUT_CLASSES[name], X, T)["params"], sep="/")
    assert not any("embedding" in path for path in paths)


@pytest.mark.parametrize("shape", [(B, 7, 6, 2), (B, 8, 5, 2)])
def test_images_that_do_not_divide(shape):
    with pytest.raises(ValueError, match="does not divide into patches of 2 x 2") as caught:
        shapes(NETWORKS["dit"], jnp.zeros(shape), T, Y)
    assert f"{shape[1]} x {shape[2]}" in str(caught.value)


@pytest.mark.parametrize("shape", [(B, 8), (B, 8, 6), (B, 1, 8, 6, 2)])
def test_dit_takes_images(shape):
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        shapes(NETWORKS["dit"], jnp.zeros(shape), T, Y)


@pytest.mark.parametrize(("width", "heads"), [(10, 2), (12, 5), (6, 3)])
def test_dit_widths(width, heads):
    with pytest.raises(ValueError, match=f"width {width} must be a multiple"):
        shapes(NETWORKS["dit"].clone(width=width, heads=heads), X, T, Y)


def stack(params, depth):
    """The parameters of a scanned DiT, from those of its twin."""
    blocks = [params["params"][f"block_{i}"] for i in range(depth)]
    rest = {name: value for name, value in params["params"].items() if not name.startswith("block_")}
    return {"params": rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def test_remat_and_scan_change_no_gradient(applied, gradients):
    params, (out, grads) = stack(applied["dit"][0], 2), gradients["dit"]
    model = NETWORKS["dit"].clone(remat=True, scan=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes(model, X, T, Y), jax.eval_shape(lambda: params))
    again, again_grads = gradient_of(model, params)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(again_grads), jax.tree.leaves(stack(grads, 2)), strict=True):
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize(("remat", "scan", "times"), [(False, False, 0), (True, False, 2), (True, True, 1)])
def test_remat_is_one_a_block(applied, remat, scan, times):
    model, params = NETWORKS["dit"].clone(remat=remat, scan=scan), applied["dit"][0]
    program = jax.make_jaxpr(model.apply)(stack(params, 2) if scan else params, X, T, Y)
    assert str(program).count("prevent_cse") == times
    assert str(program).count(f"prevent_cse={not scan}") == times


def test_half_precision(applied):
    params, apply = applied["dit"]
    model = NETWORKS["dit"].clone(dtype=jnp.bfloat16, scan=True)
    chex.assert_type(jax.tree.leaves(shapes(model, X, T, Y)), jnp.float32)
    # Small weights, as networks have them.
    params = jax.tree.map(lambda leaf: leaf / 2, params)
    out = quick_jit(model.apply)(stack(params, 2), X, T, Y)
    assert out.dtype == X.dtype
    assert 0 < relative(out, apply(params, X, T, Y)) < 2e-2


def test_dropout_needs_its_key_and_is_off_by_default():
    model = WITHOUT_CLASSES["dit"].clone(depth=1, dropout=0.5, remat=True)
    params = random_parameters(model, X, T)
    draw = quick_jit(lambda params, key: model.apply(params, X, T, None, False, rngs={"dropout": key}))
    one, again, other = draw(params, KEY), draw(params, KEY), draw(params, jax.random.split(KEY)[0])
    np.testing.assert_array_equal(one, again)
    assert relative(other, one) > 1e-2
    # Without a key there is no dropout: the default asks for none.
    assert jax.eval_shape(model.apply, params, X, T).shape == X.shape
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        jax.eval_shape(lambda params: model.apply(params, X, T, None, False), params)


def paper_parameters(size, classes, channels, patch, width, depth):
    """The layers of Peebles and Xie (2023), counted: kernels and biases, positions are fixed."""

    def dense(inputs, outputs):
        return inputs * outputs + outputs

    attention = dense(width, 3 * width) + dense(width, width)
    perceptron = dense(width, 4 * width) + dense(4 * width, width)
    block = attention + perceptron + dense(width, 6 * width)
    embeddings = dense(patch**2 * channels, width) + dense(256, width) + dense(width, width) + (classes + 1) * width
    return embeddings + depth * block + dense(width, 2 * width) + dense(width, patch**2 * channels)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
    ids=["S/2", "B/2", "L/2", "XL/2"],
)
def test_published_sizes(width, depth, heads, millions):
    model = dit.DiT(patch=2, width=width, depth=depth, heads=heads, classes=1000, scan=True)
    variables = shapes(model, jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), 0.5, jnp.zeros(1, jnp.int32))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert count == paper_parameters(32, 1000, 4, 2, width, depth)
    # The paper's Table 4, which counts a doubled output as well: within one percent.
    np.testing.assert_allclose(count / 1e6, millions, rtol=0.01)


def test_patches_stay_in_their_places():
    # With the blocks' gates at zero, each patch of the output comes from that patch of the input.
    model = WITHOUT_CLASSES["dit"].clone(depth=1)
    params = random_parameters(model, X, T)
    params["params"]["block_0"]["Dense_0"] = jax.tree.map(jnp.zeros_like, params["params"]["block_0"]["Dense_0"])
    apply = quick_jit(model.apply)
    moved = np.asarray(X).copy()
    moved[:, 2:4, 4:6] += 1
    changed = np.abs(apply(params, moved, T) - apply(params, X, T)).max((0, 3)) > 1e-5
    expected = np.zeros((8, 6), bool)
    expected[2:4, 4:6] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize(("height", "width", "features"), [(2, 3, 8), (4, 4, 4), (1, 5, 12)])
def test_grid_positions(height, width, features):
    positions = layers.grid_positions(height, width, features)
    quarter = features // 4
    assert positions.shape == (1, height * width, features)
    assert positions.dtype == np.float32
    for row in range(height):
        for column in range(width):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            np.testing.assert_allclose(positions[0, row * width + column], expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0, 1000, width=32), min_size=3, max_size=3))
def test_sinusoids(times):
    out = layers.sinusoids(jnp.array(times, jnp.float32), 8)
    angles = [[t * 10_000 ** (-i / 4) for i in range(4)] for t in times]
    # A float32 phase of 1,000 is known within 6e-5.
    np.testing.assert_allclose(out, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=3e-4)


def test_time_embedding():
    model = layers.TimeEmbedding(width=4, frequencies=6, scale=1000.0)
    t = jnp.array([0.0, 0.123, 1.0])
    params = jax.tree.map(lambda leaf: 3 * leaf, random_parameters(model, t))
    first, second = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"][f"Dense_{i}"]) for i in range(2))
    h = np.asarray(layers.sinusoids(1000 * t, 6)) @ first["kernel"] + first["bias"][None]
    h = h / (1 + np.exp(-h)) @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(quick_jit(model.apply)(params, t), h, rtol=1e-4, atol=1e-5)


def test_batch_times():
    x = jnp.zeros((3, 2))
    for t in (0.5, 1, np.float32(0.5), jnp.array(0.5), jnp.array([0.0, 0.5, 1.0])):
        out = layers.batch_times(t, x)
        assert out.shape == (3,)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, np.broadcast_to(t, 3))
