"""Times what can serve a convolution on CPU, for `sdfast.tune`.

Channels last, on random values; a copy of the weight is made before. What computes something else than the
direct kernel, by more than its rounding explains, is left out, with a warning.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from sdfast import dispatch, tuning
from sdfast.ops._conv2d_choice import Shape, candidates
from sdfast.ops._conv2d_cpu import forward, output_size
from sdfast.testing import time_alternating

# What `use_numerics("fast")` allows a layer; a result in fewer bits is off by its own rounding.
_LARGEST_ERROR = 5e-5
_ROUNDS = 9


def measure(shape: tuning.Shape, seconds: float) -> tuning.Times:
    """Milliseconds of each candidate for a `shape_of` a call, in the median."""
    shape = Shape(*cast(Any, shape))
    _, dtype_name, x_shape, weight_shape, stride, padding, upsample, added = shape
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator("cpu").manual_seed(0)  # torch's own one belongs to the user

    def random(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device="cpu").to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    def candidate(name: str) -> Callable[[], Tensor]:
        return lambda: forward(x, weight, bias, stride, padding, upsample, *extras, name)

    # Copies are kept while they are timed, and nobody else's make room for them.
    with torch.no_grad(), dispatch.use_memory("high"):
        x, weight, bias = random(*x_shape), random(*weight_shape), random(weight_shape[0])
        weight /= (weight[0].numel()) ** 0.5  # results of the inputs' size
        size = output_size(x, (weight_shape[2], weight_shape[3]), stride, padding, upsample)
        channels = (x_shape[0], weight_shape[0])
        extras = (random(*channels) if added == 2 else None, random(*channels, *size) if added else None)
        calls = {name: candidate(name) for name in candidates(shape)}
        expected = calls["direct"]()
        right = {name: call for name, call in calls.items() if _is_right(call(), expected, name, shape)}
        del expected
        samples = time_alternating(right, rounds=_ROUNDS, warmup=1, limit_seconds=seconds)
    return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def _is_right(actual: Tensor, expected: Tensor, name: str, shape: tuning.Shape) -> bool:
    allowed = max(_LARGEST_ERROR, torch.finfo(actual.dtype).eps)
    norm = torch.linalg.vector_norm
    error = float(norm(actual.float() - expected.float()) / norm(expected.float()))
    if error <= allowed:
        return True
    warnings.warn(f"{name} is not used for {shape}: off by {error:.1e}, allowed {allowed:.1e}; please report")
    return False
