"""How group_norm's tensors, (N, C, *), lie in memory: channels first, which others become, or last."""

from __future__ import annotations

import math

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


def arranged(t: Tensor, last: bool) -> Tensor:
    """t itself where it lies channels last, or first, as asked for, else a copy that does."""
    if is_last(t) if last else is_first(t):
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def pixels_of(x: Tensor) -> int:
    """Pixels of one image."""
    return math.prod(x.shape[2:])
