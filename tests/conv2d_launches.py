"""Convolutions at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast.ops import conv2d_triton as kernels


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
    "odd": _Case(2, (9, 8), 17, 30, residual=True, statistics=True),
    "odd, normalised": _Case(3, (20, 10), 65, 70, kernel=1, norm=True),
    "norm of a wide kernel": _Case(1, (128, 64), 33, 128, norm=True, residual=True),
}  # fmt: skip
_GRADIENT = {
    "sd15 64x64": _Case(4, (320,), 64, 320),
    "sd15 8x8": _Case(4, (1280,), 8, 1280),
    "sd15 downsample": _Case(4, (640,), 32, 640, stride=2),
    "odd": _Case(2, (9,), 17, 30, stride=2),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _forward(case: _Case, dtype: torch.dtype) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def image(channels: int, size: int) -> Tensor:
        return empty(case.images, channels, size, size).to(memory_format=torch.channels_last)

    def call() -> object:
        x, *skip = (image(c, case.size) for c in case.channels)
        channels, kernel = sum(case.channels), case.kernel
        size = case.size * 2 if case.upsample else -(-case.size // case.stride)
        if case.upsample:
            weight, geometry = (
                empty(4, case.out_channels, 2, 2, channels).permute(0, 1, 4, 2, 3),
                kernels.upsampled_geometry(x),
            )
        else:
            weight = empty(case.out_channels, kernel, kernel, channels).permute(0, 3, 1, 2)
            geometry = kernels.forward_geometry(x, (kernel, kernel), case.stride, (kernel // 2,) * 4)
        y = image(case.out_channels, size)
        norm = None
        if case.norm:
            mean = torch.empty(case.images, 10, device="cuda")
            norm = kernels.Norm(mean, mean, empty(channels), empty(channels), silu=False)
        return kernels.convolve(
            x, weight, y, geometry, skip=skip[0] if skip else None, bias=empty(case.out_channels),
            time_embedding=empty(case.images, case.out_channels) if case.time_embedding else None,
            residual=image(case.out_channels, size) if case.residual else None, norm=norm,
            statistics=(2, 1e-5) if case.statistics else None,
        )  # fmt: skip

    return call


def _gradient(case: _Case, dtype: torch.dtype) -> Callable[[], object]:
    def image(channels: int, size: int) -> Tensor:
        empty = torch.empty(case.images, channels, size, size, device="cuda", dtype=dtype)
        return empty.to(memory_format=torch.channels_last)

    def call() -> None:
        dy, dx = image(case.out_channels, -(-case.size // case.stride)), image(case.channels[0], case.size)
        weight = torch.empty(
            case.out_channels, case.kernel, case.kernel, case.channels[0], device="cuda", dtype=dtype
        )
        weight = weight.permute(0, 3, 1, 2)
        for part, geometry in kernels.gradient_geometries(weight, dx.shape[2:], case.stride, (1, 1, 1, 1)):
            kernels.convolve(dy, part, dx, geometry)

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
