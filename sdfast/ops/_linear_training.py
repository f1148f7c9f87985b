"""linear where a gradient is asked for.

    h = x Wᵀ + b + residual,  y = act(h)
    dh = dy act'(h),  dx = dh W,  dW = dhᵀ x,  db = Σ dh,  dresidual = dh

The forward's kernel is that of inference, the others are those of csrc/linear_backward_cpu.cpp, or for Triton
linear_backward_triton.py. All read the weight where it lies: no packed copy lasts, which the next step of an
optimiser would make stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdfast import _library
from sdfast.ops import _tiles
from sdfast.ops._linear_rows import rows_op, rows_triton_op, split_op


def _activate_fake(h: Tensor, activation: int) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[1] // 2 if activation == GEGLU else h.shape[1]))


GEGLU = 4  # its place in linear.ACTIVATIONS
_input_gradient_op, _split_input_gradient_op = (
    _library.define_native(
        f"linear_input_gradient{split}(Tensor dh, Tensor weight) -> Tensor",
        lambda dh, weight: dh.new_empty((dh.shape[0], weight.shape[1])),
    )
    for split in ("", "_split")
)
_weight_gradient_op, _split_weight_gradient_op = (
    _library.define_native(
        f"linear_weight_gradient{split}(Tensor dh, Tensor x) -> Tensor",
        lambda dh, x: dh.new_empty((dh.shape[1], x.shape[1])),
    )
    for split in ("", "_split")
)
_activate_op = _library.define_native("linear_activate(Tensor h, int activation) -> Tensor", _activate_fake)
_activation_gradient_op = _library.define_native(
    "linear_activation_gradient(Tensor dy, Tensor h, int activation) -> Tensor",
    lambda dy, h, activation: torch.empty_like(h),
)
_sum_rows_op = _library.define_native(
    "sum_rows(Tensor x) -> Tensor", lambda x: x.new_empty((x.shape[0], x.shape[2]))
)


class Operations(NamedTuple):
    """What computes a linear layer and its gradient."""

    rows: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    activate: Callable[..., Tensor]
    activation_gradient: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]


CPU = Operations(
    rows_op, _input_gradient_op, _weight_gradient_op, _activate_op, _activation_gradient_op, _sum_rows_op
)
# fp32 on AMX tiles; see _tiles.py.
_SPLIT = CPU._replace(
    rows=split_op, input_gradient=_split_input_gradient_op, weight_gradient=_split_weight_gradient_op
)
TRITON = Operations(
    rows_triton_op,
    *(
        _library.define_triton(name, "sdfast.ops.linear_backward_triton")
        for name in (
            "linear_input_gradient", "linear_weight_gradient", "linear_activate",
            "linear_activation_gradient", "sum_rows",
        )
    ),
)  # fmt: skip


def sum_rows(x: Tensor, operations: Operations = CPU) -> Tensor:
    """(groups, rows, columns) -> (groups, columns)."""
    return operations.sum_rows(x.contiguous())


class _Linear(torch.autograd.Function):
    """x: (tokens, K), its rows contiguous. weight: (M, K). bias: (M,). residual: (tokens, M)."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: int,
    ) -> Tensor:
        h = operations.rows(x, weight, bias, residual, 0)
        ctx.save_for_backward(x, weight, h if activation else None)
        ctx.operations, ctx.activation = operations, activation
        return operations.activate(h, activation) if activation else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        operations = ctx.operations
        x, weight, h = ctx.saved_tensors
        dy = dy.contiguous()
        dh = dy if h is None else operations.activation_gradient(dy, h, ctx.activation)
        _, for_x, for_weight, for_bias, for_residual, _ = ctx.needs_input_grad
        return (
            None,
            operations.input_gradient(dh, weight) if for_x else None,
            operations.weight_gradient(dh, x) if for_weight else None,
            sum_rows(dh[None], operations)[0] if for_bias else None,
            dh if for_residual else None,
            None,
        )


def linear_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    operations: Operations = CPU,
) -> Tensor:
    """As `linear.linear`, with a gradient that cannot be differentiated again; torch's can."""
    tokens, matrix = x.reshape(-1, x.shape[-1]), weight.flatten(1).contiguous()
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    if residual is not None:
        residual = residual.reshape(-1, weight.shape[0]).contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if operations is CPU and _tiles.split(x.dtype):
        operations = _SPLIT
    y = cast(Tensor, _Linear.apply(operations, tokens, matrix, bias, residual, activation))
    return y.view(*x.shape[:-1], y.shape[-1])
