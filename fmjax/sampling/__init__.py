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

from fmjax.sampling.adaptive import AdaptiveSolution, sample_ode_adaptive
from fmjax.sampling.maps import reverse_map, sample_map, sample_map_renewed
from fmjax.sampling.multistep import adams_bashforth, deis, dpm_solver_pp, unipc
from fmjax.sampling.reparametrisation import ddim, edm_heun, log_snr, path_heun
from fmjax.sampling.scan import reverse, sample_ode, sample_sde
from fmjax.sampling.sigma import sigma_beta, sigma_decreasing, sigma_increasing_decreasing, sigma_sbdm, sigma_sqrt_beta
from fmjax.sampling.steps import (
    DiffusionStep,
    Multistep,
    euler,
    euler_maruyama,
    euler_maruyama_noiseless,
    heun,
    midpoint,
    noise,
    noise_like,
    ralston,
    rk4,
    stochastic_heun,
)
from fmjax.sampling.stochastic import (
    ancestral,
    churn,
    langevin,
    predictor_corrector,
    sample_diffusion,
    sde_dpm_solver_pp,
    sde_drift,
    sde_extension,
    tweedie,
)
from fmjax.sampling.variance import clip_data, learned_variance

__all__ = [
    "sample_ode",
    "sample_diffusion",
    "sample_sde",
    "sample_ode_adaptive",
    "AdaptiveSolution",
    "reverse",
    "sample_map",
    "sample_map_renewed",
    "reverse_map",
    "noise",
    "noise_like",
    "euler",
    "heun",
    "midpoint",
    "ralston",
    "rk4",
    "path_heun",
    "ddim",
    "edm_heun",
    "adams_bashforth",
    "dpm_solver_pp",
    "unipc",
    "deis",
    "log_snr",
    "Multistep",
    "ancestral",
    "sde_dpm_solver_pp",
    "churn",
    "predictor_corrector",
    "tweedie",
    "learned_variance",
    "clip_data",
    "euler_maruyama",
    "stochastic_heun",
    "euler_maruyama_noiseless",
    "DiffusionStep",
    "sigma_beta",
    "sigma_sbdm",
    "sigma_sqrt_beta",
    "sigma_decreasing",
    "sigma_increasing_decreasing",
    "sde_drift",
    "sde_extension",
    "langevin",
]
