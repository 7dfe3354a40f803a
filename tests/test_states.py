"""States that are pytrees: laid out as one array and back, followed by every solver along a path for each leaf, and one example alone."""

import functools
import re
import warnings

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import guidance, inverse, likelihood, losses, marginals, parallel, paths, sampling, states, targets, times
from fmjax.models import mlp

LINEAR, COSINE = paths.Linear(), paths.Cosine()
MEANS = {
    "image": jnp.array([[[[0.5], [-1.0]]], [[[1.0], [0.3]]]]),
    "pose": jnp.array([[2.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]),
    "size": jnp.array([[1.0], [-1.0]]),
}
"""Two components of a dict of three arrays: an image of 1 x 2 pixels, a vector and a number."""
DATA = marginals.GaussianMixture(jnp.array([0.3, 0.7]), MEANS, 0.5)
LAYOUT = states.layout(MEANS)
FLAT = marginals.GaussianMixture(DATA.weights, LAYOUT.flatten("means", MEANS), 0.5)
SAME = paths.joint(LINEAR, MEANS)
TWO = paths.joint({"image": LINEAR, "pose": COSINE, "size": COSINE}, MEANS)
FLOWS = {name: make for name, (make, _) in cases.PATH_ORDERS.items()} | {"edm_heun": sampling.edm_heun, "path_heun": sampling.path_heun}
FLOWS |= {step.__name__: lambda path, step=step: step for step, _ in cases.ORDERS}
"""Every solver of a flow, made for a path."""
ORDERS = {name: order for name, (_, order) in cases.PATH_ORDERS.items()} | {"edm_heun": 1, "path_heun": 2}
ORDERS |= {step.__name__: order for step, order in cases.ORDERS}


def flat(tree):
    return LAYOUT.flatten("x", tree)


def draw(n=16, dtype=jnp.float32):
    """Noise and data of n examples."""
    x_1 = jax.tree.map(lambda leaf: leaf.astype(dtype), DATA.sample(jax.random.key(1), n))
    return sampling.noise_like(jax.random.key(2), x_1), x_1


# The layout.


def test_a_pytree_is_laid_out_and_back():
    x = {"b": (jnp.ones((4, 2, 3), jnp.bfloat16), jnp.arange(4.0).reshape(4, 1)), "a": jnp.zeros((4, 5))}
    layout = states.layout(x)
    assert str(layout) == "{'a': (B, 5), 'b': ((B, 2, 3), (B, 1))}"
    one = layout.flatten("x", x)
    assert one.shape == (4, 12)
    assert one.dtype == jnp.float32
    back = layout.unflatten(one, like=x)
    jax.tree.map(np.testing.assert_array_equal, back, x)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: leaf.dtype, x)
    many = layout.unflatten(jnp.stack([one, one]))
    assert many["b"][0].shape == (2, 4, 2, 3)
    assert all(states.layout(array) is None for array in (jnp.ones((2, 3)), np.ones((2, 3)), [[1.0, 2.0]], 3.0))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"image": MEANS["image"]}, r"x is the pytree .*, but must be like the state, \{'image': \(B, 1, 2, 1\), 'pose': \(B, 3\), "),
        (MEANS | {"pose": jnp.ones((2, 4))}, r"x\['pose'\] has shape \(2, 4\), but must be like the state, \(2, 3\)"),
        (MEANS | {"size": jnp.ones((3, 1))}, r"x\['size'\] has shape \(3, 1\), but must be like the state, \(2, 1\)"),
        (MEANS | {"size": jnp.ones((2, 1), int)}, r"x\['size'\] has dtype int"),
    ],
    ids=["a leaf is missing", "another width", "another batch", "integers"],
)
def test_another_pytree_is_named(tree, said):
    with pytest.raises((TypeError, ValueError), match=said):
        LAYOUT.flatten("x", tree)


