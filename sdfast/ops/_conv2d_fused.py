"""conv2d by the Triton kernels: which calls become one launch, and which more."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sdfast.ops._conv2d_call import Call
from sdfast.ops._conv2d_operations import kernel_op, statistics_op
from sdfast.ops._conv2d_training import TRITON, conv2d_training
from sdfast.ops._linear_rows import rows_triton_op


def conv2d_triton(call: Call, statistics: tuple[int, float] | None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y, or with the groups and eps of `statistics` y, mean and rstd."""
    norm, silu = call.norm, False
    is_pointwise = call.weight.shape[2:] == (1, 1)
    operands: list[Tensor] = []
    if norm is not None and norm.statistics is not None and is_pointwise:
        operands, silu = [*norm.statistics, norm.weight, norm.bias], norm.silu
    else:  # A larger kernel loads each pixel several times: a pass of its own costs less than as many SiLUs.
        call = call.normalised("triton")
    x, weight, bias, stride, padding, upsample, time_embedding, residual, skip, _ = call
    arguments = (
        x, weight, bias, stride, list(padding), upsample, time_embedding, residual, skip, operands, silu,
    )  # fmt: skip
    if statistics is not None:
        return cast("tuple[Tensor, Tensor, Tensor]", statistics_op(*arguments, *statistics))
    is_product = is_pointwise and stride == 1 and not any(padding) and not upsample
    is_product = is_product and x.dtype is not torch.float32  # whose precision torch sets apart for the two
    if is_product and not operands and skip is None and time_embedding is None:
        return _product(x, weight, bias, residual)
    return cast(Tensor, kernel_op(*arguments))


def conv2d_triton_training(call: Call) -> Tensor:
    """y, where a gradient is asked for.

    The weight's gradient needs what the convolution read, as one image: `skip` is concatenated, and the norm
    is an operation of its own, with a gradient of its own.
    """
    call = call.normalised("triton")
    if call.skip is not None:
        call = call._replace(x=torch.cat([call.x, call.skip], 1), skip=None)
    return conv2d_training(call, TRITON)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A 1x1 convolution: pixels are the rows of a matrix, which lies in memory as the image does."""

    def pixels(image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])

    added = None if residual is None else pixels(residual)
    bias = None if bias is None else bias.contiguous()
    y = cast(Tensor, rows_triton_op(pixels(x), weight.flatten(1).contiguous(), bias, added, 0))
    return y.view(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)
