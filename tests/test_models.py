"""Networks: shapes, the start at zero, independence of examples, types, and sizes against the paper's layers."""

import functools
import math
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, traverse_util
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import train_step
from fmjax import guidance, sampling
from fmjax.models import dit, layers, mlp, unet

# The generator that compiles fastest.
KEY = jax.random.key(0, impl="unsafe_rbg")
CLASSES = 5
B = 3
X = jax.random.normal(KEY, (B, 8, 6, 2))
T = jnp.array([0.0, 0.4, 1.0])
Y = jnp.array([1, 4, CLASSES])
NETWORKS = {
    "mlp": mlp.MLP(hidden_size=16, depth=2, num_classes=CLASSES),
    "dit": dit.DiT(patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=CLASSES),
    "modern": dit.DiT(
        patch_size=2,
        hidden_size=8,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        time_embedding=layers.LearnableFourier(4),
        norm=layers.RMSNorm,
        qk_norm=layers.RMSNorm,
        mlp_layer=dit.SwiGLU,
        rotary=True,
        bottleneck=4,
        register_tokens=1,
        class_tokens=2,
        context_start=1,
    ),
    "unet": unet.UNet(
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        head_dim=4,
        groups=4,
        dropout=0.0,
        num_classes=CLASSES,
    ),
    "adm": unet.UNet(
        model_channels=8,
        channel_mult=(1, 1.5),
        num_res_blocks=1,
        attention_resolutions=(1,),
        head_dim=None,
        num_heads=2,
        groups=4,
        dropout=0.0,
        num_classes=CLASSES,
        scale_shift_norm=True,
        resblock_updown=True,
        time_embedding=layers.Fourier(4),
    ),
}
PATCHED, HALVED = ("dit", "modern"), ("unet", "adm")
IMAGES = PATCHED + HALVED
ONE_OF_EACH = ("dit", "modern", "adm")
WITHOUT_CLASSES = {
    name: model.clone(num_classes=None, **({"class_tokens": 0} if name == "modern" else {})) for name, model in NETWORKS.items()
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def shapes(model, *inputs):
    return jax.eval_shape(model.init, KEY, *inputs)


def random_parameters(model, *inputs):
    """Away from the zeros of the start, and without compiling it."""
    leaves, tree = jax.tree.flatten(shapes(model, *inputs))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


class Lazy(dict):
    """A value a network, made when it is first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


@pytest.fixture(scope="module")
def applied():
    """Parameters of each network with classes, and its compiled application."""
    return Lazy(lambda name: (random_parameters(NETWORKS[name], X, T, Y), jax.jit(NETWORKS[name].apply)))


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
    model = mlp.MLP(hidden_size=4, depth=2, activation=jnp.tanh)
    x, t = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), np.array([0.1, 0.9], np.float32)
    params = random_parameters(model, x, t)
    h = np.concatenate([t[:, None], x], axis=1)
    for i in range(3):
        layer = params["params"][f"Dense_{i}"]
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])[None]
        h = np.tanh(h) if i < 2 else h
    np.testing.assert_allclose(model.apply(params, x, t), h, rtol=1e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_images_start_at_zero(applied, name):
    params = jax.jit(NETWORKS[name].init)(KEY, X, T, Y)
    np.testing.assert_array_equal(applied[name][1](params, X, T, Y), np.zeros_like(X))
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    zero = {leaf for leaf, value in flat.items() if not np.any(value) and not leaf.endswith("bias")}
    if name in PATCHED:
        assert zero == {f"block_{i}/modulation/kernel" for i in range(2)} | {"last/kernel", "last_modulation/kernel"}
    else:
        assert zero == {leaf for leaf in flat if leaf.endswith(("conv_out/kernel", "attention/out/kernel"))} | {"out/kernel"}
    assert not any(np.any(value) for leaf, value in flat.items() if leaf.endswith("bias"))
    np.testing.assert_allclose(np.std(flat["label/embedding"]), 0.02, rtol=0.4)


def test_scanned_layers_draw_their_own():
    params = jax.jit(NETWORKS["dit"].clone(scan=True).init)(KEY, X, T, Y)["params"]
    kernel = params["blocks_0_1"]["attention"]["Dense_0"]["kernel"]
    assert kernel.shape == (2, 8, 24)
    assert not np.isclose(kernel[0], kernel[1]).any()


def gradient_of(model, params):
    """The output, and the gradients of its square."""

    def loss(params):
        out = model.apply(params, X, T, Y)
        return (out**2).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return out, grads


@pytest.fixture(scope="module")
def gradients(applied):
    return Lazy(lambda name: gradient_of(NETWORKS[name], applied[name][0]))


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
    with pytest.raises(ValueError, match="needs one label per example") as caught:
        shapes(NETWORKS[name], X, T, y)
    assert ("none" if y is None else str(y.shape)) in str(caught.value)


@every_network
def test_labels_for_a_network_without_classes(name):
    """It has no null label, so it cannot be guided, and does not do as if it could."""
    plain = WITHOUT_CLASSES[name]
    with pytest.raises(ValueError, match=r"y has shape \(\d+,\), but this network was made without classes and has no null label"):
        shapes(plain, X, T, Y)
    guided = guidance.classifier_free(lambda x, t, y: plain.apply({}, x, t, y), Y, CLASSES, 3.0)
    with pytest.raises(ValueError, match="it cannot be guided"):
        sampling.sample_ode(guided, X, jnp.linspace(0, 1, 3))


def test_kernels_are_drawn_as_matrices():
    """The numbers of a kernel and of the matrix are the same, and so is the spread where it goes by the matrix's sides."""
    key, shape = jax.random.key(3), (3, 3, 4, 5)
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    np.testing.assert_array_equal(layers.as_matrix(uniform)(key, shape), uniform(key, shape))
    by_patch = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3)
    np.testing.assert_array_equal(layers.as_matrix(nn.initializers.xavier_uniform())(key, shape), by_patch(key, shape))


