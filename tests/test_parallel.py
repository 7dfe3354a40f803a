"""One step on eight devices, in each of the ways: the same training, what the devices tell each other, what each one holds."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fmjax import losses, parallel, paths, sampling, times, training
from fmjax.models import dit, mlp

MODEL = mlp.MLP(hidden_size=64, depth=2, num_classes=4)
LARGE = dit.DiT(patch_size=4, hidden_size=128, depth=1, num_heads=2, num_classes=4)
OPTIMIZER = optax.adam(1e-3)
KEY = jax.random.key(3)
SIZE = 16


def loss_fn(model, params, key, batch):
    """Flow matching that draws its noise and its times."""
    x_1, y = batch
    key_0, key_t = jax.random.split(key)
    return of_drawn(model, params, sampling.noise(key_0, x_1.shape), x_1, jax.random.uniform(key_t, x_1.shape[:1]), y)


def of_drawn(model, params, x_0, x_1, t, y):
    return losses.flow_matching(lambda x, t: model.apply(params, x, t, y), paths.Linear(), x_0, x_1, t).mean()


def given_noise(params, key, batch):
    """The same with noise and times from the batch."""
    return of_drawn(MODEL, params, *batch)


def make(model=MODEL):
    """A state whose output is not zero."""

    def made():
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), 0.5, jnp.zeros(1, jnp.int32))
        noise = jax.random.normal(jax.random.key(1), (100_000,))
        leaves, tree = jax.tree.flatten(params)
        leaves = [leaf + 0.02 * jnp.resize(noise[i:], leaf.shape) for i, leaf in enumerate(leaves)]
        return training.init(tree.unflatten(leaves), OPTIMIZER)

    return made


def alone_at():
    return jax.jit(make())()


def batch(seed, drawn=False):
    rng = np.random.default_rng(seed)
    images = [rng.normal(size=(SIZE, 8, 8, 1)).astype(np.float32) for _ in range(2)]
    y = rng.integers(0, 5, SIZE).astype(np.int32)
    return (*images, rng.uniform(size=SIZE).astype(np.float32), y) if drawn else (images[0], y)


def train(step, state, mesh=None, *, drawn=False, steps=20, order=slice(None)):
    """The state after some steps, by `fit`."""
    sharding = None if mesh is None else parallel.batch_sharding(mesh, SIZE)
    batches = (jax.device_put(jax.tree.map(lambda x: x[order], batch(seed, drawn)), sharding) for seed in range(steps))
    return training.fit(step, training.Run(state, KEY), batches, steps=steps, log_every=7, progress=False).state


def step_of(loss, **options):
    """A step that may be traced once, and once more where `pmap` looks at what it averages."""
    chex.clear_trace_counter()
    traces = 2 if "axis_name" in options else 1
    return chex.assert_max_traces(training.make_step(loss, options.pop("optimizer", OPTIMIZER), **options), n=traces)


def assert_close(one, other, tolerance=1e-6):
    """In the norm of the difference over that of all numbers.

    Gradients are summed in another order, so their last digits differ; where a gradient is nothing but these, Adam divides it
    by its own size, so single parameters differ by more.
    """
    one, other = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, other))
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.fixture(scope="module")
def alone():
    """What one device makes of twenty steps."""
    return train(step_of(functools.partial(loss_fn, MODEL)), alone_at())


sharded_small = functools.partial(parallel.fully_sharded, min_size=64)


@pytest.mark.parametrize("rule", [parallel.replicated, sharded_small], ids=["replicated", "fully sharded"])
@pytest.mark.parametrize("count", [2, 8])
def test_a_mesh_trains_as_one_device(alone, rule, count):
    mesh = parallel.mesh(count)
    state = parallel.create(make(), mesh, rule)
    step = step_of(functools.partial(loss_fn, MODEL))
    together = train(parallel.constrain_activations(step, mesh) if rule is sharded_small else step, state, mesh)
    assert_close(together.params, alone.params)
    assert_close(together.ema, alone.ema)
    # Arrays stay where they were put.
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, together, state))


def test_pmap_trains_as_one_device_that_takes_the_parts_in_turn():
    mesh = parallel.mesh()
    loss = functools.partial(loss_fn, MODEL)
    mapped = parallel.pmap(step_of(loss, axis_name=parallel.AXIS), mesh)
    together = train(mapped, parallel.shard(alone_at(), mesh), mesh)
    # Part i of accumulation is every eighth example from the i-th on, device i's a row of two.
    order = np.arange(SIZE).reshape(8, -1).T.ravel()
    in_turn = train(step_of(loss, accumulate=8), alone_at(), order=order)
    assert_close(together.params, in_turn.params)


def test_pmap_trains_as_one_device_when_it_draws_nothing():
    mesh = parallel.mesh()
    mapped = parallel.pmap(step_of(given_noise, axis_name=parallel.AXIS), mesh)
    together = train(mapped, parallel.shard(alone_at(), mesh), mesh, drawn=True)
    one = train(step_of(given_noise), alone_at(), drawn=True)
    assert_close(together.params, one.params)


def test_accumulation_is_the_whole_batch_where_nothing_is_drawn():
    state, whole = alone_at(), jax.jit(training.make_step(given_noise, optax.sgd(0.1)))
    state = training.init(state.params, optax.sgd(0.1))
    expected, metrics = whole(state, KEY, batch(0, drawn=True))
    parts, others = jax.jit(training.make_step(given_noise, optax.sgd(0.1), accumulate=4))(state, KEY, batch(0, drawn=True))
    assert_close(parts.params, expected.params, 1e-6)
    chex.assert_trees_all_close(others, metrics, rtol=1e-5)


def test_accumulation_on_a_mesh():
    """Parts of a batch are spread over the devices as the batch is."""
    mesh = parallel.mesh(4)
    step = step_of(functools.partial(loss_fn, MODEL), accumulate=2)
    together = train(step, parallel.create(make(), mesh), mesh)
    step = step_of(functools.partial(loss_fn, MODEL), accumulate=2)
    assert_close(together.params, train(step, alone_at()).params)


def compiled_step(count, rule, model, size=SIZE, divided=False):
    mesh = parallel.mesh(count)
    state = jax.eval_shape(make(model))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, rule(state, mesh))
    sharding = parallel.batch_sharding(mesh)
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding), batch(0))
    step = training.make_step(functools.partial(loss_fn, model), OPTIMIZER)
    step = parallel.constrain_activations(step, mesh) if divided else step
    stay = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(step, donate_argnums=0, out_shardings=(stay, None)).lower(shapes, KEY, data).compile(), state


def collective_shapes(compiled, kind):
    """What collectives of a kind give, by the text of the compiled program: the bytes of a number, and the shape."""
    shapes = []
    for line in compiled.as_text().splitlines():
        found = re.search(rf"= (.*) {kind}(?:-start)?\(", line)
        for dtype, shape in re.findall(r"(f32|s32|u32|pred)\[([\d,]*)\]", found[1] if found else ""):
            shapes.append((1 if dtype == "pred" else 4, tuple(int(n) for n in shape.split(",") if n)))
    return shapes


def collective_bytes(compiled, kind):
    return sum(size * math.prod(shape) for size, shape in collective_shapes(compiled, kind))


def test_gradients_cross_the_network_once(capsys):
    compiled, state = compiled_step(8, parallel.replicated, LARGE)
    parameters = sum(leaf.nbytes if hasattr(leaf, "nbytes") else leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    reduced = collective_bytes(compiled, "all-reduce")
    print(f"all-reduce {reduced} bytes, parameters {parameters} bytes")
    assert parameters <= reduced <= parameters + 64
    for kind in ("all-gather", "all-to-all", "reduce-scatter", "collective-permute"):
        assert collective_bytes(compiled, kind) == 0, kind


@pytest.mark.parametrize("divided", [True, False])
def test_constrain_activations_moves_weights_and_gradients_rather_than_activations(divided):
    """Where a batch has fewer numbers than the weights, the compiler left alone moves the batch."""
    size, tokens = 24, 4
    compiled, _ = compiled_step(8, sharded_small, LARGE, size, divided)
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    moved = [shape for kind in kinds for _, shape in collective_shapes(compiled, kind)]
    # One number per example, such as its time, may move.
    activations = [shape for shape in moved if {size, size * tokens} & set(shape) and math.prod(shape) > size]
    assert bool(activations) != divided, activations
    if divided:
        gathered = {shape for _, shape in collective_shapes(compiled, "all-gather")}
        reduced = {shape for _, shape in collective_shapes(compiled, "all-reduce")}
        for kernel in ((128, 384), (128, 512), (512, 128)):
            assert {kernel, kernel[::-1]} & gathered, kernel
            assert {kernel, kernel[::-1]} & reduced, kernel


def test_fully_sharded_memory_falls_with_the_number_of_devices():
    """The state, and with it what a step needs besides: activations, and one layer's weights at a time."""
    deep = dit.DiT(patch_size=4, hidden_size=128, depth=8, num_heads=2, num_classes=4, scan=True, remat=True)
    held, whole = {}, {}
    for count in (1, 2, 4, 8):
        counted = compiled_step(count, functools.partial(parallel.fully_sharded, min_size=512), deep, 512, count > 1)[0].memory_analysis()
        held[count] = counted.argument_size_in_bytes
        whole[count] = held[count] + counted.output_size_in_bytes - counted.alias_size_in_bytes + counted.temp_size_in_bytes
    print(f"bytes of a device: state and batch {held}, with temporaries {whole}")
    for count in (2, 4, 8):
        assert held[count] == pytest.approx(held[1] / count, rel=0.15), held
        assert whole[count] == pytest.approx(whole[1] / count, rel=0.15), whole


