"""Couplings beside POT, and the paper's training beside torchcfm: run times as ratios, a JSON line each.

    make bench-couplings ARGS="--out results/couplings.jsonl"
    python -m benchmarks.couplings --only assignment

`assignment` is `couplings.optimal` of N(0, I) with eight Gaussians beside `ot.emd`; each row has the relative difference of the costs.
`training` is twenty steps of I-CFM and of OT-CFM on moons, of dense layers 3 x 64 with SELU, AdamW and batches of 512, beside torchcfm
and PyTorch, both on all cores.
"""

from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import linen as nn

from benchmarks import harness
from fmjax import bridges, couplings, losses, training
from fmjax.data import toy
from fmjax.models import mlp

SIZES, BATCH, STEPS, SIGMA = (512, 2048, 8192), 512, 20, 0.1


def assignment(config):
    import ot

    for n in SIZES:
        x, y = (np.asarray(draw(jax.random.key(config.seed + i), n)) for i, draw in enumerate((toy.gaussian, toy.eight_gaussians)))
        weights = np.full(n, 1 / n)

        def ours(x=x, y=y):
            return couplings.optimal(x, y)

        def theirs(x=x, y=y, weights=weights):
            return ot.emd(weights, weights, ot.dist(x.astype(np.float64), y.astype(np.float64)), numItermax=100_000_000)

        square: Any = ot.dist(x.astype(np.float64), y.astype(np.float64))
        cost, other = square[np.arange(n), ours()].mean(), (theirs() * square).sum()
        seconds = harness.interleaved(config, [lambda call=call: call for call in (ours, theirs)]).mean((0, 1))
        yield harness.row(
            f"coupling of {n} points, POT's time over ours",
            float(seconds[1] / seconds[0]),
            "ratio",
            least=1.0,
            packages=("POT",),
            cost=harness.short(abs(cost - other) / other, 2),
        )


def training_(config):
    import torch  # pyright: ignore[reportMissingImports]
    from torchcfm import (  # pyright: ignore[reportMissingImports]
        ConditionalFlowMatcher,
        ExactOptimalTransportConditionalFlowMatcher,
    )

    data = toy.moons(jax.random.key(config.seed), 10_000)
    model, optimizer = mlp.MLP(hidden_size=64, depth=3, activation=nn.selu), optax.adamw(1e-3, weight_decay=1e-5)
    bridge = bridges.Constant(SIGMA)
    for name, matcher in {"I-CFM": ConditionalFlowMatcher, "OT-CFM": ExactOptimalTransportConditionalFlowMatcher}.items():

        def loss_fn(params, key, x_1, name=name):
            key_0, key_t, key_z = jax.random.split(key, 3)
            x_0, t, z = jax.random.normal(key_0, x_1.shape), jax.random.uniform(key_t, x_1.shape[:1]), jax.random.normal(key_z, x_1.shape)
            x_1 = x_1[couplings.optimal(x_0, x_1)] if name == "OT-CFM" else x_1
            x_t, u_t = bridges.flow(bridge, x_0, x_1, z, t)
            return losses.regression(lambda x, t: model.apply(params, x, t), x_t, t, u_t).mean()

        step = training.make_step(loss_fn, optimizer)

        @jax.jit
        def twenty(state, key, step=step):
            def once(state, key):
                key_batch, key_loss = jax.random.split(key)
                return step(state, key_loss, data[jax.random.randint(key_batch, (BATCH,), 0, len(data))])[0], None

            return jax.lax.scan(once, state, jax.random.split(key, STEPS))[0]

        state = training.init(model.init(jax.random.key(1), data[:1], 0.5), optimizer)

        def ours(twenty=twenty, state=state):
            return jax.block_until_ready(twenty(state, jax.random.key(2)))

        torch.manual_seed(config.seed)
        layers = [torch.nn.Linear(3, 64), torch.nn.SELU(), torch.nn.Linear(64, 64), torch.nn.SELU(), torch.nn.Linear(64, 64)]
        network = torch.nn.Sequential(*layers, torch.nn.SELU(), torch.nn.Linear(64, 2))
        adamw = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-5)
        points, matched = torch.tensor(np.asarray(data)), matcher(sigma=SIGMA)

        def theirs(network=network, adamw=adamw, points=points, matched=matched):
            for _ in range(STEPS):
                adamw.zero_grad()
                x_1 = points[torch.randint(0, len(points), (BATCH,))]
                t, x_t, u_t = matched.sample_location_and_conditional_flow(torch.randn_like(x_1), x_1)
                loss = ((network(torch.cat([x_t, t[:, None]], dim=-1)) - u_t) ** 2).mean()
                loss.backward()
                adamw.step()

        seconds = harness.interleaved(config, [lambda call=call: call for call in (ours, theirs)]).mean((0, 1))
        yield harness.row(
            f"{STEPS} training steps of {name}, torchcfm's time over ours",
            float(seconds[1] / seconds[0]),
            "ratio",
            least=3.0,
            packages=("torch", "torchcfm"),
        )


training_.__name__ = "training"


def main(config: harness.Config):
    harness.start()
    return harness.report(config, harness.chosen(config, (assignment,), {training_: ("torch", "torchcfm")}))


if __name__ == "__main__":
    main(tyro.cli(harness.Config, prog="python -m benchmarks.couplings"))
