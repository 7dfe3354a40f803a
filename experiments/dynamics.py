"""Three stochastic differential equations whose law is known: Brownian motion, Ornstein-Uhlenbeck and Langevin dynamics.

    python -m experiments.dynamics

Half a minute on two CPU cores, in runs/dynamics. The settings are those of the course's first lab. The variances of the first
two agree with theory within a few standard errors. Langevin dynamics have not converged at the lab's last time, t = 5:
the variance about the nearest mode is 0.92, not 0.56. At t = 100 it is 0.56, but the modes still hold 9% to 37% of the
points, not 20% each: points fall to a mode near their start and hardly ever cross to another.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

from experiments import run_folder
from fmjax import marginals, metrics, paths, plots, sampling, times

matplotlib.use("agg")
import matplotlib.pyplot as plt

PATHS, THEORY, POINTS = "#3b6fb6", "#222222", "#e4632d"


@dataclasses.dataclass(frozen=True)
class Config:
    """Follows three stochastic differential equations, and compares what they do with what is known."""

    folder: Path = Path("runs/dynamics")
    """Folder of the run."""
    samples: int = 2000
    """Number of trajectories of each equation; some are plotted."""
    brownian_sigma: float = 1.0
    """Diffusion coefficient of the Brownian motion, which starts at 0."""
    brownian_end: float = 5.0
    """Last time of the Brownian motion."""
    brownian_steps: int = 500
    """Euler-Maruyama steps of the Brownian motion."""
    ou_theta: float = 0.25
    """Rate at which the Ornstein-Uhlenbeck process returns to 0."""
    ou_sigmas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """Diffusion coefficients of the Ornstein-Uhlenbeck process, one run for each."""
    ou_spread: float = 5.0
    """Standard deviation of the Ornstein-Uhlenbeck process's normal start."""
    ou_end: float = 20.0
    """Last time of the Ornstein-Uhlenbeck process."""
    ou_steps: int = 1000
    """Euler-Maruyama steps of the Ornstein-Uhlenbeck process."""
    langevin_sigma: float = 0.6
    """Diffusion coefficient of the Langevin dynamics."""
    langevin_end: float = 5.0
    """Last time of the Langevin dynamics."""
    langevin_steps: int = 1000
    """Euler-Maruyama steps of the Langevin dynamics."""
    langevin_longer: int = 20
    """Length of a second run of the Langevin dynamics, as a multiple of the first, in steps of the same length."""
    langevin_spread: float = math.sqrt(20.0)
    """Standard deviation of the Langevin dynamics' normal start."""
    modes: int = 5
    """Number of normal modes, of equal weight, in the Langevin dynamics' stationary density."""
    mode_std: float = 0.75
    """Standard deviation of each mode."""
    mode_scale: float = 15.0
    """Side of the square in which the modes' means are drawn."""
    seed: int = 0
    """Seed of all random numbers."""


def main(config: Config):
    begin = time.perf_counter()
    with run_folder.claim(config, free=vars(config)):
        key_brownian, key_ou, key_langevin = jax.random.split(jax.random.key(config.seed), 3)
        report = brownian(config, key_brownian) | ornstein_uhlenbeck(config, key_ou) | langevin(config, key_langevin)
        report |= {"seconds in all": time.perf_counter() - begin}
        run_folder.report(config.folder, report, digits=5)


def brownian(config, key):
    """dX = sigma dW from 0, so that X_t ~ N(0, sigma^2 t)."""
    grid = times.uniform_grid(config.brownian_steps, 0.0, config.brownian_end)
    x_0 = jnp.zeros((config.samples, 1))
    states = follow(lambda x, t: jnp.zeros_like(x), config.brownian_sigma, key, x_0, grid)[..., 0]
    variance = config.brownian_sigma**2 * np.asarray(grid)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    draw_paths(left, grid, states, variance)
    left.set(title=f"Brownian motion, $\\sigma$ = {config.brownian_sigma:g}", xlabel="t", ylabel="$X_t$")
    left.legend(loc="upper left", frameon=False)
    right.plot(grid, states.var(1, ddof=1), color=PATHS, label=f"of {config.samples} trajectories")
    right.plot(grid, variance, "--", color=THEORY, label="$\\sigma^2 t$")
    right.set(title="variance", xlabel="t")
    right.legend(loc="upper left", frameon=False)
    save(config.folder / "brownian.png", figure)
    return compare(f"Brownian motion at t = {config.brownian_end:g}", states[-1], variance[-1])