def test_a_joint_path_is_of_its_state():
    x_0, x_1 = draw()
    with pytest.raises(TypeError, match=r"path is \{.*, a pytree: make it the path of a state by paths\.joint"):
        paths.flow({"image": LINEAR}, x_0, x_1, 0.5)
    with pytest.raises(TypeError, match="a joint path is of a pytree: give one path"):
        paths.joint(LINEAR, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"The paths .* do not go with the state \{'image'"):
        paths.joint({"image": LINEAR, "pose": COSINE}, x_1)
    other = {"image": x_1["pose"][:, None, :2, None], "pose": x_1["pose"], "size": x_1["size"][:, :, None]}
    for path in (TWO, sampling.dpm_solver_pp(TWO, 2).path, sampling.ddim(TWO).path):
        with pytest.raises(ValueError, match=r"joint for the state \{.*\}, but the state is \{.*'size': \(B, 1, 1\)\}"):
            paths.fits(path, other)
    same = lambda x, t: x
    for field in (
        targets.convert_field(TWO, same, source=targets.velocity, target=targets.data),
        targets.scale_input(TWO, same),
        sampling.sde_drift(TWO, same, 1.0),
        inverse.linear_inverse(TWO, same, lambda x: x["pose"], x_1["pose"]),
    ):
        with pytest.raises(ValueError, match="The path is joint for the state"):
            field(other, 0.5)
    with pytest.raises(ValueError, match=r"but x is one array of shape \(16, 3\)"):
        paths.interpolate(TWO, x_0["pose"], x_1["pose"], 0.5)
    with pytest.raises(ValueError, match="the distribution is of one array: make its means or points like the state"):
        marginals.velocity(LINEAR, FLAT)(x_1, 0.5)


@pytest.mark.parametrize("t", [0.3, jnp.linspace(0.0, 0.9, 16)], ids=["one time", "a time per example"])
def test_every_leaf_goes_along_its_path(t):
    x_0, x_1 = draw()
    functions = [paths.interpolate, paths.flow, paths.conditional_velocity, paths.conditional_score]
    for function in functions:
        found = function(TWO, x_0, x_1, t)
        for name, path in (("image", LINEAR), ("pose", COSINE), ("size", COSINE)):
            expected = function(path, x_0[name], x_1[name], t)
            each = [part[name] for part in found] if isinstance(found, tuple) else [found[name]]
            for part, other in zip(each, expected if isinstance(expected, tuple) else [expected], strict=True):
                np.testing.assert_allclose(part, other, rtol=1e-6, atol=1e-6)
    x_t, u_t = paths.flow(TWO, x_0, x_1, t)
    back = targets.convert(TWO, u_t, x_t, t, source=targets.velocity, target=targets.data)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), back, x_1)


def test_the_oracle_of_two_paths_is_a_product():
    """With one component the leaves are independent, so each has the marginal velocity of its own path."""
    one = marginals.GaussianMixture(jnp.ones(1), jax.tree.map(lambda leaf: leaf[:1], MEANS), 0.5)
    x, _ = draw()
    for t in (0.3, jnp.linspace(0.1, 0.9, 16)):
        found = marginals.velocity(TWO, one)(x, t), marginals.score(TWO, one)(x, t)
        for name, path in (("image", LINEAR), ("pose", COSINE), ("size", COSINE)):
            alone = marginals.GaussianMixture(jnp.ones(1), MEANS[name][:1], 0.5)
            np.testing.assert_allclose(found[0][name], marginals.velocity(path, alone)(x[name], t), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[1][name], marginals.score(path, alone)(x[name], t), rtol=1e-4, atol=1e-5)
        total = sum(
            marginals.log_density(path, marginals.GaussianMixture(jnp.ones(1), MEANS[name][:1], 0.5))(x[name], t)
            for name, path in (("image", LINEAR), ("pose", COSINE), ("size", COSINE))
        )
        np.testing.assert_allclose(marginals.log_density(TWO, one)(x, t), total, rtol=1e-4, atol=1e-4)
    points = marginals.Empirical(MEANS)
    assert jax.tree.map(jnp.shape, points.sample(jax.random.key(0), 5)) == {"image": (5, 1, 2, 1), "pose": (5, 3), "size": (5, 1)}
    assert jnp.isfinite(flat(marginals.velocity(TWO, points)(x, 0.5))).all()


