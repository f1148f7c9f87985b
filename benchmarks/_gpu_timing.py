"""What the GPU benchmarks share: timing by events, what the card reaches, and what card it is."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from collections.abc import Callable

import torch

from sdfast import _library
from sdfast.testing import spread

# The operation whose Triton kernel serves a call of ours.
KERNELS = {
    "group_norm": "group_norm_forward", "layer_norm": "layer_norm_forward", "linear": "linear_rows",
    "attention": "attention_forward", "conv2d": "conv2d_kernel", "diffusion_step": "diffusion_step",
}  # fmt: skip
_CARD = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


class Timer:
    """Milliseconds of a call on the device, with cold caches."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(1 << 28 if self.on_gpu else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            return milliseconds(call, 1, on_gpu=False)
        self.flush.zero_()
        torch.cuda._sleep(1_000_000)  # while this runs, Python queues what follows
        return milliseconds(call, 1, on_gpu=True)


def milliseconds(call: Callable[[], object], calls: int, *, on_gpu: bool) -> float:
    """Of one call, the mean of some that follow each other."""
    if not on_gpu:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - began) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


def ceilings(timer: Timer, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """GB/s of a copy, bytes read plus bytes written, and TFLOP/s of a matrix product."""
    size = 8192 if timer.on_gpu else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    large = torch.empty(1 << 29 if timer.on_gpu else 1 << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(large)
    copy = spread([timer(lambda: target.copy_(large)) for _ in range(10)])[1]
    product = spread([timer(lambda: a @ b) for _ in range(10)])[1]
    return 2 * large.numel() / copy / 1e6, 2 * size**3 / product / 1e9


def card() -> dict[str, str]:
    """What nvidia-smi says of the card at this moment; MHz, W and degrees C. Empty where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = answer.stdout.splitlines()
    if answer.returncode or not lines:
        return {}
    return dict(zip(_CARD, (part.strip() for part in lines[0].split(",")), strict=False))


def versions() -> dict[str, str | None]:
    """Of what a time on the GPU depends on; None for what is not installed."""

    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {package: installed(package) for package in ("torch", "triton", "diffusers")}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {**found, "cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def kernels_there() -> dict[str, bool]:
    """Which operations have a Triton kernel by now; the others are torch's, whatever backend is named."""
    return {op: _library.has_kernel(kernel, "triton") for op, kernel in KERNELS.items()}
