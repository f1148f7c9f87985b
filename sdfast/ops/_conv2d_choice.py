"""conv2d on CPU: which algorithm serves a shape, by the times measured here, else by built-in rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _library, dispatch, packing, tuning
from sdfast.ops import _tiles

# The fp32 elements of a copy for each of the weight's; with an upsample, of four 2x2 kernels each.
_ELEMENTS = {
    False: {"winograd4x4": 36 / 9, "winograd2x2": 16 / 9},
    True: {"winograd4x4": 4 * 25 / 9, "winograd2x2": 4 * 9 / 9},
}
# From how many pixels on F(4x4) was measured faster than the direct kernel where it transforms the weight at
# each call, in bf16 than products of pairs, in all and of the 16 of a tile; from how many on a kept copy is
# worth its memory.
_WINOGRAD_PIXELS, _WINOGRAD_PIXELS_OF_PAIRS, _COPY_PIXELS = (64, 6), (128, 12), 1024
# The milliseconds that a copy saves a byte at each call where nothing was measured, about, in fp32: the time
# of one transform. It only makes rule and measured times comparable.
_SAVED_MS = 7e-8
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


def folds(kernel: Sequence[int], stride: int, padding: Sequence[int]) -> bool:
    """Whether such a convolution after a nearest-2x upsample equals four 2x2 ones, so that none is formed."""
    return tuple(kernel) == (3, 3) and stride == 1 and tuple(padding) == (1, 1, 1, 1)


def candidates(shape: Shape) -> list[str]:
    """What can compute such a convolution; numerics and memory may rule out some. "torch" is its own one."""
    has_winograd = shape.weight[2:] == (3, 3) and shape.stride == 1
    winograd = [*_ELEMENTS[False], "winograd4x4_unpacked"] if has_winograd else []
    split = ["split"] if shape.dtype == "float32" and _tiles.are_there() else []
    return ["direct", *winograd, *split, "torch"]


def needs_copy(algorithm: str) -> bool:
    """Whether it reads a transformed weight that is larger than the weight, and worth making only to keep."""
    return algorithm in _ELEMENTS[False]


def suits_torch(x: Tensor, weight: Tensor, upsample: bool) -> bool:
    """Where torch was measured faster: so few channels that gathering them is most of the work.

    For 3x3 kernels that is below 32, where Winograd begins, with a gradient too. An upsample
    is folded here, and fp16 is slow there.
    """
    gathered = tuple(weight.shape[2:]) == (3, 3) and not upsample and weight.dtype != torch.float16
    return min(weight.shape[:2]) < (32 if gathered else 16)


def has_few_outputs(weight: Tensor, upsample: bool) -> bool:
    """Whether the direct kernel is csrc/conv2d_few_channels_cpu.h's, which was measured to be faster."""
    out_channels, channels, _, width = weight.shape
    return not upsample and out_channels <= 8 and width * channels >= 32


def times_of(shape: Shape) -> tuning.Times | None:
    """What was measured here. Without the direct kernel, which numerics and memory always allow, nothing."""
    times = tuning.times_of(shape)
    return times if times is not None and "direct" in times else None


def algorithm_for(shape: Shape, weight: Tensor, or_torch: bool = True) -> tuple[str, float]:
    """The fastest that numerics and memory allow, and the ms that its copy of the weight saves a byte.

    By the times measured here, else by the built-in rule.
    """
    allowed = candidates(shape)
    if not or_torch:
        allowed.remove("torch")
    if dispatch.numerics() != "fast":
        allowed = [name for name in allowed if not name.startswith("winograd") and name != "split"]
    elif not packing.is_lasting(weight):
        allowed = [name for name in allowed if not needs_copy(name)]
    times = times_of(shape)
    if times is None:
        return _by_rule(allowed, shape, weight)
    return _by_times({name: ms for name, ms in times.items() if name in allowed}, shape, weight)


def _by_times(times: tuning.Times, shape: Shape, weight: Tensor) -> tuple[str, float]:
    """The first, as they come from the fastest, that needs no large copy or whose copy the budget holds."""
    without_copy = min(ms for name, ms in times.items() if not needs_copy(name))
    for name, ms in times.items():
        if not needs_copy(name):
            return name, math.inf
        kind, nbytes = _copy(name, shape)
        worth = (without_copy - ms) / nbytes
        if ms <= _LEAST_GAIN * without_copy and packing.affordable(weight, kind, nbytes, worth):
            return name, worth
    raise AssertionError("direct is always there and needs no copy")


def _by_rule(allowed: Sequence[str], shape: Shape, weight: Tensor) -> tuple[str, float]:
    """F(4x4) where it was measured faster on one machine, with a copy where its memory is well spent."""
    few = has_few_outputs(weight, shape.upsample)
    direct = "split" if "split" in allowed and not few else "direct"
    batch, _, height, width = shape.x
    scale = 2 if shape.upsample else 1
    height, width = scale * height, scale * width
    suits = suits_winograd(weight, batch, height, width) and "winograd4x4_unpacked" in allowed
    # Upsampled, four 2x2 convolutions in pairs of bf16 were measured as fast, split ones faster.
    if not suits or (shape.upsample and (direct == "split" or _multiplies_pairs(weight.dtype))):
        return direct, math.inf
    large = "winograd4x4" in allowed and batch * height * width >= _COPY_PIXELS
    if large and packing.affordable(weight, *_copy("winograd4x4", shape), _SAVED_MS):
        return "winograd4x4", _SAVED_MS
    return "winograd4x4_unpacked", math.inf


def suits_winograd(weight: Tensor, batch: int, height: int, width: int) -> bool:
    """Whether F(4x4) was measured faster for a y of this size, its transform of the weight included.

    Not where much of the tiles lies beside the image, as of one that is a pixel wide, and not in bf16 where
    AMX makes products too fast for it. Beside split fp32 it is as fast, and rounds less.
    """
    if weight.dtype is torch.bfloat16 and _tiles.are_there():
        return False
    least, full = _WINOGRAD_PIXELS_OF_PAIRS if _multiplies_pairs(weight.dtype) else _WINOGRAD_PIXELS
    pixels, tiles = batch * height * width, batch * math.ceil(height / 4) * math.ceil(width / 4)
    return pixels >= max(least, full * tiles) and min(weight.shape[:2]) >= 32


def _multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies values of this type in pairs, with which Winograd's fp32 competes."""
    return dtype is torch.bfloat16 and _library.has_kernel("bf16_pairs", "cpu")


def _copy(algorithm: str, shape: Shape) -> tuple[str, int]:
    """The kind and the bytes of the copy of the weight that Winograd keeps."""
    folded = shape.upsample and folds(shape.weight[2:], shape.stride, shape.padding)
    elements = _ELEMENTS[folded][algorithm] * math.prod(shape.weight)
    return kind_of(algorithm, folded), int(4 * elements)


def kind_of(algorithm: str, folded: bool) -> str:
    """What a copy for this algorithm is called; one of four 2x2 kernels is another."""
    return algorithm + ("_upsample" if folded else "")
