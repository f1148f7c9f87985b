"""The convolutions of Stable Diffusion 1.5 (U-Net, VAE decoder), channels last on both sides.

"exact" is ours under `sdfast.use_numerics("exact")`; "sdfast" is what a model gets, which may be Winograd's
algorithm, at most 5e-5 off. Rates count the direct algorithm's operations. Least traffic: x, weight, y once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast
import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, Way
from sdfast.ops.conv2d import conv2d_torch

# N, C_in, size, C_out, kernel, stride, and whether a nearest-2x upsample comes before.
UNET = (
    *((2, channels, 64, 320, 3, 1, False) for channels in (320, 640, 960)),
    (2, 320, 64, 320, 3, 2, False), (2, 960, 64, 320, 1, 1, False),
    *((2, channels, 32, 640, 3, 1, False) for channels in (320, 640, 960, 1280, 1920)),
    (2, 640, 32, 640, 3, 2, False), (2, 640, 32, 640, 3, 1, True),
    *((2, channels, 16, 1280, 3, 1, False) for channels in (640, 1280, 1920, 2560)),
    (2, 1280, 16, 1280, 3, 1, True),
    *((2, channels, 8, 1280, 3, 1, False) for channels in (1280, 2560)), (2, 1280, 8, 1280, 3, 1, True),
)  # fmt: skip
VAE = (
    (1, 512, 64, 512, 3, 1, False), (1, 512, 64, 512, 3, 1, True), (1, 512, 128, 512, 3, 1, False),
    (1, 512, 128, 512, 3, 1, True), (1, 512, 256, 256, 3, 1, False), (1, 256, 256, 256, 3, 1, False),
    (1, 256, 256, 256, 3, 1, True), (1, 256, 512, 128, 3, 1, False), (1, 128, 512, 128, 3, 1, False),
)  # fmt: skip

Setting = tuple[int, int, int, int, int, int, bool]


def make(setting: Setting, dtype: torch.dtype, device: str) -> Case:
    images, channels, size, out_channels, kernel, stride, upsample = setting
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(images, channels, size, size).to(device, dtype).to(memory_format=last)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    weight, bias = (
        weight.to(device, dtype).to(memory_format=last),
        torch.randn(out_channels).to(device, dtype),
    )
    padding = (kernel // 2,) * 4

    def ours() -> list[Tensor]:
        y = ops.conv2d(x, weight, bias, stride, kernel // 2, upsample=upsample)
        assert isinstance(y, Tensor)
        return [y]

    def ours_exact() -> list[Tensor]:
        with sdfast.use_numerics("exact"):
            return ours()

    few = slice(0, 16)  # of the channels, in a corner of one picture, decide for all

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        return [results[0][:1, few, :3, :3]]

    def exact() -> list[Tensor]:
        wide = x[:1, :, :8, :8].double(), weight[few].double(), bias[few].double()
        return part([conv2d_torch(*wide, stride, padding, upsample=upsample)])

    def limit(eager_error: float) -> float:
        return 5e-5 if dtype == torch.float32 else 1.5 * eager_error + torch.finfo(dtype).eps

    ways: dict[str, Way] = {
        "eager": lambda: [conv2d_torch(x, weight, bias, stride, padding, upsample=upsample)],
        "sdfast": ours,
        "exact": ours_exact,
    }
    results = images * (size * (2 if upsample else 1) // stride) ** 2
    elements = x.numel() + weight.numel() + results * out_channels
    return Case(
        f"{images}x{channels}x{size}x{size} to {out_channels}", dtype, ways, exact,
        flops=2 * results * weight.numel(), nbytes=elements * dtype.itemsize, part=part, limit=limit,
        details={
            "kernel": f"{kernel}x{kernel}" + (f" stride {stride}" if stride > 1 else ""),
            "upsample": upsample,
        },
    )  # fmt: skip


def _name(setting: Setting) -> str:
    images, channels, size, out_channels, kernel, stride, upsample = setting
    name = f"{images}x{channels}x{size}x{size} to {out_channels} {kernel}x{kernel}"
    return name + (f" stride {stride}" if stride > 1 else "") + upsample * " upsample"


_QUICK = (UNET[0], UNET[13], VAE[0])
SPECS = [
    Spec("conv2d", model, _name(setting), functools.partial(make, setting), quick=setting in _QUICK)
    for model, settings in (("U-Net", UNET), ("VAE", VAE))
    for setting in settings
]
