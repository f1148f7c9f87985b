"""Timing of an operation beside eager torch, for the benchmarks of memory-bound operations."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from sdfast.testing import spread, time_alternating


def measure_beside_eager(
    eager: Callable[[], object],
    fast: Callable[[], object],
    *,
    like: torch.Tensor,
    passes: int,
    rounds: int,
    training: bool = False,
) -> dict[str, object]:
    """Both ways and a copy of `like` in turns.

    Args:
        eager, fast: the two ways; with `training` they take their gradients themselves.
        like: a tensor of the size that counts.
        passes: how often the operation reads or writes as many bytes, at the least.
        rounds: of a tensor of 64 MiB; smaller ones take more.
        training: whether gradients are recorded.

    Returns:
        Times in ms, the ratio eager / fast of neighbours in time, the bandwidth, and its share of a copy's.
    """
    source, size = like.detach(), like.numel() * like.element_size()
    target = torch.empty_like(source)
    functions = {"eager": eager, "sdfast": fast, "copy": lambda: target.copy_(source)}
    # Small settings take microseconds: more rounds cost nothing and a median of few says little.
    rounds = max(5, min(20 * rounds, rounds * 2**26 // size))
    gc.collect()
    gc.disable()
    with torch.set_grad_enabled(training):
        samples = time_alternating(functions, rounds=rounds, limit_seconds=2)
    gc.enable()
    eager_ms, fast_ms, copy_ms = ([1e3 * s for s in spread(samples[name])] for name in functions)
    ratio = spread([e / s for e, s in zip(samples["eager"], samples["sdfast"], strict=True)])
    gb_per_s = passes * size / fast_ms[1] / 1e6
    return {
        "rounds": len(samples["eager"]),
        "eager_ms": eager_ms[1],
        "sdfast_ms": fast_ms[1],
        "sdfast_p20_ms": fast_ms[0],
        "sdfast_p80_ms": fast_ms[2],
        "eager_p20_ms": eager_ms[0],
        "eager_p80_ms": eager_ms[2],
        "ratio": ratio[1],
        "ratio_p20": ratio[0],
        "ratio_p80": ratio[2],
        "gb_per_s": gb_per_s,
        "of_copy": gb_per_s / (2 * size / copy_ms[1] / 1e6),
    }