# Every solver.


def test_every_solver_follows_a_pytree_as_one_array():
    """Bit for bit, and to rounding along a joint path of one path."""
    x_0, _ = draw()
    grid = times.cosine(times.uniform_grid(8))

    @jax.jit
    def found(x_0):
        ends = {}
        for name, make in FLOWS.items():
            array, _ = sampling.sample_ode(marginals.velocity(LINEAR, FLAT), flat(x_0), grid, step=make(LINEAR))
            tree, _ = sampling.sample_ode(marginals.velocity(LINEAR, DATA), x_0, grid, step=make(LINEAR))
            joint, _ = sampling.sample_ode(marginals.velocity(SAME, DATA), x_0, grid, step=make(SAME))
            ends[name] = array, flat(tree), flat(joint)
        return ends

    for name, (array, tree, joint) in found(x_0).items():
        np.testing.assert_array_equal(tree, array, err_msg=name)
        np.testing.assert_allclose(joint, array, atol=3e-6, err_msg=name)


MOST = {1: 2e-2, 2: 2e-3, 3: 3e-4, 4: 3e-5}
"""The mean error at 48 steps by the order of a solver, of which DDIM's is 1.7e-2."""


@pytest.mark.usefixtures("x64")
def test_every_solver_follows_two_paths():
    """To the exact mixture's end, which Runge-Kutta's method finds in 1,000 steps, with an error of its order."""
    fine, grid = times.cosine(times.uniform_grid(1000)), times.cosine(times.uniform_grid(48))
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), DATA)
    x_0, field = draw(dtype=jnp.float64)[0], marginals.velocity(TWO, data)

    @jax.jit
    def found():
        exact = flat(sampling.sample_ode(field, x_0, fine, step=sampling.rk4)[0])
        ends = {name: flat(sampling.sample_ode(field, x_0, grid, step=make(TWO))[0]) for name, make in FLOWS.items()}
        return {name: jnp.abs(end - exact).mean() for name, end in ends.items()}

    errors = {name: float(error) for name, error in found().items()}
    print(errors)
    for name, error in errors.items():
        assert error < MOST[ORDERS[name]], errors


