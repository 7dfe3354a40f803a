"""Wrong calls: every public function with each of its arguments wrong in every way of its kind, one at a time.

What comes of a wrong argument is an error of ours that names it; what comes of a right but unusual one is finite. The batch is square,
B = D, where a (B,) value that broadcasts gives plausible wrong numbers. `python -m tests.test_wrong_calls` counts the outcomes.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmjax
from fmjax import (
    betas,
    checkpoints,
    guidance,
    inverse,
    likelihood,
    losses,
    marginals,
    metrics,
    parallel,
    paths,
    pretrained,
    sampling,
    targets,
    times,
    training,
)
from fmjax.models import autoencoder, conditions, dinov2, dit, layers, mlp, unet

LIBRARY = str(Path(fmjax.__file__).parent)
PATH, B = paths.Linear(), 3
MIXTURE = marginals.GaussianMixture(jnp.ones(2), jnp.array([[1.0, 0.0, 2.0], [-1.0, 0.5, 0.0]]), jnp.ones(2))
X, X_0 = (jnp.asarray(np.random.default_rng(seed).normal(size=(B, B)), jnp.float32) for seed in (0, 1))
T, GRID, KEY = jnp.array([0.2, 0.5, 0.7]), times.uniform_grid(4), jax.random.key(0)


def VELOCITY(x, t):
    return (paths.lift(t, x) - 0.5) * x


def SCORE(x, t):
    return -x


def PREDICT(x, t):
    """A velocity, and what a network says of the variance."""
    return VELOCITY(x, t), jnp.tanh(x)


def parameters(model, *inputs):
    """Ones, of the shapes of a network's."""
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(model.init, KEY, *inputs))


IMAGES, MOMENTS = np.zeros((1, 4, 4, 4), np.float32), metrics.moments(X)
SIT = dit.DiT(patch_size=2, hidden_size=8, depth=1, num_heads=2, num_classes=3)
JIT = SIT.clone(
    bottleneck=4, norm=layers.RMSNorm, qk_norm=layers.RMSNorm, mlp_layer=dit.SwiGLU, rotary=True, class_tokens=2, context_start=0
)
TENSORS = {
    name: pretrained.sit_tensors(parameters(model, IMAGES, 0.5, np.zeros(1, int)), model, (4, 4, 4))
    for name, model in {"dit": SIT.clone(learn_sigma=True), "sit": SIT, "jit": JIT}.items()
}
AUTOENCODER = autoencoder.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, groups=2)
DECODES = parameters(AUTOENCODER, np.zeros((1, 4, 4, 3), np.float32))
LABELS = jnp.array([0, 1, 2])
LINE = marginals.GaussianMixture(jnp.ones(2), jnp.array([[1.0], [-1.0]]), jnp.ones(2))
NORMAL = marginals.GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), 1.0)
STATE = training.init({"w": jnp.ones(3)}, optax.sgd(0.1))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A value in an argument's place."""

    what: str
    make: Callable[[Any], Any]
    right: bool = False
    """Whether it is right after all."""


def wrong(**values):
    """Of values, or of lambdas of the right one."""
    made = {what: value if getattr(value, "__name__", "") == "<lambda>" else lambda _, value=value: value for what, value in values.items()}
    return [Wrong(what.replace("_", " "), make) for what, make in made.items()]


def right(**values):
    return [dataclasses.replace(each, right=True) for each in wrong(**values)]


NOT_ARRAYS = wrong(none=None, string="x")
REAL = wrong(
    whole_numbers=lambda x: jnp.ones(x.shape, jnp.int32), complex_numbers=lambda x: x + 1j, booleans=lambda x: jnp.ones(x.shape, bool)
)
SHAPES = wrong(
    a_number=1.0,
    one_example=lambda x: x[0],
    numbers=lambda x: x[:, 0],
    no_examples=lambda x: x[:0],
    no_coordinates=lambda x: x[:, :0],
)
OTHER_SHAPES = wrong(
    fewer_examples=lambda x: x[:-1],
    a_row=lambda x: x[:1],
    a_column=lambda x: x[:, :1],
    another_axis=lambda x: x[:, :, None],
)
DTYPES = right(
    half=lambda x: x.astype(jnp.bfloat16),
    float16=lambda x: x.astype(jnp.float16),
    numpy=lambda x: np.asarray(x),
    float64=lambda x: np.asarray(x, float),
)


def returns(field, change):
    return lambda *arguments: change(field(*arguments))


