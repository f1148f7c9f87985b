"""attention in Triton: o = softmax(scale q kᵀ) v, per batch element and head.

Each program keeps a block of queries and the fp32 accumulator of their results, and walks over the keys a
block at a time: scores, their running maximum, weights as powers of two, products with the values (Dao 2023,
"FlashAttention-2", algorithm 1). Blocks of which every key is seen need no mask; what is left, and a causal
diagonal, follows in narrower ones. Of wide heads the value's columns are shared out, and q and k come a chunk
of columns at a time. Where blocks of queries are fewer than multiprocessors, the keys are shared out too, and
a second kernel combines the fp32 results by their lse.
Bytes: q, k, v, o once, k and v again from L2 for every block of queries; the limit is the tensor
cores', 4 L S D flops, or, of narrow heads, that of L S powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._attention_rows_triton import combine
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

# A maximum before there is one: finite, so that it can be subtracted from itself.
_LOWEST = tl.constexpr(-1e38)


@triton.jit
def _walk(
    acc0, acc1, total, top,  # running results of the block's queries: Σ weights v, Σ weights, max of q kᵀ
    q, q0, q1,  # the queries' rows, (BLOCK_M, 1), or their chunks
    k, v,  # of the head
    query, first, last, L, S, k_row, v_row, first_column, factor,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    SLICES: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Over the keys from `first` to before `last`, of which some are hidden only if MASKED."""
    END1: tl.constexpr = SLICES * (V0 + V1)  # where the columns of the last slice end
    END0: tl.constexpr = END1 - V1
    in_block = tl.arange(0, BLOCK_N)
    k += rows(first, k_row, UNIT, BLOCK_N)
    v += rows(first, v_row, UNIT, BLOCK_N)
    v_column0 = (first_column + tl.arange(0, V0))[None, :]
    if V1 > 0:
        v_column1 = (first_column + V0 + tl.arange(0, V1))[None, :]
    if CHUNK == 0:
        k_column0 = tl.arange(0, K0)[None, :]
    if K1 > 0:
        k_column1 = K0 + tl.arange(0, K1)[None, :]
    for key in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        there = (in_block < S - key)[:, None]
        if CHUNK > 0:
            inside = (query < L)[:, None]
            s = streamed_product(q, k, inside, there, D, CHUNK, BLOCK_M, BLOCK_N, PRECISION)
        else:
            k0 = load(k + k_column0, there, k_column0, MASKED, D, K0)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if K1 > 0:
                k1 = load(k + k_column1, there, k_column1, MASKED, D, K0 + K1)
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        v0 = load(v + v_column0, there, v_column0, MASKED, D, END0)
        if MASKED:
            seen = (key + in_block < S)[None, :]
            if IS_CAUSAL:
                seen = seen & (key + in_block[None, :] <= query[:, None])
            s = tl.where(seen, s, _LOWEST)
        higher = tl.maximum(top, tl.max(s, 1))
        fading = tl.exp2((top - higher) * factor)
        top = higher
        weights = tl.exp2(s * factor - (top * factor)[:, None])
        if MASKED:
            weights = tl.where(seen, weights, 0.0)
        total = total * fading + tl.sum(weights, 1)
        weights = weights.to(v.dtype.element_ty)
        acc0 = tl.dot(weights, v0, acc0 * fading[:, None], input_precision=PRECISION)
        if V1 > 0:
            v1 = load(v + v_column1, there, v_column1, MASKED, D, END1)
            acc1 = tl.dot(weights, v1, acc1 * fading[:, None], input_precision=PRECISION)
        k += k_row * tl.full((), BLOCK_N * UNIT, tl.int64)
        v += v_row * tl.full((), BLOCK_N * UNIT, tl.int64)
    return acc0, acc1, total, top


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q,  # (B, heads, L, D)
    k,  # (B, heads, S, D)
    v,  # (B, heads, S, D)
    o,  # (splits B, heads, L, O_COLUMNS); D, of the others, is that or more
    lse,  # (splits B, heads, L), or None
    L, S, batch, heads, blocks, splits, split_keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    factor,  # scale log2 e, not negative
    IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, O_UNIT: tl.constexpr,
    D: tl.constexpr, O_COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries, slices of columns, splits of keys, heads of the batch), the first fastest.

    q stays with the program, in chunks of K0 and K1 columns, unless it is streamed, CHUNK columns at a time.
    """
    program = tl.program_id(0)
    block = program % blocks
    if IS_CAUSAL:
        block = blocks - 1 - block  # the longest first
    part = program // blocks
    first_column = part % SLICES * (V0 + V1)
    part = part // SLICES
    split = part % splits
    head = (part // splits).to(tl.int64)
    first_query = block * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    inside = (query < L)[:, None]
    b, h = head // heads, head % heads
    q += (b * q_batch + h * q_head) * UNIT + rows(first_query, q_row, UNIT, BLOCK_M)
    k += (b * k_batch + h * k_head) * UNIT
    v += (b * v_batch + h * v_head) * UNIT
    q0 = q
    if CHUNK == 0:
        column = tl.arange(0, K0)[None, :]
        q0 = load(q + column, inside, column, True, D, K0)
    q1 = q0
    if K1 > 0:
        column = K0 + tl.arange(0, K1)[None, :]
        q1 = load(q + column, inside, column, True, D, K0 + K1)
    acc0 = tl.zeros((BLOCK_M, V0), tl.float32)
    acc1 = acc0
    if V1 > 0:
        acc1 = tl.zeros((BLOCK_M, V1), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)

    first = split * split_keys
    last = tl.minimum(first + split_keys, S)
    whole = last
    if IS_CAUSAL:
        last = tl.minimum(last, first_query + BLOCK_M)
        whole = tl.minimum(last, first_query)
    whole = first + tl.maximum(whole - first, 0) // BLOCK_N * BLOCK_N
    if BLOCK_TAIL > 0:
        acc0, acc1, total, top = _walk(
            acc0, acc1, total, top, q, q0, q1, k, v,
            query, first, whole, L, S, k_row, v_row, first_column, factor,
            IS_CAUSAL, False, None, UNIT, D, SLICES, K0, K1, V0, V1, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc0, acc1, total, top = _walk(
            acc0, acc1, total, top, q, q0, q1, k, v,
            query, whole, last, L, S, k_row, v_row, first_column, factor,
            IS_CAUSAL, True, None if IS_CAUSAL else 1,
            UNIT, D, SLICES, K0, K1, V0, V1, CHUNK, PRECISION, BLOCK_M, BLOCK_TAIL,
        )  # fmt: skip
    else:
        acc0, acc1, total, top = _walk(
            acc0, acc1, total, top, q, q0, q1, k, v,
            query, first, last, L, S, k_row, v_row, first_column, factor,
            IS_CAUSAL, True, None, UNIT, D, SLICES, K0, K1, V0, V1, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    hidden = total == 0.0  # all keys of a split
    total = tl.where(hidden, 1.0, total)
    if lse is not None:
        at = lse + (split * batch * heads + head) * L + query
        value = tl.where(hidden, -float("inf"), top * factor + tl.log2(total))
        tl.store(at, value, mask=query < tl.where(first_column == 0, L, 0))
    total = total[:, None]
    o += ((split * batch + b) * o_batch + h * o_head) * O_UNIT + rows(first_query, o_row, O_UNIT, BLOCK_M)
    column = (first_column + tl.arange(0, V0))[None, :]
    tl.store(o + column, (acc0 / total).to(o.dtype.element_ty), mask=inside & (column < O_COLUMNS))
    if V1 > 0:
        column = (first_column + V0 + tl.arange(0, V1))[None, :]
        tl.store(o + column, (acc1 / total).to(o.dtype.element_ty), mask=inside & (column < O_COLUMNS))


def _plan(q: Tensor, is_causal: bool) -> Config:
    """Tile sizes by head dimension and architecture, assumed and not measured."""
    batch, heads, queries, head_dim = q.shape
    available, processors = shared_memory_bytes(q.device), multiprocessors(q.device)
    # Only Hopper multiplies a q of that width out of shared memory.
    is_streamed = head_dim > 512 or (head_dim > 256 and architecture(q.device) != 90)
    if q.dtype is torch.float32 or is_streamed:
        # fp32 is multiplied without tensor cores, its factors in registers: narrow ones. Not so tf32.
        ieee = product_precision(q.dtype, "matmul") == "ieee"
        count, v0, v1 = slices(head_dim, 64 if ieee else 128)
        constants = {"SLICES": count, "K0": 0, "K1": 0, "V0": v0, "V1": v1, "CHUNK": 16 if ieee else 64}
        blocks = {"BLOCK_M": 64, "BLOCK_N": 16 if ieee else 32, "BLOCK_TAIL": 16}
        # As below: 64 rows.
        num_warps = 4 if architecture(q.device) == 90 and q.dtype is not torch.float32 else 8
        return Config({**constants, **blocks}, num_warps, 2)
    k0, k1 = chunks(head_dim)
    count, v0, v1 = slices(head_dim, 256)
    constants = {"SLICES": count, "K0": k0, "K1": k1, "V0": v0, "V1": v1, "CHUNK": 0}
    width = k0 + k1
    if width > 256:
        return Config({**constants, "BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_TAIL": 0}, 8, 2)
    # Two blocks of queries for every multiprocessor, so that one multiplies while the other takes powers.
    block_m = 128 if batch * heads * -(-queries // 128) >= 2 * processors else 64
    in_registers = not reads_shared_memory(q.device)
    block_n, stages = 32 if in_registers and width > 128 else 64, 3 if width <= 64 else 2
    if width == 16 and architecture(q.device) == 100:
        block_n = 32  # more scores than so narrow a head's registers hold
    while block_n > 16 and (block_m + 2 * stages * block_n) * width * q.element_size() > available:
        block_n //= 2
    if architecture(q.device) == 90:
        # 4 warps multiply 64 rows. With 8 of them Triton 3.6 gets the products of a narrow tail's keys wrong.
        num_warps = 4 if block_m == 64 or width <= 64 else 8
    else:
        num_warps = 4 if width * block_m <= 64 * 64 else 8
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_TAIL": block_n if is_causal else 16}
    return Config({**constants, **blocks}, num_warps, stages)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """o and, where it is asked for, lse."""
    o = empty_by_token(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if with_lse else None
    if q.numel() == 0:
        return o, lse
    if scale < 0:  # the kernel's maximum is that of q kᵀ
        q, scale = -q, -scale
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    config = _plan(q, is_causal)
    constants = config.constants
    blocks = -(-queries // constants["BLOCK_M"])
    tiles = blocks * constants["SLICES"] * batch * heads
    seen = min(queries, keys) if is_causal else keys
    splits, split_keys = split_walk(tiles, seen, constants["BLOCK_N"], q.device)
    partials, lses = o, lse
    if splits > 1:
        lses = q.new_empty((splits * batch, heads, queries), dtype=torch.float32)
        partials = q.new_empty((*lses.shape, head_dim), dtype=torch.float32)
    unit, o_unit = alignment(q), alignment(partials)
    launch(
        _forward_kernel, (tiles * splits,), q, k, v, partials, lses,
        queries, keys, batch, heads, blocks, splits, split_keys,
        *strides(unit, q, k, v), *strides(o_unit, partials), scale * LOG2E,
        config=config, IS_CAUSAL=is_causal, UNIT=unit, O_UNIT=o_unit, D=q.shape[3], O_COLUMNS=head_dim,
        PRECISION=product_precision(q.dtype, "matmul"),
    )  # fmt: skip
    if splits > 1:
        assert lses is not None
        combine(partials, lses, o, lse)
    return o, lse


def attention_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """o: (B, heads, L, D) from q, (B, heads, L, D), k and v, (B, heads, S, D)."""
    return _attend(q, k, v, is_causal, scale, False)[0]


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and lse: (B, heads, L), fp32, base 2."""
    o, lse = _attend(q, k, v, is_causal, scale, True)
    assert lse is not None
    return o, lse
