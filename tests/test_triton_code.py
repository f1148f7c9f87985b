"""Every Triton kernel compiles for every GPU we support, without spills; see triton_code.py."""

import os
import subprocess
import sys

import pytest
from processes import PACKAGE, TESTS

pytest.importorskip("triton")


def compile_for(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{TESTS}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "triton_code.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
def test_hopper():
    """Every case. What is there is said, so that an empty list would not pass."""
    out = compile_for("--architectures", "90")
    assert ", 0 faults" in out and "sm_90" in out


@pytest.mark.slow
def test_other_architectures():
    """One case of every operation; all of them in `make check-gpu-code`."""
    out = compile_for("--first-case", "--architectures", "80", "89", "100", "120")
    assert all(f"sm_{architecture}" in out for architecture in (80, 89, 100, 120))
