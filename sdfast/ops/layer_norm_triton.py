"""layer_norm in Triton, forward and backward.

A program normalises a few rows, held in registers from the one read to the one write: mean first, then the
squares of what differs from it. A row too wide for that is read three times, strip by strip. The backward

    dx = rstd (g − mean(g) − x̂ mean(g x̂)),  g = dy weight;  dweight = Σ dy x̂,  dbias = Σ dy

goes through many rows a program, summing its share of dweight and dbias on the way; a second launch adds the
shares in order. Bytes: x + y; backward x + dy + dx. The limit is memory, of few rows the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops._triton import Config, launch, multiprocessors

_MAX_BLOCK = 8192  # of a row held in registers; a wider one goes in strips of half of it


@triton.jit
def _rstd(squares, width, eps):
    """1 / √(squares / width + eps), rounded well: it is a factor of every result."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, width * 1.0) + eps))


@triton.jit
def _apply(x, weight, bias, y, at, column, inside, there, mean, rstd):
    """y = (x − mean) rstd weight + bias of a tile of values x; `at`, (rows, columns), is where it lies."""
    result = (x - mean[:, None]) * rstd[:, None]
    if weight is not None:
        result *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # (rows, width)
    weight, bias,  # (width,), or None
    y,  # (rows, width)
    mean_out, rstd_out,  # (rows,), or None
    rows, width, eps,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: the blocks of ROWS rows. Unless WHOLE, ROWS is 1 and a row is several blocks wide."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    present = row < rows
    base = row[:, None] * width
    if WHOLE:
        there = column < width
        inside = present[:, None] & there[None, :]
        value = tl.load(x + base + column[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(value, axis=1), width * 1.0)
        away = tl.where(inside, value - mean[:, None], 0.0)
        rstd = _rstd(tl.sum(away * away, axis=1), width, eps)
        _apply(
            value, weight, bias, y, base + column[None, :], column, inside, there, mean, rstd
        )  # fmt: skip
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, width, BLOCK):
            inside = (column < width - first)[None, :]
            total += tl.load(x + base + (first + column)[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(total, axis=1), width * 1.0)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, width, BLOCK):
            inside = (column < width - first)[None, :]
            value = tl.load(x + base + (first + column)[None, :], mask=inside, other=0.0).to(tl.float32)
            away = tl.where(inside, value - mean[:, None], 0.0)
            total += away * away
        rstd = _rstd(tl.sum(total, axis=1), width, eps)
        for first in range(0, width, BLOCK):
            there = column < width - first
            at = base + (first + column)[None, :]
            value = tl.load(x + at, mask=there[None, :], other=0.0).to(tl.float32)
            _apply(
                value, weight, bias, y, at, first + column, there[None, :], there, mean, rstd
            )  # fmt: skip
    if mean_out is not None:
        tl.store(mean_out + row, mean, mask=present)
        tl.store(rstd_out + row, rstd, mask=present)


@triton.jit
def _g_and_xhat(dy, x, weight, at, column, inside, there, m, r):
    """dy, dy weight and x̂ of a tile, 0 where there is nothing."""
    xhat = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (xhat - m) * r, 0.0)
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    g = grad
    if weight is not None:
        g = grad * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    return grad, g, xhat


@triton.jit(do_not_specialize=["rows"])
def _means_kernel(
    dy, x, mean, rstd, weight,  # as for _backward_kernel
    means,  # (2, rows), written: of g and g x̂
    rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a wide row, what its gradient needs of the whole of it. Grid: the rows."""
    row = tl.program_id(0).to(tl.int64)
    m, r = tl.load(mean + row), tl.load(rstd + row)
    sum_g = tl.zeros((1, BLOCK), tl.float32)
    sum_g_xhat = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < width
        at = row * width + column[None, :]
        _, g, xhat = _g_and_xhat(dy, x, weight, at, column, there[None, :], there, m, r)
        sum_g += g
        sum_g_xhat += g * xhat
    tl.store(means + row, tl.sum(tl.sum(sum_g, axis=1), axis=0) / width)
    tl.store(means + rows + row, tl.sum(tl.sum(sum_g_xhat, axis=1), axis=0) / width)


@triton.jit(do_not_specialize=["rows", "shares", "steps"])
def _backward_kernel(
    dy, x,  # (rows, width)
    mean, rstd,  # (rows,)
    weight,  # (width,), or None
    means,  # (2, rows) of a wide row, else None
    dx,  # (rows, width)
    sums,  # (2, shares, width), written: this program's Σ dy x̂ and Σ dy
    rows, width, shares, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: shares of `steps` blocks of ROWS rows, strips of BLOCK columns."""
    share = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    sum_dy_xhat = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_dy = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, steps):
        row = (share * steps + step) * ROWS + tl.arange(0, ROWS)
        present = row < rows
        inside = present[:, None] & there[None, :]
        m = tl.load(mean + row, mask=present, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=present, other=0.0)[:, None]
        at = row[:, None] * width + column[None, :]
        grad, g, xhat = _g_and_xhat(dy, x, weight, at, column, inside, there, m, r)
        if means is None:
            mean_g = (tl.sum(g, axis=1) / width)[:, None]
            mean_g_xhat = (tl.sum(g * xhat, axis=1) / width)[:, None]
        else:
            mean_g = tl.load(means + row, mask=present, other=0.0)[:, None]
            mean_g_xhat = tl.load(means + rows + row, mask=present, other=0.0)[:, None]
        result = r * (g - mean_g - xhat * mean_g_xhat)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        sum_dy_xhat += grad * xhat
        sum_dy += grad
    tl.store(sums + share * width + column, tl.sum(sum_dy_xhat, axis=0), mask=there)
    tl.store(sums + (shares + share) * width + column, tl.sum(sum_dy, axis=0), mask=there)


