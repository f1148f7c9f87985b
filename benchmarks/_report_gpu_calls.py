"""What a GPU's records say of the models' calls, each by every backend, and of what passed there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _report_gpu import card_line

from sdfast.bench.tables import markdown_table

Row = dict[str, Any]
_BACKENDS = {"torch": ("torch", "cudnn"), "CUDA C++": ("cuda",), "Triton": ("triton",)}


def calls_lines(record: Row) -> list[str]:
    """Of each model and operation the sum over its calls, by backend and by the fastest of each call."""
    timed = [row for row in record["rows"] if row["ms"]]
    works = dict.fromkeys(work for row in timed for work in row["counts"])
    rows = [
        cells
        for work in works
        for op in dict.fromkeys(row["op"] for row in timed)
        for cells in _sums(work, op, [row for row in timed if row["op"] == op and work in row["counts"]])
    ]
    wrong = [
        f"- {row['call']}, {name}: {error if isinstance(error, str) else f'error {error:.1e}'}."
        for row in record["rows"]
        for name, error in row["errors"].items()
        if name not in row["ms"]
    ]
    head = ("work", "op", "calls", *(f"{name} ms" for name in _BACKENDS), "fastest of each ms")
    lines = [card_line(record), *([record["note"]] if "note" in record else [])]
    lines += ["Triton's is its best plan's; a backend that lacks a call has torch's time there.", ""]
    lines += markdown_table(head, rows)
    return [*lines, *(["", "Not timed, as wrong or failed:", "", *wrong] if wrong else [])]


def _sums(work: str, op: str, rows: list[Row]) -> Iterator[tuple[object, ...]]:
    if not rows:
        return
    sums = dict.fromkeys((*_BACKENDS, "fastest"), 0.0)
    for row in rows:
        count = row["counts"][work]
        times = _alike(row["ms"])
        for backend, names in _BACKENDS.items():
            own = [ms for name, ms in times.items() if name.split()[0] in names]
            others = [ms for name, ms in times.items() if name.split()[0] in _BACKENDS["torch"]]
            sums[backend] += count * min(own or others)
        sums["fastest"] += count * min(times.values())
    yield work, f"`{op}`", sum(row["counts"][work] for row in rows), *(f"{ms:.2f}" for ms in sums.values())


def tiles_lines(record: Row) -> list[str]:
    """A line a call: torch's time, and that of the fastest tile of Hopper's own units."""

    def cells(row: Row) -> tuple[object, ...]:
        ours = {name: ms for name, ms in row["ms"].items() if name.startswith("cuda")}
        fastest = min(ours, key=lambda name: ours[name])
        theirs = min(ms for name, ms in row["ms"].items() if name not in ours)
        us = 1e3 * ours[fastest]
        return row["call"], f"{1e3 * theirs:.1f}", fastest, f"{us:.1f}", f"{1e3 * theirs / us:.2f}x"

    rows = (cells(row) for row in record["rows"] if any(name.startswith("cuda") for name in row["ms"]))
    head = ("call", "torch us", "fastest of ours", "us", "ratio")
    return [card_line(record), record["note"], "", *markdown_table(head, rows)]


def clocks_lines(record: Row) -> list[str]:
    """A line a call: its time, and when its blocks came to each place, in clocks."""
    places = list(record["rows"][0]["clocks"])
    rows = (
        (row["call"], row["commit"], f"{row['columns']}/{row['splits']}", row["steps"], f"{row['us']:.2f}")
        + tuple(row["clocks"][place] for place in places)
        for row in record["rows"]
    )
    head = ("call", "commit", "columns/splits", "steps", "us", *(place.replace("_", " ") for place in places))
    return [record["note"], "", *markdown_table(head, rows)]


def checks_lines(record: Row) -> list[str]:
    """A line for each file of tests and each run of compute-sanitizer."""
    rows = (
        (
            f"`{row['what']}`",
            row["commit"],
            row["passed"],
            ", ".join(row["failed"]) or "",
            row.get("note", ""),
        )
        for row in record["rows"]
    )
    return [card_line(record), "", *markdown_table(("what", "commit", "passed", "failed", ""), rows)]


def _alike(times: dict[str, float]) -> dict[str, float]:
    """Without the candidates that gather statistics or are given them.

    The first record calls those that do not "bare", of calls that could.
    """
    if any(" bare" in name for name in times):
        return {name: ms for name, ms in times.items() if " bare" in name or name == "torch"}
    return {name: ms for name, ms in times.items() if " +statistics" not in name}
