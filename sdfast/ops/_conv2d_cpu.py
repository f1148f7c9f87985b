"""conv2d on CPU: which compiled algorithm serves a shape, and its call on a packed copy of the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, packing, tuning
from sdfast.ops.group_norm import group_norm

# As csrc/conv2d_cpu.cpp counts them.
ALGORITHMS = ("direct", "winograd4x4", "winograd2x2")
# What can serve a call. "direct" materialises an upsampled input; "folded" is the direct kernel on four 2x2
# convolutions instead; "torch" is torch's own convolution and what surrounds it.
CANDIDATES = (*ALGORITHMS, "folded", "torch")


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


def _forward(
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
    """One of CANDIDATES; `algorithm` None takes the best, "compiled" the best but torch."""
    packing.note(weight)
    worth = math.inf
    if algorithm is None or algorithm == "compiled":
        added = (time_embedding is not None) + (residual is not None)
        shape = shape_of(x, weight, stride, padding, upsample, added)
        algorithm, worth = algorithm_for(shape, weight, or_torch=algorithm is None)
    if algorithm == "torch":
        more = {"upsample": upsample, "time_embedding": time_embedding, "residual": residual}
        y = torch.ops.sdfast.conv2d(x, weight, bias, stride, padding, **more)
        return cast(Tensor, y.contiguous(memory_format=torch.channels_last))
    if algorithm == "direct" and upsample:
        x, upsample = F.interpolate(x, scale_factor=2.0, mode="nearest"), False
    values = _values(weight, algorithm, worth)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return cast(
        Tensor,
        _kernel_op(
            x, values, bias, time_embedding, residual, _index(algorithm),
            weight.shape[0], weight.shape[2], weight.shape[3], stride, padding, upsample,
        ),
    )  # fmt: skip


def _index(algorithm: str) -> int:
    """Four folded convolutions are direct ones."""
    return ALGORITHMS.index("direct" if algorithm == "folded" else algorithm)


def _values(weight: Tensor, algorithm: str, worth: float) -> Tensor:
    """The weight as the algorithm reads it: in place where it lies as (out_channels, kh, kw, channels)."""
    if algorithm == "folded":
        return packing.packed(weight, algorithm, _fold, worth)
    if algorithm != "direct":
        index = _index(algorithm)
        return packing.packed(weight, algorithm, lambda values: _pack_op(values, index), worth)
    rows = weight.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows
    if not packing.is_lasting(weight) or not packing.affordable(weight, "rows", weight.nbytes, math.inf):
        return rows.contiguous()
    return packing.packed(weight, "rows", lambda values: values.permute(0, 2, 3, 1).contiguous())


def _fold(weight: Tensor) -> Tensor:
    """3x3 after nearest-2x as four 2x2 convolutions: (4, out_channels, 2, 2, channels).

    Each pixel is repeated, so kernel rows -1, 0, 1 meet pixels -1, 0, 0 at even outputs, 0, 0, 1 at odd ones.
    """
    w = weight.float().permute(0, 2, 3, 1)  # (O, 3, 3, C)

    def meet(w: Tensor, axis: int, parity: int) -> Tensor:
        first, middle, last = w.unbind(axis)
        return torch.stack((first + middle, last) if parity else (first, middle + last), axis)

    phases = [meet(meet(w, 1, row), 2, column) for row in (0, 1) for column in (0, 1)]
    return torch.stack(phases).to(weight.dtype)


_pack_op = _library.define_native("conv2d_pack(Tensor weight, int algorithm) -> Tensor", _pack_fake)
_kernel_op = _library.define_native(
    "conv2d_kernel(Tensor x, Tensor weight, Tensor? bias, Tensor? time_embedding, Tensor? residual,"
    " int algorithm, int out_channels, int kernel_height, int kernel_width, int stride, int[] padding,"
    " bool upsample) -> Tensor",
    _kernel_fake,
)
# What torch.compile sees: the copy of the weight is looked up when it runs.
_forward_op = _library.define_native(
    "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int stride, int[] padding, bool upsample,"
    " Tensor? time_embedding, Tensor? residual, str? algorithm) -> Tensor",
    _forward_fake,
    _forward,
)

# A copy in fp32 for Winograd, in multiples of the weight's elements.
_ELEMENTS = {"winograd4x4": 36 / 9, "winograd2x2": 16 / 9}
# From how many pixels that share the copy each was measured faster than what follows it.
_LEAST_PIXELS = {"winograd4x4": 2048, "winograd2x2": 64}
# What a copy for Winograd saves a byte, for each pixel that shares it: the median of the fp32 rows in
# benchmarks/results/cpu-2core-avx512_bf16/conv2d.json, for shapes that were not measured here.
_SAVED_MS = 2e-10
# A measured gain of less than this is as likely noise, and not worth the memory of a copy.
_LEAST_GAIN = 0.97


class Shape(NamedTuple):
    """All that the choice depends on but the machine. Equal to the plain tuple that a file gives back."""

    operation: str
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: tuple[int, ...]
    upsample: bool
    added: int  # how many tensors are added to the result: torch reads and writes it again for each


def shape_of(
    x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], upsample: bool, added: int
) -> Shape:
    """The shape of a call, see `Shape`."""
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = (tuple(x.shape), tuple(weight.shape))
    return Shape("conv2d", dtype, *sizes, stride, tuple(padding), upsample, added)


def candidates(shape: Shape) -> list[str]:
    """Those of CANDIDATES that compute such a convolution; numerics and memory may rule out some."""
    found = ["direct", "torch"]
    if shape.weight[2:] == (3, 3) and shape.stride == 1:
        found += _ELEMENTS
        if shape.upsample and shape.padding == (1, 1, 1, 1):
            found.append("folded")
    return found


def algorithm_for(shape: Shape, weight: Tensor, or_torch: bool = True) -> tuple[str, float]:
    """The fastest that numerics and memory allow, and the ms that its copy of the weight saves a byte.

    By the times measured here for this `shape_of` a call, else by the built-in rule.
    """
    allowed = candidates(shape)
    if not or_torch:
        allowed.remove("torch")
    if not packing.is_lasting(weight):
        allowed = [name for name in allowed if not _copy_bytes(weight, name)]
    if dispatch.numerics() != "fast":
        allowed = [name for name in allowed if name not in _ELEMENTS]
    times = tuning.times_of(shape)
    if times is not None and "direct" in times:
        return _by_times({name: ms for name, ms in times.items() if name in allowed}, weight)
    return _by_rule(allowed, shape, weight)


def _by_times(times: tuning.Times, weight: Tensor) -> tuple[str, float]:
    """The first, as they come from the fastest, that needs no copy or whose copy the budget holds."""
    without_copy = min(ms for name, ms in times.items() if not _copy_bytes(weight, name))
    for name, ms in times.items():
        nbytes = _copy_bytes(weight, name)
        if not nbytes:
            return name, math.inf
        worth = (without_copy - ms) / nbytes
        if ms <= _LEAST_GAIN * without_copy and packing.affordable(weight, name, nbytes, worth):
            return name, worth
    raise AssertionError("direct is always there and needs no copy")


def _by_rule(allowed: Sequence[str], shape: Shape, weight: Tensor) -> tuple[str, float]:
    """Winograd where it was measured faster on one machine and its memory is well spent; never torch."""
    pairs = shape.dtype == "bfloat16" and _library.has_kernel("bf16_pairs", "cpu")
    batch, _, height, width = shape.x
    pixels = batch * height * width * (4 if shape.upsample else 1)
    worth = _SAVED_MS * pixels
    # Upsampled, four 2x2 convolutions in pairs of bf16 were measured faster.
    faster = () if pairs and shape.upsample else ("winograd4x4",) if pairs else ("winograd4x4", "winograd2x2")
    for name in faster if min(weight.shape[:2]) >= 32 else ():
        enough = name in allowed and pixels >= _LEAST_PIXELS[name]
        if enough and packing.affordable(weight, name, _copy_bytes(weight, name), worth):
            return name, worth
    folded_bytes = _copy_bytes(weight, "folded")
    if "folded" in allowed and packing.affordable(weight, "folded", folded_bytes, math.inf):
        return "folded", math.inf
    return "direct", math.inf


def _copy_bytes(weight: Tensor, algorithm: str) -> int:
    """Of the copy of the weight that the algorithm keeps."""
    if algorithm == "folded":
        return weight.nbytes * 16 // 9
    return int(4 * _ELEMENTS.get(algorithm, 0) * weight.numel())


def conv2d_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_silu: bool = False,
    or_torch: bool = True,
) -> Tensor:
    """The compiled CPU kernels, for inference; `or_torch` where that was measured faster."""
    if norm_groups:
        activation = "silu" if norm_silu else None
        normed = group_norm(x, norm_groups, norm_weight, norm_bias, norm_eps, activation=activation)
        x = cast(Tensor, normed)
    run = _forward_op if torch.compiler.is_compiling() else _forward
    algorithm = None if or_torch else "compiled"
    return cast(
        Tensor, run(x, weight, bias, stride, list(padding), upsample, time_embedding, residual, algorithm)
    )
