"""How group_norm's Triton kernels are cut into programs: spans of channels, tiles, runs of tiles.

Functions of the channels and of how many pixels there are to share out. Assumed, not measured: what makes a
good run of bytes, how many programs a multiprocessor wants, how much of a tile may lie idle.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton

from sdfast.ops._launch_table import choose, near
from sdfast.ops._triton import Config, multiprocessors


class Shape(NamedTuple):
    """What is normalised. `last`: channels lie together, not pixels."""

    images: int
    pixels: int
    groups: int
    group_channels: int
    element_bytes: int
    last: bool


class Tiling(NamedTuple):
    """A span is the channels of one program: some groups, or one of `parts` of a wide group."""

    spans: int
    parts: int
    config: Config


class Plan(NamedTuple):
    """Tiles of one launch, `whole`, or of two. The cost is in launches."""

    tiles: Tiling
    whole: bool

    @property
    def config(self) -> Config:
        return self.tiles.config

    @property
    def kind(self) -> str:
        return "whole" if self.whole else "apart"

    @property
    def cost(self) -> float:
        return 1.0 if self.whole else 2.0


_WHOLE_PIXELS = (64, 256, 1024)  # images of at most these fit one tile; 8x8, 16x16, 32x32
_WHOLE_ELEMENTS = 16384  # in registers, 32 of each of 512 threads; twice as many would spill here and there
_TILE_ELEMENTS = 4096
_MAX_CHANNELS = 256  # of a tile


def _tiling(shape: Shape, count: int, parts: int, block_p: int, block_c: int, num_warps: int) -> Tiling:
    """Spans of `count` groups, or of parts of one."""
    span = count * shape.group_channels if parts == 1 else block_c
    constants = {
        "SPAN": span, "PARTS": parts, "GROUPS": triton.next_power_of_2(count),
        "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    return Tiling(-(-shape.groups // count) * parts, parts, Config(constants, num_warps, 1))


def _counts(shape: Shape, vector_bytes: int, run_bytes: int) -> list[int]:
    """Numbers of groups whose channels are runs of this many bytes that start at multiples of a vector."""
    if not shape.last:
        return list(range(1, shape.groups + 1))
    group = shape.group_channels * shape.element_bytes
    vector = math.gcd(group * shape.groups, vector_bytes)
    aligned = [k for k in range(1, shape.groups) if k * group % vector == 0 and k * group >= run_bytes]
    return [*aligned, shape.groups]


@functools.lru_cache(maxsize=1024)
def whole_tiling(shape: Shape) -> Tiling | None:
    """The fewest groups for a program that holds their every pixel, or None where none fit."""
    block_p = next((p for p in _WHOLE_PIXELS if shape.pixels <= p), None)
    if block_p is None:
        return None
    count = _counts(shape, 8, 32)[0]
    block_c = triton.next_power_of_2(count * shape.group_channels)
    elements = block_p * block_c
    if elements > _WHOLE_ELEMENTS:
        return None
    return _tiling(shape, count, 1, block_p, block_c, min(max(elements // 512, 1), 16))


@functools.lru_cache(maxsize=1024)
def tiling(shape: Shape) -> Tiling:
    """The fewest groups for a program, or more of them where those leave fewer lanes of a tile idle."""
    limit = _MAX_CHANNELS if shape.last else 64
    best, best_used = 0, 0.0
    for count in _counts(shape, 16, 64):
        block_c = triton.next_power_of_2(count * shape.group_channels)
        used = shape.groups * shape.group_channels / (-(-shape.groups // count) * block_c)
        if block_c <= limit and used > 1.2 * best_used:
            best, best_used = count, used
    parts = 1
    if best == 0:  # no aligned span is narrow enough
        best, parts = 1, -(-shape.group_channels // limit)
    block_c = min(triton.next_power_of_2(best * shape.group_channels), limit)
    return _tiling(shape, best, parts, _TILE_ELEMENTS // block_c, block_c, 8)


def plan_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Plan:
    """One launch where programs hold their groups, unless two, with more programs, were measured faster."""
    whole, apart = whole_tiling(shape), Plan(tiling(shape), False)
    if whole is None:
        return apart
    bucket = (dtype, near(shape.images), near(shape.pixels), shape.groups, shape.group_channels, shape.last)
    return choose("group_norm", bucket, [Plan(whole, True), apart], device)


def blocks_of_tiles(
    shape: Shape, tiles: Tiling, programs: int, device: torch.device, least_steps: int = 1
) -> tuple[int, int]:
    """Runs of tiles that an image's pixels are cut into, and tiles in each, `programs` a multiprocessor.

    For fewer where a run would be shorter than `least_steps`, yet for one a multiprocessor if there can be.
    """
    rows = -(-shape.pixels // tiles.config.constants["BLOCK_P"])

    def steps_for(programs: int) -> int:
        wanted = -(-programs * multiprocessors(device) // max(shape.images * tiles.spans, 1))
        return -(-rows // min(wanted, rows))

    steps = max(steps_for(programs), min(least_steps, steps_for(1)))
    return -(-rows // steps), steps


def chunks_of_tiles(shape: Shape, tiles: Tiling, device: torch.device) -> tuple[int, int]:
    """The same, of a first launch whose every chunk is read again by each program of the second.

    Chunks of fewer tiles than 8 are made half as many.
    """
    chunks, steps = blocks_of_tiles(shape, tiles, 4, device)
    return (chunks, steps) if steps >= 8 else blocks_of_tiles(shape, tiles, 2, device)
