"""Training: a state, a step, the loop that takes it, and what is written of it.

    g = grad_theta mean loss(theta),   theta <- theta + optimizer(g)                              (1)
    ema <- d_n ema + (1 - d_n) theta,  d_n = min(ema_decay, (1 + n) / (10 + n))                   (2)

A step is one pure function `(state, key, batch) -> (state, metrics)`: compile it with `jax.jit`, or run it on many devices
with `fmjax.parallel`. A `Run` is all that a training goes on from; `evaluate` is the mean of a metric over examples that are held out.
"""

from fmjax.training.ema import ema_exponent, post_hoc_ema, power_ema
from fmjax.training.evaluation import Mean, evaluate, loss_by_time, per_example
from fmjax.training.logs import json_lines, tensorboard
from fmjax.training.loop import fit
from fmjax.training.run import PREEMPTED, Interrupted, NonFiniteLoss, Preempted, Run, check_position, check_run
from fmjax.training.state import TrainState, check_state, init, make_step

__all__ = [
    "PREEMPTED",
    "Interrupted",
    "Mean",
    "NonFiniteLoss",
    "Preempted",
    "Run",
    "TrainState",
    "check_position",
    "check_run",
    "check_state",
    "ema_exponent",
    "evaluate",
    "fit",
    "init",
    "json_lines",
    "loss_by_time",
    "make_step",
    "per_example",
    "post_hoc_ema",
    "power_ema",
    "tensorboard",
]
