"""How fast every step converges, on every path, for every sigma: a JSON file of rows, and two plots.

    python -m benchmarks.orders --out results/orders.json        about 12 minutes on two cores

"noise": the law of what a sampler with noise draws, where the data are one Gaussian of mean 1 and standard deviation 1/2, against
them: the Wasserstein distance of the two Gaussians. A step is affine in the state and in its noise then, so the law follows exactly,
in float64, from samples that meet one draw of 1 each and no other: nothing is random here. By equal steps from 0 (from .001 where the
path's velocity is 0 at noise, from .01 where a step of any SDE would meet an infinite sigma there) to 1. The order is that between the
last two numbers of steps.

"flow": the mean |x - x*| per coordinate of a mixture in the plane, in float32, against 8,000 steps of Runge-Kutta 4 in float64; it falls to
rounding and stays there, up to 4,000 steps.

"learnt": the energy distance to fresh data of what an MLP that learnt two moons draws in 100 steps, beside that of as many data. A
learnt velocity errs, and a sigma that does not fall with beta multiplies the error near data in the drift of the SDE, not in steps
that know the path.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
from benchmarks.solvers import draw, made
from fmjax import losses, marginals, metrics, paths, sampling, times, training
from fmjax.data import toy
from fmjax.models import mlp
from fmjax.sampling import steps, stochastic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exploding:
    """A path of a user's own, which keeps the data and shrinks the noise."""

    def alpha(self, t):
        return jnp.ones_like(t)

    def beta(self, t):
        return 3 * (1 - t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatEnds:
    """A path of a user's own that comes to rest at noise and at data."""

    def alpha(self, t):
        return jnp.sin(jnp.pi / 2 * t) ** 2

    def beta(self, t):
        return jnp.sin(jnp.pi / 2 * (1 - t)) ** 2


PATHS = {
    "linear": paths.Linear(),
    "cosine": paths.Cosine(),
    "polynomial 2": paths.Polynomial(2.0),
    "polynomial 3": paths.Polynomial(3.0),
    "variance preserving": paths.VariancePreserving(),
    "square root": paths.SquareRoot(),
    "variance exploding": Exploding(),
    "flat ends": FlatEnds(),
}
RESTING = ("polynomial 2", "polynomial 3", "flat ends")
"""Paths whose velocity is 0 at noise."""
INFINITE = ("variance preserving", "square root")
"""Paths whose velocity is infinite at data."""
SIGMAS = {"0": (0.0, 0.0), "0.5": (0.5, 0.0), "1": (1.0, 0.0), "2": (2.0, 0.0), "2 beta": (0.0, 2.0), "reverse SDE": None}
"""Each a number, and how much of beta is added to it, which are arguments of one program; None is `sampling.sigma_sbdm`."""
NOISY = {
    "euler_maruyama": sampling.euler_maruyama,
    "stochastic_heun": sampling.stochastic_heun,
    "ancestral": sampling.ancestral,
    "sde_dpm_solver_pp": sampling.sde_dpm_solver_pp,
    "churn": sampling.churn(),
    "predictor_corrector": sampling.predictor_corrector(),
}
FLOWS: dict[str, Callable] = {
    "ddim": sampling.ddim,
    "sampling.path_heun": sampling.path_heun,
    "edm_heun": sampling.edm_heun,
    **{name: lambda path, name=name: made(path)[name][0] for name in made(PATHS["linear"]) if name not in ("ralston", "unipc 1")},
}
MEAN, SCALE = 1.0, 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the convergence of every step."""

    out: Path | None = None
    """File that the metrics are written to, with the plots beside it."""
    steps: tuple[int, ...] = (25, 50, 100, 200, 400, 800)
    """Numbers of steps of the SDE samplers."""
    fine: tuple[int, ...] = (10, 40, 100, 400, 1000, 4000)
    """Numbers of steps of the ODE solvers."""
    points: int = 200
    """Numbers of steps of the ODE solvers."""
    paths: tuple[str, ...] = tuple(PATHS)
    """Paths to measure, by name."""
    train: int = 3000
    """Steps of training for "learnt"."""
    samples: int = 5000
    """Drawn for "learnt"."""
    parts: tuple[str, ...] = ("noise", "flow", "learnt")
    """Parts to measure: noise, flow, learnt."""


def drawn(path, step, sbdm, n, begin, number, share):
    """The mean and the standard deviation of what a sampler with noise draws of a Gaussian, exactly."""
    sigma = sampling.sigma_sbdm(path) if sbdm else lambda t: number + share * path.beta(t)
    velocity = marginals.velocity(path, marginals.GaussianMixture(jnp.ones(1), jnp.full((1, 1), MEAN), jnp.full(1, SCALE)))
    draws = 2 * n
    mean, variance = path.alpha(begin) * MEAN, (path.alpha(begin) * SCALE) ** 2 + path.beta(begin) ** 2
    # The first sample has no noise, the second another start, and every other one draw of 1.
    x_0 = jnp.full((draws + 2, 1), mean).at[1].add(1)

    def unit(key, shape, dtype):
        return jax.nn.one_hot(key + 2, draws + 2, dtype=dtype)[:, None]

    numbered = {"fold_in": lambda key, index: 2 * index, "split": lambda key, num: key + jnp.arange(num)}
    last = sampling.euler_maruyama_noiseless if step is sampling.stochastic_heun else None
    with (
        mock.patch.object(steps, "noise", unit),
        mock.patch.object(stochastic, "noise", unit),
        mock.patch.multiple(jax.random, **numbered),
    ):
        grid = times.uniform_grid(n, start=begin)
        x = sampling.sample_diffusion(path, velocity, sigma, jax.random.key(0), x_0, grid, step=step, last=last)[0][:, 0]
    return x[0], jnp.sqrt((x[1] - x[0]) ** 2 * variance + ((x[2:] - x[0]) ** 2).sum())


def noise(config):
    """The errors of every step with noise."""
    for name in config.paths:
        path = PATHS[name]
        for step, takes in NOISY.items():
            find = jax.jit(functools.partial(drawn, path, takes), static_argnums=(0, 1, 2))
            for sigma, numbers in SIGMAS.items():
                infinite = sigma == "reverse SDE" and name != "variance preserving" and step in ("euler_maruyama", "stochastic_heun")
                begin = 0.01 if infinite and name != "variance exploding" else 1e-3 if name in RESTING else 0.0
                with jax.enable_x64(True):
                    found = [find(numbers is None, n, begin, *(numbers or (0.0, 0.0))) for n in config.steps]
                errors = [float(np.hypot(float(mean) - MEAN, float(std) - SCALE)) for mean, std in found]
                yield summary("noise", name, step, config.steps, errors, sigma=sigma, begin=begin)


def flow(config):
    """The errors of every step of a flow in float32."""
    weights, means = [0.2, 0.5, 0.3], [[2.0, 0.5], [-1.5, 1.0], [0.3, -1.8]]
    for name in config.paths:
        path = PATHS[name]
        begin, end = 1e-3 if name in RESTING else 0.0, 0.999 if name in INFINITE else 1.0
        x_0 = np.asarray(path.beta(jnp.float32(begin)) * sampling.noise(jax.random.key(0), (config.points, 2)))

        def data():
            return marginals.GaussianMixture(jnp.array(weights), jnp.array(means), jnp.array([0.5, 0.7, 0.4]))

        with jax.enable_x64(True):
            field = marginals.velocity(path, data())
            grid = jnp.linspace(begin, end, 8001)
            exact = jax.jit(lambda x, field=field, grid=grid: sampling.sample_ode(field, x, grid, step=sampling.rk4)[0])
            exact = np.asarray(exact(x_0.astype(np.float64)))
        field = marginals.velocity(path, data())
        for step, make in FLOWS.items():
            solver = make(path)
            follow = jax.jit(lambda x, grid, field=field, step=solver: sampling.sample_ode(field, x, grid, step=step)[0])
            ends = [follow(x_0, times.uniform_grid(n, start=begin, end=end)) for n in config.fine]
            errors = [float(np.abs(np.asarray(x) - exact).mean()) for x in ends]
            yield summary("flow", name, step, config.fine, errors, begin=begin)


def learnt(config):
    """What noise does where the velocity is learnt, on a path that is straight and on one that comes to rest at data."""
    data, fresh = (toy.moons(jax.random.key(seed), config.samples) for seed in (0, 1))
    optimizer, model = optax.adam(1e-3), mlp.MLP(hidden_size=128, depth=3)
    for name in (each for each in ("linear", "flat ends") if each in config.paths):
        path, begin = PATHS[name], 1e-3 if name in RESTING else 0.0

        def loss_fn(params, key, x_1, path=path):
            key_0, key_t = jax.random.split(key)
            x_0, t = sampling.noise(key_0, x_1.shape), times.uniform(key_t, len(x_1))
            return losses.flow_matching(functools.partial(model.apply, params), path, x_0, x_1, t).mean()

        state = training.init(model.init(jax.random.key(2), data[:1], 0.5), optimizer)
        take = jax.jit(training.make_step(loss_fn, optimizer))
        for step in range(config.train):
            key_batch, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(3), step))
            state, _ = take(state, key_loss, jax.random.choice(key_batch, data, (512,)))

        x_0 = sampling.noise(jax.random.key(4), data.shape)
        velocity = functools.partial(model.apply, state.ema)
        whole, short = times.uniform_grid(100, start=begin), times.uniform_grid(100, start=begin, end=0.99)
        ways: list[tuple] = [
            (each, takes, whole, sampling.euler_maruyama_noiseless if each == "stochastic_heun" else None) for each, takes in NOISY.items()
        ]
        ways.append(("euler_maruyama to .99, tweedie", sampling.euler_maruyama, short, sampling.tweedie))
        yield {"kind": "learnt", "path": name, "step": "data", "energy_distance": distance(data, fresh)}
        for sigma in ("0", "2 beta", "1", "2"):
            number, share = SIGMAS[sigma]
            for each, takes, grid, last in ways:
                follow = functools.partial(
                    sampling.sample_diffusion, path, velocity, lambda t, n=number, s=share, p=path: n + s * p.beta(t), step=takes, last=last
                )
                x = jax.jit(lambda key, x, follow=follow, grid=grid: follow(key, x, grid)[0])(jax.random.key(5), x_0)
                yield {"kind": "learnt", "path": name, "step": each, "sigma": sigma, "energy_distance": distance(x, fresh)}


def distance(x, y):
    """None where the samples are lost."""
    return float(f"{float(metrics.energy_distance(x, y)):.3g}") if np.abs(x).max() < 1e9 else None


def summary(kind, path, step, steps, errors, **more):
    """One row."""
    noisy = kind == "noise" and min(errors[-2:]) > 0
    order = float(np.log(errors[-2] / errors[-1]) / np.log(steps[-1] / steps[-2])) if noisy else None
    return {
        "kind": kind,
        "path": path,
        "step": step,
        **more,
        "steps": list(steps),
        "errors": [float(f"{error:.3g}") for error in errors],
        **({"order": round(order, 2) if order is not None else None} if kind == "noise" else {}),
    }


def curves(rows):
    """What `benchmarks.solvers.draw` takes: a panel for each path, and for each sigma where there are any."""
    panels = [(f"sigma {row['sigma']}" if "sigma" in row else "mean error", row["path"], row["step"]) for row in rows]
    return [(*panel, row["steps"], row["errors"]) for panel, row in zip(panels, rows, strict=True)]


def main(config: Config):
    harness.start()
    # Here it is shown what the warning says.
    warnings.filterwarnings("ignore", "At t = .* one step of the drift multiplies")
    rows, about = {}, harness.describe()
    for part in (noise, flow, learnt):
        if part.__name__ in config.parts:
            rows[part.__name__] = list(part(config))
            print(*map(json.dumps, rows[part.__name__]), sep="\n", flush=True)
    if config.out:
        lines = ",\n".join(json.dumps(row) for part in rows.values() for row in part)
        config.out.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')
        for part in rows.keys() - {"learnt"}:
            draw(config.out.with_name(f"{config.out.stem}_{part}.png"), curves(rows[part]), "steps")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.orders"))
