"""Whole models for the GPU: SD 1.5, SDXL and their VAE at real sizes, and the sides that run them.

Weights are drawn by the names of parameters, so that our classes and diffusers', and every process, have the
same ones. Where diffusers is not installed our own class under `use_backend("torch")` stands for it: the same
arithmetic by torch's kernels alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast import use_backend
from sdfast.graphs import graphed
from sdfast.models import AutoencoderKL, UNet2DCondition
from sdfast.models.config import config_from_dict

Run = Callable[[], Tensor]
# Best candidates first; "sdfast" is with what `dispatch.py` chooses, the last with every Triton kernel.
SIDES = ("eager", "eager channels_last", "sdfast", "sdfast triton", "compiled")
OURS = {"sdfast": None, "sdfast triton": "triton"}
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
CHECKED = slice(None, None, 23)  # of the parameters: whose gradients are compared

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}


def _vae_config(widths: tuple[int, ...], layers: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
    }


VAE = _vae_config((128, 256, 512, 512), 2)
TINY_VAE = _vae_config((32, 64), 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of one model.

    Args:
        title: names it in tables.
        kind: "step" of a U-Net with guidance, "decode", "encode", or "train": forward, backward and AdamW.
        config: what differs from the defaults of diffusers' class.
        images: how many; a guided step has two latents for each.
        size: of the latent, or of the image that is encoded.
        tokens: of each text.
    """

    title: str
    kind: str
    config: Mapping[str, Any]
    images: int
    size: int
    tokens: int = 77

    @property
    def ours(self) -> type:
        return AutoencoderKL if self.kind in ("decode", "encode") else UNet2DCondition

    @property
    def samples(self) -> int:
        """Rows of the batch."""
        return 2 * self.images if self.kind == "step" else self.images

    def inputs(self, dtype: torch.dtype, device: str, channels_last: bool) -> dict[str, Tensor]:
        """What every side is given; a guided step has two texts, whatever the number of images."""
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = randn(self.samples, 3 if self.kind == "encode" else 4, self.size, self.size)
        inputs = {"x": x.to(memory_format=layout)}
        if self.ours is AutoencoderKL:
            return inputs
        texts = self.samples if self.kind == "train" else 2
        inputs["text"] = randn(texts, self.tokens, self.config["cross_attention_dim"])
        if self.kind == "train":
            inputs["timesteps"] = torch.randint(1000, (self.samples,), generator=generator).to(device)
            inputs["target"] = randn(*x.shape).to(memory_format=layout)
        else:
            inputs["timesteps"] = torch.tensor(500, device=device)
        if "addition_embed_type" in self.config:
            pooled = self.config["projection_class_embeddings_input_dim"] - 6 * 256
            inputs["text_embeds"] = randn(texts, pooled)
            inputs["time_ids"] = torch.tensor([[8.0 * self.size] * 2 + [0.0] * 2 + [8.0 * self.size] * 2])
            inputs["time_ids"] = inputs["time_ids"].to(device, dtype).repeat(texts, 1)
        return inputs


# The most important first: a run that is cut short has these.
WORKS = {
    "sd15": Work("SD 1.5 U-Net, guided step, 512x512", "step", SD15, 1, 64),
    "decode512": Work("VAE decode to 512x512", "decode", VAE, 1, 64),
    "sdxl": Work("SDXL U-Net, guided step, 1024x1024", "step", SDXL, 1, 128),
    "train": Work("SD 1.5 U-Net, training step, 8 images of 512x512, bf16 weights", "train", SD15, 8, 64),
    "sd15_b4": Work("SD 1.5 U-Net, guided step, 4 images of 512x512", "step", SD15, 4, 64),
    "sd15_768": Work("SD 1.5 U-Net, guided step, 768x768", "step", SD15, 1, 96),
    "decode1024": Work("VAE decode to 1024x1024", "decode", VAE, 1, 128),
    "encode512": Work("VAE encode of 512x512", "encode", VAE, 1, 512),
    "sd15_768_b4": Work("SD 1.5 U-Net, guided step, 4 images of 768x768", "step", SD15, 4, 96),
    "encode1024": Work("VAE encode of 1024x1024", "encode", VAE, 1, 1024),
}
TINY_WORKS = {
    "sd15": Work("tiny U-Net, guided step", "step", TINY_UNET, 1, 8, 7),
    "train": Work("tiny U-Net, training step", "train", TINY_UNET, 2, 8, 7),
    "decode512": Work("tiny VAE, decode", "decode", TINY_VAE, 1, 4),
    "encode512": Work("tiny VAE, encode", "encode", TINY_VAE, 1, 8),
}


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """In fp32, each from its name: of the spread that torch's own initialisation has, norms about one."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if parameter.dim() > 1:
            parameter.copy_(drawn / math.sqrt(3 * parameter[0].numel()))
        else:
            parameter.copy_(0.05 * drawn + (1.0 if name.endswith("weight") else 0.0))


def make_model(work: Work, ours: bool, dtype: torch.dtype, device: str, channels_last: bool) -> nn.Module:
    """Our class, or diffusers' where that is installed, with the weights that all sides have."""
    with torch.device("meta"):
        if ours or not HAS_DIFFUSERS:
            model = work.ours(config_from_dict(work.ours, work.config))
        else:
            import diffusers

            diffusers.logging.set_verbosity_error()  # it warns of every .to(dtype)
            model = getattr(diffusers, work.ours.diffusers_class)(**work.config)
    if any(True for _ in model.buffers()):
        raise RuntimeError(f"{type(model).__name__} has buffers, which nobody would fill")
    model = model.to_empty(device=device).train(work.kind == "train")
    _draw_weights(model)
    model = model.to(dtype).requires_grad_(work.kind == "train")
    return model.to(memory_format=torch.channels_last) if channels_last else model


