"""Windows of a real time series: the temperature of the sea where El Niño shows, or the number of sunspots.

    python -m experiments.series                                 four years of monthly temperatures, in runs/series
    python -m experiments.series network:transformer             the same by a transformer
    python -m experiments.series data:sunspots                   32 years of the number of sunspots

Three minutes each on two CPU cores that other programs use too. Samples of temperatures differ from the held-out last quarter of
the series about as much as its training part does: by 0.33 and 0.34 °C in values, 0.02 and 0.01 in autocorrelation, 0.32 and 0.30
in log spectrum. They are not copies: 0.70 °C from the nearest training window, where training windows are 0.75 °C from each other.
The sunspots of the held-out quarter are more than before, so samples and training part both differ much from them. The folder of
the run then holds config.json, metrics.json, history.jsonl, tensorboard/, loss.png, series.png, statistics.png and checkpoints/; a
run that was killed goes on with the same command.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from scipy import signal, spatial, stats

from experiments import run_folder
from fmjax import losses, metrics, paths, sampling, times, training
from fmjax.models import dit, unet

matplotlib.use("agg")
import matplotlib.pyplot as plt

HELD_OUT, TRAINING, SAMPLES = "#222222", "#3b6fb6", "#e4632d"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclasses.dataclass(frozen=True)
class ElNino:
    """Surface temperature of the Pacific off Peru and Ecuador, monthly, 1950 to 2010."""

    window: int = 48
    """Months of a window."""
    max_lag: int = 24
    """Longest lag of the autocorrelation, in months."""


@dataclasses.dataclass(frozen=True)
class Sunspots:
    """Number of sunspots, the mean of each year, 1700 to 2008."""

    window: int = 32
    """Years of a window."""
    max_lag: int = 24
    """Longest lag of the autocorrelation, in years."""


@dataclasses.dataclass(frozen=True)
class UNet:
    """A U-Net of residual blocks along time, without attention."""

    base_channels: int = 16
    """Channels of the first level."""
    channel_mult: tuple[float, ...] = (1, 2, 2)
    """Channels of each level, as multiples of the first level's; each level halves the sequence."""
    blocks: int = 1
    """Residual blocks of each level."""
    groups: int = 8
    """Channel groups of the group normalisations."""
    dropout: float = 0.2
    """Share of each block's features that training drops."""


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A diffusion transformer along time."""

    patch_size: int = 2
    """Values of a patch."""
    hidden_size: int = 32
    """Features per patch."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads of each block."""
    dropout: float = 0.2
    """Share of each block's output that training drops."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a flow model on windows of a time series, draws samples from it, and measures them against the series' held-out end."""

    folder: Path = Path("runs/series")
    """Folder of the run."""
    data: ElNino | Sunspots = ElNino()
    """Series whose windows are learnt, less the mean of its training part and divided by that part's standard deviation."""
    held_out: float = 0.25
    """Share of the series, its end, that is held out of training; no window reaches across."""
    network: UNet | Transformer = UNet()
    """Network that learns the velocity."""
    path: paths.Linear | paths.Cosine = paths.Linear()
    """Path from noise to data."""
    steps: int = 1000
    """Training steps."""
    batch: int = 64
    """Windows per training step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam at first, before its cosine decay to zero."""
    ema_decay: float = 0.998
    """Decay, per training step, of the average of the parameters that is sampled."""
    log_every: int = 25
    """Training steps between two logs."""
    save_every: int = 250
    """Training steps between two checkpoints."""
    sampling_steps: int = 30
    """Steps of the sampler (UniPC of order 2), each one evaluation of the network."""
    results: Path | None = None
    """JSON file that gets this run's metrics, under the name of its folder, beside those of other runs."""
    seed: int = 0
    """Seed of all random numbers."""


FREE = ("save_every", "sampling_steps", "results")


@dataclasses.dataclass(frozen=True)
class Series:
    """A series of one value per unit of time, and how to write it."""

    values: np.ndarray
    dates: list[str]
    name: str
    unit: str
    """Unit of the values."""
    time: str
    """Unit of time."""
    per_year: int


def main(config: Config):
    check(config)
    series = load(config.data)
    parts = split(series.values, config.held_out)
    for what, part in zip(("training", "held-out"), parts, strict=True):
        if len(part) < config.data.window:
            raise SystemExit(
                f"--data.window is {config.data.window} and --held-out is {config.held_out}, but the {what} part has {len(part)} values: "
                "give a shorter window, or another share."
            )
    with run_folder.claim(config, free=FREE):
        run(config, series, *parts)


