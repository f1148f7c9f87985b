"""What serves each module of a model, and why not something faster."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import NamedTuple

OURS, LEFT = "sdfast", "as it was"


class Row(NamedTuple):
    """One module.

    Attributes:
        name: in its model; of a pipeline the component's name comes first.
        module: its class.
        served_by: "sdfast" or "as it was".
        detail: what is fused, or why nothing is.
    """

    name: str
    module: str
    served_by: str
    detail: str


@dataclasses.dataclass
class Report:
    """What `optimize` did or `explain` found.

    Attributes:
        rows: a `Row` for each layer and block that we know, and each module with parameters that we don't.
        notes: what else was set, and what would help.
    """

    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> list[Row]:
        """The modules that stay as they were."""
        return [row for row in self.rows if row.served_by == LEFT]

    def summary(self) -> str:
        """Two lines: how many are served, how many are not and why."""
        served = Counter(row.module for row in self.rows if row.served_by == OURS)
        lines = [f"{sum(served.values())} modules by sdfast: {_counts(served)}"]
        reasons = Counter(f"{row.module}: {row.detail}" for row in self.left)
        if reasons:
            lines.append(f"{sum(reasons.values())} as they were: {_counts(reasons, '; ')}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """A table, one line a module, then the summary and the notes."""
        table = [Row("module", "class", "served by", ""), *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.detail]
            ).rstrip()
            for row in table
        ]
        return "\n".join([*lines, "", self.summary(), *self.notes])


def _counts(counter: Counter[str], separator: str = ", ") -> str:
    return separator.join(f"{count} {name}" for name, count in counter.most_common())
