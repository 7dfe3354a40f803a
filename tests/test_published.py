"""Published transformers against what the official code gave, and their conventions."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from flax import linen as nn
from official import transformers as settings
from test_published_unets import NETWORKS

from fmjax import betas, guidance, paths, pretrained, sampling, targets, times
from fmjax.models import conditions, layers
from fmjax.models import dit as networks
from fmjax.pretrained import layouts, transformers, unets
from fmjax.sampling import variance

LOADERS = {"dit": pretrained.dit, "dit_wide": pretrained.dit, "sit": pretrained.sit, "jit": pretrained.jit}


def loaded(name):
    tensors, arrays = official.load(name)
    heads = {"dit": 4, "dit_wide": 6, "sit": 4, "jit": 4}[name]
    extra = {"context_start": 1, "noise_scale": 2.0} if name == "jit" else {}
    tensors["pos_embed"] = positions(name, tensors)
    return LOADERS[name](tensors, num_heads=heads, **extra), tensors, arrays


def positions(name, tensors):
    """The fixed table of a network."""
    side = {"dit": 4, "dit_wide": 3, "sit": 4, "jit": 6}[name]
    return layers.grid_positions(side, side, tensors["final_layer.linear.weight"].shape[1])


def error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", LOADERS)
def test_output_is_the_official_one(name):
    network, tensors, arrays = loaded(name)
    side, channels = {"dit": (8, 4), "dit_wide": (12, 4), "sit": (8, 4), "jit": (24, 3)}[name]
    given = {"dit": [731, 4], "dit_wide": [999, 0]}.get(name, [0.3, 0.9])
    t = 1 - (np.array(given) + 1) / 1000 if name.startswith("dit") else np.array(given)
    x = settings.drawn(2, side, side, channels)
    ours = jax.jit(lambda network: network.predict(x, jnp.asarray(t, jnp.float32), settings.LABELS))(network)
    theirs = arrays["y"]
    assert error(ours[..., : theirs.shape[-1]], theirs) < 2e-5
    back = layouts.to_tensors(transformers._rows(network.model), network.params)
    assert back.keys() == tensors.keys() - {"pos_embed"}
    assert all(np.array_equal(back[key], tensors[key]) for key in back)


def test_dit_samples_as_ddpm_does(monkeypatch):
    network, _, arrays = loaded("dit")
    predict = network.guided(settings.LABELS, 5, 1.5, channels=3)
    # The noises of the official run, in the place of keys.
    monkeypatch.setattr(variance, "noise", lambda key, shape, dtype: key)
    step = sampling.learned_variance(predict).step
    grid = betas.grid(network.path, 250)

    @jax.jit
    def sample(x, noises):
        def advance(x, each):
            t, dt, epsilon = each
            return step(network.path, None, None, epsilon, x, t, dt), None

        return jax.lax.scan(advance, x, (grid[:-1], np.diff(grid), noises))[0]

    ours = sample(settings.drawn(2, 8, 8, 4, seed=2), settings.drawn(250, 2, 8, 8, 4, seed=1))
    assert error(ours, arrays["ddpm"]) < 1e-4


def test_sit_samples_as_its_code_does():
    network, _, arrays = loaded("sit")
    x_0 = settings.drawn(2, 8, 8, 4, seed=2)

    @jax.jit
    def sample(network):
        guided = guidance.classifier_free(network.velocity, settings.LABELS, 5, 4.0, combine=guidance.channels(3))
        return sampling.sample_ode(guided, x_0, times.uniform_grid(settings.STEPS), step=sampling.euler)[0]

    assert error(sample(network), arrays["euler"]) < 1e-4


def test_jit_samples_as_its_code_does():
    network, _, arrays = loaded("jit")
    assert network.path == paths.ScaledNoise(paths.Linear(), 2.0)
    x_0 = 2 * settings.drawn(2, 24, 24, 3, seed=2)
    grid = times.uniform_grid(settings.JIT_STEPS)

    @jax.jit
    def sample(network):
        unguided = guidance.classifier_free(network.velocity, settings.LABELS, 5, 1.0)
        guided = guidance.interval(guidance.classifier_free(network.velocity, settings.LABELS, 5, 2.9), unguided, 0.1001, 1.0)
        x, _ = sampling.sample_ode(guided, x_0, grid[:-1], step=sampling.heun)
        return sampling.sample_ode(guided, x, grid[-2:], step=sampling.euler)[0]

    assert error(sample(network), arrays["heun"]) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("t", [0.2, np.float64(0.94), np.full(2, 0.96), 1.0])
def test_data_are_divided_by_no_less_than_in_training(t, dtype):
    """u = (D - x) / max(1 - t, 0.05), of x's dtype; so it is finite at data."""
    network, _, _ = loaded("jit")
    x, y = settings.drawn(2, 24, 24, 3, seed=2).astype(dtype), settings.LABELS
    velocity = network.velocity(x, t, y)
    left = np.maximum(1 - np.asarray(t, np.float32), 0.05).reshape(-1, 1, 1, 1)
    assert velocity.dtype == dtype
    by_hand = (np.asarray(network.predict(x, t, y), np.float32) - np.asarray(x, np.float32)) / left
    np.testing.assert_allclose(np.asarray(velocity, np.float32), by_hand, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-4)


