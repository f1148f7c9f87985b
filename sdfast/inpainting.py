"""Inpainting: what a mask shows white is painted anew, the rest is known.

    a model of 2c + 1 channels    reads latents, mask and the latents of the image without what is painted
    blend                         after each step the known latents are the image's, noised to that level
    RePaint                       the same, and steps are repeated (`sdfast.diffusion.repaint`)

The first two are diffusers' `StableDiffusionInpaintPipeline`, with its draws of noise in its order.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from sdfast.diffusion import RePaint, SamplingPlan
from sdfast.generation import Beginning, draw_like, draw_noise
from sdfast.masks import latent_mask
from sdfast.models import AutoencoderKL
from sdfast.sources import SourceImages, rows_of


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """P images and what of them is painted.

    Attributes:
        images: (P, C, H, W) in [-1, 1].
        masks: white, 1, where the model paints, (P or 1, 1, H, W) in [0, 1].
        weights: how much of each pixel of the result is painted, the rest being the image's own,
            (P or 1, 1, H, W) in [0, 1]; None for all of it.
        size: height and width that are kept of the result, from its upper left corner; None for all of it.
    """

    images: Tensor
    masks: Tensor
    weights: Tensor | None = None
    size: tuple[int, int] | None = None


class Inpainting:
    """Makes what each batch starts from: the `Start` of a `Generation`.

    Attributes:
        plan: the steps to run.
    """

    def __init__(
        self,
        canvas: Canvas,
        vae: AutoencoderKL,
        plan: SamplingPlan,
        *,
        method: str,
        strength: float,
        jump_length: int,
        resamplings: int,
        num_images: int,
        dtype: torch.dtype,
        device: torch.device,
        vae_memory_bytes: int | None = None,
    ) -> None:
        """
        Args:
            plan: of the last int(n * strength) steps.
            method: "blend", "repaint", or "channels" for a model that takes the mask.
            strength: 1 starts from noise alone.
            jump_length, resamplings: of RePaint.
            num_images: how many pictures are made of each image in turn.
            dtype, device: of the latents.
            vae_memory_bytes: what the encoder may take for an image; None sets no limit.

        Raises:
            ValueError: RePaint cannot go with this plan or these numbers, or a mask has no latent to paint.
        """
        self.canvas, self.num_images = canvas, num_images
        self.repaint = RePaint(plan, jump_length, resamplings) if method == "repaint" else None
        self.plan = plan if self.repaint is None else self.repaint.plan
        self._base, self._takes_mask, self._from_noise = plan, method == "channels", strength == 1
        self._dtype, self._device = dtype, device
        self._sources = SourceImages(vae, canvas.images, num_images, vae_memory_bytes)
        known = canvas.images * (canvas.masks < 0.5)
        self._known = SourceImages(vae, known, num_images, vae_memory_bytes)
        height, width = (side // vae.downsampling for side in canvas.images.shape[2:])
        self._latent_shape = (vae.config.latent_channels, height, width)
        self._latent_mask = latent_mask(canvas.masks, (height, width)).to(device)
        if not self._latent_mask.flatten(1).any(dim=1).all():
            raise ValueError(
                "mask: has nothing to paint once it is reduced to latents: each is painted if the upper left"
                f" of its {vae.downsampling}x{vae.downsampling} pixels is white; make what is white larger"
            )

    def start(self, part: slice, generators: list[torch.Generator]) -> Beginning:
        """What the pictures of `part` start from; their generators draw in diffusers' order."""
        plan, mask = self._base, self._of(self._latent_mask, part)
        # float32 at first: the sum with the noise is rounded once.
        clean = None
        if not (self._takes_mask and self._from_noise):
            clean = self._sources.latents(part, generators).to(self._device)
        noise = draw_noise(generators, self._latent_shape, self._dtype, self._device)
        if self._from_noise or clean is None:
            latents = noise * plan.initial_sigma
        else:
            latents = plan.add_noise(clean, noise.float()).to(self._dtype)
        finish = functools.partial(self._finish, part)
        if self._takes_mask:
            known = self._known.latents(part, generators).to(self._device, self._dtype)
            mask_channel = mask.to(self._dtype).expand(len(latents), -1, -1, -1)
            return Beginning(latents, condition=torch.cat([mask_channel, known], dim=1), finish=finish)
        assert clean is not None
        clean = clean.to(self._dtype)
        draw = functools.partial(draw_like, generators)
        if self.repaint is not None:
            noise_of_step, after_step = self.repaint.callbacks(clean, mask, draw)
            return Beginning(latents, draw_noise=noise_of_step, replace=after_step, finish=finish)
        draw(latents)  # diffusers encodes the known part here, too, and leaves it unused

        def replace(i: int, _: int, latents: Tensor) -> Tensor:
            return torch.where(mask, latents, plan.add_noise(clean, noise, i + 1))

        return Beginning(latents, replace=replace, finish=finish)

    def _finish(self, part: slice, images: Tensor) -> Tensor:
        """The images (n, C, H, W) in [0, 1], with what is known put back, cut to size."""
        if self.canvas.weights is not None:
            weights = self._of(self.canvas.weights, part).to(images)
            known = self._of(self.canvas.images, part).to(images) / 2 + 0.5
            images = torch.where(weights > 0, known.lerp(images, weights), known)
        if self.canvas.size is not None:
            images = images[..., : self.canvas.size[0], : self.canvas.size[1]]
        return images

    def _of(self, rows: Tensor, part: slice) -> Tensor:
        """The rows that belong to the pictures of `part`; one row where it belongs to all."""
        return rows if len(rows) == 1 else rows[rows_of(len(rows), self.num_images, part)]


def choose_method(method: str, unet_channels: int, latent_channels: int) -> str:
    """What serves a `method` of `StableDiffusion.inpaint`: "blend", "repaint" or "channels".

    Raises:
        ValueError: a method that this U-Net leaves no choice of.
    """
    if unet_channels == latent_channels:
        return "blend" if method == "auto" else method
    if method != "auto":
        raise ValueError(
            f"method: got {method!r}, but this U-Net takes the mask as an input ({unet_channels} channels),"
            " which leaves no choice; expected 'auto'"
        )
    return "channels"
