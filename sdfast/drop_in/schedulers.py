"""diffusers' schedulers with their step as one pass over the latents, `ops.diffusion_step`.

A step of each is linear in the sample x, the model's output m, x̂₀, the x̂₀ before and noise z, so it is seven
coefficients (`ops/diffusion_step.py`), taken from the scheduler's own tables as it stands. Those that look
back further take a pass more (PNDM from its fourth model output on) or two (UniPC). The arithmetic is
fp32 with one rounding, as that of diffusers is at best. What is not linear (thresholding, churn, learned
variances) or of mixed dtypes runs the scheduler's own step. x̂₀ is told in the dtype of the latents.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sdfast.drop_in.multistep_schedulers import dpm_solver_step, pndm_step, unipc_step
from sdfast.drop_in.single_step_schedulers import ddim_step, ddpm_step, euler_ancestral_step, euler_step

_STEPS: dict[type, Callable[..., Any]] = {
    DDIMScheduler: ddim_step,
    DDPMScheduler: ddpm_step,
    EulerDiscreteScheduler: euler_step,
    EulerAncestralDiscreteScheduler: euler_ancestral_step,
    DPMSolverMultistepScheduler: dpm_solver_step,
    PNDMScheduler: pndm_step,
    UniPCMultistepScheduler: unipc_step,
}
for _function in _STEPS.values():
    _function.__name__ = "step"  # a pickled scheduler finds its own class's step


def serves(scheduler: object) -> bool:
    """Whether its kind has a fused step."""
    return type(scheduler) in _STEPS


def is_replaced(scheduler: object) -> bool:
    """Whether its step is the fused one."""
    step = getattr(scheduler, "__dict__", {}).get("step")
    return isinstance(step, types.MethodType) and step.__func__ in _STEPS.values()


def replace(scheduler: Any) -> None:
    """Let an instance's `step` be the fused one."""
    scheduler.step = types.MethodType(_STEPS[type(scheduler)], scheduler)


def restore(scheduler: Any) -> None:
    """Let an instance's `step` be its class's again."""
    if is_replaced(scheduler):
        del scheduler.step
