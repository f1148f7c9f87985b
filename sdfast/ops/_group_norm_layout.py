"""How group_norm's tensors, (N, C, *), lie in memory: channels first or channels last, else channels first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def has_layout(x: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether x is dense, its axes in this order, fastest first. An axis of size 1 fits any stride."""
    expected = 1
    for axis in axes:
        if x.shape[axis] > 1 and x.stride(axis) != expected:
            return False
        expected *= max(x.shape[axis], 1)
    return True


def is_first(x: Tensor) -> bool:
    """Whether x is dense with its pixels together, channel after channel."""
    return has_layout(x, (*range(x.dim() - 1, 1, -1), 1, 0))


def is_last(x: Tensor) -> bool:
    """Whether x is dense with its channels together, pixel after pixel."""
    return has_layout(x, (1, *range(x.dim() - 1, 1, -1), 0))


def empty_in_layout(x: Tensor) -> Tensor:
    """An empty tensor with the strides that the kernels give to y and dx."""
    if is_last(x) or is_first(x):
        return x.new_empty_strided(x.shape, x.stride())
    return x.new_empty(x.shape)


def empty_concatenation(x: Tensor, skip: Tensor) -> Tensor:
    """An empty tensor for the channels of both, channels last where both are, else channels first."""
    n, _, *image = x.shape
    channels = x.shape[1] + skip.shape[1]
    if is_last(x) and is_last(skip):
        return x.new_empty((n, *image, channels)).movedim(-1, 1)
    return x.new_empty((n, channels, *image))


def arranged(*tensors: Tensor) -> tuple[list[Tensor], bool]:
    """Tensors that lie alike, copied where they do not, and whether that is channels last."""
    if all(is_last(t) for t in tensors):
        return list(tensors), True
    first = [t if is_first(t) else t.contiguous(memory_format=torch.contiguous_format) for t in tensors]
    return first, False


def pixels_of(x: Tensor) -> int:
    """Pixels of one image."""
    return math.prod(x.shape[2:])
