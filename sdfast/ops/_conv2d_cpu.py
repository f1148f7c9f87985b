"""conv2d on CPU: which compiled algorithm serves a shape, and its call on a packed copy of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, packing

# As csrc/conv2d_cpu.cpp counts them.
ALGORITHMS = ("direct", "winograd4x4", "winograd2x2")


def _pack_fake(weight: Tensor, algorithm: int) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU; call sdfast::conv2d_forward")


def output_size(
    x: Tensor, weight_size: tuple[int, int], stride: int, padding: Sequence[int], upsample: bool
) -> tuple[int, int]:
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
    """The compiled kernel; `algorithm` None takes the best."""
    algorithm = algorithm or algorithm_for(x, weight, stride, upsample)
    packing.note(weight)
    if upsample and not (weight.shape[2:] == (3, 3) and stride == 1 and list(padding) == [1] * 4):
        x, upsample = F.interpolate(x, scale_factor=2.0, mode="nearest"), False
    values = _values(
        weight, algorithm, upsample, worth=x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    )
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


def _values(weight: Tensor, algorithm: str, upsample: bool, worth: float) -> Tensor:
    """The weight as the algorithm reads it: in place where it lies as (out_channels, kh, kw, channels)."""
    if algorithm != "direct":
        kind = _kind(algorithm, upsample)
        return packing.packed(weight, kind, lambda values: _pack(values, algorithm, upsample), worth)
    if upsample:
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


def _kind(algorithm: str, upsample: bool) -> str:
    return algorithm + ("_upsample" if upsample else "")


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


def _pack(weight: Tensor, algorithm: str, upsample: bool) -> Tensor:
    """The transformed weight, fp32."""
    kernels = fold(weight) if upsample else weight.float().permute(0, 2, 3, 1)[None]
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

# The elements of a copy for each of the weight's; with an upsample, of four 2x2 kernels each.
_ELEMENTS = {
    False: {"winograd4x4": 36 / 9, "winograd2x2": 16 / 9},
    True: {"winograd4x4": 4 * 25 / 9, "winograd2x2": 4 * 9 / 9},
}
# From how many pixels on, of those that share a copy, each was measured faster than what follows it.
_LEAST_PIXELS = {"winograd4x4": 256, "winograd2x2": 64}
# F(2x2) needs less than half of the memory of F(4x4) and saves three quarters of what that does: below these
# many pixels the budget is better spent on it.
_THRIFTY_PIXELS = 2048


def algorithm_for(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> str:
    """Winograd where it was measured faster, its error is allowed and its memory well spent."""
    channels_out, channels_in, *kernel = weight.shape
    suits = kernel == [3, 3] and stride == 1 and min(channels_in, channels_out) >= 32
    if not suits or dispatch.numerics() != "fast" or not packing.is_lasting(weight):
        return "direct"
    pairs = x.dtype == torch.bfloat16 and _library.has_kernel("bf16_pairs", "cpu")
    if upsample and pairs:
        return "direct"  # four 2x2 convolutions in pairs of bf16 were measured as fast
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    candidates = ["winograd4x4"] if pairs else ["winograd4x4", "winograd2x2"]
    if not pairs and pixels < _THRIFTY_PIXELS and dispatch.memory() == "default":
        candidates.remove("winograd4x4")
    for algorithm in candidates:
        kind, nbytes = _kind(algorithm, upsample), int(4 * _ELEMENTS[upsample][algorithm] * weight.numel())
        # What is saved grows with the pixels that share the copy.
        enough = pixels >= _LEAST_PIXELS[algorithm]
        if enough and packing.affordable(weight, kind, nbytes, worth=pixels):
            return algorithm
    return "direct"


def suits_torch(x: Tensor, weight: Tensor, upsample: bool) -> bool:
    """Where torch was measured faster: so few channels that gathering them is most of the work."""
    return min(weight.shape[:2]) < 16
