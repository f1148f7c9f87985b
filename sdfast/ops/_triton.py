"""What the Triton kernels share: which calls they can take, how they are launched, their launch parameters.

A kernel is a function of pointers and numbers in `<op>_triton.py`, beside the launcher that serves the
operation `sdfast::<op>_triton`. Launchers launch by `launch` alone, so that one place sees every launch: it
sets the device, and under `recording` it makes a list instead, which says without a GPU what would run there.
Nothing is tuned at a launch; a `Config` comes from the shape alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdfast import _library

# Whether kernels run in Triton's interpreter, on the CPU: its own switch, read when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_STATUS = _library.triton_status()
_MISSING = None if _STATUS.loaded else _STATUS.detail
_REGISTERS = 65536  # of a multiprocessor; a thread has a multiple of 8, at most 255


class Config(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
        constants: the kernel's `tl.constexpr` arguments that are free to choose: tile sizes.
        num_warps: 32 threads each, of one program.
        num_stages: depth of the software pipeline.
        occupancy: programs that share the registers of a multiprocessor, which says how many a thread may
            have. Where it is None ptxas decides: it does not know of Triton's shared memory, and may spill a
            few numbers for the sake of one more program, which often finds no room.
    """

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3
    occupancy: int | None = None

    @property
    def max_registers(self) -> int | None:
        """Of a thread; None where ptxas decides."""
        if self.occupancy is None:
            return None
        return min(_REGISTERS // (32 * self.num_warps * self.occupancy) // 8 * 8, 255)


class Launch(NamedTuple):
    """One launch as `recording` keeps it: tensors may be fake ones; keywords are constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


_recorded: list[Launch] | None = None
_architecture = 90


@contextlib.contextmanager
def recording(architecture: int = 90) -> Iterator[list[Launch]]:
    """Launch nothing; keep what would be launched on a GPU of this compute capability, 90 for 9.0."""
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _architecture = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: object) -> None:
    """Run `grid` programs of a kernel on the device and the current stream of its first tensor argument.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three sizes; nothing happens where one of them is 0.
        arguments: tensors, numbers and None, in the kernel's order.
        config: launch parameters.
        constants: further `tl.constexpr` arguments, which the call's kind decides.
    """
    if 0 in grid:
        return
    keywords = {
        **config.constants, **constants, "num_warps": config.num_warps, "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # Triton's default is about to change
        "maxnreg": config.max_registers,
    }  # fmt: skip
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, keywords))
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **keywords)
    else:
        kernel[grid](*arguments, **keywords)


def architecture(device: torch.device) -> int:
    """The compute capability, 90 for 9.0; of the interpreter and of `recording` what the latter said."""
    if device.type != "cuda" or _recorded is not None:
        return _architecture
    return _capability(device.index)


def architecture_there(device: torch.device) -> int | None:
    """As `architecture`; None where no GPU of NVIDIA's is there to be asked."""
    if _recorded is None and (torch.version.hip is not None or not torch.cuda.is_available()):
        return None
    return architecture(device)


@functools.lru_cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


# What one block may hold, in bytes, by compute capability.
_SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def shared_memory_bytes(device: torch.device) -> int:
    """What the programs of a kernel may hold of shared memory, each."""
    return _SHARED_MEMORY.get(architecture(device), 101376)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; without a GPU, an H100's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


class Machine(NamedTuple):
    """What plans depend on of a GPU: compute capability, multiprocessors, shared memory of a block."""

    architecture: int
    multiprocessors: int
    shared_bytes: int

    @property
    def reads_shared_memory(self) -> bool:
        """Whether tensor cores take factors from shared memory; elsewhere they fill registers."""
        return self.architecture in (90, 100)


def machine(device: torch.device) -> Machine:
    """Of `device`, as the functions above say."""
    return Machine(architecture(device), multiprocessors(device), shared_memory_bytes(device))


def product_precision(dtype: torch.dtype, kind: Literal["matmul", "conv"]) -> Literal["tf32", "ieee"]:
    """`input_precision` of `tl.dot`, as torch's switches for products and for convolutions want it.

    Asked is `fp32_precision`, which answers for the older `allow_tf32` too; the latter raises once the former
    was set. Products of fp16 and bf16 are exact in any case, and so have one kernel.
    """
    return "tf32" if dtype is not torch.float32 or _allows_tf32(kind) else "ieee"


def _allows_tf32(kind: str) -> bool:
    backends: Any = torch.backends
    switch = backends.cuda.matmul if kind == "matmul" else backends.cudnn.conv
    return switch.fp32_precision == "tf32"


# torch.compile takes its answer for a constant, and notices no later change: it cannot trace what
# torch.backends does when it is asked. (torch.compiler's decorator for this would import the compiler.)
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(first: str, device_type: str) -> str | None:
    """Why no Triton kernel can run on this kind of device, or None; `first` is the argument that is there."""
    if device_type != "cuda" and not (device_type == "cpu" and INTERPRETED):
        return f"{first} is on {device_type}, Triton runs on cuda"
    return _MISSING
