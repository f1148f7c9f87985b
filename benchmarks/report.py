"""Writes RESULTS.md, and the table at the top of README.md, from the recorded JSON files.

    python benchmarks/report.py [--check]

With --check nothing is written, and a file that differs is an error. No number enters either by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _report_bench import expand
from _report_gpu import (
    cuda_code_lines,
    goals_lines,
    gpu_models_lines,
    gpu_readme_lines,
    operations_lines,
    traffic_lines,
)
from _report_gpu_calls import calls_lines, checks_lines, clocks_lines, tiles_lines
from _report_kernels import bandwidth_lines, conv2d_lines, group_norm_lines, kernel_summaries, products_lines
from _report_models import (
    build_lines,
    models_lines,
    models_table,
    peers_lines,
    profile_lines,
    tiled_vae_lines,
    training_memory_lines,
    zoo_lines,
    zoo_sentence,
)
from _report_quality import digits_lines, inpainting_lines, lora_lines, train_ldm_lines
from _report_seed import seed_lines
from _report_segmentation import segmentation_lines
from _report_vae import vae_digits_lines

from sdfast.bench.tables import markdown_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_BEGIN, _END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
_SEED_BEGIN, _SEED_END = "<!-- seed: written by benchmarks/report.py -->", "<!-- end of seed -->"
_GPU_BEGIN, _GPU_END = "<!-- gpu: written by benchmarks/report.py -->", "<!-- end of gpu -->"

Row = dict[str, Any]

# By kind of record, in the order of RESULTS.md: the heading, and what makes lines of a record.
_SECTIONS: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
    "models": ("models", models_lines),
    "peers": ("models beside other engines", peers_lines),
    "zoo": ("diffusers' models, optimized", zoo_lines),
    "tiled_vae": ("large images through the VAE", tiled_vae_lines),
    "training": ("training", models_lines),
    "training_memory": ("memory of a training step", training_memory_lines),
    "profile": ("a profile of one step", profile_lines),
    "conv2d": ("conv2d", conv2d_lines),
    "linear": ("linear", products_lines),
    "attention": ("attention", products_lines),
    "group_norm": ("group_norm", group_norm_lines),
    "layer_norm": ("layer_norm", bandwidth_lines),
    "diffusion_step": ("diffusion_step", bandwidth_lines),
    "digits_quality": ("digits_quality", digits_lines),
    "inpainting": ("inpainting with the shipped model", inpainting_lines),
    "lora": ("LoRA", lora_lines),
    "train_ldm": ("gradients of `train ldm`", train_ldm_lines),
    "segmentation": ("segmentation", segmentation_lines),
    "segmentation_large": ("segmentation of a large picture", segmentation_lines),
    "vae_digits": ("VAEs and the bound, of digits", vae_digits_lines),
    "operations": ("operations", operations_lines),
    "gpu_models": ("models", gpu_models_lines),
    "gpu_models-first": ("models, when torch still served what names no backend", gpu_models_lines),
    "calls": ("the models' calls by backend", calls_lines),
    "tiles": ("convolutions and products on Hopper's own units, by tile", tiles_lines),
    "clocks": ("where the time of a tile goes", clocks_lines),
    "checks": ("tests and compute-sanitizer", checks_lines),
    "build": ("wheels", build_lines),
}
_TRAFFIC = HERE / "results/triton_traffic.json"
_CUDA_CODE = HERE / "results/cuda_code.json"


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
        f" ({_capability(machine)}), torch {machine['torch']}, commit {machine['commit']},"
        f" {machine['date'][:10]}; [{name}](results/{name})."
    )


def _model_rows(records: dict[str, Row], device: str) -> Row:
    """The record of inference with the rows of training after its own."""
    training = records.get(f"{device}/training.json", {"rows": []})
    record = records[f"{device}/models.json"]
    return {**record, "rows": [*record["rows"], *training["rows"]]}


def results_md(records: dict[str, Row]) -> list[str]:
    """RESULTS.md, kind by kind."""
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
        lines += ["", f"## {_SECTIONS[kind][0]} on {device}", "", provenance(name, record), ""]
        lines += _SECTIONS[kind][1](record)
        lines += [line for failure in record.get("failed", ()) for line in ("", f"Failed: {failure}.")]
    lines += goals_lines(gpu_models(records))
    if _CUDA_CODE.exists():
        lines += cuda_code_lines(json.loads(_CUDA_CODE.read_text()))
    if _TRAFFIC.exists():
        lines += traffic_lines(json.loads(_TRAFFIC.read_text()))
    return lines


def gpu_models(records: dict[str, Row]) -> list[Row]:
    """Records of whole models on GPUs, the last first."""
    found = [record for name, record in records.items() if "/gpu_models" in name]
    return sorted(found, key=lambda record: record["environment"]["date"], reverse=True)


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


def readme_block(records: dict[str, Row]) -> list[str]:
    """The README's tables: whole models on each device, kernels on the last measured, the shipped model."""
    lines: list[str] = []
    machines = {
        name.split("/")[0]: record["environment"]
        for name, record in records.items() if name.endswith("/models.json")
    }  # fmt: skip
    devices = sorted(machines, key=lambda device: machines[device]["date"], reverse=True)
    for device in devices:
        record, machine = _model_rows(records, device), machines[device]
        lines += [
            "",
            f"Measured on {machine['date'][:10]} at commit {machine['commit']} on {_cpu(record)},"
            " beside eager torch in its faster memory format:",
            "",
            *models_table(record, records.get(f"{device}/peers.json")),
        ]
    for device in devices:  # the last on which kernels were measured
        if kernels := kernel_summaries(records, device):
            head = ("kernel beside eager", "dtype", "shapes", "slowest", "median", "fastest")
            where = f"Its kernels on {_cpu(records[f'{device}/models.json'])}:"
            lines += ["", *([where, ""] if len(devices) > 1 else []), *markdown_table(head, kernels)]
            break
    for name, record in records.items():
        if name.endswith("/zoo.json"):
            lines += ["", zoo_sentence(record)]
        elif name.endswith("/digits_quality.json"):
            first = record["rows"][0]
            lines += [
                "",
                f"Of {first['images']} digits drawn by the shipped model, a classifier trained on real ones"
                f" reads {first['accuracy']:.1%} as the digit asked for.",
            ]
    return [*lines[1:]]


