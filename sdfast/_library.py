"""The torch.library handle, the compiled libraries, and what is available here and why not.

Schemas are defined in Python (`define`), kernels register themselves from C++ when their library is
loaded. Loading happens once, when `sdfast.ops` is imported, and never fails the import: a machine
without a compiled library runs on torch, and `status()` says why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("sdfast", "DEF")

_PACKAGE_DIR = pathlib.Path(__file__).parent
# The instruction sets a CPU library is built for, best first. Each runs on all CPUs of those before it.
_CPU_ISAS = ("avx512_bf16", "avx512", "avx2", "baseline")


@dataclasses.dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: its name, whether it is loaded, and if not, why not."""

    name: str
    loaded: bool
    detail: str


def define(schema: str, composite: Callable[..., object]) -> None:
    """Define `sdfast::<schema>`, served by `composite` (plain torch) until a kernel is registered for it.

    As a CompositeImplicitAutograd kernel the composite also yields the operation's fake and its
    gradient; an operation with a kernel of its own uses `define_native` instead.
    """
    LIBRARY.define(schema)
    LIBRARY.impl(schema.split("(", 1)[0], composite, "CompositeImplicitAutograd")


def define_native(schema: str, fake: Callable[..., object]) -> None:
    """Define `sdfast::<schema>`, whose kernels are compiled; `fake` gives shapes, dtypes and strides."""
    LIBRARY.define(schema)
    torch.library.register_fake(f"sdfast::{schema.split('(', 1)[0]}", fake, lib=LIBRARY)


def cpu_isa() -> str:
    """The best instruction set of this CPU among those we build for, as torch sees it.

    torch's own override (ATEN_CPU_CAPABILITY) is respected, so a test can force a lower one.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


@functools.cache
def load_cpu_library() -> LibraryStatus:
    """Load the best compiled CPU library this machine can run. Never raises."""
    problems = []
    for isa in _CPU_ISAS[_CPU_ISAS.index(cpu_isa()) :]:
        path = _PACKAGE_DIR / f"_C_cpu_{isa}.so"
        if not path.exists():
            problems.append(f"{path.name} was not built")
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            problems.append(f"{path.name}: {error.__cause__ or error}")
            continue
        return LibraryStatus(path.stem, True, f"loaded for {isa}")
    return LibraryStatus(
        "_C_cpu", False, "; ".join(problems) + "; build it: pip install . with a C++17 compiler"
    )


def triton_status() -> LibraryStatus:
    """Whether Triton can be imported. Looks for it without importing it (that takes a second)."""
    found = importlib.util.find_spec("triton") is not None
    return LibraryStatus("triton", found, "found" if found else "not installed: pip install triton")


def status() -> list[LibraryStatus]:
    """Every library sdfast can use, loaded or not, with the reason."""
    return [load_cpu_library(), triton_status()]


@torch.compiler.assume_constant_result
def has_kernel(op_name: str, device_type: str) -> bool:
    """Whether a compiled kernel of `sdfast::<op_name>` is registered for this kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and _has_kernel(f"sdfast::{op_name}", key)


@functools.cache
def _has_kernel(qualified_name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, key)


@torch.compiler.assume_constant_result
def why_no_cpu_kernel() -> str:
    """Why there is no compiled CPU kernel, for an error text."""
    return load_cpu_library().detail
