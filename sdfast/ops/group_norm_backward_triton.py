"""Gradients of group_norm in Triton.

    dz = dy act'(z),  dx̂ = dz (1 + scale) weight
    dx = rstd (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)), means over each group
    dshift = Σ dz,  dscale = Σ dz (x̂ weight + bias);  over images too dbias, dweight = Σ dz (1 + scale) {1, x̂}

All of these follow from two sums of each channel and image, Σ dz and Σ dz x̂. Programs sum them over chunks of
pixels; a second launch adds the chunks in order, to groups and to parameters; a third writes dx. x̂ and z are
recomputed from x and the saved statistics. Bytes: 2 (x + dy) + dx. The limit is memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._group_norm_layout import arranged, empty_in_layout, is_last, pixels_of
from sdfast.ops._group_norm_tiles_triton import SIZES, affine, tile_of
from sdfast.ops._triton import Config, launch, multiprocessors
from sdfast.ops.group_norm_triton import row_stride


@triton.jit
def _at_channels(
    mean, rstd, weight, bias, scale, shift, n, block, channels, groups, group_channels, scale_row, shift_row,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block's channels, which there are, their mean, rstd, factor, offset and the places of the groups."""
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < channels
    group = n * groups + channel // group_channels
    m = tl.load(mean + group, mask=there, other=0.0)
    r = tl.load(rstd + group, mask=there, other=0.0)
    factor, offset = affine(weight, bias, scale, shift, n, channel, there, scale_row, shift_row)
    return channel, there, m[None, :], r[None, :], factor[None, :], offset[None, :], group