def with_positions(name):
    """The tensors of a network with its table of positions."""
    tensors, _ = official.load(name)
    return tensors | {"pos_embed": positions(name, tensors)}


def test_a_network_is_an_argument_of_a_compiled_function():
    """Which is not compiled again for other parameters."""
    network, _, _ = loaded("sit")
    traces = []

    @jax.jit
    def velocity(network, x):
        traces.append(network)
        return network.velocity(x, 0.3, settings.LABELS)

    x = settings.drawn(2, 8, 8, 4)
    other = dataclasses.replace(network, params=jax.tree.map(lambda leaf: 2 * leaf, network.params))
    assert np.abs(velocity(other, x) - velocity(network, x)).max() > 0.1
    assert len(traces) == 1
    rebuilt = jax.tree.map(lambda leaf: leaf, network)
    assert dataclasses.replace(rebuilt, params=network.params) == network
    placed = jax.device_put(network, jax.devices()[1])
    assert jax.tree.leaves(placed)[0].devices() == {jax.devices()[1]}


def test_a_network_says_what_it_is():
    network, _, _ = loaded("dit")
    assert re.fullmatch(r"Published\(DiT of 0\.\d M parameters, noise of 8 x 8 x 4 along Betas.*\)", repr(network))
    assert "Published(JiT" not in repr(loaded("jit")[0])
    # Inside a compiled function, too, where parameters may be anything.
    assert "DiT of 0.0 M" in repr(dataclasses.replace(network, params={"params": None}))


@pytest.mark.parametrize("name", ["dit", "sit", "jit"])
def test_the_table_of_positions_says_the_size(name):
    tensors = with_positions(name)
    extra = {"context_start": 1} if name == "jit" else {}
    network = LOADERS[name](tensors, num_heads=4, **extra)
    assert network.size == {"dit": (8, 8, 4), "sit": (8, 8, 4), "jit": (24, 24, 3)}[name]
    table = tensors["pos_embed"]
    for wrong in (table + 1e-3, table[:, ::-1], table[:, 1:], 0 * table):
        with pytest.raises(ValueError, match=r"pos_embed, of shape \(1, .*, is not the fixed table of sines and cosines of a square grid"):
            LOADERS[name](tensors | {"pos_embed": wrong}, num_heads=4, **extra)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "H": (32, 1280, 16)}


class Shapes(dict):
    """A file of tensors, of which no more is asked for than their shapes and the table of positions."""

    def __init__(self, depth, hidden_size, patches, out, grid):
        first = "x_embedder.proj.weight" if len(patches) == 1 else "x_embedder.proj1.weight"
        shapes = {
            first: patches[0],
            "y_embedder.embedding_table.weight": (1001, hidden_size),
            "t_embedder.mlp.0.weight": (hidden_size, 256),
        }
        shapes |= {"final_layer.linear.weight": (out, hidden_size), "pos_embed": (1, grid**2, hidden_size)}
        shapes |= {f"blocks.{i}.attn.qkv.weight": (3 * hidden_size, hidden_size) for i in range(depth)}
        shapes |= {"in_context_posemb": patches[1]} if len(patches) > 1 else {}
        super().__init__(shapes)
        self.grid = grid

    def shape(self, name):
        return super().__getitem__(name)

    def __getitem__(self, name):
        assert name == "pos_embed", f"{name} was read"
        return layers.grid_positions(self.grid, self.grid, self.shape(name)[-1])


