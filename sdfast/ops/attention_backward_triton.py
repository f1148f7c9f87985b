"""Gradients of attention in Triton.

    p = 2^(scale log2 e · q kᵀ − lse),  dv = pᵀ do,  dp = do vᵀ,  delta = Σ do o,
    ds = p (dp − delta),  dq = scale ds k,  dk = scale dsᵀ q          (Dao 2023, "FlashAttention-2", alg. 2)

A program keeps dk and dv of a block of keys and walks over the queries, another keeps dq of a block of
queries and walks over the keys; both compute p and ds, so that nothing is added to in memory. Of wide heads
they share out the columns of their results. Where blocks of keys are fewer than multiprocessors, the queries
are shared out, and a second kernel adds the fp32 results in order.
Bytes: all tensors once, those of the other side again from L2 for every block; the limit is the tensor
cores', 14 L S D flops, where the forward has 4 L S D, and 8 L S D more for each further slice of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._attention_rows_triton import row_products, sum_parts
from sdfast.ops._attention_triton import (
    LOG2E,
    SIZES,
    aligned,
    alignment,
    chunks,
    load,
    reads_shared_memory,
    rows,
    slices,
    split_walk,
    streamed_product,
    strides,
)
from sdfast.ops._native import empty_by_token
from sdfast.ops._triton import (
    Config,
    architecture,
    launch,
    multiprocessors,
    product_precision,
    shared_memory_bytes,
)


@triton.jit(do_not_specialize=SIZES)
def _keys_kernel(
    do, q,  # (B, heads, L, D)
    k, v,  # (B, heads, S, D)
    lse, delta,  # (B, heads, L)
    dk, dv,  # (splits B, heads, S, O_COLUMNS); D, of the others, is that or more
    L, S, batch, heads, blocks, splits, split_queries,
    do_batch, do_head, do_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dk_batch, dk_head, dk_row,  # dv's too
    scale, factor,  # factor: scale log2 e
    IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, O_UNIT: tl.constexpr,
    D: tl.constexpr, O_COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: (blocks of keys, slices of columns, splits of queries, heads of the batch).

    Tiles are in chunks of D0 and D1 columns. k and v stay with the program unless q kᵀ and do vᵀ are
    streamed, CHUNK columns at a time. All products are transposed: keys are their rows.
    """
    program = tl.program_id(0)
    first_key = program % blocks * BLOCK_N
    part = program // blocks
    first_column = part % SLICES * (D0 + D1)
    part = part // SLICES
    split = part % splits
    head = (part // splits).to(tl.int64)
    key = first_key + tl.arange(0, BLOCK_N)
    inside = (key < S)[:, None]
    column0 = (first_column + tl.arange(0, D0))[None, :]
    if D1 > 0:
        column1 = (first_column + D0 + tl.arange(0, D1))[None, :]
    END1: tl.constexpr = SLICES * (D0 + D1)  # where the columns of the last slice end
    END0: tl.constexpr = END1 - D1

    first = split * split_queries
    last = tl.minimum(first + split_queries, L)
    if IS_CAUSAL:
        first = tl.maximum(first, first_key)
    b, h = head // heads, head % heads
    do += (b * do_batch + h * do_head) * UNIT + rows(first, do_row, UNIT, BLOCK_M)
    q += (b * q_batch + h * q_head) * UNIT + rows(first, q_row, UNIT, BLOCK_M)
    k += (b * k_batch + h * k_head) * UNIT + rows(first_key, k_row, UNIT, BLOCK_N)
    v += (b * v_batch + h * v_head) * UNIT + rows(first_key, v_row, UNIT, BLOCK_N)
    lse += head * L
    delta += head * L
    if CHUNK == 0:
        k0 = load(k + column0, inside, column0, True, D, END0)
        v0 = load(v + column0, inside, column0, True, D, END0)
        if D1 > 0:
            k1 = load(k + column1, inside, column1, True, D, END1)
            v1 = load(v + column1, inside, column1, True, D, END1)
    dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, D0), tl.float32)
    if D1 > 0:
        dk1 = tl.zeros((BLOCK_N, D1), tl.float32)
        dv1 = tl.zeros((BLOCK_N, D1), tl.float32)
    for start in range(first, last, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        there = (query < last)[:, None]
        if CHUNK > 0:
            s = streamed_product(k, q, inside, there, D, CHUNK, BLOCK_N, BLOCK_M, PRECISION)
            q0 = load(q + column0, there, column0, True, D, END0)
        else:
            q0 = load(q + column0, there, column0, True, D, END0)
            s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load(q + column1, there, column1, True, D, END1)
            if CHUNK == 0:
                s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
        # A query beyond the last has zeros in do, so that it adds nothing.
        p = tl.exp2(s * factor - tl.load(lse + query, mask=query < last, other=0.0)[None, :])
        if IS_CAUSAL:
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        if CHUNK > 0:
            ds = streamed_product(v, do, inside, there, D, CHUNK, BLOCK_N, BLOCK_M, PRECISION)
            do0 = load(do + column0, there, column0, True, D, END0)
        else:
            do0 = load(do + column0, there, column0, True, D, END0)
            ds = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        weights = p.to(do.dtype.element_ty)
        dv0 = tl.dot(weights, do0, dv0, input_precision=PRECISION)
        if D1 > 0:
            do1 = load(do + column1, there, column1, True, D, END1)
            if CHUNK == 0:
                ds = tl.dot(v1, tl.trans(do1), ds, input_precision=PRECISION)
            dv1 = tl.dot(weights, do1, dv1, input_precision=PRECISION)
        ds = p * (ds - tl.load(delta + query, mask=query < last, other=0.0)[None, :])
        slopes = ds.to(q.dtype.element_ty)
        dk0 = tl.dot(slopes, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dk1 = tl.dot(slopes, q1, dk1, input_precision=PRECISION)
        q += q_row * tl.full((), BLOCK_M * UNIT, tl.int64)
        do += do_row * tl.full((), BLOCK_M * UNIT, tl.int64)

    at = ((split * batch + b) * dk_batch + h * dk_head) * O_UNIT + rows(first_key, dk_row, O_UNIT, BLOCK_N)
    mask = inside & (column0 < O_COLUMNS)
    tl.store(dk + at + column0, (scale * dk0).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at + column0, dv0.to(dv.dtype.element_ty), mask=mask)
    if D1 > 0:
        mask = inside & (column1 < O_COLUMNS)
        tl.store(dk + at + column1, (scale * dk1).to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + at + column1, dv1.to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _queries_kernel(
    do, q,  # (B, heads, L, D)
    k, v,  # (B, heads, S, D)
    lse, delta,  # (B, heads, L)
    dq,  # (B, heads, L, O_COLUMNS)
    L, S, heads, blocks,
    do_batch, do_head, do_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dq_batch, dq_head, dq_row,
    scale, factor,  # factor: scale log2 e
    IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, O_UNIT: tl.constexpr,
    D: tl.constexpr, O_COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq. Grid: (blocks of queries, slices of columns, heads of the batch). See `_keys_kernel`."""
    program = tl.program_id(0)
    block = program % blocks
    if IS_CAUSAL:
        block = blocks - 1 - block  # the longest first
    first_query = block * BLOCK_M
    part = program // blocks
    first_column = part % SLICES * (D0 + D1)
    head = (part // SLICES).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_M)
    inside = (query < L)[:, None]
    column0 = (first_column + tl.arange(0, D0))[None, :]
    if D1 > 0:
        column1 = (first_column + D0 + tl.arange(0, D1))[None, :]
    END1: tl.constexpr = SLICES * (D0 + D1)
    END0: tl.constexpr = END1 - D1

    b, h = head // heads, head % heads
    do += (b * do_batch + h * do_head) * UNIT + rows(first_query, do_row, UNIT, BLOCK_M)
    q += (b * q_batch + h * q_head) * UNIT + rows(first_query, q_row, UNIT, BLOCK_M)
    k += (b * k_batch + h * k_head) * UNIT + rows(0, k_row, UNIT, BLOCK_N)
    v += (b * v_batch + h * v_head) * UNIT + rows(0, v_row, UNIT, BLOCK_N)
    if CHUNK == 0:
        q0 = load(q + column0, inside, column0, True, D, END0)
        do0 = load(do + column0, inside, column0, True, D, END0)
        if D1 > 0:
            q1 = load(q + column1, inside, column1, True, D, END1)
            do1 = load(do + column1, inside, column1, True, D, END1)
    query_lse = tl.load(lse + head * L + query, mask=query < L, other=0.0)[:, None]
    query_delta = tl.load(delta + head * L + query, mask=query < L, other=0.0)[:, None]
    dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        dq1 = tl.zeros((BLOCK_M, D1), tl.float32)
    last = S
    if IS_CAUSAL:
        last = tl.minimum(S, first_query + BLOCK_M)
    for start in range(0, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = (key < S)[:, None]
        if CHUNK > 0:
            s = streamed_product(q, k, inside, there, D, CHUNK, BLOCK_M, BLOCK_N, PRECISION)
            ds = streamed_product(do, v, inside, there, D, CHUNK, BLOCK_M, BLOCK_N, PRECISION)
            k0 = load(k + column0, there, column0, True, D, END0)
            if D1 > 0:
                k1 = load(k + column1, there, column1, True, D, END1)
        else:
            k0 = load(k + column0, there, column0, True, D, END0)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            v0 = load(v + column0, there, column0, True, D, END0)
            ds = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
            if D1 > 0:
                k1 = load(k + column1, there, column1, True, D, END1)
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
                v1 = load(v + column1, there, column1, True, D, END1)
                ds = tl.dot(do1, tl.trans(v1), ds, input_precision=PRECISION)
        seen = (key < S)[None, :]
        if IS_CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        p = tl.where(seen, tl.exp2(s * factor - query_lse), 0.0)
        slopes = (p * (ds - query_delta)).to(k.dtype.element_ty)
        dq0 = tl.dot(slopes, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(slopes, k1, dq1, input_precision=PRECISION)
        k += k_row * tl.full((), BLOCK_N * UNIT, tl.int64)
        v += v_row * tl.full((), BLOCK_N * UNIT, tl.int64)

    dq += (b * dq_batch + h * dq_head) * O_UNIT + rows(first_query, dq_row, O_UNIT, BLOCK_M)
    tl.store(dq + column0, (scale * dq0).to(dq.dtype.element_ty), mask=inside & (column0 < O_COLUMNS))
    if D1 > 0:
        tl.store(dq + column1, (scale * dq1).to(dq.dtype.element_ty), mask=inside & (column1 < O_COLUMNS))


class _Plan(NamedTuple):
    """How one of the two products of blocks is launched: rows kept by a program, rows of a step."""

    constants: dict[str, int]
    kept: int
    step: int
    num_warps: int
    num_stages: int

    def config(self, kept: str, step: str) -> Config:
        """With the names that a kernel has for the two blocks."""
        return Config({**self.constants, kept: self.kept, step: self.step}, self.num_warps, self.num_stages)


def _plan(q: Tensor, kept_rows: int) -> _Plan:
    """Tile sizes by head dimension and architecture, assumed and not measured."""
    batch, heads, _, head_dim = q.shape
    if q.dtype is torch.float32:
        # Multiplied without tensor cores, unless they may be tf32: factors in registers, narrow ones.
        ieee = product_precision(q.dtype, "matmul") == "ieee"
        count, d0, d1 = slices(head_dim, 64)
        step = 16 if ieee else 32
        return _Plan({"SLICES": count, "D0": d0, "D1": d1, "CHUNK": step}, 64, step, 8, 2)
    d0, d1 = chunks(head_dim)
    in_registers = not reads_shared_memory(q.device)
    kept, step = (128, 64) if d0 + d1 <= 64 else (64, 32 if in_registers else 64)
    if batch * heads * -(-kept_rows // kept) < multiprocessors(q.device):
        kept, step = 64, 32 if in_registers else step
    row_bytes, available = (d0 + d1) * q.element_size(), shared_memory_bytes(q.device)
    while step > 32 and 2 * (kept + 2 * step) * row_bytes > available:
        step //= 2
    widest = 160 if architecture(q.device) == 90 else 128  # that registers hold
    if d0 + d1 > widest or 2 * (kept + 2 * step) * row_bytes > available:
        count, d0, d1 = slices(head_dim, 128)
        return _Plan({"SLICES": count, "D0": d0, "D1": d1, "CHUNK": 64}, 64, 32 if in_registers else 64, 8, 2)
    num_warps = 4 if (d0 + d1) * kept <= 64 * 64 else 8
    return _Plan({"SLICES": 1, "D0": d0, "D1": d1, "CHUNK": 0}, kept, step, num_warps, 2)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, as q, k and v; each a transposed view of (B, rows, heads, D).

    Args:
        do, q, o: (B, heads, L, D). k, v: (B, heads, S, D). lse: (B, heads, L), fp32, base 2.
    """
    dq, dk, dv = empty_by_token(q), empty_by_token(k), empty_by_token(v)
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    if batch * heads * head_dim == 0:
        return dq, dk, dv
    do, q, k, v, lse = aligned(do), aligned(q), aligned(k), aligned(v), lse.contiguous()
    unit = alignment(q)
    delta = row_products(do, aligned(o))
    inputs, factor = (do, q, k, v, lse, delta), scale * LOG2E
    precision = product_precision(q.dtype, "matmul")
    kind = {"IS_CAUSAL": is_causal, "D": q.shape[3], "O_COLUMNS": head_dim, "PRECISION": precision}

    plan = _plan(q, queries)
    blocks, o_unit = -(-queries // plan.kept), alignment(dq)
    launch(
        _queries_kernel, (blocks * plan.constants["SLICES"] * batch * heads,), *inputs, dq,
        queries, keys, heads, blocks, *strides(unit, do, q, k, v), *strides(o_unit, dq), scale, factor,
        config=plan.config("BLOCK_M", "BLOCK_N"), UNIT=unit, O_UNIT=o_unit, **kind,
    )  # fmt: skip

    plan = _plan(q, keys)
    blocks = -(-keys // plan.kept)
    tiles = blocks * plan.constants["SLICES"] * batch * heads
    splits, split_queries = split_walk(max(tiles, 1), queries, plan.step, q.device)
    dk_parts, dv_parts = dk, dv
    if splits > 1:
        dk_parts = q.new_empty((splits * batch, heads, keys, head_dim), dtype=torch.float32)
        dv_parts = torch.empty_like(dk_parts)
    o_unit = alignment(dk_parts)
    launch(
        _keys_kernel, (tiles * splits,), *inputs, dk_parts, dv_parts,
        queries, keys, batch, heads, blocks, splits, split_queries,
        *strides(unit, do, q, k, v), *strides(o_unit, dk_parts), scale, factor,
        config=plan.config("BLOCK_N", "BLOCK_M"), UNIT=unit, O_UNIT=o_unit, **kind,
    )  # fmt: skip
    if splits > 1:
        sum_parts(dk_parts, dv_parts, dk, dv)
    return dq, dk, dv
