"""conv2d in Triton: the tile, the steps and the splits of one convolution, from its shape and the GPU alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast.ops._triton import Config, multiprocessors, shared_memory_bytes


class Tile(NamedTuple):
    """Pixels by channels of y. `share` is what of the peak it is taken to reach: assumed, no GPU measured it."""

    pixels: int
    channels: int
    num_warps: int
    share: float


_HALF = (
    Tile(128, 256, 8, 1.0), Tile(128, 128, 8, 0.95), Tile(64, 256, 8, 0.8), Tile(128, 64, 4, 0.8),
    Tile(64, 128, 4, 0.75), Tile(64, 64, 4, 0.65),
)  # fmt: skip
_NARROW = (Tile(128, 16, 4, 0.2),)  # for a picture's 3 channels or a latent's 4
_UNALIGNED = (Tile(64, 64, 4, 0.3),)  # loaded number by number, each with its address in registers
_FP32 = (Tile(64, 64, 8, 1.0), Tile(32, 64, 4, 0.7))
_MAX_SPLITS = 8
_SPLIT_STEPS = 8  # what writing and reading partials costs, in steps along K; assumed


class Plan(NamedTuple):
    """How one convolution is launched.

    Attributes:
        config: of the kernel that multiplies; BLOCK_M pixels by BLOCK_N channels, BLOCK_K channels of x a step.
        tiles: of the pixels of one image (and phase), and of the channels.
        splits: of K, each of `steps` steps.
    """

    config: Config
    tiles: tuple[int, int]
    splits: int
    steps: int


def _divided(a: int, b: int) -> int:
    return -(-a // b)


def _block_k(channels: Sequence[int], dtype: torch.dtype, precision: str) -> int:
    """The most channels of one step that leave no step half empty, where they are even enough for that."""
    if dtype is torch.float32:
        return 16 if precision == "ieee" or max(channels) <= 16 else 32
    return next(
        (k for k in (64, 32, 16) if all(c % k == 0 for c in channels)), 16 if max(channels) <= 16 else 32
    )


def plan_convolution(
    weight: Tensor, channels: Sequence[int], images: int, pixels: int, phases: int, precision: str
) -> Plan:
    """The tile with the least work for the busiest multiprocessor.

    Args:
        weight: (phases?, O, C, kh, kw), as the kernel reads it.
        channels: of each source, C in all.
        images, pixels, phases: y has images * phases * pixels pixels; no tile holds those of two images.
    """
    out_channels, taps = weight.shape[-4], weight.shape[-2] * weight.shape[-1]
    aligned = all(n % 16 == 0 for n in channels) and all(s == 1 or s % 16 == 0 for s in weight.stride())
    if weight.dtype is torch.float32:
        tiles: tuple[Tile, ...] = _FP32
    elif out_channels <= 16 and aligned:
        tiles = _NARROW
    else:
        tiles = _HALF if aligned else _UNALIGNED
    block_k = _block_k(channels, weight.dtype, precision)
    available, processors = shared_memory_bytes(weight.device), multiprocessors(weight.device)
    all_steps = taps * sum(_divided(n, block_k) for n in channels)
    best, best_cost = None, float("inf")
    for tile in tiles:
        grid = _divided(pixels, tile.pixels), _divided(out_channels, tile.channels)
        count = max(images * phases * grid[0] * grid[1], 1)
        splits = max(1, min(processors // count, all_steps // 8, _MAX_SPLITS))
        steps = _divided(all_steps, splits)
        splits = max(1, _divided(all_steps, max(steps, 1)))
        cost = _divided(count * splits, processors) * tile.pixels * tile.channels / tile.share
        cost *= steps + _SPLIT_STEPS * (splits > 1)
        if cost < best_cost:
            stage_bytes = (tile.pixels + tile.channels) * block_k * weight.element_size()
            constants = {
                "BLOCK_M": tile.pixels, "BLOCK_N": tile.channels, "BLOCK_K": block_k, "GROUP": 8,
            }  # fmt: skip
            config = Config(constants, tile.num_warps, max(2, min(4, available // stage_bytes)))
            best, best_cost = Plan(config, grid, splits, steps), cost
    assert best is not None
    return best