@pytest.mark.parametrize("sigma", ["0.5", "beta"])
def test_every_step_with_noise_draws_the_data_along_two_paths(sigma):
    n = 4000
    x_1, x_0 = DATA.sample(jax.random.key(1), n), draw(n)[0]
    field, sigma_t = marginals.velocity(TWO, DATA), cases.SIGMAS[sigma](TWO)
    mean = FLAT.weights @ FLAT.means
    centred = FLAT.means - mean[None]
    covariance = jnp.einsum("k,ki,kj->ij", FLAT.weights, centred, centred) + 0.25 * jnp.eye(6)

    @jax.jit
    def found(key, x_0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            last = {name: sampling.euler_maruyama_noiseless for name in ("euler_maruyama", "stochastic_heun")}
            return {
                name: flat(
                    sampling.sample_diffusion(TWO, field, sigma_t, key, x_0, times.uniform_grid(50), step=step, last=last.get(name))[0]
                )
                for name, step in cases.NOISY_STEPS.items()
            }

    for name, x in found(jax.random.key(5), x_0).items():
        np.testing.assert_allclose(x.mean(0), mean, atol=0.08, err_msg=name)
        np.testing.assert_allclose(jnp.cov(x.T), covariance, atol=0.16, err_msg=name)
    assert jax.tree.structure(x_1) == jax.tree.structure(x_0)


def test_an_sde_without_a_path_and_trajectories():
    x_0, _ = draw()
    key, grid = jax.random.key(3), times.uniform_grid(4)

    def drift(x, t):
        return jax.tree.map(lambda leaf: -leaf, x)

    x, saved = sampling.sample_sde(drift, 0.3, key, x_0, grid, save=lambda x, t: x["pose"], save_every=2)
    array, _ = sampling.sample_sde(lambda x, t: -x, 0.3, key, flat(x_0), grid)
    np.testing.assert_array_equal(flat(x), array)
    assert saved.shape == (3, 16, 3)
    np.testing.assert_array_equal(saved[-1], x["pose"])
    field = marginals.velocity(LINEAR, DATA)
    back, _ = sampling.sample_ode(*(lambda pair: (pair[0], x_0, pair[1]))(sampling.reverse(field, grid)))
    assert jax.tree.structure(back) == jax.tree.structure(x_0)
    langevin = sampling.langevin(marginals.score(LINEAR, DATA), 0.5)(x_0, 0.5)
    extended = sampling.sde_extension(field, marginals.score(LINEAR, DATA), 0.5)(x_0, 0.5)
    drifted = sampling.sde_drift(LINEAR, field, 0.5)(x_0, 0.5)
    np.testing.assert_allclose(flat(extended), flat(field(x_0, 0.5)) + flat(langevin), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(drifted), flat(extended), rtol=1e-4, atol=1e-5)


def test_each_leaf_keeps_its_dtype():
    x_0 = draw()[0]
    x_0 = x_0 | {"image": x_0["image"].astype(jnp.bfloat16)}
    x_1, _ = sampling.sample_ode(marginals.velocity(LINEAR, DATA), x_0, times.uniform_grid(4))
    assert {name: leaf.dtype for name, leaf in x_1.items()} == {name: leaf.dtype for name, leaf in x_0.items()}


def test_noise_does_not_depend_on_the_batch():
    x, key = draw()[1], jax.random.key(0)
    whole, head = sampling.noise_like(key, x), sampling.noise_like(key, jax.tree.map(lambda leaf: leaf[:5], x))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:5], b), whole, head)
    np.testing.assert_array_equal(sampling.noise_like(key, x["pose"]), sampling.noise(key, (16, 3)))
    keys = jax.random.split(key, 16)
    alone = sampling.noise_like(keys[3:4], jax.tree.map(lambda leaf: leaf[3:4], x))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[3:4], b), sampling.noise_like(keys, x), alone)


# One array costs nothing.