def test_a_null_label_that_is_none():
    """Labels that are known are looked at in a sampler's loop too."""
    model = mlp.MLP(hidden_size=4, depth=1, num_classes=CLASSES)
    params = random_parameters(model, jnp.zeros((3, 2)), 0.5, jnp.zeros(3, int))
    guided = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), jnp.arange(3), CLASSES + 1, 3.0)
    with pytest.raises(ValueError, match=f"label {CLASSES + 1} is out of range: .* {CLASSES} means no class"):
        sampling.sample_ode(guided, jnp.zeros((3, 2)), jnp.linspace(0, 1, 3))


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
    assert not any("label" in path or "LabelEmbedding" in path for path in paths)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(B, 7, 6, 2), (B, 8, 5, 2)])
def test_images_that_do_not_divide(name, shape):
    with pytest.raises(ValueError, match=r"does not divide into patches of 2 x 2|cannot be halved 1 times.*multiples of 2") as caught:
        shapes(NETWORKS[name], jnp.zeros(shape), T, Y)
    assert f"{shape[1]} x {shape[2]}" in str(caught.value)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(B,), (B, 8), (B, 1, 2, 8, 6, 2)])
def test_networks_of_images_take_one_to_three_axes(name, shape):
    with pytest.raises(ValueError, match=r"\(B, T, C\), images, \(B, H, W, C\), or volumes"):
        shapes(NETWORKS[name], jnp.zeros(shape), T, Y)


# A checksum of names and shapes, and one of an output: of the code that knew images alone.
FIRST_NUMBERS = {
    "mlp": (2653942388, 13.751615160127322),
    "dit": (3512435957, -0.6828135944063236),
    "modern": (2477775347, -1.1097634932477858),
    "unet": (961470542, 4.968195380254287),
    "adm": (3354288977, -2.327776598212994),
}


@every_network
def test_images_keep_their_parameters_and_numbers(applied, name):
    """Published weights and checkpoints rely on them."""
    params, apply = applied[name]
    listed = sorted((path, leaf.shape) for path, leaf in traverse_util.flatten_dict(params["params"], sep="/").items())
    x = np.sin(np.arange(X.size, dtype=np.float32)).reshape(X.shape)
    out = np.asarray(apply(params, x, T, Y), np.float64)
    numbers = zlib.crc32(str(listed).encode()), (out * np.cos(np.arange(out.size)).reshape(out.shape)).sum()
    np.testing.assert_allclose(numbers, FIRST_NUMBERS[name], rtol=1e-3)
    assert numbers[0] == FIRST_NUMBERS[name][0]


