"""Which backends serve a call on a GPU, best first, where the call names none.

As measured on an H100 in bf16 (benchmarks/bench_gpu_calls.py): each call of Stable Diffusion 1.5, SDXL and
their VAE, in a CUDA graph. Norms are bound by memory, and the kernels faster at every size. Products are the
libraries' but for those that they lack: a convolution of two sources or of an upsampled image, few keys, wide
heads, GEGLU's gate. What nobody measured, gradients of products, other GPUs and fp32, is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast.ops._native import requires_grad
from sdfast.ops._triton import architecture

_TORCH = ("torch",)
_KERNELS = ("triton", "cuda", "torch")
# A 3x3 convolution of this many channels and pixels an image is cuDNN's: 1.02 to 1.6 times as fast.
_LIBRARY_CHANNELS, _LIBRARY_PIXELS = 512, 1024
_FEW_KEYS, _WIDE_HEAD = 256, 256


def _measured(x: Tensor, *others: Tensor | None) -> bool:
    half = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    return half and not requires_grad(x, *others) and _is_hopper(x.device.type, x.device.index)


def _is_hopper(kind: str, index: int | None) -> bool:
    return kind == "cuda" and architecture(torch.device(kind, index or 0)) == 90


_is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks it while it traces


def of_convolution(
    x: Tensor, weight: Tensor, stride: int, upsample: bool, *others: Tensor
) -> tuple[str, ...]:
    """Of `conv2d`; `others` are the tensors it adds."""
    if not _measured(x, weight, *others):
        return _TORCH
    is_large = x.shape[2] * x.shape[3] >= _LIBRARY_PIXELS and weight.shape[1] >= _LIBRARY_CHANNELS
    is_plain = tuple(weight.shape[2:]) == (3, 3) and stride == 1 and not upsample
    return _TORCH if is_large and is_plain else ("triton", "torch")


def of_linear(x: Tensor, weight: Tensor, activation: str | None, *others: Tensor | None) -> tuple[str, ...]:
    """Of `linear`: torch's product, and behind it the gate of CUDA C++, which reads its two halves once."""
    gated = activation == "geglu" and _measured(x, weight, *others)
    return ("cuda", "triton", "torch") if gated else _TORCH


def of_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    """Of `attention`."""
    suits = k.shape[2] < _FEW_KEYS or q.shape[3] > _WIDE_HEAD
    return _KERNELS if suits and _measured(q, k, v) else _TORCH
