"""The encoder's Gaussian q_φ(z|x), with a diagonal or with a full covariance (§2.4-2.5).

Both draw z from standard normal noise in a way that gradients pass through (eq. 10), know the density of
what they drew, and their divergence from the prior N(0, I) in closed form. z is a vector of D numbers.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sdfast import ops
from sdfast.diffusion.gaussian import (
    kl_full_to_standard_normal,
    kl_to_standard_normal,
    log_density,
    log_density_full,
    sample_full,
)


@dataclasses.dataclass(frozen=True)
class DiagonalPosterior:
    """N(mean, diag(exp(logvar))).

    Attributes:
        mean, logvar: (N, D), the same dtype; logvar is clamped as in `sdfast.ops.reparameterize`.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = μ + exp(½ logvar) ε: eq. 10 with a diagonal L. (N, D) from noise (N, D)."""
        return ops.reparameterize(self.mean, self.logvar, noise)

    def log_density(self, z: Tensor) -> Tensor:
        """ln q(z|x) of z (N, D), in nats: (N,)."""
        return log_density(z, self.mean, self.logvar)

    def kl(self) -> Tensor:
        """D_KL(q(z|x) || N(0, I)), in nats: (N,)."""
        return kl_to_standard_normal(self.mean, self.logvar)


@dataclasses.dataclass(frozen=True)
class FullPosterior:
    """N(mean, L Lᵀ).

    Attributes:
        mean: (N, D).
        cholesky: L, (N, D, D), lower triangular with a positive diagonal, the same dtype.
    """

    mean: Tensor
    cholesky: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = μ + L ε: eq. 10. (N, D) from noise (N, D)."""
        return sample_full(self.mean, self.cholesky, noise)

    def log_density(self, z: Tensor) -> Tensor:
        """ln q(z|x) of z (N, D), in nats: (N,)."""
        return log_density_full(z, self.mean, self.cholesky)

    def kl(self) -> Tensor:
        """D_KL(q(z|x) || N(0, I)), in nats: (N,)."""
        return kl_full_to_standard_normal(self.mean, self.cholesky)


Posterior = DiagonalPosterior | FullPosterior


def as_posterior(mean: Tensor, spread: Tensor) -> Posterior:
    """The Gaussian that an encoder's two outputs amount to.

    Args:
        mean: (N, D).
        spread: the log-variances (N, D), or the Cholesky factor (N, D, D).

    Raises:
        ValueError: `spread` has another rank.
    """
    if spread.dim() == 2:
        return DiagonalPosterior(mean, spread)
    if spread.dim() == 3:
        return FullPosterior(mean, spread)
    raise ValueError(f"spread: got shape {tuple(spread.shape)}, expected (N, D) or (N, D, D)")
