"""`sdfast doctor`: what there is on this machine, what sdfast makes of it, and what is missing.

Reports and repairs nothing, and never fails: something that cannot be found out is a line that says so.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sdfast import __version__, _cuda_archs, _library, dispatch, tuning

# What the kernels use, as Linux names it in /proc/cpuinfo.
_CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
# The extras that pip takes, but what developing takes, and what each is for.
_EXTRAS = {
    "triton": "GPU kernels",
    "train": "training",
    "segment": "segmentation's measures",
    "plot": "plots",
    "bench": "benchmarks",
    "peers": "benchmarks of other engines",
}


def report() -> str:
    """The whole report, as lines under headings."""
    sections: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
        ("sdfast", _versions),
        ("CPU", _cpu),
        ("GPU", _gpu),
        ("Libraries", _libraries),
        ("To build with", _build_tools),
        ("Optional packages", _optional_packages),
    )
    lines: list[str] = []
    for title, section in sections:
        lines.append(title)
        try:
            lines += [f"  {line}" for line in section()]
        except Exception as error:  # a report that breaks off helps nobody
            lines.append(f"  could not be found out: {type(error).__name__}: {error}")
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    yield f"sdfast {__version__} in {Path(__file__).parent}"
    yield f"Python {platform.python_version()} at {sys.executable}"
    yield f"torch {torch.__version__}"
    yield f"{platform.system()} {platform.release()} on {platform.machine()}"


def _cpu() -> Iterator[str]:
    yield _library.cpu_name() or "model unknown"
    threads = torch.get_num_threads()
    yield f"{_usable_cores()} of {os.cpu_count()} logical cores usable, {threads} threads in torch"
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    useful = " ".join(name for name in _CPU_FEATURES if name in present)
    yield f"features: {useful or 'none that matters here'}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"torch's kernels use {capability}, sdfast's up to {_library.cpu_isa()}"
    shapes = tuning.tuned_shapes()
    remedy = "" if shapes else "; sdfast.tune(model, inputs) times those of a model"
    yield f"{shapes} shapes tuned for this CPU with {threads} threads in {tuning.path()}{remedy}"


def _usable_cores() -> int:
    """Those this process may run on, which a container or taskset may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> Iterator[str]:
    driver = _output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if driver is None:
        yield "no NVIDIA driver (nvidia-smi not found or failing)"
    else:
        yield from (f"driver sees: {line}" for line in driver.splitlines())
    if torch.version.cuda is None:
        remedy = "; install a CUDA build: https://pytorch.org/get-started" if driver else ""
        yield f"this torch is built without CUDA{remedy}"
    elif not torch.cuda.is_available():
        yield f"torch is built for CUDA {torch.version.cuda} but sees no device; is the driver new enough?"
    else:
        yield f"torch is built for CUDA {torch.version.cuda} and sees:"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield (
                f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor},"
                f" {properties.total_memory / 2**30:.0f} GiB"
            )


def _libraries() -> Iterator[str]:
    import sdfast.ops  # noqa: F401  loads the libraries, and without the schemas no kernel can register

    for library in _library.status():
        yield f"{'yes' if library.loaded else 'no '}  {library.name}: {library.detail}"
    yield from _gpus_served(_library.cuda_contents(), _capabilities(), _library.cuda_of_driver())
    for device, order in dispatch.ORDER.items():
        by_shape = "; on Hopper in half precision by shape, as measured" if device == "cuda" else ""
        yield f"order on {device}: {', '.join(order)}{by_shape}"


def _capabilities() -> list[tuple[int, int]]:
    """Of the GPUs that torch sees, or else the driver."""
    if torch.cuda.is_available():
        return _library.cuda_devices()
    listed = _output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    return [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)]


def _gpus_served(
    contents: _cuda_archs.Contents | None, capabilities: list[tuple[int, int]], driver: str | None
) -> Iterator[str]:
    """Whether the CUDA library has code for each kind of GPU, and how to build it where it has not."""
    for capability in sorted(set(capabilities)):
        gpu = "compute capability {}.{}".format(*capability)
        why = "it was not built" if contents is None else _cuda_archs.why_not(contents, capability, driver)
        if why is None:
            yield f"yes  _C_cuda serves {gpu}"
        elif capability < (8, 0):
            yield f"no   _C_cuda does not serve {gpu}: {why}"
        else:
            command = _cuda_archs.build_command(_cuda_archs.for_capability(capability))
            yield f"no   _C_cuda does not serve {gpu}: {why}; build it in a checkout, with nvcc: {command}"


def _build_tools() -> Iterator[str]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    tools = (
        (compiler or "c++", "a C++17 compiler, for the CPU kernels: apt install g++"),
        ("cmake", "cmake 3.22 or later: pip install cmake"),
        ("ninja", "ninja: pip install ninja"),
        ("nvcc", "the CUDA toolkit, only to build the CUDA kernels: SDFAST_CUDA_ARCHS in the README"),
    )
    for name, remedy in tools:
        version = _output_of(name, "--version")
        yield f"no   {name}: {remedy}" if version is None else f"yes  {name}: {_version_line(version)}"


def _optional_packages() -> Iterator[str]:
    extras: dict[str, str] = {}  # the first that brings a package
    for requirement in importlib.metadata.requires("sdfast") or []:
        optional = re.match(r"([\w.-]+).*\bextra == .(\w+)", requirement)
        if optional is not None and optional[2] in _EXTRAS:
            extras.setdefault(*optional.groups())
    for name, extra in extras.items():
        try:
            yield f"yes  {name} {importlib.metadata.version(name)}, for {_EXTRAS[extra]}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no   {name}, for {_EXTRAS[extra]}: pip install 'sdfast[{extra}]'"


def _version_line(text: str) -> str:
    """nvcc says its version in its fourth line, the others in their first."""
    lines = text.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def _output_of(*command: str) -> str | None:
    """What a program prints, or None where it is absent or fails. Looks beside this Python, too."""
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which(command[0], path=folders)
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
