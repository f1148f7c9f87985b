"""Writes RESULTS.md, and the table at the top of README.md, from the recorded JSON files.

    python benchmarks/report.py [--check]

With --check nothing is written, and a file that differs is an error. No number enters either by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _report_bench import expand
from _report_gpu import cuda_code_lines, goals_lines, gpu_models_lines, operations_lines, traffic_lines
from _report_models import models_rows, models_table, peers_lines, profile_lines, tiled_vae_lines
from _report_segmentation import segmentation_lines

from sdfast.bench.tables import markdown_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_BEGIN, _END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
_GPU_BEGIN, _GPU_END = "<!-- gpu: written by benchmarks/report.py -->", "<!-- end of gpu -->"

_ORDER = (
    "models", "peers", "tiled_vae", "training", "profile", "conv2d", "linear", "attention", "group_norm",
    "layer_norm", "diffusion_step", "digits_quality", "segmentation", "segmentation_large", "operations",
    "gpu_models",
)  # fmt: skip

_PRODUCTS = {"conv2d": "convolutions", "linear": "linear layers", "attention": "attention"}
_HEADINGS = {
    "peers": "models beside other engines", "profile": "a profile of one step", "gpu_models": "models",
    "tiled_vae": "large images through the VAE", "segmentation_large": "segmentation of a large picture",
}  # fmt: skip
_TRAFFIC = HERE / "results/triton_traffic.json"
_CUDA_CODE = HERE / "results/cuda_code.json"

Row = dict[str, Any]


def provenance(name: str, record: Row) -> str:
    """Where a table's numbers come from."""
    machine = record["environment"]
    name = record.get("file", name)
    if "card" in record:
        return (
            f"`{record['command']}`, {machine['gpu']}, commit {machine['commit']}, {machine['date'][:10]};"
            f" [{name}](results/{name})."
        )
    return (
        f"`{record['command']}`, {machine['cpu']} with {machine['threads']} threads"
        f" ({machine['cpu_capability']}), torch {machine['torch']}, commit {machine['commit']},"
        f" {machine['date'][:10]}; [{name}](results/{name})."
    )


def _model_rows(records: dict[str, Row], device: str) -> Row:
    """The record of inference with the rows of training after its own."""
    training = records.get(f"{device}/training.json", {"rows": []})
    record = records[f"{device}/models.json"]
    return {**record, "rows": [*record["rows"], *training["rows"]]}


def group_norm_rows(record: Row) -> Iterator[Sequence[object]]:
    for row in record["rows"]:
        name = "GroupNorm + SiLU" if row["silu"] else "GroupNorm"
        yield (
            name + (", forward and backward" if row["training"] else ""), row["shape"], row["dtype"],
            f"{row['eager_ms']:.3f}", f"{row['sdfast_ms']:.3f}", f"{row['ratio']:.2f}x",
            f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}", f"{row['gb_per_s']:.1f}",
            f"{row['of_copy']:.0%}",
        )  # fmt: skip


def product_rows(record: Row) -> Iterator[Sequence[object]]:
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


def bandwidth_rows(record: Row) -> Iterator[Sequence[object]]:
    """layer_norm, diffusion_step: rates and shares of a copy's."""
    for row in record["rows"]:
        work = row.get("work") or ("forward and backward" if row.get("training") else "forward")
        yield (
            row["shape"], work, row["dtype"], f"{row['eager_ms']:.3f}", f"{row['sdfast_ms']:.3f}",
            f"{row['ratio']:.2f}x", f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}",
            f"{row['gb_per_s']:.1f}", f"{row['of_copy']:.0%}",
        )  # fmt: skip


def products_summary(kind: str, record: Row) -> Iterator[Sequence[object]]:
    """For the README: the ratios of each dtype."""
    for dtype in ("float32", "bfloat16"):
        ratios = [row["ratio"] for row in record["rows"] if row["dtype"] == dtype]
        yield (
            kind, dtype, len(ratios), f"{min(ratios):.2f}x", f"**{statistics.median(ratios):.2f}x**",
            f"{max(ratios):.2f}x",
        )  # fmt: skip


def group_norm_summary(record: Row) -> Iterator[Sequence[object]]:
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


def results_md(records: dict[str, Row]) -> list[str]:
    """RESULTS.md, device by device."""
    lines = [
        "# Recorded results",
        "",
        "Written by `python benchmarks/report.py` from the JSON files beside it. Every benchmark checks its",
        "result before it times it; both sides take turns in one process; times are medians, ratios are",
        "medians of neighbours in time. A command is that of the commit beside it; `make bench` measures",
        f"anew. {_gpu_line(records)}",
    ]
    for name, record in records.items():
        device, kind = name.removesuffix(".json").split("/")
        lines += ["", f"## {_HEADINGS.get(kind, kind)} on {device}", "", provenance(name, record), ""]
        if kind in ("models", "training"):
            lines += markdown_table(
                ("work", "dtype", "diffusers, eager", "sdfast", "ratio"), models_rows(record)
            )
        elif kind == "peers":
            lines += peers_lines(record)
        elif kind == "tiled_vae":
            lines += tiled_vae_lines(record)
        elif kind == "profile":
            lines += profile_lines(record)
        elif kind == "group_norm":
            head = ("work", "shape", "dtype", "eager ms", "sdfast ms", "ratio", "p20–p80", "GB/s", "of copy")
            lines += [f"Copy bandwidth in the same run: {record['copy_gb_per_s']:.1f} GB/s (128 MiB).", ""]
            lines += markdown_table(head, group_norm_rows(record))
        elif kind in _PRODUCTS:
            head = (
                "shape",
                "",
                "dtype",
                "eager ms",
                "sdfast ms",
                "ratio",
                "p20–p80",
                "eager GFLOP/s",
                "GFLOP/s",
            )
            if kind == "conv2d":
                lines += [
                    "Rates count the direct algorithm's operations; Winograd does a quarter of them.",
                    "",
                ]
            lines += markdown_table((*head, "of peak"), product_rows(record))
        elif kind in ("layer_norm", "diffusion_step"):
            head = ("shape", "work", "dtype", "eager ms", "sdfast ms", "ratio", "p20–p80", "GB/s", "of copy")
            lines += markdown_table(head, bandwidth_rows(record))
        elif kind == "digits_quality":
            lines += quality(record)
        elif kind.startswith("segmentation"):
            lines += segmentation_lines(record)
        elif kind == "operations":
            lines += operations_lines(record)
        elif kind == "gpu_models":
            lines += gpu_models_lines(record)
    lines += goals_lines([r for name, r in records.items() if name.endswith("/gpu_models.json")])
    if _CUDA_CODE.exists():
        lines += cuda_code_lines(json.loads(_CUDA_CODE.read_text()))
    if _TRAFFIC.exists():
        lines += traffic_lines(json.loads(_TRAFFIC.read_text()))
    return lines