def check(config):
    """Stops, saying what to do, where flags do not go together."""
    for name in ("steps", "batch", "log_every", "save_every", "sampling_steps"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(config, name)}: give at least 1.")
    if not 0 < config.held_out < 1:
        raise SystemExit(f"--held-out is {config.held_out}: give a share of the series, between 0 and 1.")
    if not 1 <= config.data.max_lag < config.data.window:
        raise SystemExit(f"--data.max-lag is {config.data.max_lag}: give at least 1, and less than --data.window, {config.data.window}.")
    if isinstance(config.network, UNet):
        step, what = 2 ** (len(config.network.channel_mult) - 1), "the reduction by --network.channel-mult"
    else:
        step, what = config.network.patch_size, "--network.patch-size"
    if config.data.window % step:
        raise SystemExit(f"--data.window is {config.data.window}, which {what} of {step} does not divide: change one.")


def load(data):
    """The series, which statsmodels carries.

    Raises:
      ImportError: if statsmodels is not installed (`pip install fmjax[series]`).
    """
    try:
        from statsmodels.datasets import elnino, sunspots
    except ImportError as error:
        raise ImportError("experiments.series needs statsmodels: pip install 'fmjax[series]'") from error
    if isinstance(data, Sunspots):
        years, values = np.asarray(sunspots.load_pandas().data).T
        return Series(values, [f"{year:.0f}" for year in years], "activity", "sunspots", "years", 1)
    # A row is a year and its twelve months.
    table = np.asarray(elnino.load_pandas().data)
    dates = [f"{month} {year:.0f}" for year in table[:, 0] for month in MONTHS]
    return Series(table[:, 1:].ravel(), dates, "sea surface temperature", "°C", "months", 12)


def split(values, share):
    """The series up to its last so large a share, and that."""
    end = len(values) - round(share * len(values))
    return values[:end], values[end:]


def run(config, series, train_part, held_out_part):
    begin = time.perf_counter()
    key_init, key_train, key_sample, key_held_out = jax.random.split(jax.random.key(config.seed), 4)
    mean, std = train_part.mean(), train_part.std()
    train, held_out = (windows(part, config.data.window) for part in (train_part, held_out_part))
    pool = jnp.asarray((train - mean) / std, jnp.float32)[..., None]
    model = make_network(config.network)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

    def loss_fn(params, key, _):
        key_1, key_0, key_t, key_dropout = jax.random.split(key, 4)
        x_1 = jax.random.choice(key_1, pool, (config.batch,))
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, config.batch)

        def field(x, t):
            return model.apply(params, x, t, deterministic=False, rngs={"dropout": key_dropout})

        return losses.flow_matching(field, config.path, x_0, x_1, t).mean()

    @jax.jit
    def held_out_loss(params):
        """The loss on the windows held out, at the same noise and times each time."""
        x_1 = jnp.asarray((held_out - mean) / std, jnp.float32)[..., None]
        key_0, key_t = jax.random.split(key_held_out)
        x_0, t = sampling.noise(key_0, x_1.shape), times.stratified(key_t, len(x_1))
        return losses.flow_matching(lambda x, t: model.apply(params, x, t), config.path, x_0, x_1, t).mean()

    def evaluate(run, metrics):
        metrics["held-out loss per value"] = float(held_out_loss(run.state.ema))

    state = training.init(jax.jit(model.init)(key_init, pool[:1], 0.5), optimizer)
    report: dict[str, float] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    step = training.make_step(loss_fn, optimizer, ema_decay=config.ema_decay)
    # The windows are drawn in the loss.
    begun = training.Run(state, key_train)
    state, numbers = run_folder.train(config, step, begun, lambda step: None, "loss per value", callbacks=[evaluate])
    report |= numbers | {"held-out loss per value": float(held_out_loss(state.ema))}
    trained = time.perf_counter()

    @jax.jit
    def sample(params, x_0):
        field, grid = lambda x, t: model.apply(params, x, t), times.uniform_grid(config.sampling_steps)
        return sampling.sample_ode(field, x_0, grid, step=sampling.unipc(config.path, 2))[0]

    # As many as there are training windows, so that both are compared with what is held out at equal numbers.
    samples = mean + std * np.asarray(sample(state.ema, sampling.noise(key_sample, pool.shape)), np.float64)[..., 0]
    report |= measure(config, series, samples, train, held_out)
    draw_series(config.folder / "series.png", series, samples, held_out)
    draw_statistics(config.folder / "statistics.png", config, series, samples, train, held_out)
    report |= {"seconds to train": trained - begin, "seconds in all": time.perf_counter() - begin}
    if config.results is not None:
        run_folder.record(config.results, config, report)
    run_folder.report(config.folder, report)


def windows(values, length):
    """All windows of so many values, (N, length)."""
    return np.lib.stride_tricks.sliding_window_view(values, length)


def make_network(net) -> Any:
    if isinstance(net, UNet):
        options = {"attention_resolutions": (), "dropout": net.dropout, "groups": net.groups}
        return unet.UNet(net.base_channels, net.channel_mult, net.blocks, **options)
    return dit.DiT(net.patch_size, net.hidden_size, net.depth, net.num_heads, dropout=net.dropout)


