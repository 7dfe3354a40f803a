"""Products outside networks keep every digit where the hardware's default does not: TF32's ten bits on GPUs, bfloat16's eight on TPUs."""

import jax
import jax.numpy as jnp
import optax
import pytest

from fmjax import likelihood, marginals, metrics, paths, sampling, times, training

PATH, GRID, X = paths.VariancePreserving(), times.uniform_grid(6), jnp.ones((5, 3))
MIXTURE = marginals.GaussianMixture(jnp.ones(2), jnp.ones((2, 3)), 1.0)


def field(x, t):
    return -x


def ode(step):
    return lambda x: sampling.sample_ode(field, x, GRID, step=step)[0]


def sde(step):
    return lambda x: sampling.sample_diffusion(PATH, field, sampling.sigma_beta(PATH), jax.random.key(0), x, GRID, step=step)[0]


PROGRAMS = {
    "a marginal": lambda x: marginals.velocity(PATH, MIXTURE)(x, 0.5),
    "the sliced Wasserstein distance": lambda x: metrics.sliced_wasserstein(jax.random.key(0), x, x),
    "Hutch++": lambda x: likelihood.hutch_plus_plus(x[:, None], x[:, None])(field, x, 0.5),
    "adams_bashforth": ode(sampling.adams_bashforth(3)),
    "dpm_solver_pp": ode(sampling.dpm_solver_pp(PATH, 2)),
    "unipc": ode(sampling.unipc(PATH, 3)),
    "deis": ode(sampling.deis(PATH, 3)),
    "sde_dpm_solver_pp": sde(sampling.sde_dpm_solver_pp),
}


def products(value):
    """The matrix products of a program, those of its inner programs too."""
    for leaf in jax.tree.leaves(value, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
        for eqn in getattr(getattr(leaf, "jaxpr", leaf), "eqns", ()):
            if eqn.primitive.name == "dot_general":
                yield eqn
            yield from products(tuple(eqn.params.values()))


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_keep_every_digit(name):
    precisions = [eqn.params["precision"] for eqn in products(jax.make_jaxpr(PROGRAMS[name])(X))]
    assert precisions, "no product was found"
    assert set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_a_moment_is_judged_as_it_is_kept():
    """Or a compiler that leaves out the rounding to half precision, as the one for GPUs does, takes an infinite moment for a finite one."""
    optimizer = optax.adam(1e-3, mu_dtype=jnp.float16)
    step = training.make_step(lambda params, key, batch: (params * batch).sum(), optimizer)
    state = training.init(jnp.ones(3), optimizer)
    assert "reduce_precision" in str(jax.make_jaxpr(step)(state, jax.random.key(0), jnp.ones(3)))
