"""Stable Diffusion 1.5, one guided U-Net step and one VAE decode, beside diffusers in eager torch.

    python benchmarks/bench_models.py [--rounds 3] [--dtype float32 bfloat16]

Real sizes, random weights, the same on both sides. U-Net: 64x64 latent, batch 2 (guidance), a step inside a
sampling loop: ours has projected text and timestep before the loop, diffusers does so in each step, as each
is built (`Work.loop_inputs`). VAE: one latent to 512x512. Before anything is timed the result is checked: in
fp32 against diffusers', in bf16 by its distance from diffusers' fp32 result, at most 1.5 times that of
diffusers' own bf16. Eager runs in both memory formats, and the ratio is against the faster; all take turns in
one process, which keeps freed memory (`sdfast.memory.keep_freed_memory`): all are faster so.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from _models import WORKS, Work
from _record import results_path, table, write_json
from torch import Tensor, nn

from sdfast.memory import keep_freed_memory
from sdfast.testing import relative_error, spread, time_alternating

Run = Callable[[], Tensor]


def make_runs(work: Work, dtype: torch.dtype) -> dict[str, Run]:
    """Ours and theirs on the same weights, after the check of the result."""

    def run(model: nn.Module, dtype: torch.dtype) -> Run:
        forward, inputs = work.forward(model), work.loop_inputs(model, dtype)
        return lambda: forward(*inputs)

    theirs = work.make_theirs()
    expected = run(theirs, torch.float32)()
    contiguous = theirs.to(dtype)
    channels_last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    runs = {
        "eager": run(contiguous, dtype),
        "eager channels_last": run(channels_last, dtype),
        "sdfast": run(work.make_ours(channels_last), dtype),
    }
    error, eager_error = (
        relative_error(runs[name](), expected) for name in ("sdfast", "eager channels_last")
    )
    limit = 1e-4 if dtype == torch.float32 else 1.5 * eager_error
    if not error <= limit:
        raise AssertionError(f"{work.title}, {dtype}: error {error:.1e} exceeds {limit:.1e}")
    return runs


@torch.inference_mode()
def measure(work: Work, dtype: torch.dtype, rounds: int) -> dict:
    """Median milliseconds of each, and the median ratio of neighbours in time."""
    samples = time_alternating(make_runs(work, dtype), rounds=rounds, warmup=1)
    eager = min(("eager", "eager channels_last"), key=lambda name: spread(samples[name])[1])
    ratios = [e / s for e, s in zip(samples[eager], samples["sdfast"], strict=True)]
    return {
        "work": work.title,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "eager_layout": "channels_last" if "last" in eager else "contiguous",
        **{f"{name.replace(' ', '_')}_ms": 1e3 * spread(times)[1] for name, times in samples.items()},
        "best_eager_ms": 1e3 * spread(samples[eager])[1],
        "ratio": spread(ratios)[1],
        "ratio_p20": spread(ratios)[0],
        "ratio_p80": spread(ratios)[2],
    }


def main() -> None:
    """Print a table, write results/<device>/models.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each side (%(default)s)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for dtype in options.dtype:
        for work in WORKS.values():
            rows.append(measure(work, getattr(torch, dtype), options.rounds))
            columns = {"work": "", "dtype": "", "best_eager_ms": ".0f", "sdfast_ms": ".0f", "ratio": ".2f"}
            print(table(rows[-1:], columns), flush=True)
    write_json(results_path("models"), rows)


if __name__ == "__main__":
    main()
