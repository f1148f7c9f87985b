"""Python in a process of its own, for what is decided once: which compiled library is loaded."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import sdfast
from sdfast import _library

TESTS = pathlib.Path(__file__).parent
PACKAGE = pathlib.Path(sdfast.__file__).parents[1]  # what is tested here is tested there


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{PACKAGE}:{TESTS}", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_with_library(isa: str, code: str) -> None:
    """Run `code` on the library of a lesser CPU; skip where this CPU is a lesser one itself."""
    if isa not in _library._CPU_ISAS[_library._CPU_ISAS.index(_library.cpu_isa()) :]:
        pytest.skip(f"this CPU has no {isa}")
    before = f"""
        import torch
        torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
        from sdfast import _library, ops
        torch.set_num_threads(1)
        torch.manual_seed(0)
        assert _library.load_cpu_library().name == "_C_cpu_{isa}", _library.status()
    """
    capability = "default" if isa == "baseline" else isa
    # torch, as the peer, would ask oneDNN alone whether there is AMX, and fail at what it then lacks itself.
    environment = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    run_python(textwrap.dedent(before) + textwrap.dedent(code), **environment)
