"""reparameterize: a sample of the encoder's Gaussian that gradients pass through.

    z = μ + exp(½ logvar) ε,   ε ~ N(0, I)                              eq. 10 with a diagonal L

logvar is clamped to [-30, 20], as in latent diffusion (Rombach et al. 2022): an untrained encoder's outlier
neither overflows fp32 nor moves the weights. The arithmetic is fp32 whatever the dtype (fp64 for fp64).
The full covariance, z = μ + L ε, is `sdfast.diffusion.gaussian.sample_full`.

The kernels, one pass over memory each way, are csrc/reparameterize_cpu.cpp, csrc/reparameterize_cuda.cuh and
reparameterize_triton.py, for the gradients of mean and logvar; where that of the noise is asked for, torch
serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native, _twice
from sdfast.ops._checks import check_tensor

LOGVAR_RANGE = (-30.0, 20.0)


def reparameterize_torch(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The formula, in fp32 or fp64."""
    wide = torch.float64 if mean.dtype == torch.float64 else torch.float32
    std = torch.exp(0.5 * logvar.to(wide).clamp(*LOGVAR_RANGE))
    return (mean.to(wide) + std * noise.to(wide)).to(mean.dtype)


# The composite widens by itself, so it is the reference as well.
reparameterize_reference = reparameterize_torch


def _fake(mean: Tensor, *_: object) -> Tensor:
    return _native.empty_by_sample(mean)


def _backward_fake(dz: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return _native.empty_by_sample(logvar)


_library.define_native("reparameterize(Tensor mean, Tensor logvar, Tensor noise) -> Tensor", _fake)
_library.define_native(
    "reparameterize_backward(Tensor dz, Tensor logvar, Tensor noise) -> Tensor", _backward_fake
)


class _Operations(NamedTuple):
    """The kernels of one backend."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


_CPU = _Operations(torch.ops.sdfast.reparameterize.default, torch.ops.sdfast.reparameterize_backward.default)
_TRITON = _Operations(
    _library.define_triton("reparameterize", "sdfast.ops.reparameterize_triton"),
    _library.define_triton("reparameterize_backward", "sdfast.ops.reparameterize_triton"),
)
_CUDA = _Operations(_library.define_cuda("reparameterize"), _library.define_cuda("reparameterize_backward"))


def _gradients_by_torch(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    logvar, noise = ctx.saved_tensors

    def formula(logvar: Tensor) -> Tensor:
        return reparameterize_torch(torch.zeros_like(logvar), logvar, noise)  # of any mean

    return None, dz, *_twice.gradients(formula, (logvar,), ctx.needs_input_grad[2:3], dz), None


class _Reparameterize(torch.autograd.Function):
    """The native forward with the native backward: dmean is dz itself."""

    @staticmethod
    def forward(ctx: Any, ops: _Operations, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(logvar, noise)
        return ops.forward(mean, logvar, noise)

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        logvar, noise = ctx.saved_tensors
        dlogvar = None
        if ctx.needs_input_grad[2]:
            dlogvar = ctx.ops.backward(dz, logvar, noise)
        return None, dz, dlogvar, None


def _reparameterize(ops: _Operations, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """By kernels."""
    if _native.requires_grad(mean, logvar):
        return cast(Tensor, _Reparameterize.apply(ops, mean, logvar, noise))
    return ops.forward(mean, logvar, noise)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(_reparameterize, _CPU),
    "triton": functools.partial(_reparameterize, _TRITON),
    "cuda": functools.partial(_reparameterize, _CUDA),
    "reference": reparameterize_reference,
}


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor, *, backend: str | None = None) -> Tensor:
    """Draw z ~ N(mean, diag(exp(logvar))) from standard normal `noise`, differentiably.

    Args:
        mean: μ, any shape, fp32, bf16, fp16 or fp64, any strides.
        logvar: ln σ², the same shape and dtype.
        noise: ε, the same shape and dtype.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        z, the same shape and dtype.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("mean", mean)
    check_tensor("logvar", logvar, shape=tuple(mean.shape), like=mean)
    check_tensor("noise", noise, shape=tuple(mean.shape), like=mean)
    device_type = mean.device.type
    unavailable = _native.unavailable(
        "reparameterize", "mean", device_type, mean.dtype, needs_gradient=_native.requires_grad(noise)
    )
    serve = dispatch.choose("reparameterize", device_type, unavailable, backend)
    return _BACKENDS.get(serve, reparameterize_torch)(mean, logvar, noise)
