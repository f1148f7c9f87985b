"""The tables of whole models: beside eager, beside other engines, and by operation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from sdfast.bench.tables import markdown_table
from sdfast.bench.training import LARGEST_FP32_ERROR

Row = dict[str, Any]
TITLES = {
    "eager": "eager",
    "eager-contiguous": "eager, contiguous",
    "compile": "torch.compile",
    "compile-autotune": "torch.compile, autotuned",
    "diffusers-tiling": "diffusers, tiled",
    "sdfast-low": "sdfast, memory low",
    "sdfast-optimize": "sdfast.optimize",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
}


def models_lines(record: Row) -> list[str]:
    """Whole models, or their training, beside eager."""
    return markdown_table(("work", "dtype", "diffusers, eager", "sdfast", "ratio"), _models_rows(record))


def _models_rows(record: Row) -> Iterator[tuple[object, ...]]:
    for row in record["rows"]:
        yield (
            row["work"], row["dtype"], f"{row['best_eager_ms']:.0f} ms ({row['eager_layout']})",
            f"{row['sdfast_ms']:.0f} ms", f"**{row['ratio']:.2f}x**",
        )  # fmt: skip


def models_table(record: Row, peers: Row | None) -> list[str]:
    """The README's: beside eager, and the ratio to OpenVINO where that was recorded."""
    head: tuple[str, ...] = ("work", "dtype", "eager", "sdfast", "speed")
    rows = list(_models_rows(record))
    ratios = {
        (row["work"], row["dtype"]): f"{row['peers']['openvino']['ratio']:.2f}x"
        for row in (peers["rows"] if peers else ())
        if "openvino" in row["peers"]
    }
    if ratios:
        head = (*head, "beside OpenVINO")
        rows = [(*row, ratios.get((row[0], row[1]), "")) for row in rows]
    return markdown_table(head, rows)


def peers_lines(record: Row) -> list[str]:
    """Times and ratios, then what else an engine costs, then who is missing and why."""
    names = [name for name in TITLES if any(name in row["peers"] for row in record["rows"])]
    times, costs, memory, absent = [], [], [], {}
    for row in record["rows"]:
        cells = [
            f"{row['peers'][name]['ms']:.0f} ms, {row['peers'][name]['ratio']:.2f}x"
            if name in row["peers"]
            else ""
            for name in names
        ]
        times.append((row["work"], row["dtype"], *cells, f"{row['sdfast']['ms']:.0f} ms"))
        for name, engine in (*row["peers"].items(), ("sdfast", row["sdfast"])):
            costs.append((row["work"], row["dtype"], TITLES.get(name, name), *_costs(engine)))
        weights, packed = (
            f"{size / 2**30:.1f}" for size in (row["weight_bytes"], row["sdfast"]["packed_bytes"])
        )
        memory.append(f"{row['work']}, {row['dtype']}: {weights} GiB, packed {packed} GiB")
        for name, reason in row["skipped"].items():
            absent[f"{TITLES[name]}, {row['dtype']}: {reason}"] = None
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        "Every engine in a process of its own; a ratio is its time by ours, of neighbours in time.",
        f"Inductor has its weights frozen, OpenVINO its shapes static and its precision pinned. {versions}.",
        "",
        *markdown_table(("work", "dtype", *(TITLES[name] for name in names), "sdfast"), times),
        "",
        "Error against eager in fp32; memory at its peak from having the weights on, Python and torch",
        "included; time from having the weights to the first result, conversion and compilation included.",
        "",
        *markdown_table(("work", "dtype", "engine", "error", "peak memory", "first result after"), costs),
        "",
        f"Weights, and the copies of them that sdfast packs: {'; '.join(memory)}.",
        *(["", *(f"- Not measured: {line}." for line in absent)] if absent else []),
    ]


def _costs(engine: Row) -> tuple[str, str, str]:
    seconds = engine["ready_seconds"] + engine.get("export_seconds", 0)
    return f"{engine['error']:.1e}", f"{engine['peak_bytes'] / 2**30:.1f} GiB", f"{seconds:.0f} s"


_TILED_SIDES = {
    "eager": "diffusers, whole image",
    "whole": "sdfast, whole image",
    "bands": "sdfast, bands",
    "tiling": "diffusers, `enable_tiling()`",
}


def zoo_lines(record: Row) -> list[str]:
    """Each model, dtype, size and batch of `bench_zoo.py`; above it what the added line costs."""
    rows = record["rows"]
    lines = [
        "Steps of `sdfast.optimize`d models of diffusers' beside the same models as they were, in the memory",
        "format that is faster for them; the interval is of the median ratio, 95%.",
        "",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        first = [_first(rows, model, dtype) for model in ("sd15", "vae")]
        if all(first):
            seconds = sum(r["optimize_seconds"] + _extra_seconds(r) for r in first if r)
            lines += [
                f"SD 1.5's U-Net and VAE in {dtype}: `optimize` and what the first call of each takes longer",
                f"than the next cost {seconds:.1f} s.",
                "",
            ]
    head = (
        "model",
        "dtype",
        "batch and size",
        "eager ms",
        "sdfast ms",
        "ratio",
        "interval",
        "error",
        "eager's",
    )
    return lines + markdown_table(head, (
        (
            row["title"], row["dtype"], f"{row['batch']}x{row['size']}x{row['size']}",
            f"{row['eager']['ms']:.0f} ({row['eager']['format'].removesuffix('_format')})",
            f"{row['sdfast']['ms']:.0f}", f"**{row['ratio']:.2f}x**", f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['sdfast']['error']:.1e}", f"{row['eager']['error']:.1e}" if row["eager"]["error"] else "",
        )
        for row in rows
    ))  # fmt: skip


