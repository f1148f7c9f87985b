"""What the fused steps of diffusers' schedulers share: x̂₀ and ε̂ of a model's output, and when they serve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast import ops
from sdfast.drop_in.layers import is_enabled

Generators = torch.Generator | list[torch.Generator] | None
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Linear(NamedTuple):
    """a x + b m."""

    x: float
    m: float


def x0_formula(prediction: str, alpha: float, sigma: float) -> Linear:
    """x̂₀ at x = α x₀ + σ ε."""
    return {
        "epsilon": lambda: Linear(1 / alpha, -sigma / alpha),
        "sample": lambda: Linear(0.0, 1.0),
        "v_prediction": lambda: Linear(alpha, -sigma),
    }[prediction]()


def epsilon_formula(prediction: str, alpha: float, sigma: float) -> Linear:
    """ε̂ at x = α x₀ + σ ε."""
    return {
        "epsilon": lambda: Linear(0.0, 1.0),
        "sample": lambda: Linear(1 / sigma, -alpha / sigma),
        "v_prediction": lambda: Linear(sigma, alpha),
    }[prediction]()


def fused_step(
    sample: Tensor, output: Tensor, x0: Linear, k: tuple[float, ...], **operands: Any
) -> tuple[Tensor, Tensor]:
    """x' and x̂₀; `k` are the factors of x̂₀, x, m, the x̂₀ before and z."""
    coefficients = torch.tensor([*x0, *k], dtype=torch.float64)
    return ops.diffusion_step(sample, output, coefficients, **operands)


def is_fused(scheduler: Any, sample: Tensor, output: Tensor, *remembered: Tensor | None) -> bool:
    """Whether a step can be one of `fused_step`: its tensors, those of earlier steps too, are alike."""
    config = scheduler.config
    tensors = [t for t in (sample, *remembered) if t is not None]
    return (
        is_enabled()
        and config.prediction_type in _PREDICTIONS
        and not getattr(config, "thresholding", False)
        and all((t.dtype, t.shape, t.device) == (output.dtype, output.shape, output.device) for t in tensors)
    )


def clip_of(scheduler: Any) -> float | None:
    """The bound of |x̂₀|, or None where the scheduler does not clip."""
    return scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
