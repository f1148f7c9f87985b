"""How long a wheel takes to build and how large it is: for the CPU, for one GPU architecture, for all six.

    python benchmarks/bench_build.py [--archs "9.0a" ...]

Each is built from a clone of the last commit, so that nothing is there before, by `pip wheel
--no-build-isolation` with as many compilers as there are cores. The CPU's libraries are in every wheel.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

from _record import results_path, write_json

ROOT = pathlib.Path(__file__).parents[1]
ARCHS = ("", "9.0a", "8.0;8.6;8.9;9.0a;10.0;12.0")


def build(archs: str, folder: pathlib.Path) -> dict[str, Any]:
    """The seconds and bytes of one wheel.

    Raises:
        SystemExit: it was not built; the message is the compiler's.
    """
    source, path = folder / "source", os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, "."]
    environment = {**os.environ, "SDFAST_CUDA_ARCHS": archs, "SDFAST_REQUIRE_NATIVE": "1", "PATH": path}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    (wheel,) = folder.glob("*.whl")
    return {"archs": archs, "wheel": wheel.name, "seconds": seconds, "bytes": wheel.stat().st_size}


def main() -> None:
    """Print each, write results/<device>/build.json where all were built."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", nargs="+", default=list(ARCHS), help='as SDFAST_CUDA_ARCHS has them; "" none'
    )
    rows, wanted = [], parser.parse_args().archs
    for archs in wanted:
        with tempfile.TemporaryDirectory() as name:
            rows.append(build(archs, pathlib.Path(name)))
        print(
            f"{rows[-1]['wheel']}: {rows[-1]['seconds']:.0f} s, {rows[-1]['bytes'] / 1e6:.1f} MB", flush=True
        )
    if tuple(wanted) == ARCHS:
        write_json(results_path("build"), rows)


if __name__ == "__main__":
    main()
