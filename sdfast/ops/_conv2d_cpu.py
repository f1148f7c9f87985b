"""conv2d on CPU for inference: the call of an algorithm on the weight or a packed copy of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, packing
from sdfast.ops import _tiles
from sdfast.ops._conv2d_choice import algorithm_for, folds, has_few_outputs, kind_of, needs_copy, shape_of

# As csrc/conv2d_cpu.cpp counts them.
ALGORITHMS = ("direct", "winograd4x4", "winograd2x2", "winograd4x4_unpacked", "split")


def _pack_fake(weight: Tensor, algorithm: int) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU; call sdfast::conv2d_forward")


def output_size(
    x: Tensor, weight_size: tuple[int, int], stride: int, padding: Sequence[int], upsample: bool
) -> tuple[int, int]:
    """Height and width of y, for a weight of (kh, kw) and padding (left, right, top, bottom)."""
    scale = 2 if upsample else 1
    left, right, top, bottom = padding
    return (
        (x.shape[2] * scale + top + bottom - weight_size[0]) // stride + 1,
        (x.shape[3] * scale + left + right - weight_size[1]) // stride + 1,
    )


def _kernel_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: int,
    out_channels: int,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
) -> Tensor:
    size = output_size(x, (kernel_height, kernel_width), stride, padding, upsample)
    y = x.new_empty((x.shape[0], out_channels, *size))
    return y.to(memory_format=torch.channels_last)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: str | None,
) -> Tensor:
    more = (0, *weight.shape[:1], *weight.shape[2:], stride, padding, upsample)
    return _kernel_fake(x, weight, bias, time_embedding, residual, *more)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: str | None,
) -> Tensor:
    """One of `candidates`; `algorithm` None takes the best, "compiled" the best but torch."""
    worth = math.inf
    if algorithm is None or algorithm == "compiled":
        added = (time_embedding is not None) + (residual is not None)
        shape = shape_of(x, weight, stride, padding, upsample, added)
        algorithm, worth = algorithm_for(shape, weight, or_torch=algorithm is None)
    if algorithm == "torch":
        more = {"upsample": upsample, "time_embedding": time_embedding, "residual": residual}
        y = torch.ops.sdfast.conv2d(x, weight, bias, stride, padding, **more)
        return cast(Tensor, y.contiguous(memory_format=torch.channels_last))
    if upsample and (algorithm == "winograd4x4_unpacked" or not folds(weight.shape[2:], stride, padding)):
        x, upsample = upsampled(x), False
    # The direct ones of fp32 and of few channels are not on tiles.
    on_tiles = algorithm == ("split" if weight.dtype is torch.float32 else "direct")
    values = _on_tiles(weight, upsample) if on_tiles and not has_few_outputs(weight, upsample) else None
    packing.note(weight)
    if values is None:
        values = values_of(weight, algorithm, upsample, worth)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return cast(
        Tensor,
        kernel_op(
            x, values, bias, time_embedding, residual, ALGORITHMS.index(algorithm),
            weight.shape[0], weight.shape[2], weight.shape[3], stride, padding, upsample,
        ),
    )  # fmt: skip


def _on_tiles(weight: Tensor, folded: bool) -> Tensor | None:
    """The copy that AMX tiles read, where it is to be kept."""
    if folded:
        return _tiles.kept(weight, "tiles_folded", lambda w: fold(w).to(w.dtype), taps=16)
    taps = math.prod(weight.shape[2:])
    return _tiles.kept(weight, "tiles", lambda w: w.permute(0, 2, 3, 1)[None], taps=taps)


def values_of(weight: Tensor, algorithm: str, folded: bool, worth: float = math.inf) -> Tensor:
    """The weight as the algorithm reads it: in place where it lies as (out_channels, kh, kw, channels)."""
    if needs_copy(algorithm):
        kind = kind_of(algorithm, folded)
        return packing.packed(weight, kind, lambda values: _pack(values, algorithm, folded), worth)
    if folded:
        return _kept(weight, "folded", weight.nbytes * 16 // 9, lambda w: fold(w).to(w.dtype))
    rows = weight.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows
    return _kept(weight, "rows", weight.nbytes, lambda w: w.permute(0, 2, 3, 1).contiguous())


def _kept(weight: Tensor, kind: str, nbytes: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy that is quickly made: kept where there is room for it, else made for this call."""
    if packing.is_lasting(weight) and packing.affordable(weight, kind, nbytes, math.inf):
        return packing.packed(weight, kind, make)
    return make(weight)


def upsampled(x: Tensor) -> Tensor:
    """The nearest-2x image, channels_last, where it is not folded into the convolution."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2.0, mode="nearest").contiguous(memory_format=torch.channels_last)


def fold(weight: Tensor) -> Tensor:
    """3x3 after nearest-2x as four 2x2 convolutions: (4, out_channels, 2, 2, channels).

    Each pixel is repeated, so kernel rows -1, 0, 1 meet pixels -1, 0, 0 at even outputs, 0, 0, 1 at odd ones.
    """
    w = weight.float().permute(0, 2, 3, 1)  # (O, 3, 3, C)

    def meet(w: Tensor, axis: int, parity: int) -> Tensor:
        first, middle, last = w.unbind(axis)
        return torch.stack((first + middle, last) if parity else (first, middle + last), axis)

    phases = [meet(meet(w, 1, row), 2, column) for row in (0, 1) for column in (0, 1)]
    return torch.stack(phases)


def _pack(weight: Tensor, algorithm: str, folded: bool) -> Tensor:
    """The transformed weight, fp32."""
    kernels = fold(weight) if folded else weight.float().permute(0, 2, 3, 1)[None]
    return cast(Tensor, _pack_op(kernels, ALGORITHMS.index(algorithm)))


_pack_op = _library.define_native("conv2d_pack(Tensor weight, int algorithm) -> Tensor", _pack_fake)
kernel_op = _library.define_native(
    "conv2d_kernel(Tensor x, Tensor weight, Tensor? bias, Tensor? time_embedding, Tensor? residual,"
    " int algorithm, int out_channels, int kernel_height, int kernel_width, int stride, int[] padding,"
    " bool upsample) -> Tensor",
    _kernel_fake,
)
# What torch.compile sees: the copy of the weight is looked up when it runs.
forward_op = _library.define_native(
    "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int stride, int[] padding, bool upsample,"
    " Tensor? time_embedding, Tensor? residual, str? algorithm) -> Tensor",
    _forward_fake,
    forward,
)