@triton.jit(do_not_specialize=["shares"])
def _parameters_kernel(
    sums,  # (2, shares, width)
    dweight, dbias,  # (width,), or None
    width, shares,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the shares. Grid: blocks of columns, of 32 bytes, so that narrow rows too have many programs."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    dy_xhat = tl.zeros((ROWS, BLOCK), tl.float32)
    dy = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, shares, ROWS):
        share = first + tl.arange(0, ROWS)
        inside = (share < shares)[:, None] & there[None, :]
        at = sums + share.to(tl.int64)[:, None] * width + column[None, :]
        dy_xhat += tl.load(at, mask=inside, other=0.0)
        dy += tl.load(at + shares.to(tl.int64) * width, mask=inside, other=0.0)
    if dweight is not None:
        tl.store(dweight + column, tl.sum(dy_xhat, axis=0).to(dweight.dtype.element_ty), mask=there)
    if dbias is not None:
        tl.store(dbias + column, tl.sum(dy, axis=0).to(dbias.dtype.element_ty), mask=there)


def _config(width: int, most: int = _MAX_BLOCK) -> tuple[bool, Config]:
    """Whether a row is held whole, and tiles of 16 elements to a thread, of at least 4 warps.

    Rows that start anywhere are loaded number by number, each with its address in registers: 8 to a thread.
    """
    whole = width <= most
    block = triton.next_power_of_2(width) if whole else _MAX_BLOCK // 2
    rows = max(2048 // block, 1)
    num_warps = max(rows * block // (512 if width % 16 == 0 else 256), 4)
    return whole, Config({"ROWS": rows, "BLOCK": block}, num_warps, 1)


def _shares(x: Tensor, rows: int, width: int) -> tuple[bool, Config, int, int]:
    """Whether the backward holds rows whole, its tiles, the shares of the rows, and the tiles of a share.

    Every share is written and read again, so there is one a multiprocessor, whose tile is large enough to
    keep its memory busy; few rows have small tiles, for more programs. Rows in strips have programs for each.
    Of fp32 a tile has half as many numbers: 512 threads have too few registers for more.
    """
    fp32 = x.element_size() == 4
    whole, config = _config(width, 4096 if fp32 else _MAX_BLOCK)
    programs = multiprocessors(x.device)
    if whole:
        block, elements = config.constants["BLOCK"], 8192 if width % 16 == 0 and not fp32 else 4096
        large = max(elements // block, 1)
        if 2 * -(-rows // large) >= programs:
            warps = config.num_warps * large // config.constants["ROWS"]
            config = Config({"ROWS": large, "BLOCK": block}, warps, 1)
    else:
        if width % 16:  # 512 threads have too few registers for what is loaded number by number
            config = Config({"ROWS": 1, "BLOCK": config.constants["BLOCK"] // 2}, config.num_warps // 2, 1)
        programs = -(-2 * programs // -(-width // config.constants["BLOCK"]))
    blocks = -(-rows // config.constants["ROWS"])
    steps = -(-blocks // min(blocks, programs))
    return whole, config, -(-blocks // steps), steps


def _rows(x: Tensor, axes: int) -> tuple[int, int]:
    """How many rows, and how wide."""
    width = x.shape[x.dim() - axes :].numel()
    return x.numel() // max(width, 1), width


def _normalise(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y, and mean and rstd, (rows,), written where given."""
    y = x.new_empty(x.shape)
    rows, width = _rows(x, axes)
    if y.numel():
        whole, config = _config(width)
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        launch(
            _forward_kernel, (-(-rows // config.constants["ROWS"]),), x.contiguous(), weight, bias, y,
            mean, rstd, rows, width, eps, config=config, WHOLE=whole,
        )  # fmt: skip
    return y


def layer_norm(x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """sdfast::layer_norm."""
    return _normalise(x, axes, weight, bias, eps)


def layer_norm_forward(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sdfast::layer_norm_forward."""
    rows = x.shape[: x.dim() - axes].numel()
    new = x.new_empty if x.numel() else x.new_zeros
    mean, rstd = (new((rows,), dtype=torch.float32) for _ in range(2))
    return _normalise(x, axes, weight, bias, eps, mean, rstd), mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """sdfast::layer_norm_backward: dx, dweight and dbias; of what is None nothing."""
    dx = x.new_empty(x.shape)
    dweight, dbias = (None if p is None else p.new_empty(p.shape) for p in (weight, bias))
    results = (dx, *(x.new_empty(0) if g is None else g for g in (dweight, dbias)))
    if x.numel() == 0:
        return dx, results[1].zero_(), results[2].zero_()
    rows, width = _rows(x, axes)
    whole, config, shares, steps = _shares(x, rows, width)
    operands = (dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous())
    weight = None if weight is None else weight.contiguous()
    means = None
    if not whole:
        means = x.new_empty((2, rows), dtype=torch.float32)
        block = config.constants["BLOCK"]
        launch(
            _means_kernel, (rows,), *operands, weight, means, rows, width,
            config=Config({"BLOCK": block}, config.num_warps, 1),
        )  # fmt: skip
    sums = x.new_empty((2, shares, width), dtype=torch.float32)
    strips = -(-width // config.constants["BLOCK"])
    launch(
        _backward_kernel, (shares, strips), *operands, weight, means, dx, sums, rows, width, shares, steps,
        config=config,
    )  # fmt: skip
    if dweight is not None or dbias is not None:
        launch(
            _parameters_kernel, (-(-width // 8),), sums, dweight, dbias, width, shares,
            config=Config({"ROWS": 128, "BLOCK": 8}, 4, 1),
        )  # fmt: skip
    return results[0], results[1], results[2]
