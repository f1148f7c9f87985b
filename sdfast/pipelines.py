"""Text to image, image to image, inpainting: Stable Diffusion 1.x, 2.x, SDXL (Rombach et al. 2022, Podell et al. 2023).

    text to image:  x_T ~ N(0, I)               image to image:  x_s ~ q(x_s | E(image)), s = strength · T
    x_{t-1} = one reverse step with m = m(uncond) + g (m(text) - m(uncond)), down to x_0;    image = D(x_0)
    inpainting, outpainting:  the same, and what is known is put back (`sdfast.inpainting`)

Each image has a generator of its own, on the CPU, seeded by its own seed, and draws all its noise from
it in the order in which diffusers draws: the same seed gives the same picture, whatever the device and
the batch it is made in, and the one that diffusers makes. (The arithmetic may still round differently:
torch picks its algorithms by batch size, and the last bits of the latents follow.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdfast import __version__
from sdfast.conditioning import TextConditioner
from sdfast.diffusion import SamplingPlan, plan_from_config, sampler_name
from sdfast.generation import Beginning, GeneratedImages, Generation, OnStep, draw_noise
from sdfast.graphs import BUDGET_BYTES, GraphCache
from sdfast.images import as_tensor, check_one_size
from sdfast.inpainting import Canvas, Inpainting, choose_method
from sdfast.loading import digits_folder, load_pipeline_parts
from sdfast.masks import Images, images_and_masks
from sdfast.memory import total_memory_bytes
from sdfast.models import AutoencoderKL, CLIPTextEncoder, UNet2DCondition
from sdfast.models.checkpoint import CheckpointError
from sdfast.outpainting import grown_canvas
from sdfast.request import (
    DRAW_DEFAULTS,
    SIZE_MULTIPLE,
    DrawOptions,
    Request,
    as_prompts,
    check_strength,
    make_request,
)
from sdfast.sources import SourceImages, match_prompts
from sdfast.tokenizer import CLIPTokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GeneratedImages", "StableDiffusion"]


class StableDiffusion:
    """A latent diffusion model with its text encoder, ready to draw.

    Attributes:
        unet, vae, text_encoders, tokenizers: the parts; SDXL has two of each of the last two.
        scheduler_config: the noise schedule and the kind of prediction it was trained with.
        graphs: where the CUDA graphs of U-Net and VAE are kept, within its budget: 4 GiB, or a quarter of the
            device's memory where that is more. None runs both without. A new size of image costs a capture
            and compiles nothing; for what graphs do not see of a change of weights see `sdfast.graphs`.
    """

    def __init__(
        self,
        unet: UNet2DCondition,
        vae: AutoencoderKL,
        text_encoders: Sequence[CLIPTextEncoder],
        tokenizers: Sequence[CLIPTokenizer],
        scheduler_config: Mapping[str, Any],
        *,
        name: str = "",
        zero_empty_negative: bool = False,
        cuda_graphs: bool = True,
        vae_memory_bytes: int | None = None,
    ) -> None:
        """
        Args:
            unet, vae, text_encoders, tokenizers: all on one device; the VAE may have a wider dtype.
            scheduler_config: diffusers' scheduler_config.json.
            name: what the settings of a picture call the model.
            zero_empty_negative: without a negative prompt, condition on zeros instead of on the empty
                text, as SDXL base was trained.
            cuda_graphs: whether the steps of the U-Net and the VAE's decoder run by CUDA graphs (`graphs`),
                where the parts are on such a device.
            vae_memory_bytes: what the VAE may take for an image beside the weights, see `sdfast.tiled_vae`;
                the picture is the same to rounding. None sets no limit.

        Raises:
            ValueError: parts that do not fit each other.
        """
        self.unet, self.vae = unet, vae
        self.text_encoders, self.tokenizers = list(text_encoders), list(tokenizers)
        self.scheduler_config = dict(scheduler_config)
        self.name = name
        self.zero_empty_negative = zero_empty_negative
        self.graphs = _graph_cache(self.device) if cuda_graphs else None
        self.vae_memory_bytes = vae_memory_bytes
        encoders = 2 if self.is_xl else 1
        if not len(self.text_encoders) == len(self.tokenizers) == encoders:
            raise ValueError(
                f"text_encoders, tokenizers: got {len(self.text_encoders)} and {len(self.tokenizers)},"
                f" expected {encoders} of each for this U-Net"
            )
        channels = vae.config.latent_channels
        if unet.config.in_channels not in (channels, 2 * channels + 1):
            raise ValueError(
                f"unet: takes {unet.config.in_channels} channels, expected the {channels} of the VAE's latents, or"
                f" {2 * channels + 1} for inpainting; an upscaling model cannot draw from text alone"
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        tokenizer: str | Path | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cuda_graphs: bool = True,
        vae_memory_bytes: int | None = None,
    ) -> StableDiffusion:
        """Load a model.

        Args:
            path_or_id: a diffusers folder; a single .safetensors or .ckpt file in Stability AI's layout;
                a Hugging Face hub id; or the text "digits", the small model that ships with sdfast, which is
                refused where it could also mean a file or folder here: see `digits`.
            dtype: of weights and activations. The VAE of SDXL keeps float32 where its config asks for it.
            device: where it runs.
            tokenizer: of CLIP, for a single file, which holds none: its folder or hub id. When None, it is
                taken from the hub or its cache.
            variant: "fp16" reads the weight files of that name in a folder.
            revision: branch, tag or commit on the hub.
            cuda_graphs: False launches every kernel of every step from Python; changes nothing on CPU.
            vae_memory_bytes: what the VAE may take for an image; None sets no limit.

        Raises:
            ValueError: a tokenizer for a folder, or a variant of a single file.
            sdfast.models.checkpoint.CheckpointError: it is missing, damaged, unsafe, or not a
                text-to-image model; the message says which.
        """
        parts = load_pipeline_parts(
            path_or_id, dtype=dtype, device=torch.device(device), tokenizer=tokenizer, variant=variant,
            revision=revision,
        )  # fmt: skip
        try:
            return cls(**parts, cuda_graphs=cuda_graphs, vae_memory_bytes=vae_memory_bytes)
        except ValueError as error:
            raise CheckpointError(f"{path_or_id}: {error}") from error

    @classmethod
    def digits(cls, **options: Any) -> StableDiffusion:
        """The small model of handwritten digits that ships with sdfast. `options`: as `from_pretrained`."""
        return cls.from_pretrained(digits_folder(), **options)

    @property
    def is_xl(self) -> bool:
        """Whether this is SDXL: two text encoders, and the picture's sizes as conditioning."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents."""
        return self.unet.conv_in.weight.dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width that it was trained at."""
        size = self.unet.config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae.downsampling, width * self.vae.downsampling

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
            steps: reverse steps, 1 to 1000.
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
            prompts=match_prompts(as_prompts("prompt", prompt), len(sources)), negative_prompt=negative_prompt,
            height=sources.shape[2], width=sources.shape[3], steps=steps, guidance_scale=guidance_scale,
            seed=seed, num_images=num_images, batch_size=batch_size, time_ids=time_ids, output=output,
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
            mask: one, or one for each image, of the image's size: pictures, or a tensor (P or 1, 1, H, W) in [0, 1].
                White is painted; grey, from the middle on. None: what the images have transparent is painted.
            keep_original: put the image back where the mask is black, to the bit, in proportion where it is grey.
                Otherwise all of it has gone through the VAE.
            height, width: what pictures are resized to; not with keep_original.
            method: "auto", the model's own way if it takes a mask as input, otherwise "blend": what is known
                replaces the latents after every step; or "repaint", which repeats steps until the two fit
                (Lugmayr et al. 2022), in some eight times the time. Those two are for models without such an input.
            strength: how much of the schedule to run; 1 begins with noise where it paints, less with the image.
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
            check_one_size(image, height, width, self._size_multiple)
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
            left, right, top, bottom: pixels to add. The result has exactly these; where its sides are no multiples
                of 8, more is painted on the right and at the bottom, and cut off.
            feather: over how many of its pixels the image fades at the sides that grow; 0 leaves a hard seam.
            keep_original: put the image back, to the bit but where it fades.
            method, strength, sampler, jump_length, resamplings, on_step, options: as for `inpaint`.

        Raises:
            TypeError, ValueError: an argument is out of its range; nothing was computed then.
        """
        check_one_size(image)
        images = as_tensor(image, height=None, width=None, channels=self.vae.config.in_channels, multiple=1)
        sides = {"left": left, "right": right, "top": top, "bottom": bottom, "feather": feather}
        canvas = grown_canvas(
            images, keep_original=keep_original, multiple=self._size_multiple, downsampling=self.vae.downsampling,
            **sides,
        )  # fmt: skip
        if canvas.size is not None and options.get("output") == "latent":
            height, width = canvas.size
            raise ValueError(
                f"output: 'latent' cannot be cut to {height}x{width}; grow to multiples of {self._size_multiple}"
            )
        return self._inpaint(
            prompt, canvas, method=method, strength=strength, sampler=sampler, jump_length=jump_length,
            resamplings=resamplings, on_step=on_step, options=options,
            settings={**sides, "keep_original": bool(keep_original)},
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
        served_by = choose_method(method, self.unet.config.in_channels, self.vae.config.latent_channels)
        drawn = {**DRAW_DEFAULTS, **options}
        check_strength(strength, drawn["steps"])
        height, width = canvas.images.shape[2:]
        request = self._request(
            prompts=match_prompts(as_prompts("prompt", prompt), len(canvas.images)), height=height, width=width,
            **drawn,
        )  # fmt: skip
        if settings["keep_original"] and request.output == "latent":
            raise ValueError("keep_original: puts pixels back, which output='latent' has none of")
        if served_by == "repaint":
            sampler = sampler or "ddpm"
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

    def _check_takes_latents(self, what: str) -> None:
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"{what}: this U-Net takes {self.unet.config.in_channels} channels, a mask and a masked image beside the"
                " latents: it is an inpainting model, which cannot draw from text alone; use inpaint or outpaint"
            )

    @property
    def _size_multiple(self) -> int:
        return math.lcm(SIZE_MULTIPLE, self.vae.downsampling)

    @property
    def _vae_dtype(self) -> torch.dtype:
        return self.vae.decoder.conv_in.weight.dtype

    def _request(self, **arguments: Any) -> Request:
        """Check everything that can be wrong before anything is computed."""
        if arguments["time_ids"] is not None and not self.is_xl:
            raise ValueError("time_ids: only SDXL takes them")
        request = make_request(
            latent_channels=self.vae.config.latent_channels, downsampling=self.vae.downsampling, **arguments
        )
        if self.vae_memory_bytes is not None:  # which the VAE holds against what it needs
            return request
        # The two largest tensors that the decoder's last level holds at once.
        widths = self.vae.config.block_out_channels
        needed = (
            2 * request.height * request.width * widths[min(1, len(widths) - 1)] * self._vae_dtype.itemsize
        )
        available = total_memory_bytes(self.device)
        if available is not None and needed > available:
            raise ValueError(
                f"size: {request.height}x{request.width} needs more than {needed / 2**30:.0f} GiB,"
                f" this device has {available / 2**30:.0f} GiB"
            )
        return request

    def _generation(self, request: Request, plan: SamplingPlan) -> Generation:
        text = TextConditioner(
            self.text_encoders,
            self.tokenizers,
            is_xl=self.is_xl,
            zero_empty_negative=self.zero_empty_negative,
        )
        return Generation(request, plan, self.unet, self.vae, text, self.graphs, self.vae_memory_bytes)

    def _noise(self, request: Request, generators: Sequence[torch.Generator]) -> Tensor:
        return draw_noise(generators, request.latent_shape, self.dtype, self.device)

    def _settings(self, request: Request, sampler: str | None, **more: Any) -> dict[str, Any]:
        """What it takes to make the same images again. A list where the images differ, else one value."""
        values = {
            "prompt": _same(request.prompts),
            "negative_prompt": _same(request.negative_prompts),
            "steps": request.steps,
            "sampler": sampler_name(self.scheduler_config, sampler),
            "guidance_scale": request.guidance_scale,
            "seeds": request.seeds,
            "height": request.height,
            "width": request.width,
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "version": f"sdfast {__version__}",
        }
        return values | more


def _graph_cache(device: torch.device) -> GraphCache | None:
    """A cache for the graphs of U-Net and VAE; the decoder's keep all that it holds at once."""
    if device.type != "cuda":
        return None
    return GraphCache(max(BUDGET_BYTES, (total_memory_bytes(device) or 0) // 4))


def _same(values: Sequence[Any]) -> Any:
    """The one value that all have, or all of them."""
    return values[0] if len(set(values)) == 1 else list(values)
