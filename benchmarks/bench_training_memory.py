"""What a training step takes of memory and time: sdfast beside eager torch and torch.compile.

    python benchmarks/bench_training_memory.py [--sides eager compile sdfast] [--rounds 3] [--tiny]

Forward and backward of SD 1.5's U-Net, batch 2 of 256x256 images, fp32, random weights, no optimiser. Each
side has a process of its own, one after the other: memory is the peak of a step above what is resident once
the weights are there, gradients included; the time is the median of steps after the first, of which
`first_seconds` tells. Gradients of all parameters are checked against eager's. `sdfast bench training` times
the sides in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import pathlib
import re
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from _record import error_text, results_path, write_json
from torch import Tensor

from sdfast.bench.training import LARGEST_FP32_ERROR, largest_error
from sdfast.bench.works import TINY_WORKS, WORKS

SIDES = ("eager", "compile", "sdfast")
_CONTEXT = multiprocessing.get_context("spawn")


def _resident(name: str) -> int:
    """VmRSS or VmHWM, bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def serve(connection: Connection, side: str, rounds: int, threads: int, tiny: bool, path: str) -> None:
    """The main function of a side's process: steps, saves gradients, answers with seconds and memory."""
    torch.set_num_threads(threads)
    try:
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

        def step() -> None:
            model.zero_grad(set_to_none=True)
            y = called(sample, torch.tensor(500), text)
            torch.nn.functional.mse_loss(y if isinstance(y, Tensor) else y.sample, noise).backward()

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before, samples = _resident("VmRSS"), []
        for _ in range(1 + rounds):
            began = time.perf_counter()
            step()
            samples.append(time.perf_counter() - began)
        peak = _resident("VmHWM") - before
        parameters = dict(model.named_parameters())
        torch.save([parameters[name].grad.contiguous() for name in names], path)
        weights = sum(parameter.nbytes for parameter in parameters.values())
        connection.send(
            {
                "side": side, "first_seconds": samples[0], "seconds": statistics.median(samples[1:]),
                "peak_bytes": peak, "weight_bytes": weights,
            }
        )  # fmt: skip
    except Exception as error:
        connection.send(error_text(error))


def measure(side: str, options: argparse.Namespace, path: pathlib.Path) -> dict[str, Any]:
    ours, theirs = _CONTEXT.Pipe()
    arguments = (theirs, side, options.rounds, options.threads, options.tiny, str(path))
    process = _CONTEXT.Process(target=serve, args=arguments)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:  # the kernel ended it, most likely for its memory
        answer = "it died"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{side}: {answer}")
    return answer


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
            row = measure(side, options, path)
            gradients = torch.load(path)
            expected = gradients if expected is None else expected
            row["error"] = largest_error(gradients, expected)
            if not row["error"] <= LARGEST_FP32_ERROR or math.isnan(row["seconds"]):
                raise AssertionError(f"{side}: a gradient's error is {row['error']:.1e}")
            rows.append(row)
            print(
                f"{side}: {row['seconds']:.2f} s ({row['first_seconds']:.1f} s the first),"
                f" {row['peak_bytes'] / 1e9:.2f} GB above the weights, error {row['error']:.1e}",
                flush=True,
            )
    if not options.tiny and tuple(options.sides) == SIDES:
        torch.set_num_threads(options.threads)  # what the record says
        write_json(results_path("training_memory"), rows)


if __name__ == "__main__":
    main()
