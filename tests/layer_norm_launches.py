"""Calls of layer_norm at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPS = torch.ops.sdfast
# rows, width
_SIZES = {
    "sd15 64x64": (8192, 320),
    "sd15 32x32": (2048, 640),
    "sdxl 32x32": (2048, 1280),
    "clip": (154, 768),
    "odd": (77, 1021),
    "odd, many rows": (8192, 1021),
    "held whole": (64, 8192),
    "wide": (64, 10240),
    "wide and odd": (64, 10241),
}
# Sizes of 1 among what a launch is given, which Triton makes constants; for these one dtype is enough.
_SMALLEST = {
    "one share of rows": (32, 64),
    "few rows": (4, 320),
    "two rows": (2, 768),
    "one row": (1, 1280),
    "one number": (1, 1),
    "one wide row": (1, 8193),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _call(rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def call() -> object:
        x, weight, bias = empty(rows, width), empty(width), empty(width)
        mean = empty(rows).float()
        return (
            OPS.layer_norm_triton(x, 1, weight, bias, 1e-5),
            OPS.layer_norm_forward_triton(x, 1, weight, bias, 1e-5),
            OPS.layer_norm_backward_triton(x, x, mean, mean, 1, weight, bias),
            OPS.layer_norm_backward_triton(x, x, mean, mean, 1, None, None),
        )

    return call


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name; a name ends with the dtype."""
    return {
        f"layer_norm {what} {name}": _call(*sizes, dtype)
        for name, dtype in _DTYPES.items()
        for what, sizes in (_SIZES | (_SMALLEST if name == "fp16" else {})).items()
    }
