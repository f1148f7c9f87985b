"""Mean and rstd of a convolution's result, per group, out of the tiles that computed it.

    n = Σ nₜ,  mean = Σ nₜ meanₜ / n,  M2 = Σ M2ₜ + Σ nₜ (meanₜ − mean)²      Chan, Golub & LeVeque 1979
    rstd = 1 / √(M2 / n + eps)

A program that stores a tile leaves mean and M2 of each of its channels, of the values as they were rounded;
the mean in two parts, as meanₜ − mean of large means would be left with the error of their rounding.
Groups of 10 channels fit no tile of 64, so that another kernel combines tiles and channels, a program for
each group of each image, in a fixed order.
Bytes: 12 for each channel of a tile, written once and read twice from L2; the limit is the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._triton import Config, launch


@triton.jit
def store_tile_statistics(values, count, inside, at, width, columns, columns_inside):
    """Mean, what it lacks to the true one, and M2, over the rows of a tile.

    Args:
        values: (rows, columns), fp32.
        count: how many rows there are; `inside`, (rows, 1), says which.
        at: where the tile's means begin; the others follow `width` and 2 `width` later.
        columns: (1, columns), places among `width` channels.
    """
    mean = tl.sum(tl.where(inside, values, 0.0), axis=0) / count
    centered = tl.where(inside, values - mean[None, :], 0.0)
    rest = tl.sum(centered, axis=0) / count
    m2 = tl.sum(centered * centered, axis=0)
    tl.store(at + columns, mean[None, :], mask=columns_inside)
    tl.store(at + width + columns, rest[None, :], mask=columns_inside)
    tl.store(at + 2 * width + columns, m2[None, :], mask=columns_inside)


@triton.jit
def _count(tile, tiles_per_phase, pixels, ROWS: tl.constexpr):
    """The pixels of a tile: the last one of a phase may have fewer than the others."""
    return tl.minimum(pixels - tile % tiles_per_phase * ROWS, ROWS).to(tl.float32)


@triton.jit
def _off(at, channels, inside, pivot, mean):
    """By how much the means at `at` exceed pivot + mean; 0 where there are none."""
    high = tl.load(at, mask=inside, other=0.0) - pivot
    return tl.where(inside, high + tl.load(at + channels, mask=inside, other=0.0) - mean, 0.0)


@triton.jit(do_not_specialize=["tiles", "tiles_per_phase", "pixels"])
def _groups_kernel(
    partials,  # (N, tiles, 3, channels)
    mean_at,  # (N, groups)
    rstd_at,
    tiles, tiles_per_phase, pixels, channels, groups, size, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: images times groups of `size` channels. `pixels` are those of one phase."""
    program = tl.program_id(0).to(tl.int64)
    first = partials + program // groups * tiles * 3 * channels + program % groups * size
    pivot = tl.load(first)  # means are summed as they differ from one of them
    total = (tiles // tiles_per_phase * size).to(tl.float32) * pixels
    weighted = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, tiles * size, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tile = place // size
        at = first + tile.to(tl.int64) * 3 * channels + place % size
        off = _off(at, channels, tile < tiles, pivot, 0.0)
        weighted += off * _count(tile, tiles_per_phase, pixels, ROWS)
    mean = tl.div_rn(tl.sum(weighted, axis=0), total)
    m2 = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, tiles * size, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tile = place // size
        at = first + tile.to(tl.int64) * 3 * channels + place % size
        off = _off(at, channels, tile < tiles, pivot, mean)
        m2 += off * off * _count(tile, tiles_per_phase, pixels, ROWS)
        m2 += tl.load(at + 2 * channels, mask=tile < tiles, other=0.0)
    tl.store(mean_at + program, pivot + mean)
    variance = tl.div_rn(tl.sum(m2, axis=0), total)
    tl.store(rstd_at + program, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


def combine(
    partials: Tensor, num_groups: int, eps: float, *, pixels: int, rows: int, phases: int
) -> tuple[Tensor, Tensor]:
    """Mean and rstd, (N, num_groups) both, fp32.

    Args:
        partials: (N, tiles, 3, channels), the tiles of one phase after those of another.
        pixels: of one phase of one image, in tiles of `rows`.
    """
    images, tiles, _, channels = partials.shape
    mean = partials.new_empty((images, num_groups))
    rstd = partials.new_empty((images, num_groups))
    config = Config({"BLOCK": 2048}, num_warps=8)
    launch(
        _groups_kernel, (images * num_groups,), partials, mean, rstd, tiles, tiles // phases, pixels,
        channels, num_groups, channels // num_groups, eps, config=config, ROWS=rows,
    )  # fmt: skip
    return mean, rstd
