"""What the CUDA C++ kernels become on each GPU, without one: compiled by nvcc, reported by ptxas.

    python tests/cuda_code.py [group_norm ...] [--architectures 80 90a] [--jobs 2] [--output [FILE]]

prints a line for every kernel of csrc/*_cuda.cu, and fails where one spills registers or has anything else in
local memory, where the compiler warns, and where a file of matrix kernels lacks the instruction for them.
`--output` records the table, by default in benchmarks/results/cuda_code.json. What is compiled stays in
build/cuda-code until its sources change: cubins for `cuobjdump -sass`, and what was read from them.
`code_in` reads the same from objects that were compiled for a wheel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/cuda-code"
RECORD = ROOT / "benchmarks/results/cuda_code.json"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# By operation, its backward's files included: what multiplies matrices there, or on Hopper's own unit.
INSTRUCTIONS = {"attention": r"\bHG?MMA\.", "conv2d": r"\bHG?MMA\."}


class Kernel(NamedTuple):
    """One kernel on one GPU.

    Attributes:
        name: demangled, without its parameters.
        registers, stack_bytes: of a thread; what is spilled lies on the stack, as arrays that have no registers.
        shared_bytes: of a block, static.
        matrix: whether it holds what `INSTRUCTIONS` asks for.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: bool = False


class Code(NamedTuple):
    """The kernels of one file for one GPU, and what is wrong with them."""

    kernels: list[Kernel]
    faults: list[str]


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME's, the one on PATH, or CUDA's usual place."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin" if home else "", os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which(os.environ.get("CUDACXX") or "nvcc", path=os.pathsep.join(filter(None, folders)))


def _package(name: str) -> Path:
    """The folder of a Python package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def flags() -> list[str]:
    """The library's own, of cmake/cuda_library.cmake."""
    return [
        "-std=c++17", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY",
        "-DUSE_CUDA", "-isystem", str(_package("torch") / "include"),
    ]  # fmt: skip


def _virtual(architecture: str) -> str:
    """Those of one major version share the PTX of the first, as in the library."""
    return next(each for each in (*ARCHITECTURES, architecture) if _major(each) == _major(architecture))


def _major(architecture: str) -> str:
    """Those with an "a" share with none."""
    return architecture[:-1] if architecture.isdigit() else architecture


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(source: Path, nvcc: str) -> str:
    """Of all that the result depends on: this file, the compiler, its flags, the source and our headers."""
    found, waiting = {}, [source]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found[path] = path.read_bytes()
        named = re.findall(rb'^#include "([^"]+)"', found[path], re.MULTILINE)
        waiting += [folder / name.decode() for name in named for folder in (path.parent, CSRC)]
    torch = (_package("torch") / "version.py").read_text()
    parts = [Path(__file__).read_text(), torch, _nvcc_version(nvcc), *flags()]
    parts += [found[path].decode() for path in sorted(found)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_of(source: Path, architecture: str) -> Code:
    """Compile a file's kernels for one GPU, or take what was read from the same sources before."""
    nvcc = find_nvcc()
    assert nvcc is not None, "nvcc was not found; set CUDACXX or CUDA_HOME"
    digest = _digest(source, nvcc)
    stem = BUILD / f"{source.stem}.sm_{architecture}"
    known = stem.with_name(f"{stem.name}.json")
    if known.exists() and (kept := json.loads(known.read_text()))["digest"] == digest:
        return Code([Kernel(*row) for row in kept["kernels"]], kept["faults"])
    BUILD.mkdir(parents=True, exist_ok=True)
    cubin = stem.with_name(f"{stem.name}.{os.getpid()}.cubin")
    target = f"-gencode=arch=compute_{_virtual(architecture)},code=sm_{architecture}"
    command = [nvcc, *flags(), "-Xptxas", "-v", target, "-cubin", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return Code([], [f"does not compile:\n{done.stderr[-3000:]}"])
    code = read_report(done.stderr)
    if instruction := _instruction(source):
        code = _with_instruction(code, _dump("-sass", cubin), instruction)
    code = _demangled(code)
    cubin.replace(stem.with_name(f"{stem.name}.cubin"))
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"digest": digest, "kernels": code.kernels, "faults": code.faults}))
    partial.replace(known)
    return code


def read_report(text: str) -> Code:
    """What `ptxas -v` says; kernels have their mangled names. A fault for every function that is not clean."""
    kernels, faults = [], [line for line in text.splitlines() if "warning" in line.lower()]
    # Of launch bounds that an architecture with fewer threads cannot keep.
    faults = [line for line in faults if "minnctapersm will be ignored" not in line]
    entries = set(re.findall(r"Compiling entry function '(\w+)'", text))
    parts = re.split(r"Function properties for (\w+)\n", text)
    for name, properties in zip(parts[1::2], parts[2::2], strict=True):
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", properties)[:3])
        if stack or stores or loads:
            faults.append(f"{name}: {stack} bytes of stack, {stores} stored and {loads} loaded by spills")
        if name in entries:
            registers = re.search(r"Used (\d+) registers", properties)
            shared = re.search(r"(\d+) bytes smem", properties)
            assert registers is not None, properties
            kernels.append(Kernel(name, int(registers[1]), stack, int(shared[1]) if shared else 0))
    return Code(kernels, faults)