FIELD = [
    *wrong(none=None, an_array=lambda _: X),
    *[
        Wrong(f"gives {what}", lambda field, change=change: returns(field, change))
        for what, change in {
            "a row": lambda u: u[:1],
            "a column": lambda u: u[:, :1],
            "numbers": lambda u: u[:, 0],
            "a sum": lambda u: u.sum(),
            "a pair": lambda u: (u, u),
            "nothing": lambda u: None,
        }.items()
    ],
]
PER_EXAMPLE_TIMES = [Wrong("takes a time per example", lambda field: lambda x, t: field(x, t[:, None][:, 0]))]
NUMBER = [
    *NOT_ARRAYS,
    *wrong(nan=np.nan, infinite=np.inf, complex_number=1 + 1j, several=np.ones(3, np.float32), column=np.ones((3, 1), np.float32)),
]
KINDS: dict[str, list[Wrong]] = {
    "path": wrong(none=None, string="linear", a_class=paths.Linear, a_field=lambda _: VELOCITY),
    "batch": [*NOT_ARRAYS, *REAL, *SHAPES, *DTYPES],
    "like": [*NOT_ARRAYS, *REAL, *OTHER_SHAPES, *DTYPES],
    "value": [*NOT_ARRAYS, *OTHER_SHAPES, *DTYPES],
    "time": [
        *NOT_ARRAYS,
        *wrong(a_step=7, too_late=1.5, too_early=-0.5, nan=np.nan, infinite=np.inf, complex_number=0.5j),
        *wrong(steps=jnp.arange(3), fewer=T[:2], column=T[:, None], grid=times.uniform_grid(9), square=jnp.ones((3, 3))),
        *right(a_number=0.5, numpy=np.float32(0.5), float64=np.float64(0.5), half=jnp.bfloat16(0.5)),
    ],
    "any time": wrong(
        none=None, string="x", complex_number=0.5j, steps=jnp.arange(3), fewer=T[:2], column=T[:, None], square=jnp.ones((3, 3))
    ),
    "any times": [
        *NOT_ARRAYS,
        *wrong(too_late=1.5, too_early=-0.5, nan=np.nan, infinite=np.inf, complex_number=0.5j, some=np.array([0.1, 2.0])),
        *right(a_number=0.5, numpy=np.array([0.1, 0.9]), square=jnp.ones((3, 3)) / 2),
    ],
    "key": wrong(none=None, a_seed=0, old_style=lambda _: jax.random.PRNGKey(0), several=lambda _: jax.random.split(KEY, 2), string="k"),
    "field": FIELD,
    "sampled field": [*FIELD, *PER_EXAMPLE_TIMES],
    "grid": [
        *wrong(none=None, string="x", a_number=1.0, one_time=np.zeros(1), square=np.eye(3), complex_numbers=np.array([0, 1j])),
        *wrong(
            falling=times.uniform_grid(4)[::-1],
            equal=np.array([0, 0.5, 0.5, 1]),
            nan=np.array([0, np.nan, 1]),
            infinite=np.array([0, np.inf]),
        ),
        *right(numpy=np.linspace(0, 0.9, 4), a_list=[0.0, 0.3, 1.0], half=jnp.linspace(0, 1, 5, dtype=jnp.bfloat16)),
    ],
    "path's grid": wrong(beyond_data=np.array([0, 0.5, 1.5]), before_noise=np.array([-0.5, 0.5]), in_steps=np.array([0.0, 1, 2, 3])),
    "batches": wrong(none=None, string="x", an_array=lambda _: X, a_tuple=lambda _: (X, T), nothing=[]),
    "losses": [
        *NOT_ARRAYS,
        *wrong(a_number=1.0, fewer=lambda x: x[:2], column=lambda x: x[:, None], square=lambda x: jnp.ones((3, 3))),
        *right(numpy=lambda x: np.asarray(x), half=lambda x: x.astype(jnp.bfloat16)),
    ],
    "edges": [
        *wrong(none=None, string="x", a_number=1.0, one=np.zeros(1), square=np.eye(3), complex_numbers=np.array([0, 1j])),
        *wrong(falling=np.array([1.0, 0.5, 0.0]), equal=np.array([0, 0.5, 0.5, 1]), nan=np.array([0, np.nan, 1])),
        *right(a_list=[0.0, 0.3, 1.0], jax=jnp.array([0.0, 1.0])),
    ],
    "count": wrong(none=None, string="3", zero=0, negative=-1, fraction=1.5, nan=np.nan, true=True, several=np.arange(1, 4)),
    "number": NUMBER,
    "positive": [*NUMBER, *wrong(zero=0.0, negative=-1.0)],
    "positive number": [each for each in [*NUMBER, *wrong(zero=0.0, negative=-1.0)] if each.what != "none"],
    "at least 0": [*NUMBER, *wrong(negative=-1.0)],
    "share": [*NUMBER, *wrong(negative=-1.0, more_than_all=1.5)],
    "sigma": [
        *[each for each in NUMBER if each.what != "infinite"],
        *wrong(negative=-1.0, infinite=np.inf, gives_nan=lambda _: lambda t: jnp.sqrt(t - 0.6), gives_negative=lambda _: lambda t: t - 0.6),
        *wrong(gives_several=lambda _: lambda t: jnp.ones(3), per_example=np.ones(B, np.float32)),
        *right(zero=0, whole=1, numpy=np.float64(0.5), a_function=lambda _: lambda t: 1 - t),
    ],
    "scale": [
        *NOT_ARRAYS,
        *wrong(
            nan=np.nan, infinite=np.inf, complex_number=1j, some_nan=np.array([1, np.nan, 1], np.float32), several=np.ones(2, np.float32)
        ),
        *wrong(a_row=np.ones((1, 2), np.float32), other_axes=np.ones((3, 1, 1), np.float32)),
        *right(one=1, whole=3, zero=0.0, per_example=np.ones(B, np.float32), columns=np.ones((B, 1), np.float32)),
    ],
    "weight": [
        *wrong(string="x", complex_number=1j, several=np.ones(2, np.float32), a_row=np.ones((1, 2), np.float32)),
        *wrong(other_axes=np.ones((3, 1, 1), np.float32)),
        *right(none=None, one=1, zero=0.0, per_example=np.ones(B, np.float32), columns=np.ones((B, 1), np.float32), all=X),
    ],
    "mask": [
        *wrong(string="x", ones=np.ones(B, np.float32), whole=np.ones((B, B), np.int32), several=np.ones(2, bool)),
        *wrong(other_axes=np.ones((3, 1, 1), bool)),
        *right(none=None, per_example=np.arange(B) < 2, columns=np.ones((B, 1), bool), all=X > 0, nothing=np.zeros(B, bool)),
    ],
    "target": wrong(none=None, string="noise", a_row=(1.0, 0.0)),
    "step": [
        *wrong(none=None, string="heun", a_maker=sampling.ddim, another_maker=sampling.unipc, of_an_sde=sampling.euler_maruyama),
        *wrong(of_a_diffusion=sampling.ancestral, a_maker_of_those=sampling.churn),
        *right(remembers=sampling.adams_bashforth(2), knows_a_path=sampling.path_heun(PATH)),
    ],
    "maker": [
        *wrong(none=None, string="heun", a_step=sampling.heun, a_made_step=sampling.path_heun(PATH), of_an_sde=sampling.euler_maruyama),
        *right(another=sampling.ddim),
    ],
    "noisy step": [
        *wrong(none=None, string="em", a_maker=sampling.churn, of_a_flow=sampling.heun, another=sampling.unipc(PATH, 2)),
        *wrong(knows_a_path=sampling.ddim(PATH)),
    ],
    "last": [
        *wrong(string="euler", remembers=sampling.adams_bashforth(2), a_maker=sampling.ddim, number=1.0),
    ],
    "save_every": wrong(none=None, zero=0, negative=-1, fraction=1.5, no_divisor=2, too_many=8),
    "function": wrong(none=None, string="x", number=1.0),
    "distribution": wrong(none=None, an_array=lambda _: X, a_path=PATH, a_field=lambda _: VELOCITY),
    "mixture": [
        *wrong(no_weight=marginals.GaussianMixture(jnp.zeros(2), jnp.zeros((2, 3)), 1.0)),
        *wrong(negative_weight=marginals.GaussianMixture(jnp.array([1.0, -0.5]), jnp.zeros((2, 3)), 1.0)),
        *wrong(negative_scale=marginals.GaussianMixture(jnp.ones(2), jnp.zeros((2, 3)), -1.0)),
        *wrong(more_weights=marginals.GaussianMixture(jnp.ones(3), jnp.zeros((2, 3)), 1.0)),
        *wrong(nan=marginals.GaussianMixture(jnp.ones(2), jnp.full((2, 3), jnp.nan), 1.0)),
        *wrong(other_dimension=marginals.GaussianMixture(jnp.ones(2), jnp.zeros((2, 4)), 1.0)),
        *wrong(no_points=marginals.Empirical(jnp.zeros((0, 3))), whole_points=marginals.Empirical(jnp.zeros((2, 3), jnp.int32))),
        *right(one_scale=marginals.GaussianMixture(jnp.ones(2), jnp.zeros((2, 3)), 1.0), points=marginals.Empirical(jnp.zeros((2, 3)))),
    ],
    "labels": [
        *wrong(one=1, fewer=jnp.array([0, 1])),
        *right(small=jnp.array([0, 1, 2], jnp.int8), numpy=np.array([0, 1, 2])),
    ],
    "null": wrong(none=None, fraction=0.7, nan=np.nan, too_large=2**40, several=np.array([3, 3])),
    "samples": [
        *NOT_ARRAYS,
        *wrong(complex_numbers=lambda x: x + 1j, nan=lambda x: x.at[1, 0].set(jnp.nan), infinite=lambda x: x.at[1, 0].set(jnp.inf)),
        *wrong(numbers=lambda x: x[:, 0], none_at_all=lambda x: x[:0], other_length=lambda x: x[:, :2], one_number=1.0),
        *DTYPES,
    ],
    "features": [
        *NOT_ARRAYS,
        *wrong(complex_numbers=lambda x: x + 1j, nan=lambda x: x.at[1, 0].set(jnp.nan), infinite=lambda x: x.at[1, 0].set(jnp.inf)),
        *wrong(numbers=lambda x: x[:, 0], none_at_all=lambda x: x[:0], one_number=1.0),
        *DTYPES,
    ],
    "moments": [
        *wrong(string="x", features=lambda _: X, a_pair=lambda right: (right.mean, right.covariance)),
        *wrong(other_length=metrics.moments(X[:, :2])),
    ],
    "no moments": wrong(none=None),
    "counted": wrong(no_count=metrics.Moments(MOMENTS.mean, MOMENTS.covariance)),
    "covariance": [
        *wrong(one_sample=metrics.moments(X[:1]), none_at_all=metrics.Moments(np.zeros(3), np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]]))),
        *right(no_count=metrics.Moments(MOMENTS.mean, MOMENTS.covariance)),
    ],
    "pair of fields": [
        *wrong(none=None, an_array=lambda _: X, gives_one=lambda _: VELOCITY, gives_three=lambda _: lambda x, t: (x, x, x)),
        *wrong(gives_a_list=lambda _: lambda x, t: [x, x], gives_a_row=lambda _: lambda x, t: (x, x[:1])),
        *wrong(gives_numbers=lambda _: lambda x, t: (x, x[:, 0]), gives_nothing=lambda _: lambda x, t: (x, None)),
        *wrong(gives_a_velocity_of_a_row=lambda _: lambda x, t: (x[:1], x[:1])),
    ],
    "steps of a table": [
        *wrong(none=None, string="3", zero=0, negative=-1, fraction=1.5, nan=np.nan, true=True, too_many=1001),
        *wrong(
            falling=[2, 1], equal=[1, 1], below=[-1, 1], beyond=[1, 1000], fractions=[0.5, 1.0], nothing=[], square=np.eye(2, dtype=int)
        ),
        *right(indices=range(0, 1000, 40), numpy=np.int64(3)),
    ],
    "few betas": wrong(few=20),
    "tensors": [
        *wrong(none=None, a_path="network.pt", an_array=lambda _: X, names=list, nothing={}),
        *wrong(fewer=lambda right: dict(list(right.items())[:-1]), more=lambda right: right | {"other.weight": X}),
        *wrong(another_shape=lambda right: right | {name: right[name][..., :-1] for name in list(right)[-1:]}),
        *wrong(not_finite=lambda right: right | {name: right[name] * np.nan for name in list(right)[-1:]}),
        *right(float64=lambda right: {name: tensor.astype(float) for name, tensor in right.items()}),
    ],
    "params": [
        *wrong(none=None, string="network.pt", an_array=lambda _: X, a_branch=lambda right: right["params"]),
        *wrong(of_another=lambda _: {"params": {"Dense_0": {"kernel": X}}}),
    ],
    "index": wrong(string="3", negative=-1, fraction=1.5, nan=np.nan, true=True),
    "probes": wrong(
        none=None,
        string="x",
        no_probes=lambda p: p[:, :0],
        one_each=lambda p: p[:, 0],
        fewer=lambda p: p[:2],
        complex_numbers=lambda p: p + 1j,
    ),
    "sigma_rel": [*NUMBER, *wrong(zero=0.0, negative=-0.1, beyond=0.5)],
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A right call, and of which kind each argument is."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str]
    """Argument to kinds, by " + "."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """What an error may call an argument else, a regular expression."""


def field_y(x, t, y):
    return VELOCITY(x, t) + 0.1 * jnp.asarray(y)[:, None]


def log_normal(x):
    return likelihood.normal(x)


def at(maker):
    """A call of what a function makes, for (x, t)."""
    return lambda x=X, t=0.5, **arguments: maker(**arguments)(x, t)


def drawn(step):
    """A step of a flow in its sampler."""
    return lambda **arguments: sampling.sample_ode(VELOCITY, X, times.uniform_grid(4, 0.1, 0.9), step=step(**arguments))[0]


def drawn_noisy(step):
    return lambda **arguments: sampling.sample_diffusion(PATH, VELOCITY, 0.5, KEY, X, GRID, step=step(**arguments))[0]


def statistics(moments):
    return moments.mean, moments.covariance


def loss_fn(params, key, batch):
    return (params["w"] ** 2).sum() + batch.mean()


CONVERT = {"source": targets.velocity, "target": targets.data}
SAMPLE = {"x_0": X, "times": GRID, "step": sampling.heun, "last": sampling.euler, "save_every": 1}
ODE_KINDS = {"x_0": "batch", "times": "grid", "step": "step", "last": "last", "save_every": "save_every"}
GIVES = "field's output|The field"

CALLS: dict[str, Call] = {
    "paths.interpolate": Call(
        paths.interpolate,
        {"path": PATH, "x_0": X_0, "x_1": X, "t": T},
        {"path": "path", "x_0": "like", "x_1": "like", "t": "time"},
        {"x_1": "x_0|x of shape"},
    ),
    "paths.flow": Call(
        paths.flow,
        {"path": PATH, "x_0": X_0, "x_1": X, "t": T},
        {"path": "path", "x_0": "like", "x_1": "like", "t": "time"},
        {"x_1": "x_0|x of shape"},
    ),
    "paths.conditional_velocity": Call(
        paths.conditional_velocity,
        {"path": PATH, "x": X_0, "x_1": X, "t": T},
        {"path": "path", "x": "like", "x_1": "like", "t": "time"},
        {"x_1": "x"},
    ),
    "paths.conditional_score": Call(
        paths.conditional_score,
        {"path": PATH, "x": X_0, "x_1": X, "t": T},
        {"path": "path", "x": "like", "x_1": "like", "t": "time"},
        {"x_1": "x"},
    ),
    "paths.lift": Call(paths.lift, {"t": T, "x": X}, {"t": "any time"}),
    "paths.time_from_signal_fraction": Call(
        paths.time_from_signal_fraction, {"path": PATH, "signal": T}, {"path": "path", "signal": "any times"}
    ),
    "targets.coefficients": Call(
        targets.coefficients, {"path": PATH, "t": T, **CONVERT}, {"path": "path", "source": "target", "target": "target"}
    ),
    "targets.weight": Call(targets.weight, {"path": PATH, "t": T, **CONVERT}, {"path": "path", "source": "target", "target": "target"}),
    "targets.convert": Call(
        targets.convert,
        {"path": PATH, "value": X_0, "x": X, "t": T, **CONVERT},
        {"path": "path", "value": "like", "x": "like", "t": "time", "source": "target", "target": "target"},
        {"x": "value"},
    ),
    "targets.convert_field": Call(
        at(targets.convert_field),
        {"path": PATH, "field": VELOCITY, **CONVERT, "x": X, "t": 0.5},
        {"path": "path", "field": "field", "source": "target", "target": "target", "t": "time"},
        {"field": "value"},
    ),
    "targets.change_path": Call(
        at(targets.change_path),
        {"field": VELOCITY, "source": PATH, "target": paths.Cosine(), "x": X, "t": 0.5},
        {"field": "field", "source": "path", "target": "path", "t": "time"},
        {"field": "value", "source": "path", "target": "path"},
    ),
    "betas.linear": Call(betas.linear, {"steps": 30}, {"steps": "count + few betas"}),
    "betas.cosine": Call(betas.cosine, {"steps": 30}, {"steps": "count"}),
    "betas.grid": Call(betas.grid, {"path": betas.linear(), "steps": 5}, {"path": "path", "steps": "steps of a table"}),
    "betas.step_index": Call(betas.step_index, {"path": betas.linear(), "t": T}, {"path": "path", "t": "any times"}),
    "marginals.flow_map": Call(
        lambda path, distribution, x, s, t: marginals.flow_map(path, distribution)(x, s, t),
        {"path": PATH, "distribution": (LINE, NORMAL), "x": X, "s": 0.2, "t": 0.5},
        {"path": "path", "distribution": "distribution", "x": "batch", "s": "time", "t": "time"},
        {"distribution": "distribution|weights|means|scales|points"},
    ),
    "losses.regression": Call(
        losses.regression,
        {"field": VELOCITY, "x": X, "t": T, "value": X_0, "weight": None, "mask": None},
        {"field": "field", "x": "batch", "t": "time", "value": "value", "weight": "weight", "mask": "mask"},
        {"field": GIVES},
    ),
    "losses.flow_matching": Call(
        losses.flow_matching,
        {"field": VELOCITY, "path": PATH, "x_0": X_0, "x_1": X, "t": T, "weight": None, "mask": None},
        {"field": "field", "path": "path", "x_0": "like", "x_1": "like + batch", "t": "time", "weight": "weight", "mask": "mask"},
        {"field": GIVES, "x_1": "x_0|x of shape"},
    ),
    "losses.denoising": Call(
        losses.denoising,
        {"field": VELOCITY, "path": PATH, "x_0": X_0, "x_1": X, "t": T, "target": targets.noise, "weight": None, "mask": None},
        {
            **{"field": "field", "path": "path", "x_0": "like", "x_1": "like + batch", "t": "time", "target": "target"},
            **{"weight": "weight", "mask": "mask"},
        },
        {"field": GIVES, "x_1": "x_0|x of shape"},
    ),
    "losses.masked_mean": Call(losses.masked_mean, {"values": X, "mask": X > 0}, {}),
    "losses.pseudo_huber": Call(losses.pseudo_huber, {"loss": T, "c": 0.1}, {"c": "positive"}),
    "losses.learnt_uncertainty": Call(losses.learnt_uncertainty, {"loss": T, "log_variance": T}, {}),
    "losses.min_snr": Call(
        losses.min_snr,
        {"path": PATH, "t": T, "target": targets.noise, "gamma": 5.0},
        {"path": "path", "t": "any times", "target": "target", "gamma": "positive"},
    ),
    "losses.edm_weighting": Call(
        losses.edm_weighting,
        {"path": PATH, "t": T, "target": targets.noise, "sigma_data": 0.5},
        {"path": "path", "t": "any times", "target": "target", "sigma_data": "positive"},
    ),
    "losses.sigmoid_weighting": Call(
        losses.sigmoid_weighting,
        {"path": PATH, "t": T, "target": targets.noise, "bias": 0.0},
        {"path": "path", "t": "any times", "target": "target", "bias": "number"},
    ),
    "targets.edm": Call(lambda **a: targets.edm(**a)(PATH, T), {"sigma_data": 0.5}, {"sigma_data": "positive"}),
    "targets.scale_input": Call(
        at(targets.scale_input),
        {"path": PATH, "network": VELOCITY, "sigma_data": 0.5, "time": lambda t: t, "x": X, "t": 0.5},
        {"path": "path", "network": "function", "sigma_data": "positive", "t": "time"},
    ),
    "targets.c_noise": Call(targets.c_noise, {"path": PATH, "t": T}, {"path": "path"}),
    "paths.joint": Call(paths.joint, {"paths": {"a": PATH}, "x": {"a": X}}, {}),
    "paths.on_states": Call(paths.on_states, {"function": lambda x, t: x}, {}),
    "paths.fits": Call(paths.fits, {"path": PATH, "x": X}, {"path": "path"}),
    "times.log_normal": Call(
        times.log_normal,
        {"key": KEY, "n": 3, "path": PATH, "mean": -1.2, "std": 1.2},
        {"key": "key", "n": "count", "path": "path", "mean": "number", "std": "at least 0"},
    ),
    "sampling.noise_like": Call(sampling.noise_like, {"key": KEY, "x": X}, {"key": "key"}),
    "times.uniform": Call(times.uniform, {"key": KEY, "n": 3}, {"key": "key", "n": "count"}),
    "times.stratified": Call(times.stratified, {"key": KEY, "n": 3}, {"key": "key", "n": "count"}),
    "times.logit_normal": Call(
        times.logit_normal,
        {"key": KEY, "n": 3, "mean": 0.0, "std": 1.0},
        {"key": "key", "n": "count", "mean": "number", "std": "at least 0"},
    ),
    "times.uniform_grid": Call(
        times.uniform_grid, {"steps": 3, "start": 0.0, "end": 1.0}, {"steps": "count", "start": "number", "end": "number"}
    ),
    "times.shift": Call(times.shift, {"t": T, "factor": 3.0}, {"t": "any times", "factor": "positive"}),
    "times.resolution_factor": Call(times.resolution_factor, {"size": 64.0, "base": 16.0}, {"size": "positive", "base": "positive"}),
    "times.cosine": Call(times.cosine, {"t": T}, {"t": "any times"}),
    "times.quadratic": Call(times.quadratic, {"t": T}, {"t": "any times"}),
    "times.karras": Call(
        times.karras,
        {"path": PATH, "steps": 5, "sigma_min": 0.01, "sigma_max": 10.0, "rho": 7.0},
        {"path": "path", "steps": "count", "sigma_min": "positive", "sigma_max": "positive", "rho": "positive"},
    ),
    "times.log_snr_grid": Call(
        times.log_snr_grid,
        {"path": PATH, "steps": 5, "start": 0.1, "end": 0.9},
        {"path": "path", "steps": "count", "start": "number", "end": "number"},
    ),
    "times.optimize_grid": Call(
        times.optimize_grid,
        {"error": lambda grid: (grid**2).sum(), "first": GRID, "iterations": 2},
        {"error": "function", "first": "grid", "iterations": "count"},
    ),
    "sampling.noise": Call(sampling.noise, {"key": KEY, "shape": (3, 3)}, {"key": "key"}),
    "sampling.reverse": Call(
        lambda field, times: sampling.sample_ode(*sampling.reverse(field, times)[:1], X, sampling.reverse(field, times)[1])[0],
        {"field": VELOCITY, "times": GRID},
        {"field": "field", "times": "grid"},
        {"field": GIVES},
    ),
    "sampling.sde_extension": Call(
        at(sampling.sde_extension),
        {"velocity_field": VELOCITY, "score_field": SCORE, "sigma": 0.5},
        {"velocity_field": "field", "score_field": "field", "sigma": "sigma"},
        {"velocity_field": "velocity", "score_field": "score"},
    ),
    "sampling.sde_drift": Call(
        at(sampling.sde_drift),
        {"path": PATH, "velocity_field": VELOCITY, "sigma": 0.5, "t": 0.4},
        {"path": "path", "velocity_field": "field", "sigma": "sigma", "t": "time"},
        {"velocity_field": "velocity|value"},
    ),
    "sampling.langevin": Call(
        at(sampling.langevin),
        {"score_field": SCORE, "sigma": 0.5, "t": 0.4},
        {"score_field": "field", "sigma": "sigma"},
        {"score_field": "score"},
    ),
    "sampling.sample_ode": Call(
        lambda **a: sampling.sample_ode(**a)[0],
        {"field": VELOCITY, **SAMPLE},
        {"field": "sampled field", **ODE_KINDS},
        {"field": GIVES, "step": "step|field", "last": "last|field"},
    ),
    "sampling.sample_sde": Call(
        lambda **a: sampling.sample_sde(**a)[0],
        {"drift": SCORE, "sigma": 0.5, "key": KEY, **SAMPLE, "step": sampling.euler_maruyama, "last": sampling.euler_maruyama_noiseless},
        {**ODE_KINDS, "drift": "sampled field", "sigma": "sigma", "key": "key", "step": "noisy step"},
        {"drift": f"drift|{GIVES}"},
    ),
    "sampling.sample_diffusion": Call(
        lambda **a: sampling.sample_diffusion(**a)[0],
        {"path": PATH, "velocity": VELOCITY, "sigma": 0.5, "key": KEY, **SAMPLE, "step": sampling.ancestral, "last": sampling.tweedie},
        {
            **ODE_KINDS,
            "path": "path",
            "velocity": "sampled field",
            "sigma": "sigma",
            "key": "key",
            "step": "noisy step",
            "times": "grid + path's grid",
        },
        {"velocity": f"velocity|{GIVES}"},
    ),
    "sampling.learned_variance": Call(
        drawn_noisy(sampling.learned_variance),
        {"predict": PREDICT},
        {"predict": "pair of fields"},
        {"predict": "predict|v"},
    ),
    "sampling.clip_data": Call(
        at(sampling.clip_data),
        {"path": PATH, "velocity": VELOCITY, "low": -1.0, "high": 1.0},
        {"path": "path", "velocity": "field", "low": "number", "high": "number"},
        {"velocity": "field|value"},
    ),
    "sampling.churn": Call(drawn_noisy(sampling.churn), {"make_step": sampling.path_heun}, {"make_step": "maker"}),
    "sampling.predictor_corrector": Call(
        drawn_noisy(sampling.predictor_corrector),
        {"step": sampling.ancestral, "rate": 1.0, "corrections": 1},
        {"step": "noisy step", "rate": "positive", "corrections": "count"},
    ),
    "sampling.ddim": Call(drawn(sampling.ddim), {"path": PATH}, {"path": "path"}),
    "sampling.path_heun": Call(drawn(sampling.path_heun), {"path": PATH}, {"path": "path"}),
    "sampling.edm_heun": Call(drawn(sampling.edm_heun), {"path": PATH}, {"path": "path"}),
    "sampling.adams_bashforth": Call(drawn(sampling.adams_bashforth), {"order": 2}, {"order": "count"}),
    **{
        f"sampling.{name}": Call(
            drawn(make),
            {"path": PATH, "order": 2, "variable": sampling.log_snr},
            {"path": "path", "order": "count", "variable": "function"},
        )
        for name, make in {"dpm_solver_pp": sampling.dpm_solver_pp, "unipc": sampling.unipc, "deis": sampling.deis}.items()
    },
    **{
        f"sampling.{name}": Call(
            lambda make=make, **a: make(**a)(0.5), {"path": PATH, "scale": 1.0}, {"path": "path", "scale": "at least 0"}
        )
        for name, make in {
            "sigma_sbdm": sampling.sigma_sbdm,
            "sigma_beta": sampling.sigma_beta,
            "sigma_sqrt_beta": sampling.sigma_sqrt_beta,
        }.items()
    },
    **{
        f"sampling.{name}": Call(lambda make=make, **a: make(**a)(0.5), {"scale": 1.0}, {"scale": "at least 0"})
        for name, make in {
            "sigma_decreasing": sampling.sigma_decreasing,
            "sigma_increasing_decreasing": sampling.sigma_increasing_decreasing,
        }.items()
    },
    **{
        f"guidance.{name}": Call(
            combine,
            {"guided": X, "unguided": X_0, "scale": 2.0},
            {"guided": "like", "unguided": "like", "scale": "scale"},
            {"guided": "guided|unguided"},
        )
        for name, combine in {"extrapolate": guidance.extrapolate, "cfg_zero_star": guidance.cfg_zero_star}.items()
    },
    "guidance.channels": Call(
        lambda count, combine: guidance.channels(count, combine)(X, X_0, 2.0),
        {"count": 2, "combine": guidance.extrapolate},
        {"count": "count", "combine": "function"},
    ),
    "guidance.apg": Call(
        lambda **a: guidance.apg(**a)(X, X_0, 2.0),
        {"eta": 0.5, "norm_threshold": 1.0},
        {"eta": "number", "norm_threshold": "positive number"},
    ),
    "guidance.cfg_rescale": Call(lambda **a: guidance.cfg_rescale(**a)(X, X_0, 2.0), {"phi": 0.5}, {"phi": "share"}),
    "guidance.classifier_free": Call(
        at(guidance.classifier_free),
        {"field_y": field_y, "y": LABELS, "null": 3, "scale": 2.0, "combine": guidance.cfg_zero_star, "x": X, "t": 0.5},
        {"field_y": "field", "y": "labels", "null": "null", "scale": "scale", "combine": "function"},
        {"field_y": "field|value|labels"},
    ),
    "guidance.compose": Call(
        lambda scale, y, **a: at(guidance.compose)(scales=[scale, 1.0], ys=[y, LABELS], **a),
        {"field_y": field_y, "y": LABELS, "null": 3, "scale": 2.0},
        {"field_y": "field", "y": "labels", "null": "null", "scale": "scale"},
        {"field_y": "field|value|labels"},
    ),
    "guidance.autoguidance": Call(
        at(guidance.autoguidance),
        {"field": VELOCITY, "weak_field": SCORE, "scale": 2.0, "combine": guidance.extrapolate},
        {"field": "field", "weak_field": "field", "scale": "scale", "combine": "function"},
        {"weak_field": "weak field"},
    ),
    "guidance.interval": Call(
        at(guidance.interval),
        {"guided": VELOCITY, "otherwise": SCORE, "start": 0.2, "end": 0.8, "x": X, "t": 0.5},
        {"guided": "field", "otherwise": "field", "start": "number", "end": "number"},
        {"guided": "guided|otherwise", "otherwise": "guided|other field", "start": "start|interval", "end": "end|interval"},
    ),
    "guidance.classifier": Call(
        at(guidance.classifier),
        {"field": VELOCITY, "log_probability": lambda x, t: log_normal(x), "scale": 2.0},
        {"field": "field", "log_probability": "function", "scale": "scale"},
        {"field": GIVES},
    ),
    "inverse.linear_inverse": Call(
        at(inverse.linear_inverse),
        {
            "path": PATH,
            "field": VELOCITY,
            "operator": lambda x: x[:2],
            "y": X[:, :2],
            "noise": 0.1,
            "spread": lambda t: 1 - t,
            "iterations": 3,
        },
        {
            "path": "path",
            "field": "field",
            "operator": "function",
            "y": "like",
            "noise": "at least 0",
            "iterations": "count",
        },
        {"field": "field|value"},
    ),
    "guidance.drop_labels": Call(
        guidance.drop_labels, {"key": KEY, "y": LABELS, "null": 3, "rate": 0.1}, {"key": "key", "null": "null", "rate": "share"}
    ),
    **{
        f"marginals.{name}": Call(
            at(make),
            {"path": PATH, "distribution": MIXTURE, "x": X, "t": 0.5},
            {"path": "path", "distribution": "distribution + mixture", "x": "batch", "t": "time"},
            {"distribution": "distribution|weights|means|scales|points"},
        )
        for name, make in {"velocity": marginals.velocity, "score": marginals.score, "log_density": marginals.log_density}.items()
    },
    **{
        f"marginals.{type(data).__name__}.sample": Call(data.sample, {"key": KEY, "n": 3}, {"key": "key", "n": "count"})
        for data in (MIXTURE, marginals.Empirical(X))
    },
    **{
        f"metrics.{name}": Call(metric, {"x": X, "y": X_0}, {"x": "samples", "y": "samples"}, {"x": "x|sets", "y": "y|sets"})
        for name, metric in {
            "wasserstein": metrics.wasserstein,
            "energy_distance": metrics.energy_distance,
            "nearest_distance": metrics.nearest_distance,
            "frechet_distance": metrics.frechet_distance,
        }.items()
    },
    "metrics.sliced_wasserstein": Call(
        metrics.sliced_wasserstein,
        {"key": KEY, "x": X, "y": X_0, "projections": 8},
        {"key": "key", "x": "samples", "y": "samples", "projections": "count"},
        {"x": "x|sets", "y": "y|sets"},
    ),
    "metrics.moments": Call(lambda features: statistics(metrics.moments(features)), {"features": X}, {"features": "features"}),
    "metrics.update": Call(
        lambda **a: statistics(metrics.update(**a)),
        {"previous": MOMENTS, "features": X},
        {"previous": "moments + counted", "features": "features"},
        {"previous": "Moments|The moments|a is"},
    ),
    "metrics.merge": Call(
        lambda **a: statistics(metrics.merge(**a)),
        {"a": MOMENTS, "b": metrics.moments(X_0)},
        {"a": "moments + no moments + counted", "b": "moments + no moments + counted"},
        {"a": "a is|[Mm]oments", "b": "b is|[Mm]oments"},
    ),
    "metrics.frechet": Call(
        metrics.frechet,
        {"a": MOMENTS, "b": metrics.moments(X_0)},
        {"a": "moments + no moments + covariance", "b": "moments + no moments + covariance"},
        {"a": "a is|of a|moments|covariance", "b": "b is|of b|moments|covariance"},
    ),
    "metrics.kernel_distance": Call(
        metrics.kernel_distance,
        {"key": KEY, "x": X, "y": X_0, "subsets": 2, "subset_size": 2},
        {"key": "key", "x": "samples", "y": "samples", "subsets": "count", "subset_size": "count"},
        {"x": "x|sets", "y": "y|sets"},
    ),
    "metrics.inception_score": Call(metrics.inception_score, {"logits": X, "splits": 1}, {"logits": "features", "splits": "count"}),
    **{
        f"metrics.{name}": Call(
            metric,
            {"real": X, "fake": X_0, "k": 1},
            {"real": "samples", "fake": "samples", "k": "count"},
            {"real": "real|sets", "fake": "fake|sets"},
        )
        for name, metric in {"precision_recall": metrics.precision_recall, "density_coverage": metrics.density_coverage}.items()
    },
    **{
        f"pretrained.{name}": Call(
            lambda load=load, **a: load(**a).params,
            {"tensors": TENSORS[name], "num_heads": 2, **more},
            {"tensors": "tensors", "num_heads": "count", **kinds},
            {"tensors": "tensors|The file|has shape|not finite"},
        )
        for name, load, more, kinds in (
            ("dit", pretrained.dit, {}, {}),
            ("sit", pretrained.sit, {"time_scale": 1.0}, {"time_scale": "positive number"}),
            ("jit", pretrained.jit, {"noise_scale": 2.0, "context_start": 0}, {"noise_scale": "positive", "context_start": "index"}),
        )
    },
    "pretrained.sit_tensors": Call(
        pretrained.sit_tensors,
        {"params": parameters(SIT, IMAGES, 0.5, np.zeros(1, int)), "model": SIT, "size": (4, 4, 4)},
        {"params": "params"},
        {"params": "params|parameters"},
    ),
    "pretrained.autoencoder": Call(
        lambda tensors: pretrained.autoencoder(tensors, AUTOENCODER),
        {"tensors": pretrained.autoencoder_tensors(DECODES, AUTOENCODER)},
        {"tensors": "tensors"},
        {"tensors": "tensors|The file|has shape|not finite"},
    ),
    "pretrained.autoencoder_tensors": Call(
        lambda params: pretrained.autoencoder_tensors(params, AUTOENCODER),
        {"params": DECODES},
        {"params": "params"},
        {"params": "params|parameters"},
    ),
    "likelihood.normal": Call(likelihood.normal, {"x": X}, {"x": "batch"}),
    "likelihood.dequantize": Call(
        likelihood.dequantize, {"key": KEY, "x": X, "width": 0.1}, {"key": "key", "x": "batch", "width": "positive"}
    ),
    "likelihood.bits_per_dimension": Call(
        likelihood.bits_per_dimension, {"log_p": T, "shape": (3,), "width": 0.1}, {"shape": "function", "width": "positive"}
    ),
    "likelihood.exact_divergence": Call(
        likelihood.exact_divergence,
        {"field": VELOCITY, "x": X, "t": 0.5, "block": 2},
        {"field": "field", "x": "batch", "block": "count"},
        {"field": GIVES},
    ),
    "likelihood.hutchinson": Call(
        lambda field, probes: likelihood.hutchinson(probes)(field, X, 0.5),
        {"field": VELOCITY, "probes": jnp.ones((3, 2, 3))},
        {"field": "field", "probes": "probes"},
        {"field": GIVES},
    ),
    "likelihood.hutch_plus_plus": Call(
        lambda field, sketch, probes: likelihood.hutch_plus_plus(sketch, probes)(field, X, 0.5),
        {"field": VELOCITY, "sketch": jax.random.normal(KEY, (3, 2, 3)), "probes": jnp.ones((3, 2, 3))},
        {"field": "field", "sketch": "probes", "probes": "probes"},
        {"field": GIVES},
    ),
    **{
        f"likelihood.{name}": Call(
            function,
            {
                "field": VELOCITY,
                "log_density_0": log_normal,
                x: X,
                "times": times.uniform_grid(4, 0.0, 0.9),
                "divergence": likelihood.exact_divergence,
            },
            {"field": "sampled field", "log_density_0": "function", x: "batch", "times": "grid", "divergence": "function"},
            {"field": f"field|{GIVES}", x: "x"},
        )
        for name, function, x in (("log_density", likelihood.log_density, "x_1"), ("sample", likelihood.sample, "x_0"))
    },
    "sampling.sample_ode_adaptive": Call(
        sampling.sample_ode_adaptive,
        {"field": VELOCITY, "x_0": X, "start": 0.0, "end": 0.9, "rtol": 1e-3, "atol": 1e-3, "max_steps": 100},
        {
            "field": "sampled field",
            "x_0": "batch",
            "start": "number",
            "end": "number",
            "rtol": "positive",
            "atol": "positive",
            "max_steps": "count",
        },
        {"field": GIVES},
    ),
    "training.ema_exponent": Call(training.ema_exponent, {"sigma_rel": 0.1}, {"sigma_rel": "sigma_rel"}),
    "training.power_ema": Call(lambda sigma_rel: training.power_ema(sigma_rel)(3), {"sigma_rel": 0.1}, {"sigma_rel": "sigma_rel"}),
    "training.post_hoc_ema": Call(
        training.post_hoc_ema, {"snapshots": [(1, 0.05, np.ones(2)), (2, 0.1, np.ones(2))], "sigma_rel": 0.1}, {"sigma_rel": "sigma_rel"}
    ),
    "training.init": Call(
        training.init,
        {"params": {"w": jnp.ones(3)}, "optimizer": optax.sgd(0.1), "emas": 1},
        {"optimizer": "function"},
    ),
    "training.make_step": Call(
        lambda state, **a: training.make_step(**a)(state, KEY, X)[0].params,
        {"loss_fn": loss_fn, "optimizer": optax.sgd(0.1), "ema_decay": 0.9, "accumulate": 1, "state": STATE},
        {"loss_fn": "function", "optimizer": "function", "accumulate": "count", "ema_decay": "share", "state": "function"},
    ),
    **{
        f"training.{name}": Call(
            lambda function=function, **a: function(**a),
            {"metric": lambda params, keys, batch: batch.sum(1), "state": None, "key": KEY, "batches": [X]},
            {"metric": "function", "key": "key", "batches": "batches"},
        )
        for name, function in (("evaluate", training.evaluate), ("per_example", lambda **a: list(training.per_example(**a))))
    },
    "training.loss_by_time": Call(
        lambda losses, times, edges: training.loss_by_time(losses, times, edges)[2],
        {"losses": T, "times": T, "edges": np.linspace(0, 1, 3)},
        {"losses": "losses", "times": "losses", "edges": "edges"},
    ),
    "parallel.sample": Call(
        functools.partial(parallel.sample, progress=False),
        {"function": lambda keys, indices: jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys), "key": KEY, "n": 3, "chunk": 2},
        {"function": "function", "key": "key", "n": "count", "chunk": "count"},
    ),
}
ELSEWHERE = {
    "steps, which samplers call": {
        f"sampling.{name}"
        for name in ("euler", "heun", "midpoint", "ralston", "rk4", "euler_maruyama", "stochastic_heun", "euler_maruyama_noiseless")
    },
    "rows and numbers, which conversions call": {f"targets.{name}" for name in ["velocity", "score", "noise", "data", "v"]}
    | {"paths.signal_fraction"},
    "variables, which solvers call": {"sampling.log_snr"},
    "in test_metrics.py": {
        f"metrics.{name}" for name in ["path_length", "path_energy", "straightness", "curvature", "normalized_path_energy"]
    },
    "in test_collect.py and test_features.py": {f"metrics.{name}" for name in ["collect", "load_moments", "save_moments"]},
    "in test_published.py": {"pretrained.sit_metadata"},
    "files, in test_tensors.py": {"pretrained.read", "pretrained.write"},
    "networks of fixed sizes, in test_published_unets.py, test_inception.py and test_dinov2.py; and below": {
        f"pretrained.{name}" for name in ["adm", "adm_classifier", "torchcfm", "edm_adm", "inception", "dinov2"]
    },
    "in test_evaluation.py": {"training.watch"},
    "in test_flow_maps.py": {
        *(f"flow_maps.{name}" for name in fmjax.flow_maps.__all__),
        *(f"sampling.{name}" for name in ["sample_map", "sample_map_renewed", "reverse_map"]),
    },
    "in test_bridges.py and test_couplings.py": {
        *(f"bridges.{name}" for name in ["interpolate", "flow", "conditional_velocity", "conditional_score", "score"]),
        *(f"couplings.{name}" for name in ["independent", "optimal", "partial", "sinkhorn", "draw", "reflow"]),
    },
    "files and devices, in test_training.py, test_parallel.py and test_checkpoints.py": {
        *(f"training.{name}" for name in ["check_position", "check_run", "check_state", "fit", "json_lines", "tensorboard"]),
        *(
            f"parallel.{name}"
            for name in [
                "anywhere",
                "on_first",
                "batch_sharding",
                "constrain_activations",
                "create",
                "fully_sharded",
                "initialize",
                "mesh",
                "pmap",
                "replicated",
                "shard",
                "shard",
            ]
        ),
        "parallel.require_memory",
    },
}
CHAPTERS = (
    "paths betas targets losses times sampling guidance inverse marginals metrics likelihood training parallel bridges couplings "
    "pretrained flow_maps"
)


def outcome(call, argument, value):
    """How a call ends, and what is to say of it: "clear", "obscure", "finite" or "not finite"."""
    arguments = {**call.arguments, argument: value.make(call.arguments[argument])}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = jax.block_until_ready(call.call(**arguments))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/jax/_src/" not in frame.filename][-1].filename.startswith(LIBRARY)
        named = re.search(rf"(?<!\w)({argument}|{call.names.get(argument, argument)})", str(error))
        said = f"{type(error).__name__}: {str(error)[:200]}"
        return ("clear" if ours and frames[-1].filename.startswith(LIBRARY) and named else "obscure"), said
    leaves = [leaf for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    return ("finite" if finite else "not finite"), f"gave {str(result)[:100]}"


def outcomes(name):
    """Every wrong call of a function."""
    call = CALLS[name]
    for argument, kinds in call.kinds.items():
        for kind in kinds.split(" + "):
            for value in KINDS[kind]:
                yield argument, value, *outcome(call, argument, value)


@pytest.mark.parametrize("name", list(CALLS))
def test_wrong_calls_are_named(name):
    call = CALLS[name]
    result = call.call(**call.arguments)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype") and leaf.dtype.kind == "f")
    bad = [
        f"{argument} {value.what}: {how}, {said}"
        for argument, value, how, said in outcomes(name)
        if how != ("finite" if value.right else "clear")
    ]
    assert not bad, "\n".join(bad)


def test_every_public_function_is_here():
    """Or in a list that says where else."""
    public = set()
    for chapter in CHAPTERS.split():
        module = importlib.import_module(f"fmjax.{chapter}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and function.__module__.startswith(module.__name__):
                public.add(f"{chapter}.{name}")
    listed = set(CALLS) | set().union(*ELSEWHERE.values())
    assert public - listed == set(), "without a row in CALLS"


ADAM, BATCHES = optax.adam(1e-3), [jnp.ones((4, 2))] * 4
VP, POLYNOMIAL = paths.VariancePreserving(), paths.Polynomial(3.0)


class TurnsBack:
    """A path of a user's own whose noise rises in between."""

    def alpha(self, t):
        return t

    def beta(self, t):
        return (1 - t) * (1 + 6 * t * jnp.sin(3 * jnp.pi * t) ** 2)


