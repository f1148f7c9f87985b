"""What attention's Triton kernels share: how a head dimension is cut, how tensors are addressed.

Triton's tiles are powers of two wide. A head dimension that is none is cut in two chunks, each with a product
and an accumulator of its own: 40 is 32 + 16, so that 48 columns are multiplied and not 64.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._triton import machine, multiprocessors

LOG2E = 1.4426950408889634
# All sizes and strides of the kernels: whether 16 divides one, by which Triton would compile another kernel,
# changes with resolution and batch, and says nothing that UNIT and D do not.
SIZES = [
    "L", "S", "batch", "heads", "blocks", "splits", "split_keys", "split_queries", "count",
    *(f"{t}_{axis}" for t in ("q", "k", "v", "o", "do", "dq", "dk") for axis in ("batch", "head", "row")),
]  # fmt: skip


@functools.cache
def chunks(columns: int) -> tuple[int, int]:
    """The widths of the chunks that cover so many columns, the second 0 where it would save nothing."""
    whole = max(16, triton.next_power_of_2(columns))
    first = whole // 2
    second = max(16, triton.next_power_of_2(columns - first)) if 16 <= first < columns else first
    return (first, second) if first + second < whole else (whole, 0)


def slices(head_dim: int, widest: int) -> tuple[int, int, int]:
    """How many programs share the columns of a result, at most `widest` each, and the chunks of each."""
    count = -(-head_dim // widest)
    return count, *chunks(-(-head_dim // count))


def _strides(t: Tensor) -> tuple[int, ...]:
    return tuple(s if size > 1 else 0 for s, size in zip(t.stride()[:3], t.shape[:3], strict=True))


def alignment(t: Tensor) -> int:
    """What the beginning of every row is a multiple of, in elements: as many as are 16 bytes, or 1."""
    unit = 16 // t.element_size()
    return unit if all(at % unit == 0 for at in (t.storage_offset(), *_strides(t))) else 1


def aligned(t: Tensor) -> Tensor:
    """t, (B, heads, rows, D), if rows are vectors of 16 bytes, else a copy with zeros after D.

    Every block of the other side reads them again, and would do it number by number.
    """
    unit = 16 // t.element_size()
    if t.shape[3] % unit == 0 and t.stride(3) == 1 and alignment(t) == unit:
        return t
    padded = F.pad(t, (0, -t.shape[3] % unit))
    return padded if padded.stride(3) == 1 else padded.contiguous()


def strides(unit: int, *tensors: Tensor) -> tuple[int, ...]:
    """The strides of batch, head and row of each tensor, in units of so many elements.

    Kernels multiply by the unit. Triton knows of an argument only whether 16 divides it, and head strides of
    40 elements are to be loaded 16 bytes at a time too.
    """
    return tuple(stride // unit for t in tensors for stride in _strides(t))


def reads_shared_memory(device: torch.device) -> bool:
    """See `Machine`."""
    return machine(device).reads_shared_memory


def split_walk(tiles: int, rows: int, block: int, device: torch.device) -> tuple[int, int]:
    """In how many splits each of so many tiles walks over its rows, and how many of these each takes.

    One where tiles fill the GPU. A split takes 256 rows at least, which is assumed to cover what partial
    results cost.
    """
    splits = max(1, min(multiprocessors(device) // tiles, rows // 256, 16))
    share = -(-rows // splits)
    each = max(1, -(-share // block)) * block
    return max(1, -(-rows // each)), each


@triton.jit
def rows(first, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows of a tile begin, in elements: (BLOCK, 1), int64."""
    return ((first + tl.arange(0, BLOCK)).to(tl.int64) * stride * UNIT)[:, None]


@triton.jit
def load(at, inside, column, ROWS: tl.constexpr, D: tl.constexpr, END: tl.constexpr):
    """A tile, 0 in rows that are not `inside`, (rows, 1), and in columns from D on.

    The one is looked at only with ROWS, the other where columns go up to an END beyond D.
    """
    if ROWS:
        if END > D:
            tile = tl.load(at, mask=inside & (column < D), other=0.0)
        else:
            tile = tl.load(at, mask=inside, other=0.0)
    elif END > D:
        tile = tl.load(at, mask=column < D, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def streamed_product(
    a, b, a_inside, b_inside,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a bᵀ, fp32, of tiles that come through shared memory CHUNK columns at a time.

    a, b: where their rows begin, (rows, 1); a_inside, b_inside: which of them are there.
    """
    END: tl.constexpr = (D + CHUNK - 1) // CHUNK * CHUNK
    ab = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, D, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        a_tile = load(a + column, a_inside, column, True, D, END)
        b_tile = load(b + column, b_inside, column, True, D, END)
        ab = tl.dot(a_tile, tl.trans(b_tile), ab, input_precision=PRECISION)
    return ab
