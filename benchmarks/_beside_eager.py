"""Timing of an operation beside eager torch: of memory-bound ones with a copy, of products with the peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch

from sdfast.testing import peak_gflop_per_s, spread, time_alternating


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


def measure_products(
    functions: Mapping[str, Callable[[], object]], *, flops: int, dtype: torch.dtype, rounds: int
) -> dict[str, object]:
    """ "eager", "sdfast" and whatever else in turns, beside what the multipliers reach in this moment.

    Args:
        functions: the ways, by name.
        flops: of the direct algorithm, two a multiplication: a faster algorithm may exceed the peak.
        dtype: whose peak counts.
        rounds: of 8 GFLOP; smaller settings take more.

    Returns:
        Times in ms, the ratio eager / sdfast of neighbours in time, the rate, and its share of the peak.
    """
    peak = peak_gflop_per_s(dtype)
    rounds = max(5, min(20 * rounds, rounds * 2**33 // flops))
    gc.collect()
    gc.disable()
    with torch.no_grad():
        samples = time_alternating(functions, rounds=rounds, limit_seconds=3)
    gc.enable()
    medians = {name: 1e3 * spread(times)[1] for name, times in samples.items()}
    ratio = spread([e / s for e, s in zip(samples["eager"], samples["sdfast"], strict=True)])
    gflop_per_s = flops / medians["sdfast"] / 1e6
    return {
        "rounds": len(samples["eager"]),
        **{f"{name}_ms": median for name, median in medians.items()},
        "sdfast_p20_ms": 1e3 * spread(samples["sdfast"])[0],
        "sdfast_p80_ms": 1e3 * spread(samples["sdfast"])[2],
        "ratio": ratio[1],
        "ratio_p20": ratio[0],
        "ratio_p80": ratio[2],
        "eager_gflop_per_s": flops / medians["eager"] / 1e6,
        "gflop_per_s": gflop_per_s,
        "peak_gflop_per_s": peak,
        "of_peak": gflop_per_s / peak,
    }


PRODUCT_COLUMNS = {
    "dtype": "", "eager_ms": ".3f", "sdfast_ms": ".3f", "ratio": ".2f", "ratio_p20": ".2f",
    "eager_gflop_per_s": ".0f", "gflop_per_s": ".0f", "of_peak": ".0%",
}  # fmt: skip
