"""What the scripts here share: where records go, and the JSON files themselves."""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

from sdfast.bench import record
from sdfast.bench.machine import slug as device_slug
from sdfast.bench.record import error_text
from sdfast.testing import environment

__all__ = ["RESULTS", "device_slug", "error_text", "output_path", "results_path", "write_json"]

RESULTS = pathlib.Path(__file__).parent / "results"


def results_path(name: str, device: str = "cpu") -> pathlib.Path:
    return RESULTS / device_slug(device) / f"{name}.json"


def output_path(name: str, options: argparse.Namespace) -> pathlib.Path | None:
    """Where a GPU's record goes: the folder `output`, else this GPU's; nowhere where it is only tried out."""
    if options.output is not None:
        return pathlib.Path(options.output) / f"{name}.json"
    return None if options.tiny else results_path(name, "cuda")


def write_json(path: pathlib.Path, rows: Sequence[Mapping[str, object]], **more: object) -> None:
    """Write environment, load and rows; a run that is interrupted leaves the file before it as it was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    given = [pathlib.Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]  # of folders the names
    command = shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *given])
    machine = {**environment(), "load_average": load}
    record.write(path, {"command": command, "environment": machine, **more, "rows": list(rows)})