@pytest.mark.parametrize(("name", "total"), [("mlp", 505.97953394267824), ("dit", 377.112488904002)])
def test_images_keep_their_first_values(name, total):
    params = jax.jit(NETWORKS[name].init)(jax.random.key(0), X, T, Y)
    np.testing.assert_allclose(sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(params)), total, rtol=1e-6)


SEQUENCE, VOLUME = (B, 8, 2), (B, 4, 2, 4, 2)


@pytest.mark.parametrize(
    ("name", "shape", "fields"),
    [
        ("dit", SEQUENCE, {}),
        ("unet", SEQUENCE, {}),
        ("modern", VOLUME, dict(hidden_size=16, depth=1, context_start=0, time_embedding=layers.Sinusoids(4))),
        ("adm", VOLUME, {}),
    ],
)
def test_sequences_and_volumes(name, shape, fields):
    """Kernels have as many sides as x has axes; gradients reach every parameter, and the last layer's first value makes the output zero."""
    model = NETWORKS[name].clone(**fields)
    x = jax.random.normal(KEY, shape)
    params = random_parameters(model, x, T, Y)["params"]
    kernel = params["patches"]["Conv_0"]["kernel"] if name == "dit" else params["in"]["kernel"] if name in HALVED else None
    assert kernel is None or kernel.shape[:-2] == (2 if name in PATCHED else 3,) * (len(shape) - 2)

    def loss(params):
        out = model.apply({"params": params}, x, T, Y)
        return (out**2).sum(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, out = gradient(params)
    assert out.shape == shape
    assert out.std() > 0.01
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad) > 0).mean() > 0.3, path
    last = "last" if name in PATCHED else "out"
    _, first = gradient(params | {last: jax.tree.map(jnp.zeros_like, params[last])})
    np.testing.assert_array_equal(first, np.zeros(shape))