def code_in(library: Path, source: Path) -> dict[str, Code]:
    """The kernels in an object or library that was compiled of a file, by architecture."""
    found: dict[str, Code] = {}
    for architecture, usage in _by_architecture(_dump("--dump-resource-usage", library)):
        kernels = [
            Kernel(name, *map(int, numbers))
            for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        ]
        local = [int(size) for size in re.findall(r"LOCAL:(\d+)", usage)]
        faults = [
            f"{kernel.name}: {kernel.stack_bytes + size} bytes of stack"
            for kernel, size in zip(kernels, local, strict=True)
            if kernel.stack_bytes + size
        ]
        found[architecture] = Code(kernels, faults)
    if instruction := _instruction(source):
        for architecture, sass in _by_architecture(_dump("-sass", library)):
            found[architecture] = _with_instruction(found[architecture], sass, instruction)
    return {architecture: _demangled(code) for architecture, code in found.items()}


def _by_architecture(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^Fatbin (elf|ptx) code:\n=+\narch = sm_(\w+)$", text, flags=re.MULTILINE)
    for kind, architecture, part in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if kind == "elf":  # PTX holds no machine code
            yield architecture, part


def _dump(what: str, path: Path) -> str:
    """cuobjdump, which Triton brings."""
    command = [_package("triton") / "backends/nvidia/bin/cuobjdump", what, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instruction(source: Path) -> str | None:
    op = source.stem.removesuffix("_cuda")
    return next((pattern for name, pattern in INSTRUCTIONS.items() if f"{op}_".startswith(f"{name}_")), None)


def _with_instruction(code: Code, sass: str, instruction: str) -> Code:
    """Mark the kernels that hold it; a fault where none does."""
    parts = re.split(r"Function : (\w+)\n", sass)
    having = {
        name
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
        if re.search(instruction, body) is not None
    }
    kernels = [kernel._replace(matrix=kernel.name in having) for kernel in code.kernels]
    return Code(kernels, code.faults if having else [*code.faults, f"no instruction {instruction}"])


def _demangled(code: Code) -> Code:
    """With names to read; as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return code
    text = json.dumps([[kernel.name for kernel in code.kernels], code.faults])
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    names, faults = json.loads(done.stdout)
    kernels = [kernel._replace(name=short(name)) for kernel, name in zip(code.kernels, names, strict=True)]
    return Code(kernels, [short(fault) for fault in faults])


def short(name: str) -> str:
    """A demangled function without its type, its parameters and our namespace."""
    name = re.sub(r"sdfast::|\(anonymous namespace\)::|\((?:int|bool|unsigned int)\)|^void ", "", name)
    return re.sub(r"\([^()]*\)(?=$|: )", "", name)


def sources(ops: Sequence[str] = ()) -> list[Path]:
    """The files of these operations, or all."""
    return [CSRC / f"{op}_cuda.cu" for op in ops] or sorted(CSRC.glob("*_cuda.cu"))


def compile_all(
    files: Iterable[Path], architectures: Sequence[str], jobs: int
) -> Iterator[tuple[Path, str, Code]]:
    """Every file for every GPU, so many at once, in this order."""
    tasks = [(file, architecture) for file in files for architecture in architectures]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for task, code in zip(tasks, pool.map(lambda task: code_of(*task), tasks), strict=True):
            yield *task, code


def table(found: Iterable[tuple[Path, str, Code]], architectures: Sequence[str]) -> list[dict[str, Any]]:
    """A row a kernel, its values in the order of the architectures; None where it is not there."""
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for file, architecture, code in found:
        for kernel in code.kernels:
            rows.setdefault((file.stem.removesuffix("_cuda"), kernel.name), {})[architecture] = kernel
    return [
        {
            "op": op,
            "kernel": name,
            "registers": [kernels[a].registers if a in kernels else None for a in architectures],
            "shared_bytes": [kernels[a].shared_bytes if a in kernels else None for a in architectures],
            "stack_bytes": max(kernel.stack_bytes for kernel in kernels.values()),
            "matrix": any(kernel.matrix for kernel in kernels.values()),
        }
        for (op, name), kernels in sorted(rows.items())
    ]


def write_record(path: Path, rows: list[dict[str, Any]], architectures: Sequence[str]) -> None:
    """A kernel a line, whole or not at all."""
    from sdfast.testing import environment

    nvcc = re.search(r"V([\d.]+)", _nvcc_version(find_nvcc() or ""))
    head = {
        "command": " ".join(["python", "tests/cuda_code.py", *sys.argv[1:]]),
        "environment": {"nvcc": nvcc and nvcc[1], "commit": environment()["commit"]},
        "architectures": architectures,
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    partial.replace(path)


def main() -> None:
    """Print a line a kernel and GPU; exit with the faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="all without")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    parser.add_argument("--output", nargs="?", const=RECORD, type=Path, help="record the table")
    options = parser.parse_args()
    began, found = time.monotonic(), []
    for file, architecture, code in compile_all(sources(options.ops), options.architectures, options.jobs):
        found.append((file, architecture, code))
        for kernel in code.kernels:
            print(
                f"sm_{architecture} {kernel.name}: {kernel.registers} registers,"
                f" {kernel.shared_bytes} bytes shared{', matrix' if kernel.matrix else ''}",
                flush=True,
            )
    faults = [f"{file.name}, sm_{arch}: {fault}" for file, arch, code in found for fault in code.faults]
    count = sum(len(code.kernels) for _, _, code in found)
    print(f"{count} kernels, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    if faults:
        sys.exit("\n".join(faults))
    if options.output is not None:
        write_record(options.output, table(found, options.architectures), options.architectures)


if __name__ == "__main__":
    main()
