"""`make gpu`: everything that there is to check and to measure on a GPU, in ten minutes.

    python tests/gpu_check.py [--minutes 9.5] [--only tests models ...] [--output FOLDER] [--commit ID] [--tiny]

Every Triton kernel once, tests of what runs there and of the compiled kernels, the operations and whole models
beside eager and compiled torch, and compute-sanitizer over every kernel where that is found. Each part is a
process with a time of its own; a red one stops no other, one that is over its time is interrupted, so that it
says what it has, and whole models have the time that others leave. Records go to FOLDER, by default
benchmarks/results/<device>, logs to FOLDER/logs. A table comes last, and the exit status is the sum of the
numbers of the parts that failed: 1 kernels, 2 tests, 4 compiled, 8 operations, 16 models, 32 memcheck, 64
racecheck, 128 compiled-memcheck.
Needs no installation: `python tests/gpu_check.py` in a copy of the repository; --commit names what it is a copy
of where git does not know. --tiny tries it out without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
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
GRACE_SECONDS = 15.0  # from the interruption of a part to its end
_BENCHMARKS = ("operations", "models")
_SANITIZER = "compute-sanitizer"


class Part(NamedTuple):
    """What is run.

    Attributes:
        command: its arguments.
        share: of the whole time, at most; None for all that later parts leave.
        needs: a program without which it is left out.
        variables: of the environment.
    """

    command: Sequence[str]
    share: float | None
    needs: str | None = None
    variables: dict[str, str] | None = None


def find(program: str) -> str | None:
    """Its path; CUDA's own folders are often not among those that are searched."""
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME",) if name in os.environ]
    return shutil.which(program) or shutil.which(program, path=":".join([*folders, "/usr/local/cuda/bin"]))


def parts(output: pathlib.Path, tiny: bool) -> dict[str, Part]:
    """By name, in their order."""
    python = [sys.executable, "-u"]
    files = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_graphs.py")]
    if not tiny:
        files += sorted(str(path) for path in (ROOT / "tests").glob("test_*_triton.py"))
    # They need the compiled library for this device (SDFAST_CUDA_ARCHS), and are skipped where it is absent.
    compiled = sorted(str(path) for path in (ROOT / "tests").glob("test_*_cuda.py"))
    each = [*python, str(ROOT / "tests/each_kernel.py")]
    small = ["--tiny", "--dtype", "float16", "--rounds", "1"] if tiny else []
    measured = ["--output", str(output), *small]
    # torch's own allocator would hide what lies beside a tensor.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitize(tool: str, command: list[str]) -> list[str]:
        tool_options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        return [find(_SANITIZER) or _SANITIZER, *tool_options, *command]

    one_process = [*python, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *compiled]
    return {
        "kernels": Part([*python, str(ROOT / "tests/kernels_at_once.py")], 0.1),
        "tests": Part([*python, "-m", "pytest", *files, *_pytest_options()], 0.2),
        "compiled": Part([*python, "-m", "pytest", *compiled, *_pytest_options()], 0.1),
        "operations": Part([*python, str(ROOT / "benchmarks/bench_gpu.py"), *measured], 0.15),
        "models": Part([*python, str(ROOT / "benchmarks/bench_gpu_models.py"), *measured], None),
        "memcheck": Part(
            each if tiny else sanitize("memcheck", each), 0.1, None if tiny else _SANITIZER, memory
        ),
        "racecheck": Part(sanitize("racecheck", each), 0.1, _SANITIZER),
        "compiled-memcheck": Part(sanitize("memcheck", one_process), 0.1, _SANITIZER, memory),
    }


def _pytest_options() -> list[str]:
    """Names of the tests, so that one without end is known; processes and limits where plugins are there."""
    options = ["-vv", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(6, os.cpu_count() or 1))]  # of real sizes, each with memory of its own
    return options


class Result(NamedTuple):
    status: str
    seconds: float
    log: pathlib.Path


def run(part: Part, seconds: float, log: pathlib.Path) -> Result:
    """Run a part for at most so long; it and what it started is interrupted then, and soon after killed."""
    if part.needs is not None and find(part.needs) is None:
        return Result(f"{part.needs} is not installed", 0.0, log)
    if seconds <= 0:
        return Result("took too long", 0.0, log)
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (part.variables or {})
    began = time.monotonic()
    grace = min(GRACE_SECONDS, seconds / 2)
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
            code = process.wait(seconds - grace)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "took too long"
            os.killpg(process.pid, signal.SIGINT)  # pytest prints its failures then, a benchmark what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
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
    for i, (name, part) in enumerate(chosen.items()):
        later = [p.share or 0.0 for p in list(chosen.values())[i + 1 :] if p.needs is None or find(p.needs)]
        left = deadline - time.monotonic()
        if part.share is None:
            bound = left - 60 * minutes * sum(later)
        else:
            bound = min(60 * minutes * part.share, left) if later else left
        if name in _BENCHMARKS:
            part = part._replace(command=[*part.command, *own_time(name, bound)])
        results[name] = run(part, bound, logs / f"{name}.log")
        print(f"{name}: {results[name].status}, {results[name].seconds:.0f} s", flush=True)
    return results


def own_time(name: str, seconds: float) -> list[str]:
    """A benchmark ends by itself before it is interrupted, and no side takes all that others need."""
    minutes = max(0.1, (seconds - GRACE_SECONDS - 8) / 60)
    limits = {"--minutes": minutes}
    if name == "models":
        limits |= {"--side-minutes": minutes / 3, "--compile-minutes": minutes / 3}
    return [word for name, limit in limits.items() for word in (name, f"{limit:.2f}")]


def default_output(tiny: bool) -> pathlib.Path:
    """The folder of this device's records, which what is only tried out stays away from."""
    if tiny:
        return ROOT / "build/gpu_check"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch
    from _record import RESULTS, device_slug

    return RESULTS / device_slug("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Run, then print what was red, what was measured, and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(parts(ROOT, False))
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names)
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder of the records, with the logs in logs/")
    parser.add_argument("--commit", help="for the records, where there is no .git")
    parser.add_argument("--tiny", action="store_true", help="in the interpreter, without a GPU")
    options = parser.parse_args()
    # A shell's background job ignores it, and so would every part.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.commit:
        os.environ["SDFAST_COMMIT"] = options.commit
    output = (options.output or default_output(options.tiny)).absolute()
    every = parts(output, options.tiny)
    chosen = {name: part for name, part in every.items() if name in options.only}
    results = run_all(chosen, options.minutes, output / "logs")
    for name, result in results.items():
        if result.status in RED or name in _BENCHMARKS:
            print(f"\n{name}, the end of {result.log}:\n{last_lines(result.log, 40)}")
    print()
    for name, result in results.items():
        print(f"{name:12} {result.status:32} {result.seconds:6.0f} s")
    sys.exit(sum(1 << i for i, name in enumerate(names) if name in results and results[name].status in RED))


if __name__ == "__main__":
    main()
