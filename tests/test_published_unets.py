"""The U-Nets of guided-diffusion, torchcfm and EDM: their weights by name, what they gave, and their published sizes."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from fmjax import guidance
from fmjax.models import conditions, layers, unet
from fmjax.pretrained import layouts, unets

FIVE = conditions.Label(5, null_label=False)
SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "condition": FIVE}
WIDE = SMALL | {"model_channels": 64, "channel_mult": (0.5, 1, 1.5), "attention_resolutions": (2, 4), "head_dim": 16}
PLAIN = {"model_channels": 32, "channel_mult": (2, 3), "num_res_blocks": 1, "head_dim": None, "num_heads": 4, "dropout": 0.0}
CLASSIFIER = {"num_classes": 7, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,)}
EDM = {"model_channels": 128, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "condition": FIVE}
NETWORKS = {
    "adm": unets.ADM_256(**WIDE),
    "adm_new_order": unets.ADM_64(**WIDE),
    "adm_plain": unet.UNet(**PLAIN, attention_resolutions=(1,)),
    "adm_middle": unet.UNet(**PLAIN, attention_resolutions=(), middle_attention=True),
    "adm_upsampler": unets.ADM_64_to_256(**SMALL, num_heads=2),
    "classifier": unets.ADM_classifier_64(image_size=12, head_dim=16, **CLASSIFIER),
    "cifar10": unets.TORCHCFM_CIFAR10(
        model_channels=32,
        channel_mult=(2, 4),
        num_res_blocks=1,
        time_embedding=layers.Sinusoids(32, scale=1.0),
    ),
    "mnist": unets.TORCHCFM_MNIST(condition=FIVE),
    "edm_adm": unets.EDM_ADM_64(**EDM, time_embedding=layers.Sinusoids(128, scale=1.0)),
}
LOADERS = {
    "classifier": unets.adm_classifier_params,
    "cifar10": unets.torchcfm_params,
    "mnist": unets.torchcfm_params,
    "edm_adm": unets.edm_adm_params,
}


def rows(name):
    shapes = unets._shapes(NETWORKS[name], 1)
    if name == "classifier":
        return unets._classifier_rows(NETWORKS[name], shapes)
    return unets._edm_rows(NETWORKS[name], shapes, 8) if name == "edm_adm" else unets._adm_rows(NETWORKS[name], shapes)


def load(name):
    tensors, arrays = official.load(f"unets_{name}")
    return LOADERS.get(name, unets.adm_params)(tensors, NETWORKS[name]), tensors, arrays


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_the_official_ones_gave(name):
    params, _, arrays = load(name)
    x, t = jnp.asarray(arrays["x"]), arrays["t"]
    if "low_res" in arrays:
        x = jnp.concatenate([x, jax.image.resize(arrays["low_res"], x.shape, "bilinear")], axis=-1)
    if name not in LOADERS or name == "classifier":
        t = t / np.float32(1000)
    given = NETWORKS[name].apply(params, x, t, *([arrays["y"]] if "y" in arrays else []))
    assert given.shape == arrays["out"].shape
    assert np.abs(given - arrays["out"]).max() <= 2e-5 * np.abs(arrays["out"]).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_are_written_as_they_were_read(name):
    params, tensors, _ = load(name)
    written = layouts.to_tensors(rows(name), params)
    for key, value in written.items():
        np.testing.assert_array_equal(value, tensors[f"model.{key}" if name == "edm_adm" else key])
    left = [key for key in tensors if key.removeprefix("model.") not in written]
    assert left == (["model.map_augment.weight"] if name == "edm_adm" else [])


def test_the_order_of_attention_matters():
    """Its shapes are the same either way."""
    tensors, arrays = official.load("unets_adm_new_order")
    params = unets.adm_params(tensors, NETWORKS["adm_new_order"], new_attention_order=False)
    given = NETWORKS["adm_new_order"].apply(params, arrays["x"], arrays["t"] / np.float32(1000), arrays["y"])
    assert np.abs(given - arrays["out"]).max() > 1e-2


def test_names_of_files_that_several_gpus_wrote():
    params, tensors, _ = load("cifar10")
    parallel = unets.torchcfm_params({f"module.{name}": tensor for name, tensor in tensors.items()}, NETWORKS["cifar10"])
    jax.tree.map(np.testing.assert_array_equal, params, parallel)


def test_names_of_the_network_within_its_preconditioning():
    params, tensors, _ = load("edm_adm")
    buffers = {"enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 2, 2))}
    alone = unets.edm_adm_params({name.removeprefix("model."): tensor for name, tensor in tensors.items()} | buffers, NETWORKS["edm_adm"])
    jax.tree.map(np.testing.assert_array_equal, params, alone)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("adm", unets.ADM_256(**WIDE | {"condition": conditions.Label(5)}), r"label_emb.weight has shape \(5, 256\), but it is \(6, 256\)"),
        ("adm", unets.ADM_256(**WIDE | {"condition": None}), "1 not known .label_emb.weight"),
        ("adm", unets.ADM_256(**WIDE | {"num_res_blocks": 2}), "missing .input_blocks"),
        ("cifar10", unets.TORCHCFM_MNIST(), "missing"),
        ("edm_adm", NETWORKS["edm_adm"].clone(learn_sigma=True), r"model.out_conv.weight has shape \(3, 128, 3, 3\), but it is \(6,"),
        ("edm_adm", unets.EDM_ADM_64(**EDM | {"channel_mult": (1, 2, 2)}), "missing .model.enc.2x2"),
    ],
)
def test_files_of_other_networks(name, model, message):
    tensors, _ = official.load(f"unets_{name}")
    with pytest.raises(ValueError, match=message):
        LOADERS.get(name, unets.adm_params)(tensors, model)


def test_a_file_of_another_kind():
    for loader, model in ((unets.adm_params, unets.ADM_256(**WIDE)), (unets.edm_adm_params, NETWORKS["edm_adm"])):
        with pytest.raises(ValueError, match=r"missing \(.* and more\); 1 not known \(x\)"):
            loader({"x": np.ones(3)}, model)


SIDES = {"TORCHCFM_CIFAR10": 32, "TORCHCFM_MNIST": 28, "ADM_LSUN": 256, "ADM_256_unconditional": 256}


@pytest.mark.parametrize("name", [name for name in unets.__all__ if name[0].isupper()])
def test_published_sizes_have_the_official_names_and_shapes(name):
    model = getattr(unets, name)()
    side = SIDES.get(name) or int(name.rpartition("_")[2])
    x = jax.ShapeDtypeStruct((1, side, side, {"TORCHCFM_MNIST": 1, "ADM_64_to_256": 6, "ADM_128_to_512": 6}.get(name, 3)), jnp.float32)
    labels = [jax.ShapeDtypeStruct((1,), jnp.int32)] if getattr(model, "condition", None) else []
    shapes = layouts.shapes_of(model, x, jax.ShapeDtypeStruct((), jnp.float32), *labels)
    if "classifier" in name:
        table = unets._classifier_rows(model, shapes)
    else:
        table = unets._edm_rows(model, shapes, side) if name == "EDM_ADM_64" else unets._adm_rows(model, shapes)
    assert sorted(row.path for row in table) == sorted(shapes)
    state = {row.name: row.layout.write(np.broadcast_to(np.float32(0), shapes[row.path].shape)).shape for row in table}
    for row in table:
        if row.path[-2:] == ("qkv", "kernel"):
            state[row.name.replace("qkv.weight", "num_heads")] = model.num_heads or shapes[row.path].shape[0] // model.head_dim
    ours = zlib.crc32("\n".join(f"{name} {state[name]}" for name in sorted(state)).encode())
    assert ours == official.load("unets_sizes")[1][name]


def test_networks_without_a_null_label_refuse_it():
    params, _, arrays = load("adm")
    words = r"label 5 is out of range: labels are 0 to 4, and this network has no label for no class \(null_label is False\)"
    with pytest.raises(ValueError, match=words):
        NETWORKS["adm"].apply(params, arrays["x"], 0.5, np.array([5, 0]))
    compiled = jax.jit(lambda y: conditions.Label(5, null_label=False).apply(table, y, jnp.zeros((2, 1)), 4).vector)
    table = {"params": {"label": {"embedding": jnp.ones((5, 4))}}}
    np.testing.assert_array_equal(jnp.isnan(compiled(np.array([5, 0]))).all(-1), [True, False])
    with pytest.raises(TypeError, match="y has dtype float32, but labels are integers from 0 to 4\\."):
        NETWORKS["adm"].apply(params, arrays["x"], 0.5, np.zeros(2, np.float32))


def test_a_classifier_guides():
    params, _, arrays = load("classifier")

    def log_probability(x, t):
        return jax.nn.log_softmax(NETWORKS["classifier"].apply(params, x, t))[jnp.arange(2), jnp.array([3, 6])]

    field = guidance.classifier(lambda x, t: jnp.zeros_like(x), log_probability, 1.0)
    x, t = jnp.asarray(arrays["x"]), jnp.float32(0.5)
    assert (log_probability(x + 1e-2 * field(x, t), t) > log_probability(x, t)).all()


def test_a_classifier_is_of_one_size():
    params, _, _ = load("classifier")
    with pytest.raises(ValueError, match="x has 12 x 8 positions, but this classifier has those of images with sides of 12"):
        NETWORKS["classifier"].apply(params, jnp.zeros((1, 12, 8, 3)), 0.5)


def test_channels_of_the_output():
    model = unet.UNet(**PLAIN, attention_resolutions=(), out_channels=5)
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    for each, channels in ((model, 5), (model.clone(learn_sigma=True), 10)):
        out, variables = jax.eval_shape(each.init_with_output, jax.random.key(0), x, 0.5)
        assert out.shape == (2, 4, 4, channels)
        assert not any("attention" in name for name in variables["params"])


def test_attention_in_the_middle_may_be_left_out():
    variables = jax.eval_shape(NETWORKS["adm_plain"].clone(middle_attention=False).init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), 0.5)
    attention = {name for name in variables["params"] if "attention" in name}
    assert attention == {"down_0_0_attention", "up_0_0_attention", "up_0_1_attention"}


def test_attention_in_the_middle_alone_is_checked():
    model = unet.UNet(**PLAIN | {"num_heads": 5}, attention_resolutions=(), middle_attention=True)
    with pytest.raises(ValueError, match="Attention among 96 channels cannot have 5 heads"):
        model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), 0.5)


def test_groups_of_one_channel_are_asked_for():
    with pytest.raises(ValueError, match=r"one by one.*or per_channel_norm, for weights that were trained so"):
        unets.TORCHCFM_MNIST(per_channel_norm=False).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), 0.5)
