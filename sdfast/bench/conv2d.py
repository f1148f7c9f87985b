"""The convolutions of Stable Diffusion 1.5 (U-Net, VAE decoder), channels last on both sides.

"exact" is ours under `sdfast.use_numerics("exact")`; "sdfast" is what a model gets, which may be Winograd's
algorithm, at most 5e-5 off, in training 1e-5. Rates count the direct algorithm's operations. Least traffic:
x, weight, y once; with gradients then x, weight, dy and two gradients, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast
import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, gradients
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
    (2, 320, 64, 4, 3, 1, False),
)  # fmt: skip
VAE = (
    (1, 512, 64, 512, 3, 1, False), (1, 512, 64, 512, 3, 1, True), (1, 512, 128, 512, 3, 1, False),
    (1, 512, 128, 512, 3, 1, True), (1, 512, 256, 256, 3, 1, False), (1, 256, 256, 256, 3, 1, False),
    (1, 256, 256, 256, 3, 1, True), (1, 256, 512, 128, 3, 1, False), (1, 128, 512, 128, 3, 1, False),
    (1, 128, 512, 3, 3, 1, False),
)  # fmt: skip

# A training step at a 32x32 latent, batch 2.
TRAINING = (
    (2, 320, 32, 320, 3, 1, False), (2, 960, 32, 320, 3, 1, False), (2, 960, 32, 320, 1, 1, False),
    (2, 320, 32, 320, 3, 2, False), (2, 640, 16, 640, 3, 1, False), (2, 640, 16, 640, 3, 1, True),
    (2, 1280, 8, 1280, 3, 1, False), (2, 2560, 8, 1280, 3, 1, False), (2, 1280, 4, 1280, 3, 1, False),
)  # fmt: skip

Setting = tuple[int, int, int, int, int, int, bool]


def make(setting: Setting, training: bool, dtype: torch.dtype, device: str) -> Case:
    """The case of a setting, forward or with `training` forward and backward."""
    images, channels, size, out_channels, kernel, stride, upsample = setting
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(images, channels, size, size).to(device, dtype).to(memory_format=last)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    weight, bias = (
        weight.to(device, dtype).to(memory_format=last),
        torch.randn(out_channels).to(device, dtype),
    )
    leaves = [t.requires_grad_(training) for t in (x, weight, bias)]
    padding = (kernel // 2,) * 4
    side = size * (2 if upsample else 1) // stride
    dy = torch.randn(images, out_channels, side, side).to(device, dtype).to(memory_format=last)

    def eager() -> list[Tensor]:
        y = conv2d_torch(x, weight, bias, stride, padding, upsample=upsample)
        return gradients(y, leaves, dy)

    def ours() -> list[Tensor]:
        y = ops.conv2d(x, weight, bias, stride, kernel // 2, upsample=upsample)
        assert isinstance(y, Tensor)
        return gradients(y, leaves, dy)

    def ours_exact() -> list[Tensor]:
        with sdfast.use_numerics("exact"):
            return ours()

    # A few channels decide for all, of pixels those in a corner of one picture: what lies there needs no more
    # than `near` of its neighbours.
    few, corner, near = slice(0, 16), slice(0, 3), slice(0, 8)

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        of_pixels, *of_rows = results
        return [of_pixels[:1, few, corner, corner], *(t[few] for t in of_rows)]

    def exact() -> list[Tensor]:
        def wide(*tensors: Tensor) -> list[Tensor]:
            return [t.detach().double().requires_grad_(training) for t in tensors]

        def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return conv2d_torch(x, weight, bias, stride, padding, upsample=upsample)

        def gradient(operands: list[Tensor], dy: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
            y = formula(*operands)
            dy = dy[..., : y.shape[2], : y.shape[3]].double()
            return gradients(y, wanted, dy)

        if not training:
            return part([formula(*wide(x[:1, :, near, near], weight[few], bias[few]))])
        pixels = wide(x[:1, few, near, near], weight[:, few], bias)
        rows = wide(x, weight[few], bias[few])
        found = gradient(pixels, dy[:1], pixels[:1]) + gradient(rows, dy[:, few], rows[1:])
        return part(found)

    def limit(eager_error: float) -> float:
        fast = 1e-5 if training else 5e-5
        return fast if dtype == torch.float32 else 1.5 * eager_error + torch.finfo(dtype).eps

    results = images * side**2 * out_channels
    elements = x.numel() + weight.numel() + results
    return Case(
        f"{images}x{channels}x{size}x{size} to {out_channels}", dtype,
        {"eager": eager, "sdfast": ours, "exact": ours_exact}, exact,
        flops=2 * results * weight[0].numel() * (3 if training else 1),
        nbytes=(elements + training * (2 * elements - results)) * dtype.itemsize,
        part=part, limit=limit, training=training,
        details={
            "kernel": f"{kernel}x{kernel}" + (f" stride {stride}" if stride > 1 else ""),
            "upsample": upsample,
        },
    )  # fmt: skip


def _name(setting: Setting, training: bool) -> str:
    images, channels, size, out_channels, kernel, stride, upsample = setting
    name = f"{images}x{channels}x{size}x{size} to {out_channels} {kernel}x{kernel}"
    return (
        name + (f" stride {stride}" if stride > 1 else "") + upsample * " upsample" + training * " gradients"
    )


_QUICK = (UNET[0], UNET[13], VAE[0])
SPECS = [
    Spec(
        "conv2d", model, _name(setting, model == "training"),
        functools.partial(make, setting, model == "training"), quick=setting in _QUICK,
    )
    for model, settings in (("U-Net", UNET), ("VAE", VAE), ("training", TRAINING))
    for setting in settings
]  # fmt: skip
