"""What training minimises: the diffusion losses (§3) and the VAE's negative ELBO (§2.3).

Everything is computed in fp32 (fp64 for fp64). Terms of the bound are nats of each sample, (N,); divide by
D ln 2, D the number of pixels and channels, for bits per dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast.diffusion.elbo import distortion
from sdfast.diffusion.gaussian import gaussian_kl, kl_to_standard_normal, log_density, sum_per_sample, widen
from sdfast.diffusion.schedule import NoiseSchedule
from sdfast.ops._checks import check_tensor


def simple_loss(model_output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """‖target - model_output‖² of Algorithm 1, as the mean over all elements.

    Args:
        model_output: (N, ...), floating.
        target: the same shape; ε, v or x_0, the second result of `NoiseSchedule.training_pair`.
        weight: of each sample, (N,), such as `min_snr_weight`; None weighs all 1.

    Returns:
        scalar, fp32 or fp64.
    """
    check_tensor("model_output", model_output)
    check_tensor("target", target, shape=tuple(model_output.shape))
    if weight is None:
        return F.mse_loss(widen(model_output), widen(target))
    error = (widen(model_output) - widen(target)) ** 2
    return (error.flatten(1).mean(dim=1) * weight.to(error)).mean()


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights of `simple_loss` that amount to min(SNR, γ) on x_0's error (Hang et al. 2023, §3.4).

        "epsilon": min(SNR, γ) / SNR;  "v_prediction": min(SNR, γ) / (SNR + 1);  "sample": min(SNR, γ)

    Args:
        schedule: gives the SNR, and what the model predicts.
        t: index of each sample, (N,), integers.
        gamma: γ > 0; the paper takes 5.

    Returns:
        (N,), float64. For "epsilon" 1 where the SNR is 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: got {gamma}, expected a number > 0")
    snr = schedule.snr(t)
    if schedule.prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if schedule.prediction == "v_prediction" else clipped


def weighted_loss(
    schedule: NoiseSchedule, t: Tensor, model_output: Tensor, noise: Tensor, *, variance: str = "fixed_large"
) -> Tensor:
    """L_{t-1} - C of eq. 23, as the mean over samples and elements.

        β_t² / (2 σ_t² α_t (1 - ᾱ_t)) ‖ε - ε_θ‖²

    Args:
        t: index of each sample, (N,), integers.
        model_output: ε_θ, (N, ...), floating.
        noise: ε, the same shape.
        variance: σ_t², "fixed_large" or "fixed_small" (see `NoiseSchedule.model_variance`).

    Returns:
        scalar, fp32 or fp64: nats per dimension. Infinite at the last index of zero terminal SNR (α_T = 0).

    Raises:
        ValueError, TypeError: a shape, dtype, index or `variance` is wrong.
    """
    check_tensor("model_output", model_output)
    check_tensor("noise", noise, shape=tuple(model_output.shape))
    sigma2 = schedule.model_variance(variance)
    rest = 1 - schedule.alphas_cumprod
    weight = schedule.at(schedule.betas**2 / (2 * sigma2 * schedule.alphas * rest), t, model_output)
    return (weight * (widen(noise) - widen(model_output)) ** 2).mean()


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T = D_KL(q(x_T|x_0) || N(0, I)) of eq. 16; nothing in it is trained.

    Args:
        x0: (N, ...), floating.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    check_tensor("x0", x0)
    alpha, sigma = schedule.alpha_sigma(schedule.T - 1)
    x = widen(x0)
    logvar = (2 * sigma.log()).to(x)
    return gaussian_kl(alpha.to(x) * x, logvar, torch.zeros_like(x), torch.zeros_like(logvar))


def transition_term(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    model_output: Tensor,
    *,
    variance: str = "fixed_large",
    prediction: str | None = None,
) -> Tensor:
    """L_{t-1} = D_KL(q(x_{t-1}|x_t, x_0) || p_θ(x_{t-1}|x_t)) of eq. 16: two Gaussians, in closed form.

    Args:
        x0, x_t, model_output: (N, ...), the same dtype; x_t drawn by `NoiseSchedule.q_sample`.
        t: index of each sample, (N,), integers >= 1; index 0 is `reconstruction_term`.
        variance: σ_t², "fixed_large" or "fixed_small".
        prediction: what `model_output` is; None for the schedule's own.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    if bool((t < 1).any()):
        raise ValueError("t: got index 0, expected indices >= 1; index 0 is the reconstruction_term")
    mean, posterior_variance = schedule.q_posterior(widen(x0), widen(x_t), t)
    model_mean, sigma2 = _reverse(schedule, x_t, t, model_output, variance, prediction)
    return gaussian_kl(mean, posterior_variance.log(), model_mean, sigma2.log())


