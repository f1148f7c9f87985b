"""Gradients of linear in Triton.

    h = x Wᵀ + b + residual,  y = act(h)
    dh = dy act'(h),  dx = dh W,  dW = dhᵀ x,  db = Σ dh

The two products are linear_triton's, which reads either factor along either axis: nothing is transposed in
memory, and dW, few tiles over many tokens, is split along these. act and act' move each byte of h, dy and the
result once; the sum over rows reads dh once, in parts whose fp32 sums a second launch adds in order. All
three run against memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._triton import Config, launch, multiprocessors
from sdfast.ops.linear_triton import activate, gelu, product

# Places in linear.ACTIVATIONS.
_SILU = tl.constexpr(1)
_GELU = tl.constexpr(2)
_GEGLU = tl.constexpr(4)


@triton.jit
def _gelu_gradient(h):
    """Φ(h) + h φ(h)."""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def _place(columns, BLOCK: tl.constexpr):
    """This program's row and columns, where blocks of columns follow each other row after row."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    return program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _activate_kernel(h, y, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y, (rows, columns), from h, which for "geglu" is (rows, 2 columns)."""
    row, column = _place(columns, BLOCK)
    inside = column < columns
    at = h + row * columns + column
    if ACTIVATION == _GEGLU:
        at += row * columns
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = value
    if ACTIVATION == _GEGLU:
        gate = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
    result = activate(value, gate, ACTIVATION)
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _activation_gradient_kernel(dy, h, dh, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """dh, as h, which for "geglu" is (rows, 2 columns), from dy, (rows, columns), and h."""
    row, column = _place(columns, BLOCK)
    inside = column < columns
    grad = tl.load(dy + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    at = row * columns + column
    if ACTIVATION == _GEGLU:
        at += row * columns
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(h + at + columns, mask=inside, other=0.0).to(tl.float32)
        dgate = grad * value * _gelu_gradient(gate)
        tl.store(dh + at + columns, dgate.to(dh.dtype.element_ty), mask=inside)
        grad = grad * gelu(gate)
    else:
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == _GELU:
            grad = grad * _gelu_gradient(value)
        else:
            slope = 1.0 if ACTIVATION == _SILU else 1.702
            s = tl.sigmoid(slope * value)
            grad = grad * s * (1.0 + slope * value * (1.0 - s))
    tl.store(dh + at, grad.to(dh.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits", "steps"])
def _sum_rows_kernel(
    x,  # (groups, rows, columns)
    y,  # (groups, splits, columns)
    rows, columns, splits, steps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (groups splits blocks of columns). Each split takes `steps` blocks of rows."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_C)
    part = program // blocks  # of groups times splits
    column = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = part % splits * steps * BLOCK_R + tl.arange(0, BLOCK_R)
    at = x + (part // splits * rows + row)[:, None] * columns + column[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(0, steps):
        inside = (row < rows - step * BLOCK_R)[:, None] & (column < columns)[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += BLOCK_R * columns
    result = tl.sum(total, axis=0).to(y.dtype.element_ty)
    tl.store(y + part * columns + column, result, mask=column < columns)


_ELEMENTWISE = Config({"BLOCK": 1024}, num_warps=4)
_SUM = Config({"BLOCK_R": 32, "BLOCK_C": 64}, num_warps=4, occupancy=4)


def _blocks(rows: int, columns: int) -> tuple[int]:
    return (rows * -(-columns // 1024),)


def linear_input_gradient(dh: Tensor, weight: Tensor) -> Tensor:
    """dx = dh W: (tokens, M) and (M, K) -> (tokens, K)."""
    return product(dh, weight)


def linear_weight_gradient(dh: Tensor, x: Tensor) -> Tensor:
    """dW = dhᵀ x: (tokens, M) and (tokens, K) -> (M, K)."""
    return product(dh.t(), x)


def linear_activate(h: Tensor, activation: int) -> Tensor:
    """act(h), (tokens, M) -> (tokens, M), or with "geglu" (tokens, M/2)."""
    h = h.contiguous()
    rows, columns = h.shape
    if activation == _GEGLU.value:
        columns //= 2
        shape = (rows, columns)
    else:
        shape, rows, columns = (rows, columns), 1, rows * columns
    y = h.new_empty(shape)
    launch(
        _activate_kernel, _blocks(rows, columns), h, y, columns, config=_ELEMENTWISE, ACTIVATION=activation
    )
    return y


def linear_activation_gradient(dy: Tensor, h: Tensor, activation: int) -> Tensor:
    """dh = dy act'(h), as h."""
    dh = torch.empty_like(h)
    dy, h = dy.contiguous(), h.contiguous()
    result = dh if dh.is_contiguous() else torch.empty_like(h)
    rows, columns = dy.shape
    if activation != _GEGLU.value:
        rows, columns = 1, rows * columns
    launch(
        _activation_gradient_kernel, _blocks(rows, columns), dy, h, result, columns,
        config=_ELEMENTWISE, ACTIVATION=activation,
    )  # fmt: skip
    return dh if result is dh else dh.copy_(result)


def sum_rows(x: Tensor) -> Tensor:
    """(groups, rows, columns) -> (groups, columns)."""
    x = x.contiguous()
    groups, rows, columns = x.shape
    y = x.new_empty((groups, columns))
    blocks, all_steps = -(-columns // 64), -(-rows // 32)
    # A step of fp16 is 4 KiB: 8 programs of a multiprocessor are assumed to keep its bandwidth busy.
    splits = max(1, min(8 * multiprocessors(x.device) // max(groups * blocks, 1), all_steps // 4))
    steps = max(1, -(-all_steps // splits))
    splits = max(1, -(-all_steps // steps))
    partials = y if splits == 1 else x.new_empty((groups, splits, columns), dtype=torch.float32)
    launch(
        _sum_rows_kernel, (groups * splits * blocks,), x, partials, rows, columns, splits, steps, config=_SUM
    )
    if splits > 1:
        steps = -(-splits // 32)
        launch(_sum_rows_kernel, (groups * blocks,), partials, y, splits, columns, 1, steps, config=_SUM)
    return y
