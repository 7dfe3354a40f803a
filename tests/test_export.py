"""Export: a sampler in a file, run by a process that has JAX and no fmjax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import export, guidance, likelihood, marginals, sampling, times
from fmjax.models import dit, unet
from fmjax.paths import Linear

RUN = """
import sys
sys.modules["fmjax"] = None
from pathlib import Path
import jax.export, numpy as np
sample = jax.export.deserialize(bytearray(Path(sys.argv[1]).read_bytes())).call
data = np.load(sys.argv[2])
for n in (1, 5):
    np.testing.assert_allclose(sample(data["x_0"][:n], data["y"][:n]), data["x_1"][:n], rtol=1e-3, atol=1e-4)
print("the same")
"""


@pytest.fixture(scope="module")
def sampler():
    """A guided sampler of a small transformer, with its parameters and its grid inside."""
    model = dit.DiT(patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), 0.5, jnp.zeros(1, int))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * random.standard_normal(leaf.shape), jnp.float32), shapes)

    def sample(x_0, y):
        field = guidance.classifier_free(lambda x, t, y: model.apply(params, x, t, y), y, 3, 2.0)
        return sampling.sample_ode(field, x_0, times.uniform_grid(4), step=sampling.dpm_solver_pp(Linear(), 2))[0]

    return sample


def test_a_fresh_process_without_fmjax_samples_the_same(sampler, key, tmp_path):
    x_0, y = sampling.noise(key, (5, 8, 8, 1)), jnp.arange(5) % 3
    export.save(tmp_path / "deep" / "sampler.jax", sampler, x_0, y)
    np.savez(tmp_path / "data.npz", x_0=x_0, y=y, x_1=jax.jit(sampler)(x_0, y))
    command = [sys.executable, "-c", RUN, str(tmp_path / "deep" / "sampler.jax"), str(tmp_path / "data.npz")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.stdout == "the same\n", found.stderr
    loaded = export.load(tmp_path / "deep" / "sampler.jax")
    np.testing.assert_allclose(loaded(x_0[:2], y[:2]), jax.jit(sampler)(x_0[:2], y[:2]), rtol=1e-4, atol=1e-5)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["sampler.jax"]


def test_a_unet_takes_any_batch(key, tmp_path):
    """Its groups and convolutions are reshaped by the batch, whose size the file leaves open."""
    model = unet.UNet(model_channels=4, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), head_dim=4, groups=2)
    x = sampling.noise(key, (5, 4, 4, 1))
    shapes = jax.eval_shape(model.init, key, x, 0.5)
    params = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), shapes)
    export.save(tmp_path / "unet.jax", lambda x: model.apply(params, x, 0.5), x)
    velocity = export.load(tmp_path / "unet.jax")
    for n in (1, 5):
        np.testing.assert_allclose(velocity(x[:n]), jax.jit(model.apply)(params, x[:n], 0.5), rtol=1e-4, atol=1e-5)


def test_exact_fields_and_log_densities_take_any_batch(key, tmp_path):
    field = marginals.velocity(Linear(), marginals.Empirical(jnp.eye(3)))

    def density(x):
        return likelihood.log_density(field, likelihood.normal, x, times.uniform_grid(3, end=0.9)).log_p

    x = sampling.noise(key, (5, 3))
    export.save(tmp_path / "density.jax", density, x[:1])
    np.testing.assert_allclose(export.load(tmp_path / "density.jax")(x), density(x), rtol=1e-5)


def test_noise_from_a_seed(key, tmp_path):
    """A stochastic sampler takes an integer seed, a scalar that is no batch."""

    def sample(x_0, seed):
        return sampling.sample_sde(lambda x, t: -x, 1.0, jax.random.key(seed), x_0, times.uniform_grid(3))[0]

    x_0 = sampling.noise(key, (4, 2))
    export.save(tmp_path / "sde.jax", sample, jax.ShapeDtypeStruct((1, 2), jnp.float32), 7)
    np.testing.assert_allclose(export.load(tmp_path / "sde.jax")(x_0, 7), jax.jit(sample)(x_0, 7), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_written_or_read_is_named(key, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="A typed key cannot be an argument of an exported function"):
        export.save(tmp_path / "f.jax", lambda key: jax.random.normal(key), key)
    (tmp_path / "broken.jax").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.jax is not an exported function as export\.save wrote it"):
        export.load(tmp_path / "broken.jax")
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "none.jax")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"fmjax\[export\]"):
        export.load(tmp_path / "broken.jax")