@pytest.mark.parametrize("sde", [False, True])
def test_samples_do_not_depend_on_the_number_of_devices(sde):
    params, grid = alone_at().params, jnp.linspace(0.0, 1.0, 6)
    y = np.arange(SIZE, dtype=np.int32) % 4

    @jax.jit
    def sample(params, key, x_0, y):
        def field(x, t):
            return MODEL.apply(params, x, t, y)

        return sampling.sample_sde(field, 0.5, key, x_0, grid)[0] if sde else sampling.sample_ode(field, x_0, grid)[0]

    x_0 = sampling.noise(KEY, (SIZE, 8, 8, 1))
    alone = sample(params, KEY, x_0, y)
    for count in (2, 8):
        mesh = parallel.mesh(count)
        spread = jax.device_put((x_0, y), parallel.batch_sharding(mesh, SIZE))
        together = sample(parallel.shard(params, mesh), KEY, *spread)
        assert {shard.data.shape for shard in together.addressable_shards} == {(SIZE // count, 8, 8, 1)}
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_what_is_sharded():
    mesh = parallel.mesh(4)
    shapes = {
        "longest": jax.ShapeDtypeStruct((8, 64, 16), jnp.float32),
        "another": jax.ShapeDtypeStruct((63, 8), jnp.float32),
        "none": jax.ShapeDtypeStruct((63, 7), jnp.float32),
        "small": jax.ShapeDtypeStruct((8,), jnp.float32),
        "scalar": jax.ShapeDtypeStruct((), jnp.int32),
    }
    found = {name: sharding.spec for name, sharding in parallel.fully_sharded(shapes, mesh, min_size=16).items()}
    everywhere = PartitionSpec()
    assert found == {
        "longest": PartitionSpec(None, "data", None),
        "another": PartitionSpec(None, "data"),
        "none": everywhere,
        "small": everywhere,
        "scalar": everywhere,
    }


def test_create_makes_what_place_would_put_there():
    mesh = parallel.mesh(4)
    made, put = parallel.create(make(), mesh, sharded_small), parallel.shard(alone_at(), mesh, sharded_small)
    chex.assert_trees_all_close(made, put, rtol=1e-6, atol=1e-7)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, made, put))


