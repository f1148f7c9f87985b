"""conv2d on CPU: which algorithm serves a shape, by the times measured here, else by built-in rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _library, dispatch, packing, tuning

# The fp32 elements of a copy for each of the weight's; with an upsample, of four 2x2 kernels each.
_ELEMENTS = {
    False: {"winograd4x4": 36 / 9, "winograd2x2": 16 / 9},
    True: {"winograd4x4": 4 * 25 / 9, "winograd2x2": 4 * 9 / 9},
}
# From how many pixels on, of those that share a copy, each was measured faster than what follows it.
_LEAST_PIXELS = {"winograd4x4": 256, "winograd2x2": 64}
# F(2x2) needs less than half of the memory of F(4x4) and saves three quarters of what that does: below these
# many pixels the budget is better spent on it.
_THRIFTY_PIXELS = 2048
# The milliseconds that a copy saves a byte, for each pixel that shares it, where nothing was measured: about
# the median of F(4x4) in fp32, from 2048 pixels on and without an upsample, in
# benchmarks/results/cpu-2core-avx512_bf16-amd26/conv2d.json. It only makes rule and measured times
# comparable.
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


def folds(kernel: Sequence[int], stride: int, padding: Sequence[int]) -> bool:
    """Whether such a convolution after a nearest-2x upsample equals four 2x2 ones, so that none is formed."""
    return tuple(kernel) == (3, 3) and stride == 1 and tuple(padding) == (1, 1, 1, 1)


def candidates(shape: Shape) -> list[str]:
    """What can compute such a convolution; numerics and memory may rule out some. "torch" is its own one."""
    has_winograd = shape.weight[2:] == (3, 3) and shape.stride == 1
    return ["direct", *(_ELEMENTS[False] if has_winograd else ()), "torch"]


def suits_torch(x: Tensor, weight: Tensor, upsample: bool) -> bool:
    """Where torch was measured faster: so few channels that gathering them is most of the work.

    For 3x3 kernels that is below 32, where Winograd begins, with a gradient too. An upsample
    is folded here, and fp16 is slow there.
    """
    gathered = tuple(weight.shape[2:]) == (3, 3) and not upsample and weight.dtype != torch.float16
    return min(weight.shape[:2]) < (32 if gathered else 16)


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
    if dispatch.numerics() != "fast" or not packing.is_lasting(weight):
        allowed = [name for name in allowed if name not in _LEAST_PIXELS]
    times = times_of(shape)
    if times is None:
        return _by_rule(allowed, shape, weight)
    return _by_times({name: ms for name, ms in times.items() if name in allowed}, shape, weight)


def _by_times(times: tuning.Times, shape: Shape, weight: Tensor) -> tuple[str, float]:
    """The first, as they come from the fastest, that needs no large copy or whose copy the budget holds."""
    without_copy = min(ms for name, ms in times.items() if name not in _LEAST_PIXELS)
    for name, ms in times.items():
        if name not in _LEAST_PIXELS:
            return name, math.inf
        kind, nbytes = _copy(name, shape)
        worth = (without_copy - ms) / nbytes
        if ms <= _LEAST_GAIN * without_copy and packing.affordable(weight, kind, nbytes, worth):
            return name, worth
    raise AssertionError("direct is always there and needs no copy")


def _by_rule(allowed: Sequence[str], shape: Shape, weight: Tensor) -> tuple[str, float]:
    """Winograd where it was measured faster on one machine and its memory is well spent; never torch."""
    pairs = shape.dtype == "bfloat16" and _library.has_kernel("bf16_pairs", "cpu")
    batch, _, height, width = shape.x
    pixels = batch * height * width * (4 if shape.upsample else 1)
    worth = _SAVED_MS * pixels
    faster = ["winograd4x4"] if pairs else ["winograd4x4", "winograd2x2"]
    # Upsampled, four 2x2 convolutions in pairs of bf16 were measured as fast.
    if min(shape.weight[:2]) < 32 or (pairs and shape.upsample):
        faster = []
    elif not pairs and pixels < _THRIFTY_PIXELS and dispatch.memory() == "default":
        faster.remove("winograd4x4")
    for name in faster:
        enough = name in allowed and pixels >= _LEAST_PIXELS[name]
        if enough and packing.affordable(weight, *_copy(name, shape), worth):
            return name, worth
    return "direct", math.inf


def _copy(algorithm: str, shape: Shape) -> tuple[str, int]:
    """The kind and the bytes of the copy of the weight that Winograd keeps."""
    folded = shape.upsample and folds(shape.weight[2:], shape.stride, shape.padding)
    elements = _ELEMENTS[folded][algorithm] * math.prod(shape.weight)
    return kind_of(algorithm, folded), int(4 * elements)


def kind_of(algorithm: str, folded: bool) -> str:
    """What a copy for this algorithm is called; one of four 2x2 kernels is another."""
    return algorithm + ("_upsample" if folded else "")
