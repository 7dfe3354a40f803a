"""Conditions: what is nan is not given, has learnt values in its place, and leaves no nan behind, in any network that takes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fmjax import guidance
from fmjax.models import conditions, dit, layers, mlp, unet
from fmjax.models.conditions import Image, Label, Several, Tokens, Vector

KEY = jax.random.key(0, impl="unsafe_rbg")
B, F = 3, 8
X = jax.random.normal(KEY, (B, 4, 4, 2))
T = jnp.array([0.1, 0.5, 0.9])
POINTS = X[:, 0, 0]


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def nan_at(y, *places):
    for place in places:
        y = y.at[place].set(jnp.nan)
    return y


# Conditions whose second example is not given, one token of the third is padding and some pixels are unknown.
KINDS = {
    "label": (Label(5), jnp.array([1, 5, 4])),
    "vector": (Vector(), nan_at(draw(B, 3), 1)),
    "tokens": (Tokens(), nan_at(draw(B, 4, 5), 1, (2, 3))),
    "image": (Image(), nan_at(draw(B, 4, 4, 3), 1, (2, 0))),
}
REAL = ["vector", "tokens", "image"]
NETWORKS = {
    "mlp": mlp.MLP(hidden_size=F, depth=1),
    "dit": dit.DiT(patch_size=2, hidden_size=F, depth=1, num_heads=2, time_embedding=layers.Sinusoids(4)),
    "unet": unet.UNet(model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), head_dim=4, groups=4, dropout=0.0),
}


def random_parameters(model, *inputs):
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: model.init(KEY, *inputs)))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


@functools.cache
def embedded(kind):
    """Parameters of a condition, and what it makes of its y, compiled."""
    module, y = KINDS[kind]
    params = random_parameters(module, y, X, F)
    return params, jax.jit(lambda params, y: module.apply(params, y, X, F))


def given(out):
    return [leaf for leaf in jax.tree.leaves(out) if leaf.dtype != bool]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_nan_is_the_null(kind):
    """And nothing else is: another value of the null changes those examples, tokens and pixels alone."""
    (params, apply), (_, y) = embedded(kind), KINDS[kind]
    null = params["params"]["label"]["embedding"][5] if kind == "label" else params["params"]["null"]
    other = jax.tree.map(lambda leaf: leaf + 1 if leaf.shape == null.shape and (leaf == null).all() else leaf, params)
    if kind == "label":
        other = {"params": {"label": {"embedding": params["params"]["label"]["embedding"].at[5].add(1)}}}
    out, changed = apply(params, y), apply(other, y)
    (one,), (two,) = given(out), given(changed)
    assert np.isfinite(one).all()
    moved = np.abs(one - two) > 0.5
    expected = np.zeros_like(moved)
    if kind == "image":
        expected[..., :-1] = np.isnan(y)
        np.testing.assert_array_equal(out.image[..., -1], ~np.isnan(y).any(-1))
        np.testing.assert_array_equal(out.image[0, ..., :-1], y[0])
    elif kind == "tokens":
        expected[1, 0] = True
        np.testing.assert_array_equal(out.tokens_mask, [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
        np.testing.assert_allclose(out.tokens[1, 0], null)
    else:
        expected[1] = True
        np.testing.assert_allclose(out.vector[1], null)
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("kind", REAL)
def test_no_nan_in_gradients(kind):
    """Not of the parameters, all of which have one, and not of y; examples of a batch do not meet."""
    (params, apply), (_, y) = embedded(kind), KINDS[kind]

    def loss(params, y):
        return sum(jnp.where(leaf > 0, leaf**2, leaf).sum() for leaf in given(apply(params, y)))

    grads, grad_y = jax.jit(jax.grad(loss, (0, 1)))(params, y)
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    np.testing.assert_array_equal(np.asarray(grad_y)[np.isnan(y)], 0)
    assert np.abs(np.asarray(grad_y)[~np.isnan(y)]).min() > 0
    for i in range(B):
        for one, other in zip(given(apply(params, y)), given(apply(params, y.at[(i + 1) % B].set(0.5))), strict=True):
            np.testing.assert_allclose(one[i], other[i], rtol=1e-6)


@pytest.mark.parametrize("kind", REAL)
def test_half_a_nan(kind):
    """An error where it is known, also in a compiled function, and nan of that example where it is not."""
    (params, apply), (module, y) = embedded(kind), KINDS[kind]
    half = y.at[(0,) * y.ndim].set(jnp.nan)
    with pytest.raises(ValueError, match=r"y\[0.*\] is \[ *nan .*of which some is nan and some is not: .*conditions.Several"):
        module.apply(params, half, X, F)
    with pytest.raises(ValueError, match="of which some is nan"):
        jax.eval_shape(lambda: module.apply(params, half, X, F))
    for leaf in given(apply(params, half)):
        np.testing.assert_array_equal(np.isnan(leaf).reshape(B, -1).any(1), [True, False, False])


@functools.cache
def network(name, *kinds):
    """A network with a condition, its y, parameters and gradient with its output, compiled."""
    parts, y = {kind: KINDS[kind][0] for kind in kinds}, {kind: KINDS[kind][1] for kind in kinds}
    model = NETWORKS[name].clone(condition=Several(parts) if len(kinds) > 1 else parts[kinds[0]])
    y = y if len(kinds) > 1 else y[kinds[0]]
    x = POINTS if name == "mlp" else X
    params = random_parameters(model, x, T, y)

    def loss(params, y):
        out = model.apply(params, x, T, y)
        return (out**2).sum(), out

    return model, x, y, params, jax.jit(jax.grad(loss, has_aux=True))


ALL = [("mlp", "label", "vector"), ("dit", *KINDS), ("unet", *KINDS)]


@pytest.mark.parametrize("name", ALL, ids=lambda name: name[0])
def test_networks_take_several(name):
    """The output is like x, each part of y changes it, a second value compiles nothing, and every parameter has a gradient."""
    _, x, y, params, gradient = network(*name)
    grads, out = gradient(params, y)
    assert out.shape == x.shape
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad) > 0).mean() > 0.3, path
    for kind in y:
        # The second example has nothing given of any of them, which takes another label for a change.
        other = jnp.array([2, 2, 2]) if kind == "label" else jnp.full_like(y[kind], jnp.nan)
        _, changed = gradient(params, y | {kind: other})
        moved = np.abs(changed - out).reshape(B, -1).max(1) > 1e-6
        np.testing.assert_array_equal(moved, [True, kind == "label", True], kind)
    assert gradient._cache_size() == 1


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_padding_tokens_change_nothing(name):
    _, _, y, params, gradient = network(name, *KINDS)
    _, out = gradient(params, y)
    moved = y | {"tokens": jnp.concatenate([y["tokens"], jnp.full((B, 2, 5), jnp.nan)], axis=1)}
    _, longer = gradient(params, moved)
    np.testing.assert_allclose(longer, out, rtol=1e-5, atol=1e-6)


def test_several_add_up():
    """Vectors are summed, tokens and images concatenated by name, with the masks of both."""

    class Whole(Tokens):
        def __call__(self, y, x, features):
            return conditions.Embedded(tokens=y)

    parts = {"b": Vector(), "a": Vector(), "text": Tokens(), "all": Whole(), "u": Image(), "v": Image()}
    y = {"a": draw(B, 3), "b": draw(B, 2), "text": KINDS["tokens"][1], "all": draw(B, 2, F), "u": draw(B, 4, 4, 1), "v": draw(B, 4, 4, 2)}
    module = Several(parts)
    params = random_parameters(module, y, X, F)
    out = module.apply(params, y, X, F)
    each = {name: part.apply({"params": params["params"].get(f"parts_{name}", {})}, y[name], X, F) for name, part in parts.items()}
    np.testing.assert_allclose(out.vector, each["a"].vector + each["b"].vector, rtol=1e-6)
    np.testing.assert_allclose(out.tokens, jnp.concatenate([y["all"], each["text"].tokens], axis=1))
    np.testing.assert_array_equal(out.tokens_mask, np.concatenate([np.ones((B, 2), bool), each["text"].tokens_mask], axis=1))
    np.testing.assert_allclose(out.image, jnp.concatenate([each["u"].image, each["v"].image], axis=-1))


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_are_the_short_form(name):
    """The same network by `num_classes`, whose parameters are elsewhere."""
    model, x, y, params, _ = network(name, "label")
    short = model.clone(condition=None, num_classes=5)
    inner = dict(params["params"])
    table = inner.pop("condition")["label"]
    moved = {"params": inner | {"LabelEmbedding_0" if name == "mlp" else "label": table}}
    expected = jax.eval_shape(short.init, KEY, x, T, y)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, expected)
    out, other = jax.jit(model.apply)(params, x, T, y), jax.jit(short.apply)(moved, x, T, y)
    np.testing.assert_array_equal(out, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_condition_there_are_no_parameters(name):
    x = POINTS if name == "mlp" else X
    flat = traverse_util.flatten_dict(jax.eval_shape(NETWORKS[name].init, KEY, x, T)["params"], sep="/")
    assert not any("condition" in path or "cross" in path for path in flat)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_attention_to_tokens_starts_at_zero(name):
    model, x, y, _, _ = network(name, *KINDS)
    flat = traverse_util.flatten_dict(jax.eval_shape(model.init, KEY, x, T, y)["params"], sep="/")
    assert any(path.endswith("cross_attention/out/kernel") for path in flat)
    cross = layers.CrossAttention(2)
    h, tokens = draw(B, 5, F), draw(B, 4, 6)
    params = cross.init(KEY, h, tokens)
    np.testing.assert_array_equal(cross.apply(params, h, tokens), np.zeros_like(h))


def test_cross_attention_by_hand():
    h, tokens, mask = draw(1, 2, 4), draw(1, 3, 5), jnp.array([[True, False, True]])
    cross = layers.CrossAttention(2)
    params = random_parameters(cross, h, tokens)
    weights = params["params"]
    q = np.asarray(h[0] @ weights["q"]["kernel"] + weights["q"]["bias"][None]).reshape(2, 2, 2)
    kv = np.asarray(tokens[0] @ weights["kv"]["kernel"] + weights["kv"]["bias"][None]).reshape(3, 2, 2, 2)
    out = np.zeros((2, 2, 2))
    for n in range(2):
        for head in range(2):
            scores = np.array([q[n, head] @ kv[place, 0, head] / np.sqrt(2) for place in (0, 2)])
            share = np.exp(scores) / np.exp(scores).sum()
            out[n, head] = share @ kv[(0, 2), 1, head]
    expected = out.reshape(2, 4) @ np.asarray(weights["out"]["kernel"]) + np.asarray(weights["out"]["bias"])[None]
    np.testing.assert_allclose(cross.apply(params, h, tokens, mask)[0], expected, rtol=1e-4, atol=1e-5)


def test_scan_and_remat_take_tokens():
    model, x, y, params, gradient = network("dit", *KINDS)
    scanned = jax.jit(model.clone(scan=True, remat=True).apply)(dit.stack(params), x, T, y)
    np.testing.assert_allclose(scanned, gradient(params, y)[1], rtol=1e-4, atol=1e-5)
    model, x, y, params, _ = network("unet", *KINDS)
    assert jax.eval_shape(model.clone(remat=True).apply, params, x, T, y).shape == x.shape


def test_an_image_behind_a_mask_does_not_matter():
    model, x, y, params, _ = network("dit", "image")
    mask = np.ones(X.shape[:-1], bool)
    mask[:, 2:] = False
    apply = jax.jit(lambda x, y: model.apply(params, x, T, y, mask=mask))
    np.testing.assert_array_equal(apply(x, y), apply(x.at[:, 2:].set(jnp.nan), y.at[:, 2:].set(7.0)))


def test_the_null_and_the_condition_in_one_batch():
    """As guidance puts them, and each example alone by vmap."""
    model, x, y, params, _ = network("mlp", "vector")
    field = jax.jit(model.apply)
    both = field(params, jnp.concatenate([x, x]), jnp.concatenate([T, T]), jnp.concatenate([jnp.full_like(y, jnp.nan), y]))
    np.testing.assert_allclose(both[B:], field(params, x, T, y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both[1], both[B + 1], rtol=1e-6)
    alone = jax.vmap(lambda x, t, y: model.apply(params, x[None], t, y[None])[0])(x, T, y)
    np.testing.assert_allclose(alone, both[B:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [("mlp", "label", "vector"), ("dit", "tokens"), ("dit", "image")], ids=" ".join)
def test_guidance_by_each_kind(name):
    """Is affine in the value under the condition and that under none, which nan and, of labels, their number stand for."""
    model, x, y, params, _ = network(*name)
    null = {"label": 5, "vector": jnp.nan} if isinstance(y, dict) else jnp.nan
    none = {"label": jnp.full(B, 5), "vector": jnp.full((B, 3), jnp.nan)} if isinstance(y, dict) else jnp.full_like(y, jnp.nan)
    field_y = jax.jit(lambda x, t, y: model.apply(params, x, t, y))
    guided = guidance.classifier_free(field_y, y, null, 3.0)(x, 0.5)
    np.testing.assert_allclose(guided, 3 * field_y(x, 0.5, y) - 2 * field_y(x, 0.5, none), rtol=1e-4, atol=1e-5)
    dropped = guidance.drop_labels(KEY, y, null, 1.0)
    jax.tree.map(np.testing.assert_array_equal, dropped, none)


@pytest.mark.parametrize("layer", [mlp.plain, mlp.Residual], ids=["plain", "residual"])
def test_mlp_with_a_time_embedding(layer):
    model = mlp.MLP(hidden_size=8, depth=2, time_embedding=layers.Sinusoids(4), layer=layer, condition=Vector())
    y = KINDS["vector"][1]
    params = random_parameters(model, POINTS, T, y)

    def loss(params, t):
        out = model.apply(params, POINTS, t, y)
        return (out**2).sum(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, out = gradient(params, T)
    assert out.shape == POINTS.shape
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    assert (np.abs(gradient(params, T + 0.01)[1] - out).max(1) > 1e-4).all()


def test_residual_layers_start_as_the_identity():
    layer, h, e = mlp.Residual(4), draw(B, 4), draw(B, 2)
    params = layer.init(KEY, h, e)
    np.testing.assert_array_equal(layer.apply(params, h, e), h)
    wider = layer.init_with_output(KEY, draw(B, 3), e)
    assert wider[0].shape == (B, 4)
    assert set(wider[1]["params"]) == {"skip", "in", "embedding", "out"}
