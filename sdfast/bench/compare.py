"""`sdfast bench compare A.json B.json`: what got slower from A to B, and by how much.

A machine that is busier, or another one, makes everything slower: a row counts as slower only where both its
time and its ratio to eager say so, each beyond its spread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sdfast.bench import record
from sdfast.bench.record import Record, Row
from sdfast.bench.tables import milliseconds


@dataclasses.dataclass(frozen=True)
class Change:
    """A row of both records.

    Args:
        name, dtype: of the row.
        before_ms, after_ms: sdfast's medians.
        slower: after by before.
        ratio_before, ratio_after: eager's time by ours.
        certain: whether the spreads of the times (p20 to p80) and the intervals of the ratios lie apart.
    """

    name: str
    dtype: str
    before_ms: float
    after_ms: float
    slower: float
    ratio_before: float
    ratio_after: float
    certain: bool

    def __str__(self) -> str:
        word = f"{self.slower:.2f}x the time" if self.slower >= 1 else f"{1 / self.slower:.2f}x as fast"
        return (
            f"{self.name}, {self.dtype}: {milliseconds(self.before_ms)} to {milliseconds(self.after_ms)} ms,"
            f" {word}; beside eager {self.ratio_before:.2f}x to {self.ratio_after:.2f}x"
            + ("" if self.certain else " (within the spread)")
        )


def changes(before: Record, after: Record) -> Iterator[Change]:
    """The rows that both records measured, the one that lost most first."""
    old = {record.key(row): row for row in before["rows"] if "sides" in row}
    both = [(old[record.key(row)], row) for row in after["rows"] if "sides" in row and record.key(row) in old]
    found = [_change(a, b) for a, b in both]
    return iter(sorted(found, key=lambda change: -change.slower))


def _change(a: Row, b: Row) -> Change:
    before, after = a["sides"]["sdfast"], b["sides"]["sdfast"]
    was, now = a["ratios"]["eager"], b["ratios"]["eager"]
    slower = after["p20_ms"] > before["p80_ms"] and now["high"] < was["low"]
    faster = after["p80_ms"] < before["p20_ms"] and now["low"] > was["high"]
    return Change(
        b["name"], b["dtype"], before["ms"], after["ms"], after["ms"] / before["ms"], was["ratio"],
        now["ratio"], slower or faster,
    )  # fmt: skip


def missing_rows(before: Record, after: Record) -> list[str]:
    """Rows of A that B does not have, or in which B failed."""
    there = {record.key(row) for row in after["rows"] if "sides" in row}
    return [
        f"{r['name']}, {r['dtype']}" for r in before["rows"] if "sides" in r and record.key(r) not in there
    ]


def report(paths: tuple[Path, Path], fail_over: float | None) -> tuple[list[str], bool]:
    """Lines, and whether something got slower by more than the fraction `fail_over`, beyond its spread.

    Args:
        paths: of A and B.
        fail_over: 0.1 is ten percent; None never fails.

    Raises:
        OSError, ValueError: a file is missing, is no record, or they have no row in common.
    """
    before, after = (record.read(path) for path in paths)
    found = list(changes(before, after))
    if not found:
        raise ValueError(f"{paths[0]} and {paths[1]} have no measured row in common")
    lines = []
    for what in ("cpu", "gpu", "threads"):
        was, now = before["environment"].get(what), after["environment"].get(what)
        if was != now:
            lines.append(f"not the same machine: {what} {was} and {now}")
    slow = [change for change in found if change.slower > 1 and change.certain]
    fast = [change for change in found if change.slower < 1 and change.certain]
    lines += [f"slower: {change}" for change in slow] + [f"faster: {change}" for change in reversed(fast)]
    lines += [f"gone: {name}" for name in missing_rows(before, after)]
    same = len(found) - len(slow) - len(fast)
    lines.append(f"{len(found)} rows: {len(slow)} slower, {len(fast)} faster, {same} within their spread")
    if fail_over is None:
        return lines, False
    over = [change for change in slow if change.slower > 1 + fail_over]
    lines.append(f"{len(over)} slower by more than {fail_over:.0%}")
    return lines, bool(over)
