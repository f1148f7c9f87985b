"""Which steps a sampler visits, and the noise level s = σ/α at each."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdfast.diffusion.schedule import NoiseSchedule, check_prediction

Array = NDArray[np.float64]

SPACINGS = ("linspace", "leading", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")


def check_arguments(
    schedule: NoiseSchedule, steps: int, prediction: str | None, spacing: str, strength: float
) -> tuple[str, int]:
    """The prediction, resolved, and the first step that `strength` keeps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.T:
        raise ValueError(
            f"steps: got {steps!r}, expected a whole number from 1 to the schedule's {schedule.T}"
        )
    prediction = schedule.prediction if prediction is None else prediction
    check_prediction(prediction)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: got {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, expected a number in (0, 1]")
    kept = min(int(steps * strength), steps)
    if kept == 0:
        raise ValueError(
            f"strength: {strength} of {steps} steps leaves none; take at least {math.ceil(1 / strength)} "
            f"steps or a strength of at least {1 / steps:g}"
        )
    return prediction, steps - kept


def spaced_steps(T: int, steps: int, spacing: str, steps_offset: int, unvisited: int = 0) -> Array:
    """The steps to visit, descending, (n,); not yet rounded for "linspace".

    "linspace" and "leading" divide the range among n + `unvisited` steps and drop the lowest.
    """
    n = steps + unvisited
    t: Array
    if spacing == "linspace":
        t = np.linspace(0, T - 1, n, dtype=np.float64)[::-1]
    elif spacing == "leading":
        t = (np.arange(n, dtype=np.float64) * (T // n))[::-1] + steps_offset
    else:
        t = np.arange(T, 0, -T / steps, dtype=np.float64).round() - 1
    t = t[:steps]
    if (
        t[0] >= T and 0 < steps_offset <= T // n
    ):  # an offset within a step's width is no mistake: too many steps
        most = next(m for m in range(n - 1, 0, -1) if (m - 1) * (T // m) + steps_offset < T) - unvisited
        raise ValueError(f"steps: got {steps}, this model's schedule allows {most} at most")
    if t[-1] < 0 or t[0] >= T:
        raise ValueError(
            f"steps_offset: {steps_offset} puts {steps} steps at {t[-1]:g} to {t[0]:g}, outside [0, {T}); "
            "take an offset of 0 or fewer steps"
        )
    if (np.diff(t.round()) >= 0).any():
        raise ValueError(
            f"steps: {steps} are too many for {spacing!r} spacing here; take at most {T - unvisited}"
        )
    return t


def noise_levels(
    schedule: NoiseSchedule, t: Array, karras: bool, final_sigmas: str, whole_range: bool = False
) -> tuple[Array, Array]:
    """The steps (n,), and s at each and after the last, (n + 1,)."""
    if final_sigmas not in FINAL_SIGMAS:
        raise ValueError(f"final_sigmas: got {final_sigmas!r}, expected one of {', '.join(FINAL_SIGMAS)}")
    alphas_cumprod = schedule.alphas_cumprod.cpu().numpy()
    # At zero terminal SNR s would be infinite; diffusers takes fp16's smallest number for ᾱ there.
    alphas_cumprod = np.where(alphas_cumprod == 0, 2.0**-24, alphas_cumprod)
    s_table = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    index = np.arange(schedule.T)
    s = np.interp(t, index, s_table)
    if karras:
        high, low = (s_table[-1], s_table[0]) if whole_range else (s[0], s[-1])
        rho = 7
        s = (high ** (1 / rho) + np.linspace(0, 1, len(t)) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        t = np.interp(np.log(s), np.log(s_table), index)
    return t, np.append(s, 0.0 if final_sigmas == "zero" else s_table[0])
