"""What the launchers of elementwise Triton kernels share: how operands lie, and how the work is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast.ops import _triton


def lie_as(t: Tensor, out: Tensor) -> Tensor:
    """t itself where its samples (first axis) lie inside as those of `out`, else a copy that does."""
    for size, stride, wanted in zip(out.shape[1:], t.stride()[1:], out.stride()[1:], strict=True):
        if size > 1 and stride != wanted:
            inner = 1 + sum((s - 1) * k for s, k in zip(out.shape[1:], out.stride()[1:], strict=True))
            return torch.empty_strided(
                t.shape, (inner, *out.stride()[1:]), dtype=t.dtype, device=t.device
            ).copy_(t)
    return t


def sample_stride(t: Tensor) -> int:
    """Elements from one sample to the next."""
    return t.stride(0) if t.dim() else 0


def sizes(out: Tensor) -> tuple[int, int]:
    """The number of samples, and the elements of one."""
    count = out.shape[0] if out.dim() else 1
    return count, out.numel() // max(count, 1)


def config(samples: int, size: int, device: torch.device) -> tuple[tuple[int, ...], _triton.Config]:
    """The grid, and four elements for each thread: the largest programs of which each multiprocessor has two.

    Latents are small: where even the smallest programs are fewer, all of them run at once.
    """
    block = 1024
    while block > 128 and samples * (-(-size // block)) < 2 * _triton.multiprocessors(device):
        block //= 2
    grid = (samples * (-(-size // block)),)
    return grid, _triton.Config({"BLOCK": block}, num_warps=block // 128, num_stages=1)
