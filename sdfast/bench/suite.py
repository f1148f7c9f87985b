"""Runs the parts that were asked for, and writes what there is after each of their rows.

A run that is interrupted, or that a model is too large for, leaves the rows before that, and can be resumed.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdfast.bench import machine, page, record, resume, tables
from sdfast.bench.plan import Planned
from sdfast.bench.request import ENGINES, Request
from sdfast.files import write_text
from sdfast.memory import keep_freed_memory, return_freed_memory

# A quick run starts nothing after this; what it then does is done within two minutes.
QUICK_SECONDS = 95.0
_MODULES = {
    "ops": ("operations",),
    "models": ("models", "breakdown"),
    "images": ("images",),
    "training": ("training",),
}
# From the one with the shortest rows on, so that a slow machine still gets many of them in a quick run.
_ORDER = ("ops", "images", "training", "models")

Say = Callable[[str], None]


def run(request: Request, command: str, say: Say = print) -> record.Record:
    """Measure, write the folder `request.output`, and return the record.

    Args:
        request: what to measure.
        command: that asked for it, which the record repeats.
        say: is told every row's line as soon as there is one.

    Raises:
        ValueError: what is to be resumed is no run like this one.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    began = time.monotonic()
    output = request.output
    if "{machine}" in str(output):
        output = type(output)(str(output).replace("{machine}", machine.slug(request.device)))
    keeps_memory = keep_freed_memory()
    environment = machine.description(request.device, keeps_freed_memory=keeps_memory)
    kept: dict[record.Key, record.Row] = {}
    seconds_before = 0.0
    if request.resume:
        kept, seconds_before = resume.earlier(output / "bench.json", command, environment)
    result: record.Record = {
        "format": record.FORMAT,
        "command": command,
        "environment": environment,
        "limits": machine.limits(request.dtypes, request.device),
        "quick": request.quick,
        "rows": [],
        "breakdown": [],
        "left_out": [
            f"{engine}: takes part in {' and '.join(ENGINES[engine][1])} alone"
            for engine in request.against
            if not set(ENGINES[engine][1]) & set(request.parts)
        ],
    }
    rows: list[record.Row] = []  # of this run, in its order

    def save() -> None:
        # What is kept and not reached yet is not lost where this run breaks off.
        everything = {record.key(row): row for row in rows} | kept
        result["breakdown"] = [row for key, row in everything.items() if key[0] == "breakdown"]
        result["rows"] = [row for key, row in everything.items() if key[0] != "breakdown"]
        result["seconds"] = seconds_before + time.monotonic() - began
        write(result, output)

    if busy := busy_line(environment):
        say(busy)
    for part in sorted(request.parts, key=_ORDER.index):
        if over(request, began):
            result["left_out"].append(f"{part}: the time of a quick run was over")
            continue
        for planned in plan_of(part, request):
            key = record.key(planned.row)
            before = kept.get(key)
            row = before if resume.is_whole(before) else planned.measured()
            kept.pop(key, None)
            rows.append(row)
            if "part" in row:
                say(tables.line(row))
            save()
            if over(request, began):
                result["left_out"].append(f"{part} after {row['name']}: the time of a quick run was over")
                break
        return_freed_memory()  # other parts' processes need it
    save()
    for reason in result["left_out"]:
        say(f"left out: {reason}")
    say(f"{output / 'bench.html'}, bench.md and bench.json are written")
    return result


def plan_of(part: str, request: Request) -> Iterator[Planned]:
    """What a part measures, row after row; its modules are imported only now."""
    for module in _MODULES[part]:
        yield from importlib.import_module(f"sdfast.bench.{module}").planned(request)


def over(request: Request, began: float) -> bool:
    """Whether a quick run, begun at `began` (time.monotonic), is to start nothing more."""
    return request.quick and time.monotonic() - began > QUICK_SECONDS


def busy_line(environment: dict[str, Any]) -> str | None:
    """A warning where others are at work on this machine, which makes times of threads that wait useless."""
    load, cores = environment.get("load_average"), environment.get("cores") or os.cpu_count() or 1
    if load is None or load < 0.5 * cores:
        return None
    return f"this machine is busy (load {load:.1f} on {cores} cores): times will not repeat"


def write(result: record.Record, output: Any) -> None:
    """The three files."""
    record.write(output / "bench.json", result)
    write_text(output / "bench.md", "\n".join(tables.markdown(result)) + "\n")
    write_text(output / "bench.html", page.html(result))
