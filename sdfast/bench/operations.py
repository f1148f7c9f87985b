"""The part `ops`: every operation at the shapes that Stable Diffusion meets, beside torch."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from sdfast import packing
from sdfast.bench.case import Case, Results, Spec, measure
from sdfast.bench.machine import peak
from sdfast.bench.plan import Planned
from sdfast.bench.record import error_text
from sdfast.bench.request import OPS, Request
from sdfast.dispatch import use_backend


def specs(only: Iterable[str] = OPS, *, quick: bool = False) -> list[Spec]:
    """The cases of these operations, those of a quick run alone where that is asked for."""
    found = [spec for op in only for spec in importlib.import_module(f"sdfast.bench.{op}").SPECS]
    return [spec for spec in found if spec.quick or not quick]


def planned(request: Request) -> Iterator[Planned]:
    """A row for each case and dtype."""
    for dtype in request.dtypes:
        for spec in specs(request.only, quick=request.quick):
            row = {
                "part": "ops", "op": spec.op, "model": spec.model,
                "name": f"{spec.op} {spec.name}", "dtype": dtype,
            }  # fmt: skip
            yield Planned(row, functools.partial(measured, spec, getattr(torch, dtype), request))
            packing.clear()
            gc.collect()


def measured(spec: Spec, dtype: torch.dtype, request: Request) -> dict[str, Any]:
    """The times of one case. What cannot be compiled is left out, and said to be."""
    case = spec.make(dtype, request.device)
    if request.backend is not None:
        case.ways["sdfast"] = by(request.backend, case.ways["sdfast"])
    skipped = {}
    if "compile" in request.engines("ops"):
        if case.training:
            skipped["compile"] = "gradients are taken outside of what it compiles"
        else:
            try:
                add_compiled(case)
            except Exception as error:  # of a compiler, a missing one among them
                skipped["compile"] = error_text(error)
    with memory(request.device) as peak_bytes:
        row = measure(case, request.device, request.case_seconds, peak(dtype, request.device))
    return {**row, **peak_bytes, **({"skipped": skipped} if skipped else {})}


def by(backend: str, way: Callable[[], Results]) -> Callable[[], Results]:
    """The way under `use_backend`."""

    @functools.wraps(way)
    def run() -> Results:
        with use_backend(backend):
            return way()

    return run


def add_compiled(case: Case) -> None:
    """Let torch.compile take what eager does, and compile it now."""
    torch._dynamo.reset()
    compiled = torch.compile(case.ways["eager"], dynamic=False)
    with torch.no_grad():
        compiled()
    case.ways["compile"] = compiled


@contextlib.contextmanager
def memory(device: str) -> Iterator[dict[str, int]]:
    """The most memory that all sides took on a GPU. A CPU's process has no such number for a single call."""
    found: dict[str, int] = {}
    if device == "cpu":
        yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