def test_bad_meshes_and_batches():
    with pytest.raises(ValueError, match="A mesh of 9 devices was asked for; there are 8"):
        parallel.mesh(9)
    with pytest.raises(ValueError, match="A mesh of 0 devices"):
        parallel.mesh(0)
    with pytest.raises(ValueError, match="batch of 12 does not divide among 8 devices: give a multiple, such as 16"):
        parallel.batch_sharding(parallel.mesh(), 12)
    with pytest.raises(ValueError, match="batch of 12 does not divide among 8"):
        parallel.pmap(lambda state, key, batch: (state, {}), parallel.mesh())({}, KEY, jnp.ones((12, 2)))
    with pytest.raises(ValueError, match="The batch has no arrays"):
        parallel.pmap(lambda state, key, batch: (state, {}), parallel.mesh())({}, KEY, None)
    with pytest.raises(ValueError, match="batch of 16 does not divide into the 3 parts"):
        jax.eval_shape(step_of(functools.partial(loss_fn, MODEL), accumulate=3), alone_at(), KEY, batch(0))
    with pytest.raises(ValueError, match="accumulate is 0"):
        step_of(given_noise, accumulate=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "processes and index must be given too"),
        ({"processes": 2, "index": 0}, "coordinator must be given too"),
        ({"coordinator": "localhost:1", "processes": 2, "index": 2}, r"index is 2; expected one in \[0, 2\)"),
    ],
)
def test_processes_that_are_half_given(given, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(**given)


def test_too_little_memory_is_said_before_anything_is_made(monkeypatch):
    mesh, state = parallel.mesh(4), jax.eval_shape(make())
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    class Small:
        def memory_stats(self):
            return {"bytes_limit": whole // 2, "bytes_in_use": 0}

    def shapes(rule):
        spec = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, rule(state, mesh))
        return jax.tree.map(lambda x: _OnSmall(x), spec, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))

    class _OnSmall:
        def __init__(self, x):
            self.shape, self.dtype = x.shape, x.dtype
            self.sharding = type("S", (), {"shard_shape": staticmethod(x.sharding.shard_shape), "addressable_devices": {Small()}})()

    with pytest.raises(MemoryError, match=r"use more devices, or parallel\.fully_sharded"):
        parallel.require_memory(shapes(parallel.replicated))
    parallel.require_memory(shapes(sharded_small))


