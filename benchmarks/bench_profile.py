"""Where the time of one step goes, by operation: Stable Diffusion 1.5's U-Net and VAE decoder in sdfast.

    python benchmarks/bench_profile.py [--work unet vae] [--dtype float32 bfloat16] [--tiny]

torch.profiler over one call of a model that has run before, the U-Net's as inside a sampling loop
(`Work.loop_inputs`). Arithmetic is that of the direct algorithms, two
a multiplication: Winograd and the folded upsample need less, so that their rate is an effective one and may
exceed the peak. "other" is every operation below a percent, "outside" what the call took beyond operations.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from _models import TINY_WORKS, WORKS, Work
from _record import results_path, table, write_json
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sdfast.memory import keep_freed_memory
from sdfast.testing import peak_gflop_per_s

Shape = Sequence[int]


def _linear_flops(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _conv2d_flops(
    x: Shape, weight: Shape, bias: Shape | None, time_embedding: Shape | None, residual: Shape | None,
    algorithm: int, out_channels: int, kernel_height: int, kernel_width: int, *_: object,
    out_shape: Shape, **__: object,
) -> int:  # fmt: skip
    return 2 * math.prod(out_shape) * x[1] * kernel_height * kernel_width


def _attention_flops(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return 4 * math.prod(q) * k[-2]


FLOPS: dict[str, Callable[..., int]] = {
    "linear_rows": _linear_flops,
    "conv2d_kernel": _conv2d_flops,
    "attention_forward": _attention_flops,
}


def flops_by_operation(step: Callable[[], object]) -> dict[str, int]:
    """Of our kernels and of torch's, by the names that the profiler gives them."""
    counter = FlopCounterMode(
        display=False, custom_mapping={getattr(torch.ops.sdfast, name): f for name, f in FLOPS.items()}
    )
    with counter:
        step()
    counted = {str(op).replace(".", "::"): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    if "aten::convolution" in counted:
        counted["aten::mkldnn_convolution"] = counted.pop("aten::convolution")
    return counted


@torch.inference_mode()
def measure(work: Work, dtype: torch.dtype) -> dict[str, object]:
    """The row of the record: the call as a whole, then its operations by the time that each took itself."""
    theirs = work.make_theirs().to(dtype).to(memory_format=torch.channels_last)
    ours = work.make_ours(theirs)
    model, inputs = work.forward(ours), work.loop_inputs(ours, dtype)

    def step() -> object:
        return model(*inputs)

    flops = flops_by_operation(step)  # this first call packs the weights, too
    step()
    peak = peak_gflop_per_s(dtype)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        step()
        step_ms = 1e3 * (time.perf_counter() - began)
    events = {event.key: (event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()}
    shown = [name for name, (_, ms) in events.items() if ms >= 0.01 * step_ms]
    operations: list[dict[str, object]] = []
    for name in sorted(shown, key=lambda name: -events[name][1]):
        calls, ms = events[name]
        rates = {}
        if name in flops:
            gflop_per_s = flops[name] / ms / 1e6
            rates = {
                "gflop": flops[name] / 1e9, "gflop_per_s": gflop_per_s, "of_peak": gflop_per_s / peak
            }  # fmt: skip
        operations.append({"operation": name, "calls": calls, "ms": ms, "share": ms / step_ms, **rates})
    rest = [events[name] for name in events.keys() - set(shown)]
    other_ms = sum(ms for _, ms in rest)
    outside_ms = step_ms - sum(ms for _, ms in events.values())
    operations += [
        {"operation": "other", "calls": sum(n for n, _ in rest), "ms": other_ms, "share": other_ms / step_ms},
        {"operation": "outside", "calls": 0, "ms": outside_ms, "share": outside_ms / step_ms},
    ]
    return {
        "work": work.title, "dtype": str(dtype).removeprefix("torch."), "step_ms": step_ms,
        "gflop": sum(flops.values()) / 1e9, "gflop_per_s": sum(flops.values()) / step_ms / 1e6,
        "peak_gflop_per_s": peak, "operations": operations,
    }  # fmt: skip


def main() -> None:
    """Print a table a model, write results/<device>/profile.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--tiny", action="store_true", help="try it out on small models; writes nothing")
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for work in options.work:
        for dtype in options.dtype:
            row = measure((TINY_WORKS if options.tiny else WORKS)[work], getattr(torch, dtype))
            rows.append(row)
            print(f"{row['work']}, {dtype}: {row['step_ms']:.0f} ms, {row['gflop']:.0f} GFLOP")
            printed = [
                {**operation, "of_peak": f"{operation['of_peak']:.0%}" if "of_peak" in operation else ""}
                for operation in row["operations"]
            ]
            columns = {"operation": "", "calls": "", "ms": ".1f", "share": ".1%", "of_peak": ""}
            print(table(printed, columns), flush=True)
    if not options.tiny:
        write_json(results_path("profile"), rows)


if __name__ == "__main__":
    main()