def _gpu_line(records: dict[str, Row]) -> str:
    """When kernels last ran on which GPU."""
    runs: dict[str, str] = {}
    for record in records.values():
        if "card" in record:
            machine = record["environment"]
            runs[machine["gpu"]] = max(machine["date"][:10], runs.get(machine["gpu"], ""))
    if not runs:
        return "No kernel has run on a GPU yet, and nothing here was measured on one."
    return f"Last run on a GPU: {', '.join(f'{gpu}, {date}' for gpu, date in runs.items())}."


def quality(record: Row) -> list[str]:
    """The digits: how many are read as asked."""
    training = record["training"]
    lines = [
        f"Real digits that were held out: {record['real']['accuracy']:.1%} read as labelled. The model was"
        f" trained in {training['seconds'] / 60:.0f} minutes (`{training['command']}`). Spread: the standard"
        " deviation of a pixel among pictures of one digit.",
        "",
    ]
    rows = [
        (
            f"guidance {r['guidance_scale']}, {r['steps']} steps",
            r["images"],
            f"{r['accuracy']:.1%}",
            f"{r['spread']:.3f}",
        )
        for r in record["rows"]
    ]  # fmt: skip
    rows.append(("real", "", f"{record['real']['accuracy']:.1%}", f"{record['real']['spread']:.3f}"))
    return lines + markdown_table(("pictures", "count", "read as asked", "spread"), rows)


def kernel_summaries(records: dict[str, Row], device: str) -> list[Sequence[object]]:
    """The kernels recorded on a device, a line for each dtype."""
    rows: list[Sequence[object]] = []
    for kind, title in _PRODUCTS.items():
        if record := records.get(f"{device}/{kind}.json"):
            rows += products_summary(title, record)
    if record := records.get(f"{device}/group_norm.json"):
        rows += group_norm_summary(record)
    return rows


def readme_block(records: dict[str, Row]) -> list[str]:
    """The README's tables, device by device: whole models, the kernel, the shipped model."""
    lines: list[str] = []
    for name, record in records.items():
        machine, device = record["environment"], name.split("/")[0]
        if name.endswith("/models.json"):
            lines += [
                "",
                f"Measured on {machine['cpu']}, {machine['threads']} threads ({machine['cpu_capability']}),"
                f" torch {machine['torch']}, beside eager torch in its faster memory format:",
                "",
                *models_table(_model_rows(records, device), records.get(f"{device}/peers.json")),
            ]
            kernels = kernel_summaries(records, device)
            if kernels:
                head = ("kernel beside eager", "dtype", "shapes", "slowest", "median", "fastest")
                lines += ["", *markdown_table(head, kernels)]
        elif name.endswith("/digits_quality.json"):
            first = record["rows"][0]
            lines += [
                "",
                f"Of {first['images']} digits drawn by the shipped model, a classifier trained on real ones"
                f" reads {first['accuracy']:.1%} as the digit asked for.",
            ]
    return [*lines[1:]]


def read_records(results: Path) -> dict[str, Row]:
    """Every record by device and kind. What `sdfast bench` recorded replaces what was recorded before it."""
    records: dict[str, Row] = {}
    for path in results.glob("*/*.json"):
        if path.name != "bench.json":
            records[f"{path.parent.name}/{path.name}"] = json.loads(path.read_text())
    for path in results.glob("*/bench.json"):
        records |= expand(path.parent.name, json.loads(path.read_text()))
    return dict(sorted(records.items(), key=_place))


def _place(item: tuple[str, Row]) -> tuple[str, int]:
    device, file = item[0].split("/")
    return device, _ORDER.index(file.removesuffix(".json"))


def written(records: dict[str, Row]) -> dict[Path, str]:
    """Both files' texts."""
    text = between(_BEGIN, _END, readme_block(records), README.read_text())
    text = between(_GPU_BEGIN, _GPU_END, [f"**{_gpu_line(records)}**"], text)
    return {HERE / "RESULTS.md": "\n".join(results_md(records)) + "\n", README: text}


def main() -> None:
    """Rewrite both files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a file differs, and write nothing")
    check = parser.parse_args().check
    stale = []
    for path, text in written(read_records(HERE / "results")).items():
        if path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    if check and stale:
        sys.exit(f"{' and '.join(stale)}: not what the records say; run python benchmarks/report.py")


def between(begin: str, end: str, lines: Sequence[str], text: str) -> str:
    """`text` with these lines between two markers."""
    block = "\n".join([begin, *lines, end])
    return re.sub(f"{begin}.*?{end}", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
