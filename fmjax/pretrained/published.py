"""Published: a network with what it was trained to predict, as fields of this library.

Papers count time from either end, in steps or not, and predict noise, data or a velocity, some with a variance beside it. All of that is in
one record, whose `velocity` is a field `(x, t, y) -> u`, t = 0 noise and t = 1 data, along its `path`: samplers, guidance and likelihoods
take it as any other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fmjax import betas, checks, guidance, paths, targets


def given_time(path, t) -> Any:
    """The network sees t itself, as those of flow matching do."""
    return t


def discrete_time(path, t) -> Any:
    """The network sees the index of a step, k - 1; ours multiply a time by 1,000."""
    return betas.step_index(path, t) / 1000


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "path"],
    meta_fields=["model", "target", "time", "size", "least", "variance", "sigma_data"],
)
@dataclasses.dataclass(frozen=True)
class Published:
    """A network's parameters and conventions; a pytree, so that it can be an argument of `jax.jit`, and `jax.device_put` places it."""

    params: chex.ArrayTree
    """{"params": ...} of the model."""
    path: Any
    """The path that it was trained along."""
    model: Any
    """The Flax module."""
    target: Callable | None
    """What it predicts: `targets.noise`, `targets.velocity`, ...; None for a classifier."""
    time: Callable
    """(path, t) -> what `model.apply` takes as time."""
    size: tuple[int, ...]
    """Of one example, (H, W, C)."""
    least: float = 0.0
    """The least 1 - t that a prediction of the data is divided by."""
    variance: bool = False
    """Whether the second half of its channels says a variance."""
    sigma_data: float | None = None
    """Of EDM's preconditioning: the data's standard deviation; None for none."""

    def __repr__(self):
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params) if hasattr(leaf, "size"))
        sides = " x ".join(map(str, self.size))
        name = "logits" if self.target is None else getattr(self.target, "__name__", "target")
        return f"Published({type(self.model).__name__} of {count / 1e6:.1f} M parameters, {name} of {sides} along {self.path})"

    def predict(self, x, t, *y) -> chex.ArrayDevice:
        """All that the network gives, unconverted.

        Args:
          x: states, (B, H, W, C).
          t: times in [0, 1], () or (B,): 0 is noise.
          *y: labels, (B,), where it takes any.
        Returns:
          (B, H, W, C), or of twice the channels where `variance`.
        """

        def network(x, t):
            return self.model.apply(self.params, x, self.time(self.path, t), *y)

        return (network if self.sigma_data is None else targets.scale_input(self.path, network, self.sigma_data))(x, t)

    def velocity(self, x, t, *y) -> chex.ArrayDevice:
        """The velocity along `path`, u_t(x | y).

        Args:
          x: states, (B, H, W, C).
          t: times in [0, 1], () or (B,): 0 is noise.
          *y: labels, (B,), where it takes any.
        Returns:
          Like x.
        """
        return self._split(x, t, *y)[0]

    def velocity_and_variance(self, x, t, *y) -> tuple[chex.ArrayDevice, chex.ArrayDevice]:
        """The velocity, and v in [-1, 1], what the network says of the variance: for `sampling.learned_variance`.

        Args:
          x: states, (B, H, W, C).
          t: times in [0, 1], () or (B,): 0 is noise.
          *y: labels, (B,), where it takes any.
        Returns:
          Two arrays like x.
        Raises:
          ValueError: if the network says no variance.
        """
        self._require_variance()
        return self._split(x, t, *y)

    def guided(self, y, null, scale, *, channels=None) -> paths.Field:
        """Classifier-free guidance of the velocity, with the conditional variance beside it, in one batched call.

        u~ = (1 - w) u(x | null) + w u(x | y)    (Ho and Salimans 2022, arXiv:2207.12598; Peebles and Xie 2023, arXiv:2212.09748)

        Args:
          y: labels, (B,).
          null: the label of no class.
          scale: w, a number, or one per example, (B,); 1 is no guidance.
          channels: how many of them are guided, from the first on; DiT's and SiT's code guides three. None for all.
        Returns:
          (x, t) -> (velocity, v), for `sampling.learned_variance`; `guidance.classifier_free(self.velocity, ...)` is of the velocity alone.
        Raises:
          ValueError: if the network says no variance.
        """
        self._require_variance()
        y = jnp.asarray(y)
        both = jnp.concatenate([checks.null(null, y), y])
        combine = guidance.extrapolate if channels is None else guidance.channels(channels)

        def field(x, t):
            times = jnp.concatenate([t, t]) if jnp.ndim(t) else t
            velocity, v = self.velocity_and_variance(jnp.concatenate([x, x]), times, both)
            unguided, guided = jnp.split(velocity, 2)
            return combine(guided, unguided, checks.multiplier("The guidance scale", scale, guided)), v[len(x) :]

        return field

    def _require_variance(self):
        if not self.variance:
            raise ValueError(f"{self} predicts no variance: take another step, such as sampling.ancestral.")

    def _split(self, x, t, *y):
        if self.target is None:
            raise TypeError(f"{self} is a classifier: predict(x, t) gives its logits, and it has no velocity.")
        channels = self.size[-1]
        if jnp.ndim(x) != 4 or x.shape[-1] != channels:
            hint = "; channels stand last: move them by x.transpose(0, 2, 3, 1)" if jnp.ndim(x) == 4 and x.shape[1] == channels else ""
            raise ValueError(f"x has shape {jnp.shape(x)}, but {self} takes (B, H, W, {channels}){hint}.")
        value = self.predict(x, t, *y)
        if value.shape[-1] not in (channels, 2 * channels):
            raise ValueError(f"The network gives {value.shape[-1]} channels for x of {channels}: it is of examples of shape {self.size}.")
        value, rest = value[..., :channels], value[..., channels:]
        if self.least:
            left = jnp.maximum(1 - paths.lift(checks.times(checks.on_path(t), x), x), self.least)
            return ((value - x) / left).astype(x.dtype), rest
        return targets.convert(self.path, value, x, t, source=self.target, target=targets.velocity), rest
