"""conv2d on CPU where a gradient is asked for.

The kernels are csrc/conv2d_backward_cpu.cpp. They read the weight where it lies, channels_last: no packed
copy lasts, which the next step of an optimiser would make stale. Images and gradients are channels_last
throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdfast import _library, dispatch
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
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    winograd: bool,
) -> Tensor:
    scale = 2 if upsample else 1
    left, right, top, bottom = padding
    height = (x.shape[2] * scale + top + bottom - weight.shape[2]) // stride + 1
    width = (x.shape[3] * scale + left + right - weight.shape[3]) // stride + 1
    return _empty(x, x.shape[0], weight.shape[0], height, width)


_training_op = _library.define_native(
    "conv2d_training(Tensor x, Tensor weight, Tensor? bias, Tensor? time_embedding, Tensor? residual,"
    " int stride, int[] padding, bool upsample, bool winograd) -> Tensor",
    _training_fake,
)
_input_gradient_op = _library.define_native(
    "conv2d_input_gradient(Tensor dy, Tensor weight, int height, int width, int stride, int[] padding,"
    " bool upsample, bool winograd) -> Tensor",
    lambda dy, weight, height, width, *_: _empty(dy, dy.shape[0], weight.shape[1], height, width),
)
_weight_gradient_op = _library.define_native(
    "conv2d_weight_gradient(Tensor dy, Tensor x, int kernel_height, int kernel_width, int stride,"
    " int[] padding, bool upsample, bool winograd) -> Tensor",
    lambda dy, x, height, width, *_: _empty(dy, dy.shape[1], x.shape[1], height, width),
)


# Pixels of y from which Winograd was measured faster: where it transforms the weight, the same where the
# other algorithm folds an upsample into it, and where it transforms sums to the weight's gradient.
_WINOGRAD_PIXELS, _WINOGRAD_UPSAMPLED_PIXELS, _WINOGRAD_WEIGHT_PIXELS = 512, 2048, 128


def _winograd(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> bool:
    """Whether Winograd's algorithm takes such a convolution and its error is allowed."""
    suits = tuple(weight.shape[2:]) == (3, 3) and stride == 1 and max(padding) <= 2
    fp32 = x.dtype == torch.float32 and min(weight.shape[:2]) >= 32
    return suits and fp32 and dispatch.numerics() == "fast"


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
        ctx.geometry = (stride, padding, upsample)
        ctx.winograd = _winograd(x, weight, stride, padding)
        pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
        least = _WINOGRAD_UPSAMPLED_PIXELS if upsample else _WINOGRAD_PIXELS
        winograd = ctx.winograd and pixels >= least
        y = _training_op(x, weight, bias, time_embedding, residual, *ctx.geometry, winograd)
        return cast(Tensor, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_LAYOUT)
        for_x, for_weight, for_bias, for_time, for_residual, *_ = ctx.needs_input_grad
        pixels = dy.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H'W', C_out)
        by_winograd = ctx.winograd and pixels.shape[0] * pixels.shape[1] >= _WINOGRAD_WEIGHT_PIXELS
        dtime = sum_rows(pixels) if for_time else None
        dbias = None
        if for_bias:
            dbias = sum_rows(pixels.flatten(0, 1)[None])[0] if dtime is None else dtime.sum(0)
        return (
            _input_gradient(ctx, dy, x, weight) if for_x else None,
            _weight_gradient_op(dy, x, *weight.shape[2:], *ctx.geometry, by_winograd) if for_weight else None,
            dbias,
            dtime,
            dy if for_residual else None,
            None,
            None,
            None,
        )


def _input_gradient(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    stride, padding, upsample = ctx.geometry
    height, width = x.shape[2:]
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    least = _WINOGRAD_UPSAMPLED_PIXELS if upsample else _WINOGRAD_PIXELS
    winograd = ctx.winograd and pixels >= least
    if not (winograd and upsample):
        return cast(
            Tensor, _input_gradient_op(dy, weight, height, width, stride, padding, upsample, winograd)
        )
    upsampled = _input_gradient_op(dy, weight, 2 * height, 2 * width, stride, padding, False, True)
    return F.avg_pool2d(upsampled, 2, divisor_override=1)  # the sum over each pixel's four


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
    x, weight = (t.contiguous(memory_format=_LAYOUT) for t in (x, weight))
    if residual is not None:
        residual = residual.contiguous(memory_format=_LAYOUT)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = _Conv2d.apply(x, weight, bias, time_embedding, residual, stride, list(padding), upsample)
    return cast(Tensor, y)
