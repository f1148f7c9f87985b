"""The samplers: functions from a noise schedule to a `SamplingPlan`, each equal to diffusers' scheduler.

Symbols: α = √ᾱ_t and σ = √(1 - ᾱ_t) are the coefficients of eq. 15; s = σ/α is the noise level of the Euler
and DPM-Solver papers (Karras et al. 2022). A prime marks the level that a step goes to. Arrays run over the
n steps.

Options that all samplers share:
    steps: n, from 1 to T.
    prediction: what the model outputs, "epsilon", "v_prediction" or "sample"; None for the schedule's own.
    spacing: which of the T steps to visit: "linspace", "leading" or "trailing" (Lin et al. 2023, table 2).
    steps_offset: added to the steps of "leading"; Stable Diffusion has 1.
    strength: in (0, 1]; image-to-image keeps only the last int(n * strength) steps.
All raise ValueError, naming the argument, before they compute anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfast.diffusion.plan import SamplingPlan
from sdfast.diffusion.schedule import VARIANCES, NoiseSchedule
from sdfast.diffusion.spacing import Array, check_arguments, noise_levels, spaced_steps


def ddpm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    variance: str = "fixed_large",
    prediction: str | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    strength: float = 1.0,
) -> SamplingPlan:
    """Ancestral sampling: Algorithm 2, eq. 22, over n of the T steps.

    x' = μ̃(x, x̂_0) + σ_t z with μ̃ of eq. 18: this is eq. 22 where the model predicts ε and nothing is clipped.
    No noise follows the last step, as Algorithm 2 has it (diffusers adds it unless that step is index 0).

    Args:
        variance: σ_t² = β_t, "fixed_large" (§3.2.2), or β̃_t, "fixed_small". diffusers' default is the latter.
        clip_sample, clip_sample_range: bound |x̂_0|; for pixels in [-1, 1].
    """
    prediction, first = check_arguments(schedule, steps, prediction, spacing, strength)
    if variance not in VARIANCES:
        raise ValueError(f"variance: got {variance!r}, expected one of {', '.join(VARIANCES)}")
    clip = _check_clip(clip_sample, clip_sample_range)
    t = spaced_steps(schedule.T, steps, spacing, steps_offset).round().astype(np.int64)
    alphas_cumprod = schedule.alphas_cumprod.cpu().numpy()[t]
    previous = np.append(alphas_cumprod[1:], 1.0)
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    # β of a step that skips others: what takes ᾱ' to ᾱ_t.
    beta = 1 - alphas_cumprod / previous
    posterior_variance = (1 - previous) / (1 - alphas_cumprod) * beta
    std = np.sqrt(beta if variance == "fixed_large" else posterior_variance)
    std[-1] = 0
    x0_x, x0_m = _x0_coefficients(prediction, alpha, sigma)
    table = _table(
        x0_x=x0_x,
        x0_m=x0_m,
        x0=np.sqrt(previous) * beta / (1 - alphas_cumprod),
        x=np.sqrt(1 - beta) * (1 - previous) / (1 - alphas_cumprod),
        noise=std,
    )
    return _plan(t, table, alpha, sigma, first=first, draws_noise=t > 0, clip=clip)


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    prediction: str | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    set_alpha_to_one: bool = True,
    strength: float = 1.0,
) -> SamplingPlan:
    """Song et al. 2021, eq. 12: x' = α' x̂_0 + √(1 - ᾱ' - σ_t²) ε̂ + σ_t z, with σ_t = η √β̃_t.

    Args:
        eta: η in [0, 1]; 0 is deterministic, 1 as noisy as DDPM with "fixed_small".
        clip_sample, clip_sample_range: bound |x̂_0|; for pixels in [-1, 1].
        set_alpha_to_one: ᾱ' of the last step is 1; False: that of index 0, as Stable Diffusion has it.
    """
    prediction, first = check_arguments(schedule, steps, prediction, spacing, strength)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
    clip = _check_clip(clip_sample, clip_sample_range)
    t = spaced_steps(schedule.T, steps, spacing, steps_offset).round().astype(np.int64)
    table_cumprod = schedule.alphas_cumprod.cpu().numpy()
    alphas_cumprod = table_cumprod[t]
    # As in diffusers a step reaches down T // n, even where the spacing's next step is not exactly there.
    t_previous = t - schedule.T // steps
    previous = np.where(
        t_previous >= 0, table_cumprod[t_previous], 1.0 if set_alpha_to_one else table_cumprod[0]
    )
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    variance = (1 - previous) / (1 - alphas_cumprod) * (1 - alphas_cumprod / previous)
    std = eta * np.sqrt(variance.clip(min=0))
    direction = np.sqrt((1 - previous - std**2).clip(min=0))
    x0_x, x0_m = _x0_coefficients(prediction, alpha, sigma)
    epsilon_x, epsilon_m = _epsilon_coefficients(prediction, alpha, sigma)
    table = _table(
        x0_x=x0_x,
        x0_m=x0_m,
        x0=np.sqrt(previous),
        x=direction * epsilon_x,
        m=direction * epsilon_m,
        noise=std,
    )
    return _plan(t, table, alpha, sigma, first=first, draws_noise=np.full(steps, eta > 0), clip=clip)


def euler(
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    karras_sigmas: bool = False,
    final_sigmas: str = "zero",
    strength: float = 1.0,
) -> SamplingPlan:
    """Karras et al. 2022, algorithm 2 without churn: x' = x + (s' - s)(x - x̂_0)/s, in x = x_0 + s ε.

    Args:
        karras_sigmas: levels spaced as in their eq. 5 (ρ = 7) between the first and the last of the spacing.
        final_sigmas: the last level: "zero", or "sigma_min", that of index 0.
    """
    prediction, first = check_arguments(schedule, steps, prediction, spacing, strength)
    t = _fractional_steps(schedule.T, steps, spacing, steps_offset)
    t, s = noise_levels(schedule, t, karras_sigmas, final_sigmas)
    ratio = s[1:] / s[:-1]
    table = _table(**_euler_x0(prediction, s[:-1]), x0=1 - ratio, x=ratio)
    return _euler_plan(t, s, table, spacing, first, draws_noise=False)


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    strength: float = 1.0,
) -> SamplingPlan:
    """Euler to a level below s', then noise back up to s': x' = x + (s_down - s)(x - x̂_0)/s + s_up z.

    s_up² = s'² (s² - s'²)/s² and s_down² = s'² - s_up²: the "Euler a" of k-diffusion.
    """
    prediction, first = check_arguments(schedule, steps, prediction, spacing, strength)
    t = _fractional_steps(schedule.T, steps, spacing, steps_offset)
    t, s = noise_levels(schedule, t, karras=False, final_sigmas="zero")
    up = s[1:] * np.sqrt(1 - (s[1:] / s[:-1]) ** 2)
    ratio = (s[1:] / s[:-1]) ** 2  # s_down / s, as s_down = s'² / s
    table = _table(**_euler_x0(prediction, s[:-1]), x0=1 - ratio, x=ratio, noise=up)
    return _euler_plan(t, s, table, spacing, first, draws_noise=True)


def dpm_solver_pp_2m(
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
    karras_sigmas: bool = False,
    final_sigmas: str = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    strength: float = 1.0,
) -> SamplingPlan:
    """DPM-Solver++(2M), midpoint: Lu et al. 2022, algorithm 2.

    x' = (σ'/σ) x + c D,  c = α' (1 - e^-h),  D = x̂_0 + (h / 2 h₋)(x̂_0 - x̂_0ᵖ),  h = ln(s/s'),
    where h₋ and x̂_0ᵖ are those of the step before. First order, D = x̂_0, is taken in the first step and,
    where the options below say so, in the last.

    Args:
        karras_sigmas: levels spaced as in Karras et al. 2022, eq. 5 (ρ = 7), over the whole schedule.
        final_sigmas: the last level: "zero" (the last step is then of first order), or "sigma_min".
        lower_order_final: take the last step in first order if n < 15.
        euler_at_final: take the last step in first order.
    """
    prediction, first = check_arguments(schedule, steps, prediction, spacing, strength)
    # The level after the last step is one of n + 1 that are spaced, and not visited.
    t = spaced_steps(schedule.T, steps, spacing, steps_offset, unvisited=1).round()
    t, s = noise_levels(schedule, t, karras_sigmas, final_sigmas, whole_range=True)
    t = t.round().astype(np.int64)
    alpha = 1 / np.sqrt(s**2 + 1)
    gain = alpha[1:] * (1 - s[1:] / s[:-1])
    half_slope = np.zeros(steps)  # h / 2 h₋
    with np.errstate(divide="ignore"):
        h = np.log(s[:-1]) - np.log(s[1:])
    half_slope[first + 1 :] = 0.5 * h[first + 1 :] / h[first:-1]
    if final_sigmas == "zero" or euler_at_final or (lower_order_final and steps < 15):
        half_slope[-1] = 0
    x0_x, x0_m = _x0_coefficients(prediction, alpha[:-1], (s * alpha)[:-1])
    table = _table(
        x0_x=x0_x,
        x0_m=x0_m,
        x0=gain * (1 + half_slope),
        x=(s * alpha)[1:] / (s * alpha)[:-1],
        previous_x0=-gain * half_slope,
    )
    no_noise = np.zeros(steps, dtype=bool)
    return _plan(t, table, alpha[:-1], (s * alpha)[:-1], first=first, draws_noise=no_noise)


SAMPLERS: dict[str, Callable[..., SamplingPlan]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_a": euler_ancestral,
    "dpm++2m": dpm_solver_pp_2m,
}


def _check_clip(clip_sample: bool, clip_sample_range: float) -> float | None:
    if not clip_sample_range > 0:
        raise ValueError(f"clip_sample_range: got {clip_sample_range}, expected a positive number")
    return float(clip_sample_range) if clip_sample else None


def _x0_coefficients(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """What x̂_0 takes of x = α x_0 + σ ε and of the model's output."""
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError(
                "prediction: at zero terminal SNR an 'epsilon' does not determine x_0; use a model of "
                "'v_prediction' or 'sample', or a spacing that does not visit the last step"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _epsilon_coefficients(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """What ε̂ takes of x = α x_0 + σ ε and of the model's output."""
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def _fractional_steps(T: int, steps: int, spacing: str, steps_offset: int) -> Array:
    """Steps that "linspace" leaves between integers, exact in fp32: so they are fed to the model."""
    return spaced_steps(T, steps, spacing, steps_offset).astype(np.float32).astype(np.float64)


def _euler_x0(prediction: str, s: Array) -> dict[str, Array]:
    """What x̂_0 takes of x = x_0 + s ε, which is 1/α times the x of eq. 15, and of the model's output."""
    alpha = 1 / np.sqrt(s**2 + 1)
    x0_x, x0_m = _x0_coefficients(prediction, alpha, s * alpha)
    return {"x0_x": alpha * x0_x, "x0_m": x0_m}


def _table(**columns: Array) -> Array:
    """(n, 7): the columns in the order of `sdfast.ops.diffusion_step`, zeros where none is given."""
    zeros = np.zeros_like(columns["x0_x"])
    names = ("x0_x", "x0_m", "x0", "x", "m", "previous_x0", "noise")
    return np.stack([columns.get(name, zeros) for name in names], axis=1)


def _euler_plan(
    t: Array, s: Array, table: Array, spacing: str, first: int, *, draws_noise: bool
) -> SamplingPlan:
    """A plan in x = x_0 + s ε; the model sees α x, which is the x of eq. 15."""
    s_max = s.max()
    # "leading" begins below the noisiest step: there diffusers allows for an x_0 of unit variance.
    initial_sigma = math.sqrt(s_max**2 + 1) if spacing == "leading" else s_max
    return _plan(
        t, table, np.ones_like(t), s[:-1], first=first, draws_noise=np.full(len(t), draws_noise),
        input_scale=1 / np.sqrt(s[:-1] ** 2 + 1), initial_sigma=initial_sigma,
    )  # fmt: skip


def _plan(
    t: NDArray[np.generic], table: Array, noise_alpha: Array, noise_sigma: Array, *, first: int,
    draws_noise: NDArray[np.bool_], input_scale: Array | None = None, initial_sigma: float = 1.0,
    clip: float | None = None,
) -> SamplingPlan:  # fmt: skip
    """The plan from step `first` on."""

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[first:]))

    scale = np.ones(len(t)) if input_scale is None else input_scale
    return SamplingPlan(
        tensor(t), tensor(scale), tensor(table), tensor(draws_noise), float(initial_sigma),
        tensor(noise_alpha), tensor(noise_sigma), clip,
    )  # fmt: skip
