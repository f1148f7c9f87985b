"""diffusers' schedulers with their step as one pass over the latents, `ops.diffusion_step`.

A step of each is linear in the sample x, the model's output m, x̂₀, the x̂₀ before and noise z, so it is seven
coefficients (`ops/diffusion_step.py`), taken from the scheduler's own tables as it stands. The arithmetic is
fp32 with one rounding, as that of diffusers is at best. What is not linear (thresholding, churn, learned
variances) or of mixed dtypes runs the scheduler's own step.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdfast import ops
from sdfast.drop_in.layers import is_enabled

Generators = torch.Generator | list[torch.Generator] | None
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class _Linear(NamedTuple):
    """a x + b m."""

    x: float
    m: float


def _x0(prediction: str, alpha: float, sigma: float) -> _Linear:
    """x̂₀ at x = α x₀ + σ ε."""
    return {
        "epsilon": lambda: _Linear(1 / alpha, -sigma / alpha),
        "sample": lambda: _Linear(0.0, 1.0),
        "v_prediction": lambda: _Linear(alpha, -sigma),
    }[prediction]()


def _epsilon(prediction: str, alpha: float, sigma: float) -> _Linear:
    """ε̂ at x = α x₀ + σ ε."""
    return {
        "epsilon": lambda: _Linear(0.0, 1.0),
        "sample": lambda: _Linear(1 / sigma, -alpha / sigma),
        "v_prediction": lambda: _Linear(sigma, alpha),
    }[prediction]()


def _step(
    sample: Tensor, output: Tensor, x0: _Linear, k: tuple[float, ...], **operands: Any
) -> tuple[Tensor, Tensor]:
    """x' and x̂₀; `k` are the factors of x̂₀, x, m, the x̂₀ before and z."""
    coefficients = torch.tensor([*x0, *k], dtype=torch.float64)
    return ops.diffusion_step(sample, output, coefficients, **operands)


def _is_fused(scheduler: Any, sample: Tensor, output: Tensor) -> bool:
    config = scheduler.config
    return (
        is_enabled()
        and config.prediction_type in _PREDICTIONS
        and not getattr(config, "thresholding", False)
        and sample.dtype == output.dtype
        and sample.shape == output.shape
    )


def _clip(scheduler: Any) -> float | None:
    return scheduler.config.clip_sample_range if scheduler.config.clip_sample else None


def _ddim_step(
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
    twice = variance_noise is not None and generator is not None
    if self.num_inference_steps is None or twice or not _is_fused(self, sample, model_output):
        return type(self).step(
            self, model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise,
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
        epsilon = _epsilon(self.config.prediction_type, alpha, sigma)
        k = (math.sqrt(to), direction * epsilon.x, direction * epsilon.m)
    noise = None
    if eta > 0:
        noise = variance_noise
        if noise is None:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
    previous_sample, x0 = _step(
        sample, model_output, _x0(self.config.prediction_type, alpha, sigma), (*k, 0.0, std),
        noise=noise, clip=_clip(self),
    )  # fmt: skip
    if not return_dict:
        return previous_sample, x0
    return DDIMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def _ddpm_step(
    self: Any,
    model_output: Tensor,
    timestep: int,
    sample: Tensor,
    generator: Generators = None,
    return_dict: bool = True,
) -> Any:
    if self.variance_type not in ("fixed_small", "fixed_large") or not _is_fused(self, sample, model_output):
        return type(self).step(self, model_output, timestep, sample, generator, return_dict)
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
    x0_of = _x0(self.config.prediction_type, math.sqrt(cumprod), math.sqrt(1 - cumprod))
    previous_sample, x0 = _step(
        sample, model_output, x0_of, (*k, 0.0, math.sqrt(variance)), noise=noise, clip=_clip(self)
    )
    if not return_dict:
        return previous_sample, x0
    return DDPMSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def _euler_step(
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
    number = isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
    unscaled = not self.is_scale_input_called
    if number or unscaled or s_churn > 0 or not _is_fused(self, sample, model_output):
        return type(self).step(
            self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
        )
    if self.step_index is None:
        self._init_step_index(timestep)
    level, to = (float(self.sigmas[self.step_index + i]) for i in range(2))
    # In x = x₀ + s ε, which is √(1 + s²) times the sample of a v-prediction.
    x0_of = {
        "epsilon": _Linear(1.0, -level),
        "sample": _Linear(0.0, 1.0),
        "v_prediction": _Linear(1 / (level**2 + 1), -level / math.sqrt(level**2 + 1)),
    }[self.config.prediction_type]
    slope = (to - level) / level
    previous_sample, x0 = _step(sample, model_output, x0_of, (-slope, 1 + slope, 0.0, 0.0, 0.0))
    self._step_index += 1
    if not return_dict:
        return previous_sample, x0
    return EulerDiscreteSchedulerOutput(prev_sample=previous_sample, pred_original_sample=x0)


def _dpm_solver_step(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    config = self.config
    of_kind = config.algorithm_type == "dpmsolver++" and config.solver_order <= 2
    fixed = getattr(config, "variance_type", None) not in ("learned", "learned_range")
    started = self.num_inference_steps is not None
    if not (of_kind and fixed and started) or not _is_fused(self, sample, model_output):
        return type(self).step(self, model_output, timestep, sample, generator, variance_noise, return_dict)
    if self.step_index is None:
        self._init_step_index(timestep)
    index, last = self.step_index, len(self.timesteps) - 1
    lower_at_last = config.euler_at_final or (config.lower_order_final and last < 14)
    first_order = (
        config.solver_order == 1
        or self.lower_order_nums < 1
        or (index == last and (lower_at_last or config.final_sigmas_type == "zero"))
    )

    def level(i: int) -> tuple[float, float, float]:
        """α, σ and ln(α/σ)."""
        alpha, sigma = (float(v) for v in self._sigma_to_alpha_sigma_t(self.sigmas[i]))
        return alpha, sigma, math.log(alpha / sigma) if sigma > 0 else math.inf

    (alpha, sigma, log), (alpha_to, sigma_to, log_to) = level(index), level(index + 1)
    h = log_to - log
    factor = alpha_to * -math.expm1(-h)  # of the integral of x̂₀
    of_x0, of_before, before = factor, 0.0, None
    if not first_order:
        before = self.model_outputs[-1]
        r = (log - level(index - 1)[2]) / h
        second = factor / 2 if config.solver_type == "midpoint" else alpha_to * (math.expm1(-h) / h + 1.0)
        of_x0, of_before = factor + second / r, -second / r
    previous_sample, x0 = _step(
        sample, model_output, _x0(config.prediction_type, alpha, sigma),
        (of_x0, sigma_to / sigma, 0.0, of_before, 0.0), previous_x0=before,
    )  # fmt: skip
    self.model_outputs = [*self.model_outputs[1:], x0]
    self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
    self._step_index += 1
    return SchedulerOutput(prev_sample=previous_sample) if return_dict else (previous_sample,)


_STEPS: dict[type, Callable[..., Any]] = {
    DDIMScheduler: _ddim_step,
    DDPMScheduler: _ddpm_step,
    EulerDiscreteScheduler: _euler_step,
    DPMSolverMultistepScheduler: _dpm_solver_step,
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