@pytest.mark.parametrize("name", ["dit", "adm"])
@pytest.mark.parametrize(("shape", "said"), [((B, 7, 2), "7"), ((B, 4, 3, 4, 2), "4 x 3 x 4")])
def test_sequences_and_volumes_that_do_not_divide(name, shape, said):
    with pytest.raises(ValueError, match=rf"x of {said} positions (does not divide into patches|cannot be halved)"):
        shapes(NETWORKS[name], jnp.zeros(shape), T, Y)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_sequence_is_an_image_of_one_row(monkeypatch, name):
    """By a U-Net whose kernels see their middle row alone, and by a transformer without positions."""
    monkeypatch.setattr(layers, "grid_positions", lambda *shape: np.zeros((1, math.prod(shape[:-1]), shape[-1]), np.float32))
    fields = dict(patch_size=1, depth=1) if name == "dit" else dict(channel_mult=(1,), attention_resolutions=(1,))
    model = WITHOUT_CLASSES[name].clone(**fields)
    x = jax.random.normal(KEY, (B, 6, 2))
    params = random_parameters(model, x[:, None], T)
    middle = jax.tree.map(lambda leaf: leaf[len(leaf) // 2] if leaf.ndim == 4 else leaf, params)
    image = jax.jit(model.apply)(params, x[:, None], T)[:, 0]
    np.testing.assert_allclose(jax.jit(lambda params: model.apply(params, x, T))(middle), image, rtol=1e-4, atol=1e-5)


def modern(depth=2, **fields):
    return NETWORKS["modern"].clone(depth=depth, time_embedding=layers.Sinusoids(4), **fields)


@pytest.fixture(scope="module")
def padded():
    """An image in the corner of a larger one with nan around it, its mask, parameters, and the network without the padding."""
    model = modern()
    params = random_parameters(model, X, T, Y)
    mask = np.zeros((B, 10, 8), bool)
    mask[:, :8, :6] = True
    x = np.full((B, 10, 8, 2), np.nan, np.float32)
    x[:, :8, :6] = X
    return x, mask, params, jax.jit(model.apply)(params, X, T, Y)


@pytest.mark.parametrize("patches", [False, True], ids=["positions", "patches"])
def test_padding_changes_nothing(padded, patches):
    """A network that attends, with rotary positions and tokens before the patches; the padding is nan, and its output 0."""
    x, mask, params, expected = padded
    given = mask[:, ::2, ::2] if patches else mask
    model = modern()

    def loss(params, x):
        out = model.apply(params, x, T, Y, mask=given)
        return (out**2).sum(), out

    (grads, grad_x), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(out[:, :8, :6], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.where(mask[..., None], 0, out), np.zeros_like(x))
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert np.abs(grad_x[:, :8, :6]).min() > 0
    np.testing.assert_array_equal(np.where(mask[..., None], 0, grad_x), np.zeros_like(x))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_take_masks(padded, remat):
    x, mask, params, expected = padded
    out = jax.jit(lambda params: modern(scan=True, remat=remat).apply(params, x, T, Y, mask=mask))(dit.stack(params, 1))
    np.testing.assert_allclose(out[:, :8, :6], expected, rtol=1e-4, atol=1e-5)


def test_masks_per_example():
    """Sequences of 8, 5 and 0 positions: a patch counts if any of its positions does, and what does not count in it is 0."""
    model = WITHOUT_CLASSES["dit"].clone(depth=1)
    x = jax.random.normal(KEY, SEQUENCE)
    params = random_parameters(model, x, T)
    mask = np.arange(8)[None] < np.array([8, 5, 0])[:, None]
    masked = jax.jit(lambda x, mask: model.apply(params, x, T, mask=mask))
    out = masked(jnp.where(mask[..., None], x, jnp.nan), mask)
    plain = jax.jit(lambda x: model.apply(params, x, T))
    np.testing.assert_allclose(out[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[1, :5], plain(x.at[1, 5].set(0)[:, :6])[1, :5], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.where(mask[..., None], 0, out), np.zeros(SEQUENCE))


@pytest.mark.parametrize(
    ("fields", "mask", "error", "message"),
    [
        ({}, np.ones((B, 8, 6)), TypeError, "mask has dtype float32, but it is of bools, .* mask > 0"),
        ({}, np.ones((B, 8), bool), ValueError, r"mask has shape \(3, 8\), but .* it is \(3, 8, 6\), or one per patch, \(3, 4, 3\)"),
        (dict(attention="cudnn"), np.ones((B, 8, 6), bool), ValueError, "attention is 'cudnn', which takes no mask"),
    ],
)
def test_masks_that_are_none(fields, mask, error, message):
    model = WITHOUT_CLASSES["dit"].clone(**fields)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: model.init(KEY, X, T, mask=mask))


@pytest.mark.parametrize(("width", "heads"), [(10, 2), (12, 5), (6, 3)])
def test_dit_widths(width, heads):
    with pytest.raises(ValueError, match=f"hidden_size {width} must be a multiple"):
        shapes(NETWORKS["dit"].clone(hidden_size=width, num_heads=heads), X, T, Y)


def with_scan(name, remat):
    """The same network with its layers scanned where it can, and how its parameters come from the other's."""
    if name in HALVED:
        return NETWORKS[name].clone(remat=remat), lambda params: params
    return NETWORKS[name].clone(remat=remat, scan=True), functools.partial(dit.stack, start=NETWORKS[name].context_start)


@pytest.mark.parametrize(("name", "remat"), [("dit", False), *((name, True) for name in ONE_OF_EACH)])
def test_remat_and_scan_change_no_gradient(applied, gradients, name, remat):
    (out, grads), params = gradients[name], applied[name][0]
    model, stack = with_scan(name, remat)
    stacked = stack(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes(model, X, T, Y), jax.eval_shape(lambda: stacked))
    again, again_grads = gradient_of(model, stacked)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(again_grads), jax.tree.leaves(stack(grads)), strict=True):
        assert relative(one, other) < 1e-4
    if name in PATCHED:
        chex.assert_trees_all_equal(dit.unstack(stacked), params)


@pytest.mark.parametrize(("remat", "scan", "times"), [(False, False, 0), (True, False, 2), (False, True, 1), (True, True, 1)])
def test_remat_is_one_a_block(applied, remat, scan, times):
    model, params = NETWORKS["dit"].clone(remat=remat, scan=scan), applied["dit"][0]
    program = jax.make_jaxpr(model.apply)(dit.stack(params) if scan else params, X, T, Y)
    assert str(program).count("prevent_cse") == times
    assert str(program).count(f"prevent_cse={not scan}") == times


def test_a_loop_keeps_less_than_the_blocks_one_by_one():
    x, t, y = train_step.arguments((4, 16, 16, 4))

    def temporary(**fields):
        model = dit.DiT(patch_size=2, hidden_size=64, depth=4, num_heads=2, num_classes=4, **fields)
        gradient = jax.jit(jax.grad(lambda params, *given: (model.apply(params, *given) ** 2).sum()))
        return train_step.memory(gradient.lower(shapes(model, x, t, y), x, t, y).compile()).temp_size_in_bytes

    alone, loop = temporary(), temporary(scan=True)
    print(f"temporary bytes of a gradient: unrolled {alone}, scan {loop}")
    assert loop < 0.7 * alone


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision(applied, name):
    params, apply = applied[name]
    model = NETWORKS[name].clone(dtype=jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(shapes(model, X, T, Y)), jnp.float32)
    # Small weights, as networks have them.
    params = jax.tree.map(lambda leaf: leaf / 2, params)
    out = jax.jit(model.apply)(params, X, T, Y)
    assert out.dtype == X.dtype
    assert 0 < relative(out, apply(params, X, T, Y)) < 2e-2


@pytest.mark.parametrize("name", ["dit", "adm"])
def test_dropout_needs_its_key_and_is_off_by_default(name):
    model = WITHOUT_CLASSES[name].clone(dropout=0.5, remat=True, **({"depth": 1} if name == "dit" else {"channel_mult": (1,)}))
    params = random_parameters(model, X, T)
    draw = jax.jit(lambda params, key: model.apply(params, X, T, None, False, rngs={"dropout": key}))
    one, again, other = draw(params, KEY), draw(params, KEY), draw(params, jax.random.split(KEY)[0])
    np.testing.assert_array_equal(one, again)
    assert relative(other, one) > 1e-2
    # Without a key there is no dropout: the default asks for none.
    assert jax.eval_shape(model.apply, params, X, T).shape == X.shape
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        jax.eval_shape(lambda params: model.apply(params, X, T, None, False), params)


@pytest.mark.parametrize("name", IMAGES)
def test_learn_sigma_doubles_the_channels(name):
    out, variables = jax.eval_shape(NETWORKS[name].clone(learn_sigma=True).init_with_output, KEY, X, T, Y)
    assert out.shape == (*X.shape[:-1], 2 * X.shape[-1])
    last = variables["params"]["last" if name in PATCHED else "out"]["kernel"]
    assert last.shape[-1] == 2 * X.shape[-1] * (4 if name in PATCHED else 1)


def count(model, shape):
    """Parameters, without taking memory."""
    labels = () if model.num_classes is None else (jnp.zeros(1, jnp.int32),)
    variables = shapes(model, jax.ShapeDtypeStruct((1, *shape), jnp.float32), 0.5, *labels)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


def paper_parameters(classes, channels, out_channels, patch, width, depth):
    """The layers of Peebles and Xie (2023), counted: kernels and biases, positions are fixed."""

    def dense(inputs, outputs):
        return inputs * outputs + outputs

    attention = dense(width, 3 * width) + dense(width, width)
    mlp = dense(width, 4 * width) + dense(4 * width, width)
    block = attention + mlp + dense(width, 6 * width)
    embeddings = dense(patch**2 * channels, width) + dense(256, width) + dense(width, width) + (classes + 1) * width
    return embeddings + depth * block + dense(width, 2 * width) + dense(width, patch**2 * out_channels)


@pytest.mark.parametrize(
    ("size", "width", "depth", "millions"),
    [("S", 384, 12, 33), ("B", 768, 12, 130), ("L", 1024, 24, 458), ("XL", 1152, 28, 675)],
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes_of_transformers(size, width, depth, millions, patch):
    model = getattr(dit, f"DiT_{size}")(patch_size=patch, num_classes=1000, learn_sigma=True, scan=True)
    parameters = count(model, (32, 32, 4))
    assert parameters == paper_parameters(1000, 4, 8, patch, width, depth)
    if patch == 2:
        # The paper's Table 4, in millions.
        assert round(parameters / 1e6) == millions


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        # "Back to Basics", Table 9: parameters of JiT-B/16 and L/16 at 256 x 256.
        (functools.partial(dit.DiT_B, context_start=4), 131),
        (functools.partial(dit.DiT_L, context_start=8), 459),
    ],
    ids=["B/16", "L/16"],
)
def test_published_sizes_in_pixel_space(make, millions):
    modern = dict(norm=layers.RMSNorm, qk_norm=layers.RMSNorm, mlp_layer=dit.SwiGLU, rotary=True, bottleneck=128, class_tokens=32)
    assert round(count(make(patch_size=16, num_classes=1000, scan=True, **modern), (256, 256, 3)) / 1e6) == millions


