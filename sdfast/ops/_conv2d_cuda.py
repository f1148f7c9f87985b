"""conv2d by the CUDA C++ kernels: which calls they take, and how these become one launch."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import packing
from sdfast.ops._conv2d_call import Call
from sdfast.ops._conv2d_choice import folds
from sdfast.ops._conv2d_cpu import fold, values_of
from sdfast.ops._conv2d_operations import cuda_kernel_op, cuda_statistics_op
from sdfast.ops._triton import product_precision

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


def conv2d_cuda(call: Call, statistics: tuple[int, float] | None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y, or with the groups and eps of `statistics` y, mean and rstd."""
    norm, silu = call.norm, False
    pays = call.weight.shape[0] <= _MOST_NORMED_CHANNELS or call.weight.shape[2:] == (1, 1)
    operands: list[Tensor] = []
    if norm is not None and norm.statistics is not None and pays:
        operands, silu = [*norm.statistics, norm.weight, norm.bias], norm.silu
    else:
        call = call.normalised("cuda")
    x, weight, bias, stride, padding, upsample, time_embedding, residual, skip, _ = call
    if upsample and not folds(weight.shape[2:], stride, padding):
        # A norm of known statistics is the same, of each pixel of the larger image.
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        skip = None if skip is None else F.interpolate(skip, scale_factor=2.0, mode="nearest")
        upsample = False
    arguments = (
        x, _values(weight, upsample), bias, stride, list(padding), upsample, time_embedding, residual, skip,
        operands, silu,
    )  # fmt: skip
    if statistics is not None:
        return cast("tuple[Tensor, Tensor, Tensor]", cuda_statistics_op(*arguments, *statistics))
    return cast(Tensor, cuda_kernel_op(*arguments))
