"""The torch.library handle, the compiled libraries, and what is available here and why not.

Schemas are defined in Python (`define`), kernels register themselves from C++ when their library is
loaded. Loading happens once, when `sdfast.ops` is imported, and never fails the import: a machine
without a compiled library runs on torch, and `status()` says why.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import platform
import shutil
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch

from sdfast import _cuda_archs

LIBRARY = torch.library.Library("sdfast", "DEF")

_PACKAGE_DIR = pathlib.Path(__file__).parent
# Plain values, looked up in every call, so that torch.compile traces through and guards on them.
_native_ops: list[str] = []
_cuda_ops: list[str] = []
_fakes: dict[str, Callable[..., object]] = {}
# What serves `sdfast::<name>_triton`, by name.
launchers: dict[str, Callable[..., object]] = {}
_kernels: set[tuple[str, str]] = set()
_cpu_status: LibraryStatus | None = None
_cuda_status: LibraryStatus | None = None
# Where the CUDA kernels run. Tests set it to "cpu", where they have them executed (tests/simt).
cuda_device_type = "cuda"
# The instruction sets a CPU library is built for, best first. Each runs on all CPUs of those before it.
_CPU_ISAS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "baseline")


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


def define_native(
    schema: str, fake: Callable[..., object], python_kernel: Callable[..., object] | None = None
) -> Callable[..., Any]:
    """Define `sdfast::<schema>`, whose kernels are compiled, and return the operation.

    Args:
        fake: gives shapes, dtypes and strides.
        python_kernel: what serves it on CPU where compiled kernels need Python around them.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"sdfast::{name}", fake, lib=LIBRARY)
    _fakes[name] = fake
    if python_kernel is not None:
        LIBRARY.impl(name, python_kernel, "CPU")
    _native_ops.append(name)
    _note_kernels()
    return cast(Callable[..., Any], getattr(torch.ops.sdfast, name).default)


def define_triton(
    name: str, module: str, *, schema: str | None = None, fake: Callable[..., object] | None = None
) -> Callable[..., Any]:
    """Define `sdfast::<name>_triton`, with the schema and fake of `sdfast::<name>`, and return the operation.

    Args:
        name: an operation of `define_native`.
        module: of the function `name` that serves it, on CUDA and, interpreted, on the CPU. It is imported at
            the first call, and Triton with it.
        schema, fake: "(...) -> ..." and what gives shapes, of an operation that only Triton has.
    """
    run: Callable[..., Any] | None = None

    def launcher(*arguments: object, **keywords: object) -> object:
        nonlocal run
        if run is None:
            run = getattr(importlib.import_module(module), name)
        return run(*arguments, **keywords)

    operation = _define_second(f"{name}_triton", name, schema, fake)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(f"{name}_triton", launcher, key)
    launchers[name] = launcher
    _kernels.add((name, "triton"))
    return operation


def define_cuda(
    name: str, *, schema: str | None = None, fake: Callable[..., object] | None = None
) -> Callable[..., Any]:
    """Define `sdfast::<name>_cuda`, which csrc/<op>_cuda.cu serves; return it. See `define_triton`."""
    return _define_second(f"{name}_cuda", name, schema, fake)


def _define_second(
    second: str, name: str, schema: str | None, fake: Callable[..., object] | None
) -> Callable[..., Any]:
    """Define `sdfast::<second>`, by default with the schema and fake of `sdfast::<name>`."""
    if schema is None:
        native = str(getattr(torch.ops.sdfast, name).default._schema)  # "sdfast::name(...) -> ..."
        schema = native.removeprefix(f"sdfast::{name}")
    LIBRARY.define(f"{second}{schema}")
    torch.library.register_fake(f"sdfast::{second}", fake or _fakes[name], lib=LIBRARY)
    if second.endswith("_cuda"):
        _cuda_ops.append(name)
    return cast(Callable[..., Any], getattr(torch.ops.sdfast, second).default)


