"""conv2d on CPU where a gradient is asked for.

The forward's kernels are those of inference, the others csrc/conv2d_backward_cpu.cpp. All read the weight
where it lies, channels_last: no packed copy lasts, which the next step of an optimiser would make stale.
Images and gradients are channels_last throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdfast import _library, dispatch
from sdfast.ops._conv2d_cpu import ALGORITHMS, fold, kernel_op, output_size
from sdfast.ops._linear_training import sum_rows

_LAYOUT = torch.channels_last


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).to(memory_format=_LAYOUT)


def _training_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
) -> Tensor:
    return _empty(x, x.shape[0], weight.shape[0], *output_size(x, (3, 3), 1, padding, False))


_training_op = _library.define_native(
    "conv2d_training(Tensor x, Tensor weight, Tensor? bias, Tensor? time_embedding, Tensor? residual,"
    " int[] padding) -> Tensor",
    _training_fake,
)
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

_MODULE = "sdfast.ops.conv2d_backward_triton"
_weight_gradient_triton_op = _library.define_triton("conv2d_weight_gradient", _MODULE)


# Pixels of y from which Winograd was measured faster, for y and for each gradient.
_WINOGRAD_PIXELS, _WINOGRAD_GRADIENT_PIXELS = 128, 32


def suits_torch_in_training(x: Tensor, weight: Tensor, upsample: bool) -> bool:
    """Few channels, so little work that Python decides, and bf16, which torch multiplies as pairs.

    Measured, forward and backward: fp32 is faster here from about 2^20 products on, bf16 was slower at most
    sizes, fp16 many times faster than torch's.
    """
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    few = min(weight.shape[:2]) < 16 or weight.numel() * pixels < 2**20
    return few or x.dtype == torch.bfloat16


def _upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest").contiguous(memory_format=_LAYOUT)


class _Conv2d(torch.autograd.Function):
    """Images and weight channels_last, bias and time_embedding contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
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
        ctx.geometry, ctx.upsample = (stride, padding), upsample
        suits = tuple(weight.shape[2:]) == (3, 3) and stride == 1 and max(padding) <= 2
        fp32 = x.dtype == torch.float32 and min(weight.shape[:2]) >= 32
        # A function of the shape alone: y has as many pixels for the forward as for the backward.
        ctx.pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
        ctx.winograd = suits and fp32 and dispatch.numerics() == "fast"
        if ctx.winograd and ctx.pixels >= _WINOGRAD_PIXELS:
            image = _upsampled(x) if upsample else x
            return cast(Tensor, _training_op(image, weight, bias, time_embedding, residual, padding))
        values = fold(weight).to(weight.dtype) if upsample else weight.permute(0, 2, 3, 1)
        more = (ALGORITHMS.index("direct"), weight.shape[0], *weight.shape[2:], stride, padding, upsample)
        return cast(Tensor, kernel_op(x, values, bias, time_embedding, residual, *more))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_LAYOUT)
        for_x, for_weight, for_bias, for_time, for_residual, *_ = ctx.needs_input_grad
        pixels = dy.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H'W', C_out)
        dtime = sum_rows(pixels) if for_time else None
        dbias = None
        if for_bias:
            dbias = sum_rows(pixels.flatten(0, 1)[None])[0] if dtime is None else dtime.sum(0)
        return (
            _input_gradient(ctx, dy, x, weight) if for_x else None,
            _weight_gradient(ctx, dy, x, weight) if for_weight else None,
            dbias,
            dtime,
            dy if for_residual else None,
            None,
            None,
            None,
        )


def _input_gradient(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    scale = 2 if ctx.upsample else 1
    winograd = ctx.winograd and ctx.pixels >= _WINOGRAD_GRADIENT_PIXELS
    size = (scale * x.shape[2], scale * x.shape[3])
    dx = cast(Tensor, _input_gradient_op(dy, weight, *size, *ctx.geometry, winograd))
    # An upsampled pixel's gradient is the sum of its four.
    return F.avg_pool2d(dx, 2, divisor_override=1) if ctx.upsample else dx


def _weight_gradient(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if ctx.upsample:
        x = _upsampled(x)
    winograd = ctx.winograd and ctx.pixels >= _WINOGRAD_GRADIENT_PIXELS
    return cast(Tensor, _weight_gradient_op(dy, x, *weight.shape[2:], *ctx.geometry, winograd))


def conv2d_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: tuple[int, int, int, int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """As `conv2d.conv2d`, with a gradient that cannot be differentiated again; torch's can."""
    if upsample and (tuple(weight.shape[2:]) != (3, 3) or stride != 1 or padding != (1, 1, 1, 1)):
        x, upsample = F.interpolate(x, scale_factor=2.0, mode="nearest"), False
    x, weight = (t.contiguous(memory_format=_LAYOUT) for t in (x, weight))
    if residual is not None:
        residual = residual.contiguous(memory_format=_LAYOUT)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = _Conv2d.apply(x, weight, bias, time_embedding, residual, stride, list(padding), upsample)
    return cast(Tensor, y)
