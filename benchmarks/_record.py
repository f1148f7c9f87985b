"""What the benchmarks share: the name of this machine, tables, and JSON files written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import torch

from sdfast import _library
from sdfast.testing import environment

RESULTS = pathlib.Path(__file__).parent / "results"


def device_slug(device: str = "cpu") -> str:
    """The folder of this machine's results: "cpu-2core-avx512_bf16", "nvidia-h200"."""
    if device == "cpu":
        return f"cpu-{os.cpu_count()}core-{_library.cpu_isa()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def results_path(name: str, device: str = "cpu") -> pathlib.Path:
    return RESULTS / device_slug(device) / f"{name}.json"


def output_path(name: str, options: argparse.Namespace) -> pathlib.Path | None:
    """Where a GPU's record goes: the folder `output`, else this GPU's; nowhere where it is only tried out."""
    if options.output is not None:
        return pathlib.Path(options.output) / f"{name}.json"
    return None if options.tiny else results_path(name, "cuda")


def write_json(path: pathlib.Path, rows: Sequence[Mapping[str, object]], **more: object) -> None:
    """Write environment, load and rows; a run that is interrupted leaves the file before it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    command = " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = {**environment(), "load_average": load}
    record = {"command": command, "environment": machine, **more, "rows": list(rows)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text. `columns`: format by key, as {"eager_ms": ".3f"}."""
    cells = [list(columns)] + [[format(row[key], spec) for key, spec in columns.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)  # noqa: B905


def error_text(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
