"""The file of a run: JSON, written whole or not at all, and read back with checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdfast.files import write_text

FORMAT = "sdfast bench 1"

Row = dict[str, Any]
Record = dict[str, Any]
Key = tuple[str, str, str]


def write(path: Path, record: Record) -> None:
    """As JSON, in one step.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Record:
    """
    Raises:
        OSError: no such file.
        ValueError: not a record of `sdfast bench`.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not a record of `sdfast bench`")
    return record


def key(row: Row) -> Key:
    """What identifies a row in another record; those of the breakdown have no part."""
    return row.get("part", "breakdown"), row["name"], row["dtype"]


def of_part(rows: Sequence[Row], part: str) -> list[Row]:
    """The rows of "ops", "models", "images" or "training"."""
    return [row for row in rows if row["part"] == part]


def error_text(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