def trained(**changes):
    """A loop of four steps with something wrong."""
    step = changes.pop("step", training.make_step(loss_fn, ADAM))
    state = changes.pop("state", training.init({"w": jnp.ones(3)}, ADAM))
    run = training.Run(state, changes.pop("key", KEY))
    return lambda: training.fit(
        step, changes.pop("run", run), changes.pop("batches", BATCHES), **{"steps": 4, "progress": False, **changes}
    )


def stepped(state=None, **changes):
    state = training.init({"w": jnp.ones(3)}, ADAM) if state is None else state
    return lambda: training.make_step(changes.pop("loss_fn", loss_fn), changes.pop("optimizer", ADAM), **changes)(state, KEY, BATCHES[0])


VARIED = training.init({"w": jnp.ones(3)}, ADAM, variables={"n": 0})


def beside(**numbers):
    """A loss with numbers beside it."""
    return lambda params, key, batch: (batch.mean(), numbers)


def varied(variables):
    return lambda params, old, key, batch: (batch.mean(), variables())


def by_pmap(step):
    state = training.init({"w": jnp.ones(3)}, ADAM)
    return lambda: parallel.pmap(step, parallel.mesh(2))(state, KEY, BATCHES[0])


def diffused(path, step, **changes):
    arguments = {
        "velocity": marginals.velocity(path, MIXTURE),
        "sigma": 0.5,
        "key": KEY,
        "x_0": X,
        "times": times.uniform_grid(4, 0.01),
        **changes,
    }
    return lambda: sampling.sample_diffusion(path, step=step, **arguments)


