"""Calls of attention at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded.

And of size 1, which Triton makes a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# batch, heads, queries, keys, head dimension, causal
_SHAPES = {
    "sd15 64x64": (2, 8, 4096, 4096, 40, False),
    "sd15 64x64 to the text": (2, 8, 4096, 77, 40, False),
    "sd15 32x32": (2, 8, 1024, 1024, 80, False),
    "sd15 32x32 to the text": (2, 8, 1024, 77, 80, False),
    "sd15 16x16": (2, 8, 256, 256, 160, False),
    "sd15 8x8 to the text": (2, 8, 64, 77, 160, False),
    "sdxl 64x64": (2, 10, 4096, 4096, 64, False),
    "sdxl 32x32": (2, 20, 1024, 1024, 64, False),
    "sdxl 32x32 to the text": (2, 20, 1024, 77, 64, False),
    "vae 64x64": (1, 1, 4096, 4096, 512, False),
    "vae 128x128": (1, 1, 16384, 16384, 512, False),
    "clip": (2, 12, 77, 77, 64, True),
    "of one": (1, 1, 1, 1, 1, False),
    "one query": (1, 1, 1, 4096, 64, False),
    "one key": (1, 1, 4096, 1, 64, True),
    "odd": (1, 3, 1001, 999, 333, True),
}
_SOME = ("sd15 64x64", "sd15 32x32 to the text", "sd15 16x16", "vae 64x64")  # in further dtypes
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _call(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, is_causal: bool, dtype: torch.dtype
) -> Callable[[], object]:
    def empty(rows: int) -> Tensor:
        return torch.empty((batch, rows, heads, head_dim), device="cuda", dtype=dtype).transpose(1, 2)

    def call() -> object:
        q, k, v, sdfast = empty(queries), empty(keys), empty(keys), torch.ops.sdfast
        more = (is_causal, head_dim**-0.5)
        sdfast.attention_forward_triton(q, k, v, *more)
        o, lse = sdfast.attention_with_lse_triton(q, k, v, *more)
        return sdfast.attention_backward_triton(empty(queries), q, k, v, o, lse, *more)

    return call


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name, each with its gradient; a name ends with the dtype."""
    return {
        f"attention {what} {name}": _call(*shape, dtype)
        for name, dtype in _DTYPES.items()
        for what, shape in _SHAPES.items()
        if what in _SOME or name == "fp16"
    }
