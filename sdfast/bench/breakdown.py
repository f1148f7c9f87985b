"""Where the time of one step goes, by operation: torch.profiler over one call of a model that has run before.

Arithmetic is that of the direct algorithms, two a multiplication: Winograd and the folded upsample need less,
so that their rate is an effective one and may exceed the peak. "other" is every operation below a percent,
"outside" what the call took beyond operations.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sdfast.flops  # FlopCounterMode counts our kernels by it  # noqa: F401
from sdfast.bench.breakdown_kinds import kind
from sdfast.bench.machine import peak
from sdfast.bench.plan import Planned
from sdfast.bench.record import Row
from sdfast.bench.request import Request, missing
from sdfast.bench.works import SIZES, Work

Step = Callable[[], object]


def flops_by_operation(step: Step) -> dict[str, int]:
    """Of our kernels and of torch's, by the names that the profiler gives them."""
    with FlopCounterMode(display=False) as counter:
        step()
    counted = {str(op).replace(".", "::"): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    if "aten::convolution" in counted:
        counted["aten::mkldnn_convolution"] = counted.pop("aten::convolution")
    return counted


def operations(step: Step, flops: dict[str, int], peak_gflop_per_s: float) -> dict[str, Any]:
    """One call: its milliseconds, and its operations by the time that each took itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        step()
        step_ms = 1e3 * (time.perf_counter() - began)
    events = {event.key: (event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()}
    shown = [name for name, (_, ms) in events.items() if ms >= 0.01 * step_ms]
    found: list[dict[str, Any]] = []
    for name in sorted(shown, key=lambda name: -events[name][1]):
        calls, ms = events[name]
        rates = {}
        if name in flops:
            gflop_per_s = flops[name] / ms / 1e6
            rates = {
                "gflop": flops[name] / 1e9, "gflop_per_s": gflop_per_s,
                "of_peak": gflop_per_s / peak_gflop_per_s,
            }  # fmt: skip
        found.append(
            {"operation": name, "kind": kind(name), "calls": calls, "ms": ms, "share": ms / step_ms, **rates}
        )
    rest = [events[name] for name in events.keys() - set(shown)]
    for name, calls, ms in (
        ("other", sum(n for n, _ in rest), sum(ms for _, ms in rest)),
        ("outside", 0, step_ms - sum(ms for _, ms in events.values())),
    ):
        found.append({"operation": name, "kind": kind(name), "calls": calls, "ms": ms, "share": ms / step_ms})
    return {"step_ms": step_ms, "operations": found}


@torch.inference_mode()
def measure(work: Work, dtype: torch.dtype) -> Row:
    """The breakdown of our step and, as `eager`, of diffusers'; GFLOP/s count ours."""
    theirs = work.make_theirs().to(dtype).to(memory_format=torch.channels_last)
    ours = work.make_ours(theirs)
    peak_gflop_per_s = peak(dtype, "cpu")
    sides: dict[str, dict[str, Any]] = {}
    for name, model in (("eager", theirs), ("sdfast", ours)):
        forward, inputs = work.forward(model), work.loop_inputs(model, dtype)

        def step(forward: Callable[..., object] = forward, inputs: Sequence[object] = inputs) -> object:
            return forward(*inputs)

        flops = flops_by_operation(step)  # this first call packs the weights, too
        step()
        sides[name] = operations(step, flops, peak_gflop_per_s)
    gflop = sum(flops.values()) / 1e9
    return {
        **sides["sdfast"], "eager": sides["eager"], "gflop": gflop,
        "gflop_per_s": 1e3 * gflop / sides["sdfast"]["step_ms"], "peak_gflop_per_s": peak_gflop_per_s,
    }  # fmt: skip


def planned(request: Request, size: str | None = None) -> Iterator[Planned]:
    """The breakdown of each model and dtype: on a CPU, whose profiler sees single operators."""
    if request.device != "cpu" or missing(("diffusers",)):
        return
    for model in SIZES[size or ("quick" if request.quick else "full")].values():
        for dtype in request.dtypes:
            row = {"name": model.title, "dtype": dtype}
            yield Planned(row, functools.partial(measure, model, getattr(torch, dtype)))