def _cpu(record: Row) -> str:
    """CPU, threads and torch of a record."""
    machine = record["environment"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads ({_capability(machine)}), torch {machine['torch']}"
    )


def _capability(machine: Row) -> str:
    """The instruction set as torch names it, which leaves AMX out."""
    return machine["cpu_capability"] + (" and AMX" if machine.get("kernels") == "avx512_amx" else "")


def read_records(results: Path) -> dict[str, Row]:
    """Every record by device and kind, of what was measured again the later.

    The file of `sdfast bench` is bench.json, of some of its parts, measured again later, bench-PARTS.json.
    """
    records: dict[str, Row] = {}
    benches: list[tuple[Path, Row]] = []
    for path in results.glob("*/*.json"):
        record = json.loads(path.read_text())
        if path.name.startswith("bench"):
            benches.append((path, record))
        else:
            records[f"{path.parent.name}/{path.name}"] = record
    for path, record in sorted(benches, key=lambda item: item[1]["environment"]["date"]):
        records |= expand(f"{path.parent.name}/{path.name}", record)
    return dict(sorted(records.items(), key=_place))


def _place(item: tuple[str, Row]) -> tuple[int, str]:
    device, file = item[0].split("/")
    return list(_SECTIONS).index(file.removesuffix(".json")), device


def written(records: dict[str, Row]) -> dict[Path, str]:
    """Both files' texts."""
    text = between(_BEGIN, _END, readme_block(records), README.read_text())
    text = between(_SEED_BEGIN, _SEED_END, seed_lines(records), text)
    gpu = [f"**{_gpu_line(records)}**", *gpu_readme_lines(gpu_models(records))]
    text = between(_GPU_BEGIN, _GPU_END, gpu, text)
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