NETWORKS = {
    "mlp": functools.partial(mlp.MLP, hidden_size=4, depth=1),
    "dit": functools.partial(dit.DiT, hidden_size=8, depth=1, num_heads=2),
    "unet": functools.partial(unet.UNet, model_channels=8, channel_mult=(1,), groups=4, attention_resolutions=()),
}


def applied(name, y, **fields):
    """A network's parameters for a y, of images."""
    mask = {} if "mask" not in fields else {"mask": fields.pop("mask")}
    return lambda: jax.eval_shape(lambda: NETWORKS[name](**fields).init(KEY, jnp.zeros((B, 4, 4, 2)), T, y, **mask))


def measured(step, last=None):
    def follow():
        field = inverse.linear_inverse(PATH, VELOCITY, lambda x: x[:2], X[:, :2])
        return sampling.sample_ode(field, X, times.uniform_grid(4, 0.01), step=step, last=last)

    return follow


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "a dict as state": (trained(state={"w": jnp.ones(3)}), "The state is a dict, but training has a TrainState"),
        "no steps": (trained(steps=-1), "steps is -1"),
        "no logs": (trained(log_every=0), "log_every is 0"),
        "a key that is a number": (trained(key=0), "key has dtype int"),
        "metrics without a loss": (trained(step=lambda state, key, batch: (state, {"mse": 0.0})), r"metrics are the keys \['mse'\]"),
        "metrics with a step": (trained(step=lambda state, key, batch: (state, {"loss": 0.0, "step": 1})), "metrics have a 'step'"),
        "metrics that are none": (trained(step=lambda state, key, batch: (state, 0.0)), "metrics are a float, but they are a dict"),
        "metrics of many": (trained(step=lambda state, key, batch: (state, {"loss": jnp.ones(3)})), r"'loss' has shape \(3,\)"),
        "a loss per example": (stepped(loss_fn=lambda params, key, batch: batch.mean(1)), r"loss_fn gives shape \(4,\), .*\.mean\(\)"),
        "a loss with more": (stepped(loss_fn=lambda params, key, batch: (batch.mean(), 1)), "loss_fn gives a tuple of 2"),
        "a loss in a list": (stepped(loss_fn=lambda params, key, batch: [batch.mean()]), "loss_fn gives a list, but it gives one number"),
        "no loss": (stepped(loss_fn=lambda params, key, batch: None), "loss_fn gives a NoneType, but it gives one number"),
        "a number of the step's own": (stepped(loss_fn=beside(grad_norm=1.0)), "names a number 'grad_norm', which a step has already"),
        "a number per example": (stepped(loss_fn=beside(error=jnp.ones(4))), r"gives shape \(4,\) as 'error', .* take its mean"),
        "a number that is none": (stepped(loss_fn=beside(error="much")), "gives a str as 'error', but metrics are real numbers"),
        "a number without a name": (stepped(loss_fn=lambda params, key, batch: (batch.mean(), {1: 2.0})), "names a number 1, but"),
        "a loss without variables": (stepped(VARIED), r"The state has variables, so loss_fn is called with \(params, variables, key"),
        "variables that are not kept": (
            stepped(VARIED, loss_fn=lambda *given: given[3].mean()),
            r"gives shape \(\), but it gives \(loss, v",
        ),
        "numbers in their place": (
            stepped(VARIED, loss_fn=varied(lambda: {"error": 1.0})),
            r"variables of another structure .* \['n'\], \['e",
        ),
        "variables of another shape": (
            stepped(VARIED, loss_fn=varied(lambda: {"n": jnp.ones(3)})),
            r"another structure .* differ in \['n'\]",
        ),
        "variables the state has not": (
            stepped(loss_fn=lambda params, variables, key, batch: (batch.mean(), variables)),
            r"The state has no variables, .* init\(params, optimizer, variables=\.\.\.\)",
        ),
        "another optimiser's state": (stepped(training.init({"w": jnp.ones(3)}, optax.sgd(0.1))), "opt_state is of another optimiser"),
        "fewer averages": (stepped(ema_decay=(0.9, 0.99)), r"has 2 decays: .*emas=2"),
        "more averages": (stepped(training.init({"w": jnp.ones(3)}, ADAM, emas=2)), "has 2 EMAs, but the step has one decay"),
        "no optimiser": (lambda: training.init({"w": jnp.ones(3)}, "adam"), "optimizer is 'adam', .* optax"),
        "parts of a batch": (stepped(accumulate=3), "The batch of 4 does not divide into the 3 parts"),
        "a step for one device under pmap": (by_pmap(training.make_step(loss_fn, ADAM)), "axis_name=parallel.AXIS"),
        "too few rows": (
            lambda: parallel.sample(lambda keys, i: jnp.ones((1, 3)), KEY, 4, chunk=2, progress=False),
            r"gives shape \(1, 3\) for 2 keys",
        ),
        "no checkpoints kept": (lambda: checkpoints.Checkpointer("nowhere", keep=0), "keep is 0"),
        "a snapshot that is no triple": (lambda: training.post_hoc_ema([(1, 0.1)], 0.1), "Snapshot 0 is a tuple, but each is a triple"),
        "averages of two networks": (
            lambda: training.post_hoc_ema([(1, 0.1, np.ones(2)), (2, 0.1, np.ones(3))], 0.1),
            "snapshot 1 has other arrays than the first",
        ),
        "labels that wrap": (
            lambda: layers.LabelEmbedding(300, 8).init(KEY, jnp.zeros(3, jnp.uint8)),
            "y has dtype uint8, which ends at 255, but labels are 0 to 300",
        ),
        **{
            f"a path for the tensors of {load.__name__}": (lambda load=load, more=more: load("x.pt", *more), "tensors is 'x.pt', .*read")
            for load, *more in (
                *[[getattr(pretrained, name)] for name in ("dit", "adm", "adm_classifier", "torchcfm", "edm_adm", "inception")],
                [pretrained.dinov2, dinov2.DINOv2_S()],
            )
        },
        "a size of ADM that was not published": (lambda: pretrained.adm({}, 100), "image_size is 100, but published sizes are 64, 128"),
        "a variance that is not predicted": (
            lambda: pretrained.sit(TENSORS["sit"], num_heads=2).guided(LABELS, 3, 2.0),
            "predicts no variance: take another step, such as sampling.ancestral",
        ),
        "heads of a size of one's own": (lambda: pretrained.sit(TENSORS["sit"]), "No published size has 8 features, .* give it"),
        "guidance of more channels than there are": (
            lambda: guidance.channels(5)(X, X_0, 2.0),
            r"count is 5, but the value has shape \(3, 3\): it has 3 channels",
        ),
        "whole steps of another path": (lambda: betas.grid(PATH, 4), "path is Linear.*, but a grid of whole steps .*times.uniform_grid"),
        "a velocity that is infinite at data, in churn": (
            diffused(VP, sampling.churn(lambda path: sampling.heun)),
            "is infinite at t = 1",
        ),
        "the drift at data, in predictor_corrector": (
            diffused(PATH, sampling.predictor_corrector(sampling.stochastic_heun)),
            "at t = 1, where it would be infinite",
        ),
        "an infinite sigma at noise, in predictor_corrector": (
            diffused(PATH, sampling.predictor_corrector(sampling.euler_maruyama), sigma=sampling.sigma_sbdm(PATH), times=GRID),
            "at t = 0|sigma is inf at t = 0",
        ),
        "a flow's multistep for a diffusion": (diffused(PATH, sampling.unipc(PATH, 2)), "steps without noise are for sample_ode"),
        "a velocity of 0 at noise": (diffused(POLYNOMIAL, sampling.ancestral, times=GRID), r"is 0 .* start=0.00\d"),
        "a last step of another shape": (
            lambda: sampling.sample_ode(VELOCITY, X, GRID, step=sampling.euler, last=lambda field, x, t, dt: x[:1]),
            r"The last step's output has shape \(1, 3\)",
        ),
        "a null that is a string": (
            lambda: guidance.classifier_free(field_y, jnp.ones(3), "3", 2.0),
            "null is '3', but y has dtype float32",
        ),
        "a path that turns back": (diffused(TurnsBack(), sampling.churn()), "alpha / beta falls from t = .* sampling.heun"),
        "a path that turns back, in a flow": (
            lambda: sampling.sample_ode(VELOCITY, X, GRID, step=sampling.unipc(TurnsBack(), 2)),
            "alpha / beta falls from t = .* sampling.heun",
        ),
        "a measurement without noise at data": (measured(sampling.heun), r"spread r_t is .*0.* at t = 1.0, .* sampling.path_heun\(path\)"),
        "a path of a flat source": (
            lambda: targets.change_path(lambda x, t: 0 * x, source=POLYNOMIAL, target=PATH)(X, 0.0),
            "the .* does not follow from the velocity at t = 0",
        ),
        "no condition where there is one": (
            applied("mlp", None, condition=conditions.Vector()),
            "condition, Vector, and needs y, .*got none",
        ),
        "two conditions": (
            applied("dit", LABELS, num_classes=3, condition=conditions.Label(3)),
            r"num_classes is 3 and condition is a Label, .*conditions\.Several",
        ),
        "a condition for another batch": (
            applied("mlp", jnp.ones((4, 2)), condition=conditions.Vector()),
            r"y has shape \(4, 2\), .* a vector of each example, \(3, k\)",
        ),
        "numbers of no axis": (applied("mlp", jnp.ones(3), condition=conditions.Vector()), r"y has shape \(3,\), .*\(3, k\), batch first"),
        "numbers without any": (applied("mlp", jnp.ones((3, 0)), condition=conditions.Vector()), r"y has shape \(3, 0\)"),
        "labels for a vector": (
            applied("mlp", jnp.ones((3, 1), jnp.int32), condition=conditions.Vector()),
            r"y has dtype int32, .*astype\(jnp.float32\), .*conditions.Label",
        ),
        "a string for a vector": (applied("mlp", "x", condition=conditions.Vector()), "y is 'x', but this condition is a vector"),
        "a vector for labels": (
            applied("mlp", jnp.ones((3, 2)), condition=conditions.Label(3)),
            r"needs one label per example, y of shape \(3,\), got shape \(3, 2\)",
        ),
        "a vector for tokens": (applied("dit", jnp.ones((3, 2)), condition=conditions.Tokens()), r"y has shape \(3, 2\), .*\(3, L, k\)"),
        "no tokens": (applied("dit", jnp.ones((3, 0, 2)), condition=conditions.Tokens()), r"y has shape \(3, 0, 2\), .*\(3, L, k\)"),
        "an image of another size": (
            applied("unet", jnp.ones((3, 2, 2, 1)), condition=conditions.Image()),
            r"y has shape \(3, 2, 2, 1\), .* an image as large as x, \(3, 4, 4, k\)",
        ),
        "a number that is nan": (
            applied("mlp", np.array([[1, 2], [1, np.nan], [1, 2]], np.float32), condition=conditions.Vector()),
            r"y\[1\] is \[ *1\. nan\], of which some is nan and some is not",
        ),
        "a dict for a vector": (applied("mlp", {"a": X}, condition=conditions.Vector()), r"y is a dict of the keys \['a'\], but"),
        "a dict for labels": (applied("mlp", {"a": LABELS}, num_classes=3), r"y is a dict of the keys \['a'\], .*takes labels: .*Several"),
        "a dict for no condition": (applied("mlp", {"a": LABELS}), r"y is a dict of the keys \['a'\], .*takes no y"),
        "other keys": (
            applied("mlp", {"b": X, "c": X}, condition=conditions.Several({"a": conditions.Vector()})),
            r"y is a dict of the keys \['b', 'c'\], but this condition is a dict of the keys \['a'\]",
        ),
        "an array for several": (
            applied("mlp", X, condition=conditions.Several({"a": conditions.Vector()})),
            r"y is an array of shape \(3, 3\), but this condition is a dict of the keys \['a'\]",
        ),
        "a part of several that is none": (
            applied("mlp", {"a": None}, condition=conditions.Several({"a": conditions.Vector()})),
            "y is None, but this condition is a vector",
        ),
        "tokens for points": (
            applied("mlp", X[..., None], condition=conditions.Tokens()),
            "Tokens, gives tokens, but an MLP takes a vector",
        ),
        "tokens without attention": (
            applied("unet", X[..., None], condition=conditions.Tokens()),
            r"gives tokens, but attention_resolutions is \(\)",
        ),
        "class tokens of an image": (
            applied("dit", jnp.ones((3, 4, 4, 1)), condition=conditions.Image(), class_tokens=2),
            "class_tokens is 2, but .* a condition with a vector",
        ),
        "a condition that is an array": (
            applied("mlp", X, condition=lambda y, x, features: y),
            "The condition gives a .*Array.*Embedded",
        ),
        "a mask of numbers": (applied("dit", None, mask=jnp.ones((3, 4, 4))), "mask has dtype float32, .* mask > 0"),
        "a mask of a row": (applied("dit", None, mask=jnp.ones((3, 4), bool)), r"mask has shape \(3, 4\), .*\(3, 2, 2\)"),
        "points for images": (
            lambda: NETWORKS["unet"]().init(KEY, X, T),
            r"x has shape \(3, 3\), .* sequences, .* take an MLP, .*x\[\.\.\., None\]",
        ),
        "positions without features": (lambda: layers.grid_positions(2, 2, 2, 4), "4 features, .* 3 axes .* 6 or more"),
        "times beyond data": (lambda: times.shift(np.array([0.5, 1.5]), 3.0), "times go from 0, noise, to 1, data"),
        "states for times": (
            lambda: paths.flow(PATH, X, X, 5 * jnp.ones_like(X)),
            r"t has shape \(3, 3\) and numbers from 5.0 to 5.0, .*\(x, t\)",
        ),
        "time and state exchanged": (
            lambda: NETWORKS["mlp"]().init(KEY, 0.5, X),
            r"x has shape \(\) and t \(3, 3\), .* \(x, t\), in this order",
        ),
        "parameters for a field": (lambda: targets.convert_field(PATH, {"a": X}, **CONVERT), "field is a dict, but it is a function"),
        "an array for batches": (
            lambda: training.fit(training.make_step(loss_fn, ADAM), training.Run(training.init(X, ADAM), KEY), X, steps=1),
            r"batches is an array of shape \(3, 3\), but it is an iterable of batches or a function of the step",
        ),
        "a path that does not rise": (lambda: paths.Polynomial(0.0), "power is 0.0, but it is the power of t"),
        "a path that falls": (lambda: paths.VariancePreserving(-1.0), "rate_min is -1.0"),
        "an operator that adds": (
            lambda: inverse.linear_inverse(PATH, VELOCITY, lambda x: x + 1, X)(X, 0.5),
            "The operator of 0 is not 0",
        ),
        "numbers below float32": (lambda: metrics.energy_distance(1e-30 * np.eye(3), np.zeros((3, 3))), "are 0 in float32"),
        "a number beyond float32": (lambda: metrics.energy_distance(1e30 * np.eye(3), np.eye(3)), "float32 does not hold"),
    }.values(),
    ids=lambda value: "" if callable(value) else value[:30],
)
def test_wrong_calls_of_several_parts_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_calls_beside_them_are_right():
    """What stands in the errors above as the cure."""
    assert jnp.isfinite(diffused(VP, sampling.churn(sampling.path_heun))()[0]).all()
    assert jnp.isfinite(diffused(POLYNOMIAL, sampling.ancestral, times=times.uniform_grid(4, 0.002))()[0]).all()
    assert jnp.isfinite(
        diffused(PATH, sampling.predictor_corrector(sampling.stochastic_heun), last=sampling.euler_maruyama_noiseless)()[0]
    ).all()
    for step, last in ((sampling.heun, sampling.euler), (sampling.path_heun(PATH), None), (sampling.midpoint, None)):
        assert jnp.isfinite(measured(step, last)()[0]).all()
    # Distances of large numbers that differ little, and derivatives where points are the same.
    x, y = np.float64(1e8) + np.eye(3), np.float64(1e8) + 2 * np.eye(3)
    for metric in (metrics.energy_distance, functools.partial(metrics.sliced_wasserstein, KEY), metrics.wasserstein):
        np.testing.assert_allclose(metric(x, y), metric(np.eye(3), 2 * np.eye(3)), rtol=1e-6)
    assert jnp.isfinite(jax.grad(metrics.energy_distance)(X, X_0)).all()
    assert jnp.isfinite(jax.grad(metrics.energy_distance)(X, X)).all()
    # Sums over large images in half precision.
    large = jnp.full((2, 70_000), 2, jnp.float16)
    np.testing.assert_allclose(guidance.cfg_zero_star(large, large, 3.0), 2, rtol=1e-3)


if __name__ == "__main__":
    counts = collections.Counter()
    for name in CALLS:
        for argument, value, how, said in outcomes(name):
            as_it_should = how == ("finite" if value.right else "clear")
            counts["right" if as_it_should and value.right else how] += 1
            if not as_it_should:
                print(f"{name}({argument}: {value.what}): {how}, {said}")
    print(dict(counts), sum(counts.values()))
