"""Training: a state, a step, the loop that takes it, and what is written of it.

    g = grad L(theta),   theta <- theta + U(g)                                                    (1)
    e <- d_n e + (1 - d_n) theta,  d_n = min(d, (1 + n) / (10 + n))                               (2)

with L the loss of a batch, U the optimiser's update, e the exponential moving average (EMA) after n steps and d its `ema_decay`.

A step is one pure function `(state, key, batch) -> (state, metrics)`: compile it with `jax.jit`, or run it on many devices with
`fmjax.parallel`. A `Run` is all that a training goes on from; `evaluate` is the mean of a metric over examples that are held out.
"""

from fmjax.training.ema import ema_exponent, post_hoc_ema, power_ema
from fmjax.training.evaluation import Mean, evaluate, loss_by_time, per_example, watch
from fmjax.training.logs import json_lines, tensorboard
from fmjax.training.loop import fit
from fmjax.training.run import PREEMPTED, Interrupted, NonFiniteLoss, Preempted, Run
from fmjax.training.state import TrainState, init, make_step

__all__ = [
    "fit",
    "make_step",
    "init",
    "TrainState",
    "Run",
    "evaluate",
    "per_example",
    "loss_by_time",
    "watch",
    "Mean",
    "json_lines",
    "tensorboard",
    "power_ema",
    "post_hoc_ema",
    "ema_exponent",
    "NonFiniteLoss",
    "Interrupted",
    "Preempted",
    "PREEMPTED",
]
