"""conv2d by the Triton kernels: which calls become one launch, and which more."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sdfast.ops._conv2d_operations import kernel_op, statistics_op
from sdfast.ops._conv2d_training import TRITON, conv2d_training
from sdfast.ops._linear_rows import rows_triton_op
from sdfast.ops.group_norm import group_norm


def conv2d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_silu: bool = False,
    norm_statistics: tuple[Tensor, Tensor] | None = None,
    stats_groups: int = 0,
    stats_eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y, or with `stats_groups` y, mean and rstd."""
    is_pointwise = weight.shape[2:] == (1, 1)
    norm: list[Tensor] = []
    if norm_groups and is_pointwise and norm_statistics is not None:
        norm = [*norm_statistics, cast(Tensor, norm_weight), cast(Tensor, norm_bias)]
    elif norm_groups:
        # A larger kernel loads each pixel several times: a pass of its own costs less than as many SiLUs.
        known = norm_statistics if skip is None else None
        x = group_norm(
            x, norm_groups, norm_weight, norm_bias, norm_eps, activation="silu" if norm_silu else None,
            skip=skip, statistics=known, backend="triton",
        )  # fmt: skip
        skip = None
    operands = (
        x, weight, bias, stride, list(padding), upsample, time_embedding, residual, skip, norm, norm_silu
    )  # fmt: skip
    if stats_groups:
        return cast("tuple[Tensor, Tensor, Tensor]", statistics_op(*operands, stats_groups, stats_eps))
    is_product = is_pointwise and stride == 1 and not any(padding) and not upsample
    is_product = is_product and x.dtype is not torch.float32  # whose precision torch sets apart for the two
    if is_product and not norm and skip is None and time_embedding is None:
        return _product(x, weight, bias, residual)
    return cast(Tensor, kernel_op(*operands))


def conv2d_triton_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_silu: bool = False,
    norm_statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y, with a gradient that cannot be differentiated again; torch's can.

    The weight's gradient needs what the convolution read, as one image: `skip` is concatenated, and the norm
    is an operation of its own, with a gradient of its own.
    """
    if norm_groups:
        x = group_norm(
            x, norm_groups, norm_weight, norm_bias, norm_eps, activation="silu" if norm_silu else None,
            skip=skip, statistics=norm_statistics if skip is None else None, backend="triton",
        )  # fmt: skip
    elif skip is not None:
        x = torch.cat([x, skip], 1)
    return conv2d_training(x, weight, bias, stride, padding, upsample, time_embedding, residual, TRITON)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A 1x1 convolution: pixels are the rows of a matrix, which lies in memory as the image does."""

    def pixels(image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])

    added = None if residual is None else pixels(residual)
    bias = None if bias is None else bias.contiguous()
    y = cast(Tensor, rows_triton_op(pixels(x), weight.flatten(1).contiguous(), bias, added, 0))
    return y.view(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)
