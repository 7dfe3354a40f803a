"""The members that every test of a kind runs over: a new path, target or step is tested by adding it here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import betas, marginals, paths, sampling, targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VarianceExploding:
    """A path of a user's own, which keeps the data and shrinks the noise."""

    scale: float = 3.0

    def alpha(self, t):
        return jnp.ones_like(t)

    def beta(self, t):
        return self.scale * (1 - t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatEnds:
    """A path of a user's own that comes to rest at noise and at data, where its velocity says nothing."""

    def alpha(self, t):
        return jnp.sin(jnp.pi / 2 * t) ** 2

    def beta(self, t):
        return jnp.sin(jnp.pi / 2 * (1 - t)) ** 2


BOUNDED = [paths.Linear(), paths.Cosine(), paths.Polynomial(2.0), paths.Polynomial(3.0), paths.ScaledNoise(paths.Cosine(), 2.0)]
"""Paths whose derivative is finite on [0, 1]."""
PATHS = [*BOUNDED, paths.VariancePreserving(), paths.SquareRoot(), VarianceExploding(), betas.linear()]
TARGETS = [targets.velocity, targets.score, targets.noise, targets.data, targets.v]
ORDERS = [(sampling.euler, 1), (sampling.heun, 2), (sampling.midpoint, 2), (sampling.ralston, 2), (sampling.rk4, 4)]
"""Steps that take any field on any grid, and the order of their error."""
PATH_ORDERS = {
    "ddim": (sampling.ddim, 1),
    **{f"adams_bashforth {k}": (lambda path, k=k: sampling.adams_bashforth(k), k) for k in (1, 2, 3, 4)},
    **{f"dpm_solver_pp {k}": (lambda path, k=k: sampling.dpm_solver_pp(path, k), k) for k in (1, 2, 3)},
    **{f"deis {k}": (lambda path, k=k: sampling.deis(path, k), k) for k in (1, 2, 3)},
    **{f"unipc {k}": (lambda path, k=k: sampling.unipc(path, k), k + 1) for k in (1, 2, 3)},
}
"""Makers of steps for a path, which takes the velocity, and their order on grids that shrink towards both ends."""
NOISY_STEPS = {
    "euler_maruyama": sampling.euler_maruyama,
    "stochastic_heun": sampling.stochastic_heun,
    "ancestral": sampling.ancestral,
    "sde_dpm_solver_pp": sampling.sde_dpm_solver_pp,
    "churn": sampling.churn(),
    "predictor_corrector": sampling.predictor_corrector(sampling.churn()),
}
"""Steps with noise; the first two are those of any SDE, the others know the path."""
SIGMAS = {
    "0": lambda path: 0.0,
    "0.5": lambda path: 0.5,
    "1": lambda path: 1.0,
    "2": lambda path: 2.0,
    "beta": lambda path: sampling.sigma_beta(path, 2.0),
    "sbdm": sampling.sigma_sbdm,
    "increasing_decreasing": lambda path: sampling.sigma_increasing_decreasing(4.0),
}


def name(member):
    return getattr(member, "__name__", None) or repr(member)


def mixture():
    """Three unlike components in the plane: weights, scales and positions differ."""
    return marginals.GaussianMixture(
        jnp.array([0.2, 0.5, 0.3]), jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -1.8]]), jnp.array([0.5, 0.7, 0.4])
    )


def errors_and_orders(path, grid, steps, counts=(256, 512)):
    """Mean errors of a mixture's flow map by each step, against 4,000 of rk4, on grids that a function makes of a number of steps.

    All of it is one program: nearly all of its time is compilation, and most of that is the field's, once.

    Returns:
      The errors, (steps, 2), and their orders, (steps,).
    """
    field = marginals.velocity(path, mixture())
    fine, grids = grid(4000), [grid(n) for n in counts]
    x_0 = path.beta(fine[0]) * jax.random.normal(jax.random.key(0), (64, 2), jnp.float64)

    @jax.jit
    def found():
        exact = sampling.sample_ode(field, x_0, fine, step=sampling.rk4)[0]
        ends = [[sampling.sample_ode(field, x_0, times, step=step)[0] for times in grids] for step in steps]
        return jnp.array([[jnp.linalg.norm(end - exact, axis=1).mean() for end in row] for row in ends])

    errors = np.asarray(found())
    return errors, np.log(errors[:, 0] / errors[:, 1]) / np.log(counts[1] / counts[0])
