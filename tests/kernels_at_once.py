"""Runs the calls of each_kernel.py, a process for each operation, as many at once as there are cores.

    python tests/kernels_at_once.py

What they compile stays in Triton's cache, so that compute-sanitizer's time goes to the kernels; and one that
breaks its process hides no other's fault.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import each_kernel

SCRIPT = pathlib.Path(each_kernel.__file__)


def run(op: str) -> bool:
    """Whether it went well; its last lines are printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), op], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()[-20:]
    print("\n".join([f"{op}: exit status {done.returncode}", *(f"  {line}" for line in lines)]), flush=True)
    return done.returncode == 0


def main() -> None:
    """Fail with the names of the operations that did."""
    ops = list(each_kernel.CALLS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [op for op, good in zip(ops, pool.map(run, ops), strict=True) if not good]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
