"""`make gpu`: everything that there is to check and to measure on a GPU, in ten minutes.

    python tests/gpu_check.py [--minutes 9.5] [--only tests models ...] [--logs FOLDER] [--tiny]

Tests of what runs there, compute-sanitizer over every Triton kernel where that is installed, the operations and
whole models beside eager and compiled torch. Each part is a process with a time of its own; a red one stops no
other, and what one leaves of its time the last ones have. Logs are kept, a table comes last, and the exit
status is the sum of the parts' numbers that failed: 1 tests, 2 memcheck, 4 racecheck, 8 operations, 16 models.
Needs no installation: `python tests/gpu_check.py` in a copy of the repository. --tiny tries it out without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
RED = ("failed", "took too long")


class Part(NamedTuple):
    """What is run.

    Attributes:
        command: its arguments.
        share: of the whole time, at most; the last part has what is left.
        needs: a program without which it is left out.
        variables: of the environment.
    """

    command: Sequence[str]
    share: float
    needs: str | None = None
    variables: dict[str, str] | None = None


def parts(minutes: float, tiny: bool) -> dict[str, Part]:
    """By name, in their order."""
    python = [sys.executable, "-u"]
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*_triton.py"))
    files += [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_graphs.py")]
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    sanitized = [*python, str(ROOT / "tests/each_kernel.py")]
    small = ["--tiny", "--dtype", "float16", "--rounds", "1"] if tiny else []
    # torch's own allocator would hide what lies beside a tensor.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = "compute-sanitizer"

    def sanitize(tool: str) -> list[str]:
        return [sanitizer, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *sanitized]

    return {
        "tests": Part(
            [*python, "-m", "pytest", *(files[-2:] if tiny else files), "-q", "-p", "no:cacheprovider", *parallel],
            0.35,
        ),
        "memcheck": Part(sanitized if tiny else sanitize("memcheck"), 0.1, None if tiny else sanitizer, memory),
        "racecheck": Part(sanitize("racecheck"), 0.1, sanitizer),
        "operations": Part(
            [*python, str(ROOT / "benchmarks/bench_gpu.py"), "--minutes", f"{0.15 * minutes:.2f}", *small], 0.2
        ),
        "models": Part([*python, str(ROOT / "benchmarks/bench_gpu_models.py"), *small], 1.0),
    }  # fmt: skip


class Result(NamedTuple):
    status: str
    seconds: float
    log: pathlib.Path


def run(part: Part, seconds: float, log: pathlib.Path) -> Result:
    """Run a part for at most so long; it and what it started is ended then."""
    if part.needs is not None and shutil.which(part.needs) is None:
        return Result(f"{part.needs} is not installed", 0.0, log)
    if seconds <= 0:
        return Result("took too long", 0.0, log)
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | (part.variables or {})
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "took too long"
            os.killpg(process.pid, signal.SIGKILL)  # the session that it began
            process.wait()
    return Result(status, time.monotonic() - began, log)


def last_lines(log: pathlib.Path, count: int) -> str:
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-count:]
    return "\n".join(f"  {line[:200]}" for line in lines)


def run_all(chosen: dict[str, Part], minutes: float, logs: pathlib.Path) -> dict[str, Result]:
    """Each in turn; a line when it ends."""
    deadline = time.monotonic() + 60 * minutes
    logs.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, part in chosen.items():
        left = deadline - time.monotonic()
        bound = min(60 * minutes * part.share, left)
        if name == "models":  # it ends by itself, with what it has recorded
            part = part._replace(command=[*part.command, "--minutes", f"{max(0.1, left / 60 - 0.2):.2f}"])
        results[name] = run(part, bound, logs / f"{name}.log")
        print(f"{name}: {results[name].status}, {results[name].seconds:.0f} s", flush=True)
    return results


def main() -> None:
    """Run, then print what was red, what was measured, and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(parts(1, False))
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--logs", type=pathlib.Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--tiny", action="store_true", help="in the interpreter, without a GPU")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    every = parts(options.minutes, options.tiny)
    results = run_all(
        {name: every[name] for name in every if name in options.only}, options.minutes, options.logs
    )
    for name, result in results.items():
        if result.status in RED or name in ("operations", "models"):
            print(f"\n{name}, the end of {result.log}:\n{last_lines(result.log, 40)}")
    print()
    for name, result in results.items():
        print(f"{name:12} {result.status:32} {result.seconds:6.0f} s")
    sys.exit(sum(1 << i for i, name in enumerate(names) if name in results and results[name].status in RED))


if __name__ == "__main__":
    main()
