"""Gaussians in closed form: divergences, densities and samples (§2.3-2.4). All in fp32, or fp64 for fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdfast.ops._checks import check_tensor
from sdfast.ops.reparameterize import LOGVAR_RANGE


def gaussian_kl(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """D_KL(q || p) of two Gaussians with diagonal covariances.

        ½ Σ (ln σ_p² - ln σ_q² + (σ_q² + (μ_q - μ_p)²) / σ_p² - 1)

    Args:
        mean_q: (N, ...), floating.
        logvar_q, mean_p, logvar_p: tensors that broadcast to the shape of `mean_q`.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    check_tensor("mean_q", mean_q)
    q, lq, p, lp = (widen(x) for x in (mean_q, logvar_q, mean_p, logvar_p))
    return sum_per_sample(0.5 * (lp - lq + torch.exp(lq - lp) + (q - p) ** 2 * torch.exp(-lp) - 1))


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """D_KL(N(mean, diag(exp(logvar))) || N(0, I)) = -½ Σ (1 + logvar - μ² - exp(logvar)): eq. 9 for §2.5.

    logvar is clamped to [-30, 20] as in `sdfast.ops.reparameterize`, so that both speak of the same Gaussian.

    Args:
        mean, logvar: (N, ...), the same shape and dtype.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    check_tensor("mean", mean)
    check_tensor("logvar", logvar, shape=tuple(mean.shape), like=mean, casts=True)
    mu, lv = widen(mean), widen(logvar).clamp(*LOGVAR_RANGE)
    return sum_per_sample(-0.5 * (1 + lv - mu**2 - lv.exp()))


def kl_full_to_standard_normal(mean: Tensor, cholesky: Tensor) -> Tensor:
    """D_KL(N(mean, L Lᵀ) || N(0, I)) = ½ (‖L‖² + ‖μ‖² - n) - ln |det L|: eq. 9's term with a full covariance.

    ‖L‖² is the sum of all of its squares, the trace of L Lᵀ.

    Args:
        mean: μ, (N, D).
        cholesky: L, (N, D, D), lower triangular with a non-zero diagonal, the same dtype; what lies above the
            diagonal is not read.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    _check_full("mean", mean, cholesky)
    L = widen(cholesky).tril()
    trace = sum_per_sample(L**2)
    return 0.5 * (trace + sum_per_sample(widen(mean) ** 2) - mean.shape[1]) - _log_det(L)


def sample_full(mean: Tensor, cholesky: Tensor, noise: Tensor) -> Tensor:
    """z = μ + L ε: a sample of N(μ, L Lᵀ), eq. 10, differentiable.

    Args:
        mean: μ, (N, D).
        cholesky: L, (N, D, D), lower triangular, the same dtype; what lies above the diagonal is not read.
        noise: ε, (N, D), the same dtype.

    Returns:
        (N, D) in the dtype of `mean`.
    """
    _check_full("mean", mean, cholesky)
    check_tensor("noise", noise, shape=tuple(mean.shape), like=mean, casts=True)
    step = (widen(cholesky).tril() @ widen(noise).unsqueeze(-1)).squeeze(-1)
    return (widen(mean) + step).to(mean.dtype)


def log_density(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """ln q(z|x) = -½ ‖ε‖² - ½ Σ logvar - n/2 ln 2π with ε = (z - μ) / σ: §2.4 with a diagonal L.

    Args:
        z, mean, logvar: (N, ...), the same shape and dtype. logvar is clamped as in `kl_to_standard_normal`.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    check_tensor("z", z)
    check_tensor("mean", mean, shape=tuple(z.shape), like=z)
    check_tensor("logvar", logvar, shape=tuple(z.shape), like=z)
    lv = widen(logvar).clamp(*LOGVAR_RANGE)
    epsilon = (widen(z) - widen(mean)) * torch.exp(-0.5 * lv)
    return sum_per_sample(-0.5 * (epsilon**2 + lv + math.log(2 * math.pi)))


def log_density_full(z: Tensor, mean: Tensor, cholesky: Tensor) -> Tensor:
    """ln q(z|x) = -½ ‖ε‖² - ln |det L| - n/2 ln 2π with ε = L⁻¹ (z - μ): §2.4.

    Args:
        z, mean: (N, D), the same dtype.
        cholesky: L, (N, D, D), lower triangular, the same dtype.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    _check_full("z", z, cholesky)
    check_tensor("mean", mean, shape=tuple(z.shape), like=z)
    L = widen(cholesky)
    difference = (widen(z) - widen(mean)).unsqueeze(-1)
    epsilon = torch.linalg.solve_triangular(L, difference, upper=False).squeeze(-1)
    return sum_per_sample(-0.5 * (epsilon**2 + math.log(2 * math.pi))) - _log_det(L)


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic on it uses: fp64 stays, the rest becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def sum_per_sample(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: (N, ...) -> (N,)."""
    return x if x.dim() == 1 else x.flatten(1).sum(1)


def _log_det(L: Tensor) -> Tensor:
    """ln |det L| of triangular matrices (N, D, D): (N,)."""
    return L.diagonal(dim1=-2, dim2=-1).abs().log().sum(1)


def _check_full(name: str, vector: Tensor, cholesky: Tensor) -> None:
    check_tensor(name, vector, rank=2)
    check_tensor("cholesky", cholesky, shape=(*vector.shape, vector.shape[1]), like=vector)
