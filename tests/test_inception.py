"""The Inception network against torch-fidelity's and pytorch-fid's, its weights' table, and the images that it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from official.inception import gained

from fmjax.models import inception as network
from fmjax.pretrained import inceptions as inception
from fmjax.pretrained import layouts

IMAGE = jax.ShapeDtypeStruct((1, 64, 48, 3), jnp.uint8)


@functools.cache
def published():
    """The weights, with the counts that PyTorch keeps, what the official networks gave, and our parameters."""
    tensors, arrays = official.load("inception")
    tensors = gained(tensors)
    return tensors, arrays, inception.inception(tensors)


@functools.cache
def ours():
    _, arrays, params = published()
    model = network.Inception()
    apply = jax.jit(lambda params, x: model.apply(params, x, capture_intermediates=lambda module, _: module.name == "Mixed_6e"))
    outputs, inside = apply(params, arrays["images"])
    return outputs, inside["intermediates"]["Mixed_6e"]["__call__"][0][0]


def error(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", network.Outputs._fields)
def test_outputs_are_torch_fidelitys(name):
    assert error(getattr(ours()[0], name), published()[1][name]) <= 2e-5


def test_a_block_inside_is_torch_fidelitys():
    assert error(ours()[1].mean((1, 2)), published()[1]["mixed_6e"]) <= 2e-5


def test_features_are_pytorch_fids():
    """Whose resizing and scaling are others, and left out here."""
    assert error(ours()[0].features, published()[1]["pytorch_fid"]) <= 2e-5


def test_writing_what_was_read_gives_it_back():
    tensors, _, params = published()
    written = layouts.to_tensors(inception._rows(inception._shapes(network.Inception())), params)
    counts = {name for name in tensors if name.endswith("num_batches_tracked")}
    assert counts
    assert written.keys() == tensors.keys() - counts
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_a_file_without_counts_is_read():
    tensors = {name: value for name, value in published()[0].items() if not name.endswith("num_batches_tracked")}
    np.testing.assert_array_equal(inception.inception(tensors)["params"]["fc_bias"], tensors["fc.bias"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Mixed_7c.branch_pool.bn.running_mean": None}, r"1 missing \(Mixed_7c.branch_pool.bn.running_mean\)"),
        ({"AuxLogits.fc.bias": np.zeros(1000)}, r"1 not known \(AuxLogits.fc.bias\)"),
        ({"fc.weight": np.zeros((1000, 2048))}, r"fc.weight has shape \(1000, 2048\), but it is \(1008, 2048\)"),
        ({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 2))}, r"Conv2d_1a_3x3.conv.weight has shape \(32, 3, 3, 2\)"),
        ({"Conv2d_1a_3x3.bn.running_var": np.full(32, np.inf)}, "Conv2d_1a_3x3.bn.running_var holds numbers that are not finite"),
    ],
)
def test_another_file_is_refused_by_the_tensor(changed, message):
    tensors = {name: value for name, value in (published()[0] | changed).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        inception.inception(tensors)


def test_bytes_and_floats_are_the_same_images():
    images = published()[1]["images"]
    found = network.preprocess(images)
    assert found.shape == (2, 299, 299, 3)
    np.testing.assert_array_equal(found, network.preprocess(images.astype(np.float32)))
    np.testing.assert_array_equal(found, network.preprocess(jnp.asarray(images, jnp.bfloat16)))
    assert -1 <= found.min() < -0.9
    assert 0.9 < found.max() <= 127 / 128


def test_images_of_299_pixels_are_not_resized():
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    np.testing.assert_array_equal(network.preprocess(images), (images.astype(np.float32) - 128) / 128)


def test_statistics_and_outputs_are_float32_in_bfloat16():
    model = network.Inception(dtype=jnp.bfloat16)
    outputs, params = jax.eval_shape(lambda key, x: model.init_with_output(key, x), jax.random.key(0), IMAGE)
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, params))} == {np.dtype(np.float32)}
    assert [value.shape for value in outputs] == [(1, 2048), (1, 2023), (1, 1008), (1, 1008)]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.linspace(-1, 1, 48).reshape(1, 4, 4, 3), ValueError, r"floats from -1 to 1, .*round\(127.5"),
        (np.linspace(0, 1, 48).reshape(1, 4, 4, 3), ValueError, r"floats from 0 to 1, .* 255 \* images"),
        (np.zeros((1, 4, 4, 3)), ValueError, "floats from 0 to 0, .* black ones are given as uint8"),
        (np.linspace(0, 256, 48).reshape(1, 4, 4, 3), ValueError, "floats from 0 to 256"),
        (np.linspace(-3, 255, 48).reshape(1, 4, 4, 3), ValueError, "floats from -3 to 255"),
        (np.full((1, 4, 4, 3), np.nan), ValueError, "floats from nan to nan"),
        (np.zeros((1, 4, 4, 3), np.int32), TypeError, "dtype int32"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"shape \(4, 4, 3\), .* image\[None\]"),
        (np.zeros((1, 3, 4, 4), np.uint8), ValueError, r"shape \(1, 3, 4, 4\), but Inception takes \(B, H, W, 3\)"),
        (np.zeros((1, 4, 4, 1), np.uint8), ValueError, r"shape \(1, 4, 4, 1\), .*jnp.repeat"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 4, 3\)"),
    ],
)
def test_other_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        network.Inception().apply({}, images)
    with pytest.raises(error, match=message):
        network.check_images(jnp.asarray(images))


def test_black_images_are_bytes():
    assert (network.preprocess(np.zeros((1, 4, 4, 3), np.uint8)) == -1).all()