def zoo_sentence(record: Row) -> str:
    """For the README: from the slowest to the fastest row."""
    rows, machine = record["rows"], record["environment"]
    ratios = sorted(row["ratio"] for row in rows)
    titles = ", ".join(dict.fromkeys(row["title"] for row in rows))
    return (
        f"Under diffusers' own models (`sdfast.optimize`; {titles}; two sizes, batches of 1 and 4, fp32 and"
        f" bf16) on {machine['cpu']}, {machine['threads']} threads: {ratios[0]:.2f} to {ratios[-1]:.2f} times"
        f" as fast as eager torch, {statistics.median(ratios):.2f} in the median of {len(rows)}."
    )


def _first(rows: list[Row], model: str, dtype: str) -> Row | None:
    return next((row for row in rows if (row["model"], row["dtype"]) == (model, dtype)), None)


def _extra_seconds(row: Row) -> float:
    return max(0.0, row["first_call_seconds"] - row["sdfast"]["ms"] / 1e3)


def tiled_vae_lines(record: Row) -> list[str]:
    """Time, memory and difference of each side, size by size."""
    rows = []
    for row in record["rows"]:
        budget = f", within {row['budget_bytes'] / 1e9:.1f} GB" if row["budget_bytes"] else ""
        is_reference = row["side"] == row["reference"]
        differences = ("", "") if is_reference else (f"{row['most_difference']:.1e}", f"{row['error']:.1e}")
        rows.append((
            f"{row['size']}x{row['size']}", _TILED_SIDES[row["side"]] + budget, f"{row['seconds']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB", *differences,
        ))  # fmt: skip
    return [
        "Stable Diffusion's decoder, fp32, random weights; a latent whose noise grows from top to bottom.",
        "Memory is the peak above the weights and what a process has loaded; differences are to diffusers'",
        "whole image, or to our bands where that was not decoded.",
        "",
        *markdown_table(("image", "", "time", "memory", "largest difference", "relative error"), rows),
    ]


def profile_lines(record: Row) -> list[str]:
    """A table a model and dtype."""
    lines = [
        "One call after the first. Rates count the direct algorithms' operations, so that Winograd's are",
        'effective ones and may exceed the peak; "other" are the operations below a percent.',
    ]
    for row in record["rows"]:
        lines += [
            "",
            f"{row['work']}, {row['dtype']}: {row['step_ms']:.0f} ms, {row['gflop'] / 1e3:.2f} TFLOP,"
            f" {row['gflop_per_s']:.0f} GFLOP/s; the peak is {row['peak_gflop_per_s']:.0f}.",
            "",
            *markdown_table(
                ("operation", "calls", "ms", "share", "GFLOP", "GFLOP/s", "of peak"),
                (
                    (
                        f"`{op['operation']}`" if "::" in op["operation"] else op["operation"],
                        op["calls"] or "", f"{op['ms']:.0f}", f"{op['share']:.1%}", *_rates(op),
                    )
                    for op in row["operations"]
                ),
            ),
        ]  # fmt: skip
    return lines


def _rates(operation: Row) -> tuple[str, str, str]:
    if "gflop" not in operation:
        return "", "", ""
    return (
        f"{operation['gflop']:.0f}", f"{operation['gflop_per_s']:.0f}", f"{operation['of_peak']:.0%}"
    )  # fmt: skip


def training_memory_lines(record: Row) -> list[str]:
    """Memory and time of a step of each side."""
    names = {"eager": "eager", "compile": "torch.compile", "sdfast": "sdfast"}
    rows = [
        (
            names[row["side"]], f"{row['peak_bytes'] / 1e9:.2f} GB", f"{row['seconds']:.2f} s",
            f"{row['first_seconds']:.1f} s", f"{row['error']:.1e}" if row["error"] else "",
            f"{row['wrong']} of {row['gradients']}" if row["wrong"] else "none",
        )
        for row in record["rows"]
    ]  # fmt: skip
    return [
        "Forward and backward of SD 1.5's U-Net, batch 2 of 256x256 images, fp32, each side in a process of",
        "its own. Memory is the peak above the weights, gradients included; the weights are"
        f" {record['rows'][0]['weight_bytes'] / 1e9:.2f} GB. A gradient is wrong that is more than",
        f"{LARGEST_FP32_ERROR:.0e} from eager's, in norm.",
        "",
        *markdown_table(
            ("", "memory", "a step", "the first", "largest error of a gradient", "wrong ones"), rows
        ),
    ]


def build_lines(record: Row) -> list[str]:
    """The wheels of `bench_build.py`."""
    head = ("`SDFAST_CUDA_ARCHS`", "wheel", "size", "time")
    return markdown_table(head, map(_build_row, record["rows"]))


def _build_row(row: Row) -> Sequence[object]:
    """One wheel of `bench_build.py`."""
    archs = f"`{row['archs']}`" if row["archs"] else "none"
    return archs, f"`{row['wheel']}`", f"{row['bytes'] / 1e6:.1f} MB", f"{row['seconds'] / 60:.1f} min"
