"""diffusers' schedulers with their step as one pass over the latents, `ops.diffusion_step`.

A step of each is linear in the sample x, the model's output m, x̂₀, the x̂₀ before and noise z, so it is seven
coefficients (`ops/diffusion_step.py`), taken from the scheduler's own tables as it stands. Those that look
back further take a pass more (PNDM from its fourth model output on) or two (UniPC). The arithmetic is
fp32 with one rounding, as that of diffusers is at best. What is not linear (thresholding, churn, learned
variances) or of mixed dtypes runs the scheduler's own step. x̂₀ is told in the dtype of the latents.
"""

from __future__ import annotations

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


def _blank(kind: type) -> Any:
    """A scheduler of diffusers' class whose step is the fused one, as a copy or a pickle starts."""
    return object.__new__(_FUSED[kind])


def _fused_kind(kind: type, step: Callable[..., Any]) -> type:
    """Diffusers' class with another step. Name and module stay: pipelines and configs write them down."""

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _blank, (kind,), self.__dict__

    names = ("__module__", "__qualname__", "__doc__")
    kept = {name: getattr(kind, name) for name in names}
    step.__name__ = "step"  # by which a bound one is pickled
    own = {"step": step, "_own_step": kind.step, "__reduce__": __reduce__}  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {**kept, **own})


_FUSED = {kind: _fused_kind(kind, step) for kind, step in _STEPS.items()}


def serves(scheduler: object) -> bool:
    """Whether its kind has a fused step."""
    return type(scheduler) in _FUSED


def is_replaced(scheduler: object) -> bool:
    """Whether its step is the fused one."""
    return type(scheduler) in _FUSED.values()


def replace(scheduler: Any) -> None:
    """Let an instance's `step` be the fused one."""
    scheduler.__class__ = _FUSED[type(scheduler)]


def restore(scheduler: Any) -> None:
    """Let an instance's `step` be its class's again."""
    if is_replaced(scheduler):
        scheduler.__class__ = type(scheduler).__base__
