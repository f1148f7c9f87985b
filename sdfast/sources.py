"""The pictures that a run starts from, and their latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.generation import draw_noise
from sdfast.models import AutoencoderKL, DiagonalGaussian


class SourceImages:
    """P images, one for each prompt or one for all, encoded when they are needed and no more than once."""

    def __init__(
        self, vae: AutoencoderKL, images: Tensor, num_images: int, vae_memory_bytes: int | None = None
    ) -> None:
        """
        Args:
            images: (P, C, H, W) in [-1, 1], on any device.
            num_images: how many pictures are made of each in turn.
            vae_memory_bytes: what the encoder may take for an image; None sets no limit.
        """
        self.vae, self.images, self.num_images = vae, images, num_images
        self.vae_memory_bytes = vae_memory_bytes
        self._posteriors: dict[int, DiagonalGaussian] = {}

    def latents(self, part: slice, generators: Sequence[torch.Generator]) -> Tensor:
        """A sample z ~ q(z|image) for each picture of `part`, scaled for the U-Net, (n, c, h, w), float32.

        Each generator draws once, noise of one image's latents.
        """
        drawn = []
        for row, generator in zip(self.rows(part), generators, strict=True):
            q = self._posterior(row)
            drawn.append(q.sample(draw_noise([generator], q.mean.shape[1:], q.mean.dtype, q.mean.device)))
        return torch.cat(drawn).float() * self.vae.config.scaling_factor

    def rows(self, part: slice) -> list[int]:
        """Which image each picture of `part` is made of."""
        return rows_of(len(self.images), self.num_images, part)

    def _posterior(self, row: int) -> DiagonalGaussian:
        if row not in self._posteriors:
            weight = self.vae.decoder.conv_in.weight
            image = self.images[row : row + 1].to(weight.device, weight.dtype)
            self._posteriors[row] = self.vae.encode(image, memory_bytes=self.vae_memory_bytes)
        return self._posteriors[row]


def rows_of(count: int, num_images: int, part: slice) -> list[int]:
    """Of `count` things, one for each prompt or one for all, that which each picture of `part` takes."""
    return [0 if count == 1 else i // num_images for i in range(part.start, part.stop)]


def match_prompts(prompts: list[str], images: int) -> list[str]:
    """The prompts, one for each of several images where there is one for all.

    Raises:
        ValueError: neither is one, and they differ in number.
    """
    if len(prompts) == 1:
        prompts = prompts * images
    if images not in (1, len(prompts)):
        raise ValueError(f"image: got {images} images for {len(prompts)} prompts")
    return prompts
