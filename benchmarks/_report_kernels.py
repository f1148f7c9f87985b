"""Tables of single kernels beside eager torch, and their summary for the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from sdfast.bench.tables import markdown_table

Row = dict[str, Any]

# Kinds of records whose rows are products, as the README calls them.
PRODUCTS = {"conv2d": "convolutions", "linear": "linear layers", "attention": "attention"}
_MS = ("eager ms", "sdfast ms", "ratio", "p20–p80")


def group_norm_lines(record: Row) -> list[str]:
    """GroupNorm with and without SiLU."""
    return [
        f"Copy bandwidth in the same run: {record['copy_gb_per_s']:.1f} GB/s (128 MiB).",
        "",
        *markdown_table(("work", "shape", "dtype", *_MS, "GB/s", "of copy"), _group_norm_rows(record)),
    ]


def products_lines(record: Row) -> list[str]:
    """Linear layers, attention."""
    head = ("shape", "", "dtype", *_MS, "eager GFLOP/s", "GFLOP/s", "of peak")
    return markdown_table(head, _product_rows(record))


def conv2d_lines(record: Row) -> list[str]:
    """Convolutions."""
    return [
        "Rates count the direct algorithm's operations; Winograd does a quarter of them.",
        "",
        *products_lines(record),
    ]


def bandwidth_lines(record: Row) -> list[str]:
    """LayerNorm, the diffusion step."""
    head = ("shape", "work", "dtype", *_MS, "GB/s", "of copy")
    return markdown_table(head, _bandwidth_rows(record))


def _group_norm_rows(record: Row) -> Iterator[Sequence[object]]:
    for row in record["rows"]:
        name = "GroupNorm + SiLU" if row["silu"] else "GroupNorm"
        yield (
            name + (", forward and backward" if row["training"] else ""), row["shape"], row["dtype"],
            f"{row['eager_ms']:.3f}", f"{row['sdfast_ms']:.3f}", f"{row['ratio']:.2f}x",
            f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}", f"{row['gb_per_s']:.1f}",
            f"{row['of_copy']:.0%}",
        )  # fmt: skip


def _product_rows(record: Row) -> Iterator[Sequence[object]]:
    """conv2d, linear, attention: rates and shares of the peak."""
    for row in record["rows"]:
        details = [row[key] for key in ("kernel", "activation") if row.get(key)]
        flags = [key for key in ("upsample", "residual", "is_causal", "training") if row.get(key)]
        yield (
            row["shape"], ", ".join(map(str, details + flags)), row["dtype"],
            f"{row['eager_ms']:.2f}", f"{row['sdfast_ms']:.2f}", f"{row['ratio']:.2f}x",
            f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}", f"{row['eager_gflop_per_s']:.0f}",
            f"{row['gflop_per_s']:.0f}", f"{row['of_peak']:.0%}",
        )  # fmt: skip


def _bandwidth_rows(record: Row) -> Iterator[Sequence[object]]:
    """layer_norm, diffusion_step: rates and shares of a copy's."""
    for row in record["rows"]:
        work = row.get("work") or ("forward and backward" if row.get("training") else "forward")
        yield (
            row["shape"], work, row["dtype"], f"{row['eager_ms']:.3f}", f"{row['sdfast_ms']:.3f}",
            f"{row['ratio']:.2f}x", f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}",
            f"{row['gb_per_s']:.1f}", f"{row['of_copy']:.0%}",
        )  # fmt: skip


def _products_summary(kind: str, record: Row) -> Iterator[Sequence[object]]:
    """For the README: the ratios of each dtype."""
    for dtype in ("float32", "bfloat16"):
        ratios = [row["ratio"] for row in record["rows"] if row["dtype"] == dtype]
        yield (
            kind, dtype, len(ratios), f"{min(ratios):.2f}x", f"**{statistics.median(ratios):.2f}x**",
            f"{max(ratios):.2f}x",
        )  # fmt: skip


def _group_norm_summary(record: Row) -> Iterator[Sequence[object]]:
    """For the README: the ratios of each model and dtype."""
    for model in ("U-Net", "VAE", "training"):
        for dtype in ("float32", "bfloat16"):
            rows = [r for r in record["rows"] if (r["model"], r["dtype"], r["silu"]) == (model, dtype, True)]
            ratios = [r["ratio"] for r in rows]
            work = f"all of the {model}" if model != "training" else "forward and backward"
            yield (
                f"GroupNorm + SiLU, {work}", dtype, len(rows), f"{min(ratios):.2f}x",
                f"**{statistics.median(ratios):.2f}x**", f"{max(ratios):.2f}x",
            )  # fmt: skip


def kernel_summaries(records: dict[str, Row], device: str) -> list[Sequence[object]]:
    """The kernels recorded on a device, a line for each dtype."""
    rows: list[Sequence[object]] = []
    for kind, title in PRODUCTS.items():
        if record := records.get(f"{device}/{kind}.json"):
            rows += _products_summary(title, record)
    if record := records.get(f"{device}/group_norm.json"):
        rows += _group_norm_summary(record)
    return rows
