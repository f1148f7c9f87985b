"""The evidence lower bound of a VAE, and a tighter, importance-weighted estimate of the evidence.

    ln p(x) >= ELBO = E_q[ln p(x|z)] - D_KL(q(z|x) || p(z))                          eq. 6-9
    ln p(x) >= E[ln 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x)],   z_k ~ q(z|x)              Burda et al. 2016, eq. 8

The second is the first for K = 1 and rises to ln p(x) with K. Everything is nats of each sample, (N,), in
fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast.diffusion.gaussian import log_density, sum_per_sample, widen
from sdfast.diffusion.posterior import Posterior
from sdfast.ops._checks import check_tensor

LIKELIHOODS = ("gaussian", "bernoulli")

Decode = Callable[[Tensor], Tensor]  # z (N, D) -> (N, ...), what `log_likelihood` takes as `decoded`


class Elbo(NamedTuple):
    """The bound and its two terms, (N,): total = reconstruction - kl.

    reconstruction is E_q[ln p(x|z)], estimated from samples of z; kl is exact.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


def distortion(x: Tensor, decoded: Tensor, likelihood: str = "gaussian") -> Tensor:
    """-ln p(x|z) up to its constant: ½ ‖x - D(z)‖² ("gaussian"), or the binary cross entropy ("bernoulli").

    Args:
        x: (N, ...), floating; for "bernoulli" in [0, 1].
        decoded: D(z), the same shape; for "bernoulli" the logits.

    Returns:
        (N,), fp32 or fp64.

    Raises:
        ValueError: the shapes differ, or `likelihood` is unknown.
    """
    check_tensor("x", x)
    check_tensor("decoded", decoded, shape=tuple(x.shape))
    if likelihood == "gaussian":
        return sum_per_sample(0.5 * (widen(x) - widen(decoded)) ** 2)
    if likelihood == "bernoulli":
        return sum_per_sample(F.binary_cross_entropy_with_logits(widen(decoded), widen(x), reduction="none"))
    raise ValueError(f"likelihood: got {likelihood!r}, expected one of {', '.join(LIKELIHOODS)}")


def log_likelihood(x: Tensor, decoded: Tensor, likelihood: str = "gaussian", *, std: float = 1.0) -> Tensor:
    """ln p(x|z) with all its constants (§2.2): N(D(z), std² I), or independent Bernoullis.

    The first is a density of continuous x and can be positive; the second is a probability where every x is
    0 or 1.

    Args:
        x, decoded, likelihood: as in `distortion`.
        std: the Gaussian's σ; "bernoulli" has none.

    Returns:
        nats, (N,), fp32 or fp64.

    Raises:
        ValueError: as `distortion`, or `std` is not positive.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std: got {std}, expected a number > 0")
    error = distortion(x, decoded, likelihood)
    if likelihood == "bernoulli":
        return -error
    dimensions = math.prod(x.shape[1:])
    return -error / std**2 - dimensions * (math.log(std) + 0.5 * math.log(2 * math.pi))


def evidence_lower_bound(
    x: Tensor,
    posterior: Posterior,
    decode: Decode,
    noise: Tensor,
    *,
    likelihood: str = "gaussian",
    std: float = 1.0,
) -> Elbo:
    """The bound of eq. 6-9, differentiable.

    Args:
        x: (N, ...).
        posterior: q(z|x) of these N.
        decode: the decoder.
        noise: ε of the K samples of z, (K, N, D), standard normal, in the dtype of the posterior.
        likelihood, std: as in `log_likelihood`.

    Raises:
        ValueError: the shapes do not fit, or as in `log_likelihood`.
    """
    _check_noise(noise, posterior)
    terms = [log_likelihood(x, decode(posterior.sample(e)), likelihood, std=std) for e in noise]
    reconstruction, kl = torch.stack(terms).mean(0), posterior.kl()
    return Elbo(reconstruction - kl, reconstruction, kl)


def log_weights(
    x: Tensor,
    posterior: Posterior,
    decode: Decode,
    noise: Tensor,
    *,
    likelihood: str = "gaussian",
    std: float = 1.0,
) -> Tensor:
    """ln p(x|z_k) + ln p(z_k) - ln q(z_k|x) of each sample z_k, (K, N).

    The arguments are those of `evidence_lower_bound`.
    """
    _check_noise(noise, posterior)
    weights = []
    for e in noise:
        z = posterior.sample(e)
        prior = log_density(z, torch.zeros_like(z), torch.zeros_like(z))
        evidence = log_likelihood(x, decode(z), likelihood, std=std)
        weights.append(evidence + prior - posterior.log_density(z))
    return torch.stack(weights)


def importance_weighted(weights: Tensor) -> Tensor:
    """ln 1/K Σ_k exp(w_k): the bound of Burda et al. 2016 from `log_weights` (K, N). Nats, (N,)."""
    check_tensor("weights", weights, rank=2)
    if weights.shape[0] == 0:
        raise ValueError("weights: got no samples, expected (K, N) with K >= 1")
    return torch.logsumexp(weights, dim=0) - math.log(weights.shape[0])


def _check_noise(noise: Tensor, posterior: Posterior) -> None:
    expected = tuple(posterior.mean.shape)
    if noise.dim() != 3 or tuple(noise.shape[1:]) != expected or noise.shape[0] == 0:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected (K, {shape}) with K >= 1")