def test_modules_are_held_divided_by_examples():
    """What every module takes and gives is constrained to lie by examples, which alone the step does not ask for."""
    mesh = parallel.mesh()
    state = jax.eval_shape(make(LARGE))
    step = training.make_step(functools.partial(loss_fn, LARGE), OPTIMIZER)
    lowered = [jax.jit(each).lower(state, KEY, batch(0)).as_text() for each in (step, parallel.constrain_activations(step, mesh))]
    plain, held = (len(re.findall(r"sdy\.sharding_constraint", text)) for text in lowered)
    # One is the random numbers' own.
    assert plain <= 1
    assert held > 20


def test_many_samples_do_not_depend_on_chunks_or_devices(key, capsys):
    """Ten examples in chunks of 4, of 8 and over eight devices: the same, each from its own key and index."""
    traces = []

    def draw(keys, index):
        traces.append(1)
        x_0 = sampling.noise(keys, (keys.shape[0], 2))
        return {"x": sampling.sample_sde(lambda x, t: -x, 0.5, keys, x_0, times.uniform_grid(3))[0], "index": index}

    by_four = parallel.sample(draw, key, 10, chunk=4, progress=False)
    assert len(traces) == 1
    np.testing.assert_array_equal(by_four["index"], np.arange(10))
    for chunk, mesh in ((8, None), (8, parallel.mesh(8)), (16, parallel.mesh(2))):
        found = parallel.sample(draw, key, 10, chunk=chunk, mesh=mesh, progress=False)
        np.testing.assert_array_equal(found["index"], by_four["index"])
        np.testing.assert_allclose(found["x"], by_four["x"], rtol=1e-5, atol=1e-6)
    single = draw(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array([7])), jnp.array([7]))
    np.testing.assert_allclose(single["x"][0], by_four["x"][7], rtol=1e-5, atol=1e-6)
    parallel.sample(draw, key, 5, chunk=4)
    shown = capsys.readouterr().out
    assert "samples/s" in shown
    assert "5/5" in shown


def test_chunks_that_cannot_be_are_named(key):
    with pytest.raises(ValueError, match="n is 0, but it is how many samples are drawn"):
        parallel.sample(lambda keys, i: i, key, 0, chunk=4)
    with pytest.raises(ValueError, match="The batch of 6 does not divide among 4 devices"):
        parallel.sample(lambda keys, i: i, key, 10, chunk=6, mesh=parallel.mesh(4))
