"""The diffusion process: noise schedules, samplers, and the losses of training."""

from sdfast.diffusion.device_loop import sample_on_device
from sdfast.diffusion.gaussian import (
    gaussian_kl,
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
from sdfast.diffusion.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp_2m, euler, euler_ancestral
from sdfast.diffusion.schedule import NoiseSchedule
from sdfast.diffusion.scheduler_config import plan_from_config, sampler_name

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "SamplingPlan",
    "VaeLoss",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler",
    "euler_ancestral",
    "gaussian_kl",
    "kl_to_standard_normal",
    "log_density",
    "log_density_full",
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
    "weighted_loss",
]
