"""Whole models on a GPU, SD 1.5, SDXL and their VAE: sdfast beside eager torch and torch.compile.

    python benchmarks/bench_gpu_models.py [--minutes 60] [--work sd15 sdxl ...] [--side eager sdfast ...]
                                          [--rounds 7] [--dtype bfloat16] [--caches FOLDER] [--output FOLDER]
                                          [--tiny]

Random weights from a seed, the same on every side. Eager is diffusers in either memory format, or where that
is not installed our own model under `use_backend("torch")`, as the record says; it is also what
`torch.compile(mode="max-autotune", fullgraph=True)` compiles, channels_last and with CUDA graphs
(`--compile-mode reduce-overhead` has the graphs and fused kernels without an hour of tuning). Ours is
channels_last and captured by `graphs.graphed`, once as `dispatch.py` chooses, once with every Triton kernel;
its U-Net has projected text and timestep before the loop. A training step has bf16 weights (under autocast
torch decides the dtypes and no kernel of ours runs), AdamW, and of ours no graph. All have cudnn.benchmark.

The result is checked before it is timed: against fp32 eager without TF32, at most 1.5 times the error of
eager in the same dtype. Then sides take turns; a time is CUDA events around calls that follow each other,
and a ratio is of neighbours in time. Every side has a process of its own (`_gpu_sides.py`), so that its
memory can be told, and that one which fails or takes too long is recorded as such and hides no other.
`--minutes` bounds the run; the most important works come first, the first of them with torch.compile beside
ours right after the others, then the rest, and last the first results from full caches. What is there is
written to FOLDER/gpu_models.json, by default results/<device>/, whenever a side was timed.
`--tiny` tries it out.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from _gpu_process import OutOfTime, WorkerError
from _gpu_sides import Side
from _gpu_timing import Timer, card, ceilings, kernels_there, versions
from _gpu_works import HAS_DIFFUSERS, OURS, SIDES, TINY_WORKS, WORKS
from _record import output_path, write_json

from sdfast.testing import spread

Row = dict[str, Any]
_LARGEST_ERROR = 1.5  # times eager's own
_COMPILED_EARLY = 1  # works: torch.compile beside ours right after the others, for the rest at the end
_EAGER = ("eager", "eager channels_last")


class Benchmark:
    """One run: its sides, its deadline, and the rows that there are.

    Args:
        options: of the command.
        folder: for the expected results and the caches of compiled kernels.
    """

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + 60 * options.minutes
        caches = options.caches or folder / "caches"
        self.sides = {
            name: Side(name, folder, caches, options.dtype, options.tiny, options.compile_mode)
            for name in ("reference", *options.side)
        }
        self.works = TINY_WORKS if options.tiny else WORKS
        self.held: dict[str, tuple[str, Row]] = {}  # by side: the work that it has loaded, what it said
        self.loaded_again: set[tuple[str, str]] = set()
        self.eager_errors: dict[str, float] = {}
        self.no_reference: dict[str, WorkerError] = {}
        self.rows: list[Row] = []
        self.faults: list[str] = []
        self.more: Row = {}

    def ask(self, name: str, request: str, *arguments: object) -> Any:
        """Of a side, in what is left of the run and of what a request may take."""
        limit = self.options.compile_minutes if name == "compiled" else self.options.side_minutes
        seconds = min(60 * limit, self.deadline - time.monotonic())
        try:
            return self.sides[name].ask(seconds, request, *arguments)
        except WorkerError:
            self.held.pop(name, None)
            raise

    def measure(self, work: str, names: Iterable[str]) -> None:
        """Add the row of a work; what fails is named there.

        The record is written after each side's first sample, which is taken as soon as the side is loaded and
        counts only where no turns follow: time that runs out takes nothing away that was there.
        """
        row: Row = {
            "name": work, "work": self.works[work].title, "dtype": self.options.dtype,
            "rounds": self.options.rounds, "sides": {}, "failed": {},
        }  # fmt: skip
        self.rows.append(row)
        first: dict[str, list[float]] = {}
        for name in names:
            if self.attempt(row, name, lambda name=name: row["sides"].update({name: self.load(work, name)})):
                first[name] = []
                self.sample(row, name, first)
            compare(row["sides"], first)
            self.write()
        turns: dict[str, list[float]] = {name: [] for name, times in first.items() if times}
        for _ in range(self.options.rounds):
            for name in [name for name in turns if name not in row["failed"]]:
                self.sample(row, name, turns)
        compare(row["sides"], turns if any(turns.values()) else first)
        for name in [name for name in row["sides"] if name not in ("eager", "compiled", *row["failed"])]:
            profile = row["sides"][name]
            self.attempt(
                row, f"{name}, profile", lambda p=profile, n=name: p.update(profile=self.ask(n, "profile"))
            )
        print(described(row), flush=True)
        self.write()

    def sample(self, row: Row, name: str, samples: dict[str, list[float]]) -> None:
        """Add a time; a side that fails has none any more, one out of time keeps those it has."""
        faults = len(self.faults)
        self.attempt(row, name, lambda: samples[name].append(self.ask(name, "time")))
        if len(self.faults) > faults:
            del samples[name], row["sides"][name]

    def attempt(self, row: Row, what: str, do: Callable[[], object]) -> bool:
        """Whether it went well; if not, the row says why."""
        try:
            do()
        except WorkerError as error:
            row["failed"][what] = str(error)
            if not isinstance(error, OutOfTime):
                self.faults.append(f"{row['work']}, {what}: {error}")
            return False
        return True

    def load(self, work: str, name: str) -> Row:
        """What a side says of its first result, judged; of a work that it holds, what it said then."""
        if self.held.get(name, ("",))[0] == work:
            return dict(self.held[name][1])
        self.need_reference(work)
        compiled_before = any(self.sides[name].caches.glob("*/*"))
        side = {**self.ask(name, "load", work), "compiled_before": compiled_before}
        if name in _EAGER:
            self.eager_errors[work] = side["error"]  # in the end that of channels_last
        elif work not in self.eager_errors:
            raise WorkerError("there is no eager result to judge its error by")
        elif not side["error"] <= _LARGEST_ERROR * self.eager_errors[work]:
            self.ask(name, "unload")
            raise WorkerError(
                f"error {side['error']:.1e} exceeds {_LARGEST_ERROR} times eager's,"
                f" {self.eager_errors[work]:.1e}"
            )
        self.held[name] = (work, side)
        return dict(side)

    def need_reference(self, work: str) -> None:
        """The expected result, computed once; where it cannot be, nothing of this work is judged or timed."""
        if work in self.no_reference:
            raise self.no_reference[work]
        if not (self.folder / f"{work}.pt").exists():
            try:
                self.ask("reference", "load", work)
            except WorkerError as error:
                self.no_reference[work] = type(error)(f"reference, {error}")
                raise self.no_reference[work] from None

    def load_again(self, row: Row) -> None:
        """First results of new processes that find all kernels compiled, where the row has that of none."""
        for name, side in row["sides"].items():
            if name in _EAGER or (side["compiled_before"] and name in OURS):
                continue
            if (work := (row["name"], name)) in self.loaded_again:
                continue
            self.loaded_again.add(work)
            self.sides[name].end()
            self.attempt(
                row,
                f"{name}, again",
                lambda n=name, s=side: s.update(
                    first_again_seconds=self.ask(n, "load", row["name"])["first_seconds"]
                ),
            )
        self.write()

    def run(self) -> None:
        """All that there is time for, the most important first."""
        works = [work for work in self.options.work if work in self.works]
        names = [name for name in self.options.side if name != "compiled"]
        try:
            for side in self.sides.values():
                if side.name != "compiled":
                    side.start()
            ours = [name for name in OURS if name in self.sides]
            compiled = "compiled" in self.options.side
            for work in works[:_COMPILED_EARLY]:
                self.measure(work, names)
                if compiled:
                    self.measure(work, ("compiled", *ours))
            for work in works[_COMPILED_EARLY:]:
                self.measure(work, names)
            if compiled:
                for name in _EAGER:  # they need their memory no more
                    if name in self.sides:
                        self.sides[name].end()
                for work in works[_COMPILED_EARLY:]:
                    self.measure(work, ("compiled", *ours))
            for row in self.rows:
                if time.monotonic() < self.deadline:
                    self.load_again(row)
        finally:
            for side in self.sides.values():
                side.end()

    def write(self) -> None:
        if (path := output_path("gpu_models", self.options)) is not None:
            write_json(path, self.rows, **self.more)


def compare(sides: Row, samples: dict[str, list[float]]) -> None:
    """Times of each side, and of ours the ratio of the fastest other one's, of neighbours in time."""
    medians = {name: spread(times)[1] for name, times in samples.items() if times}
    others = [name for name in medians if name not in OURS]
    for name, ms in medians.items():
        p20, _, p80 = spread(samples[name])
        sides[name].update(ms=ms, p20_ms=p20, p80_ms=p80, samples=len(samples[name]))
        if name in OURS and others:
            best = min(others, key=lambda other: medians[other])
            pairs = zip(samples[best], samples[name], strict=False)  # the last turn may lack some sides
            ratio = spread([theirs / own for theirs, own in pairs])
            sides[name].update(beside=best, ratio=ratio[1], ratio_p20=ratio[0], ratio_p80=ratio[2])


