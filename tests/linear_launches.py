"""Calls of linear at the sizes of Stable Diffusion 1.5 and XL, whose Triton launches can be recorded.

And of size 1: Triton makes such an argument a constant, which not all code that takes a number takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdfast.ops.linear import ACTIVATIONS

# tokens, rows of the weight, K, activation, whether a residual is added
_FORWARD = {
    "sd15 to_q 64x64": (8192, 320, 320, None, False),
    "sd15 to_k of the text": (154, 1280, 768, None, False),
    "sd15 geglu 64x64": (8192, 2560, 320, "geglu", False),
    "sd15 geglu 8x8": (128, 10240, 1280, "geglu", False),
    "sd15 feed-forward 8x8": (128, 1280, 5120, None, True),
    "sd15 K of a 3x3 kernel, 8x8": (128, 1280, 11520, None, True),
    "sd15 time embedding": (2, 1280, 320, "silu", False),
    "sdxl geglu 32x32": (2048, 10240, 1280, "geglu", False),
    "sdxl feed-forward 32x32": (2048, 1280, 5120, None, True),
    "clip feed-forward": (77, 3072, 768, "quick_gelu", False),
    "clip-g feed-forward": (77, 5120, 1280, "gelu", False),
    "vae to_q 64x64": (4096, 512, 512, None, False),
    "of one": (1, 1, 1, "silu", True),
    "one token, geglu": (1, 10240, 1280, "geglu", False),
    "one column, K split": (8, 1, 11520, None, True),
    "odd": (50, 34, 77, "geglu", True),
    "odd rows": (4001, 2570, 771, "geglu", True),
    "odd and wide": (4001, 5123, 771, "gelu", True),
}
# tokens, rows of the weight, K
_BACKWARD = {
    "sd15 64x64": (4096, 320, 320),
    "sd15 geglu 8x8": (64, 10240, 1280),
    "sdxl 32x32": (1024, 1280, 1280),
    "one token": (1, 1280, 320),
    "of one, and a gate": (1, 2, 1),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _forward(
    tokens: int, rows: int, k: int, activation: str | None, added: bool, dtype: torch.dtype
) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def call() -> object:
        residual = empty(tokens, rows) if added else None
        x, weight, bias = empty(tokens, k), empty(rows, k), empty(rows)
        # ops.linear takes plain tensors for weights, which fake ones are not.
        return torch.ops.sdfast.linear_rows_triton(x, weight, bias, residual, ACTIVATIONS.index(activation))

    return call


def _backward(tokens: int, rows: int, k: int, dtype: torch.dtype) -> Callable[[], object]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def call() -> object:
        dh, sdfast = empty(tokens, rows), torch.ops.sdfast
        return (
            sdfast.linear_input_gradient_triton(dh, empty(rows, k)),
            sdfast.linear_weight_gradient_triton(dh, empty(tokens, k)),
            sdfast.sum_rows_triton(empty(1, tokens, rows)),
            *(sdfast.linear_activate_triton(dh, i) for i in range(1, 5)),
            *(sdfast.linear_activation_gradient_triton(dh, dh, i) for i in range(1, 4)),
            sdfast.linear_activation_gradient_triton(empty(tokens, rows // 2), dh, 4),
        )

    return call


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name; a name ends with the dtype."""
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in _DTYPES.items():
        for what, forward in _FORWARD.items():
            cases[f"linear {what} {name}"] = _forward(*forward, dtype)
        for what, backward in _BACKWARD.items():
            cases[f"linear backward {what} {name}"] = _backward(*backward, dtype)
    return cases
