"""Gradients of conv2d in Triton.

    dW[o, i, j, c] = Σ dy[n, y, x, o] · x[n, y s + i − top, x s + j − left, c]    over all pixels of y
    dx = the convolution of dy with the flipped weight, conv2d_triton's

dW is a matrix product of O rows and kh kw C columns along the pixels of all images. A program keeps one tile
of it in fp32 registers and walks along them; its columns may belong to several taps, so that neither 320
channels nor 3 leave a tile half empty. x is gathered, zeros where a tap meets the padding. A pixel's place is
kept as digits, (image, row, column), and advanced by carries: no division in the loop. Tiles follow each
other column by column: the taps read the same pixels from L2 at about the same time. Layers have few tiles
and many pixels: these are split, and a second kernel adds the fp32 partials in order.
Bytes: dy + x + dW once, a split's partials twice; the limit is the tensor cores', of narrow layers memory's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._launch_table import choose, near
from sdfast.ops._triton import Config, Machine, launch, machine, product_precision
from sdfast.ops.conv2d_triton import convolve, gradient_geometries

# What changes with the resolution and the batch: none of it tells how x and dy are aligned.
_SIZES = [
    "pixels", "image_pixels", "y_height", "y_width", "height", "width", "steps", "split_images", "split_rows",
    "split_columns",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _weight_gradient_kernel(
    dy,  # (N, y_height, y_width, out_channels)
    x,  # (N, height, width, channels)
    dw,  # (splits, out_channels, columns), columns = kernel_height kernel_width channels
    pixels, image_pixels, y_height, y_width, height, width, out_channels, channels, columns,
    kernel_width, stride, top, left, steps, split_images, split_rows, split_columns,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, splits). Each split takes `steps` blocks, images, rows and columns of pixels together."""
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    o = (tile // tiles_n * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    column = (tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    tap = column // channels
    tap_row, tap_column = tap // kernel_width, tap % kernel_width
    tap_at = (tap_row.to(tl.int64) * width + tap_column) * channels + column % channels

    # Pixels as digits (image, row, column): the split's first and, added to it, the places in a block.
    first = split * steps * BLOCK_K
    k = tl.arange(0, BLOCK_K)[:, None]
    column_end, row_end = y_width * stride, y_height * stride
    first_column = tl.program_id(1) * split_columns
    first_row = tl.program_id(1) * split_rows + first_column // y_width
    first_image = split * split_images + first_row // y_height
    # What the kernel's first tap meets of x, were it not for the padding.
    x_column = (first_column % y_width + k % y_width) * stride
    row = (first_row % y_height + k % image_pixels // y_width) * stride
    image = first_image + k // image_pixels
    carry = x_column >= column_end
    x_column -= tl.where(carry, column_end, 0)
    row += tl.where(carry, stride, 0)
    carry = row >= row_end
    row -= tl.where(carry, row_end, 0)
    image += tl.where(carry, 1, 0)
    x_column -= left
    row -= top
    x_pixel = (image * height + row) * width + x_column
    dy_k = tl.arange(0, BLOCK_K)[None, :]
    dy_at = dy_k * out_channels + o
    dy += first * out_channels
    remaining = pixels - first

    # A block further, in digits, and what a carry adds.
    more_columns = BLOCK_K % y_width * stride
    more_rows = BLOCK_K % image_pixels // y_width * stride
    more_pixels = ((BLOCK_K // image_pixels).to(tl.int64) * height + more_rows) * width + more_columns
    to_next_row = tl.cast(stride, tl.int64) * width - column_end
    to_next_image = (tl.cast(height, tl.int64) - row_end) * width

    total = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for _ in range(0, steps):
        there = tl.minimum(remaining, BLOCK_K).to(tl.int32)
        dy_tile = tl.load(dy + dy_at, mask=(o < out_channels) & (dy_k < there), other=0.0)
        meets_row = (row + tap_row >= 0) & (row + tap_row < height)
        meets_column = (x_column + tap_column >= 0) & (x_column + tap_column < width)
        meets = (k < there) & (column < columns) & meets_row & meets_column
        x_tile = tl.load(x + x_pixel * channels + tap_at, mask=meets, other=0.0)
        total = tl.dot(dy_tile, x_tile, total, input_precision=PRECISION)

        remaining -= BLOCK_K
        dy += BLOCK_K * out_channels
        x_column += more_columns
        carry = x_column >= column_end - left
        x_column -= tl.where(carry, column_end, 0)
        row += more_rows + tl.where(carry, stride, 0)
        x_pixel += more_pixels + tl.where(carry, to_next_row, 0)
        carry = row >= row_end - top
        row -= tl.where(carry, row_end, 0)
        x_pixel += tl.where(carry, to_next_image, 0)

    at = dw + (split * out_channels + o) * columns + column
    tl.store(at, total.to(dw.dtype.element_ty), mask=(o < out_channels) & (column < columns))


@triton.jit(do_not_specialize=["splits"])
def _finish_kernel(partials, dw, size, splits, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """dw, `size` numbers, from (splits, size). Grid: the blocks of dw."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_S).to(tl.int64)
    part_at = partials + split[:, None] * size + at[None, :]
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        inside = (split < splits - first)[:, None] & (at < size)[None, :]
        total += tl.load(part_at, mask=inside, other=0.0)
        part_at += tl.cast(size, tl.int64) * BLOCK_S
    tl.store(dw + at, tl.sum(total, axis=0).to(dw.dtype.element_ty), mask=at < size)


class _Tile(NamedTuple):
    """A tile of dW. `share` is what of the peak it is taken to reach: assumed, no GPU has measured it.

    `occupancy` is that of its `Config`; None where the addresses decide how many registers are needed.
    """

    o: int
    n: int
    k: int
    num_warps: int
    share: float
    occupancy: int | None = None


_WIDE = (
    _Tile(256, 128, 32, 8, 1.0, 1), _Tile(128, 128, 64, 8, 0.9, 1), _Tile(128, 64, 64, 4, 0.75, 2),
    _Tile(64, 128, 64, 4, 0.75, 2), _Tile(64, 64, 64, 4, 0.6, 3),
)  # fmt: skip
_UNALIGNED = (_Tile(64, 64, 16, 8, 0.3),)  # loaded number by number, each with its address in registers
# For at most 16 rows, where memory is the limit; the second where x too is loaded number by number.
_FEW_ROWS = (_Tile(16, 64, 64, 4, 0.2),)
_FEW_UNALIGNED = (_Tile(16, 64, 16, 4, 0.1),)
# By precision, and whether rows are aligned. Of 32 x 32 numbers 4 warps would spill some exact variants.
_FP32 = {
    ("ieee", True): (_Tile(64, 64, 16, 8, 1.0, 2), _Tile(32, 64, 16, 4, 0.7, 4)),
    ("ieee", False): (_Tile(32, 32, 16, 8, 0.6),),
    ("tf32", True): (_Tile(64, 64, 32, 8, 1.0, 2), _Tile(32, 64, 32, 8, 0.7, 2)),
    ("tf32", False): (_Tile(32, 32, 32, 4, 0.6),),
}
_MAX_SPLITS = 128
_LEAST_STEPS = 8  # of a split
# Assumed: what a program does besides its steps, in steps; products in the time of a byte read or written.
_OVERHEAD_STEPS = 4
_PRODUCTS_PER_BYTE = 92


class Plan(NamedTuple):
    """How one weight gradient is launched; `cost` is the work of the busiest multiprocessor, in products."""

    config: Config
    tiles: int
    splits: int
    steps: int
    cost: float
    kind: str


@functools.lru_cache(maxsize=1024)
def plans_of(
    rows: int, columns: int, pixels: int, precision: str, itemsize: int, x_aligned: bool, machine: Machine
) -> tuple[Plan, ...]:
    """A plan for each tile that suits the shape, and each number of splits that fills the multiprocessors.

    Args:
        x_aligned: pixels of x can be loaded by 16 bytes; those of dy, where `rows` is a multiple of 16.
    """
    aligned = x_aligned and rows % 16 == 0
    tiles: tuple[_Tile, ...] = _WIDE if aligned else _UNALIGNED
    if rows <= 16:
        tiles = _FEW_ROWS if x_aligned else _FEW_UNALIGNED
    if itemsize == 4:
        tiles = _FP32[precision, aligned]
    processors = machine.multiprocessors
    plans = []
    for tile in tiles:
        block_k = tile.k if machine.reads_shared_memory else min(tile.k, 32)  # else registers bound it
        all_steps = -(-pixels // block_k)
        count = -(-rows // tile.o) * -(-columns // tile.n)
        stages = min(4, machine.shared_bytes // ((tile.o + tile.n) * block_k * itemsize))
        constants = {"BLOCK_O": tile.o, "BLOCK_N": tile.n, "BLOCK_K": block_k}
        config = Config(constants, tile.num_warps, stages, tile.occupancy)
        most = max(1, min(all_steps // _LEAST_STEPS, _MAX_SPLITS))
        waves = {max(1, min(n * processors // count, most)): n for n in (4, 3, 2, 1)}
        for splits, n in sorted({**waves, 1: 0}.items()):
            steps = -(-all_steps // splits)
            splits = -(-all_steps // steps)  # none is left without pixels
            cost: float = -(-count * splits // processors) * (steps + _OVERHEAD_STEPS)
            cost *= tile.o * tile.n * block_k / tile.share
            if splits > 1:  # written, and read again
                cost += 8 * splits * rows * columns * _PRODUCTS_PER_BYTE / processors
            plans.append(Plan(config, count, splits, steps, cost, f"waves={n}" if n else "unsplit"))
    return tuple(plans)


def conv2d_weight_gradient(
    dy: Tensor,
    x: Tensor,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: Sequence[int],
    winograd: bool,
) -> Tensor:
    """dW (O, C, kh, kw), channels_last, of dy (N, O, H', W') and x (N, C, H, W).

    Args:
        padding: left, right, top, bottom.
        winograd: of no meaning here.
    """
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    images, rows, y_height, y_width = dy.shape
    channels, height, width = x.shape[1:]
    pixels, columns = images * y_height * y_width, kernel_height * kernel_width * channels
    size = (rows, channels, kernel_height, kernel_width)
    dw = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if dw.numel() == 0 or pixels == 0:
        return dw.zero_()
    precision = product_precision(dy.dtype, "conv")
    plans = plans_of(
        rows, columns, pixels, precision, dy.element_size(), channels % 16 == 0, machine(dy.device)
    )
    plan = choose("conv2d_weight_gradient", (dy.dtype, rows, columns, near(pixels)), plans, dy.device)
    sizes: tuple[Any, ...] = (pixels, y_height * y_width, y_height, y_width, height, width, rows, channels)
    geometry = (columns, kernel_width, stride, padding[2], padding[0])
    split = plan.splits > 1
    split_pixels = plan.steps * plan.config.constants["BLOCK_K"]
    split_rows, split_columns = divmod(split_pixels, y_width)
    digits = (*divmod(split_rows, y_height), split_columns)
    result = dw.new_empty((plan.splits, rows, columns), dtype=torch.float32) if split else dw
    launch(
        _weight_gradient_kernel, (plan.tiles, plan.splits),
        dy, x, result, *sizes, *geometry, plan.steps, *digits,
        config=plan.config, PRECISION=precision,
    )  # fmt: skip
    if split:
        config = Config({"BLOCK_S": 2, "BLOCK": 512} if plan.splits <= 4 else {"BLOCK_S": 16, "BLOCK": 64})
        grid = (-(-dw.numel() // config.constants["BLOCK"]),)
        launch(_finish_kernel, grid, result, dw, dw.numel(), plan.splits, config=config)
    return dw


def conv2d_input_gradient(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: Sequence[int], winograd: bool
) -> Tensor:
    """dx (N, C, height, width), channels_last, of dy (N, O, H', W') and weight (O, C, kh, kw).

    Args:
        padding: left, right, top, bottom.
        winograd: of no meaning here.
    """
    dy = dy.contiguous(memory_format=torch.channels_last)
    size = (dy.shape[0], weight.shape[1], height, width)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if dx.numel() == 0 or dy.numel() == 0:
        return dx.zero_()
    for part, geometry in gradient_geometries(weight, (height, width), stride, padding):
        convolve(dy, part, dx, geometry)
    return dx
