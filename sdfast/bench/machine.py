"""What a record's numbers depend on: the machine, its measured limits, versions, threads, the allocator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping

import torch

from sdfast import __version__, _library
from sdfast.memory import total_memory_bytes
from sdfast.testing import copy_gb_per_s, environment, peak_gflop_per_s, spread, time_alternating

_PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "numpy", "openvino", "onnxruntime", "onnx", "onnxscript",
    "scikit-image",
)  # fmt: skip
# What changes how threads wait and how memory is had.
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "LD_PRELOAD",
    "MALLOC_CONF", "MALLOC_ARENA_MAX", "PYTORCH_CUDA_ALLOC_CONF", "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY", "SDFAST_CACHE_DIR",
)  # fmt: skip


def slug(device: str = "cpu") -> str:
    """This machine as the name of a folder: "cpu-2core-avx512_bf16-amd26", "nvidia-h200".

    A CPU's ends in its generation where that is known: the next one runs the same instructions twice as fast.
    """
    if torch.device(device).type == "cpu":
        parts = ("cpu", f"{os.cpu_count()}core", _library.cpu_isa(), _generation(_library.cpu_facts()))
        return "-".join(filter(None, parts))
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _generation(facts: Mapping[str, str]) -> str:
    """AMD numbers its generations as families (25: Zen 3 and 4, 26: Zen 5), Intel as models of family 6."""
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(facts.get("vendor_id", ""), "")
    key = "model" if vendor == "intel" else "cpu family"
    return vendor and vendor + facts.get(key, "")


def description(device: str, *, keeps_freed_memory: bool) -> dict[str, object]:
    """The environment block of a record.

    Args:
        keeps_freed_memory: whether `sdfast.memory.keep_freed_memory` took effect in this process.
    """
    return {
        **environment(),
        "sdfast": __version__,
        "device": device,
        "system": f"{platform.system()} {platform.release()} on {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": total_memory_bytes(torch.device(device)),
        "kernels": _library.cpu_isa() if _library.load_cpu_library().loaded else None,
        "allocator": "glibc, keeps what is freed where times are measured"
        if keeps_freed_memory
        else "the system's, as it is",
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s that this device multiplies at most, measured now.

    On a CPU by the kernels' inner loop, without compiled kernels and on a GPU by a large matrix product.
    """
    if device == "cpu" and dtype != torch.float16 and _library.load_cpu_library().loaded:
        return peak_gflop_per_s(dtype, rounds=5)
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b, device) / 1e9


def copy_rate(device: str) -> float:
    """GB/s of a copy of 128 MiB, on a GPU of 1 GiB; bytes read plus bytes written."""
    if device == "cpu":
        return copy_gb_per_s(2**27)
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device) / 1e9


def _median_seconds(call: object, device: str) -> float:
    from sdfast.bench.timing import settled

    assert callable(call)
    return spread(time_alternating({"call": settled(call, device)}, rounds=10)["call"])[1]


def limits(dtypes: tuple[str, ...], device: str) -> dict[str, object]:
    """The two lines of a roofline: what is copied, and what is multiplied in each dtype."""
    return {
        "copy_gb_per_s": copy_rate(device),
        "peak_gflop_per_s": {dtype: peak(getattr(torch, dtype), device) for dtype in dtypes},
    }