def instructions(function, *arguments):
    """How many instructions of each kind a compiled program has."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    names = re.findall(r" = \S+ ([a-z][\w-]*)\(", text)
    return {name: names.count(name) for name in sorted(set(names))}


def test_one_array_is_the_program_written_by_hand():
    x, grid = jnp.ones((8, 4, 4, 1)), jnp.linspace(0.0, 1.0, 11)

    def field(x, t):
        return jnp.sin(x) * t

    def by_hand(x, grid):
        def body(x, interval):
            t, dt = interval
            return x + dt * field(x, t), None

        return jax.lax.scan(body, x, (grid[:-1], jnp.diff(grid)))[0]

    ours = instructions(lambda x, grid: sampling.sample_ode(field, x, grid, step=sampling.euler)[0], x, grid)
    assert ours == instructions(by_hand, x, grid)


# Losses, guidance, likelihood and the rest, as of one array.


def test_functions_of_a_pytree_are_those_of_one_array():
    x_0, x_1 = draw()
    t, y = jnp.linspace(0.05, 0.9, 16), jnp.arange(16) % 3

    def field(x, t, y=None):
        """A function of all leaves together."""
        total = flat(x).sum(1)
        return jax.tree.map(lambda leaf: jnp.sin(leaf + (total + (0 if y is None else y)).reshape(-1, *(1,) * (leaf.ndim - 1))), x)

    def of_array(x, t, y=None):
        return flat(field(LAYOUT.unflatten(x), t, y))

    def agree(tree, array):
        np.testing.assert_allclose(flat(tree), array, rtol=1e-5, atol=1e-5)

    a_0, a_1 = flat(x_0), flat(x_1)
    for target in cases.TARGETS:
        ours = losses.denoising(field, LINEAR, x_0, x_1, t, target=target)
        np.testing.assert_allclose(ours, losses.denoising(of_array, LINEAR, a_0, a_1, t, target=target), rtol=1e-5)
        converted = targets.convert_field(LINEAR, field, source=target, target=targets.velocity)(x_0, t)
        agree(converted, targets.convert_field(LINEAR, of_array, source=target, target=targets.velocity)(a_0, t))
    np.testing.assert_allclose(losses.flow_matching(field, LINEAR, x_0, x_1, t), losses.flow_matching(of_array, LINEAR, a_0, a_1, t), 1e-5)
    agree(
        targets.change_path(field, source=LINEAR, target=COSINE)(x_0, t),
        targets.change_path(of_array, source=LINEAR, target=COSINE)(a_0, t),
    )

    for combine in (guidance.extrapolate, guidance.cfg_zero_star, guidance.apg(), guidance.cfg_rescale()):
        agree(*(guidance.classifier_free(f, y, 3, 2.0, combine=combine)(x, 0.5) for f, x in ((field, x_0), (of_array, a_0))))
        weak = (lambda x, t: field(x, t, y)), (lambda x, t: of_array(x, t, y))
        agree(*(guidance.autoguidance(f, w, 2.0, combine=combine)(x, 0.5) for f, w, x in ((field, weak[0], x_0), (of_array, weak[1], a_0))))
    agree(*(guidance.compose(f, [y, y + 1], 3, [2.0, jnp.linspace(0, 1, 16)])(x, 0.5) for f, x in ((field, x_0), (of_array, a_0))))
    agree(*(guidance.interval(f, w, 0.2, 0.8)(x, 0.5) for f, w, x in ((field, weak[0], x_0), (of_array, weak[1], a_0))))
    logits = (lambda x, t: -(flat(x) ** 2).sum(1)), (lambda x, t: -(x**2).sum(1))
    agree(*(guidance.classifier(f, p, 2.0)(x, 0.5) for f, p, x in ((field, logits[0], x_0), (of_array, logits[1], a_0))))

    measured = x_1["pose"]
    pose = (lambda x: x["pose"]), (lambda x: LAYOUT.unflatten(x)["pose"])
    agree(*(inverse.linear_inverse(LINEAR, f, a, measured)(x, 0.5) for f, a, x in ((field, pose[0], x_0), (of_array, pose[1], a_0))))

    probes = jax.random.rademacher(jax.random.key(4), (16, 3, 6), float)
    tree_probes = LAYOUT.unflatten(probes)
    for ours, theirs in (
        (likelihood.exact_divergence, likelihood.exact_divergence),
        (likelihood.hutchinson(tree_probes), likelihood.hutchinson(probes)),
        (likelihood.hutch_plus_plus(tree_probes, tree_probes), likelihood.hutch_plus_plus(probes, probes)),
    ):
        grid = times.uniform_grid(3)
        tree = likelihood.log_density(field, likelihood.normal, x_1, grid, divergence=ours)
        array = likelihood.log_density(of_array, likelihood.normal, a_1, grid, divergence=theirs)
        np.testing.assert_allclose(tree.log_p, array.log_p, rtol=1e-4)
        agree(tree.x, array.x)
    agree(likelihood.sample(field, likelihood.normal, x_0, grid).x, likelihood.sample(of_array, likelihood.normal, a_0, grid).x)
    agree(sampling.sample_ode_adaptive(field, x_0).x, sampling.sample_ode_adaptive(of_array, a_0).x)
    spread = likelihood.dequantize(jax.random.key(6), x_1, 0.1)
    assert float(jnp.abs(flat(spread) - a_1).max()) <= 0.05001

    def sampled(keys, indices):
        return sampling.sample_ode(field, sampling.noise_like(keys, jax.tree.map(lambda leaf: leaf[: len(keys)], x_1)), grid)[0]

    drawn = parallel.sample(sampled, jax.random.key(0), 10, chunk=4, progress=False)
    assert jax.tree.map(np.shape, drawn) == {"image": (10, 1, 2, 1), "pose": (10, 3), "size": (10, 1)}


def test_conditions_that_are_pytrees_are_dropped_together():
    y = {"label": jnp.arange(1000) % 5, "vector": jnp.ones((1000, 2))}
    null = {"label": 5, "vector": jnp.nan}
    dropped = guidance.drop_labels(jax.random.key(0), y, null, 0.3)
    gone = np.asarray(dropped["label"] == 5)
    np.testing.assert_array_equal(gone[:, None].repeat(2, 1), np.isnan(dropped["vector"]))
    assert 0.25 < gone.mean() < 0.35

    def field_y(x, t, y):
        return x * jnp.where(jnp.isnan(y["vector"]).all(1), 0.0, y["label"] + 1)[:, None]

    x = jnp.ones((1000, 2))
    np.testing.assert_allclose(guidance.classifier_free(field_y, y, null, 3.0)(x, 0.5), 3 * field_y(x, 0.5, y))
    with pytest.raises(ValueError, match="give a null for each of its leaves"):
        guidance.drop_labels(jax.random.key(0), y, 5, 0.3)
    with pytest.raises(ValueError, match="y has leaves of 1000 and of 999 conditions"):
        guidance.drop_labels(jax.random.key(0), y | {"vector": jnp.ones((999, 2))}, null, 0.3)


# Training, against the oracle.


@pytest.mark.usefixtures("optimized")
def test_a_network_learns_a_pytree():
    """Its loss comes near the least there is, that of the exact velocity, on an image and a vector and a number with joint modes."""
    import optax

    from fmjax import training

    model, optimizer = mlp.MLP(hidden_size=64, depth=3), optax.adam(optax.cosine_decay_schedule(5e-3, 800))

    def field(params):
        return lambda x, t: LAYOUT.unflatten(model.apply(params, flat(x), t))

    def loss_of(field, key):
        key_1, key_0, key_t = jax.random.split(key, 3)
        x_1 = DATA.sample(key_1, 256)
        return losses.flow_matching(field, TWO, sampling.noise_like(key_0, x_1), x_1, times.stratified(key_t, 256)).mean()

    step = jax.jit(training.make_step(lambda params, key, _: loss_of(field(params), key), optimizer))
    state = training.init(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6)), 0.5), optimizer)
    for i in range(800):
        state, _ = step(state, jax.random.key(i), jnp.zeros(()))
    keys = jax.random.split(jax.random.key(10_000), 20)
    exact = marginals.velocity(TWO, DATA)
    found, least, zero = (
        jax.jit(jax.vmap(functools.partial(loss_of, each)))(keys).mean()
        for each in (field(state.ema), exact, lambda x, t: jax.tree.map(jnp.zeros_like, x))
    )
    assert least < found < least + 0.05 * (zero - least), (least, found, zero)
    x_0 = draw(4000)[0]
    x_1, _ = jax.jit(lambda x_0: sampling.sample_ode(field(state.ema), x_0, times.uniform_grid(30)))(x_0)
    np.testing.assert_allclose(flat(x_1).mean(0), FLAT.weights @ FLAT.means, atol=0.15)
    # Leaves belong together: the signs of the number and of the vector's first entry are those of one mode.
    assert float(((x_1["size"][:, 0] > 0) == (x_1["pose"][:, 0] > 0.5)).mean()) > 0.93


# A single example under vmap.


def test_a_single_example_under_vmap():
    """Of every function of states, to rounding."""
    field, score = marginals.velocity(COSINE, cases.mixture()), marginals.score(COSINE, cases.mixture())
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 6, 2))
    t, keys, grid = jnp.linspace(0.1, 0.9, 6), jax.random.split(jax.random.key(1), 6), times.uniform_grid(5, start=0.02, end=0.98)
    y = jnp.arange(6)

    def field_y(x, t, y):
        return field(x, t) + y[:, None]

    probes = jax.random.rademacher(jax.random.key(2), (6, 2, 2), float)
    functions = {
        "conditional_velocity": lambda x, z, t, k, y, e: paths.conditional_velocity(COSINE, x, z, t),
        "convert": lambda x, z, t, k, y, e: targets.convert(COSINE, x, z, t, source=targets.velocity, target=targets.data),
        "change_path": lambda x, z, t, k, y, e: targets.change_path(field, source=COSINE, target=LINEAR)(x, t),
        "score": lambda x, z, t, k, y, e: score(x, t),
        "flow_matching": lambda x, z, t, k, y, e: losses.flow_matching(field, COSINE, x, z, t),
        "classifier_free": lambda x, z, t, k, y, e: guidance.classifier_free(field_y, y, 9, 2.0, combine=guidance.apg())(x, t),
        "classifier": lambda x, z, t, k, y, e: guidance.classifier(field, lambda x, t: -(x**2).sum(1), 2.0)(x, t),
        "inverse": lambda x, z, t, k, y, e: inverse.linear_inverse(COSINE, field, lambda x: x[:1], z[:, :1])(x, t),
        "hutchinson": lambda x, z, t, k, y, e: (
            likelihood.log_density(field, likelihood.normal, z, grid, divergence=likelihood.hutchinson(e)).log_p
        ),
        "adaptive": lambda x, z, t, k, y, e: sampling.sample_ode_adaptive(field, x, start=0.02, end=0.98).x,
        "unipc": lambda x, z, t, k, y, e: sampling.sample_ode(field, x, grid, step=sampling.unipc(COSINE, 2))[0],
        "edm_heun": lambda x, z, t, k, y, e: sampling.sample_ode(field, x, grid, step=sampling.edm_heun(COSINE))[0],
        "churn": lambda x, z, t, k, y, e: sampling.sample_diffusion(
            COSINE, field, sampling.sigma_beta(COSINE), k, x, grid, step=sampling.churn()
        )[0],
    }

    def alone(function, *arguments):
        return function(*(argument[None] for argument in arguments))[0]

    @jax.jit
    def found(*arguments):
        return {
            name: (function(*arguments), jax.vmap(functools.partial(alone, function))(*arguments)) for name, function in functions.items()
        }

    for name, (batch, one) in found(x_0, x_1, t, keys, y, probes).items():
        assert jnp.isfinite(batch).all(), name
        np.testing.assert_allclose(one, batch, rtol=2e-4, atol=2e-5, err_msg=name)


def test_errors_of_pytrees_say_what_to_do():
    x_0, x_1 = draw()
    with pytest.raises(TypeError, match="is joint itself: give one pytree with a path for each leaf"):
        paths.joint({"a": TWO, "b": LINEAR}, {"a": x_1, "b": x_1["pose"]})
    with pytest.raises(TypeError, match=r"of a pytree sampling\.noise_like\(key, x\) draws like x"):
        sampling.noise(jax.random.key(0), x_1)
    with pytest.raises(ValueError, match=r"The field's output is one array or number, of shape \(16, 3\), but must be a pytree"):
        losses.flow_matching(lambda x, t: x["pose"], LINEAR, x_0, x_1, 0.5)
    with pytest.raises(TypeError, match="adjoint is 'backsolve', but it is one of diffrax's"):
        sampling.sample_ode_adaptive(lambda x, t: x, x_0, adjoint="backsolve")


def test_scales_may_be_of_each_leaf():
    whole = marginals.GaussianMixture(DATA.weights, MEANS, {"image": 0.5, "pose": jnp.array([0.5, 0.5]), "size": jnp.full((2, 1), 0.5)})
    x, _ = draw()
    np.testing.assert_allclose(flat(marginals.score(TWO, whole)(x, 0.5)), flat(marginals.score(TWO, DATA)(x, 0.5)), rtol=1e-6)
