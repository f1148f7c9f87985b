"""The benchmarks of whole models run, on small ones; what they measure is nobody's business here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--tiny", "--work", "vae", "--dtype", "bfloat16", *arguments],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_peers_are_measured_and_an_absent_one_is_named():
    out = run("bench_peers.py", "--rounds", "1", "--peers", "onnxruntime")
    assert "eager:" in out and "sdfast:" in out
    assert "onnxruntime: has no bfloat16" in out or "onnxruntime: not installed; pip install" in out


def test_tiled_vae_beside_diffusers_tiling():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_tiled_vae.py", "--tiny", "--size", "64", "--threads", "1"],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == [
        "eager",
        "whole",
        "bands",
        "tiling",
    ]


def test_profile_names_operations_and_their_arithmetic():
    out = run("bench_profile.py")
    assert "conv" in out and "outside" in out and "%" in out


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
