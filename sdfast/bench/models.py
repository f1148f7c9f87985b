"""The part `models`: one call of a whole model in sdfast, beside diffusers in eager torch and other engines.

A U-Net step is one inside a sampling loop: ours has projected text and timestep before it, the others do in
each step, as diffusers' model is built (`works.Work.loop_inputs`). Ours and one engine at a time are alive
and take turns, so that a ratio is of neighbours in time. Errors are taken against eager's fp32 result; ours
may be 1e-4 in fp32, in other types 1.5 times eager's own.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast.bench.engines import Task, why_not
from sdfast.bench.plan import Planned
from sdfast.bench.process import Engine, EngineEnded, EngineError, export
from sdfast.bench.record import Row
from sdfast.bench.request import Request, missing
from sdfast.bench.timing import ratio, times
from sdfast.bench.works import SIZES
from sdfast.testing import relative_error

LARGEST_FP32_ERROR = 1e-4


def planned(request: Request, size: str | None = None) -> Iterator[Planned]:
    """A row for each model and dtype.

    Args:
        size: of `works.SIZES`; None takes the full ones, or with `quick` the quick ones.
    """
    size = size or ("quick" if request.quick else "full")
    needs_diffusers = missing(("diffusers",))
    for work, model in SIZES[size].items():
        exports: dict[str, float | EngineError] = {}
        with tempfile.TemporaryDirectory() as folder:
            for dtype in request.dtypes:
                row: Row = {"part": "models", "name": model.title, "work": work, "dtype": dtype}
                if needs_diffusers:
                    row["skipped"] = dict.fromkeys(request.engines("models"), needs_diffusers)
                    yield Planned(row, dict)
                    continue
                threads = torch.get_num_threads()
                task = Task(size, work, dtype, request.device, Path(folder), threads, request.backend)
                comparison = Comparison(task, request.call_rounds, exports)
                yield Planned(row, functools.partial(comparison.run, request))


class Comparison:
    """One work in one dtype: ours, loaded once, beside each engine in turn.

    Args:
        task: what they run.
        rounds: of each pair.
        exports: the seconds that conversion took, or why it failed, kept between dtypes.
    """

    def __init__(self, task: Task, rounds: int, exports: dict[str, float | EngineError]) -> None:
        self.task, self.rounds, self.exports = task, rounds, exports
        self.samples: list[float] = []  # ours, beside all engines
        self.sides: dict[str, dict[str, Any]] = {}
        self.ratios: dict[str, dict[str, float]] = {}
        self.skipped: dict[str, str] = {}
        self.ended: list[str] = []  # of those skipped: their process did
        self.expected: Tensor | None = None
        self.error = math.inf  # of ours

    def run(self, request: Request) -> Row:
        """
        Raises:
            AssertionError: our result is wrong.
            EngineError: ours, or eager, failed.
        """
        self.expected = self.reference()
        with Engine("sdfast", self.task) as ours:
            ours.settle()
            for name in request.engines("models"):
                try:
                    self.beside(name, ours)
                except EngineError as problem:
                    if name == "eager" or not ours.process.is_alive():
                        raise
                    self.skipped[name] = str(problem)
                    if isinstance(problem, EngineEnded):
                        self.ended.append(name)
            side = _side(self.samples, ours, self.error)
        return {
            "rounds": self.rounds,
            "weight_bytes": self.task.model.weight_bytes(self.task.torch_dtype),
            "sides": {**self.sides, "sdfast": side},
            "ratios": self.ratios,
            "skipped": self.skipped,
            "ended": self.ended,
        }

    def reference(self) -> Tensor | None:
        """Eager's result in fp32, on the CPU; None where that is what eager is about to compute."""
        if (self.task.dtype, self.task.device) == ("float32", "cpu"):
            return None
        task = Task(self.task.size, self.task.work, "float32", "cpu", self.task.folder, self.task.threads)
        with Engine("eager", task) as reference:
            return reference.result

    def beside(self, name: str, ours: Engine) -> None:
        """Time one engine and ours in turns; eager comes first, and decides on our result."""
        if reason := why_not(name, self.task):
            raise EngineError(reason)
        seconds = self.export_seconds(name)
        with Engine(name, self.task) as theirs:
            theirs.settle()
            if self.expected is None:
                self.expected = theirs.result
            their_error = relative_error(theirs.result, self.expected)
            if name == "eager":
                self.error = relative_error(ours.result, self.expected)
                limit = LARGEST_FP32_ERROR if self.task.dtype == "float32" else 1.5 * their_error
                if not self.error <= limit:
                    raise AssertionError(f"error {self.error:.1e} exceeds {limit:.1e}")
            for run in (theirs, ours):  # warm
                run()
            pairs = [(theirs(), ours()) for _ in range(self.rounds)]
            self.samples += [our for _, our in pairs]
            self.ratios[name] = ratio([their for their, _ in pairs], [our for _, our in pairs])
            side = _side([their for their, _ in pairs], theirs, their_error)
            self.sides[name] = {**side, "export_seconds": seconds}

    def export_seconds(self, name: str) -> float:
        if name not in self.exports:
            try:
                self.exports[name] = export(name, self.task)
            except EngineError as problem:
                self.exports[name] = problem
        found = self.exports[name]
        if isinstance(found, EngineError):
            raise found
        return found


def _side(samples: list[float], engine: Engine, error: float) -> dict[str, Any]:
    return {
        **times(samples), "first_ms": 1e3 * engine.ready_seconds, "error": error,
        "idle_cpu_seconds": engine.idle_cpu_seconds, **engine.memory,
    }  # fmt: skip
