"""Training the variational autoencoder: maximise the ELBO of eq. 8-9 by gradient descent.

    minimise ½ ‖x - D_θ(z)‖² + kl_weight · D_KL(q_φ(z|x) || N(0, I)),   z = μ_φ(x) + σ_φ(x) ε

The encoder gives mean and log-variance (§2.5). Weight 1 is the bound itself; latent diffusion wants sharp
reconstructions and keeps the prior's pull small (Rombach et al. 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast.diffusion import vae_loss
from sdfast.models import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian
from sdfast.training.trainer import Schedule, seeded, train

_ENCODING_BATCH = 250
_MEASURED = 2000  # pictures are enough to know the latents' variance


@dataclasses.dataclass(frozen=True)
class VAETraining:
    """Settings of `train_vae`.

    Attributes:
        schedule: length and rates. The loss is summed over pixels, so gradient norms are in the hundreds.
        batch_size: pictures in a step.
        kl_weight: of the KL term against the squared error.
        likelihood: "gaussian", or "bernoulli" for pictures in [0, 1] and a decoder that gives logits.
    """

    schedule: Schedule = Schedule(steps=1000, learning_rate=2e-3, warmup_steps=50, max_grad_norm=100.0)
    batch_size: int = 64
    kl_weight: float = 0.02
    likelihood: str = "gaussian"


def train_vae(
    config: AutoencoderKLConfig,
    pictures: Tensor,
    settings: VAETraining,
    *,
    folder: str | Path,
    data_settings: Mapping[str, Any],
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> AutoencoderKL:
    """Train an autoencoder and measure the scaling factor of its latents.

    Args:
        config: its sizes; `scaling_factor` is replaced by what is measured.
        pictures: (N, in_channels, H, W) float32 in [-1, 1].
        settings: how.
        folder, resume, progress, checkpoint_seconds: as in `sdfast.training.trainer.train`.
        data_settings: JSON values that tell these pictures from others.
        seed: of the first weights, the batches and the latent noise.

    Returns:
        The model in eval mode; `config.scaling_factor` gives its latents a standard deviation of 1.

    Raises:
        ValueError, TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    with seeded(seed):
        vae = AutoencoderKL(config)

    def loss(generator: torch.Generator) -> Tensor:
        x = pictures[torch.randint(len(pictures), (settings.batch_size,), generator=generator)]
        posterior = vae.encode(x)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        x_hat = vae.decode(posterior.sample(noise))
        terms = vae_loss(
            x, x_hat, posterior.mean, posterior.logvar, settings.kl_weight, likelihood=settings.likelihood
        )
        return terms.total

    train(
        vae,
        loss,
        settings.schedule,
        folder=folder,
        settings={
            "model": dataclasses.asdict(config),
            "batch_size": settings.batch_size,
            "kl_weight": settings.kl_weight,
            "likelihood": settings.likelihood,
            "data": dict(data_settings),
        },
        seed=seed,
        title="autoencoder",
        resume=resume,
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )
    vae.config = dataclasses.replace(config, scaling_factor=scaling_factor(encode(vae, pictures[:_MEASURED])))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussian:
    """q_φ(z|x) of all pictures (N, in_channels, H, W), unscaled; diffusion training draws from it."""
    posteriors = [vae.encode(batch) for batch in pictures.split(_ENCODING_BATCH)]
    moments = [torch.cat([posterior.mean, posterior.logvar], dim=1) for posterior in posteriors]
    return DiagonalGaussian(torch.cat(moments))


def scaling_factor(posterior: DiagonalGaussian) -> float:
    """1 / the standard deviation of z, over pictures and elements.

    The variance of z is that of the means plus the mean of the variances. The means are near 0, as the KL
    term wants them, so no shift is needed beside it.
    """
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    return float((mean.var(correction=0) + variance.mean()).rsqrt())
