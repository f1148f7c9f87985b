"""conv2d where a gradient is asked for.

The forward's kernels are those of inference, the others csrc/conv2d_backward_cpu.cpp, or for Triton
conv2d_backward_triton.py. All read the weight where it lies, channels_last: no packed copy lasts, which the
next step of an optimiser would make stale. Images and gradients are channels_last throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _tiles, _twice
from sdfast.ops._conv2d_call import Call
from sdfast.ops._conv2d_choice import folds, suits_torch, suits_winograd
from sdfast.ops._conv2d_cpu import ALGORITHMS, fold, kernel_op, upsampled
from sdfast.ops._conv2d_operations import kernel_op as triton_kernel_op
from sdfast.ops._linear_training import CPU as LINEAR_CPU
from sdfast.ops._linear_training import TRITON as LINEAR_TRITON

_LAYOUT = torch.channels_last
# Below so many pixels of y, summing a weight into four of 2x2 at each call costs more than that saves on AMX.
_FOLDED_PIXELS = 2048


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).to(memory_format=_LAYOUT)


_input_gradient_op = _library.define_native(
    "conv2d_input_gradient(Tensor dy, Tensor weight, int height, int width, int stride, int[] padding,"
    " bool winograd) -> Tensor",
    lambda dy, weight, height, width, *_: _empty(dy, dy.shape[0], weight.shape[1], height, width),
)
_weight_gradient_op = _library.define_native(
    "conv2d_weight_gradient(Tensor dy, Tensor x, int kernel_height, int kernel_width, int stride,"
    " int[] padding, bool winograd) -> Tensor",
    lambda dy, x, height, width, *_: _empty(dy, dy.shape[1], x.shape[1], height, width),
)


def suits_torch_in_training(call: Call) -> bool:
    """Few channels, so little work that Python decides, and in bf16 single taps of many pixels.

    Measured, forward and backward: fp32 is faster here from about 2^20 products on, fp16 many times faster
    than torch's. bf16 is on AMX, and in pairs but for 1x1 kernels over 1024 pixels and more; widened to fp32
    it was not.
    """
    x, weight, upsample = call.x, call.weight, call.upsample
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    few = suits_torch(x, weight, upsample) or weight.numel() * pixels < 2**20
    many = weight.shape[2:].numel() == 1 and pixels >= 1024
    if x.dtype != torch.bfloat16 or _tiles.serve(x.dtype):
        return few
    return few or many or not _library.has_kernel("bf16_pairs", "cpu")


class Operations(NamedTuple):
    """What computes a convolution and its gradient.

    Attributes:
        forward: of x, weight, bias, time_embedding, residual, stride, padding, upsample and winograd.
        input_gradient, weight_gradient: as `sdfast::conv2d_input_gradient` and its fellow.
        sum_rows: (groups, rows, columns) -> (groups, columns).
        has_winograd: whether some of it can be done by Winograd's algorithm.
        folds_upsample: whether the gradients through an upsample are those of a 4x4 convolution.
    """

    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    sum_rows: Callable[..., Tensor]
    has_winograd: bool
    folds_upsample: bool


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    upsample: bool,
    winograd: bool,
) -> Tensor:
    algorithm = "winograd4x4_unpacked" if winograd else "split" if _tiles.split(x.dtype) else "direct"
    few = _tiles.serve(x.dtype) and 4 * x.numel() < _FOLDED_PIXELS * x.shape[1]
    if upsample and (winograd or few):
        x, upsample = upsampled(x), False
    values = fold(weight).to(weight.dtype) if upsample else weight.permute(0, 2, 3, 1)
    more = (ALGORITHMS.index(algorithm), weight.shape[0], *weight.shape[2:], stride, padding, upsample)
    return cast(Tensor, kernel_op(x, values, bias, time_embedding, residual, *more))


def _forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    upsample: bool,
    winograd: bool,
) -> Tensor:
    values = fold(weight).to(weight.dtype) if upsample else weight
    y = triton_kernel_op(
        x, values, bias, stride, padding, upsample, time_embedding, residual, None, [], False
    )
    return cast(Tensor, y)


CPU = Operations(
    _forward_cpu, _input_gradient_op, _weight_gradient_op, LINEAR_CPU.sum_rows,
    has_winograd=True, folds_upsample=False,
)  # fmt: skip
_BACKWARD = "sdfast.ops.conv2d_backward_triton"
TRITON = Operations(
    _forward_triton,
    _library.define_triton("conv2d_input_gradient", _BACKWARD),
    _library.define_triton("conv2d_weight_gradient", _BACKWARD),
    LINEAR_TRITON.sum_rows,
    has_winograd=False,
    folds_upsample=True,
)


def _gradients_by_torch(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    from sdfast.ops.conv2d import conv2d_reference  # which imports this module

    x, weight = ctx.saved_tensors
    stride, padding = ctx.geometry
    _, for_x, for_weight, for_bias, for_time, for_residual, *_ = ctx.needs_input_grad

    def formula(x: Tensor, weight: Tensor) -> object:
        return conv2d_reference(x, weight, None, stride, tuple(padding), upsample=ctx.upsample)

    dx, dweight = _twice.gradients(formula, (x, weight), (for_x, for_weight), dy)
    dbias = dy.sum((0, 2, 3)) if for_bias else None
    dtime = dy.sum((2, 3)) if for_time else None
    return None, dx, dweight, dbias, dtime, dy if for_residual else None, None, None, None


class _Conv2d(torch.autograd.Function):
    """Images and weight channels_last, bias and time_embedding contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        time_embedding: Tensor | None,
        residual: Tensor | None,
        stride: int,
        padding: list[int],
        upsample: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operations, ctx.geometry, ctx.upsample = operations, (stride, padding), upsample
        suits = tuple(weight.shape[2:]) == (3, 3) and stride == 1 and max(padding) <= 2
        # A function of the shape alone: y has as many pixels for the forward as for the backward.
        scale = 2 if upsample else 1
        size = (x.shape[0], scale * x.shape[2], scale * x.shape[3])
        suits = suits and operations.has_winograd and suits_winograd(weight, *size)
        ctx.winograd = suits and dispatch.numerics() == "fast"
        added = (bias, time_embedding, residual)
        return operations.forward(x, weight, *added, stride, padding, upsample, ctx.winograd)

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sum_rows = ctx.operations.sum_rows
        dy = dy.contiguous(memory_format=_LAYOUT)
        _, for_x, for_weight, for_bias, for_time, for_residual, *_ = ctx.needs_input_grad
        pixels = dy.permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (N, H'W', C_out), dy's memory
        dtime = sum_rows(pixels) if for_time else None
        dbias = None
        if for_bias:
            dbias = sum_rows(pixels.flatten(0, 1)[None])[0] if dtime is None else dtime.sum(0)
        return (
            None,
            _input_gradient(ctx, dy, x, weight) if for_x else None,
            _weight_gradient(ctx, dy, x, weight) if for_weight else None,
            dbias,
            dtime,
            dy if for_residual else None,
            None,
            None,
            None,
        )