def ornstein_uhlenbeck(config, key):
    """dX = -theta X dt + sigma dW from N(0, spread^2), so that X_t is normal with the variance below."""
    theta, grid = config.ou_theta, times.uniform_grid(config.ou_steps, 0.0, config.ou_end)
    key_0, *keys = jax.random.split(key, 1 + len(config.ou_sigmas))
    x_0 = config.ou_spread * sampling.noise(key_0, (config.samples, 1))
    report = {}

    figure, axes_grid = plt.subplots(
        2, len(config.ou_sigmas), figsize=(3.6 * len(config.ou_sigmas), 6.4), layout="constrained", squeeze=False
    )
    for above, below, key, sigma in zip(*axes_grid, keys, config.ou_sigmas, strict=True):
        states = follow(lambda x, t: -theta * x, sigma, key, x_0, grid)[..., 0]
        kept = np.exp(-2 * theta * np.asarray(grid))
        stationary = sigma**2 / (2 * theta)
        variance = config.ou_spread**2 * kept + stationary * (1 - kept)
        report |= compare(f"Ornstein-Uhlenbeck, sigma {sigma:g}, at t = {config.ou_end:g}", states[-1], variance[-1])
        draw_paths(above, grid, states, variance)
        above.set(title=f"$\\sigma$ = {sigma:g}", xlabel="t", ylim=(-3.2 * config.ou_spread, 3.2 * config.ou_spread))
        x = np.linspace(-4, 4, 200) * math.sqrt(variance[-1])
        below.hist(states[-1], bins=40, density=True, color=PATHS, alpha=0.5, label=f"{config.samples} trajectories")
        below.plot(x, normal(x, variance[-1]), color=THEORY, linewidth=1.3, label="density, theory")
        if stationary:
            below.plot(x, normal(x, stationary), "--", color=POINTS, linewidth=1.3, label="stationary, N(0, $\\sigma^2/2\\theta$)")
        below.set(xlabel=f"$X_t$ at t = {config.ou_end:g}", yticks=[])
    axes_grid[0, 0].set_ylabel("$X_t$")
    axes_grid[1, 0].set_ylabel("density")
    handles, labels = (a + b for a, b in zip(*(axes.get_legend_handles_labels() for axes in axes_grid[:, -1]), strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Ornstein-Uhlenbeck, $dX = -\\theta X\\,dt + \\sigma\\,dW$, $\\theta$ = {theta:g}, from N(0, {config.ou_spread:g}$^2$)"
    )
    save(config.folder / "ornstein_uhlenbeck.png", figure)
    return report


def langevin(config, key):
    """dX = sigma^2 / 2 grad log p(X) dt + sigma dW, which leaves p, a normal mixture, as it is."""
    key_means, key_0, key_sde, key_longer, key_exact, key_metric = jax.random.split(key, 6)
    means = config.mode_scale * (jax.random.uniform(key_means, (config.modes, 2)) - 0.5)
    mixture = marginals.GaussianMixture(jnp.full(config.modes, 1 / config.modes), means, jnp.asarray(config.mode_std))
    path = paths.Linear()
    score, log_density = marginals.score(path, mixture), marginals.log_density(path, mixture)
    drift = sampling.langevin(lambda x, t: score(x, 1.0), config.langevin_sigma)

    x_0 = config.langevin_spread * sampling.noise(key_0, (config.samples, 2))
    grid = times.uniform_grid(config.langevin_steps, 0.0, config.langevin_end)
    states = follow(drift, config.langevin_sigma, key_sde, x_0, grid)
    longer_end = config.langevin_longer * config.langevin_end
    longer_grid = times.uniform_grid((config.langevin_longer - 1) * config.langevin_steps, config.langevin_end, longer_end)
    longer = jax.jit(lambda key, x: sampling.sample_sde(drift, config.langevin_sigma, key, x, longer_grid)[0])(key_longer, states[-1])

    exact, again = (mixture.sample(key, config.samples) for key in jax.random.split(key_exact))
    report = {}
    for name, x in ((f"at t = {config.langevin_end:g}", states[-1]), (f"at t = {longer_end:g}", longer), ("exact", again)):
        share, variance, error = within(x, means)
        report |= {
            f"Langevin, {name}: variance within modes": variance,
            f"Langevin, {name}: its standard error": error,
            f"Langevin, {name}: smallest share of a mode": share.min(),
            f"Langevin, {name}: largest share of a mode": share.max(),
            f"Langevin, {name}: sliced Wasserstein to exact": float(metrics.sliced_wasserstein(key_metric, x, exact)),
        }
    report |= {"Langevin, theory: variance within modes": config.mode_std**2, "Langevin, theory: share of a mode": 1 / config.modes}

    frames = [0, len(grid) // 10, len(grid) // 2, len(grid) - 1]
    shown = [(f"t = {grid[i]:.1f}", states[i]) for i in frames] + [(f"t = {longer_end:g}", longer), ("exact samples", exact)]
    draw_langevin(config.folder / "langevin.png", shown, log_density, means, config)
    return report


def keep(x, t):
    return x


def follow(drift, sigma, key, x_0, grid):
    """All states of all trajectories, (times, samples, dimension)."""
    return np.asarray(jax.jit(lambda key, x_0: sampling.sample_sde(drift, sigma, key, x_0, grid, save=keep)[1])(key, x_0))


def compare(name, x, variance):
    """The variance measured and in theory, and the standard error of the first, as of normal samples."""
    error = variance * math.sqrt(2 / (len(x) - 1))
    return {f"{name}: variance": float(x.var(ddof=1)), f"{name}: in theory": float(variance), f"{name}: standard error": float(error)}


def within(x, means):
    """The share of points nearest to every mean, their variance about it per coordinate, and its standard error."""
    squares = ((np.asarray(x)[:, None] - np.asarray(means)) ** 2).mean(-1)
    nearest = squares.min(1)
    share = np.bincount(squares.argmin(1), minlength=len(means)) / len(nearest)
    return share, float(nearest.mean()), float(nearest.std(ddof=1) / math.sqrt(len(nearest)))


def save(file, figure):
    figure.savefig(file, dpi=120)
    plt.close(figure)


def normal(x, variance):
    return np.exp(-(x**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def draw_paths(axes, grid, states, variance, count=60):
    """Some trajectories, and the bands of one and of two standard deviations in theory."""
    axes.plot(grid, states[:, :count], color=PATHS, linewidth=0.5, alpha=0.4)
    for deviations, style in ((1, "-"), (2, "--")):
        bound = deviations * np.sqrt(variance)
        axes.plot(
            grid, bound, style, color=THEORY, linewidth=1.3, label=f"$\\pm${deviations} standard deviation{'s' * (deviations - 1)}, theory"
        )
        axes.plot(grid, -bound, style, color=THEORY, linewidth=1.3)
    axes.set(xlim=(0, grid[-1]))


def draw_langevin(file, shown, log_density, means, config, count=1000):
    """Samples at several times over the contours of the stationary density."""
    limit = 1.1 * max(config.mode_scale / 2 + 2 * config.mode_std, 2.3 * config.langevin_spread)
    figure, axes_grid = plt.subplots(2, 3, figsize=(10.5, 7.4), layout="constrained", sharex=True, sharey=True)
    for axes, (title, x) in zip(axes_grid.flat, shown, strict=True):
        plots.density(axes, log_density, 1.0, extent=limit)
        plots.points(axes, x[:count], color=POINTS)
        axes.set(title=title)
    figure.suptitle(f"Langevin dynamics, $\\sigma$ = {config.langevin_sigma:g}, over the density that it leaves as it is")
    save(file, figure)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.dynamics")))