def plain_forward(model: nn.Module, work: Work) -> Callable[..., Tensor]:
    """A function of `_each_image`'s values that projects text and timestep itself, as in diffusers' loop."""
    options = {} if isinstance(model, AutoencoderKL | UNet2DCondition) else {"return_dict": False}

    def first(result: Any) -> Any:
        return result[0] if options else result

    def encode(x: Tensor) -> Tensor:
        return first(model.encode(x, **options)).mean

    def decode(z: Tensor) -> Tensor:
        return first(model.decode(z, **options))

    def denoise(x: Tensor, text: Tensor, timesteps: Tensor, *added: Tensor) -> Tensor:
        more = {"text_embeds": added[0], "time_ids": added[1]} if added else None
        name = "added_cond_kwargs" if options else "added_cond"
        return first(model(x, timesteps, text, **{name: more}, **options))

    return {"encode": encode, "decode": decode}.get(work.kind, denoise)


def _each_image(inputs: dict[str, Tensor], work: Work) -> list[Tensor]:
    """In the order of `plain_forward`, a row of text and sizes for every image of the batch."""
    values = []
    for name, value in inputs.items():
        if name in ("text", "text_embeds", "time_ids") and work.kind == "step":
            value = value.repeat_interleave(work.images, 0)
        if name != "target":
            values.append(value)
    return values


@dataclasses.dataclass(frozen=True)
class Call:
    """A side's call of a work.

    Attributes:
        run: makes it as it is timed.
        direct: makes it without a graph, for the profiler's and the synchronisation's sake.
        result: what is compared: the output, or of a training step the gradients, before any weight moves.
    """

    run: Run
    direct: Run
    result: Run


def make_call(
    work: Work, side: str, dtype: torch.dtype, device: str, compile_mode: str = "max-autotune"
) -> Call:
    """Build a side. "reference" is eager in whatever dtype is given, contiguous."""
    ours, channels_last = side in OURS, side not in ("reference", "eager")
    model = make_model(work, ours, dtype, device, channels_last)
    inputs = work.inputs(dtype, device, channels_last)
    backend = OURS.get(side, "torch")
    if work.kind == "train":
        return _training_call(model, work, inputs, backend, side, compile_mode)
    direct: Run
    if ours and work.kind == "step":
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        with torch.inference_mode(), _backend(backend):
            time = model.encode_time(inputs["timesteps"][None], added or None)[0]
            context = model.encode_context(inputs["text"])
        function: Callable[..., Tensor] = model.forward
        arguments: list[Any] = [inputs["x"], time, context]
    else:
        function, arguments = plain_forward(model, work), _each_image(inputs, work)
    direct = _in(backend, lambda: function(*arguments))
    if ours:
        replayed = graphed(function, model)
        run = _in(backend, lambda: replayed(*arguments))
    elif side == "compiled":
        compiled = torch.compile(function, mode=compile_mode, fullgraph=True)
        run = _in(backend, lambda: _marked(compiled, arguments))
    else:
        run = direct
    return Call(run, direct, run)


def _marked(function: Callable[..., Tensor], arguments: list[Any]) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return function(*arguments)


def _backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name is None else use_backend(name)


def _in(backend: str | None, call: Run) -> Run:
    """`call` under a backend, without gradients."""

    @functools.wraps(call)
    def run() -> Tensor:
        with torch.inference_mode(), _backend(backend):
            return call()

    return run


def _training_call(
    model: nn.Module,
    work: Work,
    inputs: dict[str, Tensor],
    backend: str | None,
    side: str,
    compile_mode: str,
) -> Call:
    """Forward, squared error of a predicted noise, backward, AdamW; one by one unless compiled."""
    function, arguments = plain_forward(model, work), _each_image(inputs, work)
    if side == "compiled":
        function = torch.compile(function, mode=compile_mode, fullgraph=True)
    # fp32 needs the memory of one image at a time; the mean of their gradients is that of the batch.
    parts = work.images if side == "reference" else 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    checked = [p for _, p in sorted(model.named_parameters())][CHECKED]

    def gradients() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        rows = [t.chunk(parts) for t in (*arguments, inputs["target"])]
        with _backend(backend):
            for *given, target in zip(*rows, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                loss = F.mse_loss(function(*given), target) / parts
                loss.backward()
        return loss.detach()

    def result() -> Tensor:
        gradients()
        return torch.cat([p.grad.flatten().float() for p in checked if p.grad is not None])

    def run() -> Tensor:
        loss = gradients()
        optimizer.step()
        return loss

    return Call(run, run, result)
