"""What `sdfast bench --resume` keeps of the run before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from sdfast.bench.record import Key, Row, key, read

# What may differ between the two: when they ran, and how busy the machine was.
_PASSING = ("date", "load_average")


def earlier(path: Path, command: str, environment: dict[str, Any]) -> tuple[dict[Key, Row], float]:
    """The rows of a record, in order, and the seconds that it took.

    Args:
        path: of the record; where there is none, nothing is kept.
        command, environment: of the record that is about to be made.

    Raises:
        ValueError: the record is of another command, commit or machine, or no record; says what differs. Or
            the tree has changes, which may not be those it had.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}, 0.0
    before = read(path)
    if str(environment["commit"]).endswith("+changes"):
        raise ValueError(
            "--resume: the source tree has changes, and rows could be of others; commit them first"
        )
    settings = {**before["environment"], "command": before["command"]}
    for name, value in {**environment, "command": command}.items():
        if name not in _PASSING and settings.get(name) != value:
            raise ValueError(
                f"--resume: {path} was made with {name} {settings.get(name)!r}, and this is {value!r}; "
                "leave --resume out to measure anew, or choose another --output"
            )
    rows = [*before["rows"], *before["breakdown"]]
    return {key(row): row for row in rows}, before.get("seconds", 0.0)


def is_whole(row: Row | None) -> TypeGuard[Row]:
    """Whether there is nothing of it to measure again: no side failed, and no engine's process ended."""
    return row is not None and "failed" not in row and not row.get("ended")
