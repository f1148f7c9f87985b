"""What a training step takes of memory and time: sdfast beside eager torch and torch.compile.

    python benchmarks/bench_training_memory.py [--sides eager compile sdfast] [--rounds 3] [--tiny]

Forward and backward of SD 1.5's U-Net, batch 2 of 256x256 images, fp32, random weights, no optimiser. Each
side has a process of its own, one after the other: memory is the peak of a step above what is resident once
the weights are there, gradients included; the time is the median of steps after the first, of which
`first_seconds` tells. Gradients of all parameters are compared with eager's: ours have to agree, of another
engine that does not `wrong` says of how many. `sdfast bench training` times the sides in turns.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import torch
from _own_process import PeakMemory, in_own_process
from _record import results_path, write_json
from torch import Tensor

from sdfast.bench.training import LARGEST_FP32_ERROR, errors
from sdfast.bench.works import TINY_WORKS, WORKS

SIDES = ("eager", "compile", "sdfast")


def run(side: str, rounds: int, threads: int, tiny: bool, path: str) -> dict[str, Any]:
    """A side's row without its error; writes its gradients."""
    torch.set_num_threads(threads)
    work = (TINY_WORKS if tiny else WORKS)["unet"]
    theirs = work.make_theirs().to(memory_format=torch.channels_last)
    model: Any = work.make_ours(theirs) if side == "sdfast" else theirs
    model.requires_grad_(True)
    names = sorted(name for name, _ in model.named_parameters())
    called = torch.compile(model) if side == "compile" else model
    n, channels, height, width = work.shapes[0]
    size = (n, channels, height // 2, width // 2)
    draw = torch.Generator().manual_seed(1)
    sample, text, noise = (torch.randn(shape, generator=draw) for shape in (size, work.shapes[2], size))
    sample = sample.to(memory_format=torch.channels_last)
    memory, samples = PeakMemory(), []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        model.zero_grad(set_to_none=True)
        y = called(sample, torch.tensor(500), text)
        torch.nn.functional.mse_loss(y if isinstance(y, Tensor) else y.sample, noise).backward()
        samples.append(time.perf_counter() - began)
    peak_bytes = memory.above()
    parameters = dict(model.named_parameters())
    torch.save([parameters[name].grad.contiguous() for name in names], path)
    return {
        "side": side, "first_seconds": samples[0], "seconds": statistics.median(samples[1:]),
        "peak_bytes": peak_bytes, "weight_bytes": sum(each.nbytes for each in parameters.values()),
    }  # fmt: skip


def main() -> None:
    """Print every side, write results/<device>/training_memory.json where all were measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="(all)")
    parser.add_argument("--rounds", type=int, default=3, help="after the first (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="try it out on a small model; writes nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        expected: list[Tensor] | None = None
        for side in options.sides:
            path = pathlib.Path(name) / f"{side}.pt"
            row = in_own_process(side, run, side, options.rounds, options.threads, options.tiny, str(path))
            gradients = torch.load(path)
            expected = gradients if expected is None else expected
            off = errors(gradients, expected)
            row["error"], row["gradients"] = max(off), len(off)
            row["wrong"] = wrong = sum(error > LARGEST_FP32_ERROR for error in off)
            if wrong and side == "sdfast":
                raise AssertionError(f"{side}: a gradient's error is {row['error']:.1e}")
            rows.append(row)
            print(
                f"{side}: {row['seconds']:.2f} s ({row['first_seconds']:.1f} s the first),"
                f" {row['peak_bytes'] / 1e9:.2f} GB above the weights, error {row['error']:.1e}"
                f" ({wrong} of {len(off)} gradients are wrong)",
                flush=True,
            )
    if not options.tiny and tuple(options.sides) == SIDES:
        torch.set_num_threads(options.threads)  # what the record says
        write_json(results_path("training_memory"), rows)


if __name__ == "__main__":
    main()
