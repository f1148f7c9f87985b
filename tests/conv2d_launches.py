"""Convolutions at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded.

And of size 1, which Triton makes a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast.ops.conv2d_triton import convolve, gradient_geometries


class _Case(NamedTuple):
    """N, C and C2, H and W, O, the kernel, what is added and what is asked for."""

    images: int
    channels: tuple[int, ...]
    size: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    upsample: bool = False
    time_embedding: bool = False
    residual: bool = False
    statistics: bool = False
    norm: bool = False
    silu: bool = False


_FORWARD = {
    "sd15 conv1 64x64": _Case(2, (320,), 64, 320, time_embedding=True, statistics=True),
    "sd15 conv2 32x32": _Case(2, (640,), 32, 640, residual=True, statistics=True),
    "sd15 conv2 8x8": _Case(2, (1280,), 8, 1280, residual=True, statistics=True),
    "sd15 conv1 16x16 of two": _Case(2, (1280, 640), 16, 1280, time_embedding=True, statistics=True),
    "sd15 shortcut 64x64 of two": _Case(2, (640, 320), 64, 320, kernel=1),
    "sd15 conv_in": _Case(2, (4,), 64, 320),
    "sd15 conv_out": _Case(2, (320,), 64, 4),
    "sd15 downsample": _Case(2, (320,), 64, 320, stride=2, statistics=True),
    "sd15 upsample 8x8": _Case(2, (1280,), 8, 1280, upsample=True),
    "sd15 proj_in 64x64": _Case(2, (320,), 64, 320, kernel=1, norm=True),
    "sdxl conv1 128x128": _Case(2, (320,), 128, 320, time_embedding=True, statistics=True),
    "sdxl conv1 32x32 of two": _Case(2, (1280, 1280), 32, 1280, time_embedding=True, statistics=True),
    "vae conv 512x512": _Case(1, (128,), 512, 128, residual=True, statistics=True),
    "vae conv 64x64": _Case(1, (512,), 64, 512, statistics=True),
    "vae upsample 128x128": _Case(1, (512,), 128, 512, upsample=True, statistics=True),
    "vae conv_out": _Case(1, (128,), 512, 3),
    "of one": _Case(1, (1,), 1, 1, time_embedding=True, residual=True),
    "one pixel of two, kernel 1": _Case(1, (1, 1), 1, 1, kernel=1, norm=True, silu=True),
    "one pixel, K split": _Case(1, (1280,), 1, 1280, residual=True, statistics=True),
    "one pixel, upsample": _Case(1, (1,), 1, 2, upsample=True, statistics=True),
    "one pixel, stride 2": _Case(1, (64,), 1, 64, stride=2),
    "odd": _Case(2, (9, 8), 17, 30, residual=True, statistics=True),
    "odd, normalised": _Case(3, (20, 10), 65, 70, kernel=1, norm=True),
    "norm of a narrow kernel": _Case(1, (128,), 33, 3, norm=True, silu=True),
    "norm of a wide kernel": _Case(1, (128, 64), 33, 128, norm=True, silu=True, residual=True),
}
_GRADIENT = {
    "sd15 64x64": _Case(4, (320,), 64, 320),
    "sd15 8x8": _Case(4, (1280,), 8, 1280),
    "sd15 downsample": _Case(4, (640,), 32, 640, stride=2),
    "odd": _Case(2, (9,), 17, 30, stride=2),
    "of one": _Case(1, (1,), 1, 1),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _forward(case: _Case, dtype: torch.dtype) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def image(channels: int, size: int) -> Tensor:
        return empty(case.images, channels, size, size).to(memory_format=torch.channels_last)

    def call() -> object:
        x, *skip = (image(c, case.size) for c in case.channels)
        channels, kernel, out_channels = sum(case.channels), case.kernel, case.out_channels
        size = case.size * 2 if case.upsample else -(-case.size // case.stride)
        weight = empty(out_channels, kernel, kernel, channels).permute(0, 3, 1, 2)
        if case.upsample:
            weight = empty(4, out_channels, 2, 2, channels)
        norm = []
        if case.norm:
            mean = torch.empty(case.images, 10, device="cuda")
            norm = [mean, mean, empty(channels), empty(channels)]
        operands = (
            x, weight, empty(out_channels), case.stride, [kernel // 2] * 4, case.upsample,
            empty(case.images, out_channels) if case.time_embedding else None,
            image(out_channels, size) if case.residual else None, skip[0] if skip else None, norm, case.silu,
        )  # fmt: skip
        if case.statistics:
            return torch.ops.sdfast.conv2d_statistics_triton(*operands, 2, 1e-5)
        return torch.ops.sdfast.conv2d_kernel_triton(*operands)

    return call


def _gradient(case: _Case, dtype: torch.dtype) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype).permute(0, 3, 1, 2)

    def call() -> None:
        (channels,), small = case.channels, -(-case.size // case.stride)
        dy = empty(case.images, small, small, case.out_channels)
        dx = empty(case.images, case.size, case.size, channels)
        weight = empty(case.out_channels, case.kernel, case.kernel, channels)
        for part, geometry in gradient_geometries(weight, dx.shape[2:], case.stride, (1, 1, 1, 1)):
            convolve(dy, part, dx, geometry)

    return call


def _exactly(call: Callable[[], object]) -> Callable[[], object]:
    """The call, in fp32 that is not rounded to TF32."""

    def exact() -> object:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return call()

    return exact


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name; a name ends with the dtype."""
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in _DTYPES.items():
        for what, case in _FORWARD.items():
            cases[f"conv2d {what} {name}"] = _forward(case, dtype)
        for what, case in _GRADIENT.items():
            cases[f"conv2d input gradient {what} {name}"] = _gradient(case, dtype)
    for what in ("sd15 conv1 16x16 of two", "vae upsample 128x128", "odd, normalised", "odd"):
        cases[f"conv2d {what}, exact fp32"] = _exactly(_forward(_FORWARD[what], torch.float32))
    return cases
