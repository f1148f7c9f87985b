"""Training the VAE of §2.5 and saying how good it is: the bound, its two terms, and the evidence.

maximise E_q[ln p_θ(x|z)] - D_KL(q_φ(z|x) || N(0, I)),   one z = μ + L ε for each picture in a step
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast.diffusion import as_posterior, evidence_lower_bound, importance_weighted, log_weights
from sdfast.models import SimpleVAE, SimpleVAEConfig
from sdfast.training.trainer import Schedule, seeded, train

_BOUND_SAMPLES = 50


@dataclasses.dataclass(frozen=True)
class SimpleVAETraining:
    """Settings of `train_simple_vae`.

    Attributes:
        schedule: length and rates. The loss is summed over pixels, so gradient norms are in the tens.
        batch_size: pictures in a step.
    """

    schedule: Schedule = Schedule(steps=2000, learning_rate=2e-3, warmup_steps=50, max_grad_norm=100.0)
    batch_size: int = 100


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over pictures, in nats a picture.

    Attributes:
        elbo: reconstruction - kl.
        reconstruction: E_q[ln p(x|z)].
        kl: D_KL(q(z|x) || N(0, I)), exact.
        importance_weighted: an estimate of ln p(x); in expectation it lies between elbo and ln p(x).
        importance_weighted_stderr: the standard error of that mean, from picture to picture.
        samples: K, of z for each picture.
        pictures: how many.
    """

    elbo: float
    reconstruction: float
    kl: float
    importance_weighted: float
    importance_weighted_stderr: float
    samples: int
    pictures: int


def train_simple_vae(
    config: SimpleVAEConfig,
    pictures: Tensor,
    settings: SimpleVAETraining,
    *,
    folder: str | Path,
    data_settings: Mapping[str, Any],
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> SimpleVAE:
    """Maximise the bound of eq. 8-9 over encoder and decoder.

    Args:
        config: the model.
        pictures: (N, channels, image_size, image_size) float32; in [0, 1] for the Bernoulli likelihood.
        settings: how.
        folder, resume, progress, checkpoint_seconds: as in `sdfast.training.trainer.train`.
        data_settings: JSON values that tell these pictures from others.
        seed: of the first weights, the batches and the latent noise.

    Returns:
        The model in eval mode.

    Raises:
        ValueError, TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    with seeded(seed):
        vae = SimpleVAE(config)

    def loss(generator: torch.Generator) -> Tensor:
        x = pictures[torch.randint(len(pictures), (settings.batch_size,), generator=generator)]
        noise = torch.randn(1, settings.batch_size, config.latent_dim, generator=generator)
        bound = evidence_lower_bound(
            x, as_posterior(*vae.encode(x)), vae.decode, noise, likelihood=config.likelihood, std=config.std
        )
        return -bound.total.mean()

    train(
        vae,
        loss,
        settings.schedule,
        folder=folder,
        settings={
            "model": dataclasses.asdict(config),
            "batch_size": settings.batch_size,
            "data": dict(data_settings),
        },
        seed=seed,
        title=f"{config.kind} VAE",
        resume=resume,
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )
    return vae


@torch.no_grad()
def evaluate(vae: SimpleVAE, pictures: Tensor, *, samples: int = 500, seed: int = 0) -> Evaluation:
    """The bound and the importance-weighted estimate on pictures that were not trained on.

    Args:
        pictures: (N, channels, image_size, image_size), at least two, for there to be a standard error.
        samples: K of them for each picture. The bound's reconstruction takes the first 50, which are enough.
        seed: of these samples.

    Raises:
        ValueError: less than one sample or two pictures.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    if len(pictures) < 2:
        raise ValueError(f"pictures: got {len(pictures)}, expected at least 2")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, len(pictures), vae.config.latent_dim, generator=generator)
    q = as_posterior(*vae.encode(pictures))
    options: dict[str, Any] = {"likelihood": vae.config.likelihood, "std": vae.config.std}
    bound = evidence_lower_bound(pictures, q, vae.decode, noise[:_BOUND_SAMPLES], **options)
    evidence = importance_weighted(log_weights(pictures, q, vae.decode, noise, **options)).double()
    return Evaluation(
        elbo=bound.total.double().mean().item(),
        reconstruction=bound.reconstruction.double().mean().item(),
        kl=bound.kl.double().mean().item(),
        importance_weighted=evidence.mean().item(),
        importance_weighted_stderr=(evidence.std() / len(evidence) ** 0.5).item(),
        samples=samples,
        pictures=len(pictures),
    )
