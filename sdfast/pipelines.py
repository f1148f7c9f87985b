"""Text to image, image to image: Stable Diffusion 1.x, 2.x, SDXL (Rombach et al. 2022, Podell et al. 2023).

    text to image:  x_T ~ N(0, I)               image to image:  x_s ~ q(x_s | E(image)), s = strength · T
    x_{t-1} = one reverse step with m = m(uncond) + g (m(text) - m(uncond)), down to x_0;    image = D(x_0)

Each image has a generator of its own, on the CPU, seeded by its own seed, and draws all its noise from
it in the order in which diffusers draws: the same seed gives the same picture, whatever the device and
the batch it is made in, and the one that diffusers makes. (The arithmetic may still round differently:
torch picks its algorithms by batch size, and the last bits of the latents follow.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdfast import __version__
from sdfast.conditioning import TextConditioner
from sdfast.diffusion import SamplingPlan, plan_from_config, sampler_name
from sdfast.generation import GeneratedImages, Generation, OnStep, draw_noise
from sdfast.graphs import BUDGET_BYTES, GraphCache
from sdfast.images import as_tensor
from sdfast.loaded_loras import LoadedLoras
from sdfast.loading import digits_folder, load_pipeline_parts
from sdfast.lora_names import PARTS
from sdfast.memory import total_memory_bytes
from sdfast.models import AutoencoderKL, CLIPTextEncoder, DiagonalGaussian, UNet2DCondition
from sdfast.models.checkpoint import CheckpointError
from sdfast.request import SIZE_MULTIPLE, Request, as_prompts, check_strength, make_request
from sdfast.tokenizer import CLIPTokenizer

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
        self._loras = LoadedLoras()
        encoders = 2 if self.is_xl else 1
        if not len(self.text_encoders) == len(self.tokenizers) == encoders:
            raise ValueError(
                f"text_encoders, tokenizers: got {len(self.text_encoders)} and {len(self.tokenizers)},"
                f" expected {encoders} of each for this U-Net"
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"unet: takes {unet.config.in_channels} channels, but the VAE's latents have"
                f" {vae.config.latent_channels}; an inpainting or upscaling model cannot draw from text alone"
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

    def load_lora(self, path: str | Path, scale: float = 1.0, *, name: str | None = None) -> str:
        """Merge a LoRA into the weights of U-Net and text encoders. Several add up.

        Args:
            path: a file as diffusers, peft or kohya's scripts write it, or the folder of the first two.
            scale: how strongly it counts.
            name: what to call it; the file's or folder's own name when None.

        Returns:
            Its name, for `unload_lora`; `loras` has them all.

        Raises:
            ValueError: the name is taken, or the scale is not finite.
            sdfast.models.checkpoint.CheckpointError: the file is missing, damaged, of another kind of adapter
                or for another model; the message names what does not fit. Nothing was changed then.
        """
        parts = dict(zip(PARTS, (self.unet, *self.text_encoders), strict=False))
        return self._loras.load(parts, path, scale, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA, or all of them, out again: without any the weights are what they were, bit for bit.

        Raises:
            ValueError: none of that name is loaded.
        """
        self._loras.unload(name)

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are loaded, and their scales."""
        return dict(self._loras.scales)

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

        def start(part: slice, generators: list[torch.Generator]) -> Tensor:
            noise = self._noise(request, generators) if latents is None else latents[part]
            return noise.to(self.device, self.dtype) * plan.initial_sigma

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
        check_strength(strength, steps)
        prompts = as_prompts("prompt", prompt)
        sources = as_tensor(
            image, height=height, width=width, channels=self.vae.config.in_channels,
            multiple=math.lcm(SIZE_MULTIPLE, self.vae.downsampling),
        )  # fmt: skip
        if len(prompts) == 1:
            prompts *= sources.shape[0]
        if sources.shape[0] not in (1, len(prompts)):
            raise ValueError(f"image: got {sources.shape[0]} images for {len(prompts)} prompts")
        request = self._request(
            prompts=prompts, negative_prompt=negative_prompt, height=sources.shape[2], width=sources.shape[3],
            steps=steps, guidance_scale=guidance_scale, seed=seed, num_images=num_images,
            batch_size=batch_size, time_ids=time_ids, output=output,
        )  # fmt: skip
        plan = plan_from_config(self.scheduler_config, request.steps, sampler=sampler, strength=strength)

        @functools.cache
        def posterior(index: int) -> DiagonalGaussian:
            one = sources[index : index + 1].to(self.device, self._vae_dtype)
            return self.vae.encode(one, memory_bytes=self.vae_memory_bytes)

        def start(part: slice, generators: list[torch.Generator]) -> Tensor:
            drawn = []
            for i, generator in zip(range(part.start, part.stop), generators, strict=True):
                q = posterior(0 if sources.shape[0] == 1 else i // num_images)
                drawn.append(q.sample(draw_noise([generator], q.mean.shape[1:], q.mean.dtype, self.device)))
            clean = torch.cat(drawn).float() * self.vae.config.scaling_factor
            noise = self._noise(request, generators).float()
            return plan.add_noise(clean, noise).to(self.dtype)

        settings = self._settings(request, sampler, strength=float(strength))
        return self._generation(request, plan).run(start, on_step, settings)

    @property
    def _vae_dtype(self) -> torch.dtype:
        return self.vae.decoder.conv_in.weight.dtype

    def _request(self, **arguments: Any) -> Request:
        """Check everything that can be wrong before anything is computed."""
        if arguments["time_ids"] is not None and not self.is_xl:
            raise ValueError("time_ids: only SDXL takes them")
        request = make_request(
            latent_channels=self.unet.config.in_channels, downsampling=self.vae.downsampling, **arguments
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
        if self.loras:
            more["loras"] = self.loras
        return values | more


def _graph_cache(device: torch.device) -> GraphCache | None:
    """A cache for the graphs of U-Net and VAE; the decoder's keep all that it holds at once."""
    if device.type != "cuda":
        return None
    return GraphCache(max(BUDGET_BYTES, (total_memory_bytes(device) or 0) // 4))


def _same(values: Sequence[Any]) -> Any:
    """The one value that all have, or all of them."""
    return values[0] if len(set(values)) == 1 else list(values)
