"""A row of a record before it is measured, so that a run knows what it has and what is left to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sdfast.bench.record import Row, error_text


@dataclasses.dataclass(frozen=True)
class Planned:
    """
    Args:
        row: what identifies it (`record.key`).
        measure: gives the rest. AssertionError, RuntimeError, ValueError: a side failed, or was wrong.
    """

    row: Row
    measure: Callable[[], Row]

    def measured(self) -> Row:
        """The whole row, now; where it fails, why: one fault hides no other's time."""
        try:
            return {**self.row, **self.measure()}
        except (AssertionError, RuntimeError, ValueError) as error:
            return {**self.row, "failed": error_text(error)}
