"""The folder that training leaves, whole or not at all. Importing this imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORD = "training.json"


def check_output(output: Path) -> None:
    """
    Raises:
        FileExistsError: `output` holds something that `write_output` did not write.
    """
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not empty and not _is_ours(output / RECORD):
        raise FileExistsError(f"{output}: exists and was not written by this command; choose another output")


def write_output(output: Path, write: Callable[[Path], object], record: Mapping[str, Any]) -> None:
    """Write beside `output`, then rename: nobody sees half a model.

    What a kill leaves in .OUTPUT.sdfast-unfinished the next call puts back or deletes.

    Args:
        output: what it holds is replaced.
        write: is given the folder to make and fill.
        record: how it came about, for whoever asks; goes into training.json, which no model reads. Its key
            "sdfast", the version, tells `check_output` whose folder this is.
    """
    beside = output.with_name(f".{output.name}.sdfast-unfinished")
    fresh, old = beside / "new", beside / "old"
    _settle(output, beside)
    beside.mkdir(parents=True)
    try:
        write(fresh)
        (fresh / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")
        if output.exists():
            output.rename(old)
        fresh.rename(output)
    finally:
        _settle(output, beside)


def _settle(output: Path, beside: Path) -> None:
    """Put the folder that was there back where none took its place, and delete the rest."""
    if (beside / "old").exists() and not output.exists():
        (beside / "old").rename(output)
    if beside.exists():
        shutil.rmtree(beside)


def _is_ours(record: Path) -> bool:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "sdfast" in content
