"""DINOv2 against the official code on weights drawn by name, its table of weights, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from official.dinov2 import POSITIONS, SIDES, images

from fmjax.models import dinov2
from fmjax.pretrained import dinos as pretrained
from fmjax.pretrained import layouts

NETWORKS = {
    "plain": dinov2.DINOv2(hidden_size=48, depth=2, num_heads=4),
    "registers": dinov2.DINOv2(hidden_size=24, depth=2, num_heads=4, register_tokens=3),
    "swiglu": dinov2.DINOv2(hidden_size=44, depth=2, num_heads=4, mlp_layer=dinov2.SwiGLU),
    "native": dinov2.DINOv2(hidden_size=40, depth=2, num_heads=4, image_size=56),
}
SMALL = dinov2.DINOv2(hidden_size=8, depth=1, num_heads=2, image_size=42)
X = jnp.zeros((2, 28, 14, 3))


def loaded(name):
    tensors, arrays = official.load(f"dinov2_{name}")
    tensors["pos_embed"] = POSITIONS * tensors["pos_embed"]
    return tensors, arrays


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(("name", "sides"), [(name, sides) for name in SIDES for sides in SIDES[name]])
def test_features_are_the_official_ones(name, sides):
    tensors, arrays = loaded(name)
    model = NETWORKS[name]
    params = pretrained.dinov2(tensors, model)
    features = jax.jit(lambda params, x: model.apply(params, x, method="features"))(params, dinov2.preprocess(images(*sides)))
    key = f"{sides[0]}_{sides[1]}"
    assert features.patch_tokens.shape == (2, sides[0] // 14, sides[1] // 14, model.hidden_size)
    assert relative_error(features.class_token, arrays[f"class_{key}"]) <= 2e-5
    assert relative_error(features.patch_tokens.reshape(2, -1, model.hidden_size), arrays[f"patches_{key}"]) <= 2e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_written_back_bit_for_bit(name):
    tensors, _ = loaded(name)
    model = NETWORKS[name]
    written = layouts.to_tensors(pretrained._rows(model), pretrained.dinov2(tensors, model))
    # Those of "swiglu" and "native" are numbered within chunks.
    chunks = {"swiglu": {0: 0, 1: 1}, "native": {0: 0, 1: 0}}.get(name)
    if chunks:
        written = {key if key[:7] != "blocks." else f"blocks.{chunks[int(key[7])]}.{key[7:]}": value for key, value in written.items()}
    del tensors["mask_token"]
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)


@pytest.mark.parametrize(
    ("model", "count"),
    # As PyTorch counts them in the official networks, less the mask token.
    [
        (dinov2.DINOv2_S(), 22_056_576 - 384),
        (dinov2.DINOv2_B(), 86_580_480 - 768),
        (dinov2.DINOv2_L(), 304_368_640 - 1024),
        (dinov2.DINOv2_G(), 1_136_480_768 - 1536),
        (dinov2.DINOv2_L(register_tokens=4), 304_372_736 - 1024),
    ],
    ids=["S", "B", "L", "G", "L with registers"],
)
def test_published_sizes(model, count):
    shapes = layouts.shapes_of(model, X)
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == count
    assert {row.path for row in pretrained._rows(model)} == set(shapes)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 37, 40])
def test_interpolation_keeps_constants_and_is_symmetric_where_the_grid_is(size, smooth):
    weights = dinov2._interpolation(size, 37, smooth=smooth)
    assert weights.shape == (size, 37)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if smooth:
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
        if size == 37:
            np.testing.assert_allclose(weights, np.eye(37), atol=1e-6)


@pytest.fixture
def params(fast_key):
    return jax.jit(SMALL.init)(fast_key, X)


def test_half_precision_is_near_and_its_features_are_float32(params, fast_key):
    x = jax.random.normal(fast_key, (3, 28, 42, 3))
    half = jax.jit(SMALL.clone(dtype=jnp.bfloat16).apply)(params, x)
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert 0 < relative_error(half, np.asarray(jax.jit(SMALL.apply)(params, x))) < 0.05


def test_an_image_has_its_features_whatever_its_batch(params, fast_key):
    x = jax.random.normal(fast_key, (3, 28, 42, 3))
    apply = jax.jit(SMALL.apply)
    assert relative_error(apply(params, x[1:2]), np.asarray(apply(params, x))[1:2]) < 1e-5


def test_preprocess_of_bytes_and_floats():
    given = images(14, 28)
    wanted = (given.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(dinov2.preprocess(given), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.jit(dinov2.preprocess)(given.astype(np.float32)), wanted, atol=1e-6)
    # Black images, and nearly black ones of bytes.
    dinov2.preprocess(np.zeros((1, 14, 14, 3), np.float32))
    dinov2.preprocess(np.ones((1, 14, 14, 3), np.uint8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((1, 14, 14, 3), 0.5, np.float32), "values from 0.5 to 0.5, but they go from 0 to 255: give 255"),
        (np.full((1, 14, 14, 3), -0.5, np.float32), r"127.5 \* \(x \+ 1\)"),
        (np.full((1, 14, 14, 3), 300.0, np.float32), "values from 300 to 300"),
        (np.full((1, 14, 14, 3), np.nan, np.float32), "values from nan to nan"),
        (np.zeros((1, 3, 14, 14), np.uint8), r"images has shape \(1, 3, 14, 14\), but images are \(B, H, W, 3\), channels last"),
        (np.zeros((14, 14, 3), np.uint8), r"\(B, H, W, 3\)"),
        (np.zeros((1, 14, 14, 1), np.uint8), "repeat the channel of grey ones"),
    ],
)
def test_preprocess_refuses_other_images(given, message):
    with pytest.raises(ValueError, match=message):
        dinov2.preprocess(given)
    for dtype in (bool, np.complex64, np.int32):
        with pytest.raises(TypeError, match="but they are uint8, or floats from 0 to 255: cast them"):
            dinov2.preprocess(np.zeros((1, 14, 14, 3), dtype))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            jnp.zeros((1, 28, 30, 3)),
            ValueError,
            "x of 28 x 30 pixels does not divide into patches of 14 x 14: resize the images to 224 x 224",
        ),
        (jnp.full((1, 28, 28, 3), 200.0), ValueError, r"values up to 200, .* give dinov2.preprocess\(images\)"),
        (jnp.zeros((1, 28, 28, 3), jnp.uint8), TypeError, r"dtype uint8, but it is of floats: give dinov2.preprocess\(images\)"),
        (jnp.zeros((1, 3, 28, 28)), ValueError, r"x has shape \(1, 3, 28, 28\), but images are \(B, H, W, 3\)"),
    ],
)
def test_the_network_refuses_what_preprocess_does_not_give(x, error, message):
    with pytest.raises(error, match=message):
        SMALL.init(jax.random.key(0), x)


def test_heads_divide_the_features():
    with pytest.raises(ValueError, match="hidden_size 8 must be a multiple of the number of heads, 3"):
        SMALL.clone(num_heads=3).init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blocks.1.ls2.gamma"), r"1 missing \(blocks.1.ls2.gamma\)"),
        (lambda tensors: tensors.update(head=np.zeros(3)), r"1 not known \(head\)"),
        (lambda tensors: tensors.update(register_tokens=np.zeros((1, 4, 48))), r"1 not known \(register_tokens\)"),
        (
            lambda tensors: tensors.update(pos_embed=np.zeros((1, 257, 48))),
            r"pos_embed has shape \(1, 257, 48\), but it is \(1, 1370, 48\)",
        ),
    ],
)
def test_other_files_are_refused(change, message):
    tensors, _ = loaded("plain")
    change(tensors)
    with pytest.raises(ValueError, match=message):
        pretrained.dinov2(tensors, NETWORKS["plain"])


def test_a_file_of_more_blocks_is_refused():
    tensors, _ = loaded("plain")
    with pytest.raises(ValueError, match=r"not known \(blocks.1.norm1.weight"):
        pretrained.dinov2(tensors, NETWORKS["plain"].clone(depth=1))