@pytest.fixture
def only_shapes(monkeypatch):
    monkeypatch.setattr(layouts, "shapes_of", lambda *_: {})
    monkeypatch.setattr(layouts, "from_tensors", lambda *_, **__: {})


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("name", ["S", "B", "L", "XL"])
def test_published_sizes_of_dit_and_sit(only_shapes, name, patch_size):
    depth, hidden_size, heads = SIZES[name]
    for latents, out in ((32, 8), (64, 4)):
        given = Shapes(depth, hidden_size, [(hidden_size, 4, patch_size, patch_size)], patch_size**2 * out, latents // patch_size)
        fields = {"patch_size": patch_size, "hidden_size": hidden_size, "depth": depth, "num_heads": heads, "num_classes": 1000}
        model = networks.DiT(**fields, learn_sigma=out == 8, time_embedding=layers.Sinusoids())
        noise, velocity = pretrained.dit(given), pretrained.sit(given)
        assert noise.model == model
        assert noise.size == velocity.size == (latents, latents, 4)
        assert (noise.path, noise.target, noise.variance) == (betas.linear(), targets.noise, out == 8)
        assert velocity.model == model.clone(time_embedding=layers.Sinusoids(scale=1.0))
        assert (velocity.path, velocity.target, velocity.variance) == (paths.Linear(), targets.velocity, False)


@pytest.mark.parametrize("patch_size", [16, 32])
@pytest.mark.parametrize(("name", "bottleneck", "start"), [("B", 128, 4), ("L", 128, 8), ("H", 256, 10)])
def test_published_sizes_of_jit(only_shapes, name, bottleneck, start, patch_size):
    depth, hidden_size, heads = SIZES[name]
    given = Shapes(depth, hidden_size, [(bottleneck, 3, patch_size, patch_size), (1, 32, hidden_size)], patch_size**2 * 3, 16)
    scale = patch_size / 16
    network = pretrained.jit(given, noise_scale=scale)
    assert network.size == (16 * patch_size, 16 * patch_size, 3)
    fields = ("patch_size", "hidden_size", "depth", "num_heads", "num_classes", "bottleneck", "class_tokens", "context_start", "rotary")
    assert [getattr(network.model, field) for field in fields] == [
        *(patch_size, hidden_size, depth, heads, 1000, bottleneck, 32, start, True),
    ]
    assert (network.model.norm, network.model.qk_norm, network.model.mlp_layer) == (layers.RMSNorm, layers.RMSNorm, networks.SwiGLU)
    assert network.path == (paths.Linear() if scale == 1 else paths.ScaledNoise(paths.Linear(), 2.0))
    assert (network.target, network.least) == (targets.data, 0.05)


def changed(name, **changes):
    return {key: value for key, value in ((with_positions(name)) | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sit", {"blocks.1.mlp.fc2.bias": None}, r"1 missing \(blocks.1.mlp.fc2.bias\); 0 not known"),
        ("sit", {"opt.step": np.ones(3)}, r"0 missing; 1 not known \(opt.step\)"),
        ("sit", {"blocks.1.mlp.fc2.bias": np.ones(65)}, r"blocks.1.mlp.fc2.bias has shape \(65,\), but it is \(64,\) in this network"),
        ("sit", {"blocks.0.mlp.fc1.weight": np.ones((64, 256))}, r"blocks.0.mlp.fc1.weight has shape \(64, 256\), but it is \(256, 64\)"),
        ("sit", {"final_layer.linear.bias": np.full(32, np.nan)}, "final_layer.linear.bias holds numbers that are not finite"),
        ("sit", {"final_layer.linear.weight": np.ones((12, 64))}, "The network gives 3 channels for 4, but it gives as many, or twice"),
        ("sit", {"x_embedder.proj.weight": None}, r"no x_embedder.proj.weight, which says the network's size; it has .* and so on"),
        ("jit", {"x_embedder.proj1.weight": None}, "no x_embedder.proj1.weight, which says the network's size"),
        ("jit", {"blocks.2.attn.q_norm.weight": None}, r"1 missing \(blocks.2.attn.q_norm.weight\)"),
        ("sit", {"final_layer.linear.bias": np.ones(32, np.int8)}, "final_layer.linear.bias has dtype int8, but weights are real floats"),
        ("sit", {"final_layer.linear.bias": np.ones(32, complex)}, "final_layer.linear.bias has dtype complex128, but weights are real"),
        ("sit", {"pos_embed": np.full((1, 16, 64), np.nan)}, "is not the fixed table of sines and cosines"),
        ("sit", {"pos_embed": np.zeros((1, 0, 64))}, "is not the fixed table of sines and cosines"),
        ("sit", {"pos_embed": np.full((1, 16, 64), 1j)}, "is not the fixed table of sines and cosines"),
        ("sit", {"blocks.999999.x": np.ones(3)}, "up to blocks.999999, but none is blocks.2: part of it is missing"),
        ("sit", {"blocks.x.y": np.ones(3)}, r"0 missing; 1 not known \(blocks.x.y\)"),
        ("sit", {"x_embedder.proj.weight": np.ones((64, 16))}, r"x_embedder.proj.weight has shape \(64, 16\), but it has 4 axes"),
        ("jit", {"in_context_posemb": np.ones(3)}, r"in_context_posemb has shape \(3,\), but it has 3 axes"),
    ],
)
def test_files_that_do_not_fit_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        LOADERS[name](changed(name, **changes), num_heads=4, **({"context_start": 1} if name == "jit" else {}))


def test_what_no_tensor_shows_is_asked_for():
    for name in ("dit", "sit", "jit"):
        with pytest.raises(ValueError, match=r"No published size has \d+ features, so num_heads is not known: give it"):
            LOADERS[name](with_positions(name))
    with pytest.raises(ValueError, match="No published size has 3 blocks, so context_start is not known: give it"):
        pretrained.jit(with_positions("jit"), num_heads=4)
    with pytest.raises(ValueError, match="image_size is 100, but published sizes are 64, 128, 256, 512: give a model"):
        pretrained.adm({}, 100)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_heads": "0"}, "its network has num_heads '0', but it is a number above 0"),
        ({"num_heads": "abc"}, "its network has num_heads 'abc', but it is a number above 0"),
        ({"num_heads": "7"}, "num_heads is 7, but the network has 64 features, which is no multiple of it"),
        ({"num_heads": "4", "time_scale": "nan"}, "its network has time_scale 'nan', but it is a number above 0"),
    ],
)
def test_what_a_file_says_is_checked(tmp_path, said, message):
    pretrained.write(tmp_path / "sit.safetensors", with_positions("sit"), said)
    with pytest.raises(ValueError, match=message):
        pretrained.sit(pretrained.read(tmp_path / "sit.safetensors"))


