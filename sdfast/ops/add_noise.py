"""add_noise: the forward process at one stroke, and what the model is to predict.

    x_t = α x₀ + σ ε,   α = √ᾱ_t, σ = √(1 - ᾱ_t)                       eq. 15
    target = ε          "epsilon"                                       eq. 21
           = α ε - σ x₀ "v_prediction"                                  Salimans & Ho 2022, appendix D
           = x₀         "sample"

α and σ differ from sample to sample in training. The arithmetic is fp32 whatever the dtype (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops._checks import NO_KERNEL_YET, check_tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def add_noise_torch(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, *, velocity: bool = False
) -> list[Tensor]:
    """[x_t], or with `velocity` [x_t, v]. The other targets are inputs and need no arithmetic."""
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    per_sample = (-1,) + (1,) * (x0.dim() - 1)  # (N, 1, ..., 1)
    a, s = alpha.to(wide).view(per_sample), sigma.to(wide).view(per_sample)
    x, e = x0.to(wide), noise.to(wide)
    results = [a * x + s * e]
    if velocity:
        results.append(a * e - s * x)
    return [result.to(x0.dtype) for result in results]


# The composite widens by itself, so it is the reference as well.
add_noise_reference = add_noise_torch

_library.define(
    "add_noise(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma, *, bool velocity=False) -> Tensor[]",
    add_noise_torch,
)


def add_noise(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction: str = "epsilon",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise clean samples to the levels of `alpha` and `sigma`; return them with the training target.

    Args:
        x0: (N, ...), fp32, bf16, fp16 or fp64, any strides.
        noise: ε, the same shape and dtype.
        alpha: √ᾱ_t of each sample, (N,), fp32 or fp64, on the device of `x0`.
        sigma: √(1 - ᾱ_t) of each sample, (N,), the dtype of `alpha`.
        prediction: "epsilon", "v_prediction" or "sample".
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        x_t and the target, (N, ...) in the dtype of `x0`. The target of "epsilon" is `noise` itself and
        that of "sample" is `x0` itself, not copies.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x0", x0)
    if x0.dim() == 0:
        raise ValueError("x0: got a scalar, expected shape (N, ...)")
    check_tensor("noise", noise, shape=tuple(x0.shape), like=x0)
    check_tensor("alpha", alpha, shape=(x0.shape[0],))
    if alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"alpha: got dtype {alpha.dtype}, expected float32 or float64: half precision is too coarse"
        )
    if alpha.device != x0.device:
        raise ValueError(f"alpha: is on {alpha.device}, expected {x0.device} as the input")
    check_tensor("sigma", sigma, shape=(x0.shape[0],), like=alpha)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: got {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    # One implementation so far; the call still refuses a backend that cannot run.
    dispatch.choose("add_noise", x0.device.type, NO_KERNEL_YET, backend)
    results = add_noise_torch(x0, noise, alpha, sigma, velocity=prediction == "v_prediction")
    if prediction == "v_prediction":
        return results[0], results[1]
    return results[0], noise if prediction == "epsilon" else x0
