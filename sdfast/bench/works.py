"""The models that are measured whole: sizes of Stable Diffusion 1.5, random weights.

Weights and inputs come from one seed, so that every process that builds a model has the same ones. Random
weights have the cost of trained ones and none of their pictures.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.models import AutoencoderKL, UNet2DCondition
from sdfast.models.config import config_from_dict


class Forward(nn.Module):
    """A model's method as a module from tensors to a tensor, which is what exporters take."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        ours = isinstance(model, (AutoencoderKL, UNet2DCondition))
        self.options = {} if ours else {"return_dict": False}

    def forward(self, *inputs: object) -> Tensor:
        result = getattr(self.model, self.method)(*inputs, **self.options)
        return result[0] if self.options else result


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of one model.

    Args:
        title: names it in tables.
        ours: our class.
        theirs: the name of diffusers' class.
        config: what differs from the defaults of `theirs`.
        method: what is called.
        shapes: of the inputs; () is the timestep.
    """

    title: str
    ours: type
    theirs: str
    config: dict[str, Any]
    method: str
    shapes: tuple[tuple[int, ...], ...]

    def _diffusers(self) -> Any:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # it warns of every .to(dtype)
        return getattr(diffusers, self.theirs)

    def make_theirs(self) -> Any:
        """diffusers' model in fp32, contiguous."""
        torch.manual_seed(0)
        return self._diffusers()(**self.config).eval()

    def make_ours(self, theirs: Any) -> nn.Module:
        """Our model on the weights of `theirs`, not on copies."""
        ours = self.make_ours_empty(theirs).eval()
        ours.load_state_dict(theirs.state_dict(), assign=True)
        return ours

    def make_ours_empty(self, theirs: Any) -> nn.Module:
        """Our model of the configuration of `theirs`, without memory for weights."""
        with torch.device("meta"):
            return self.ours(config_from_dict(self.ours, dict(theirs.config)))

    def weight_bytes(self, dtype: torch.dtype) -> int:
        with torch.device("meta"):
            model = self._diffusers()(**self.config)
        return dtype.itemsize * sum(weight.numel() for weight in model.parameters())

    def forward(self, model: nn.Module) -> Forward:
        return Forward(model, self.method)

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(shape, generator=generator).to(device, dtype)
            if shape
            else torch.tensor(500, device=device)
            for shape in self.shapes
        )

    @torch.inference_mode()
    def loop_inputs(self, model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> tuple[object, ...]:
        """`inputs` as `model`, ours or diffusers', is called with inside a sampling loop, step after step.

        Ours has computed what depends on the text alone, and on the timestep alone, before the loop: that is
        in none of its steps. diffusers' U-Net takes text and timestep themselves and projects them anew in
        every step, in eager mode and in every engine that compiles or imports it.
        """
        inputs = self.inputs(dtype, device)
        if not isinstance(model, UNet2DCondition):
            return inputs
        latents, timestep, text = inputs
        return latents, model.encode_time(timestep[None])[0], model.encode_context(text)


def _unet(size: int, tokens: int, width: int, what: str = "", **config: Any) -> Work:
    return Work(
        f"SD 1.5 U-Net{what}, guided step", UNet2DCondition, "UNet2DConditionModel",
        {"cross_attention_dim": width, **config}, "forward", ((2, 4, size, size), (), (2, tokens, width)),
    )  # fmt: skip


def _vae(size: int, widths: tuple[int, ...], layers: int, what: str = "") -> Work:
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
    }
    output = size * 2 ** (len(widths) - 1)
    return Work(
        f"VAE{what} decode to {output}x{output}", AutoencoderKL, "AutoencoderKL", config, "decode",
        ((1, 4, size, size),),
    )  # fmt: skip


def _narrow_unet(size: int, tokens: int, width: int, channels: tuple[int, int], what: str) -> Work:
    return _unet(
        size, tokens, width, what, block_out_channels=channels, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


# The U-Net's step is guided: two latents and two texts in a batch.
WORKS = {"unet": _unet(64, 77, 768), "vae": _vae(64, (128, 256, 512, 512), 2)}
# Two levels of the same kind, for a quick look.
QUICK_WORKS = {
    "unet": _narrow_unet(32, 77, 768, (320, 640), " of two levels"),
    "vae": _vae(64, (128, 256), 1, " of two levels"),
}
# As small as they get, for tests.
TINY_WORKS = {"unet": _narrow_unet(16, 7, 32, (32, 64), ", tiny"), "vae": _vae(16, (32, 64), 1, ", tiny")}
SIZES = {"full": WORKS, "quick": QUICK_WORKS, "tiny": TINY_WORKS}
