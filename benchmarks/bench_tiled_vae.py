"""The VAE's decoder on images that are too large for memory: sdfast in bands beside diffusers' tiling.

    python benchmarks/bench_tiled_vae.py [--size 1024 2048] [--rounds 1] [--threads N] [--tiny]

Stable Diffusion's VAE with random weights, fp32, one latent. Its noise grows from the top to the bottom, as
parts of a picture differ: tiles that are normalised each by itself then differ, too. Every side has a process
of its own: `bands` (`sdfast.tiled_vae.decode` with a budget), `tiling` (diffusers with `enable_tiling()`),
and where the image is small enough `whole` (sdfast) and `eager` (diffusers). Memory is the peak of a decode
above what is resident once the weights are there and a small image was decoded; difference is to `eager`, or
to `bands` where the whole image is not decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _own_process import PeakMemory, in_own_process
from _record import results_path, write_json
from torch import Tensor

from sdfast import packing, tiled_vae
from sdfast.bench.works import TINY_WORKS, WORKS
from sdfast.testing import relative_error

# Bytes, by the size of the image.
BUDGETS = {512: 5 * 10**8, 1024: 10**9, 2048: 3 * 10**9}
_LARGEST_WHOLE = 1024
SIDES = ("eager", "whole", "bands", "tiling")


@dataclasses.dataclass(frozen=True)
class Task:
    """One side's decode to size x size."""

    side: str
    size: int
    rounds: int
    threads: int
    tiny: bool

    def latent(self, size: int) -> Tensor:
        side = size // (2 if self.tiny else 8)
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
        return noise * torch.linspace(0.3, 1.7, side)[:, None]

    def make(self) -> Callable[[Tensor], Tensor]:
        work = (TINY_WORKS if self.tiny else WORKS)["vae"]
        work = dataclasses.replace(work, config={**work.config, "sample_size": 32 if self.tiny else 512})
        theirs = work.make_theirs().to(memory_format=torch.channels_last)
        if self.side in ("eager", "tiling"):
            if self.side == "tiling":
                theirs.enable_tiling()
            return lambda z: theirs.decode(z, return_dict=False)[0]
        ours = work.make_ours(theirs)
        if self.side == "whole":
            return ours.decode
        budget = BUDGETS.get(self.size, 10**9)
        return lambda z: tiled_vae.decode(ours, z, memory_bytes=budget)


def run(task: Task, path: str) -> dict[str, Any]:
    """A side's seconds and memory; writes its image."""
    torch.set_num_threads(task.threads)
    with torch.inference_mode():
        decode, z = task.make(), task.latent(task.size)
        decode(task.latent(task.size // 8))
        packing.clear()
        memory, samples = PeakMemory(), []
        for _ in range(task.rounds):
            image = None  # of the round before
            began = time.perf_counter()
            image = decode(z)
            samples.append(time.perf_counter() - began)
        peak_bytes = memory.above()
        torch.save(image.contiguous(), path)
    return {"samples": samples, "peak_bytes": peak_bytes}


def measure(task: Task, folder: pathlib.Path) -> dict[str, Any]:
    """A row, without its difference."""
    path = folder / f"{task.side}.pt"
    answer = in_own_process(f"{task.side}, {task.size}", run, task, str(path))
    return {
        "side": task.side, "size": task.size, "seconds": statistics.median(answer["samples"]), **answer,
        "budget_bytes": BUDGETS.get(task.size) if task.side == "bands" else None,
    }  # fmt: skip


def compare(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Add each side's difference to the whole image, and check that ours is that to rounding."""
    sides = [row["side"] for row in rows]
    reference = "eager" if "eager" in sides else "bands"
    expected = torch.load(folder / f"{reference}.pt")
    for row in rows:
        image = torch.load(folder / f"{row['side']}.pt")
        row["reference"] = reference
        row["most_difference"] = float((image - expected).abs().max())
        row["error"] = relative_error(image, expected)
        if row["side"] in ("whole", "bands") and not row["error"] <= 1e-4:
            raise AssertionError(f"{row['side']}, {row['size']}: error {row['error']:.1e} exceeds 1e-4")


def main() -> None:
    """Print every measurement, write results/<device>/tiled_vae.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", nargs="+", type=int, default=[1024, 2048], help="of the image (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="try it out on a small model; writes nothing")
    options = parser.parse_args()
    rows = []
    for size in options.size:
        with tempfile.TemporaryDirectory() as name:
            folder, of_size = pathlib.Path(name), []
            for side in SIDES:
                if side in ("eager", "whole") and size > _LARGEST_WHOLE:
                    continue
                task = Task(side, size, options.rounds, options.threads, options.tiny)
                of_size.append(measure(task, folder))
                print(f"{side}, {size}: {of_size[-1]['seconds']:.1f} s", flush=True)
            compare(of_size, folder)
        rows += of_size
    for row in rows:
        print(
            f"{row['side']}, {row['size']}: {row['seconds']:.2f} s, {row['peak_bytes'] / 1e9:.2f} GB above"
            f" the weights, at most {row['most_difference']:.1e} from {row['reference']}'s,"
            f" error {row['error']:.1e}"
        )
    if not options.tiny:
        torch.set_num_threads(options.threads)  # what the record says
        write_json(results_path("tiled_vae"), rows)


if __name__ == "__main__":
    main()
