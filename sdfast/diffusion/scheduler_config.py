"""A plan from the `scheduler_config.json` of a diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from sdfast.diffusion.plan import SamplingPlan
from sdfast.diffusion.samplers import SAMPLERS
from sdfast.diffusion.schedule import NoiseSchedule

# PNDM, which Stable Diffusion 1.x names, is served by DDIM: the same steps of the same equation, where PNDM
# spends an extra model call and extrapolates over four outputs. Pictures of 50 steps are close, not equal.
_SAMPLER_OF_CLASS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpm++2m",
}

# Our option -> (name in the config, samplers that have it).
_OPTIONS = {
    "spacing": ("timestep_spacing", ("ddpm", "ddim", "euler", "euler_a", "dpm++2m")),
    "steps_offset": ("steps_offset", ("ddpm", "ddim", "euler", "euler_a", "dpm++2m")),
    "clip_sample": ("clip_sample", ("ddpm", "ddim")),
    "clip_sample_range": ("clip_sample_range", ("ddpm", "ddim")),
    "set_alpha_to_one": ("set_alpha_to_one", ("ddim",)),
    "karras_sigmas": ("use_karras_sigmas", ("euler", "dpm++2m")),
    "final_sigmas": ("final_sigmas_type", ("euler", "dpm++2m")),
    "lower_order_final": ("lower_order_final", ("dpm++2m",)),
    "euler_at_final": ("euler_at_final", ("dpm++2m",)),
}

# Setting -> (values that change nothing here, samplers whose result any other value would change).
_UNSUPPORTED = {
    "thresholding": ((False,), ("ddpm", "ddim", "dpm++2m")),
    "interpolation_type": (("linear",), ("euler",)),
    "timestep_type": (("discrete",), ("euler",)),
    "sigma_min": ((None,), ("euler",)),
    "sigma_max": ((None,), ("euler",)),
    "use_exponential_sigmas": ((False, None), ("euler", "dpm++2m")),
    "use_beta_sigmas": ((False, None), ("euler", "dpm++2m")),
    "use_lu_lambdas": ((False, None), ("dpm++2m",)),
    "use_flow_sigmas": ((False, None), ("dpm++2m",)),
    "solver_order": ((2,), ("dpm++2m",)),
    "solver_type": (("midpoint",), ("dpm++2m",)),
    "algorithm_type": (("dpmsolver++",), ("dpm++2m",)),
    "lambda_min_clipped": ((-float("inf"), None), ("dpm++2m",)),
    "variance_type": ((None, "fixed_small", "fixed_small_log", "fixed_large"), ("ddpm", "dpm++2m")),
}


def sampler_name(config: Mapping[str, Any], sampler: str | None = None) -> str:
    """The name in `SAMPLERS` of what serves this scheduler_config.json, or `sampler` where it is given.

    Raises:
        ValueError: an unknown class or sampler.
    """
    class_name = config.get("_class_name")
    if sampler is None:
        sampler = _SAMPLER_OF_CLASS.get(str(class_name))
        if sampler is None:
            raise ValueError(
                f"_class_name: got {class_name!r}, expected one of {', '.join(_SAMPLER_OF_CLASS)}; "
                f"or choose a sampler: {', '.join(SAMPLERS)}"
            )
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    return sampler


def plan_from_config(
    config: Mapping[str, Any], steps: int, *, sampler: str | None = None, strength: float = 1.0
) -> SamplingPlan:
    """Build the plan that a diffusers scheduler of this configuration follows.

    Args:
        config: the content of `scheduler_config.json`. `_class_name` chooses the sampler: DDPMScheduler,
            DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
            DPMSolverMultistepScheduler, or PNDMScheduler, which is served by "ddim" with a warning.
        steps: n.
        sampler: a name of `SAMPLERS` to take instead of the config's class, with the config's schedule and
            options, as `OtherScheduler.from_config(scheduler.config)` does. What the config leaves open has
            that scheduler's default, but clipping: a class that never clips stays unclipped.
        strength: in (0, 1]; image-to-image keeps only the last int(n * strength) steps.

    Raises:
        ValueError: an unknown class or sampler, a setting that no sampler here has, or a bad argument.
    """
    class_name = config.get("_class_name")
    if sampler is None and class_name == "PNDMScheduler":
        warnings.warn(
            "PNDMScheduler is served by 'ddim': close pictures, not equal ones; name a sampler to choose"
        )
    sampler = sampler_name(config, sampler)
    for setting, (neutral, concerned) in _UNSUPPORTED.items():
        if sampler in concerned and setting in config and config[setting] not in neutral:
            raise ValueError(
                f"{setting}: {config[setting]!r} is not supported by {sampler!r}; take another sampler"
            )
    options = {
        option: config[name]
        for option, (name, concerned) in _OPTIONS.items()
        if sampler in concerned and config.get(name) is not None
    }
    if sampler in ("ddpm", "ddim"):
        options.setdefault("clip_sample", class_name in ("DDPMScheduler", "DDIMScheduler"))
    if sampler == "ddim":
        options.setdefault("set_alpha_to_one", class_name != "PNDMScheduler")
    if sampler == "ddpm":
        large = config.get("variance_type") == "fixed_large"
        options["variance"] = "fixed_large" if large else "fixed_small"
    return SAMPLERS[sampler](NoiseSchedule.from_config(config), steps, strength=strength, **options)