# Each pixel of y after a nearest-2x upsample meets 3x3 pixels of the four times as many, so each pixel of x
# meets 4x4 of y, two apart: y is the transpose of a 4x4 convolution of stride 2, whose weight is the flipped
# 3x3 summed over 2x2. Its gradients do 16 products a pixel of x instead of 36, and form no larger image.
_FOLDED = (2, [1, 1, 1, 1])


def _folded(weight: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3) -> (C_in, C_out, 4, 4), channels_last."""
    flipped = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    return F.avg_pool2d(flipped, 2, 1, divisor_override=1).contiguous(memory_format=_LAYOUT)


def _unfolded(gradient: Tensor) -> Tensor:
    """(C_in, C_out, 4, 4), a gradient of `_folded`'s result -> (C_out, C_in, 3, 3), that of its argument."""
    summed = F.avg_pool2d(gradient, 2, 1, divisor_override=1)
    return summed.transpose(0, 1).flip(2, 3).contiguous(memory_format=_LAYOUT)


def _input_gradient(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    operations = ctx.operations
    if ctx.upsample and operations.folds_upsample:
        return cast(Tensor, operations.forward(dy, _folded(weight), None, None, None, *_FOLDED, False, False))
    scale = 2 if ctx.upsample else 1
    size = (scale * x.shape[2], scale * x.shape[3])
    dx = cast(Tensor, operations.input_gradient(dy, weight, *size, *ctx.geometry, ctx.winograd))
    # An upsampled pixel's gradient is the sum of its four.
    return F.avg_pool2d(dx, 2, divisor_override=1) if ctx.upsample else dx


def _weight_gradient(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    operations = ctx.operations
    if ctx.upsample and operations.folds_upsample:
        return _unfolded(operations.weight_gradient(x, dy, 4, 4, *_FOLDED, False))
    if ctx.upsample:
        x = upsampled(x)
    kernel = weight.shape[2:]
    return cast(Tensor, operations.weight_gradient(dy, x, *kernel, *ctx.geometry, ctx.winograd))


def conv2d_training(call: Call, operations: Operations = CPU) -> Tensor:
    """y of a call without `norm` and `skip`, where a gradient is asked for."""
    x, weight, bias, stride, padding, upsample, time_embedding, residual, *_ = call
    if upsample and not folds(weight.shape[2:], stride, padding):
        x, upsample = upsampled(x), False
    x, weight = (t.contiguous(memory_format=_LAYOUT) for t in (x, weight))
    if residual is not None:
        residual = residual.contiguous(memory_format=_LAYOUT)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    tensors = (x, weight, bias, time_embedding, residual)
    y = _Conv2d.apply(operations, *tensors, stride, list(padding), upsample)
    return cast(Tensor, y)
