"""The same seeds through every solver at eight evaluations, and through every guidance at three scales.

    make demo                        trains the network, once
    python -m experiments.gallery    draws solvers.png and guidance.png in runs/gallery, in about two minutes on two CPU cores

Errors beside the solvers' names are to the same network's fine solution, mean |x - x*| per pixel; steps with noise have none, since
they end elsewhere.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

from experiments import run_folder
from fmjax import checkpoints, guidance, paths, plots, sampling, targets, times, training
from fmjax.data import digits
from fmjax.models import dit

PATH = paths.Linear()


@dataclasses.dataclass(frozen=True)
class Config:
    """Plots what solvers and guidance make of the digits that `make demo` learnt."""

    run: Path = Path("runs/digits")
    """Folder of the run of `make demo`; its path must be the linear one."""
    folder: Path = Path("runs/gallery")
    """Folder of the plots."""
    evaluations: int = 8
    """Evaluations of the network by each solver; with guidance each counts once."""
    scale: float = 2.0
    """Guidance scale of the plot of solvers."""
    scales: tuple[float, ...] = (1.5, 3.0, 6.0)
    """Guidance scales of the plot of guidance."""
    columns: int = 10
    """Images per row, one of each digit and round again."""
    seed: int = 0
    """Seed of the noise."""


def main(config: Config):
    with run_folder.claim(config, free=vars(config)):
        run_folder.report(config.folder, draw(config))


def draw(config):
    """Draws both plots; gives each solver's error."""
    field_y = network(config.run)
    key_0, key_noise = jax.random.split(jax.random.key(config.seed))
    x_0 = sampling.noise(key_0, (config.columns, 8, 8, 1))
    y = jnp.arange(config.columns) % digits.CLASSES
    guided = guidance.classifier_free(field_y, y, digits.CLASSES, config.scale)

    exact = follow(guided, sampling.rk4, 100)(x_0)
    images, errors = {"fine": exact}, {}
    for name, (step, each) in FLOWS.items():
        image = follow(guided, step, config.evaluations // each)(x_0)
        errors[name] = float(jnp.abs(image - exact).mean())
        images[f"{name} {errors[name]:.3f}"] = image
    sigma = sampling.sigma_beta(PATH)
    for name, (step, each) in NOISY.items():
        grid = times.uniform_grid(config.evaluations // each)
        run = functools.partial(sampling.sample_diffusion, PATH, guided, sigma, step=step)
        images[name] = jax.jit(lambda key, x_0, run=run, grid=grid: run(key, x_0, grid)[0])(key_noise, x_0)
    blocks = {f"{config.evaluations} evaluations": jnp.stack([*images.values()])}
    plots.samples(blocks, images, columns=config.columns, row_height=0.5).savefig(config.folder / "solvers.png")

    blocks = {
        f"scale {scale:g}": jnp.stack([follow(make(field_y, y, scale), sampling.midpoint, 25)(x_0) for make in GUIDANCE.values()])
        for scale in config.scales
    }
    plots.samples(blocks, GUIDANCE, columns=config.columns, row_height=0.65).savefig(config.folder / "guidance.png")
    return errors


def network(run):
    """(x, t, y) -> velocity, from a run of `experiments.images digits` on the linear path."""
    if not (run / "checkpoints").is_dir():
        raise SystemExit(f"There is no run in {run}: train one by `make demo`, or give --run the folder of one.")
    settings = json.loads((run / "config.json").read_text())
    patch_size, hidden_size, depth, num_heads = (settings["network"][name] for name in ("patch_size", "hidden_size", "depth", "num_heads"))
    model = dit.DiT(patch_size, hidden_size, depth, num_heads, digits.CLASSES)
    # The optimiser's state has its shape whatever the schedule.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.0)))

    def initial(key):
        return training.init(model.init(key, jnp.zeros((1, 8, 8, 1)), 0.5, jnp.zeros(1, int)), optimizer)

    params = checkpoints.restore(run / "checkpoints", jax.eval_shape(initial, jax.random.key(0))).ema
    return lambda x, t, y: model.apply(params, x, t, y)


def follow(field, step, steps):
    """The flow of a field in so many equal steps."""
    return jax.jit(lambda x_0: sampling.sample_ode(field, x_0, times.uniform_grid(steps), step=step)[0])


FLOWS = {
    "euler": (sampling.euler, 1),
    "heun": (sampling.heun, 2),
    "midpoint": (sampling.midpoint, 2),
    "rk4": (sampling.rk4, 4),
    "adams_bashforth 2": (sampling.adams_bashforth(2), 1),
    "adams_bashforth 3": (sampling.adams_bashforth(3), 1),
    "dpm_solver_pp 2": (sampling.dpm_solver_pp(PATH, 2), 1),
    "dpm_solver_pp 3": (sampling.dpm_solver_pp(PATH, 3), 1),
    "unipc 2": (sampling.unipc(PATH, 2), 1),
    "deis 2": (sampling.deis(PATH, 2), 1),
}
"""Solvers, and their evaluations per step."""
NOISY = {
    "euler_maruyama": (sampling.euler_maruyama, 1),
    "ancestral": (sampling.ancestral, 1),
    "sde_dpm_solver_pp": (sampling.sde_dpm_solver_pp, 1),
    "churn": (sampling.churn(), 2),
}
"""The same with noise in proportion to what is left of it."""


def plain(combine=guidance.extrapolate):
    """Classifier-free guidance of the velocity, its two values put together by `combine`."""
    return lambda field_y, y, scale: guidance.classifier_free(field_y, y, digits.CLASSES, scale, combine=combine)


def apg(field_y, y, scale):
    """APG, which is of predicted data."""

    def data(x, t, y):
        return targets.convert(PATH, field_y(x, t, y), x, t, source=targets.velocity, target=targets.data)

    field = guidance.classifier_free(data, y, digits.CLASSES, scale, combine=guidance.apg())
    return targets.convert_field(PATH, field, source=targets.data, target=targets.velocity)


def in_an_interval(field_y, y, scale):
    """Guidance in the middle of the path alone."""
    return guidance.interval(plain()(field_y, y, scale), lambda x, t: field_y(x, t, y), 0.2, 0.8)


def two_digits(field_y, y, scale):
    """Towards one digit and half as much towards the next, which makes something between."""
    return guidance.compose(field_y, [y, (y + 1) % digits.CLASSES], digits.CLASSES, [scale, scale / 2])


GUIDANCE = {
    "extrapolate": plain(),
    "cfg_zero_star": plain(guidance.cfg_zero_star),
    "cfg_rescale": plain(guidance.cfg_rescale()),
    "apg": apg,
    "interval": in_an_interval,
    "compose": two_digits,
}
"""Each (field_y, y, scale) -> field."""


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.gallery")))