def test_a_checkpoint_of_training_has_parts():
    file = official.FOLDER / "files_zip.pt"
    with pytest.raises(ValueError, match=r"several dictionaries of tensors, .*ema.*: give one of them as part"):
        pretrained.read(file)
    with pytest.raises(ValueError, match=r"no x_embedder.proj.weight, which says the network's size; it has .* and so on"):
        pretrained.dit(pretrained.read(file, "ema"))


def test_names_of_jit_are_under_a_prefix(tmp_path):
    tensors = with_positions("jit")
    pretrained.write(tmp_path / "jit.safetensors", {f"net.{name}": value for name, value in tensors.items()})
    read = pretrained.read(tmp_path / "jit.safetensors")
    with pytest.raises(ValueError, match=r"as JiT's under net\., `tensors\.under\('net\.'\)`\?"):
        pretrained.jit(read, num_heads=4, context_start=1)
    network = pretrained.jit(read.under("net."), num_heads=4, context_start=1)
    jax.tree.map(np.testing.assert_array_equal, network.params, pretrained.jit(tensors, num_heads=4, context_start=1).params)


def test_networks_of_ours_are_written_as_sit_and_read_again(tmp_path):
    model = networks.DiT(2, 16, 2, 2, num_classes=3)
    shapes = layouts.shapes_of(model, jnp.zeros((1, 4, 4, 4)), 0.5, jnp.array([0]))
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in shapes.items()}
    params = {"params": layouts.traverse_util.unflatten_dict(leaves)}
    pretrained.write(tmp_path / "network.safetensors", pretrained.sit_tensors(params, model, (4, 4, 4)))
    network = pretrained.sit(pretrained.read(tmp_path / "network.safetensors"), num_heads=2, time_scale=1000.0)
    assert (network.size, network.model) == ((4, 4, 4), model)
    jax.tree.map(np.testing.assert_array_equal, network.params, params)
    with pytest.raises(ValueError, match="The parameters are not those of the network that the file's table is of"):
        pretrained.sit_tensors(params, model.clone(depth=1), (4, 4, 4))
    # Heads are in no tensor, and a wrong number would look right: the file says them.
    pretrained.write(tmp_path / "said.safetensors", pretrained.sit_tensors(params, model, (4, 4, 4)), pretrained.sit_metadata(model))
    said = pretrained.read(tmp_path / "said.safetensors")
    assert pretrained.sit(said).model == model
    with pytest.raises(ValueError, match="num_heads is 4, but the file says that its network has 2"):
        pretrained.sit(said, num_heads=4)
    with pytest.raises(ValueError, match="embedded by Fourier"):
        pretrained.sit_metadata(model.clone(time_embedding=layers.Fourier()))


