"""A step on the GPU, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_SHOWN = 30


class Span(NamedTuple):
    """One kernel, copy or fill; microseconds."""

    name: str
    start: float
    end: float


def kernels_of(step: Callable[[], object]) -> list[Span]:
    """What a call launches, in order."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(spans, key=lambda span: span.start)


def summary(spans: Iterable[Span]) -> dict[str, Any]:
    """Launches, time busy and idle between the first and the last, and kernels by their time."""
    by_name: dict[str, list[float]] = defaultdict(list)
    first, last, busy_us = float("inf"), float("-inf"), 0.0
    for name, start, end in sorted(spans, key=lambda span: span.start):
        by_name[name].append(end - start)
        first = min(first, start)
        busy_us += max(0.0, end - max(start, last))  # those that overlap count once
        last = max(last, end)
    if not by_name:
        return {"launches": 0, "span_ms": 0.0, "idle_share": 0.0, "kernels": []}
    total = sum(map(sum, by_name.values()))
    kernels = [
        {"kernel": name[:120], "calls": len(each), "ms": sum(each) / 1e3, "share": sum(each) / total}
        for name, each in by_name.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    shown, rest = kernels[:_SHOWN], kernels[_SHOWN:]
    if rest:
        calls, ms, share = (sum(kernel[key] for kernel in rest) for key in ("calls", "ms", "share"))
        shown.append({"kernel": f"{len(rest)} others", "calls": calls, "ms": ms, "share": share})
    return {
        "launches": sum(len(each) for each in by_name.values()),
        "span_ms": (last - first) / 1e3,
        "idle_share": 1 - busy_us / (last - first),
        "kernels": shown,
    }


def synchronisation(step: Callable[[], object]) -> str | None:
    """What makes the host wait for the GPU within a call, or None; every shape has been met before."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None
