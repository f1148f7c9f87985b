"""The scripts that record benchmarks, and the report that is made of records."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import bench_records
import pytest
import torch
from PIL import Image

from sdfast.training.data import Digits

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def tried(script, *arguments):
    """What a benchmark prints of a small model, which must succeed: it checks its results first."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--tiny", *arguments], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_tiled_vae_beside_diffusers_tiling():
    lines = tried("bench_tiled_vae.py", "--size", "64")
    sides = [line.split(",")[0] for line in lines[-4:]]
    assert sides == ["eager", "whole", "bands", "tiling"]


def test_the_zoo_beside_itself():
    *rows, last = tried("bench_zoo.py", "--rounds", "1", "--models", "sdxl", "controlnet")
    assert len(rows) == 2 * 2 * 2 * 2 and all(row.endswith("x") for row in rows) and "median" in last


def test_a_sheet_of_inpainted_digits(tmp_path):
    pytest.importorskip("sklearn")
    sheet = tmp_path / "sheet.png"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "demo_inpaint.py", "--per-digit", "1", "--steps", "6", "--no-record", "-o", sheet],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 10 read right") == 8
    assert Image.open(sheet).size == (9 * 34 + 2, 10 * 34 + 2)


def test_the_sheet_has_a_row_for_each_digit_however_many_there_are(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    demo = importlib.import_module("demo_inpaint")
    labels = torch.tensor([3, 1, 1, 0, 3, 1])
    digits = demo.some_of_each(Digits(torch.arange(6.0).expand(8, 8, 6).permute(2, 0, 1), labels), 2)
    assert digits.labels.tolist() == [0, 1, 1, 3, 3]  # of one fewer than of the others
    assert demo.first_of_each(digits.labels).tolist() == [0, 1, 3]


def test_one_digit_has_no_standard_error(monkeypatch, capsys):
    """Refused before eight VAEs are trained."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_vae_digits")
    monkeypatch.setattr(sys, "argv", ["bench_vae_digits.py", "--images", "1"])
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("a VAE was trained"))
    with pytest.raises(SystemExit):
        bench.main()
    assert "--images: got 1, expected at least 2" in capsys.readouterr().err


def test_memory_of_a_training_step():
    lines = tried("bench_training_memory.py", "--rounds", "1", "--sides", "eager", "sdfast")
    assert [line.split(":")[0] for line in lines] == ["eager", "sdfast"]
    assert "(0 of " in lines[1]  # gradients are wrong


def test_operations_of_a_gpu_run_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_gpu.py", "--tiny", "--dtype", "float16", "--rounds", "1"],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(op in done.stdout for op in ("group_norm", "layer_norm", "linear", "attention", "conv2d"))


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _report_models

    return _report_models


ENGINE = {"ms": 20.0, "error": 1e-6, "peak_bytes": 2**30, "ready_seconds": 2.0}
PEERS = {
    "versions": {"torch": "2"},
    "rows": [
        {
            "work": "VAE", "dtype": "float32", "weight_bytes": 2**31,
            "sdfast": {**ENGINE, "ms": 10.0, "packed_bytes": 2**30},
            "peers": {name: {**ENGINE, "ratio": 2.0, "export_seconds": 3.0} for name in ("eager", "openvino")},
            "skipped": {"onnxruntime": "not installed"},
        }
    ],
}  # fmt: skip


def test_report_of_peers(report):
    text = "\n".join(report.peers_lines(PEERS))
    assert "| VAE | float32 | 20 ms, 2.00x | 20 ms, 2.00x | 10 ms |" in text
    assert "| VAE | float32 | OpenVINO | 1.0e-06 | 1.0 GiB | 5 s |" in text
    assert "VAE, float32: 2.0 GiB, packed 1.0 GiB." in text
    assert "- Not measured: ONNX Runtime, float32: not installed." in text


def test_report_of_tiled_vae(report):
    row = {"size": 1024, "seconds": 12.34, "peak_bytes": 10**9, "most_difference": 2e-5, "error": 1e-6}
    rows = [
        {**row, "side": "eager", "budget_bytes": None, "reference": "eager"},
        {**row, "side": "bands", "budget_bytes": 2 * 10**9, "reference": "eager"},
    ]
    text = "\n".join(report.tiled_vae_lines({"rows": rows}))
    assert "| 1024x1024 | diffusers, whole image | 12.3 s | 1.00 GB |  |  |" in text
    assert "| 1024x1024 | sdfast, bands, within 2.0 GB | 12.3 s | 1.00 GB | 2.0e-05 | 1.0e-06 |" in text


def test_report_of_the_zoo(report):
    row = {
        "dtype": "float32", "size": 32, "batch": 1, "ratio": 2.0, "low": 1.9, "high": 2.1,
        "eager": {"ms": 2000.0, "format": "contiguous_format", "error": 0.0},
        "sdfast": {"ms": 1000.0, "error": 1e-6}, "optimize_seconds": 0.5,
    }  # fmt: skip
    rows = [
        {**row, "model": "sd15", "title": "SD 1.5 U-Net", "first_call_seconds": 2.0},
        {**row, "model": "sd15", "title": "SD 1.5 U-Net", "first_call_seconds": 9.0, "batch": 4},
        {**row, "model": "vae", "title": "VAE decode", "first_call_seconds": 1.25},
    ]
    machine = {"cpu": "a CPU", "threads": 2}
    sentence = report.zoo_sentence({"rows": rows, "environment": machine})
    assert "SD 1.5 U-Net, VAE decode; two sizes" in sentence and "2.00 in the median of 3." in sentence
    text = "\n".join(report.zoo_lines({"rows": rows}))
    assert "than the next cost 2.2 s." in text
    assert "| SD 1.5 U-Net | float32 | 4x32x32 | 2000 (contiguous) | 1000 | **2.00x** | 1.90–2.10 |" in text


@pytest.mark.parametrize("peers, last", [(PEERS, "beside OpenVINO |"), (None, "speed |")])
def test_readme_table_has_a_column_for_openvino_where_it_was_recorded(report, peers, last):
    models = {
        "rows": [
            {
                "work": "VAE", "dtype": dtype, "best_eager_ms": 20, "eager_layout": "channels_last",
                "sdfast_ms": 10, "ratio": 2.0,
            }
            for dtype in ("float32", "bfloat16")
        ]
    }  # fmt: skip
    head, _, first, second = report.models_table(models, peers)
    assert head.endswith(last)
    assert first.endswith("| **2.00x** | 2.00x |" if peers else "| **2.00x** |")
    assert second.endswith("| **2.00x** |  |" if peers else "| **2.00x** |")


def test_the_report_is_what_the_records_say():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report.py", "--check"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture
def records(monkeypatch):
    """The records that `sdfast bench` leaves on a device, as the report reads them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _report_bench

    rows = [
        bench_records.operation(), bench_records.operation(dtype="bfloat16"), bench_records.model(),
        {**bench_records.model(eager=(3.0, 3.0)), "part": "training", "name": "forward and backward"},
        {"part": "ops", "op": "linear", "name": "linear that failed", "dtype": "float32", "failed": "why"},
    ]  # fmt: skip
    rows[2]["sides"]["eager-contiguous"] = {**rows[2]["sides"]["eager"], "ms": 1900.0}
    rows[2]["ratios"]["eager-contiguous"] = {**rows[2]["ratios"]["eager"], "ratio": 1.9}
    record = {**bench_records.record(*rows), "breakdown": [bench_records.breakdown()]}
    return _report_bench.expand("cpu-x/bench.json", record)


def test_report_of_what_sdfast_bench_recorded(records):
    import report

    assert set(records) == {
        f"cpu-x/{kind}.json" for kind in ("linear", "models", "peers", "training", "profile")
    }
    text = "\n".join(report.results_md(dict(sorted(records.items(), key=report._place))))
    assert "| VAE decode to 512x512 | float32 | 1900 ms (contiguous) | 1000 ms | **1.90x** |" in text
    assert "| forward and backward | float32 | 3000 ms (channels_last) | 1000 ms | **3.00x** |" in text
    assert "| 2x1280 |  | float32 | 2.00 | 1.00 | 2.00x | 2.00–2.00 |" in text
    assert (
        "[cpu-x/bench.json](results/cpu-x/bench.json)" in text
        and "Failed: linear that failed, float32: why." in text
    )
    assert "2100 ms, 2.10x" in text and "1500 ms, 1.50x" in text and "`sdfast::conv2d_kernel`" in text
    assert "**2.00x**" in "\n".join(report.readme_block(records))


def test_a_quick_run_is_no_record(records):
    import _report_bench

    with pytest.raises(ValueError, match="recorded with --quick"):
        _report_bench.expand("cpu-x/bench.json", {**bench_records.record(), "quick": True})