class Tiny(nn.Module):
    """A network of five classes, whose output has twice the channels where it says a variance."""

    learn_sigma: bool = True

    @nn.compact
    def __call__(self, x, t, y):
        table = self.param("table", nn.initializers.normal(1.0), (6, 2 * x.shape[-1]))
        both = jnp.concatenate([jnp.sin(3 * x), jnp.cos(x + paths.lift(jnp.asarray(t), x))], axis=-1) * (1 + table[y][:, None, None])
        return both if self.learn_sigma else both[..., : x.shape[-1]] + both[..., x.shape[-1] :]


def tiny(channels, **fields):
    return Tiny(**fields), Tiny(**fields).init(jax.random.key(0), jnp.ones((1, 1, 1, channels)), 0.5, jnp.array([0]))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("t", [0.4, np.array([0.4, 0.9], np.float32)], ids=["one time", "a time per example"])
def test_guided_is_guidance_of_the_velocity_with_the_conditional_variance(channels, t):
    model, params = tiny(4)
    network = pretrained.Published(params, betas.linear(), model, targets.noise, transformers.discrete_time, (8, 8, 4), variance=True)
    x = settings.drawn(2, 8, 8, 4)
    velocity, v = network.guided(settings.LABELS, 5, 1.5, channels=channels)(x, t)
    combine = guidance.extrapolate if channels is None else guidance.channels(channels)
    expected = guidance.classifier_free(network.velocity, settings.LABELS, 5, 1.5, combine=combine)(x, t)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(v, network.velocity_and_variance(x, t, settings.LABELS)[1], rtol=1e-5, atol=1e-5)
    assert np.abs(v - network.velocity_and_variance(x, t, np.array([5, 5]))[1]).max() > 1e-3


def test_networks_without_a_variance_say_so():
    network, _, _ = loaded("sit")
    x = settings.drawn(2, 8, 8, 4)
    with pytest.raises(ValueError, match=r"Published\(DiT .* predicts no variance: take another step, such as sampling.ancestral"):
        network.velocity_and_variance(x, 0.5, settings.LABELS)
    with pytest.raises(ValueError, match="predicts no variance"):
        network.guided(settings.LABELS, 5, 1.5)(x, 0.5)


def test_another_number_of_channels_is_named():
    wide = types.SimpleNamespace(apply=lambda params, x, t: jnp.zeros((*x.shape[:-1], 5)))
    network = pretrained.Published({}, paths.Linear(), wide, targets.velocity, transformers.given_time, (8, 8, 4))
    with pytest.raises(ValueError, match=r"The network gives 5 channels for x of 4: it is of examples of shape \(8, 8, 4\)"):
        network.velocity(settings.drawn(2, 8, 8, 4), 0.5)
    for shape, hint in (((2, 8, 8, 3), r"\.$"), ((2, 4, 8, 8), r"; channels stand last: move them by x\.transpose"), ((8, 8, 4), r"\.$")):
        with pytest.raises(ValueError, match=rf"x has shape \({', '.join(map(str, shape))}\), but Pub.* takes \(B, H, W, 4\){hint}"):
            network.velocity(settings.drawn(*shape), 0.5)