def test_published_size_of_the_unet_for_cifar10():
    # torchcfm's UNetModelWrapper with its example's settings, as PyTorch counts it.
    assert count(unet.UNet(), (32, 32, 3)) == 35_746_307


@pytest.mark.parametrize(
    ("fields", "pixels", "millions"),
    [
        (dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(2, 4, 8)), 64, 296),
        (dict(model_channels=256, channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(4, 8, 16), head_dim=None, num_heads=4), 128, 422),
        (dict(model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32)), 256, 554),
        (dict(model_channels=256, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32, 64)), 512, 559),
    ],
    ids=["64", "128", "256", "512"],
)
def test_published_sizes_of_adm(fields, pixels, millions):
    # Dhariwal and Nichol 2021, Tables 11 and 12, in millions.
    model = unet.UNet(num_classes=1000, scale_shift_norm=True, resblock_updown=True, learn_sigma=True, **fields)
    assert round(count(model, (pixels, pixels, 3)) / 1e6) == millions


def test_lab():
    """The course's third lab: 32, 64 and 128 channels, two residual blocks per level, no attention."""
    variables = shapes(unet.LabUNet(num_classes=10), jnp.zeros((1, 28, 28, 1)), 0.5, jnp.zeros(1, jnp.int32))["params"]
    assert [variables[f"down_{level}_1"]["conv_out"]["kernel"].shape[-1] for level in range(3)] == [32, 64, 128]
    assert not any("attention" in name for name in variables)
    assert "down_0_2" not in variables


