"""The members that every test of a kind runs over: a new path, target or step is tested by adding it here."""

import dataclasses

import jax
import jax.numpy as jnp

from fmjax import marginals, paths, sampling, targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VarianceExploding:
    """A path of a user's own, which keeps the data and shrinks the noise."""

    scale: float = 3.0

    def alpha(self, t):
        return jnp.ones_like(t)

    def beta(self, t):
        return self.scale * (1 - t)


BOUNDED = [paths.Linear(), paths.Cosine(), paths.Polynomial(2.0), paths.Polynomial(3.0)]
"""Paths whose derivative is finite on [0, 1]."""
PATHS = [*BOUNDED, paths.VariancePreserving(), paths.SquareRoot(), VarianceExploding()]
TARGETS = [targets.velocity, targets.score, targets.noise, targets.data, targets.v]
ORDERS = [(sampling.euler, 1), (sampling.heun, 2), (sampling.midpoint, 2), (sampling.rk4, 4)]


def name(member):
    return getattr(member, "__name__", None) or repr(member)


def mixture():
    """Three unlike components in the plane: weights, scales and positions differ."""
    return marginals.GaussianMixture(
        jnp.array([0.2, 0.5, 0.3]), jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -1.8]]), jnp.array([0.5, 0.7, 0.4])
    )
