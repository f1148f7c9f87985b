"""Fused steps of the schedulers that look back: DPM-Solver++, PNDM, UniPC."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from sdfast.drop_in.step_formulas import (
    Generators,
    Linear,
    epsilon_formula,
    fused_step,
    is_fused,
    x0_formula,
)


class _Level(NamedTuple):
    """x = α x₀ + σ ε, and ln(α/σ)."""

    alpha: float
    sigma: float
    log: float


def _level(scheduler: Any, index: int) -> _Level:
    alpha, sigma = (float(v) for v in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index]))
    return _Level(alpha, sigma, math.log(alpha / sigma) if sigma > 0 else math.inf)


def dpm_solver_step(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """DPM-Solver++ of first order and 2M (Lu et al. 2022), as `DPMSolverMultistepScheduler.step`."""
    config = self.config
    of_kind = config.algorithm_type == "dpmsolver++" and config.solver_order <= 2
    fixed = getattr(config, "variance_type", None) not in ("learned", "learned_range")
    started = self.num_inference_steps is not None
    fuses = of_kind and fixed and started and is_fused(self, sample, model_output, *self.model_outputs)
    if not fuses:
        return self._own_step(model_output, timestep, sample, generator, variance_noise, return_dict)
    if self.step_index is None:
        self._init_step_index(timestep)
    index, last = self.step_index, len(self.timesteps) - 1
    lower_at_last = config.euler_at_final or (config.lower_order_final and last < 14)
    first_order = (
        config.solver_order == 1
        or self.lower_order_nums < 1
        or (index == last and (lower_at_last or config.final_sigmas_type == "zero"))
    )
    (alpha, sigma, log), (alpha_to, sigma_to, log_to) = _level(self, index), _level(self, index + 1)
    h = log_to - log
    factor = alpha_to * -math.expm1(-h)  # of the integral of x̂₀
    of_x0, of_before, before = factor, 0.0, None
    if not first_order:
        before = self.model_outputs[-1]
        r = (log - _level(self, index - 1).log) / h
        second = factor / 2 if config.solver_type == "midpoint" else alpha_to * (math.expm1(-h) / h + 1.0)
        of_x0, of_before = factor + second / r, -second / r
    previous_sample, x0 = fused_step(
        sample, model_output, x0_formula(config.prediction_type, alpha, sigma),
        (of_x0, sigma_to / sigma, 0.0, of_before, 0.0), previous_x0=before,
    )  # fmt: skip
    self.model_outputs = [*self.model_outputs[1:], x0]
    self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
    self._step_index += 1
    return SchedulerOutput(prev_sample=previous_sample) if return_dict else (previous_sample,)


# Weights of ε̂ and of those of the steps before, by how many there are (Liu et al. 2022, "Pseudo Numerical
# Methods for Diffusion Models on Manifolds", eq. 12 and its lower orders).
_ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
) -> Any:
    """The linear multistep part; the Runge-Kutta steps that may come first are the scheduler's own."""
    config = self.config
    multistep = config.skip_prk_steps or (self.counter >= len(self.prk_timesteps) and len(self.ets) >= 3)
    of_kind = multistep and config.prediction_type != "sample"
    again = self.counter == 1  # the first step once more, with the mean of ε̂ at both of its ends
    remembered = [*self.ets[-1:], self.cur_sample] if again else self.ets[-3:]
    started = self.num_inference_steps is not None
    if not (of_kind and started and is_fused(self, sample, model_output, *remembered)):
        return self._own_step(model_output, timestep, sample, return_dict)
    stride = config.num_train_timesteps // self.num_inference_steps
    previous = timestep - stride
    if again:
        previous, timestep = timestep, timestep + stride
        outputs, x = [model_output, self.ets[-1]], self.cur_sample
        weights: tuple[float, ...] = (0.5, 0.5)
    else:
        outputs, x = [model_output, *self.ets[:-4:-1]], sample
        weights = _ADAMS_BASHFORTH[len(outputs) - 1]
    cumprod = float(self.alphas_cumprod[timestep])
    to = float(self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod)
    # x' = √(to/cumprod) x - slope ε̂ (eq. 9), ε̂ of the mean of the outputs.
    slope = (to - cumprod) / (cumprod * math.sqrt(1 - to) + math.sqrt(cumprod * (1 - cumprod) * to))
    epsilon = epsilon_formula(config.prediction_type, math.sqrt(cumprod), math.sqrt(1 - cumprod))
    of_outputs = [-slope * epsilon.m * weight for weight in weights] + [0.0] * (3 - len(weights))
    third = outputs[2] if len(outputs) > 2 else None
    if len(outputs) > 3:  # a step takes three
        third = torch.add(outputs[2], outputs[3], alpha=weights[3] / weights[2])
    previous_sample, _ = fused_step(
        x, model_output, Linear(0.0, 0.0),
        (0.0, math.sqrt(to / cumprod) - slope * epsilon.x, *of_outputs[:3]),
        previous_x0=outputs[1] if len(outputs) > 1 else None, noise=third,
    )  # fmt: skip
    if again:
        self.cur_sample = None
    else:
        self.ets = outputs[::-1]
        if self.counter == 0:
            self.cur_sample = sample
    self.counter += 1
    return SchedulerOutput(prev_sample=previous_sample) if return_dict else (previous_sample,)