def test_adm_has_the_betas_of_its_size():
    tensors, arrays = official.load("unets_adm")
    small, others = (pretrained.adm(tensors, size, model=NETWORKS["adm"]) for size in (64, 256))
    assert (small.path, others.path) == (betas.cosine(), betas.linear())
    assert (small.size, others.size) == ((64, 64, 3), (256, 256, 3))
    t = jnp.asarray(1 - (arrays["t"] + 1) / 1000, jnp.float32)
    for network in (small, others):
        assert (network.variance, network.target) == (True, targets.noise)
        np.testing.assert_allclose(network.time(network.path, t), arrays["t"] / 1000, rtol=1e-6)


def test_a_classifier_has_logits_and_no_velocity():
    tensors, arrays = official.load("unets_classifier")
    network = pretrained.adm_classifier(tensors, 64, model=NETWORKS["classifier"])
    assert network.path == betas.cosine()
    t = jnp.asarray(1 - (arrays["t"] + 1) / 1000, jnp.float32)
    np.testing.assert_allclose(network.time(network.path, t), arrays["t"] / 1000, rtol=1e-6)
    assert jax.eval_shape(network.predict, arrays["x"], t).shape == arrays["out"].shape == (2, 7)
    with pytest.raises(TypeError, match=r"is a classifier: predict\(x, t\) gives its logits, and it has no velocity"):
        network.velocity(arrays["x"], t)


def test_edm_is_preconditioned(monkeypatch):
    """D(y; sigma) = c_skip y + c_out F(c_in y, ln(sigma) / 4),  y = x / t    (Karras et al. 2022, arXiv:2206.00364, table 1)"""
    model, params = tiny(3, learn_sigma=False)
    monkeypatch.setattr(unets, "edm_adm_params", lambda tensors, model: params)
    network = pretrained.edm_adm({}, model=model)
    assert network.size == (64, 64, 3)
    x = settings.drawn(2, 8, 8, 3)
    for t in (0.1, 0.8):
        sigma, total = (1 - t) / t, np.sqrt(0.5**2 + ((1 - t) / t) ** 2)
        y = x / np.float32(t)
        out = model.apply(params, np.float32(1 / total) * y, np.float32(np.log(sigma) / 4), settings.LABELS)
        data = 0.5**2 / total**2 * y + sigma * 0.5 / total * np.asarray(out)
        velocity = network.velocity(x, t, settings.LABELS)
        assert error(velocity, (data - x) / (1 - t)) < 1e-5
        assert error(targets.convert(network.path, velocity, x, t, source=targets.velocity, target=targets.data), data) < 1e-5
        # Along another path, at the same noise level.
        cosine = dataclasses.replace(network, path=paths.Cosine())
        at = np.float32(2 / np.pi * np.arctan(1 / sigma))
        scaled = np.sin(np.pi / 2 * at) * y
        there = cosine.velocity(scaled, at, settings.LABELS)
        assert error(targets.convert(paths.Cosine(), there, scaled, at, source=targets.velocity, target=targets.data), data) < 1e-4


@pytest.mark.parametrize("grey", [False, True])
def test_torchcfm_is_known_by_its_labels(monkeypatch, grey):
    seen = []
    monkeypatch.setattr(unets, "torchcfm_params", lambda tensors, model: seen.append(model))
    network = pretrained.torchcfm({"module.label_emb.weight": 0} if grey else {"out.2.bias": 0})
    assert network.size == ((28, 28, 1) if grey else (32, 32, 3))
    assert (network.path, network.target) == (paths.Linear(), targets.velocity)
    # Labels are 0 to 9, and none stands for no class.
    expected = unets.TORCHCFM_MNIST(condition=conditions.Label(10, null_label=False)) if grey else unets.TORCHCFM_CIFAR10()
    assert seen == [network.model] == [expected]
