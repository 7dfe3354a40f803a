"""The autoencoder against the official ones, its files both ways, its two conventions of scale, and what is said of wrong calls."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from flax import traverse_util

from fmjax.models.autoencoder import Autoencoder
from fmjax.pretrained import autoencoders as autoencoder
from fmjax.pretrained import layouts

SMALL = Autoencoder(block_out_channels=(32, 64), layers_per_block=1)
# The name of a file of tests/official -> the network, the names of its tensors.
FILES = {
    "autoencoder": (Autoencoder(block_out_channels=(32, 64, 96)), autoencoder.DIFFUSERS),
    "autoencoder_16": (SMALL.clone(latent_channels=16, use_quant_conv=False), autoencoder.DIFFUSERS),
    "autoencoder_older": (SMALL, autoencoder.DIFFUSERS_OLDER),
    "autoencoder_compvis": (Autoencoder(block_out_channels=(32, 64, 96), layers_per_block=1), autoencoder.COMPVIS),
}
every_file = pytest.mark.parametrize("name", FILES)
KEY = jax.random.key(0)


def assert_near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours, np.float64) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def small():
    """Parameters of `SMALL`, its tensors, and the arrays of the official one."""
    tensors, arrays = official.load("autoencoder_older")
    return autoencoder.autoencoder(tensors, SMALL), tensors, arrays


@every_file
def test_outputs_are_the_official_ones(name):
    model, _ = FILES[name]
    tensors, arrays = official.load(name)
    params = autoencoder.autoencoder(tensors, model)
    for i in range(sum(key.startswith("x_") for key in arrays)):
        mean, log_variance = jax.jit(functools.partial(model.apply, method="encode"))(params, arrays[f"x_{i}"])
        assert_near(mean, arrays[f"mean_{i}"], 2e-5)
        assert_near(log_variance, arrays[f"log_variance_{i}"], 2e-5)
        assert_near(jax.jit(functools.partial(model.apply, method="decode"))(params, arrays[f"z_{i}"]), arrays[f"image_{i}"], 2e-5)


@every_file
def test_tensors_come_back_bit_for_bit(name):
    model, names = FILES[name]
    tensors, _ = official.load(name)
    params = autoencoder.autoencoder(tensors, model)
    chex.assert_trees_all_equal(layouts.to_tensors(autoencoder._rows(model, names), params), tensors)
    written = autoencoder.autoencoder_tensors(params, model)
    chex.assert_trees_all_equal(autoencoder.autoencoder(written, model), params)
    assert set(written) == {row.name for row in autoencoder._rows(model)}
    if names is autoencoder.DIFFUSERS:
        chex.assert_trees_all_equal(written, tensors)


def test_the_paper_s_names_in_larger_files():
    model, _ = FILES["autoencoder_compvis"]
    tensors, _ = official.load("autoencoder_compvis")
    params = autoencoder.autoencoder(tensors, model)
    with_loss = {**tensors, "loss.logvar": np.zeros(()), "model_ema.decay": np.zeros(())}
    chex.assert_trees_all_equal(autoencoder.autoencoder(with_loss, model), params)
    whole = {f"first_stage_model.{name}": value for name, value in with_loss.items()} | {"model.diffusion_model.out.2.bias": np.zeros(4)}
    chex.assert_trees_all_equal(autoencoder.autoencoder(whole, model), params)
    with pytest.raises(ValueError, match=r"1 missing \(first_stage_model\.encoder\.mid\.attn_1\.q\.bias\); 0 not known"):
        autoencoder.autoencoder({key: value for key, value in whole.items() if not key.endswith("encoder.mid.attn_1.q.bias")}, model)


def test_stable_diffusion_has_its_sizes():
    """Of its first version: 83,653,863 parameters in 248 tensors."""
    shapes = layouts.shapes_of(Autoencoder(), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    assert sum(shape.size for shape in shapes.values()) == 83_653_863
    for names in (autoencoder.DIFFUSERS, autoencoder.DIFFUSERS_OLDER, autoencoder.COMPVIS):
        rows = autoencoder._rows(Autoencoder(), names)
        assert {row.path for row in rows} == set(shapes)
        assert len({row.name for row in rows}) == len(rows) == 248


def test_wrong_files_are_named(small):
    _, tensors, _ = small
    name = "decoder.mid_block.attentions.0.proj_attn.bias"
    with pytest.raises(ValueError, match=rf"1 missing \({name}\); 0 not known"):
        autoencoder.autoencoder({key: value for key, value in tensors.items() if key != name}, SMALL)
    with pytest.raises(ValueError, match=r"0 missing; 1 not known \(loss_scale\)"):
        autoencoder.autoencoder(tensors | {"loss_scale": np.zeros(())}, SMALL)
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight has shape \(32, 5, 3, 3\), but it is \(32, 3, 3, 3\)"):
        autoencoder.autoencoder(tensors | {"encoder.conv_in.weight": np.zeros((32, 5, 3, 3), np.float32)}, SMALL)
    with pytest.raises(ValueError, match=r"encoder\.conv_out\.weight has shape \(8, 64, 3, 3\), but it is \(32, 64, 3, 3\)"):
        autoencoder.autoencoder(tensors, SMALL.clone(latent_channels=16))
    with pytest.raises(ValueError, match=r"2 tensors \(blocks\.0\.weight, quant_conv\.bias, \.\.\.\), but .* only 1 by diffusers' names"):
        autoencoder.autoencoder({"blocks.0.weight": np.zeros(3), "quant_conv.bias": np.zeros(8)}, SMALL)


def test_scale(small):
    """Latents of a diffusion model are s (z - a), with the noise of `sampling.noise_like`, and `images` takes them back."""
    params, _, arrays = small
    model = SMALL.clone(scaling_factor=0.5, shift_factor=0.25)
    mean, log_variance = model.apply(params, arrays["x_0"], method="encode")
    latents = model.apply(params, KEY, arrays["x_0"], method="latents")
    noise = jax.random.normal(KEY, (1, mean.size)).reshape(mean.shape)
    np.testing.assert_allclose(latents, 0.5 * (mean + np.exp(log_variance / 2) * noise - 0.25), rtol=1e-5, atol=1e-6)
    images = model.apply(params, 0.5 * (arrays["z_0"] - 0.25), method="images")
    assert_near(images, arrays["image_0"], 2e-5)
    assert_near(model.apply(params, arrays["x_0"]), np.asarray(model.apply(params, mean, method="decode")), 1e-6)


def test_log_variance_is_held(small):
    params, _, arrays = small
    leaves = traverse_util.flatten_dict(params)
    for height, held in ((1e3, 20), (-1e3, -30)):
        moved = traverse_util.unflatten_dict({**leaves, ("params", "quant", "bias"): jnp.full(8, height)})
        np.testing.assert_array_equal(SMALL.apply(moved, arrays["x_0"], method="encode")[1], held)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near(small, dtype):
    params, _, arrays = small
    model = SMALL.clone(dtype=dtype)
    mean, log_variance = model.apply(params, arrays["x_0"], method="encode")
    image = model.apply(params, arrays["z_0"].astype(dtype), method="decode")
    assert (mean.dtype, log_variance.dtype, image.dtype) == (jnp.float32, jnp.float32, dtype)
    tolerance = 0.05 if dtype == jnp.bfloat16 else 0.01
    for ours, name in ((mean, "mean"), (log_variance, "log_variance"), (image, "image")):
        assert np.isfinite(np.asarray(ours, np.float32)).all()
        assert_near(ours, arrays[f"{name}_0"], tolerance)


def test_one_trace(small):
    params, _, arrays = small
    encode = jax.jit(chex.assert_max_traces(lambda x: SMALL.apply(params, KEY, x, method="latents"), n=1))
    decode = jax.jit(chex.assert_max_traces(lambda x_1: SMALL.apply(params, x_1, method="images"), n=1))
    x = jnp.asarray(arrays["x_0"])
    for scale in (0.5, 1.0):
        latents = encode(scale * x)
        assert latents.shape == (1, 8, 12, 4)
        assert decode(latents).shape == x.shape


def test_wrong_calls_are_explained():
    def shape(method, *inputs, model=SMALL):
        params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 2, 2, 3)))
        return jax.eval_shape(functools.partial(model.apply, method=method), params, *inputs)

    with pytest.raises(ValueError, match=r"images of 6 x 7 pixels.*multiples of 2"):
        shape("encode", jnp.zeros((1, 6, 7, 3)))
    with pytest.raises(ValueError, match=r"\(1, 3, 6, 8\).*\(B, H, W, 3\): move its channels last, x\.transpose"):
        shape("encode", jnp.zeros((1, 3, 6, 8)))
    with pytest.raises(TypeError, match="scale images to floats in"):
        shape("encode", jnp.zeros((1, 6, 8, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"x has shape \(0, 6, 8, 3\)"):
        shape("encode", jnp.zeros((0, 6, 8, 3)))
    with pytest.raises(ValueError, match=r"z has shape \(6, 8, 4\).*\(B, H, W, 4\)"):
        shape("decode", jnp.zeros((6, 8, 4)))
    with pytest.raises(ValueError, match=r"latents has shape \(1, 6, 8, 3\).*\(B, H, W, 4\)"):
        shape("images", jnp.zeros((1, 6, 8, 3)))
    with pytest.raises(TypeError, match="keys are typed"):
        shape("latents", jnp.zeros((1, 6, 8, 3)), jnp.zeros((1, 6, 8, 3)))
    with pytest.raises(ValueError, match="48 channels, which is no multiple of the 32 groups"):
        shape("encode", jnp.zeros((1, 6, 8, 3)), model=SMALL.clone(block_out_channels=(32, 48)))