@triton.jit
def _dz(dy, xhat, factor, offset, SILU: tl.constexpr):
    """dy act'(z)."""
    if SILU:
        z = xhat * factor + offset
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    dy, x,  # (N, pixels, channels), or channels first
    mean, rstd,  # (N, groups)
    weight, bias,  # (channels,), or None
    scale, shift,  # (N, channels), strides scale_row and shift_row, or None
    sums,  # (2, N, chunks, channels): Σ dz and Σ dz x̂
    pixels, channel_stride, channels, groups, group_channels, scale_row, shift_row,
    images, blocks, chunks, steps,
    SILU: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images, chunks of `steps` tiles, blocks of channels."""
    if not LAST:
        pixels = channel_stride
    program = tl.program_id(0)
    chunk = (program // blocks % chunks).to(tl.int64)
    n = (program // blocks // chunks).to(tl.int64)
    channel, there, m, r, factor, offset, _ = _at_channels(
        mean, rstd, weight, bias, scale, shift, n, program % blocks, channels, groups, group_channels,
        scale_row, shift_row, BLOCK_C,
    )  # fmt: skip
    row, column = tl.arange(0, BLOCK_P)[:, None], channel[None, :]
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(0, steps):
        first = (chunk * steps + step) * BLOCK_P
        inside = (row < pixels - first) & there[None, :]
        at = tile_of(x, n, first, row, column, pixels, channels, LAST)
        xhat = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - m) * r
        at = tile_of(dy, n, first, row, column, pixels, channels, LAST)
        dz = _dz(tl.load(at, mask=inside, other=0.0).to(tl.float32), xhat, factor, offset, SILU)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    at = sums + (n * chunks + chunk) * channels + channel
    tl.store(at, tl.sum(sum_dz, axis=0), mask=there)
    tl.store(at + tl.cast(images, tl.int64) * chunks * channels, tl.sum(sum_dz_xhat, axis=0), mask=there)


@triton.jit(do_not_specialize=SIZES)
def _finish_kernel(
    sums,  # (2, N, chunks, channels)
    weight, bias, scale,  # as for _sums_kernel
    means,  # (2, N, groups), written: of dx̂ and dx̂ x̂
    dweight, dbias,  # (channels,), or None
    dscale, dshift,  # (N, channels), or None
    pixels, channels, groups, group_channels, scale_row, images, chunks,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the chunks. Grid: (images + 1) groups; the last row of programs adds images, for parameters."""
    program = tl.program_id(0)
    group = program % groups
    n = (program // groups).to(tl.int64)
    distance = tl.cast(images, tl.int64) * chunks * channels
    begin = tl.where(n == images, 0, n * chunks)
    rows = tl.where(n == images, images * chunks, chunks)
    mean_dxhat = tl.zeros((BLOCK_C,), tl.float32)
    mean_dxhat_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, group_channels, BLOCK_C):
        local = first + tl.arange(0, BLOCK_C)
        channel = group * group_channels + local
        there = local < group_channels
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        total_xhat = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for step in range(0, rows, BLOCK_N):
            row = step + tl.arange(0, BLOCK_N)
            inside = (row < rows)[:, None] & there[None, :]
            at = sums + (begin + row)[:, None] * channels + channel[None, :]
            dz = tl.load(at, mask=inside, other=0.0)
            dz_xhat = tl.load(at + distance, mask=inside, other=0.0)
            if scale is not None and n == images:
                s = scale + (row // chunks)[:, None] * scale_row + channel[None, :]
                s = 1.0 + tl.load(s, mask=inside, other=0.0).to(tl.float32)
                dz *= s
                dz_xhat *= s
            total += dz
            total_xhat += dz_xhat
        dz = tl.sum(total, axis=0)
        dz_xhat = tl.sum(total_xhat, axis=0)
        if n == images:
            if dweight is not None:
                tl.store(dweight + channel, dz_xhat.to(dweight.dtype.element_ty), mask=there)
            if dbias is not None:
                tl.store(dbias + channel, dz.to(dbias.dtype.element_ty), mask=there)
        else:
            factor, offset = affine(weight, bias, None, None, n, channel, there, 0, 0)
            at = n * channels + channel
            if dscale is not None:
                result = dz_xhat * factor + dz * offset
                tl.store(dscale + at, result.to(dscale.dtype.element_ty), mask=there)
            if dshift is not None:
                tl.store(dshift + at, dz.to(dshift.dtype.element_ty), mask=there)
            if scale is not None:
                s = tl.load(scale + n * scale_row + channel, mask=there, other=0.0)
                factor *= 1.0 + s.to(tl.float32)
            mean_dxhat += dz * factor
            mean_dxhat_xhat += dz_xhat * factor
    if n < images:
        elements = pixels * 1.0 * group_channels
        tl.store(means + program, tl.sum(mean_dxhat, axis=0) / elements)
        tl.store(means + images * groups + program, tl.sum(mean_dxhat_xhat, axis=0) / elements)


@triton.jit(do_not_specialize=SIZES)
def _input_gradient_kernel(
    dy, x, mean, rstd, weight, bias, scale, shift,  # as for _sums_kernel
    means,  # (2, N, groups): of dx̂ and dx̂ x̂
    dx,  # as x
    pixels, channel_stride, channels, groups, group_channels, scale_row, shift_row,
    images, blocks, chunks, steps,
    SILU: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images, chunks, blocks of channels; backwards, through what L2 still holds."""
    if not LAST:
        pixels = channel_stride
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = (program // blocks % chunks).to(tl.int64)
    n = (program // blocks // chunks).to(tl.int64)
    channel, there, m, r, factor, offset, group = _at_channels(
        mean, rstd, weight, bias, scale, shift, n, program % blocks, channels, groups, group_channels,
        scale_row, shift_row, BLOCK_C,
    )  # fmt: skip
    mean_dxhat = tl.load(means + group, mask=there, other=0.0)[None, :]
    mean_dxhat_xhat = tl.load(means + images * groups + group, mask=there, other=0.0)[None, :]
    row, column = tl.arange(0, BLOCK_P)[:, None], channel[None, :]
    for step in range(0, steps):
        first = (chunk * steps + step) * BLOCK_P
        inside = (row < pixels - first) & there[None, :]
        at = tile_of(x, n, first, row, column, pixels, channels, LAST)
        xhat = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - m) * r
        at = tile_of(dy, n, first, row, column, pixels, channels, LAST)
        dz = _dz(tl.load(at, mask=inside, other=0.0).to(tl.float32), xhat, factor, offset, SILU)
        result = r * (dz * factor - mean_dxhat - xhat * mean_dxhat_xhat)
        at = tile_of(dx, n, first, row, column, pixels, channels, LAST)
        tl.store(at, result.to(dx.dtype.element_ty), mask=inside)


def _config(channels: int, last: bool) -> Config:
    """Tiles of 2048 elements, 8 to a thread: gradients need more registers than values."""
    limit = 64 if last else 16
    block_c = min(triton.next_power_of_2(channels), limit)
    return Config({"BLOCK_P": 2048 // block_c, "BLOCK_C": block_c}, num_warps=8, num_stages=1)


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, ...]:
    """sdfast::group_norm_backward: dx, dweight, dbias, dscale and dshift; of what is None nothing."""
    dx = empty_in_layout(x)
    parameters = (weight, bias, scale, shift)
    gradients = tuple(None if p is None else p.new_empty(p.shape) for p in parameters)
    results = (dx, *(x.new_empty(0) if g is None else g for g in gradients))
    if x.numel() == 0:
        return (dx, *(g.zero_() for g in results[1:]))
    last = is_last(x)
    dy, x = arranged(dy, last), arranged(x, last)
    images, channels, pixels = x.shape[0], x.shape[1], pixels_of(x)
    group_channels = channels // num_groups
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    scale, scale_row = row_stride(scale)
    shift, shift_row = row_stride(shift)

    config = _config(channels, last)
    blocks = -(-channels // config.constants["BLOCK_C"])
    rows = -(-pixels // config.constants["BLOCK_P"])
    wanted = -(-8 * multiprocessors(x.device) // (images * blocks))
    steps = -(-rows // min(wanted, rows))
    chunks = -(-rows // steps)
    grid = (images * chunks * blocks,)
    operands = (dy, x, mean.contiguous(), rstd.contiguous(), weight, bias, scale, shift)
    sizes = (
        pixels,
        1 if last else pixels,
        channels,
        num_groups,
        group_channels,
        scale_row,
        shift_row,
        images,
        blocks,
        chunks,
        steps,
    )
    sums = x.new_empty((2, images, chunks, channels), dtype=torch.float32)
    means = x.new_empty((2, images, num_groups), dtype=torch.float32)
    launch(_sums_kernel, grid, *operands, sums, *sizes, config=config, SILU=silu, LAST=last)
    block_c = min(max(triton.next_power_of_2(group_channels), 16), 64)
    launch(
        _finish_kernel, ((images + 1) * num_groups,), sums, weight, bias, scale, means, *gradients,
        pixels, channels, num_groups, group_channels, scale_row, images, chunks,
        config=Config({"BLOCK_N": 1024 // block_c, "BLOCK_C": block_c}, num_warps=4, num_stages=1),
    )  # fmt: skip
    launch(_input_gradient_kernel, grid, *operands, means, dx, *sizes, config=config, SILU=silu, LAST=last)
    return results
