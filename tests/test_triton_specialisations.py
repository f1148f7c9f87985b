"""A new resolution or batch compiles no kernel that is there already; see triton_specialisations.py."""

import json
import os
import subprocess
import sys

import pytest
from processes import PACKAGE, TESTS

pytest.importorskip("triton")


def test_sizes_add_no_kernels():
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{TESTS}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "triton_specialisations.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout)
    assert all(counted.values())
    twice = {f"{op}: {kernel}" for op, kernels in counted.items() for kernel, n in kernels.items() if n > 1}
    assert not twice
