"""The lines of RESULTS.md on segmentation."""

from __future__ import annotations

from typing import Any

from sdfast.bench.tables import markdown_table

_SETS = {
    "cells": "generated cells, outlines known exactly",
    "coins": "photograph of coins, labels by watershed",
    "ihc": "stained tissue, labels by colour deconvolution and Otsu's threshold",
}


def segmentation_lines(record: dict[str, Any]) -> list[str]:
    """Agreement on pictures that were held out, or time, memory and agreement of a large one."""
    first = record["rows"][0]
    rows: list[tuple[str, ...]] = []
    head = ["pictures", "pixels", "IoU", "Dice", "pixel error"]
    for row in record["rows"]:
        agreement = (f"{row['iou']:.3f}", f"{row['dice']:.3f}", f"{row['pixel_error']:.3f}")
        if "set" in row:
            rows.append((_SETS[row["set"]], f"{row['pixels']}", *agreement))
        else:
            cost = (f"{row['seconds']:.0f} s", f"{row['peak_bytes'] / 1e9:.2f} GB")
            rows.append(("generated cells", f"{row['size']}x{row['size']}", *agreement, *cost))
    if "peak_bytes" in first:
        head += ["time", "memory"]
        note = "Memory is the peak above the weights."
    else:
        note = "Labels made by a method say how well the network learned that method."
    return [
        f"U-Net of 2015, width {first['width']}, {first['depth']} halvings, {first['steps']} training steps;"
        f" load average {record['environment']['load_average']:.1f}.",
        note,
        "",
        *markdown_table(head, rows),
    ]
