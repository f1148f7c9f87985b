"""`make sanitize`: the tests of the operations on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer.

    cmake -S . -B BUILD -DSDFAST_SANITIZE=ON -DSDFAST_OUTPUT_DIR=FOLDER/sdfast && cmake --build BUILD
    python tests/sanitize.py FOLDER [arguments for pytest]

FOLDER/sdfast is a copy of the package with these libraries in it. torch's memory comes from malloc, so that
a read or write of one element beside a tensor is reported. Each library first has to report planted faults.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent
OPERATIONS = (
    "add_noise", "attention", "attention_backward", "conv2d", "conv2d_backward", "diffusion_step", "group_norm",
    "layer_norm", "linear", "linear_backward", "reparameterize",
)  # fmt: skip
BESIDE = "148-byte region"  # what AddressSanitizer says the address lies beside: 37 floats
FAULTS = {
    "read_vector": BESIDE,
    "read_remainder": BESIDE,
    "write_vector": BESIDE,
    "read_before": BESIDE,
    "read_misaligned": "misaligned address",
    "add_beyond_the_largest": "signed integer overflow",
}
COMMIT_FAULTS = """
import ctypes, os, sys
import torch
library, tensor = ctypes.CDLL(sys.argv[1]), torch.zeros(37)
for fault in sys.argv[2:]:
    print("== " + fault, file=sys.stderr, flush=True)
    if os.fork() == 0:  # the report ends the process
        function = getattr(library, fault)
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
        function(tensor.data_ptr(), len(tensor))
        os._exit(0)
    os.wait()
"""
LIST_LIBRARIES = """
from sdfast import _library
best = _library._CPU_ISAS.index(_library.cpu_isa())
print(*(_library._PACKAGE_DIR / f"_C_cpu_{isa}.so" for isa in _library._CPU_ISAS[best:]))
"""


def environment(folder: pathlib.Path) -> dict[str, str]:
    def runtime(name: str) -> str:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name=lib{name}.so"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return os.environ | {
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": f"{runtime('asan')} {runtime('ubsan')}",  # before Python, which does not link them
        # Python keeps its memory to the end. Memory is filled with NaN, as the tests want it.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "SDFAST_SANITIZE": "ON",  # for what the tests build
    }


def check_that_faults_are_reported(environment: dict[str, str]) -> None:
    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)

    libraries = run(LIST_LIBRARIES).stdout.split()
    assert libraries, "no library was listed"
    for library in libraries:
        reports = run(COMMIT_FAULTS, library, *FAULTS).stderr.split("== ")[1:]
        assert len(reports) == len(FAULTS), reports
        for report, (fault, message) in zip(reports, FAULTS.items(), strict=True):
            if not (report.startswith(fault) and message in report and f"in {fault}" in report):
                sys.exit(f"{library} did not report {fault}:\n{report[:3000]}")
        print(f"{library}: all of {len(FAULTS)} planted faults reported", flush=True)


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    variables = environment(folder)
    check_that_faults_are_reported(variables)
    files = [f"test_{name}.py" for name in (*OPERATIONS, "diffusion_step_seeds", "guarded", "amx")]
    # torch.compile would run the compiler under the sanitizer, and adds no kernel to look at.
    options = ["-k", "not compiles", "-p", "no:cacheprovider", *sys.argv[2:]]
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *files, *options], env=variables, cwd=TESTS)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
