"""add_noise: the forward process at one stroke, and what the model is to predict.

    x_t = α x₀ + σ ε,   α = √ᾱ_t, σ = √(1 - ᾱ_t)                       eq. 15
    target = ε          "epsilon"                                       eq. 21
           = α ε - σ x₀ "v_prediction"                                  Salimans & Ho 2022, appendix D
           = x₀         "sample"

α and σ differ from sample to sample in training. The arithmetic is fp32 whatever the dtype (fp64 for fp64).

The kernels, one pass over memory, are csrc/add_noise_cpu.cpp, add_noise_cuda.cuh and add_noise_triton.py.
They have no gradient: training noises latents that are data, and where a gradient is asked for, torch serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_tensor

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


def _fake(x0: Tensor, *_: object) -> Tensor:
    return _native.empty_by_sample(x0)


def _velocity_fake(x0: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _native.empty_by_sample(x0), _native.empty_by_sample(x0)


_library.define_native("add_noise(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor", _fake)
_library.define_native(
    "add_noise_velocity(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> (Tensor, Tensor)",
    _velocity_fake,
)
_library.define_triton("add_noise", "sdfast.ops.add_noise_triton")
_library.define_triton("add_noise_velocity", "sdfast.ops.add_noise_triton")
_library.define_cuda("add_noise")
_library.define_cuda("add_noise_velocity")


def add_noise_cpu(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, *, velocity: bool = False
) -> list[Tensor]:
    """The compiled CPU kernels."""
    if velocity:
        return list(torch.ops.sdfast.add_noise_velocity(x0, noise, alpha, sigma))
    return [cast(Tensor, torch.ops.sdfast.add_noise(x0, noise, alpha, sigma))]


def add_noise_triton(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, *, velocity: bool = False
) -> list[Tensor]:
    """The Triton kernels."""
    if velocity:
        return list(torch.ops.sdfast.add_noise_velocity_triton(x0, noise, alpha, sigma))
    return [cast(Tensor, torch.ops.sdfast.add_noise_triton(x0, noise, alpha, sigma))]


def add_noise_cuda(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, *, velocity: bool = False
) -> list[Tensor]:
    """The compiled CUDA kernels."""
    if velocity:
        return list(torch.ops.sdfast.add_noise_velocity_cuda(x0, noise, alpha, sigma))
    return [cast(Tensor, torch.ops.sdfast.add_noise_cuda(x0, noise, alpha, sigma))]


_BACKENDS: dict[str, Callable[..., list[Tensor]]] = {
    "cpu": add_noise_cpu,
    "triton": add_noise_triton,
    "cuda": add_noise_cuda,
    "reference": add_noise_reference,
}


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
    device_type = x0.device.type
    unavailable = _native.unavailable(
        "add_noise", "x0", device_type, x0.dtype,
        needs_gradient=_native.requires_grad(x0, noise, alpha, sigma),
    )  # fmt: skip
    # The kernel goes sample by sample; one of a few values is not worth a round.
    order = ("torch",) if device_type == "cpu" and x0.numel() < 64 * len(x0) else None
    serve = dispatch.choose("add_noise", device_type, unavailable, backend, order=order)
    run = _BACKENDS.get(serve, add_noise_torch)
    results = run(x0, noise, alpha, sigma, velocity=prediction == "v_prediction")
    if prediction == "v_prediction":
        return results[0], results[1]
    return results[0], noise if prediction == "epsilon" else x0