def measure(config, series, samples, train, held_out):
    """How far samples are from the held-out windows, beside the training windows, and whether they are copies of these."""
    distances = {
        f"Wasserstein distance of values ({series.unit})": lambda x, y: stats.wasserstein_distance(x.ravel(), y.ravel()),
        "mean difference of autocorrelation": functools.partial(mean_difference, lambda x: autocorrelation(x, config.data.max_lag)),
        "mean difference of log spectrum": functools.partial(mean_difference, lambda x: np.log(spectrum(x, series.per_year)[1])),
    }
    report = {}
    for name, distance in distances.items():
        report |= {
            f"{name}, samples to held-out": distance(samples, held_out),
            f"{name}, training to held-out (the floor)": distance(train, held_out),
            f"{name}, samples to training": distance(samples, train),
        }
    # Training windows are neighbours of themselves and of those that they overlap, which do not count.
    apart = spatial.distance.cdist(train, train)
    start = np.arange(len(train))
    apart[np.abs(start[:, None] - start) < train.shape[1]] = np.inf
    nearest = {
        "samples": metrics.nearest_distance(samples, train),
        "held-out": metrics.nearest_distance(held_out, train),
        "training, without overlap": apart.min(0),
    }
    # Over the root of the number of values: the difference of one value, root mean square.
    root = train.shape[1] ** 0.5
    report |= {f"nearest training window ({series.unit}), median, {name}": np.median(each) / root for name, each in nearest.items()}
    return {name: float(value) for name, value in report.items()}


def mean_difference(statistic, x, y):
    return np.abs(statistic(x) - statistic(y)).mean()


def autocorrelation(x, max_lag):
    """The correlation of values 1 to max_lag apart, about the mean of all windows, (max_lag,)."""
    x = x - x.mean()
    return np.array([(x[:, :-lag] * x[:, lag:]).mean() for lag in range(1, max_lag + 1)]) / (x**2).mean()


def spectrum(x, per_year):
    """Frequencies above 0, per year, and the mean over windows of the power density there, by Hann's taper."""
    frequencies, power = signal.periodogram(x, per_year, window="hann", detrend="constant")
    return frequencies[1:], power.mean(0)[1:]


def draw_series(file, series, samples, held_out, columns=4):
    """Windows of the held-out end above as many samples, the first ones drawn, on the same axes."""
    starts = np.linspace(0, len(held_out) - 1, columns).round().astype(int)
    figure, grid = plt.subplots(2, columns, figsize=(3 * columns, 4.8), layout="constrained", sharex=True, sharey=True)
    for i, (above, below) in enumerate(grid.T):
        for axes, x, colour in ((above, held_out[starts[i]], HELD_OUT), (below, samples[i], SAMPLES)):
            axes.plot(x, color=colour, linewidth=1.4)
            axes.grid(alpha=0.3)
            axes.margins(x=0)
        last = len(series.dates) - len(held_out) + starts[i]
        above.set_title(f"held out, {series.dates[last - held_out.shape[1] + 1]} to {series.dates[last]}", fontsize=10)
        below.set_title(f"sample {i + 1}", fontsize=10, color=SAMPLES)
        below.set(xlabel=series.time, xticks=np.arange(0, held_out.shape[1] + 1, 12))
    figure.supylabel(f"{series.name} ({series.unit})", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_statistics(file, config, series, samples, train, held_out):
    """The density of values, the autocorrelation and the spectrum of samples, training and held-out windows."""
    figure, (values, lags, frequencies) = plt.subplots(1, 3, figsize=(12.6, 3.7), layout="constrained")
    edges = np.histogram_bin_edges(np.concatenate([series.values, samples.ravel()]), 20)
    for name, x, colour, style in (
        ("training windows", train, TRAINING, "-"),
        ("held-out windows", held_out, HELD_OUT, "--"),
        ("samples", samples, SAMPLES, "-"),
    ):
        values.stairs(np.histogram(x, edges, density=True)[0], edges, color=colour, linestyle=style, linewidth=1.5, label=name)
        correlation = np.append(1.0, autocorrelation(x, config.data.max_lag))
        lags.plot(correlation, style, color=colour, linewidth=1.5)
        frequencies.semilogy(*spectrum(x, series.per_year), style, color=colour, linewidth=1.5)
    values.set(title="values", xlabel=f"{series.name} ({series.unit})", ylabel="density")
    lags.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    lags.set(title="autocorrelation", xlabel=f"lag ({series.time})", xticks=np.arange(0, config.data.max_lag + 1, 6))
    frequencies.set(title="power spectrum", xlabel="cycles per year", ylabel=f"{series.unit}$^2$ per (cycle per year)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, prog="python -m experiments.series")))