def cpu_isa() -> str:
    """The best instruction set of this CPU among those we build for, as torch sees it.

    torch's own override (ATEN_CPU_CAPABILITY) is respected, so a test can force a lower one.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # no public name yet
    if capability == "AVX512" and has_bf16():
        return "avx512_amx" if _can_use_amx() else "avx512_bf16"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first CPU: "model name", "vendor_id", "cpu family", ...; elsewhere nothing."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The CPU's model, as far as the system tells; a virtual machine's name is often that of several."""
    facts = cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {facts[key]}" for key in ("cpu family", "model") if facts.get(key)]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _can_use_amx() -> bool:
    """Whether this CPU has AMX, and Linux grants it to this process, which has to ask first.

    torch names the tiles only; every CPU that has them multiplies bf16 in them.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # no public names yet
    granted = getattr(torch.cpu, "_init_amx", lambda: False)
    return supported() and granted()


def load_cpu_library() -> LibraryStatus:
    """Load the best compiled CPU library this machine can run, once. Never raises."""
    global _cpu_status
    if _cpu_status is None:
        _cpu_status = _load_cpu_library()
        _note_kernels()
    return _cpu_status


def _load_cpu_library() -> LibraryStatus:
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
        if isa in ("avx512_amx", "avx512_bf16"):
            _kernels.add(("bf16_pairs", "cpu"))  # bf16 is multiplied as such, not widened
        if isa == "avx512_amx":  # many times faster than fp32
            _kernels.add(("bf16_tiles", "cpu"))
        return LibraryStatus(path.stem, True, f"loaded for {isa}")
    return LibraryStatus(
        "_C_cpu",
        False,
        "; ".join(problems) + "; build it: pip install --no-build-isolation . with a C++17 compiler",
    )


def load_cuda_library() -> LibraryStatus:
    """Load the compiled CUDA library, once, where torch is built for CUDA. Never raises."""
    global _cuda_status
    if _cuda_status is None:
        _cuda_status = _load_cuda_library()
        _note_kernels()
        if _cuda_status.loaded:
            # Before there is a CUDA tensor, when torch checks its own kernels. An import must not initialise
            # CUDA: processes that are forked later could not use it.
            torch.cuda._lazy_call(_check_cuda_devices)
    return _cuda_status


def _load_cuda_library() -> LibraryStatus:
    path = _PACKAGE_DIR / "_C_cuda.so"
    if not path.exists():
        remedy = _cuda_archs.build_command("9.0a") + " with nvcc, for a GPU of compute capability 9.0"
        return LibraryStatus("_C_cuda", False, f"{path.name} was not built: {remedy}")
    contents = cuda_contents()
    holds = str(contents or f"what it holds is not known without {path.stem}.json")
    if torch.version.cuda is None:
        return LibraryStatus("_C_cuda", False, f"built ({holds}), but this torch is without CUDA")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return LibraryStatus("_C_cuda", False, f"{path.name}: {error.__cause__ or error}")
    if contents is not None and "90a" in contents.code:
        _kernels.add(("hopper_units", "cuda"))  # kernels for Hopper's own units: cuda_hopper.cuh
    return LibraryStatus("_C_cuda", True, f"loaded: {holds}")


def _check_cuda_devices() -> None:
    """Take the CUDA kernels out of service, with a warning, where a GPU that torch sees is none of theirs."""
    global _cuda_status
    contents = cuda_contents()
    if contents is None:
        return
    for index, capability in enumerate(cuda_devices()):
        why = _cuda_archs.why_not(contents, capability, cuda_of_driver())
        if why is None:
            continue
        detail = (
            f"not for cuda:{index}, of compute capability {capability[0]}.{capability[1]}: {why}."
            f" To build for it: {_cuda_archs.build_command(_cuda_archs.for_capability(capability))}"
        )
        _cuda_status = LibraryStatus("_C_cuda", False, detail)
        _kernels.difference_update([kernel for kernel in _kernels if kernel[1] == "cuda"])
        warnings.warn(f"sdfast's CUDA kernels are {detail}", stacklevel=2)
        return


def cuda_contents() -> _cuda_archs.Contents | None:
    """What the CUDA library of this package holds, where there is one."""
    return _cuda_archs.read_contents(_PACKAGE_DIR / "_C_cuda.so")


def cuda_devices() -> list[tuple[int, int]]:
    """The compute capability of each GPU that torch sees."""
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def cuda_of_driver() -> str | None:
    """The newest CUDA that the driver knows, "13.0"; None where torch does not tell."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # no public name
    version = ask() if ask is not None else 0
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def triton_status() -> LibraryStatus:
    """Whether Triton can be imported, and can compile. Looks without importing it (that takes a second)."""
    if importlib.util.find_spec("triton") is None:
        return LibraryStatus("triton", False, "not installed: pip install triton")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return LibraryStatus(
            "triton", False, "found, but no C compiler, which it needs: install gcc, or set CC"
        )
    return LibraryStatus("triton", True, "found")


def status() -> list[LibraryStatus]:
    """Every library sdfast can use, loaded or not, with the reason."""
    return [load_cpu_library(), load_cuda_library(), triton_status()]


def has_kernel(op_name: str, backend: str) -> bool:
    """Whether a kernel of `sdfast::<op_name>` is compiled for "cpu" or "cuda", or written in "triton"."""
    return (op_name, backend) in _kernels


def _note_kernels() -> None:
    """Look up which operations have kernels by now."""
    has_kernel_for = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _native_ops:
        if has_kernel_for(f"sdfast::{name}", "CPU"):
            _kernels.add((name, "cpu"))
    for name in _cuda_ops:
        if has_kernel_for(f"sdfast::{name}_cuda", cuda_device_type.upper()):
            _kernels.add((name, "cuda"))
