"""The loss of a step over a batch that processes share: each sample's randomness is its own.

Sample i of step k draws everything from a generator that (seed, k, i) decides, and the loss is the mean over
the whole batch. So neither the number of processes nor that of micro-batches changes more than rounding.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sdfast.conditioning import TextConditioner
from sdfast.diffusion import NoiseSchedule, min_snr_weight, simple_loss, vae_loss
from sdfast.models import AutoencoderKL, CLIPTextEncoder, DiagonalGaussian
from sdfast.tokenizer import CLIPTokenizer
from sdfast.training.buckets import Batches, Size
from sdfast.training.distributed import Parallel, Processes
from sdfast.training.images import CaptionedImage, cut_away
from sdfast.training.trainer import step_generator

Item = TypeVar("Item")
Draw = tuple[int, torch.Generator]  # an image's number and the randomness of its sample


@dataclasses.dataclass(frozen=True)
class SharedLoss:
    """Number of the step -> the losses of this process's micro-batches.

    Attributes:
        model: is called; decides when gradients are averaged.
        batches: which images.
        batch_size: over all processes, which it is a multiple of.
        micro_batch: samples in one forward; None takes this process's share at once.
        mean_loss: samples of one size -> the mean of their losses.
    """

    model: Parallel
    batches: Batches
    batch_size: int
    micro_batch: int | None
    mean_loss: Callable[[Sequence[Draw]], Tensor]
    processes: Processes
    seed: int

    def __call__(self, step: int) -> Iterator[Tensor]:
        """Losses that sum to the mean over this process's share of the batch."""
        seeds = torch.randint(2**62, (self.batch_size,), generator=step_generator(self.seed, step))
        each = self.batch_size // self.processes.world
        mine = slice(self.processes.rank * each, (self.processes.rank + 1) * each)
        rows, own = self.batches.at(step)[mine], seeds[mine].tolist()
        draws = [(row, torch.Generator().manual_seed(seed)) for row, seed in zip(rows, own, strict=True)]
        size = self.micro_batch or each
        for first in range(0, each, size):
            part = draws[first : first + size]
            with self.model.gradients_shared(first + size >= each):
                yield self.mean_loss(part) * (len(part) / each)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The frozen text encoders of a pipeline. What exceeds the 77 tokens of CLIP is cut."""

    encoders: Sequence[CLIPTextEncoder]
    tokenizers: Sequence[CLIPTokenizer]
    is_xl: bool
    zero_empty: bool  # SDXL: what is conditioned on without a text is zeros

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(N, L, C), and for SDXL (N, E)."""
        conditioner = TextConditioner(
            self.encoders, self.tokenizers, is_xl=self.is_xl, zero_empty_negative=self.zero_empty
        )
        with warnings.catch_warnings():  # of captions that are cut: one for each, at every step
            warnings.simplefilter("ignore")
            condition = conditioner.batch(captions, [], guided=False)
        states, pooled = condition.hidden_states, condition.pooled
        if self.zero_empty:
            given = torch.tensor([bool(caption) for caption in captions], device=states.device)
            states = states * given[:, None, None]
            pooled = None if pooled is None else pooled * given[:, None]
        return states, pooled


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Algorithm 1 on latents with captions, some of them dropped (Ho & Salimans 2021).

    Attributes:
        images, own_sizes, sizes: N of them, each one's own size, and that of its bucket.
        moments: number of an image -> (2C, h, w) fp32, see `sdfast.training.latents`.
        min_snr_gamma: of `min_snr_weight`; None weighs every step 1.
    """

    model: Parallel
    images: Sequence[CaptionedImage]
    own_sizes: Sequence[Size]
    sizes: Sequence[Size]
    moments: Callable[[int], Tensor]
    texts: Texts
    schedule: NoiseSchedule
    scaling_factor: float
    caption_dropout: float
    min_snr_gamma: float | None
    device: torch.device

    def __call__(self, draws: Sequence[Draw]) -> Tensor:
        """Scalar, fp32."""
        latents, noises, timesteps, captions = [], [], [], []
        for row, generator in draws:
            moments = self.moments(row)[None]
            posterior = DiagonalGaussian(moments)
            timesteps.append(torch.randint(self.schedule.T, (1,), generator=generator))
            dropped = torch.rand((), generator=generator) < self.caption_dropout
            captions.append("" if dropped else self.images[row].caption)
            shape = posterior.mean.shape
            latents.append(posterior.sample(torch.randn(shape, generator=generator)) * self.scaling_factor)
            noises.append(torch.randn(shape, generator=generator))
        t = torch.cat(timesteps)
        z0, noise = torch.cat(latents).to(self.device), torch.cat(noises).to(self.device)
        x_t, target = self.schedule.training_pair(z0, t, noise)
        states, pooled = self.texts.encode(captions)
        arguments = [x_t.to(self.model.dtype), t.to(self.device), states.to(self.model.dtype)]
        if pooled is not None:
            time_ids = torch.tensor([self._time_ids(row) for row, _ in draws], device=self.device)
            added = {"text_embeds": pooled.to(self.model.dtype), "time_ids": time_ids}
            predicted = self.model(*arguments, added)
        else:
            predicted = self.model(*arguments)
        weight = None
        if self.min_snr_gamma is not None:
            weight = min_snr_weight(self.schedule, t, self.min_snr_gamma).to(self.device)
        return simple_loss(predicted.float(), target.float(), weight)

    def _time_ids(self, row: int) -> list[float]:
        """SDXL's original size, top and left of the cut, and size (Podell et al. 2023, §2.2)."""
        own, size = self.own_sizes[row], self.sizes[row]
        scale = min(own[0] / size[0], own[1] / size[1])
        top, left = cut_away(own, size)  # of the original: the model is told of the resized one
        return [*map(float, own), float(round(top / scale)), float(round(left / scale)), *map(float, size)]


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """The negative ELBO of eq. 8-9, in nats a pixel and channel.

    Attributes:
        pixels: number of an image -> (channels, H, W) in [-1, 1].
        kl_weight: against the squared error; 1 is the bound itself.
    """

    model: Parallel
    vae: AutoencoderKL
    pixels: Callable[[int], Tensor]
    kl_weight: float
    device: torch.device

    def __call__(self, draws: Sequence[Draw]) -> Tensor:
        """Scalar, fp32."""
        x = torch.stack([self.pixels(row) for row, _ in draws]).to(self.device)
        height, width = (side // self.vae.downsampling for side in x.shape[2:])
        shape = (1, self.vae.config.latent_channels, height, width)
        noise = torch.cat([torch.randn(shape, generator=generator) for _, generator in draws])
        dtype = self.model.dtype
        reconstruction, posterior = self.model(x.to(dtype), noise.to(self.device, dtype))
        terms = vae_loss(
            x, reconstruction.float(), posterior.mean.float(), posterior.logvar.float(), self.kl_weight
        )
        return terms.total / x[0].numel()
