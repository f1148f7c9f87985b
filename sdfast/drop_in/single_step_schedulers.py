"""Fused steps of the schedulers that keep nothing from step to step: DDIM, DDPM, Euler, Euler ancestral."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdfast.drop_in.step_formulas import (
    Generators,
    Linear,
    clip_of,
    epsilon_formula,
    fused_step,
    is_fused,
    x0_formula,
)


def ddim_step(
    self: Any,
    model_output: Tensor,
    timestep: int,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """Song et al. 2021, "DDIM", eq. 12 and 16, as `DDIMScheduler.step`."""
    twice = variance_noise is not None and generator is not None
    if self.num_inference_steps is None or twice or not is_fused(self, sample, model_output):
        return self._own_step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise,
            return_dict,
        )  # fmt: skip
    previous = timestep - self.config.num_train_timesteps // self.num_inference_steps
    cumprod = float(self.alphas_cumprod[timestep])
    to = float(self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod)
    alpha, sigma = math.sqrt(cumprod), math.sqrt(1 - cumprod)
    std = eta * math.sqrt(max(0.0, (1 - to) / (1 - cumprod) * (1 - cumprod / to)))
    direction = math.sqrt(max(0.0, 1 - to - std**2))
    if use_clipped_model_output:  # ε̂ of the clipped x̂₀
        k = (math.sqrt(to) - direction * alpha / sigma, direction / sigma, 0.0)
    else:
        epsilon = epsilon_formula(self.config.prediction_type, alpha, sigma)
        k = (math.sqrt(to), direction * epsilon.x, direction * epsilon.m)
    noise = None
    if eta > 0:
        noise = variance_noise
        if noise is None:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
    previous_sample, x0 = fused_step(
        sample, model_output, x0_formula(self.config.prediction_type, alpha, sigma), (*k, 0.0, std),
        noise=noise, clip=clip_of(self),
    )  # fmt: skip
    if not return_dict:
        return previous_sample, x0
    return DDIMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def ddpm_step(
    self: Any,
    model_output: Tensor,
    timestep: int,
    sample: Tensor,
    generator: Generators = None,
    return_dict: bool = True,
) -> Any:
    """Ho et al. 2020, "DDPM", eq. 7, as `DDPMScheduler.step`."""
    if self.variance_type not in ("fixed_small", "fixed_large") or not is_fused(self, sample, model_output):
        return self._own_step(model_output, timestep, sample, generator, return_dict)
    previous = self.previous_timestep(timestep)
    cumprod = float(self.alphas_cumprod[timestep])
    to = float(self.alphas_cumprod[previous] if previous >= 0 else self.one)
    beta = 1 - cumprod / to
    variance = beta if self.variance_type == "fixed_large" else max((1 - to) / (1 - cumprod) * beta, 1e-20)
    noise = None
    if timestep > 0:
        noise = randn_tensor(
            model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
        )
    k = (math.sqrt(to) * beta / (1 - cumprod), math.sqrt(1 - beta) * (1 - to) / (1 - cumprod), 0.0)
    x0_of = x0_formula(self.config.prediction_type, math.sqrt(cumprod), math.sqrt(1 - cumprod))
    previous_sample, x0 = fused_step(
        sample, model_output, x0_of, (*k, 0.0, math.sqrt(variance)), noise=noise, clip=clip_of(self)
    )
    if not return_dict:
        return previous_sample, x0
    return DDPMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def _euler_x0(scheduler: Any, level: float) -> Linear:
    """In x = x₀ + s ε, which is √(1 + s²) times the sample of a v-prediction."""
    return {
        "epsilon": Linear(1.0, -level),
        "sample": Linear(0.0, 1.0),
        "v_prediction": Linear(1 / (level**2 + 1), -level / math.sqrt(level**2 + 1)),
    }[scheduler.config.prediction_type]


def euler_step(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
    return_dict: bool = True,
) -> Any:
    """Karras et al. 2022, algorithm 2 without its second order, as `EulerDiscreteScheduler.step`."""
    number = isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
    unscaled = not self.is_scale_input_called
    if number or unscaled or s_churn > 0 or not is_fused(self, sample, model_output):
        return self._own_step(
            model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
        )
    if self.step_index is None:
        self._init_step_index(timestep)
    level, to = (float(self.sigmas[self.step_index + i]) for i in range(2))
    slope = (to - level) / level
    previous_sample, x0 = fused_step(
        sample, model_output, _euler_x0(self, level), (-slope, 1 + slope, 0.0, 0.0, 0.0)
    )
    self._step_index += 1
    if not return_dict:
        return previous_sample, x0
    return EulerDiscreteSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def euler_ancestral_step(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    generator: Generators = None,
    return_dict: bool = True,
) -> Any:
    """A longer Euler step, and noise up to the level, as `EulerAncestralDiscreteScheduler.step`."""
    number = isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
    of_kind = self.is_scale_input_called and self.config.prediction_type != "sample"
    if number or not of_kind or not is_fused(self, sample, model_output):
        return self._own_step(model_output, timestep, sample, generator, return_dict)
    if self.step_index is None:
        self._init_step_index(timestep)
    level, to = (float(self.sigmas[self.step_index + i]) for i in range(2))
    up = to * math.sqrt(max(0.0, level**2 - to**2)) / level  # of fresh noise
    slope = (math.sqrt(max(0.0, to**2 - up**2)) - level) / level
    noise = randn_tensor(model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype)
    previous_sample, x0 = fused_step(
        sample, model_output, _euler_x0(self, level), (-slope, 1 + slope, 0.0, 0.0, up), noise=noise
    )
    self._step_index += 1
    if not return_dict:
        return previous_sample, x0
    return EulerAncestralDiscreteSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)
