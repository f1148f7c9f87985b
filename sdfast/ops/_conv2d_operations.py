"""The operations of conv2d_triton.py and csrc/conv2d_cuda.cu: a convolution with what is fused, alone or with
the statistics of y."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdfast import _library
from sdfast.ops._conv2d_cpu import output_size


def empty_result(x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], upsample: bool) -> Tensor:
    """y, channels_last, for a weight (O, C, kh, kw), or (4, O, 2, 2, C) as `_conv2d_cpu.fold` makes it."""
    if weight.dim() == 5:
        shape = (x.shape[0], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    else:
        kernel = (weight.shape[2], weight.shape[3])
        shape = (x.shape[0], weight.shape[0], *output_size(x, kernel, stride, padding, upsample))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _kernel_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    norm: Sequence[Tensor],
    norm_silu: bool,
) -> Tensor:
    return empty_result(x, weight, stride, padding, upsample)


def _statistics_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    norm: Sequence[Tensor],
    norm_silu: bool,
    stats_groups: int,
    stats_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], stats_groups), dtype=torch.float32)
    return empty_result(x, weight, stride, padding, upsample), mean, torch.empty_like(mean)


# `norm` is empty or holds mean, rstd, weight and bias.
_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bias, int stride, int[] padding, bool upsample, Tensor? time_embedding,"
    " Tensor? residual, Tensor? skip, Tensor[] norm, bool norm_silu"
)
_MODULE = "sdfast.ops.conv2d_triton"
_KERNEL: dict[str, Any] = {"schema": f"({_OPERANDS}) -> Tensor", "fake": _kernel_fake}
_STATISTICS: dict[str, Any] = {
    "schema": f"({_OPERANDS}, int stats_groups, float stats_eps) -> (Tensor, Tensor mean, Tensor rstd)",
    "fake": _statistics_fake,
}
kernel_op = _library.define_triton("conv2d_kernel", _MODULE, **_KERNEL)
statistics_op = _library.define_triton("conv2d_statistics", _MODULE, **_STATISTICS)
# With `upsample` their weight is that of the four phases.
cuda_kernel_op = _library.define_cuda("conv2d_kernel", **_KERNEL)
cuda_statistics_op = _library.define_cuda("conv2d_statistics", **_STATISTICS)
