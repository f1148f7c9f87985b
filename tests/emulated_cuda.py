"""The CUDA kernels on the CPU: builds the emulation (tests/simt) and lets `backend="cuda"` run on it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import numpy as np
import pybind11
import torch

from sdfast import _library

ROOT = pathlib.Path(__file__).parents[1]
BUILD = ROOT / "build" / "emulated-cuda"
LIBRARY = BUILD / "_C_cuda_emulated.so"


def cuda_include_dir() -> pathlib.Path | None:
    """The CUDA toolkit's headers: beside nvcc, or in CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and pathlib.Path(nvcc).resolve().parents[1]]
    homes += sorted(map(str, pathlib.Path("/usr/local").glob("cuda-*")), reverse=True)
    found = (pathlib.Path(home) / "include" for home in homes if home)
    return next((folder for folder in found if (folder / "cuda_fp16.h").exists()), None)


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None."""
    tools = [tool for tool in ("cmake", "ninja", "c++") if _tool(tool) is None]
    if tools:
        return f"no {', '.join(tools)}"
    return None if cuda_include_dir() else "no headers of the CUDA toolkit"


def _tool(name: str) -> str | None:
    return shutil.which(
        name, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    )


@functools.cache
def build(target: str = LIBRARY.stem) -> pathlib.Path:
    """A library, built where it is not yet; processes take turns."""
    includes = (sysconfig.get_paths()["include"], pybind11.get_include(), np.get_include())
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [_tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
             f"-DSDFAST_TORCH_DIR={torch.__path__[0]}", f"-DSDFAST_OUTPUT_DIR={BUILD}",
             "-DSDFAST_EMULATE_CUDA=ON", f"-DSDFAST_CUDA_INCLUDE_DIR={cuda_include_dir()}",
             f"-DSDFAST_PYTHON_INCLUDE_DIRS={';'.join(includes)}"],
            [_tool("cmake"), "--build", BUILD, "--target", target],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-6000:] + done.stderr[-3000:])
    return BUILD / f"{target}.so"


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Let the CUDA kernels serve `backend="cuda"` on CPU tensors."""
    torch.ops.load_library(str(build()))
    before = _library._kernels.copy(), _library.cuda_device_type
    _library.cuda_device_type = "cpu"
    _library._note_kernels()
    try:
        yield
    finally:
        _library._kernels, _library.cuda_device_type = before


@functools.cache
def _functions() -> ctypes.CDLL:
    functions = ctypes.CDLL(str(build()))
    functions.simt_seed.argtypes = (ctypes.c_uint64,)
    functions.simt_device.argtypes = (ctypes.c_int, ctypes.c_int)
    functions.simt_hopper.argtypes = (ctypes.c_int,)
    return functions


@contextlib.contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """Run the threads of a block, and the blocks, in this order: 0 and 1 are opposite ones, others are drawn.

    A GPU has an order of its own.
    """
    if torch.cuda.is_available():
        yield
        return
    _functions().simt_seed(seed)
    try:
        yield
    finally:
        _functions().simt_seed(0)


@contextlib.contextmanager
def device(capability: int = 90, multiprocessors: int = 132) -> Iterator[None]:
    """Let launchers see a GPU of this compute capability, 90 for 9.0, unless there is one."""
    if torch.cuda.is_available():
        yield
        return
    _functions().simt_device(capability, multiprocessors)
    try:
        yield
    finally:
        _functions().simt_device(90, 132)


def tiles_copied() -> int:
    """How many tiles were since this was asked before."""
    return _functions().simt_tiles_copied()


@contextlib.contextmanager
def hopper(multiprocessors: int = 132) -> Iterator[None]:
    """Let launchers find the kernels for Hopper's own units, and a GPU that has them, unless there is one."""
    if torch.cuda.is_available():
        yield
        return
    _functions().simt_hopper(1)
    try:
        with device(90, multiprocessors):
            yield
    finally:
        _functions().simt_hopper(0)
