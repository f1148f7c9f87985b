"""The operations of group_norm's kernels on CPU, in Triton and in CUDA C++, with gradients.

The forward that trains also returns mean and rstd, (N, num_groups), fp32, from which, with x, the backward
recomputes x̂ and z. Triton and CUDA have two operations more: `group_norm_pair`, whose channels are those of
two tensors, and `group_norm_apply`, which is given the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sdfast import _library
from sdfast.ops import _twice
from sdfast.ops._group_norm_layout import empty_concatenation, empty_in_layout


def _forward_fake(x: Tensor, num_groups: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_in_layout(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


def _inference_fake(x: Tensor, *_: object) -> Tensor:
    return empty_in_layout(x)


def _pair_fake(x: Tensor, skip: Tensor, *_: object) -> Tensor:
    return empty_concatenation(x, skip)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, ...]:
    parameters = (weight, bias, scale, shift)
    return empty_in_layout(x), *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)


class Operations(NamedTuple):
    """What computes group_norm and its gradient. `pair` and `apply` are None where there are none."""

    inference: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    pair: Callable[..., Tensor] | None = None
    apply: Callable[..., Tensor] | None = None


_PARAMETERS = "Tensor? weight, Tensor? bias"
_FUSED = "bool silu, Tensor? scale, Tensor? shift"
CPU = Operations(
    _library.define_native(
        f"group_norm(Tensor x, int num_groups, {_PARAMETERS}, float eps, {_FUSED}) -> Tensor",
        _inference_fake,
    ),
    _library.define_native(
        f"group_norm_forward(Tensor x, int num_groups, {_PARAMETERS}, float eps, {_FUSED}) "
        "-> (Tensor, Tensor mean, Tensor rstd)",
        _forward_fake,
    ),
    _library.define_native(
        f"group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, {_PARAMETERS}, "
        f"{_FUSED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward_fake,
    ),
)
_PAIR = f"(Tensor x, Tensor skip, int num_groups, {_PARAMETERS}, float eps, {_FUSED}) -> Tensor"
_APPLY = f"(Tensor x, Tensor mean, Tensor rstd, int num_groups, {_PARAMETERS}, {_FUSED}) -> Tensor"
_KERNELS = "sdfast.ops.group_norm_triton"
TRITON = Operations(
    _library.define_triton("group_norm", _KERNELS),
    _library.define_triton("group_norm_forward", _KERNELS),
    _library.define_triton("group_norm_backward", "sdfast.ops.group_norm_backward_triton"),
    _library.define_triton("group_norm_pair", _KERNELS, schema=_PAIR, fake=_pair_fake),
    _library.define_triton("group_norm_apply", _KERNELS, schema=_APPLY, fake=_inference_fake),
)
CUDA = Operations(
    _library.define_cuda("group_norm"),
    _library.define_cuda("group_norm_forward"),
    _library.define_cuda("group_norm_backward"),
    _library.define_cuda("group_norm_pair", schema=_PAIR, fake=_pair_fake),
    _library.define_cuda("group_norm_apply", schema=_APPLY, fake=_inference_fake),
)


def _gradients_by_torch(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    from sdfast.ops.group_norm import group_norm_reference  # which imports this module

    x, _, _, *parameters = ctx.saved_tensors
    _, for_x, _, for_weight, for_bias, _, _, for_scale, for_shift, _, _ = ctx.needs_input_grad

    def formula(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> object:
        fused = {"silu": ctx.silu, "scale": scale, "shift": shift}
        return group_norm_reference(x, ctx.num_groups, weight, bias, ctx.eps, **fused)

    needed = (for_x, for_weight, for_bias, for_scale, for_shift)
    dx, dweight, dbias, dscale, dshift = _twice.gradients(formula, (x, *parameters), needed, dy)
    return None, dx, None, dweight, dbias, None, None, dscale, dshift, None, None


class _GroupNorm(torch.autograd.Function):
    """The forward with the backward of the same kernels. `statistics`, where given, are not computed."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
    ) -> Tensor:
        if operations.apply is None or mean is None or rstd is None:
            y, mean, rstd = operations.forward(x, num_groups, weight, bias, eps, silu, scale, shift)
        else:
            y = operations.apply(x, mean, rstd, num_groups, weight, bias, silu, scale, shift)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.operations, ctx.num_groups, ctx.eps, ctx.silu = operations, num_groups, eps, silu
        return y

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        dx, dweight, dbias, dscale, dshift = ctx.operations.backward(
            dy, x, mean, rstd, ctx.num_groups, weight, bias, ctx.silu, scale, shift
        )
        return (
            None,
            dx,
            None,
            None if weight is None else dweight,
            None if bias is None else dbias,
            None,
            None,
            None if scale is None else dscale,
            None if shift is None else dshift,
            None,
            None,
        )


def group_norm_training(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None = None,
    operations: Operations = CPU,
) -> Tensor:
    """As `group_norm.group_norm`, where a gradient is asked for."""
    mean, rstd = (None, None) if statistics is None else (t.detach() for t in statistics)
    y = _GroupNorm.apply(
        operations, x, num_groups, weight, bias, eps, silu, scale, shift, mean, rstd
    )  # fmt: skip
    return cast(Tensor, y)