def test_patches_stay_in_their_places():
    # With the blocks' gates at zero, each patch of the output comes from that patch of the input.
    model = WITHOUT_CLASSES["dit"].clone(depth=1)
    params = random_parameters(model, X, T)
    params["params"]["block_0"]["modulation"] = jax.tree.map(jnp.zeros_like, params["params"]["block_0"]["modulation"])
    apply = jax.jit(model.apply)
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


@pytest.mark.parametrize(
    ("sides", "features", "pairs"), [((5,), 8, [4]), ((2, 3), 6, [2, 1]), ((2, 3, 2), 12, [2, 2, 2]), ((2, 3, 2), 16, [4, 2, 2])]
)
def test_features_are_shared_among_axes(sides, features, pairs):
    """The first axis has the pairs that remain, and every place its own features."""
    angles = layers.rotary_angles(*sides, features)
    positions = layers.grid_positions(*sides, features)
    assert positions.shape == (1, math.prod(sides), features)
    for i, place in enumerate(np.ndindex(*sides)):
        phases = [[at * 10_000.0 ** (-j / n) for j in range(n)] for at, n in zip(place, pairs, strict=True)]
        np.testing.assert_allclose(angles[i], np.concatenate(phases), rtol=1e-6)
        waves = [wave(phase) for phase in reversed(phases) for wave in (np.sin, np.cos)]
        np.testing.assert_allclose(positions[0, i], np.concatenate(waves), rtol=1e-5, atol=1e-6)
    assert len(np.unique(positions[0], axis=0)) == math.prod(sides)


