"""linear in Triton, y = act(x Wᵀ + b + residual), and the two products of its gradient.

Each program keeps one tile of y in fp32 registers and walks along K, tiles of both factors coming through
shared memory; bias, residual and activation follow on the registers. For "geglu" it keeps two, the value's
and the gate's of the same columns, so that h is never written. Where tiles are fewer than multiprocessors, K
is split: fp32 partials are written, and a second kernel sums them in order. Tiles of 8 block rows follow
each other column by column, so that those running at once share their factors in L2.
Bytes: x + W + residual + y once, a split's partials twice; the limit is the tensor cores', of few rows
memory's.
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

# Places in linear.ACTIVATIONS.
_SILU = tl.constexpr(1)
_GELU = tl.constexpr(2)
_QUICK_GELU = tl.constexpr(3)
_GEGLU = tl.constexpr(4)


@triton.jit
def gelu(h):
    """h Φ(h), through erf."""
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def activate(h, gate, ACTIVATION: tl.constexpr):
    """act(h) of fp32 values; `gate` is read by "geglu" alone."""
    if ACTIVATION == _SILU:
        h = h * tl.sigmoid(h)
    elif ACTIVATION == _GELU:
        h = gelu(h)
    elif ACTIVATION == _QUICK_GELU:
        h = h * tl.sigmoid(1.702 * h)
    elif ACTIVATION == _GEGLU:
        h = h * gelu(gate)
    return h


@triton.jit
def _add(h, bias, residual, row, column, inside, residual_row):
    """h + bias + residual, at `column`, (1, columns), and `row`, (rows, 1)."""
    if bias is not None:
        h += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    return h


# One kernel for all resolutions and batches: M_UNIT and K_UNIT say what loads of 16 bytes depend on.
@triton.jit(do_not_specialize=["M", "K", "steps"])
def _matmul_kernel(
    a,  # (M, K), strides a_row, a_k
    b,  # (K, N), strides b_k, b_column; for "geglu" (K, 2 N), value and gate
    bias,  # (N,), or None
    residual,  # (M, N), stride residual_row, or None
    y,  # (splits, M, N), contiguous
    M, N, K, steps,  # M and K in units
    a_row, a_k, b_k, b_column, residual_row,
    M_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, splits). Each split takes `steps` blocks of K."""
    M *= M_UNIT
    K *= K_UNIT
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP)
    in_group = tile % (GROUP * tiles_n)
    row = ((first_m + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (in_group // height * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    k = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)

    a_at = a + row * a_row + k[None, :] * a_k
    b_at = b + k[:, None] * b_k + column * b_column
    gate_at = b_at
    if ACTIVATION == _GEGLU:
        gate_at = b + k[:, None] * b_k + (column + N) * b_column
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = h
    for step in range(0, steps):
        a_inside = row < M
        b_inside = column < N
        if not EVEN_K:
            left = K - step * BLOCK_K
            a_inside = a_inside & (k < left)[None, :]
            b_inside = b_inside & (k < left)[:, None]
        a_tile = tl.load(a_at, mask=a_inside, other=0.0)
        h = tl.dot(a_tile, tl.load(b_at, mask=b_inside, other=0.0), h, input_precision=PRECISION)
        if ACTIVATION == _GEGLU:
            gate = tl.dot(a_tile, tl.load(gate_at, mask=b_inside, other=0.0), gate, input_precision=PRECISION)
            gate_at += BLOCK_K * b_k
        a_at += BLOCK_K * a_k
        b_at += BLOCK_K * b_k

    inside = (row < M) & (column < N)
    h = _add(h, bias, residual, row, column, inside, residual_row)
    if ACTIVATION == _GEGLU:
        gate = _add(gate, bias, residual, row, column + N, inside, residual_row)
    h = activate(h, gate, ACTIVATION)
    tl.store(y + (split * M + row) * N + column, h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "splits"])
def _finish_kernel(
    partials,  # (splits, M, N), fp32
    bias,  # (N,), or None
    residual,  # (M, N), stride residual_row, or None
    y,  # (M, N); for "geglu" (M, N / 2)
    M, N, columns, splits, residual_row,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """act(Σ partials + bias + residual). Grid: the blocks of y's columns, row after row."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = partials + row * N + column
    partial_size = M.to(tl.int64) * N
    h = tl.zeros((BLOCK,), tl.float32)
    gate = h
    for _ in range(0, splits):
        h += tl.load(at, mask=inside, other=0.0)
        if ACTIVATION == _GEGLU:
            gate += tl.load(at + columns, mask=inside, other=0.0)
        at += partial_size
    h = _add(h, bias, residual, row, column, inside, residual_row)
    if ACTIVATION == _GEGLU:
        gate = _add(gate, bias, residual, row, column + columns, inside, residual_row)
    h = activate(h, gate, ACTIVATION)
    tl.store(y + row * columns + column, h.to(y.dtype.element_ty), mask=inside)


class _Tile(NamedTuple):
    """A tile of y. `share` is what of the peak it is taken to reach: assumed, no GPU has measured it.

    `occupancy` is that of its `Config`.
    """

    m: int
    n: int
    num_warps: int
    share: float
    occupancy: int


_WIDE = (
    _Tile(128, 256, 8, 1.0, 1), _Tile(128, 128, 8, 0.95, 1), _Tile(128, 64, 4, 0.8, 2),
    _Tile(64, 64, 4, 0.65, 3),
)  # fmt: skip
# For at most 64 rows.
_FLAT = (_Tile(64, 256, 4, 0.8, 2), _Tile(64, 128, 4, 0.75, 2), _Tile(64, 64, 4, 0.65, 3))
_ROWS = (_Tile(16, 64, 4, 0.2, 4),)  # for at most 16, where memory is the limit
_FP32 = (_Tile(64, 64, 8, 1.0, 2), _Tile(32, 64, 4, 0.7, 2))
# Loaded number by number, each with its address in registers.
_UNALIGNED = (_Tile(64, 64, 4, 0.3, 2),)
_UNALIGNED_FP32 = (_Tile(32, 64, 8, 0.7, 1),)
_MAX_SPLITS = 8
_SPLIT_STEPS = 8  # what writing and reading partials costs, in steps along K; assumed


class Plan(NamedTuple):
    """How one product is launched; `cost` is the work of the busiest multiprocessor."""

    config: Config
    tiles: int
    splits: int
    steps: int
    cost: float
    kind: str = ""  # splits follow from tile and shape


@functools.lru_cache(maxsize=1024)
def plans_of(
    m: int, n: int, k: int, dtype: torch.dtype, precision: str, aligned: bool, kind: str, machine: Machine
) -> tuple[Plan, ...]:
    """A plan for each tile that suits the shape: (M, K) times (K, N).

    Args:
        n: the result's columns.
        aligned: rows of both factors can be loaded by 16 bytes.
        kind: "paired" where each program computes two tiles, value and gate; "finished" where a residual or
            an activation follows; or "plain".
    """
    fp32, paired = dtype is torch.float32, kind == "paired"
    tiles: Sequence[_Tile] = _ROWS if m <= 16 else _FLAT if m <= 64 else _WIDE
    if fp32:
        tiles = _FP32 if aligned else _UNALIGNED_FP32
    elif not aligned:
        tiles = _UNALIGNED
    elif kind == "finished" or (paired and not machine.reads_shared_memory):
        # Larger ones leave no registers for residuals, an activation's terms or the factors of a pair.
        tiles = [tile for tile in tiles if tile.m * tile.n <= 128 * 128]
    if machine.architecture == 100:  # accumulators come from the tensor cores' own memory, all at once
        tiles = [tile for tile in tiles if tile.m * tile.n <= 64 * 32 * tile.num_warps]
    plans = []
    for tile in tiles:
        tile_n = tile.n // 2 if paired and tile.n > 64 else tile.n
        block_k = 128 if tile.m == 16 else 64 if aligned else 32
        if fp32:
            block_k = 16 if precision == "ieee" else 32
        stage_bytes = (tile.m + tile_n * (1 + paired)) * block_k * dtype.itemsize
        if 3 * stage_bytes > machine.shared_bytes:
            block_k, stage_bytes = block_k // 2, stage_bytes // 2
        steps = -(-k // block_k)
        count = -(-m // tile.m) * -(-n // tile_n)
        # A split writes and sums 2 n columns where it is paired: it is planned as a product of that width.
        splits = max(1, min(machine.multiprocessors // max(count, 1), steps // 8, _MAX_SPLITS))
        splits = 1 if paired else splits
        steps = -(-steps // splits)
        cost = -(-count * splits // machine.multiprocessors) * tile.m * tile_n * (1 + paired) / tile.share
        cost *= (steps + _SPLIT_STEPS * (splits > 1)) * block_k
        constants = {"BLOCK_M": tile.m, "BLOCK_N": tile_n, "BLOCK_K": block_k, "GROUP": 8}
        num_warps = tile.num_warps
        occupancy: int | None = tile.occupancy
        if paired:  # two accumulators and the addresses of three odd-sized tiles are more than 4 warps hold
            num_warps, occupancy = 8, max(1, tile.occupancy // 2) if fp32 else None
        config = Config(constants, num_warps, min(4, machine.shared_bytes // stage_bytes), occupancy)
        plans.append(Plan(config, count, splits, steps, cost))
    return tuple(plans)


def plan_product(a: Tensor, b: Tensor, n: int, precision: str, kind: str) -> Plan:
    """The plan that serves the product of a, (M, K), and b, to n columns; `kind` as of `plans_of`."""
    (m, k), strides = a.shape, (*a.stride(), *b.stride())
    aligned = all(s == 1 or s % 16 == 0 for s in strides)
    plans = plans_of(m, n, k, a.dtype, precision, aligned, kind, machine(a.device))
    contiguous = tuple("K" if stride == 1 else "rows" for stride in strides[1:3])
    bucket = (kind, a.dtype, near(m), n, near(k), *contiguous)
    return choose("linear", bucket, plans, a.device)


def _dense(t: Tensor) -> Tensor:
    """A matrix whose elements lie together along one axis."""
    return t if t.stride(1) == 1 or t.stride(0) == 1 else t.contiguous()


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """act(a b + bias + residual) of (M, K) and (K, N), each contiguous along either axis."""
    a, b = _dense(a), _dense(b)
    (m, k), n = a.shape, b.shape[1]
    paired = activation == _GEGLU.value
    columns = n // 2 if paired else n
    y = a.new_empty((m, columns))
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    residual_row = 0 if residual is None else residual.stride(0)
    precision = product_precision(a.dtype, "matmul")

    finished = residual is not None or activation != 0
    plan = plan_product(a, b, n, precision, "finished" if finished else "plain")
    if plan.splits == 1 and paired:
        plan = plan_product(a, b, columns, precision, "paired")
    even_k = k == plan.splits * plan.steps * plan.config.constants["BLOCK_K"]
    m_unit = 16 if a.stride(0) == 1 and m % 16 == 0 else 1
    k_unit = 16 if 1 in (a.stride(1), b.stride(0)) and k % 16 == 0 else 1
    sizes: tuple[Any, ...] = (k // k_unit, plan.steps, *a.stride(), *b.stride())
    kind = {"M_UNIT": m_unit, "K_UNIT": k_unit, "EVEN_K": even_k, "PRECISION": precision}
    grid = (plan.tiles, plan.splits)
    if plan.splits == 1:
        launch(
            _matmul_kernel, grid, a, b, bias, residual, y, m // m_unit, columns, *sizes, residual_row,
            config=plan.config, ACTIVATION=activation, **kind,
        )  # fmt: skip
        return y
    partials = a.new_empty((plan.splits, m, n), dtype=torch.float32)
    launch(
        _matmul_kernel, grid, a, b, None, None, partials, m // m_unit, n, *sizes, 0,
        config=plan.config, ACTIVATION=0, **kind,
    )  # fmt: skip
    config = Config({"BLOCK": 512}, num_warps=4)
    launch(
        _finish_kernel, (m * -(-columns // 512),), partials, bias, residual, y,
        m, n, columns, plan.splits, residual_row, config=config, ACTIVATION=activation,
    )  # fmt: skip
    return y


def linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """(tokens, K) and (M, K) -> (tokens, M), or with "geglu" (tokens, M/2)."""
    return product(x, weight.t(), bias, residual, activation)
