"""Calls of group_norm at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPS = torch.ops.sdfast
# images, channels, side, channels of a skip, whether the layout is channels_last
_FORWARD = {
    "sd15 64x64": (2, 320, 64, 0, True),
    "sd15 32x32": (2, 640, 32, 0, True),
    "sd15 16x16": (2, 1280, 16, 0, True),
    "sd15 8x8": (2, 1280, 8, 0, True),
    "sd15 skip 8x8": (2, 1280, 8, 1280, True),
    "sd15 skip 32x32": (2, 640, 32, 320, True),
    "sd15 skip 64x64": (2, 320, 64, 320, True),
    "sdxl 128x128": (2, 320, 128, 0, True),
    "sdxl skip 64x64": (2, 1280, 64, 640, True),
    "vae 512x512": (1, 128, 512, 0, True),
    "vae 64x64": (1, 512, 64, 0, True),
    "contiguous 64x64": (2, 320, 64, 0, False),
    "contiguous 8x8": (2, 1280, 8, 0, False),
    "odd": (2, 33, 37, 0, True),
    "one group": (2, 1280, 40, 0, True),
}
# images, channels, side, whether the layout is channels_last
_BACKWARD = {
    "sd15 64x64": (4, 320, 64, True),
    "sd15 8x8": (4, 1280, 8, True),
    "vae 256x256": (1, 128, 256, True),
    "contiguous 64x64": (4, 320, 64, False),
    "odd": (2, 33, 37, True),
}
# Sizes of 1 among what a launch is given, which Triton makes constants; for these one dtype is enough.
# images, channels, side, whether the layout is channels_last
_SMALLEST = {
    "one image": (1, 320, 64, True),
    "one pixel": (1, 320, 1, True),
    "one channel": (1, 1, 40, False),
    "one of each": (1, 1, 1, True),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _image(n: int, channels: int, side: int, last: bool, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((n, channels, side, side), device="cuda", dtype=dtype, memory_format=layout)


def _forward(
    n: int, channels: int, side: int, skip_channels: int, last: bool, dtype: torch.dtype, groups: int
) -> Callable[[], object]:
    def call() -> object:
        x = _image(n, channels, side, last, dtype)
        total = channels + skip_channels
        weight, bias = (torch.empty(total, device="cuda", dtype=dtype) for _ in range(2))
        if skip_channels:
            skip = _image(n, skip_channels, side, last, dtype)
            return OPS.group_norm_pair_triton(x, skip, groups, weight, bias, 1e-5, True, None, None)
        # The halves of one projection, as models make them.
        scale, shift = torch.empty(n, 2 * total, device="cuda", dtype=dtype).chunk(2, dim=1)
        mean = torch.empty(n, groups, device="cuda")
        return (
            OPS.group_norm_triton(x, groups, weight, bias, 1e-5, True, None, None),
            OPS.group_norm_triton(x, groups, weight, bias, 1e-5, False, None, None),
            OPS.group_norm_forward_triton(x, groups, weight, bias, 1e-5, True, scale, shift),
            OPS.group_norm_apply_triton(x, mean, mean, groups, weight, bias, True, None, None),
        )

    return call


def _backward(n: int, channels: int, side: int, last: bool, dtype: torch.dtype) -> Callable[[], object]:
    groups = 1 if channels == 1 else 11 if channels % 32 else 32

    def call() -> object:
        x = _image(n, channels, side, last, dtype)
        weight, bias = (torch.empty(channels, device="cuda", dtype=dtype) for _ in range(2))
        scale, shift = torch.empty(n, 2 * channels, device="cuda", dtype=dtype).chunk(2, dim=1)
        mean = torch.empty(n, groups, device="cuda")
        return (
            OPS.group_norm_backward_triton(x, x, mean, mean, groups, weight, bias, True, None, None),
            OPS.group_norm_backward_triton(x, x, mean, mean, groups, weight, bias, True, scale, shift),
            OPS.group_norm_backward_triton(x, x, mean, mean, groups, None, None, False, None, None),
        )

    return call


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name; a name ends with the dtype."""
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in _DTYPES.items():
        for what, forward in _FORWARD.items():
            groups = {"odd": 11, "one group": 1}.get(what, 32)
            cases[f"group_norm {what} {name}"] = _forward(*forward, dtype, groups)
        for what, backward in _BACKWARD.items():
            cases[f"group_norm backward {what} {name}"] = _backward(*backward, dtype)
    for what, (n, channels, side, last) in _SMALLEST.items():
        groups = min(channels, 32)
        cases[f"group_norm {what} fp16"] = _forward(n, channels, side, 0, last, torch.float16, groups)
        cases[f"group_norm backward {what} fp16"] = _backward(n, channels, side, last, torch.float16)
    return cases
