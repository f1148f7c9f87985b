"""reparameterize: a sample of the encoder's Gaussian that gradients pass through.

    z = μ + exp(½ logvar) ε,   ε ~ N(0, I)                              eq. 10 with a diagonal L

logvar is clamped to [-30, 20], as in latent diffusion (Rombach et al. 2022): an untrained encoder's outlier
neither overflows fp32 nor moves the weights. The arithmetic is fp32 whatever the dtype (fp64 for fp64).
The full covariance, z = μ + L ε, is `sdfast.diffusion.gaussian.sample_full`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops._checks import NO_KERNEL_YET, check_tensor

LOGVAR_RANGE = (-30.0, 20.0)


def reparameterize_torch(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The formula, in fp32 or fp64."""
    wide = torch.float64 if mean.dtype == torch.float64 else torch.float32
    std = torch.exp(0.5 * logvar.to(wide).clamp(*LOGVAR_RANGE))
    return (mean.to(wide) + std * noise.to(wide)).to(mean.dtype)


# The composite widens by itself, so it is the reference as well.
reparameterize_reference = reparameterize_torch

_library.define("reparameterize(Tensor mean, Tensor logvar, Tensor noise) -> Tensor", reparameterize_torch)


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
    # One implementation so far; the call still refuses a backend that cannot run.
    dispatch.choose("reparameterize", mean.device.type, NO_KERNEL_YET, backend)
    return reparameterize_torch(mean, logvar, noise)
