"""Sampling: one-step maps, and the one scan that follows them.

    dX = u_t(X) dt                                                flow model                      (1)
    dX = u_t(X) dt + sigma_t dW                                   diffusion model                 (2)
    dX = (u_t + sigma_t^2 / 2 grad log p_t)(X) dt + sigma_t dW    the marginals of (1), any sigma (3)
    dX = sigma_t^2 / 2 grad log p(X) dt + sigma_t dW              Langevin dynamics               (4)

Three samplers follow them: `sample_ode(field, ...)` follows (1); `sample_diffusion(path, velocity, sigma, ...)` follows (3), and
names the path, the velocity and sigma once, whatever the step; `sample_sde(drift, sigma, ...)` follows any other SDE.
Compile them: each call outside `jax.jit` compiles again, as in `jax.jit(lambda params, x_0: sample_ode(field(params), x_0, times)[0])`.
They check a grid whose values they know: one of `fmjax.times`, or one made outside `jax.jit`; not a `jnp.linspace` inside.
"""

from fmjax.sampling.scan import (
    Multistep,
    euler,
    euler_maruyama,
    heun,
    mean,
    midpoint,
    noise,
    ralston,
    reverse,
    rk4,
    sample_ode,
    sample_sde,
    stochastic_heun,
)
from fmjax.sampling.stochastic import (
    DiffusionStep,
    ancestral,
    churn,
    extend,
    langevin,
    predictor_corrector,
    sample_diffusion,
    sde_dpm_solver_pp,
    sde_drift,
    tweedie,
)

__all__ = [
    "DiffusionStep",
    "Multistep",
    "ancestral",
    "churn",
    "euler",
    "euler_maruyama",
    "extend",
    "heun",
    "langevin",
    "mean",
    "midpoint",
    "noise",
    "predictor_corrector",
    "ralston",
    "reverse",
    "rk4",
    "sample_diffusion",
    "sample_ode",
    "sample_sde",
    "sde_dpm_solver_pp",
    "sde_drift",
    "stochastic_heun",
    "tweedie",
]
