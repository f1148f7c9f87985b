"""The tables of GPUs: operations, whole models and their profiles, and what the kernels move, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sdfast.bench.tables import markdown_table

Row = dict[str, Any]


# What a step is to take on one H200, in ms, and what it might: by the titles of _gpu_works.
GOALS = {
    "SD 1.5 U-Net, guided step, 512x512": (4.5, 3.3),
    "SDXL U-Net, guided step, 1024x1024": (28, 24),
    "VAE decode to 512x512": (5, 4),
    "VAE decode to 1024x1024": (20, 16),
    "SD 1.5 U-Net, training step, 8 images of 512x512, bf16 weights": (53, 40),
}


def _merged(record: Row) -> dict[str, Row]:
    """By work all sides of a record; of a side that it has twice the later, beside torch.compile."""
    works: dict[str, Row] = {}
    for row in record["rows"]:
        timed = {name: side for name, side in row["sides"].items() if "ms" in side}
        works.setdefault(row["work"], {}).update(timed)
    return works


def _named(side: str, record: Row) -> str:
    """A side, torch.compile with its mode."""
    if side != "compiled":
        return side
    return f"torch.compile, {record.get('compile_mode', 'max-autotune')}"


def goals_lines(records: Iterable[Row]) -> list[str]:
    """A line for each goal and each record that has its work, or one that says that none has."""

    def ms(sides: Row, *names: str) -> str:
        times = [sides[name]["ms"] for name in names if name in sides]
        return f"{min(times):.2f} ms" if times else "not measured"

    def compiled(record: Row, sides: Row) -> str:
        mode = f" ({record['compile_mode']})" if "compile_mode" in record and "compiled" in sides else ""
        return ms(sides, "compiled") + mode

    rows = []
    for work, (goal, stretch) in GOALS.items():
        measured = [
            (record["environment"]["gpu"], compiled(record, sides), ms(sides, "sdfast", "sdfast triton"))
            for record in records
            if (sides := _merged(record).get(work))
        ]
        for cells in measured or [("", "not measured", "not measured")]:
            rows.append((work, *cells, f"{goal} ms", f"{stretch} ms"))
    head = ("work, bf16", "GPU", "torch.compile", "sdfast", "goal, H200", "stretch, H200")
    return ["", "## Goals on one GPU", "", *markdown_table(head, rows)]


def gpu_readme_lines(records: Iterable[Row]) -> list[str]:
    """Of each work the best of ours beside the best of the others, by the last record that has both.

    What is no default, and what was sampled once, says so.
    """
    rows: dict[str, tuple[object, ...]] = {}
    for record in records:
        for work, sides in _merged(record).items():
            ours = [name for name, side in sides.items() if "ratio" in side]
            if not ours or work in rows:
                continue
            best = min(ours, key=lambda name: sides[name]["ms"])
            side = sides[best]
            beside = sides[side["beside"]]
            remarks = [best.removeprefix("sdfast ")] if best != "sdfast" else []
            remarks += ["one sample"] if side["samples"] == 1 else []
            more = f" ({', '.join(remarks)})" if remarks else ""
            rows[work] = (
                work, f"{beside['ms']:.2f} ({_named(side['beside'], record)})", f"{side['ms']:.2f}{more}",
                f"**{side['ratio']:.2f}x**", f"{side['peak_bytes'] / beside['peak_bytes']:.2f}x",
                record["environment"]["commit"],
            )  # fmt: skip
    if not rows:
        return []
    head = ("work, bf16", "best other, ms", "sdfast, ms", "faster", "peak memory", "commit")
    return ["", *markdown_table(head, rows.values())]


def card_line(record: Row) -> str:
    """What the times depend on beside the commit."""
    ceilings = record["ceilings"]
    clocks = record["card"].get("clocks.max.sm")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return (
        f"In the same run a copy moved {ceilings['copy_gb_per_s']:.0f} GB/s, a matrix product"
        f" {ceilings['matrix_tflop_per_s']:.0f} TFLOP/s"
        + (f"; at most {clocks} MHz, driver {record['card']['driver_version']}" if clocks else "")
        + f". {versions}."
    )


def operations_lines(record: Row) -> list[str]:
    """Each beside eager and compiled torch; then what was not measured."""
    measured = [row for row in record["rows"] if "ratio" in row]
    rows = (
        (
            row["op"], row["shape"], row["dtype"], f"{row['eager_ms']:.4f}",
            f"{row['compiled_ms']:.4f}" if "compiled_ms" in row else "", f"{row['triton_ms']:.4f}",
            f"{row['ratio']:.2f}x", f"{row['of_ceiling']:.0%}",
        )
        for row in measured
    )  # fmt: skip
    head = ("op", "shape", "dtype", "eager ms", "compiled ms", "Triton ms", "ratio to the best", "of ceiling")
    titles = {
        "failed": "Failed", "not_measured": "Not measured",
        "compiled_failed": "torch.compile failed", "compiled_not_measured": "torch.compile not measured",
    }  # fmt: skip
    absent = [
        f"- {title}: {row['op']}, {row['shape']}: {row[key]}."
        for row in record["rows"]
        for key, title in titles.items()
        if key in row
    ]
    return [card_line(record), "", *markdown_table(head, rows), *([""] if absent else []), *absent]


def gpu_models_lines(record: Row) -> list[str]:
    """A table of all sides, one of what starting costs, what failed, and a profile of ours."""
    lines = [
        card_line(record),
        f"Eager is {record['eager_model']}, compiled `{_named('compiled', record)}`;"
        " a ratio is of the fastest other side in the same turns."
        + "".join(f" {name}={value}." for name, value in record.get("inductor", {}).items()),
        "",
        *markdown_table(
            ("work", "dtype", "side", "ms", "p20–p80", "ratio", "error", "peak memory", "launches", "idle"),
            (cells for row in record["rows"] for cells in _sides(row)),
        ),
    ]
    first = [cells for row in record["rows"] for cells in _first_results(row)]
    if first:
        lines += [
            "",
            "Seconds from having the weights to the first result, in a process that has compiled nothing:",
        ]
        lines += ["", *markdown_table(("work", "side", "caches empty", "caches full"), first)]
    missing = [op for op, there in record["triton_kernels"].items() if not there]
    if missing:
        lines += ["", f"- No Triton kernel: {', '.join(missing)}."]
    failed = [
        f"- {row['work']}, {side}: {why}." for row in record["rows"] for side, why in row["failed"].items()
    ]
    lines += [*([""] if failed and not missing else []), *failed]
    for row in record["rows"]:
        for side, values in row["sides"].items():
            lines += _profile(f"{row['work']}, {side}", values.get("profile", {}))
    return lines


def _sides(row: Row) -> Iterator[tuple[object, ...]]:
    for name, side in row["sides"].items():
        profile = side.get("profile", {})
        idle = f"{profile['idle_share']:.0%}" if "idle_share" in profile else ""
        peak = "" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**30:.1f} GiB"
        ratio = f"**{side['ratio']:.2f}x** of {side['beside']}" if "ratio" in side else ""
        ms, spread = "", ""
        if "ms" in side:
            ms, spread = f"{side['ms']:.2f}", f"{side['p20_ms']:.2f}–{side['p80_ms']:.2f}"
        yield (
            row["work"], row["dtype"], name, ms, spread, ratio, f"{side['error']:.1e}", peak,
            profile.get("launches", ""), idle,
        )  # fmt: skip


def _first_results(row: Row) -> Iterator[tuple[object, ...]]:
    for name, side in row["sides"].items():
        if "first_again_seconds" in side:
            empty = "" if side["compiled_before"] else f"{side['first_seconds']:.1f}"
            yield row["work"], name, empty, f"{side['first_again_seconds']:.1f}"


def _profile(title: str, profile: Row) -> list[str]:
    if not profile.get("kernels"):
        return []
    waits = profile["waits_for"]
    host = f"the host waits: {waits}" if waits else "nothing waits for the device"
    return [
        "",
        f"{title}: {profile['launches']} launches in {profile['span_ms']:.2f} ms, of which"
        f" {profile['idle_share']:.1%} idle; {host}.",
        "",
        *markdown_table(
            ("kernel", "calls", "ms", "share"),
            (
                (f"`{kernel['kernel']}`", kernel["calls"], f"{kernel['ms']:.3f}", f"{kernel['share']:.1%}")
                for kernel in profile["kernels"]
            ),
        ),
    ]


def cuda_code_lines(record: Row) -> list[str]:
    """A line an operation: what of its kernels needs most, on each architecture."""
    architectures = record["architectures"]
    kernels: dict[str, list[Row]] = {}
    for row in record["rows"]:
        kernels.setdefault(row["op"], []).append(row)

    def cells(op: str, rows: list[Row]) -> tuple[object, ...]:
        registers = (
            max((row["registers"][i] or 0 for row in rows), default=0) for i in range(len(architectures))
        )
        shared = max(size or 0 for row in rows for size in row["shared_bytes"])
        matrix = sum(row["matrix"] for row in rows)
        stack = max(row["stack_bytes"] for row in rows)
        return f"`{op}`", len(rows), matrix or "", *registers, shared, stack

    environment = record["environment"]
    return [
        "",
        "## What the CUDA C++ kernels become, compiled without a GPU",
        "",
        f"`{record['command']}`, nvcc {environment['nvcc']}, commit {environment['commit']};"
        " [cuda_code.json](results/cuda_code.json) has every kernel.",
        "Matrix: how many have the matrix unit's instructions. Under a GPU's name: registers of a",
        "thread, those of the kernel that needs most; so is static shared memory. Spills, and arrays",
        "without registers, lie on the stack.",
        "",
        *markdown_table(
            ("op", "kernels", "matrix", *(f"sm_{a}" for a in architectures), "shared bytes", "stack bytes"),
            (cells(op, rows) for op, rows in kernels.items()),
        ),
    ]


def traffic_lines(record: Row) -> list[str]:
    """Of bf16 and of what has no dtype in its name; fp16 moves the same."""
    shown = [row for row in record["rows"] if not row["case"].endswith(("fp16", "fp32", "tf32"))]
    environment = record["environment"]
    return [
        "",
        "## What the Triton kernels move, counted without a GPU",
        "",
        f"`{record['command']}`, Triton {environment['triton']}, commit {environment['commit']}.",
        "Bytes of the tensors that the launches read and write, each once a launch, beside those that the",
        "operation takes and gives, each once: partial results, second passes and copies show. FLOP are the",
        "formula's.",
        "",
        *markdown_table(
            ("call", "operation", "launches", "MiB", "least", "ratio", "GFLOP", "FLOP a byte"),
            (
                (
                    row["case"], f"`{row['op']}`" if row["least_bytes"] else row["op"],
                    row["launches"], f"{row['moved_bytes'] / 2**20:.2f}",
                    f"{row['least_bytes'] / 2**20:.2f}" if row["least_bytes"] else "",
                    f"{row['ratio']:.2f}x" if row["ratio"] else "",
                    f"{row['flop'] / 1e9:.2f}" if row["flop"] else "",
                    f"{row['flop'] / row['least_bytes']:.0f}" if row["flop"] and row["least_bytes"] else "",
                )
                for row in shown
            ),
        ),
    ]  # fmt: skip
