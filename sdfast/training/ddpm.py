"""Training a text-conditioned denoiser in latent space: Algorithm 1 with a caption.

    repeat: z_0 ~ q_φ(z|x) scaled;  t ~ Uniform{1 … T};  ε ~ N(0, I)
            gradient step on ‖ε - ε_θ(√ᾱ_t z_0 + √(1-ᾱ_t) ε, t, τ_θ(caption))‖²

Now and then the caption is dropped for "", so that one network serves as the conditional and the
unconditional denoiser of classifier-free guidance (Ho & Salimans 2021). The text encoder τ_θ learns along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.diffusion import NoiseSchedule, simple_loss
from sdfast.models import (
    CLIPTextConfig,
    CLIPTextEncoder,
    DiagonalGaussian,
    UNet2DCondition,
    UNet2DConditionConfig,
)
from sdfast.training.trainer import Schedule, seeded, train


@dataclasses.dataclass(frozen=True)
class DDPMTraining:
    """Settings of `train_ddpm`.

    Attributes:
        schedule: length, rates and the average of the weights that is kept in the end.
        batch_size: latents in a step.
        caption_dropout: the share of captions replaced by the empty one.
    """

    schedule: Schedule = Schedule(steps=4500, learning_rate=1e-3, ema_decay=0.999)
    batch_size: int = 64
    caption_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class CaptionedLatents:
    """Latents of N training pictures, encoded once, with their captions.

    Attributes:
        posterior: q_φ(z|x) of each picture, unscaled, see `sdfast.training.vae.encode`.
        scaling_factor: of the latents.
        labels: (N,) int64, the class of each picture.
        captions: (classes, K, L) int64, K tokenized captions of each class.
        empty_caption: (L,) int64, the tokens of "".
        settings: JSON values that tell these data from others.
    """

    posterior: DiagonalGaussian
    scaling_factor: float
    labels: Tensor
    captions: Tensor
    empty_caption: Tensor
    settings: Mapping[str, Any]

    def draw(self, batch: int, caption_dropout: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z_0 (batch, C, H, W), scaled, and a caption for each, (batch, L)."""
        rows = torch.randint(len(self.labels), (batch,), generator=generator)
        z = DiagonalGaussian(torch.cat([self.posterior.mean[rows], self.posterior.logvar[rows]], dim=1))
        z0 = z.sample(torch.randn(z.mean.shape, generator=generator)) * self.scaling_factor
        # One wording for each class in a step: the text encoder then runs on a few captions, not on a batch.
        classes, wordings = self.captions.shape[:2]
        wording = torch.randint(wordings, (classes,), generator=generator)
        ids = self.captions[torch.arange(classes), wording][self.labels[rows]]
        dropped = torch.rand(batch, generator=generator) < caption_dropout
        return z0, torch.where(dropped[:, None], self.empty_caption, ids)


class TextConditionedUNet(nn.Module):
    """ε_θ(x_t, t, τ_θ(text)): the U-Net and the text encoder that learns with it."""

    def __init__(self, unet: UNet2DConditionConfig, text_encoder: CLIPTextConfig) -> None:
        super().__init__()
        self.unet = UNet2DCondition(unet)
        self.text_encoder = CLIPTextEncoder(text_encoder)

    def forward(self, x_t: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        """x_t (N, C, H, W), t (N,), input_ids (N, L) -> (N, C, H, W)."""
        # Samples of a batch share captions: each is encoded once.
        distinct, which = torch.unique(input_ids, dim=0, return_inverse=True)
        context = self.text_encoder(distinct).last_hidden_state.index_select(0, which)
        return self.unet(x_t, t, context)


def train_ddpm(
    unet: UNet2DConditionConfig,
    text_encoder: CLIPTextConfig,
    data: CaptionedLatents,
    schedule: NoiseSchedule,
    settings: DDPMTraining,
    *,
    folder: str | Path,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> TextConditionedUNet:
    """Train U-Net and text encoder together.

    Args:
        unet, text_encoder: their sizes.
        data: what is learned.
        schedule: the forward process, and what the network predicts.
        settings: how.
        folder, resume, progress, checkpoint_seconds: as in `sdfast.training.trainer.train`.
        seed: of the first weights, batches, captions, timesteps and noise.

    Returns:
        Both networks with averaged weights, in eval mode.

    Raises:
        ValueError, TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    with seeded(seed):
        model = TextConditionedUNet(unet, text_encoder)

    def loss(generator: torch.Generator) -> Tensor:
        z0, ids = data.draw(settings.batch_size, settings.caption_dropout, generator)
        t = torch.randint(schedule.T, (len(z0),), generator=generator)
        x_t, target = schedule.training_pair(z0, t, torch.randn(z0.shape, generator=generator))
        return simple_loss(model(x_t, t, ids), target)

    train(
        model,
        loss,
        settings.schedule,
        folder=folder,
        settings={
            "unet": dataclasses.asdict(unet),
            "text_encoder": dataclasses.asdict(text_encoder),
            "batch_size": settings.batch_size,
            "caption_dropout": settings.caption_dropout,
            "T": schedule.T,
            "beta_start": float(schedule.betas[0]),
            "beta_end": float(schedule.betas[-1]),
            "prediction": schedule.prediction,
            "data": dict(data.settings),
        },
        seed=seed,
        title="denoiser",
        resume=resume,
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )
    return model
