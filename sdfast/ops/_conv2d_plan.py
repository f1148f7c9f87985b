"""conv2d in Triton: tile, steps and splits of one convolution, from its shape and the GPU alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sdfast.ops._launch_table import choose, near
from sdfast.ops._triton import Config, Machine, machine


class Convolution(NamedTuple):
    """What a plan depends on.

    Attributes:
        size, strides: of the weight as the kernel reads it, (phases?, O, C, kh, kw).
        dtype: of all.
        channels: of each source, C in all.
        images, pixels, phases: y has images * phases * pixels pixels; no tile holds those of two images.
        precision: of fp32 products.
        normalised: tiles of x pass through registers, on their way from memory to the tensor cores.
        statistics: those of y are wanted.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    channels: tuple[int, ...]
    images: int
    pixels: int
    phases: int
    precision: str
    normalised: bool
    statistics: bool


class _Tile(NamedTuple):
    """Pixels by channels of y; `share` is what of the peak it is assumed to reach, which nobody measured.

    `occupancy` is that of its `Config`; None where the addresses decide how many registers are needed.
    """

    pixels: int
    channels: int
    num_warps: int
    share: float
    occupancy: int | None = None


_HALF = (
    _Tile(128, 256, 8, 1.0, 1), _Tile(128, 128, 8, 0.95, 1), _Tile(64, 256, 8, 0.8, 1),
    _Tile(128, 64, 4, 0.8, 2), _Tile(64, 128, 4, 0.75, 2), _Tile(64, 64, 4, 0.65, 3),
)  # fmt: skip
# For GPUs whose tensor cores take both factors from registers.
_HALF_IN_REGISTERS = (_Tile(128, 128, 8, 1.0, 1), _Tile(128, 64, 8, 0.85, 1), _Tile(64, 128, 8, 0.85, 1))
# For a picture's 3 channels or a latent's 4.
_NARROW = (_Tile(128, 16, 4, 0.2, 4), _Tile(64, 16, 4, 0.15, 4))
_UNALIGNED = (_Tile(64, 64, 8, 0.3),)  # loaded number by number, each with its address in registers
_FP32 = (_Tile(64, 64, 8, 1.0, 2), _Tile(32, 64, 4, 0.7, 2))
_UNALIGNED_FP32 = (_Tile(32, 64, 8, 0.7, 1),)
_MAX_SPLITS = 8
_SPLIT_STEPS = 8  # what writing and reading partials costs, in steps along K; assumed


class Plan(NamedTuple):
    """How one convolution is launched.

    Attributes:
        config: of the kernel that multiplies: BLOCK_M pixels, BLOCK_N channels, BLOCK_K channels of x a step.
        tiles: of the pixels of one image (and phase), and of the channels.
        splits: of K, each of `steps` steps.
        cost: the work of the busiest multiprocessor.
    """

    config: Config
    tiles: tuple[int, int]
    splits: int
    steps: int
    cost: float
    kind: str = ""  # splits follow from tile and shape


def plan_convolution(call: Convolution, device: torch.device) -> Plan:
    """The plan that serves a convolution."""
    kind = "normalised" if call.normalised else "statistics" if call.statistics else "plain"
    contiguous = "C" if call.strides[-3] == 1 else "O"
    sizes = (near(call.images), near(call.pixels), call.phases, call.size[-4], *call.channels)
    bucket = (kind, call.dtype, call.precision, *sizes, *call.size[-2:], contiguous)
    return choose("conv2d", bucket, plans_of(call, machine(device)), device)


@functools.lru_cache(maxsize=1024)
def plans_of(call: Convolution, machine: Machine) -> tuple[Plan, ...]:
    """A plan for each tile that suits the shape."""
    out_channels, _, taps_y, taps_x = call.size[-4:]
    block_k, processors = _block_k(call), machine.multiprocessors
    all_steps = taps_y * taps_x * sum(_divided(n, block_k) for n in call.channels)
    plans = []
    for tile in _tiles(call, machine):
        grid = _divided(call.pixels, tile.pixels), _divided(out_channels, tile.channels)
        count = max(call.images * call.phases * grid[0] * grid[1], 1)
        splits = max(1, min(processors // count, all_steps // 8, _MAX_SPLITS))
        steps = _divided(all_steps, splits)
        splits = max(1, _divided(all_steps, max(steps, 1)))
        cost = _divided(count * splits, processors) * tile.pixels * tile.channels / tile.share
        cost *= steps + _SPLIT_STEPS * (splits > 1)
        stage_bytes = (tile.pixels + tile.channels) * block_k * call.dtype.itemsize
        constants = {"BLOCK_M": tile.pixels, "BLOCK_N": tile.channels, "BLOCK_K": block_k, "GROUP": 8}
        stages = max(2, min(4, machine.shared_bytes // stage_bytes))
        config = Config(constants, tile.num_warps, stages, tile.occupancy)
        plans.append(Plan(config, grid, splits, steps, cost))
    return tuple(plans)


def _tiles(call: Convolution, machine: Machine) -> Sequence[_Tile]:
    aligned = all(n % 16 == 0 for n in call.channels) and all(s == 1 or s % 16 == 0 for s in call.strides)
    tiles: Sequence[_Tile]
    if call.dtype is torch.float32:
        tiles = _FP32 if aligned else _UNALIGNED_FP32
    elif not aligned:
        tiles = _UNALIGNED
    elif call.size[-4] <= 16:
        tiles = _NARROW
    else:
        tiles = _HALF if machine.reads_shared_memory else _HALF_IN_REGISTERS
    # None of these finds registers beside the accumulators of the largest tile.
    if call.normalised or call.statistics or len(call.channels) > 1:
        tiles = [tile for tile in tiles if tile.pixels * tile.channels <= 128 * 128]
    if call.normalised:
        rows = 128 if call.size[-1] == 1 else 64  # whether a tap lies outside is one more fact about each
        tiles = [tile._replace(num_warps=8, occupancy=1) for tile in tiles if tile.pixels <= rows]
    return tiles


def _block_k(call: Convolution) -> int:
    """The most channels of one step that leave no step partly empty, where there are such."""
    few = max(call.channels) <= 16
    if call.dtype is torch.float32:
        return 16 if call.precision == "ieee" or few else 32
    whole = (k for k in (64, 32, 16) if all(n % k == 0 for n in call.channels))
    return next(whole, 16 if few else 32)


def _divided(a: int, b: int) -> int:
    return -(-a // b)