@pytest.mark.parametrize(("shape", "least"), [((2, 2, 2, 4), 6), ((3, 5), 2)])
def test_features_that_cannot_be_shared(shape, least):
    for place in (layers.grid_positions, layers.rotary_angles):
        with pytest.raises(ValueError, match=f"ositions have {shape[-1]} features, .* even number of {least} or more"):
            place(*shape)


ANY_TIMES = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)


@settings(deadline=None, max_examples=15)
@given(ANY_TIMES)
def test_sinusoids(times):
    out = layers.Sinusoids(8, scale=1000.0).apply({}, jnp.array(times, jnp.float32))
    angles = [[1000 * t * 10_000 ** (-i / 4) for i in range(4)] for t in times]
    # A float32 phase of 1,000 is known within 6e-5.
    np.testing.assert_allclose(out, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=3e-4)


@settings(deadline=None, max_examples=15)
@given(ANY_TIMES)
def test_fourier(times):
    t = jnp.array(times, jnp.float32)
    out = layers.Fourier(6, lowest=0.5, highest=8.0).apply({}, t)
    angles = 2 * np.pi * np.outer(times, [0.5, 2.0, 8.0])
    np.testing.assert_allclose(out, np.sqrt(2 / 6) * np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-5)
    weights = jnp.array([0.3, -2.0, 1.5])
    learnt = layers.LearnableFourier(6).apply({"params": {"frequencies": weights}}, t)
    angles = 2 * np.pi * np.outer(times, weights)
    np.testing.assert_allclose(learnt, np.sqrt(2 / 6) * np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-5)
    for encoded in (out, learnt):
        np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, rtol=1e-5)


def test_times_look_different():
    t = jnp.linspace(0, 1, 11)
    for encoding in (layers.Sinusoids(), layers.Fourier()):
        encoded = np.array(encoding.apply({}, t))
        encoded /= np.linalg.norm(encoded, axis=1, keepdims=True)
        assert (encoded @ encoded.T)[~np.eye(11, dtype=bool)].max() < 0.999


@pytest.mark.parametrize("make", [layers.Sinusoids, layers.Fourier, layers.LearnableFourier])
def test_time_embeddings_have_even_widths(make):
    with pytest.raises(ValueError, match="7 features, but cosines and sines need an even one"):
        make(7).init(KEY, jnp.zeros(2))


def test_time_embedding():
    model = layers.TimeEmbedding(4, layers.Sinusoids(6))
    t = jnp.array([0.0, 0.123, 1.0])
    params = jax.tree.map(lambda leaf: 3 * leaf, random_parameters(model, t))
    first, second = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"][f"Dense_{i}"]) for i in range(2))
    h = np.asarray(layers.Sinusoids(6).apply({}, t)) @ first["kernel"] + first["bias"][None]
    h = h / (1 + np.exp(-h)) @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(jax.jit(model.apply)(params, t), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups):
    h = 50 + np.random.default_rng(0).normal(size=(2, 4, 3, 6)).astype(np.float32)
    params = {"params": {"scale": jnp.arange(1.0, 7.0), "bias": jnp.arange(6.0)}}
    for module in (layers.GroupNorm(groups), nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False)):
        grouped = h.astype(np.float64).reshape(2, 12, groups, 6 // groups)
        expected = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
        expected = expected.reshape(h.shape) * np.arange(1, 7) + np.arange(6)
        np.testing.assert_allclose(jax.jit(module.apply)(params, h), expected, rtol=1e-4, atol=1e-4)
    one, other = (
        jax.jit(jax.grad(lambda h, module=module: (module.apply(params, h) ** 3).sum()))(h)
        for module in (layers.GroupNorm(groups), nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False))
    )
    assert relative(one, other) < 1e-4


