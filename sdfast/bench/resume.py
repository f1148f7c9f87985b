"""What `sdfast bench --resume` keeps of the run before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdfast.bench.record import Key, Row, key, read

# What may differ between the two: when they ran, and how busy the machine was.
_PASSING = ("date", "load_average")


def earlier(path: Path, command: str, environment: dict[str, Any]) -> tuple[dict[Key, Row], float]:
    """The rows of a record that need not be measured again, in order, and the seconds that it took.

    Args:
        path: of the record; where there is none, nothing is kept.
        command, environment: of the record that is about to be made.

    Raises:
        ValueError: the record is of another command, commit or machine, or no record; says what differs.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}, 0.0
    before = read(path)
    settings = {**before["environment"], "command": before["command"]}
    for name, value in {**environment, "command": command}.items():
        if name not in _PASSING and settings.get(name) != value:
            raise ValueError(
                f"--resume: {path} was made with {name} {settings.get(name)!r}, not {value!r}; "
                "leave --resume out to measure anew, or choose another --output"
            )
    rows = [*before["rows"], *before["breakdown"]]
    return {key(row): row for row in rows if "failed" not in row}, before.get("seconds", 0.0)
