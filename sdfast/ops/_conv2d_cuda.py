"""conv2d by the CUDA C++ kernels: which calls they take, and how these become one launch."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import packing
from sdfast.ops._conv2d_choice import folds
from sdfast.ops._conv2d_cpu import fold, values_of
from sdfast.ops._conv2d_operations import cuda_kernel_op, cuda_statistics_op
from sdfast.ops._triton import product_precision
from sdfast.ops.group_norm import group_norm

_LARGEST_KERNEL, _LARGEST_STRIDE = 3, 2
# A known norm is applied to the halo tiles of a 3x3 kernel where y has at most this many channels. Each block
# of them evaluates SiLU anew, beside products that take a fixed multiple of its time, while the pass it saves
# takes the less of the whole the more channels there are. Computed; nobody measured it.
_MOST_NORMED_CHANNELS = 320


def why_not_cuda(weight: Tensor, stride: int, trains: bool) -> str | None:
    """Why the kernels cannot take such a convolution, or None."""
    if trains:
        return "the CUDA kernels give no gradient; use torch, triton or reference"
    if max(weight.shape[2:]) > _LARGEST_KERNEL or stride > _LARGEST_STRIDE:
        return f"expected kernels of at most {_LARGEST_KERNEL}x{_LARGEST_KERNEL}, stride 1 or 2"
    if product_precision(weight.dtype, "conv") != "tf32":
        return (
            "x is float32, which it multiplies as tf32: torch.backends.cudnn.conv.fp32_precision forbids it"
        )
    return None


def _values(weight: Tensor, folded: bool) -> Tensor:
    """The weight in the operation's layout. While torch.compile traces no copy can be looked up."""
    if torch.compiler.is_compiling():
        return fold(weight).to(weight.dtype) if folded else weight
    packing.note(weight)
    values = values_of(weight, "direct", folded)
    return values if folded else values.permute(0, 3, 1, 2)


def conv2d_cuda(
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
    norm: list[Tensor] = []
    pays = weight.shape[0] <= _MOST_NORMED_CHANNELS or weight.shape[2:] == (1, 1)
    if norm_groups and norm_statistics is not None and pays:
        norm = [*norm_statistics, cast(Tensor, norm_weight), cast(Tensor, norm_bias)]
    elif norm_groups:
        x = group_norm(
            x, norm_groups, norm_weight, norm_bias, norm_eps, activation="silu" if norm_silu else None,
            skip=skip, statistics=norm_statistics if skip is None else None, backend="cuda",
        )  # fmt: skip
        skip = None
    if upsample and not folds(weight.shape[2:], stride, padding):
        # A norm of known statistics is the same, of each pixel of the larger image.
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        skip = None if skip is None else F.interpolate(skip, scale_factor=2.0, mode="nearest")
        upsample = False
    operands = (
        x, _values(weight, upsample), bias, stride, list(padding), upsample, time_embedding, residual, skip,
        norm, norm_silu,
    )  # fmt: skip
    if stats_groups:
        return cast("tuple[Tensor, Tensor, Tensor]", cuda_statistics_op(*operands, stats_groups, stats_eps))
    return cast(Tensor, cuda_kernel_op(*operands))