class _Interval(NamedTuple):
    """From one noise level to the next: what UniPC's predictor and corrector share.

    Attributes:
        of_x, of_x0: the factors of x and of x̂₀ at its start.
        of_differences: that of the weighted differences of other x̂₀ from this one.
        h: its length in ln(α/σ).
        phi, b: e^-h - 1, and B(h) of the solver's kind.
    """

    of_x: float
    of_x0: float
    of_differences: float
    h: float
    phi: float
    b: float


def _interval(scheduler: Any, start: int) -> _Interval:
    """From level `start` to the next; Zhao et al. 2023, "UniPC", eq. 3 with the data prediction of app. A."""
    (_, sigma, log), (alpha_to, sigma_to, log_to) = _level(scheduler, start), _level(scheduler, start + 1)
    h = log_to - log
    phi = math.expm1(-h)
    b = -h if scheduler.config.solver_type == "bh1" else phi
    return _Interval(sigma_to / sigma, -alpha_to * phi, -alpha_to * b, h, phi, b)


def _corrected(scheduler: Any, model_output: Tensor, sample: Tensor, x0_of: Linear) -> tuple[Tensor, Tensor]:
    """The sample that the last step should have ended in, now that x̂₀ is known there; and x̂₀."""
    index, before = scheduler.step_index, None
    interval = _interval(scheduler, index - 1)
    h, of_before, of_x0 = interval.h, 0.0, 0.5
    if scheduler.this_order == 2:
        before = scheduler.model_outputs[-2]
        r = (_level(scheduler, index - 2).log - _level(scheduler, index - 1).log) / h
        first = interval.phi / -h - 1
        moments = first / interval.b, 2 * (first / -h - 0.5) / interval.b
        weight = (moments[0] - moments[1]) / (1 - r)  # of the earlier difference over r
        of_before, of_x0 = weight / r, moments[0] - weight
    of_before, of_x0 = interval.of_differences * of_before, interval.of_differences * of_x0
    known, _ = fused_step(
        scheduler.last_sample, scheduler.model_outputs[-1], Linear(0.0, 0.0),
        (0.0, interval.of_x, interval.of_x0 - of_before - of_x0, of_before, 0.0), previous_x0=before,
    )  # fmt: skip
    return fused_step(sample, model_output, x0_of, (of_x0, 0.0, 0.0, 1.0, 0.0), previous_x0=known)


def unipc_step(
    self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
) -> Any:
    """Three passes, two of them of the corrector: each takes what a diffusion step can."""
    config = self.config
    of_kind = (
        self.predict_x0 and self.solver_p is None and config.solver_order <= 2 and config.lower_order_final
    )
    remembered = (self.last_sample, *self.model_outputs)
    started = self.num_inference_steps is not None
    if not (of_kind and started and is_fused(self, sample, model_output, *remembered)):
        return self._own_step(model_output, timestep, sample, return_dict)
    if self.step_index is None:
        self._init_step_index(timestep)
    index = self.step_index
    here, interval = _level(self, index), _interval(self, index)
    x0_of = x0_formula(config.prediction_type, here.alpha, here.sigma)
    if index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None:
        sample, model_output = _corrected(self, model_output, sample, x0_of)
        x0_of = Linear(0.0, 1.0)
    order = min(config.solver_order, len(self.timesteps) - index, self.lower_order_nums + 1)
    before, of_before = None, 0.0
    if order == 2:
        before = self.model_outputs[-1]
        of_before = interval.of_differences * 0.5 * interval.h / (_level(self, index - 1).log - here.log)
    previous_sample, x0 = fused_step(
        sample, model_output, x0_of, (interval.of_x0 - of_before, interval.of_x, 0.0, of_before, 0.0),
        previous_x0=before,
    )  # fmt: skip
    self.model_outputs = [*self.model_outputs[1:], x0]
    self.timestep_list = [*self.timestep_list[1:], timestep]
    self.last_sample, self.this_order = sample, order
    self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
    self._step_index += 1
    return SchedulerOutput(prev_sample=previous_sample) if return_dict else (previous_sample,)