def reconstruction_term(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_1: Tensor,
    model_output: Tensor,
    *,
    variance: str = "fixed_large",
    prediction: str | None = None,
    discrete: bool = True,
) -> Tensor:
    """L_0 = -ln p_θ(x_0|x_1) of eq. 16 for 8-bit images: the discretised Gaussian of Ho et al. 2020, eq. 13.

    The probability of a grey value is the Gaussian's mass within half a level of it; the lowest and the
    highest take all that lies beyond.

    Args:
        x0: (N, ...), floating, 256 levels scaled to [-1, 1]; any values where `discrete` is False.
        x_1: (N, ...), the same dtype: x0 noised to index 0.
        model_output: (N, ...), the same dtype, for x_1 at index 0.
        variance, prediction: as in `transition_term`.
        discrete: False takes the Gaussian's density in place of its mass, for latents, which have no levels.

    Returns:
        nats, (N,), fp32 or fp64.
    """
    check_tensor("x0", x0)
    t = torch.zeros(x0.shape[0], dtype=torch.int64, device=x0.device)
    mean, sigma2 = _reverse(schedule, x_1, t, model_output, variance, prediction)
    x, std = widen(x0), sigma2.sqrt()
    if not discrete:
        return -log_density(x, mean, sigma2.log().expand_as(x))
    # Far enough for all of the mass, finite so that its gradient is 0 and not NaN.
    infinity = torch.full_like(x, 1e4)
    low = torch.where(x < -0.999, -infinity, (x - 1 / 255 - mean) / std)
    high = torch.where(x > 0.999, infinity, (x + 1 / 255 - mean) / std)
    # ln(Φ(high) - Φ(low)) without cancellation: in the lower tail, where ln Φ is accurate; Φ is symmetric.
    upper_tail = low > 0
    low, high = torch.where(upper_tail, -high, low), torch.where(upper_tail, -low, high)
    log_high = torch.special.log_ndtr(high)
    log_mass = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    return sum_per_sample(-log_mass)


class VaeLoss(NamedTuple):
    """Negative ELBO and its two parts, scalars: total = reconstruction + kl_weight * kl."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


def vae_loss(
    x: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    kl_weight: float = 1.0,
    likelihood: str = "gaussian",
) -> VaeLoss:
    """-L of eq. 8-9, summed over dimensions, mean over the batch, up to the likelihood's constant.

        "gaussian":  ½ ‖x - D(z)‖²                      + kl_weight D_KL(q(z|x) || N(0, I))
        "bernoulli": binary cross entropy of x and D(z) + kl_weight D_KL(q(z|x) || N(0, I))

    Args:
        x: (N, ...), floating; for "bernoulli" in [0, 1].
        reconstruction: D(z), the same shape; for "bernoulli" the logits.
        mean, logvar: the encoder's output, (N, ...).
        kl_weight: 1 for the ELBO; latent diffusion takes 1e-6.
        likelihood: "gaussian" (variance 1) or "bernoulli".

    Returns:
        scalars, fp32 or fp64.
    """
    check_tensor("x", x)
    check_tensor("reconstruction", reconstruction, shape=tuple(x.shape))
    if mean.shape[:1] != x.shape[:1]:
        raise ValueError(f"mean: got a batch of {tuple(mean.shape[:1])}, expected {x.shape[0]} as x")
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight: got {kl_weight}, expected a number >= 0")
    error = distortion(x, reconstruction, likelihood).mean()
    kl = kl_to_standard_normal(mean, logvar).mean()
    return VaeLoss(error + kl_weight * kl, error, kl)


def _reverse(
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    model_output: Tensor,
    variance: str,
    prediction: str | None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of p_θ(x_{t-1}|x_t): eq. 21, and σ_t² of §3.2.2."""
    x, m = widen(x_t), widen(model_output)
    x0 = schedule.convert(m, x, t, to="sample", prediction=prediction)
    return schedule.q_posterior(x0, x, t)[0], schedule.at(schedule.model_variance(variance), t, x)
