"""linear by the CUDA kernels: on Hopper's own units, or GEGLU's gate behind torch's product.

    h = x Wᵀ + b + residual,  y = h, or a · gelu(g), (a, g) = split(h)

On Hopper csrc/tile_product_cuda.cuh computes all of it, where that was measured to be faster. Else, and where
gradients are wanted, the product and its gradients are torch's; the gate and its gradient
(csrc/linear_cuda.cuh) take one pass each, where torch takes two and five.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from sdfast import _library
from sdfast.ops import _twice
from sdfast.ops._cuda_order import has_hopper_units
from sdfast.ops._linear_rows import rows_cuda_op
from sdfast.ops._linear_training import GEGLU, activation_gradient_by_torch
from sdfast.ops._native import requires_grad

# Of longer rows, but for few tokens, cuBLAS's product and the gate behind it were as fast or faster: 31.7 us
# beside 33.2.
_TILE_COLUMNS, _TILE_TOKENS = 640, 128
_gate_op = _library.define_cuda("linear_activate")
_gate_gradient_op = _library.define_cuda("linear_activation_gradient")


def _gradient_by_torch(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (h,) = ctx.saved_tensors
    return (activation_gradient_by_torch(h, dy, GEGLU),)


class _Gate(Function):
    """(tokens, M) -> (tokens, M/2)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return cast(Tensor, _gate_op(h, GEGLU))

    @staticmethod
    @_twice.differentiable(_gradient_by_torch)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        (h,) = ctx.saved_tensors
        return (_gate_gradient_op(dy.contiguous(), h, GEGLU),)


def multiplies_tiles(
    x: Tensor, weight: Tensor, activation: str | None, residual: Tensor | None, *others: Tensor | None
) -> bool:
    """Whether such a call can be one of Hopper's own units; `others` may have gradients, too."""
    if requires_grad(x, weight, residual, *others):
        return False
    rows, columns = weight.shape[:2]
    if activation == "geglu":
        few = columns <= _TILE_COLUMNS or x.numel() <= _TILE_TOKENS * columns
        return residual is None and few and has_hopper_units(x, columns, rows // 2)
    return activation is None and has_hopper_units(x, columns, rows)


def linear_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `linear.linear` of what `multiplies_tiles`, or of "geglu"."""
    if multiplies_tiles(x, weight, activation, residual, bias):
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(-1, weight.shape[0])
        y = rows_cuda_op(rows, weight.flatten(1), bias, added, GEGLU if activation else 0)
        return cast(Tensor, y).view(*x.shape[:-1], y.shape[-1])
    h = F.linear(x, weight.flatten(1), bias)
    h = h if residual is None else h + residual
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    y = cast(Tensor, _Gate.apply(rows)) if requires_grad(rows) else _gate_op(rows, GEGLU)
    return y.view(*h.shape[:-1], y.shape[-1])
