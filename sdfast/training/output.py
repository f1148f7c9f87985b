"""The folder that training leaves, whole or not at all. Importing this imports no torch."""

from __future__ import annotations

import json
import tempfile
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
    if not empty and not (output / RECORD).is_file():
        raise FileExistsError(f"{output}: exists and was not written by this command; choose another output")


def write_output(output: Path, write: Callable[[Path], object], record: Mapping[str, Any]) -> None:
    """Write beside `output`, then rename: nobody sees half a model.

    Args:
        output: what it holds is replaced.
        write: is given the folder to make and fill.
        record: how it came about, for whoever asks; goes into training.json, which no model reads.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        fresh, old = Path(beside) / "new", Path(beside) / "old"
        write(fresh)
        (fresh / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")
        if output.exists():
            output.rename(old)
        try:
            fresh.rename(output)
        except BaseException:  # Ctrl-C too: the folder that was there must not go with the temporary one
            if old.exists():
                old.rename(output)
            raise
