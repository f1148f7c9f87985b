"""What the launchers of elementwise Triton kernels share: how operands lie, and how the work is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast.ops import _triton

_BLOCK = 256


def lie_as(t: Tensor, out: Tensor) -> Tensor:
    """t itself where its samples (first axis) lie inside as those of `out`, else a copy that does."""
    if lies_as(t, out):
        return t
    inner = 1 + sum((s - 1) * k for s, k in zip(out.shape[1:], out.stride()[1:], strict=True))
    return torch.empty_strided(t.shape, (inner, *out.stride()[1:]), dtype=t.dtype, device=t.device).copy_(t)


def lies_as(t: Tensor, out: Tensor) -> bool:
    """Whether its samples lie inside as those of `out`."""
    strides = zip(out.shape[1:], t.stride()[1:], out.stride()[1:], strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in strides)


def sample_stride(t: Tensor) -> int:
    """Elements from one sample to the next."""
    return t.stride(0) if t.dim() else 0


def sizes(out: Tensor) -> tuple[int, int]:
    """The number of samples, and the elements of one."""
    count = out.shape[0] if out.dim() else 1
    return count, out.numel() // max(count, 1)


def config(samples: int, size: int) -> tuple[tuple[int, ...], _triton.Config]:
    """The grid, and four elements for each thread.

    One size of program whatever the work, so that a new resolution compiles nothing; a small one, as latents
    are small: those of one 512x512 image are 64 programs. Assumed, not measured.
    """
    grid = (samples * (-(-size // _BLOCK)),)
    return grid, _triton.Config({"BLOCK": _BLOCK}, num_warps=_BLOCK // 128, num_stages=1)
