"""A record as lines for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sdfast.bench.record import Record, Row, of_part

TITLES = {
    "sdfast": "sdfast", "sdfast-low": "sdfast, memory low", "optimized": "sdfast.optimize",
    "sdfast-optimize": "sdfast.optimize", "exact": "sdfast, exact", "eager": "eager",
    "eager-contiguous": "eager, contiguous", "compile": "torch.compile",
    "compile-autotune": "torch.compile, autotuned", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime",
    "diffusers-tiling": "diffusers, tiled",
}  # fmt: skip
PART_TITLES = {"ops": "Operations", "models": "Models", "images": "Images", "training": "Training"}


def milliseconds(ms: float) -> str:
    """Three significant digits: "0.0123", "1.23", "123"."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def interval(ratio: dict[str, float]) -> str:
    """ "2.31x (2.28–2.35)"."""
    return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f}–{ratio['high']:.2f})"


def share(row: Row) -> str:
    """Of a copy's bandwidth where memory limits, else of the multipliers' peak."""
    if "of_copy" in row:
        return f"{row['of_copy']:.0%} of copy"
    return f"{row['of_peak']:.0%} of peak" if "of_peak" in row else ""


def line(row: Row) -> str:
    """A row for the terminal."""
    title = f"{row['name']}, {row['dtype']}: "
    if "failed" in row:
        return f"{title}FAILED: {row['failed']}"
    notes = "".join(
        f"; {TITLES.get(name, name)} skipped: {why}" for name, why in row.get("skipped", {}).items()
    )
    if "sides" not in row:
        return title + notes.removeprefix("; ")
    parts = [
        f"{TITLES.get(name, name)} {milliseconds(row['sides'][name]['ms'])} ms, {interval(ratio)}"
        for name, ratio in row["ratios"].items()
    ]
    ours = f"sdfast {milliseconds(row['sides']['sdfast']['ms'])} ms"
    return title + "; ".join([ours, *parts]) + (f"; {share(row)}" if share(row) else "") + notes


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


SIDE_COLUMNS = (
    "what", "dtype", "engine", "median ms", "p20–p80", "first call", "beside sdfast (95%)", "error",
    "peak memory", "rate",
)  # fmt: skip


def side_rows(rows: Iterable[Row]) -> Iterable[tuple[str, ...]]:
    """A line for each side of each row that was measured."""
    for row in rows:
        for name, side in row.get("sides", {}).items():
            ratio = row["ratios"].get(name)
            memory = f"{side['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in side else ""
            first = milliseconds(side["first_ms"] + 1e3 * side.get("export_seconds", 0))
            yield (
                row["name"], row["dtype"], TITLES.get(name, name), milliseconds(side["ms"]),
                f"{milliseconds(side['p20_ms'])}–{milliseconds(side['p80_ms'])}", first,
                interval(ratio) if ratio else "", f"{side['error']:.1e}", memory,
                share(row) if name == "sdfast" else "",
            )  # fmt: skip


def absent(result: Record) -> list[str]:
    """Who took no part and why, each reason once; what failed; what was left out."""
    found = {
        f"{TITLES.get(name, name)} in {row['part']}, {row['dtype']}: {why}": None
        for row in result["rows"]
        for name, why in row.get("skipped", {}).items()
    }
    failed = [f"FAILED: {row['name']}, {row['dtype']}: {row['failed']}" for row in failures(result)]
    return [*failed, *found, *result["left_out"]]


def failures(result: Record) -> list[Row]:
    """Rows in which our side was wrong, or did not run."""
    return [row for row in [*result["rows"], *result["breakdown"]] if "failed" in row]


def environment_rows(result: Record) -> list[tuple[str, str]]:
    """What the numbers depend on, as names and values."""
    machine: dict[str, Any] = result["environment"]
    memory = machine.get("memory_bytes")
    load = machine.get("load_average")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks = ", ".join(f"{rate:.0f} GFLOP/s {t}" for t, rate in result["limits"]["peak_gflop_per_s"].items())
    pairs = (
        ("command", result["command"]),
        ("commit", machine["commit"]),
        ("date", machine["date"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores ({machine['cpu_capability']})"),
        ("GPU", machine["gpu"]),
        ("memory", f"{memory / 2**30:.0f} GiB" if memory else None),
        ("threads", machine["threads"]),
        ("kernels", machine["kernels"] or "none compiled"),
        ("allocator", machine["allocator"]),
        ("measured limits", f"{peaks}; copy {result['limits']['copy_gb_per_s']:.1f} GB/s"),
        ("versions", f"Python {machine['python']}, {versions}, sdfast {machine['sdfast']}"),
        ("variables", ", ".join(f"{k}={v}" for k, v in machine["variables"].items())),
        ("load before", f"{load:.1f}" if load is not None else None),
    )
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def markdown(result: Record) -> list[str]:
    """The whole record."""
    lines = ["# sdfast beside other engines", ""]
    lines += markdown_table(("", ""), environment_rows(result))
    lines += [
        "",
        "A ratio is the engine's time by sdfast's, the median of neighbours in time with its 95% bootstrap"
        " interval: above 1 sdfast is faster. The first call includes compilation and conversion. Errors are"
        " relative: operations' against fp64, models' and gradients' against eager in fp32, images' the mean"
        " difference of a pixel from eager's.",
    ]
    for part, title in PART_TITLES.items():
        if rows := of_part(result["rows"], part):
            lines += ["", f"## {title}", "", *markdown_table(SIDE_COLUMNS, side_rows(rows))]
    if notes := absent(result):
        lines += ["", "## Not measured", "", *(f"- {note}" for note in notes)]
    return lines
