"""What the report says of a GPU's records."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
from _gpu_works import WORKS  # noqa: E402
from _report_gpu import (  # noqa: E402
    GOALS,
    goals_lines,
    gpu_models_lines,
    gpu_readme_lines,
    operations_lines,
    traffic_lines,
)
from _report_gpu_calls import calls_lines, checks_lines, tiles_lines  # noqa: E402

CARD = {
    "card": {"driver_version": "580", "clocks.max.sm": "1980"},
    "ceilings": {"copy_gb_per_s": 4300.0, "matrix_tflop_per_s": 790.0},
    "versions": {"torch": "2", "triton": "3", "diffusers": None},
}


def test_report_of_operations():
    row = {"op": "linear", "shape": "8x8", "dtype": "bfloat16"}
    times = {"eager_ms": 2.0, "compiled_ms": 1.5, "triton_ms": 1.0, "ratio": 1.5, "of_ceiling": 0.5}
    text = "\n".join(
        operations_lines({**CARD, "rows": [{**row, **times}, {**row, "not_measured": "no kernel"}]})
    )
    assert "| linear | 8x8 | bfloat16 | 2.0000 | 1.5000 | 1.0000 | 1.50x | 50% |" in text
    assert "- Not measured: linear, 8x8: no kernel." in text
    assert (
        "a copy moved 4300 GB/s, a matrix product 790 TFLOP/s; at most 1980 MHz, driver 580. torch 2, triton 3."
        in text
    )


def test_report_of_goals():
    assert set(GOALS) <= {work.title for work in WORKS.values()}
    assert sum("| not measured | not measured |" in line for line in goals_lines([])) == len(GOALS)
    row = {"work": "VAE decode to 512x512", "sides": {"compiled": {"ms": 7.0}, "sdfast triton": {"ms": 4.5}}}
    record = {
        "environment": {"gpu": "H200"},
        "rows": [row, {**row, "sides": {"sdfast": {"first_seconds": 1}}}],
    }
    text = "\n".join(goals_lines([record]))
    assert sum("VAE decode to 512x512" in line for line in text.splitlines()) == 1
    assert "| VAE decode to 512x512 | H200 | 7.00 ms | 4.50 ms | 5 ms | 4 ms |" in text


def test_report_of_a_work_measured_beside_eager_and_then_beside_torch_compile():
    ours = {"ms": 2.0, "ratio": 4.0, "beside": "eager", "peak_bytes": 2, "samples": 5}
    again = {**ours, "ratio": 1.5, "beside": "compiled"}
    others = {"ms": 8.0, "peak_bytes": 1}, {"ms": 3.0, "peak_bytes": 4}
    work = "SD 1.5 U-Net, guided step, 512x512"
    rows = [
        {"work": work, "sides": {"eager": others[0], "sdfast": ours}},
        {"work": work, "sides": {"compiled": others[1], "sdfast": again}},
        {"work": work, "sides": {}},
    ]
    record = {
        "environment": {"gpu": "H100", "commit": "abc"},
        "rows": rows,
        "compile_mode": "reduce-overhead",
    }
    assert f"| {work} | H100 | 3.00 ms (reduce-overhead) | 2.00 ms | 4.5 ms | 3.3 ms |" in goals_lines(
        [record]
    )
    line = f"| {work} | 3.00 (torch.compile, reduce-overhead) | 2.00 | **1.50x** | 0.50x | abc |"
    assert line in gpu_readme_lines([record])


def test_report_of_tiles():
    row = {"call": "linear 8x8 8x8", "ms": {"torch": 0.02, "cuda 80/1": 0.015, "cuda 128/1": 0.01}}
    text = "\n".join(
        tiles_lines({**CARD, "note": "How.", "rows": [row, {"call": "other", "ms": {"torch": 1}}]})
    )
    assert "| linear 8x8 8x8 | 20.0 | cuda 128/1 | 10.0 | 2.00x |" in text and "other" not in text


def test_report_of_models():
    profile = {
        "launches": 300, "span_ms": 4.0, "idle_share": 0.1, "waits_for": None,
        "kernels": [{"kernel": "conv", "calls": 9, "ms": 3.0, "share": 0.75}],
    }  # fmt: skip
    side = {
        "ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1, "error": 1e-3, "peak_bytes": 2**31, "first_seconds": 30.0,
        "compiled_before": False,
    }  # fmt: skip
    row = {
        "work": "U-Net", "dtype": "bfloat16", "failed": {"compiled": "load: not done within 600 s"},
        "sides": {
            "eager": side,
            "sdfast": {**side, "ratio": 2.0, "beside": "eager", "first_again_seconds": 3.0, "profile": profile},
        },
    }  # fmt: skip
    kernels = {"linear": True, "conv2d": False}
    text = "\n".join(
        gpu_models_lines({**CARD, "eager_model": "diffusers", "triton_kernels": kernels, "rows": [row]})
    )
    assert (
        "| U-Net | bfloat16 | sdfast | 4.00 | 3.90–4.10 | **2.00x** of eager | 1.0e-03 | 2.0 GiB | 300 | 10% |"
        in text
    )
    assert "| U-Net | sdfast | 30.0 | 3.0 |" in text and "- No Triton kernel: conv2d." in text
    assert "- U-Net, compiled: load: not done within 600 s." in text
    assert (
        "U-Net, sdfast: 300 launches in 4.00 ms, of which 10.0% idle; nothing waits for the device." in text
    )
    assert "| `conv` | 9 | 3.000 | 75.0% |" in text


def test_report_names_the_last_run_on_each_gpu():
    def record(gpu, date):
        return {"card": {}, "environment": {"gpu": gpu, "date": f"{date}T10:00:00"}}

    dates = (("H100", "2026-02-03"), ("H100", "2026-01-02"), ("H200", "2026-01-05"))
    line = report._gpu_line({str(i): record(*run) for i, run in enumerate(dates)})
    assert line == "Last run on a GPU: H100, 2026-02-03, H200, 2026-01-05."


def test_the_readme_says_what_the_records_say_of_gpus():
    text = (ROOT / "README.md").read_text()
    paths = (ROOT / "benchmarks/results").glob("*/*.json")
    records = {f"{path.parent.name}/{path.name}": json.loads(path.read_text()) for path in paths}
    said = text.split(report._GPU_BEGIN)[1].split(report._GPU_END)[0]
    lines = [f"**{report._gpu_line(records)}**", *gpu_readme_lines(report.gpu_models(records))]
    assert said.strip() == "\n".join(lines)
    assert (
        report.between(report._GPU_BEGIN, report._GPU_END, ["new"], text).count("new\n" + report._GPU_END)
        == 1
    )


def test_report_of_compiled_code():
    """A line an operation, of the kernel that needs most."""

    def row(op, registers, shared, matrix=False, stack=0):
        names = ("op", "kernel", "registers", "shared_bytes", "stack_bytes", "matrix")
        return dict(zip(names, (op, "kernel", registers, shared, stack, matrix), strict=True))

    record = {
        "command": "python tests/cuda_code.py", "environment": {"nvcc": "13.0.88", "commit": "abc"},
        "architectures": ["80", "90a"],
        "rows": [row("conv2d", [40, 168], [0, 512], True), row("conv2d", [64, None], [128, None]),
                 row("linear", [20, 22], [0, 0], stack=8)],
    }  # fmt: skip
    lines = report.cuda_code_lines(record)
    assert "| op | kernels | matrix | sm_80 | sm_90a | shared bytes | stack bytes |" in lines
    assert lines[-2:] == [
        "| `conv2d` | 2 | 1 | 64 | 168 | 512 | 0 |",
        "| `linear` | 1 |  | 20 | 22 | 0 | 8 |",
    ]


def test_report_of_traffic():
    row = {
        "case": "linear bf16", "op": "linear_rows", "launches": 2, "copies": 0, "moved_bytes": 2**21,
        "least_bytes": 2**20, "ratio": 2.0, "flop": 2**21,
    }  # fmt: skip
    record = {
        "command": "c",
        "environment": {"triton": "3", "commit": "1"},
        "rows": [row, {**row, "case": "linear fp16"}],
    }
    text = "\n".join(traffic_lines(record))
    assert (
        "| linear bf16 | `linear_rows` | 2 | 2.00 | 1.00 | 2.00x | 0.00 | 2 |" in text and "fp16" not in text
    )


def test_readme_has_the_best_of_ours_by_the_last_record():
    side = {"peak_bytes": 2**30, "samples": 5}
    sides = {
        "eager": {**side, "ms": 6.0},
        "sdfast": {**side, "ms": 3.0, "ratio": 2.0, "beside": "eager"},
        "sdfast triton": {**side, "ms": 2.0, "ratio": 3.0, "beside": "eager", "samples": 1},
    }
    rows = [{"work": "U-Net", "sides": sides}, {"work": "VAE", "sides": {"eager": sides["eager"]}}]
    last = {"environment": {"commit": "b"}, "rows": [{"work": "U-Net", "sides": {}}]}
    text = "\n".join(gpu_readme_lines([last, {"environment": {"commit": "a"}, "rows": rows}]))
    assert "| U-Net | 6.00 (eager) | 2.00 (triton, one sample) | **3.00x** | 1.00x | a |" in text
    assert "VAE" not in text
    assert gpu_readme_lines([last]) == []


def test_report_of_calls():
    def row(op, counts, ms, **errors):
        return {"op": op, "call": f"{op} 8x8", "counts": counts, "ms": ms, "errors": errors}

    rows = [
        row("linear", {"unet": 3}, {"torch": 1.0, "triton": 3.0, "triton [BLOCK_M=64]": 2.0}),
        row("linear", {"unet": 1, "vae": 2}, {"torch": 5.0, "triton": 4.0}, triton=1e-3),
        row("group_norm", {"vae": 1}, {"torch": 3.0, "triton": 2.0, "triton +statistics": 1.0}),
        row("conv2d", {"vae": 1}, {"torch bare": 3.0, "triton bare": 2.0, "triton": 2.5, "cuda": 1.0}),
        row("attention", {"unet": 1}, {"torch": 1.0, "cudnn": 0.5}, triton=0.2, cuda="RuntimeError: no"),
    ]
    text = "\n".join(calls_lines({**CARD, "rows": rows, "note": "As it was."}))
    assert "As it was." in text
    assert "| unet | `linear` | 4 | 8.00 | 8.00 | 10.00 | 7.00 |" in text
    assert "| vae | `linear` | 2 | 10.00 | 10.00 | 8.00 | 8.00 |" in text
    assert "| vae | `group_norm` | 1 | 3.00 | 3.00 | 2.00 | 2.00 |" in text
    assert "| vae | `conv2d` | 1 | 3.00 | 3.00 | 2.00 | 2.00 |" in text
    assert "| unet | `attention` | 1 | 0.50 | 0.50 | 0.50 | 0.50 |" in text
    assert "- attention 8x8, triton: error 2.0e-01." in text
    assert "- attention 8x8, cuda: RuntimeError: no." in text


def test_report_of_checks():
    row = {"what": "pytest tests/test_a.py", "commit": "abc", "passed": 7, "failed": ["test_b"]}
    assert "| `pytest tests/test_a.py` | abc | 7 | test_b |  |" in checks_lines({**CARD, "rows": [row]})
