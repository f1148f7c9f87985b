"""New images and batches compile (nearly) nothing; see triton_variants.py."""

import os
import re
import subprocess
import sys

import pytest
from processes import PACKAGE, TESTS

pytest.importorskip("triton")


def test_sizes_of_images_and_batches_are_no_variants():
    """One of each kernel, and one more for pixels that 16 divides where these lie together. An image that one
    program holds has up to three sizes of tile, a layer_norm's gradient two."""
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{TESTS}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "triton_variants.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [re.fullmatch(r"(.*): (_\w+) (\d+)", line).groups() for line in result.stdout.splitlines()]
    assert {kernel for _, kernel, _ in lines} == {
        "_whole_kernel", "_partials_kernel", "_apply_kernel", "_sums_kernel", "_finish_kernel",
        "_input_gradient_kernel", "_forward_kernel", "_means_kernel", "_backward_kernel", "_parameters_kernel",
    }  # fmt: skip
    for kind, kernel, variants in lines:
        most = {"_whole_kernel": 3, "_backward_kernel": 2}.get(kernel, 1)
        if kind.endswith("first"):
            most += 1
        assert int(variants) <= most, f"{kind}: {kernel} {variants}"