def test_second_derivatives_of_group_norm(x64):
    """As a divergence's gradient takes them, in the form whose every derivative is a definition's."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 4)))

    def plain(h):
        groups = h.reshape(1, 4, 2, 2)
        centred = groups - groups.mean((1, 3), keepdims=True)
        return (centred / jnp.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(h.shape)

    params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    ours, expected = (
        jax.jit(jax.hessian(lambda h, norm=norm: (norm(h) ** 3 * jnp.arange(16.0).reshape(h.shape)).sum()))(h)
        for norm in (lambda h: layers.GroupNorm(2).apply(params, h), plain)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-4 * jnp.abs(expected).max())


def test_layer_norm_keeps_its_digits():
    """A large mean is taken away before anything is squared."""
    h = np.random.default_rng(0).normal(size=(4, 384)).astype(np.float32)
    for mean, tolerance in ((0.0, 1e-5), (300.0, 1e-4), (1e4, 3e-3)):
        expected = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)
        np.testing.assert_allclose(layers.LayerNorm().apply({}, h + np.float32(mean)), expected, atol=tolerance)


def test_norms():
    h = jnp.array([[3.0, -4.0, 0.0, 1.0]])
    out = layers.LayerNorm().apply({}, h)
    np.testing.assert_allclose(out, np.asarray(h) / np.sqrt(6.5), rtol=1e-6)
    scale = {"params": {"scale": jnp.array([1.0, 2.0, 3.0, 4.0])}}
    np.testing.assert_allclose(layers.RMSNorm().apply(scale, h), np.asarray(h * np.arange(1, 5)[None]) / np.sqrt(6.5), rtol=1e-6)
    assert layers.RMSNorm().apply(scale, h.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 2, 5, 3)])
def test_dense_is_flax_dense(shape):
    h = jax.random.normal(KEY, shape)
    ours, theirs = layers.Dense(4), nn.Dense(4)
    params = random_parameters(ours, h)
    chex.assert_trees_all_equal_shapes(jax.eval_shape(lambda: params), shapes(theirs, h))
    np.testing.assert_allclose(ours.apply(params, h), theirs.apply(params, h), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), shift=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_rotary_products_depend_on_differences(seed, shift):
    # The product of a turned query at one place and a turned key at another, both moved by the same shift.
    q, k = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    angles = layers.rotary_angles(6, 6, 8).reshape(6, 6, 4)

    def product(place, other):
        turned = [np.asarray(layers.rotate(v.reshape(1, 1, 1, 8), angles[at][None])) for v, at in ((q, place), (k, other))]
        return float((turned[0] * turned[1]).sum())

    at, other = (0, 1), (2, 0)
    moved = [tuple(np.add(place, shift)) for place in (at, other)]
    np.testing.assert_allclose(product(*moved), product(at, other), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(product(at, at), float(q @ k), rtol=1e-4, atol=1e-4)


def test_rotary_angles():
    angles = layers.rotary_angles(2, 3, 8, before=2)
    assert angles.shape == (8, 4)
    np.testing.assert_array_equal(angles[:2], np.zeros((2, 4)))
    for row in range(2):
        for column in range(3):
            np.testing.assert_allclose(angles[2 + 3 * row + column], [row, row / 100, column, column / 100], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(hidden_size=12, num_heads=2, rotary=True), "heads of a multiple of 4 features, but 12 / 2"),
        (dict(class_tokens=2), "class_tokens is 2, but the network has no classes"),
        (dict(register_tokens=2, context_start=2), "context_start is 2, but the blocks are numbered 0 to 1"),
    ],
)
def test_transformers_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        shapes(WITHOUT_CLASSES["dit"].clone(**fields), X, T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(groups=3), "8 channels, which is no multiple of the 3 groups"),
        (dict(groups=8), "8 channels in 8 groups are normalised one by one.*fewer groups, or scale_shift"),
        (dict(attention_resolutions=(4,)), r"attention_resolutions is \(4,\), but images are smaller by 1, 2 at the levels"),
        (dict(head_dim=3), "16 channels cannot have heads of 3 channels"),
        (dict(head_dim=None, num_heads=5), "16 channels cannot have 5 heads"),
        (dict(head_dim=None), "num_heads is None and head_dim is None"),
        (dict(num_heads=2), "num_heads is 2 and head_dim is 4"),
    ],
)
def test_unets_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        shapes(WITHOUT_CLASSES["unet"].clone(**fields), X, T)


def test_batch_times():
    x = jnp.zeros((3, 2))
    for t in (0.5, 1, np.float32(0.5), jnp.array(0.5), jnp.array([0.0, 0.5, 1.0])):
        out = layers.batch_times(t, x)
        assert out.shape == (3,)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, np.broadcast_to(t, 3))
