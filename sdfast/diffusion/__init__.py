"""The diffusion process: noise schedules, samplers, and the losses of training."""

from sdfast.diffusion.bound import Bound, variational_bound
from sdfast.diffusion.device_loop import sample_on_device
from sdfast.diffusion.elbo import Elbo, evidence_lower_bound, importance_weighted, log_likelihood, log_weights
from sdfast.diffusion.gaussian import (
    gaussian_kl,
    kl_full_to_standard_normal,
    kl_to_standard_normal,
    log_density,
    log_density_full,
    sample_full,
)
from sdfast.diffusion.losses import (
    VaeLoss,
    min_snr_weight,
    prior_term,
    reconstruction_term,
    simple_loss,
    transition_term,
    vae_loss,
    weighted_loss,
)
from sdfast.diffusion.plan import SamplingPlan, sample
from sdfast.diffusion.posterior import DiagonalPosterior, FullPosterior, Posterior, as_posterior
from sdfast.diffusion.repaint import RePaint
from sdfast.diffusion.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp_2m, euler, euler_ancestral
from sdfast.diffusion.schedule import NoiseSchedule
from sdfast.diffusion.scheduler_config import plan_from_config, sampler_name

__all__ = [
    "SAMPLERS",
    "Bound",
    "DiagonalPosterior",
    "Elbo",
    "FullPosterior",
    "NoiseSchedule",
    "RePaint",
    "Posterior",
    "SamplingPlan",
    "VaeLoss",
    "as_posterior",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler",
    "euler_ancestral",
    "evidence_lower_bound",
    "gaussian_kl",
    "importance_weighted",
    "kl_full_to_standard_normal",
    "kl_to_standard_normal",
    "log_density",
    "log_density_full",
    "log_likelihood",
    "log_weights",
    "min_snr_weight",
    "plan_from_config",
    "prior_term",
    "reconstruction_term",
    "sample",
    "sample_full",
    "sample_on_device",
    "sampler_name",
    "simple_loss",
    "transition_term",
    "vae_loss",
    "variational_bound",
    "weighted_loss",
]
