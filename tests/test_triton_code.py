"""Every Triton kernel compiles for every GPU we support, without spills; see triton_code.py."""

import os
import subprocess
import sys
import textwrap

import pytest
from processes import PACKAGE, TESTS

pytest.importorskip("triton")

from triton_code import Code  # noqa: E402


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


def test_every_variant_needs_wgmma():
    """One that has it excuses no other of its name; tiles of few rows and other architectures do not need it."""

    def faults(architecture=90, is_matrix=True, has_wgmma=False, is_narrow=False):
        return Code("k", "digest", architecture, 99, 0, 1024, is_matrix, has_wgmma, is_narrow).faults()

    assert faults() == ["no wgmma"] and not faults(has_wgmma=True)
    assert not faults(is_narrow=True) and not faults(architecture=100) and not faults(is_matrix=False)


def test_a_variant_without_wgmma_is_found():
    """The same kernel in tiles of 64 rows and of 16, and in tiles of 32, which are in no list."""
    code = """
        import sdfast.ops
        import torch
        import triton_code

        def faults(rows):
            call = lambda: torch.ops.sdfast.linear_rows_triton(
                torch.empty(rows, 640, device="cuda", dtype=torch.float16),
                torch.empty(640, 640, device="cuda", dtype=torch.float16), None, None, 0)
            launch = triton_code.record(call)[0]
            return [triton_code.compile_launch(each, 90).faults() for each in
                    (launch, launch._replace(keywords={**launch.keywords, "BLOCK_M": 32, "maxnreg": None}))]

        assert faults(64) == [[], ["no wgmma"]], faults(64)
        assert faults(16) == [[], ["no wgmma"]], faults(16)
    """
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{TESTS}"}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
