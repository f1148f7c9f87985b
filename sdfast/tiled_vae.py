"""A VAE's decoder and encoder in horizontal bands, for images that do not fit in memory as a whole.

    image = sdfast.tiled_vae.decode(vae, latents, memory_bytes=3 * 10**9)

The result is that of the whole image to rounding: a convolution reads the rows beyond its band, GroupNorm
takes its statistics over all bands, attention sees all pixels: there are no seams, and no tile is unlike
its neighbour. Price: what does not fit in memory is computed again, up to three times (`_tiled_resnet`).

`vae` is our AutoencoderKL or diffusers', whose modules have the same names. For inference only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdfast import ops, packing
from sdfast._bands import Bands, Size
from sdfast._tiled_resnet import ResnetStage
from sdfast._tiled_stages import AttentionStage, Choice, ConvStage, HeadStage, Stage
from sdfast.memory import freed_memory_returned

# The modules whose weights are read, and what they must be, torch's or ours: wrapped (LoRA, for example) they
# would do more than their weights say.
_READ = {
    **dict.fromkeys(("conv_in", "conv_out", "conv", "conv1", "conv2", "conv_shortcut"), nn.Conv2d),
    **dict.fromkeys(("quant_conv", "post_quant_conv"), nn.Conv2d),
    **dict.fromkeys(("norm1", "norm2", "conv_norm_out", "group_norm"), nn.GroupNorm),
    **dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), nn.Linear),
}
_STOCK_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # diffusers', of attention as everybody knows it


@torch.no_grad()
def decode(vae: Any, z: Tensor, *, memory_bytes: int) -> Tensor:
    """Latents to images.

    Args:
        vae: an AutoencoderKL, ours or diffusers'.
        z: unscaled latents (N, latent_channels, h, w), in the dtype and on the device of its weights.
        memory_bytes: the most that the call may take beyond what is there before: bands, result, and the
            copies of weights that kernels make, which are dropped when their layer is done. What fits decides
            how much is computed again. It is kept to a few MiB where the C library gives freed memory back,
            which glibc is asked to meanwhile (`sdfast.memory.freed_memory_returned`).

    Returns:
        Images (N, out_channels, H, W), contiguous.

    Raises:
        ValueError: memory_bytes is too little, and how much would do; `vae` is no such model; z has a wrong
            shape or asks for a gradient.
        TypeError: an argument has a wrong type or dtype.
    """
    decoder = _half(vae, "decoder")
    channels = _input_channels(vae.post_quant_conv, decoder)
    size = _check_input("z", z, channels, decoder)
    stages = _stages(decoder, size._replace(channels=decoder.conv_in.in_channels), _up_stages)

    def before(one: Tensor) -> Tensor:
        return _pointwise(vae.post_quant_conv, one)

    return _run(stages, z, memory_bytes, before)


@torch.no_grad()
def encode(vae: Any, x: Tensor, *, memory_bytes: int) -> Tensor:
    """Images to the moments of their latents.

    Args:
        vae: an AutoencoderKL, ours or diffusers'.
        x: images (N, in_channels, H, W) in [-1, 1], in the dtype and on the device of its weights.
        memory_bytes: as for `decode`.

    Returns:
        (N, 2 latent_channels, h, w): mean and log-variance, as DiagonalGaussian, or diffusers'
        DiagonalGaussianDistribution, takes them.

    Raises:
        ValueError, TypeError: as for `decode`.
    """
    encoder = _half(vae, "encoder")
    stages = _stages(encoder, _check_input("x", x, encoder.conv_in.in_channels, encoder), _down_stages)
    moments = _run(stages, x, memory_bytes, lambda one: one)
    return _pointwise(vae.quant_conv, moments)


def _run(stages: Sequence[Stage], x: Tensor, memory_bytes: int, before: Callable[[Tensor], Tensor]) -> Tensor:
    """The stages on each image in turn."""
    result = stages[-1].result
    images = x.shape[0]
    # Of several images the results are kept together.
    kept = images * result.nbytes if images > 1 else 0
    choices = _plan(stages, operator.index(memory_bytes), kept)
    results = x.new_empty((images, *result[:3])) if images != 1 else None
    with freed_memory_returned():
        for i in range(images):
            bands = Bands(before(x[i : i + 1]))
            for stage, choice in zip(stages, choices, strict=True):
                with packing.temporary(stage.weights):
                    bands = stage.run(bands, choice)
            (image,) = bands.rows(0, result.height)
            if results is None:
                return image
            results[i : i + 1] = image
    return cast(Tensor, results)


def _plan(stages: Sequence[Stage], memory_bytes: int, kept: int) -> list[Choice]:
    """The cheapest way to do each stage within the budget."""
    choices, lacking = _try_plan(stages, memory_bytes - kept)
    if lacking is None:
        return choices
    least = lacking
    while (more := _try_plan(stages, least)[1]) is not None:
        least = more
    size = stages[-1].result
    raise ValueError(
        f"memory_bytes: got {memory_bytes}, but {size.height}x{size.width} needs at least {least + kept};"
        " give as much, or a smaller image"
    )


def _try_plan(stages: Sequence[Stage], budget: int) -> tuple[list[Choice], int | None]:
    """The choices, and the bytes that the first stage without one would do with; None where all have one."""
    choices: list[Choice] = []
    rows = stages[0].source.height
    for stage in stages:
        possible = list(stage.choices(min(rows, stage.source.height)))
        affordable = [choice for choice in possible if choice.peak_bytes <= budget]
        if not affordable:
            return choices, min(choice.peak_bytes for choice in possible)
        best = min(affordable, key=lambda choice: choice.cost)
        choices.append(best)
        rows = best.rows
    return choices, None


# From the modules to the stages.


def _stages(half: Any, size: Size, middle: Callable[[Any, list[Stage]], None]) -> list[Stage]:
    """conv_in, then what `middle` adds, then the last norm and convolution."""
    stages: list[Stage] = [ConvStage(half.conv_in, size, (1, 1, 1, 1))]
    middle(half, stages)
    stages.append(HeadStage(half.conv_norm_out, half.conv_out, stages[-1].result))
    return stages


def _add_mid_block(block: Any, stages: list[Stage]) -> None:
    first, second = block.resnets
    stages.append(ResnetStage(first, stages[-1].result))
    attention = (block.attentions or [None])[0]
    if attention is not None:
        stages.append(AttentionStage(attention, stages[-1].result))
    stages.append(ResnetStage(second, stages[-1].result))


def _up_stages(decoder: Any, stages: list[Stage]) -> None:
    _add_mid_block(decoder.mid_block, stages)
    upsampler = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            stages.append(ResnetStage(resnet, stages[-1].result, upsampler))
            upsampler = None
        if block.upsamplers is not None:
            upsampler = block.upsamplers[0].conv
    if upsampler is not None:
        raise ValueError("vae: its decoder ends with an upsampler; expected an AutoencoderKL's")


def _down_stages(encoder: Any, stages: list[Stage]) -> None:
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            stages.append(ResnetStage(resnet, stages[-1].result))
        if block.downsamplers is not None:
            conv = block.downsamplers[0].conv
            # Without padding of its own it pads right and below, as LDM's VAE does.
            sides = (1, 1, 1, 1) if conv.padding[0] else (0, 1, 0, 1)
            stages.append(ConvStage(conv, stages[-1].result, sides))
    _add_mid_block(encoder.mid_block, stages)


# Checks: weights are read here and modules not called, so nothing may hang on their being called.


def _half(vae: Any, name: str) -> Any:
    """`vae.encoder` or `vae.decoder`, if it is made of what is known here.

    Raises:
        ValueError: it is not, or a module is hooked, replaced or without weights; names it.
    """
    half = getattr(vae, name, None)
    parts = ("conv_in", "mid_block", "conv_norm_out", "conv_out")
    if not isinstance(half, nn.Module) or not all(hasattr(half, part) for part in parts):
        raise ValueError(f"vae: got {type(vae).__name__}, expected an AutoencoderKL, ours or diffusers'")
    pointwise = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[name]
    modules = dict(half.named_modules(prefix=name))
    if getattr(vae, pointwise, None) is not None:
        modules[pointwise] = getattr(vae, pointwise)
    for path, module in modules.items():
        why = _why_not(path, module)
        if why is not None:
            raise ValueError(f"vae: {path} {why}; bands cannot serve it, call the model itself")
    return half


def _why_not(path: str, module: Any) -> str | None:
    """What of a module would be lost if its weights alone were read."""
    kind = next((kind for name, kind in _READ.items() if f".{path}".endswith(f".{name}")), None)
    if kind is not None and type(module) is not kind and not _is_ours(module, kind):
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "has hooks or a forward of its own (offloading, for example)"
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return "has its weights elsewhere"
    if kind is None and next(module.parameters(recurse=False), None) is not None:
        return f"is a {type(module).__name__}, which no AutoencoderKL has"
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor).__name__ not in _STOCK_PROCESSORS:
        return f"has the attention processor {type(processor).__name__}"
    if (
        getattr(module, "time_emb_proj", None) is not None
        or getattr(module, "spatial_norm", None) is not None
    ):
        return "is conditioned"
    if (
        getattr(module, "output_scale_factor", 1.0) != 1.0
        or getattr(module, "rescale_output_factor", 1.0) != 1.0
    ):
        return "scales its result"
    activation = getattr(module, "nonlinearity", None) or getattr(module, "conv_act", None)
    if activation is not None and not isinstance(activation, nn.SiLU):
        return f"has the activation {type(activation).__name__}, not SiLU"
    return None


def _is_ours(module: nn.Module, kind: type) -> bool:
    """Whether it is the module of our models that does what torch's of this kind does."""
    return isinstance(module, kind) and type(module).__module__ == "sdfast.models.layers"


def _input_channels(conv: nn.Conv2d | None, decoder: Any) -> int:
    return cast(int, (decoder.conv_in if conv is None else conv).in_channels)


def _check_input(name: str, x: object, channels: int, half: Any) -> Size:
    """The size of one image of x."""
    weight = half.conv_in.weight
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (N, {channels}, height, width)")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {weight.dtype} as the weights")
    if x.device != weight.device:
        raise ValueError(f"{name}: is on {x.device}, expected {weight.device} as the weights")
    if x.requires_grad:
        raise ValueError(f"{name}: requires a gradient, and bands are for inference; pass {name}.detach()")
    return Size(channels, x.shape[2], x.shape[3], x.element_size())


def _pointwise(conv: nn.Conv2d | None, x: Tensor) -> Tensor:
    """A 1x1 convolution, where there is one."""
    return x if conv is None else cast(Tensor, ops.conv2d(x, conv.weight, conv.bias))
