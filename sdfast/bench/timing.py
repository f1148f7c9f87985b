"""Samples of times to the numbers that are recorded."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from sdfast.testing import spread, time_alternating

_T = TypeVar("_T")
CONFIDENCE = 0.95
_RESAMPLES = 2000


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long theirs took: the median over neighbours in time, and how sure it is.

    Args:
        theirs, ours: seconds of the calls that took turns, in order.

    Returns:
        ratio, the median of the pairs' ratios, their p20 and p80, and low and high, the 95% confidence
        interval of the median by bootstrap over the pairs: fixed seed, percentiles.
    """
    pairs = np.asarray(theirs, dtype=np.float64) / np.asarray(ours, dtype=np.float64)
    p20, median, p80 = spread(pairs.tolist())
    draws = np.random.default_rng(0).integers(0, len(pairs), (_RESAMPLES, len(pairs)))
    medians = np.median(pairs[draws], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return {"ratio": median, "low": float(low), "high": float(high), "p20": p20, "p80": p80}


def times(samples: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of seconds, in ms."""
    p20, median, p80 = spread(samples)
    return {"ms": 1e3 * median, "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80}


def settled(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call and the wait for its end, on a GPU."""
    if device == "cpu":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return run


def timed(call: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds of one call, and its result."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 200, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each, taking turns, while Python collects no garbage.

    Args:
        rounds: of each, at most.
        seconds: after this long no further round is started, once there are five.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return time_alternating(calls, rounds=rounds, warmup=1, limit_seconds=seconds)
    finally:
        if enabled:
            gc.enable()
