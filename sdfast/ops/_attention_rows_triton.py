"""What of attention in Triton goes once over rows, (B, heads, rows, D): results of splits, Σ do o.

Each program takes a few whole rows. Bytes: every tensor once; the limit is memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._attention_triton import SIZES, alignment, strides
from sdfast.ops._triton import Config, launch


@triton.jit
def _place(row, rows, heads, batch_stride, head_stride, row_stride, UNIT: tl.constexpr):
    """Where rows of (B, heads, rows, D) begin that are numbered as if contiguous, (rows, 1)."""
    at = row // rows // heads * batch_stride + row // rows % heads * head_stride + row % rows * row_stride
    return (at * UNIT)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    partials,  # (splits B, heads, L, D), fp32, contiguous
    lses,  # (splits B, heads, L)
    o,  # (B, heads, L, D)
    lse,  # (B, heads, L), or None
    count, L, heads, splits, o_batch, o_head, o_row,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each split's results weighted by its share of Σ weights. Grid: the blocks of all `count` queries."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = row < count
    tile_inside = inside[:, None] & (column < D)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for split in range(0, splits):
        top = tl.maximum(top, tl.load(lses + split * count + row, mask=inside, other=0.0))
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    at = row
    for _ in range(0, splits):
        weight = tl.exp2(tl.load(lses + at, mask=inside, other=0.0) - top)
        total += weight
        acc += weight[:, None] * tl.load(partials + at[:, None] * D + column, mask=tile_inside, other=0.0)
        at += count
    if lse is not None:
        tl.store(lse + row, top + tl.log2(total), mask=inside)
    o += _place(row, L, heads, o_batch, o_head, o_row, UNIT)
    tl.store(o + column, (acc / total[:, None]).to(o.dtype.element_ty), mask=tile_inside)


@triton.jit(do_not_specialize=SIZES)
def _sum_kernel(
    dk_parts, dv_parts,  # (splits B, heads, S, D), fp32, contiguous
    dk, dv,  # (B, heads, S, D)
    count, S, heads, splits, dk_batch, dk_head, dk_row,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: the blocks of all `count` keys."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < count)[:, None] & (column < D)
    part = row[:, None] * D + column
    dk_total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dv_total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in range(0, splits):
        dk_total += tl.load(dk_parts + part, mask=inside, other=0.0)
        dv_total += tl.load(dv_parts + part, mask=inside, other=0.0)
        part += count * tl.full((), D, tl.int64)
    at = _place(row, S, heads, dk_batch, dk_head, dk_row, UNIT) + column
    tl.store(dk + at, dk_total.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_total.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _delta_kernel(
    do,  # (B, heads, L, D)
    o,  # (B, heads, L, D)
    delta,  # (B, heads, L)
    count, L, heads, do_batch, do_head, do_row, o_batch, o_head, o_row,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ do o of each query. Grid: the blocks of all `count` queries."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < count)[:, None] & (column < D)
    do += _place(row, L, heads, do_batch, do_head, do_row, UNIT)
    o += _place(row, L, heads, o_batch, o_head, o_row, UNIT)
    product = tl.load(do + column, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(o + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(product, 1), mask=row < count)


def _config(head_dim: int) -> Config:
    block_d = triton.next_power_of_2(head_dim)
    return Config({"BLOCK_R": max(1, 2048 // block_d), "BLOCK_D": block_d}, num_warps=4)


def _grid(count: int, config: Config) -> tuple[int]:
    return (-(-count // config.constants["BLOCK_R"]),)


def combine(partials: Tensor, lses: Tensor, o: Tensor, lse: Tensor | None) -> None:
    """Fill o, and lse where there is one, from the results of splits of the keys.

    Args:
        partials: (splits B, heads, L, D), fp32, contiguous.
        lses: (splits B, heads, L).
        o: (B, heads, L, D).
        lse: (B, heads, L), or None.
    """
    batch, heads, queries, head_dim = o.shape
    count, unit = batch * heads * queries, alignment(o)
    config = _config(head_dim)._replace(num_warps=8)  # with fewer it spills
    launch(
        _combine_kernel, _grid(count, config), partials, lses, o, lse,
        count, queries, heads, partials.shape[0] // batch, *strides(unit, o),
        config=config, UNIT=unit, D=head_dim,
    )  # fmt: skip


def sum_parts(dk_parts: Tensor, dv_parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill dk and dv, (B, heads, S, D), alike in strides, from (splits B, heads, S, D), fp32, contiguous."""
    batch, heads, keys, head_dim = dk.shape
    count, config, unit = batch * heads * keys, _config(head_dim), alignment(dk)
    launch(
        _sum_kernel, _grid(count, config), dk_parts, dv_parts, dk, dv,
        count, keys, heads, dk_parts.shape[0] // batch, *strides(unit, dk),
        config=config, UNIT=unit, D=head_dim,
    )  # fmt: skip


def row_products(do: Tensor, o: Tensor) -> Tensor:
    """Σ do o, fp32: (B, heads, L) of two (B, heads, L, D), both `aligned`."""
    batch, heads, queries, head_dim = o.shape
    delta = o.new_empty((batch, heads, queries), dtype=torch.float32)
    config, unit = _config(head_dim), alignment(o)
    launch(
        _delta_kernel, _grid(delta.numel(), config), do, o, delta, delta.numel(), queries, heads,
        *strides(unit, do, o), config=config, UNIT=unit, D=head_dim,
    )  # fmt: skip
    return delta
