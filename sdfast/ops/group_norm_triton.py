"""group_norm in Triton, y = act((x̂ weight + bias) (1 + scale) + shift), of one or two sources of channels.

A program owns some whole groups, channels last as many as make runs of whole vectors, if any do. Where their
pixels fit its registers it computes mean, squares and y from these: one launch, vectors of 8 bytes. Else, of
16, programs take chunks of pixels, each place of a tile keeps a running mean and squares (Welford), and a
second launch combines the chunks of its groups by Chan's formula, in order, as it applies them, last chunk
first: what was read last is in L2 still. A group that is too wide is cut into parts, combined as chunks are.
Bytes: x + y, or 2 x + y. The limit is memory, of small images the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._group_norm_layout import (
    arranged,
    empty_concatenation,
    empty_in_layout,
    is_last,
    pixels_of,
)
from sdfast.ops._group_norm_plan import (
    Shape,
    Tiling,
    blocks_of_tiles,
    chunks_of_tiles,
    plan_of,
    tiling,
)
from sdfast.ops._group_norm_tiles_triton import (
    SIZES,
    affine,
    load_tile,
    rstd_of,
    span_channels,
    store_tile,
    to_channels,
    to_groups,
)
from sdfast.ops._triton import launch

_PARTIALS = tl.constexpr(32)  # chunks that are combined at a time


@triton.jit(do_not_specialize=SIZES)
def _whole_kernel(
    x,  # (N, pixels, channels), or channels first
    skip,  # the same of skip_channels, or None
    weight, bias,  # (channels + skip_channels,), or None
    scale, shift,  # (N, channels + skip_channels), strides scale_row and shift_row, or None
    y,  # as x, channels + skip_channels
    mean_out, rstd_out,  # (N, groups), or None
    pixels, channel_stride, channels, skip_channels, groups, group_channels, eps, scale_row, shift_row, spans,
    SILU: tl.constexpr, LAST: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Everything, of images with at most BLOCK_P pixels. Grid: the spans of each image."""
    if not LAST:
        pixels = channel_stride
    program = tl.program_id(0)
    n = (program // spans).to(tl.int64)
    total = channels + skip_channels
    first_group, channel, there, local = span_channels(
        program % spans, group_channels, total, SPAN, PARTS, BLOCK_C
    )
    member = local[None, :] == tl.arange(0, GROUPS)[:, None]
    row = tl.arange(0, BLOCK_P)[:, None]
    inside = (row < pixels) & there[None, :]
    column = channel[None, :]

    value = load_tile(x, skip, n, 0, row, column, inside, pixels, channels, skip_channels, LAST)
    factor, offset = affine(weight, bias, scale, shift, n, channel, there, scale_row, shift_row)
    elements = pixels * 1.0 * group_channels
    mean = tl.div_rn(to_groups(tl.sum(value, axis=0), member), elements)
    value = tl.where(inside, value - to_channels(mean, member)[None, :], 0.0)
    squares = to_groups(tl.sum(value * value, axis=0), member)
    rstd = rstd_of(squares, elements, eps)

    factor *= to_channels(rstd, member)
    z = value * factor[None, :] + offset[None, :]
    store_tile(y, z, n, 0, row, column, inside, pixels, total, SILU, LAST)
    if mean_out is not None:
        group = first_group + tl.arange(0, GROUPS)
        owned = (group < groups) & (tl.arange(0, GROUPS) < SPAN // group_channels)
        tl.store(mean_out + n * groups + group, mean, mask=owned)
        tl.store(rstd_out + n * groups + group, rstd, mask=owned)


@triton.jit(do_not_specialize=SIZES)
def _partials_kernel(
    x, skip,  # as for _whole_kernel
    means, squares,  # (N, groups, partials), written
    pixels, channel_stride, channels, skip_channels, groups, group_channels, spans, chunks, steps,
    LAST: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, and squares of the differences from it, of each chunk of `steps` tiles and each group.

    Of a group wider than a span there are PARTS partials for each chunk. Grid: images, chunks, spans.
    """
    if not LAST:
        pixels = channel_stride
    program = tl.program_id(0)
    span = program % spans
    chunk = (program // spans % chunks).to(tl.int64)
    n = (program // spans // chunks).to(tl.int64)
    first_group, channel, there, local = span_channels(
        span, group_channels, channels + skip_channels, SPAN, PARTS, BLOCK_C
    )
    row = tl.arange(0, BLOCK_P)[:, None]
    column = channel[None, :]
    begin = chunk * steps * BLOCK_P
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(0, steps):
        first = begin + step * BLOCK_P
        inside = (row < pixels - first) & there[None, :]
        value = load_tile(x, skip, n, first, row, column, inside, pixels, channels, skip_channels, LAST)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * (value - mean)

    # What every place of the tile has seen: all steps, or, at the image's end, fewer.
    left = tl.minimum(pixels - begin, steps * BLOCK_P)
    seen = (tl.maximum(left - row + BLOCK_P - 1, 0) // BLOCK_P).to(tl.float32)
    part = span % PARTS
    width = group_channels
    if PARTS > 1:
        width = tl.minimum(group_channels - part * SPAN, SPAN)
        local = tl.zeros_like(local)
    elements = left * 1.0 * width
    member = local[None, :] == tl.arange(0, GROUPS)[:, None]
    group_mean = tl.div_rn(to_groups(tl.sum(mean * seen, axis=0), member), elements)
    mean -= to_channels(group_mean, member)[None, :]
    square = tl.where(there[None, :], square + mean * mean * seen, 0.0)
    group_square = to_groups(tl.sum(square, axis=0), member)

    group = first_group + tl.arange(0, GROUPS)
    owned = (group < groups) & (tl.arange(0, GROUPS) < tl.maximum(SPAN // group_channels, 1))
    at = ((n * groups + group) * chunks + chunk) * PARTS + part
    tl.store(means + at, group_mean, mask=owned)
    tl.store(squares + at, group_square, mask=owned)


@triton.jit
def _combine(
    means, squares, n, group, owned, pixels, groups, group_channels, eps, chunks, chunk_pixels,
    SPAN: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of some groups, (GROUPS,), from their partials."""
    partials = chunks * PARTS
    row = ((n * groups + group) * partials)[:, None]
    elements = pixels * 1.0 * group_channels
    total = tl.zeros((GROUPS, _PARTIALS), tl.float32)
    for first in range(0, partials, _PARTIALS):
        i = first + tl.arange(0, _PARTIALS)
        inside = owned[:, None] & (i < partials)[None, :]
        count = _elements(i, pixels, group_channels, chunk_pixels, SPAN, PARTS)[None, :]
        total += tl.load(means + row + i[None, :], mask=inside, other=0.0) * count
    mean = tl.div_rn(tl.sum(total, axis=1), elements)
    total = tl.zeros((GROUPS, _PARTIALS), tl.float32)
    for first in range(0, partials, _PARTIALS):
        i = first + tl.arange(0, _PARTIALS)
        inside = owned[:, None] & (i < partials)[None, :]
        count = _elements(i, pixels, group_channels, chunk_pixels, SPAN, PARTS)[None, :]
        away = tl.load(means + row + i[None, :], mask=inside, other=0.0) - mean[:, None]
        within = tl.load(squares + row + i[None, :], mask=inside, other=0.0)
        total += tl.where(inside, within + away * away * count, 0.0)
    return mean, rstd_of(tl.sum(total, axis=1), elements, eps)


@triton.jit
def _elements(i, pixels, group_channels, chunk_pixels, SPAN: tl.constexpr, PARTS: tl.constexpr):
    """How many elements partial i is of."""
    width = group_channels * 1.0
    if PARTS > 1:
        width = tl.minimum(group_channels - i % PARTS * SPAN, SPAN).to(tl.float32)
    return tl.minimum(pixels - i // PARTS * chunk_pixels, chunk_pixels).to(tl.float32) * width


@triton.jit(do_not_specialize=SIZES)
def _apply_kernel(
    x, skip, weight, bias, scale, shift, y, mean_out, rstd_out,  # as for _whole_kernel
    means, squares,  # (N, groups, chunks PARTS); or mean and rstd, (N, groups), if chunks is 0
    pixels, channel_stride, channels, skip_channels, groups, group_channels, eps, scale_row, shift_row,
    spans, chunks, chunk_pixels, blocks, steps,
    SILU: tl.constexpr, LAST: tl.constexpr, KNOWN: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, where the statistics are KNOWN or there in parts. Grid: images, blocks of `steps` tiles, spans."""
    if not LAST:
        pixels = channel_stride
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    span = program % spans
    block = (program // spans % blocks).to(tl.int64)
    n = (program // spans // blocks).to(tl.int64)
    total = channels + skip_channels
    first_group, channel, there, local = span_channels(span, group_channels, total, SPAN, PARTS, BLOCK_C)
    if PARTS > 1:
        local = tl.zeros_like(local)
    member = local[None, :] == tl.arange(0, GROUPS)[:, None]
    group = first_group + tl.arange(0, GROUPS)
    owned = (group < groups) & (tl.arange(0, GROUPS) < tl.maximum(SPAN // group_channels, 1))
    if KNOWN:
        mean = tl.load(means + n * groups + group, mask=owned, other=0.0)
        rstd = tl.load(squares + n * groups + group, mask=owned, other=0.0)
    else:
        mean, rstd = _combine(
            means, squares, n, group, owned, pixels, groups, group_channels, eps, chunks, chunk_pixels,
            SPAN, PARTS, GROUPS,
        )  # fmt: skip
    if mean_out is not None and block == 0:
        tl.store(mean_out + n * groups + group, mean, mask=owned)
        tl.store(rstd_out + n * groups + group, rstd, mask=owned)
    factor, offset = affine(weight, bias, scale, shift, n, channel, there, scale_row, shift_row)
    factor *= to_channels(rstd, member)
    centre = to_channels(mean, member)[None, :]
    row = tl.arange(0, BLOCK_P)[:, None]
    column = channel[None, :]
    for step in range(0, steps):
        first = (block * steps + step) * BLOCK_P
        inside = (row < pixels - first) & there[None, :]
        value = load_tile(x, skip, n, first, row, column, inside, pixels, channels, skip_channels, LAST)
        z = (value - centre) * factor[None, :] + offset[None, :]
        store_tile(y, z, n, first, row, column, inside, pixels, total, SILU, LAST)


def row_stride(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A matrix whose rows are contiguous, or None, and the stride of these."""
    if t is None:
        return None, 0
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


class _Call:
    """One call's operands as kernels take them, and the sizes that they are launched with."""

    def __init__(
        self, x: Tensor, skip: Tensor | None, y: Tensor, num_groups: int, weight: Tensor | None,
        bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, eps: float,
    ) -> None:  # fmt: skip
        last = is_last(x) and (skip is None or is_last(skip))
        x, skip = arranged(x, last), None if skip is None else arranged(skip, last)
        scale, scale_row = row_stride(scale)
        shift, shift_row = row_stride(shift)
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        channels, skip_channels = x.shape[1], 0 if skip is None else skip.shape[1]
        group_channels = (channels + skip_channels) // num_groups
        pixels = pixels_of(x)
        self.shape = Shape(x.shape[0], pixels, num_groups, group_channels, x.element_size(), last)
        self.sources = (x, skip)
        self.operands = (x, skip, weight, bias, scale, shift, y)
        self.sizes = (pixels, 1 if last else pixels, channels, skip_channels, num_groups, group_channels)
        self.numbers = (*self.sizes, eps, scale_row, shift_row)
        self.keywords = {"SILU": silu, "LAST": last}

    def apply(
        self, tiles: Tiling, means: Tensor, squares: Tensor, chunks: int, chunk_pixels: int,
        mean: Tensor | None = None, rstd: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y by `_apply_kernel`; statistics are known where there are no chunks.

        Where there are, each program reads those of its groups: it takes some tiles for that.
        """
        blocks, steps = blocks_of_tiles(self.shape, tiles, 8, means.device, least_steps=4 if chunks else 1)
        launch(
            _apply_kernel, (self.shape.images * blocks * tiles.spans,), *self.operands, mean, rstd,
            means, squares, *self.numbers, tiles.spans, chunks, chunk_pixels, blocks, steps,
            config=tiles.config, KNOWN=chunks == 0, **self.keywords,
        )  # fmt: skip

    def run(self, mean: Tensor | None = None, rstd: Tensor | None = None) -> None:
        """y and, where given, mean and rstd."""
        shape, x = self.shape, self.sources[0]
        plan = plan_of(shape, x.dtype, x.device)
        tiles = plan.tiles
        if plan.whole:
            launch(
                _whole_kernel, (shape.images * tiles.spans,), *self.operands, mean, rstd, *self.numbers,
                tiles.spans, config=tiles.config, **self.keywords,
            )  # fmt: skip
            return
        chunks, steps = chunks_of_tiles(shape, tiles, x.device)
        partials = (shape.images, shape.groups, chunks * tiles.parts)
        means, squares = (x.new_empty(partials, dtype=torch.float32) for _ in range(2))
        launch(
            _partials_kernel, (shape.images * chunks * tiles.spans,), *self.sources, means, squares,
            *self.sizes, tiles.spans, chunks, steps, config=tiles.config, LAST=shape.last,
        )  # fmt: skip
        chunk_pixels = steps * tiles.config.constants["BLOCK_P"]
        self.apply(tiles, means, squares, chunks, chunk_pixels, mean, rstd)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """sdfast::group_norm."""
    y = empty_in_layout(x)
    if y.numel():
        _Call(x, None, y, num_groups, weight, bias, scale, shift, silu, eps).run()
    return y


def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sdfast::group_norm_forward."""
    y = empty_in_layout(x)
    new = x.new_empty if y.numel() else x.new_zeros
    mean, rstd = (new((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    if y.numel():
        _Call(x, None, y, num_groups, weight, bias, scale, shift, silu, eps).run(mean, rstd)
    return y, mean, rstd


def group_norm_pair(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """(N, C, *) and (N, C2, *) -> (N, C + C2, *)."""
    y = empty_concatenation(x, skip)
    if y.numel():
        _Call(x, skip, y, num_groups, weight, bias, scale, shift, silu, eps).run()
    return y


def group_norm_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """x, (N, C, *), and its statistics, (N, num_groups) -> (N, C, *)."""
    y = empty_in_layout(x)
    if y.numel():
        call = _Call(x, None, y, num_groups, weight, bias, scale, shift, silu, 0.0)
        call.apply(tiling(call.shape), mean.contiguous(), rstd.contiguous(), 0, 0)
    return y
