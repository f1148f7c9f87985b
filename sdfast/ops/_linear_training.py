"""linear where a gradient is asked for.

    h = x Wᵀ + b + residual,  y = act(h)
    dh = dy act'(h),  dx = dh W,  dW = dhᵀ x,  db = Σ dh,  dresidual = dh

The forward's kernel is that of inference, the others are those of csrc/linear_backward_cpu.cpp, or for Triton
linear_backward_triton.py. All read the weight where it lies: no packed copy lasts, which the next step of an
optimiser would make stale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sdfast import _library
from sdfast.ops import _tiles, _twice
from sdfast.ops._checks import widened
from sdfast.ops._linear_rows import ACTIVATIONS, activate, dense, matrices, rows_op, rows_triton_op, split_op


def _activate_fake(h: Tensor, activation: int) -> Tensor:
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2 if activation == GEGLU else h.shape[-1]))


def _gradients_fake(
    dh: Tensor, x: Tensor, weight: Tensor, split: bool, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, ...]:
    shapes = ((for_x, x.shape), (for_weight, weight.shape), (for_bias, weight.shape[:1]))
    return tuple(x.new_empty(shape if wanted else 0) for wanted, shape in shapes)


GEGLU = 4  # its place in linear.ACTIVATIONS
_gradients_op = _library.define_native(
    "linear_gradients(Tensor dh, Tensor x, Tensor weight, bool split, bool for_x, bool for_weight,"
    " bool for_bias) -> (Tensor, Tensor, Tensor)",
    _gradients_fake,
)
_activate_op = _library.define_native("linear_activate(Tensor h, int activation) -> Tensor", _activate_fake)
_activation_gradient_op = _library.define_native(
    "linear_activation_gradient(Tensor dy, Tensor h, int activation) -> Tensor",
    lambda dy, h, activation: torch.empty_like(h),
)
_sum_rows_op = _library.define_native(
    "sum_rows(Tensor x) -> Tensor", lambda x: x.new_empty((x.shape[0], x.shape[2]))
)
_BACKWARD = "sdfast.ops.linear_backward_triton"
_input_gradient_triton_op = _library.define_triton(
    "linear_input_gradient", _BACKWARD, schema="(Tensor dh, Tensor weight) -> Tensor",
    fake=lambda dh, weight: dh.new_empty((dh.shape[0], weight.shape[1])),
)  # fmt: skip
_weight_gradient_triton_op = _library.define_triton(
    "linear_weight_gradient", _BACKWARD, schema="(Tensor dh, Tensor x) -> Tensor",
    fake=lambda dh, x: dh.new_empty((dh.shape[1], x.shape[1])),
)  # fmt: skip


class Operations(NamedTuple):
    """What computes a linear layer and its gradient.

    Attributes:
        rows: of x, weight, bias, residual and activation.
        gradients: of dh, x, weight, and whether dx, dW and db are wanted -> these; what was not wanted is
            None or an empty tensor.
        activate, activation_gradient, sum_rows: as `sdfast::linear_activate` and its fellows.
    """

    rows: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]]
    activate: Callable[..., Tensor]
    activation_gradient: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]


def _gradients(dh: Tensor, x: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor | None, ...]:
    return cast(tuple[Tensor, ...], _gradients_op(dh, x, weight, False, *wanted))


def _gradients_split(dh: Tensor, x: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor | None, ...]:
    return cast(tuple[Tensor, ...], _gradients_op(dh, x, weight, True, *wanted))


def _gradients_triton(
    dh: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor | None, ...]:
    return (
        _input_gradient_triton_op(dh, weight) if for_x else None,
        _weight_gradient_triton_op(dh, x) if for_weight else None,
        TRITON.sum_rows(dh[None])[0] if for_bias else None,
    )


CPU = Operations(rows_op, _gradients, _activate_op, _activation_gradient_op, _sum_rows_op)
_SPLIT = CPU._replace(rows=split_op, gradients=_gradients_split)  # fp32 on AMX tiles; see _tiles.py
TRITON = Operations(
    rows_triton_op,
    _gradients_triton,
    *(
        _library.define_triton(name, _BACKWARD)
        for name in ("linear_activate", "linear_activation_gradient", "sum_rows")
    ),
)


def activation_gradient_by_torch(h: Tensor, dy: Tensor, activation: int) -> Tensor:
    """As `sdfast::linear_activation_gradient`, of an h that is part of the graph."""
    formula = functools.partial(widened(activate), activation=ACTIVATIONS[activation])
    return cast(Tensor, _twice.gradients(formula, (h,), (True,), dy)[0])


def _gradients_by_torch(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
    from sdfast.ops.linear import linear_reference  # which imports this module

    x, weight, h = ctx.saved_tensors
    if h is None:
        dh = dy
    elif dy is not None:
        through = activation_gradient_by_torch(h, dy, ctx.activation)
        dh = through if dh is None else dh + through
    if dh is None:
        return (None,) * 6
    _, for_x, for_weight, for_bias, for_residual, _ = ctx.needs_input_grad
    dx, dweight = _twice.gradients(linear_reference, (x, weight), (for_x, for_weight), dh)
    dbias = dh.reshape(-1, dh.shape[-1]).sum(0) if for_bias else None
    return None, dx, dweight, dbias, dh if for_residual else None, None


class _Linear(torch.autograd.Function):
    """Tensors as `linear.linear`'s, for Triton matrices. The CPU's operations take dense ones of any
    dimensions, so that no view of them is a node of the graph.

    Before an activation h is a result, too: as one that is saved it is part of the graph, where a gradient is
    differentiated again, and neither bias nor residual has to be saved for that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        h = operations.rows(x, weight, bias, residual, 0)
        ctx.save_for_backward(x, weight, h if activation else None)
        ctx.operations, ctx.activation = operations, activation
        if not activation:
            return h
        y = operations.activate(h, activation)
        if torch.compiler.is_compiling():
            return y
        ctx.set_materialize_grads(False)  # that of h is mostly None
        return y, h

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        operations = ctx.operations
        x, weight, h = ctx.saved_tensors
        if dy is not None:
            through = dy.contiguous()
            if h is not None:
                through = operations.activation_gradient(through, h, ctx.activation)
            dh = through if dh is None else dh + through
        if dh is None:
            return (None,) * 6
        dh = dh.contiguous()
        _, *wanted, for_residual, _ = ctx.needs_input_grad
        found = operations.gradients(dh, x, weight, *wanted) if any(wanted) else (None,) * 3
        gradients = [t if needed else None for t, needed in zip(found, wanted, strict=True)]
        return None, *gradients, dh if for_residual else None, None


def _first(results: Any) -> Tensor:
    return cast(Tensor, results[0] if isinstance(results, tuple) else results)


def linear_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """As `linear.linear` on CPU, where a gradient is asked for."""
    given = dense(x, weight, bias, residual)
    return _first(_Linear.apply(_SPLIT if _tiles.split(x.dtype) else CPU, *given, activation))


def linear_training_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """As `linear_training`, by the Triton kernels."""
    y = _first(_Linear.apply(TRITON, *matrices(x, weight, bias, residual), activation))
    return y.view(*x.shape[:-1], y.shape[-1])