def described(row: Row) -> str:
    """A row for the terminal."""
    lines = [row["work"]]
    for name, side in row["sides"].items():
        ratio = f", {side['ratio']:.2f}x of {side['beside']}" if "ratio" in side else ""
        profile = side.get("profile", {})
        launches = f", {profile['launches']} launches" if "launches" in profile else ""
        waits = f", WAITS: {profile['waits_for']}" if profile.get("waits_for") else ""
        memory = "" if side["peak_bytes"] is None else f", {side['peak_bytes'] / 2**30:.1f} GiB"
        ms = f"{side['ms']:.3f} ms" if "ms" in side else "not timed"
        lines.append(
            f"  {name}: {ms}{ratio}, error {side['error']:.1e}{memory},"
            f" first result after {side['first_seconds']:.1f} s{launches}{waits}"
        )
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in row["failed"].items())])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="of the whole run (%(default)s)")
    parser.add_argument(
        "--side-minutes", type=float, default=3, help="of one request to a side (%(default)s)"
    )
    parser.add_argument(
        "--compile-minutes", type=float, default=10, help="and to torch.compile (%(default)s)"
    )
    parser.add_argument("--compile-mode", choices=("max-autotune", "reduce-overhead"), default="max-autotune")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=7, help="of each side (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--caches", type=pathlib.Path, help="keep compiled kernels here, between runs too")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the record")
    parser.add_argument(
        "--tiny", action="store_true", help="small models on the CPU; records only to --output"
    )
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny tries the benchmark out in Triton's interpreter")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what each side takes, write results/<device>/gpu_models.json; fail where a side did.

    One that ran out of time did not.
    """
    options = parse(arguments)
    device = "cpu" if options.tiny else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, pathlib.Path(folder))
        timer = Timer(device)
        copy, product = ceilings(timer, getattr(torch, options.dtype), device)
        del timer
        if device == "cuda":
            torch.cuda.empty_cache()
        benchmark.more = {
            "eager_model": "diffusers" if HAS_DIFFUSERS else 'sdfast.models with use_backend("torch")',
            "compile_mode": options.compile_mode, "triton_kernels": kernels_there(),
            "ceilings": {"copy_gb_per_s": copy, "matrix_tflop_per_s": product},
            "card": card(), "versions": versions(),
            "inductor": {name: value for name, value in os.environ.items() if "INDUCTOR_MAX" in name},
        }  # fmt: skip
        missing = [op for op, there in benchmark.more["triton_kernels"].items() if not there]
        print(f"copy {copy:.0f} GB/s, matrix product {product:.0f} TFLOP/s", flush=True)
        if missing:
            print(f"no Triton kernel yet: {', '.join(missing)}", flush=True)
        benchmark.run()
    if benchmark.faults:
        raise SystemExit("\n".join(benchmark.faults))


if __name__ == "__main__":
    main()
