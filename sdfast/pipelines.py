"""Text to image, image to image, inpainting: Stable Diffusion 1.x, 2.x, SDXL.

Rombach et al. 2022, Podell et al. 2023:

    text to image:  x_T ~ N(0, I)               image to image:  x_s ~ q(x_s | E(image)), s = strength · T
    x_{t-1} = one reverse step with m = m(uncond) + g (m(text) - m(uncond)), down to x_0;    image = D(x_0)
    inpainting, outpainting:  the same, and what is known is put back (`sdfast.inpainting`)

Each image has a generator of its own, on the CPU, seeded by its own seed, and draws all its noise from
it in the order in which diffusers draws: the same seed gives the same picture, whatever the device and
the batch it is made in, and the one that diffusers makes. (The arithmetic may still round differently:
torch picks its algorithms by batch size, and the last bits of the latents follow.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdfast.diffusion import plan_from_config
from sdfast.generation import Beginning, GeneratedImages, OnStep
from sdfast.images import as_tensor, check_one_size
from sdfast.inpainting import Canvas, Inpainting, choose_method
from sdfast.masks import Images, images_and_masks
from sdfast.outpainting import grown_canvas
from sdfast.pipeline_base import PipelineBase
from sdfast.request import (
    DRAW_DEFAULTS,
    DrawOptions,
    as_prompts,
    check_inpainting,
    check_strength,
)
from sdfast.sources import SourceImages, match_prompts

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GeneratedImages", "StableDiffusion"]


class StableDiffusion(PipelineBase):
    """A latent diffusion model with its text encoder, ready to draw: of what parts, `PipelineBase` says."""

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        time_ids: Sequence[float] | None = None,
        output: str = "pil",
        on_step: OnStep | None = None,
    ) -> GeneratedImages:
        """Draw what the prompt says.

        Args:
            prompt: one, or P of them. What exceeds the 77 tokens of CLIP is cut, with a warning.
            negative_prompt: what to steer away from, one or P; needs guidance.
            height, width: of the image, multiples of 8; the model's own size when None.
            steps: reverse steps, at most what the model's schedule has, 1000 or little less.
            guidance_scale: g; 1 or less switches guidance off, which halves the work.
            sampler: a name from `sdfast.diffusion.SAMPLERS`; the model's own when None.
            seed: image i gets seed + i; or one seed for each image; or None for fresh ones.
            num_images: images per prompt; N = P * num_images.
            batch_size: how many images to run at once; by their size when None.
            latents: x_T, (N, c, h, w) of unit variance, instead of what the seeds would draw.
            time_ids: SDXL's original height and width, top and left of the crop, target height and width;
                when None the size asked for, uncropped.
            output: "pil", "tensor" or "latent"; see `GeneratedImages.images`.
            on_step: called as on_step(done, total) after each step; an exception in it ends the run.

        Raises:
            TypeError, ValueError: an argument is out of its range; nothing was computed then.
        """
        self._check_takes_latents("text_to_image")
        request = self._request(
            prompts=as_prompts("prompt", prompt), negative_prompt=negative_prompt,
            height=self.default_size[0] if height is None else height,
            width=self.default_size[1] if width is None else width, steps=steps,
            guidance_scale=guidance_scale, seed=seed, num_images=num_images, batch_size=batch_size,
            time_ids=time_ids, output=output,
        )  # fmt: skip
        shape = (len(request.seeds), *request.latent_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: got shape {tuple(latents.shape)}, expected {shape}")
        plan = plan_from_config(self.scheduler_config, request.steps, sampler=sampler)

        def start(part: slice, generators: list[torch.Generator]) -> Beginning:
            noise = self._noise(request, generators) if latents is None else latents[part]
            return Beginning(noise.to(self.device, self.dtype) * plan.initial_sigma)

        return self._generation(request, plan).run(start, on_step, self._settings(request, sampler))

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Tensor | Sequence[Image.Image],
        *,
        strength: float = 0.8,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        batch_size: int | None = None,
        time_ids: Sequence[float] | None = None,
        output: str = "pil",
        on_step: OnStep | None = None,
    ) -> GeneratedImages:
        """Redraw an image as the prompt says.

        Args:
            prompt: one, or P of them.
            image: one for all prompts, or P of them: pictures, or a tensor (P, C, H, W) in [0, 1].
            strength: how much of the schedule to run, 0 to 1: the last int(steps * strength) steps run, so
                that 1 leaves little of the image.
            height, width: what pictures are resized to; their own size, cut to a multiple of 8, when None.
            negative_prompt, steps, guidance_scale, sampler, seed, num_images, batch_size, time_ids, output,
                on_step: as for `text_to_image`.

        Raises:
            TypeError, ValueError: an argument is out of its range; nothing was computed then.
        """
        self._check_takes_latents("image_to_image")
        check_strength(strength, steps)
        sources = as_tensor(
            image, height=height, width=width, channels=self.vae.config.in_channels,
            multiple=self._size_multiple,
        )  # fmt: skip
        request = self._request(
            prompts=match_prompts(as_prompts("prompt", prompt), len(sources)),
            negative_prompt=negative_prompt, height=sources.shape[2], width=sources.shape[3], steps=steps,
            guidance_scale=guidance_scale, seed=seed, num_images=num_images, batch_size=batch_size,
            time_ids=time_ids, output=output,
        )  # fmt: skip
        plan = plan_from_config(self.scheduler_config, request.steps, sampler=sampler, strength=strength)
        encoded = SourceImages(self.vae, sources, num_images, self.vae_memory_bytes)

        def start(part: slice, generators: list[torch.Generator]) -> Beginning:
            clean = encoded.latents(part, generators)
            noise = self._noise(request, generators).float()
            return Beginning(plan.add_noise(clean, noise).to(self.dtype))

        settings = self._settings(request, sampler, strength=float(strength))
        return self._generation(request, plan).run(start, on_step, settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Images,
        mask: Images | None = None,
        *,
        keep_original: bool = False,
        height: int | None = None,
        width: int | None = None,
        method: str = "auto",
        strength: float = 1.0,
        sampler: str | None = None,
        jump_length: int = 10,
        resamplings: int = 10,
        on_step: OnStep | None = None,
        **options: Unpack[DrawOptions],
    ) -> GeneratedImages:
        """Paint anew what a mask shows white.

        Args:
            prompt: one, or P of them.
            image: as for `image_to_image`.
            mask: one, or one for each image, of the image's size: pictures, or a tensor (P or 1, 1, H, W) in
                [0, 1]. White is painted, and grey from the middle on. None: what is transparent is painted.
            keep_original: put the image back, where the mask is black to the bit, where it is grey in
                proportion. Otherwise all of it has gone through the VAE.
            height, width: what pictures are resized to; not with keep_original.
            method: "auto", the model's own way if it takes a mask as input, otherwise "blend": what is known
                replaces the latents after every step; or "repaint", which goes back and repeats steps until
                the two fit (Lugmayr et al. 2022): by default it takes some eight times as many. The last two
                are for models that do not take the mask.
            strength: how much of the schedule to run; 1 begins with noise alone, less with the noised image.
            sampler: as for `text_to_image`; None is "ddpm" for "repaint".
            jump_length, resamplings: of "repaint": after every so many steps it goes back as many, until
                they were sampled so often. Fewer than 10 each are faster.
            on_step: called as on_step(done, total) after each step; an exception in it ends the run.
            options: `DrawOptions`: negative_prompt, steps, guidance_scale, seed, num_images, batch_size,
                time_ids, output, as for `image_to_image`.

        Raises:
            TypeError, ValueError: an argument is out of its range; nothing was computed then.
        """
        if keep_original:
            check_one_size("keep_original", image, height, width, self._size_multiple)
        images, masks = images_and_masks(
            image, mask, height=height, width=width, channels=self.vae.config.in_channels,
            multiple=self._size_multiple,
        )  # fmt: skip
        canvas = Canvas(images, masks, masks if keep_original else None)
        return self._inpaint(
            prompt, canvas, method=method, strength=strength, sampler=sampler, jump_length=jump_length,
            resamplings=resamplings, on_step=on_step, options=options,
            settings={"keep_original": bool(keep_original)},
        )  # fmt: skip

    def outpaint(
        self,
        prompt: str | Sequence[str],
        image: Images,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        feather: int = 8,
        keep_original: bool = True,
        method: str = "auto",
        strength: float = 1.0,
        sampler: str | None = None,
        jump_length: int = 10,
        resamplings: int = 10,
        on_step: OnStep | None = None,
        **options: Unpack[DrawOptions],
    ) -> GeneratedImages:
        """Let a picture grow.

        Args:
            prompt: one, or P of them.
            image: one for all prompts, or P of one size: pictures, or a tensor (P, C, H, W) in [0, 1].
            left, right, top, bottom: pixels to add. The result has exactly these; where its sides are no
                multiples of 8, more is painted on the right and at the bottom, and cut off.
            feather: over how many of its pixels the image fades at the sides that grow; 0 leaves a hard seam.
            keep_original: put the image back, to the bit but where it fades.
            method, strength, sampler, jump_length, resamplings, on_step, options: as for `inpaint`.

        Raises:
            TypeError, ValueError: an argument is out of its range; nothing was computed then.
        """
        check_one_size("outpaint", image)
        images = as_tensor(image, height=None, width=None, channels=self.vae.config.in_channels, multiple=1)
        sides = {"left": left, "right": right, "top": top, "bottom": bottom, "feather": feather}
        canvas = grown_canvas(
            images, keep_original=keep_original, multiple=self._size_multiple,
            downsampling=self.vae.downsampling, **sides,
        )  # fmt: skip
        if canvas.size is not None and options.get("output") == "latent":
            height, width = canvas.size
            raise ValueError(
                f"output: 'latent' cannot be cut to {height}x{width}; grow to multiples of"
                f" {self._size_multiple}"
            )
        return self._inpaint(
            prompt, canvas, method=method, strength=strength, sampler=sampler, jump_length=jump_length,
            resamplings=resamplings, on_step=on_step, options=options,
            settings={name: int(one) for name, one in sides.items()} | {"keep_original": bool(keep_original)},
        )  # fmt: skip

    def _inpaint(
        self,
        prompt: str | Sequence[str],
        canvas: Canvas,
        *,
        method: str,
        strength: float,
        sampler: str | None,
        jump_length: int,
        resamplings: int,
        on_step: OnStep | None,
        options: DrawOptions,
        settings: dict[str, Any],
    ) -> GeneratedImages:
        if unknown := options.keys() - DRAW_DEFAULTS.keys():
            raise TypeError(
                f"unexpected option {', '.join(sorted(unknown))}, expected {', '.join(DRAW_DEFAULTS)}"
            )
        drawn: dict[str, Any] = {**DRAW_DEFAULTS, **options}
        check_strength(strength, drawn["steps"])
        check_inpainting(method, int(drawn["steps"] * strength), jump_length, resamplings, sampler)
        served_by = choose_method(method, self.unet.config.in_channels, self.vae.config.latent_channels)
        height, width = canvas.images.shape[2:]
        request = self._request(
            prompts=match_prompts(as_prompts("prompt", prompt), len(canvas.images)), height=height,
            width=width, **drawn,
        )  # fmt: skip
        if settings["keep_original"] and request.output == "latent":
            raise ValueError("keep_original: puts pixels back, which output='latent' has none of")
        if served_by == "repaint":
            sampler = sampler or "ddpm"
            jump_length, resamplings = int(jump_length), int(resamplings)
            settings |= {"jump_length": jump_length, "resamplings": resamplings}
        run = Inpainting(
            canvas, self.vae,
            plan_from_config(self.scheduler_config, request.steps, sampler=sampler, strength=strength),
            method=served_by, strength=strength, jump_length=jump_length, resamplings=resamplings,
            num_images=drawn["num_images"], dtype=self.dtype, device=self.device,
            vae_memory_bytes=self.vae_memory_bytes,
        )  # fmt: skip
        settings |= {"method": "auto" if served_by == "channels" else served_by, "strength": float(strength)}
        if canvas.size is not None:
            settings |= dict(zip(("height", "width"), canvas.size, strict=True))
        return self._generation(request, run.plan).run(
            run.start, on_step, self._settings(request, sampler, **settings)
        )
