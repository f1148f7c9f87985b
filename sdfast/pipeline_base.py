"""What all ways of a pipeline to draw share: its parts, how they are loaded, the check of what is asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdfast import __version__
from sdfast._arguments import usable_device
from sdfast.conditioning import TextConditioner
from sdfast.diffusion import SamplingPlan, sampler_name
from sdfast.generation import Generation, draw_noise
from sdfast.graphs import BUDGET_BYTES, GraphCache
from sdfast.loaded_loras import LoadedLoras
from sdfast.loading import digits_folder, load_pipeline_parts
from sdfast.lora_names import PARTS
from sdfast.memory import total_memory_bytes
from sdfast.models import AutoencoderKL, CLIPTextEncoder, UNet2DCondition
from sdfast.models.checkpoint import CheckpointError
from sdfast.models.fingerprint import fingerprint
from sdfast.request import SIZE_MULTIPLE, Request, make_request
from sdfast.tokenizer import CLIPTokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class PipelineBase:
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
            scheduler_config: diffusers' scheduler_config.json. Of Stable Diffusion 1 and 2 no x̂_0 is clipped
                and steps are offset by 1, whatever it says.
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
        if not self.is_xl:  # which early models' files have otherwise; diffusers' pipelines do the same
            self.scheduler_config |= {"clip_sample": False, "steps_offset": 1}
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
        channels = vae.config.latent_channels
        if unet.config.in_channels not in (channels, 2 * channels + 1):
            raise ValueError(
                f"unet: takes {unet.config.in_channels} channels, expected the {channels} of the latents, or"
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
    ) -> Self:
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
            ValueError: a device that cannot be used, a dtype in which no model runs, a tokenizer for a
                folder, or a variant of a single file.
            sdfast.models.checkpoint.CheckpointError: it is missing, damaged, unsafe, or not a
                text-to-image model; the message says which.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype: got {dtype!r}, expected torch.float32, bfloat16, float16 or float64")
        parts = load_pipeline_parts(
            path_or_id, dtype=dtype, device=usable_device("device", device), tokenizer=tokenizer,
            variant=variant, revision=revision,
        )  # fmt: skip
        try:
            return cls(**parts, cuda_graphs=cuda_graphs, vae_memory_bytes=vae_memory_bytes)
        except ValueError as error:
            raise CheckpointError(f"{path_or_id}: {error}") from error

    @classmethod
    def digits(cls, **options: Any) -> Self:
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
        return self._loras.load(self._lora_parts, path, scale, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA, or all of them, out again: without any the weights are what they were, bit for bit.

        After an interruption it is still loaded, in part: unload it again.

        Raises:
            ValueError: none of that name is loaded.
        """
        self._loras.unload(name)

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are loaded, and their scales."""
        return dict(self._loras.scales)

    @property
    def _lora_parts(self) -> dict[str, nn.Module]:
        return dict(zip(PARTS, (self.unet, *self.text_encoders), strict=False))

    def fingerprint(self) -> str:
        """What tells the weights and the LoRAs in them from others of the same name, on every machine alike.

        Reads all weights, which takes seconds for a large model. Scales of LoRAs are not in it.
        """
        vae = ((f"vae.{name}", tensor) for name, tensor in self.vae.state_dict().items())
        return fingerprint(itertools.chain(self._loras.sources(self._lora_parts), vae))

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

    def _check_takes_latents(self, what: str) -> None:
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"{what}: this U-Net takes {self.unet.config.in_channels} channels, a mask's among them:"
                " it is an inpainting model, which cannot draw without them; use inpaint or outpaint"
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
