"""GEGLU behind torch's matrix product, by the CUDA kernels of csrc/linear_cuda.cuh.

    h = x Wᵀ + b + residual,  y = a · gelu(g), (a, g) = split(h)

The product and its gradients are torch's; the gate and its gradient take one pass each, where torch takes two
and five.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from sdfast import _library
from sdfast.ops._linear_training import GEGLU
from sdfast.ops._native import requires_grad

_gate_op = _library.define_cuda("linear_activate")
_gate_gradient_op = _library.define_cuda("linear_activation_gradient")


class _Gate(Function):
    """(tokens, M) -> (tokens, M/2)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return cast(Tensor, _gate_op(h, GEGLU))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return cast(Tensor, _gate_gradient_op(dy.contiguous(), h, GEGLU))


def linear_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `linear.linear` with "geglu". Its gradient cannot be differentiated again; torch's can."""
    h = F.linear(x, weight.flatten(1), bias)
    h = h if residual is None else h + residual
    rows = h.reshape(-1, h.shape[-1]).contiguous()
    y = cast(Tensor, _Gate.apply(rows)) if requires_grad(rows) else _gate_op(rows, GEGLU)
    return y.view(*h.shape[:-1], y.shape[-1])
