"""What the Triton kernels become on a GPU, without one: launches recorded from fake CUDA tensors, compiled.

    python tests/triton_code.py [group_norm ...] [--architectures 80 89 90 100 120] [--all-plans]

prints a line for every kernel that the calls in tests/<op>_launches.py would run, and fails where one spills
registers, needs more shared memory than a block can have, or multiplies half-precision tiles on sm_90 by anything
but wgmma, tiles of `_NARROW` excepted. Triton's own code turns arguments into what a kernel is specialised for, so that what is
compiled is what a launch with such arguments would compile. `--all-plans` compiles all that a launcher could
choose instead of what it does choose. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from sdfast import _library
from sdfast.ops._launch_table import exploring, preferring
from sdfast.ops._triton import _SHARED_MEMORY, Launch, recording

TESTS = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# By kernel, the constant that gives a tile's rows. wgmma multiplies 64 of them; tiles of 16 are for products of at
# most as many rows, which wait for the memory of the other factor however they are multiplied.
_NARROW = {"_matmul_kernel": "BLOCK_M", "_weight_gradient_kernel": "BLOCK_O"}


class _Launchers(TorchDispatchMode):
    """Calls the launchers of Triton operations, where fake tensors would be given to their fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("sdfast::").removesuffix("_triton")
        if func.namespace == "sdfast" and func._schema.name.endswith("_triton"):
            with self:
                return _library.launchers[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(call: Callable[[], object], architecture: int = 90) -> list[Launch]:
    """The launches of a call on CUDA tensors, which it makes itself; they hold nothing."""
    with recording(architecture) as launches, FakeTensorMode(), _Launchers():
        call()
    return launches


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        digest: the same for the same code.
        registers, stack_bytes: of a thread; what it spills lies on its stack.
        shared_bytes: of a block.
        is_matrix: it multiplies fp16 or bf16 tiles.
        has_wgmma: by Hopper's instructions for it alone.
        is_narrow: its tiles have too few rows for them, see `_NARROW`.
    """

    name: str
    digest: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    is_matrix: bool
    has_wgmma: bool
    is_narrow: bool

    def faults(self) -> list[str]:
        found = [f"{self.stack_bytes} bytes of stack"] if self.stack_bytes else []
        if self.shared_bytes > _SHARED_MEMORY[self.architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.architecture == 90 and self.is_matrix and not (self.has_wgmma or self.is_narrow):
            found.append("no wgmma")
        return found

    def __str__(self) -> str:
        return (
            f"sm_{self.architecture} {self.name}: {self.registers} registers, {self.shared_bytes} bytes shared"
            + (", wgmma" if self.has_wgmma else "") + "".join(f", FAULT: {fault}" for fault in self.faults())
        )  # fmt: skip


class _Driver:
    """As much of a GPU as Triton asks for to compile."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what is compiled for one is not taken for another

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, architecture: int) -> Code:
    """Compile what a launch would run, for a compute capability: 90 for 9.0."""
    arguments = [MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in launch.arguments]
    triton.runtime.driver.set_active(_Driver(architecture))
    compiled = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.keywords)
    registers, stack = _resources(compiled.asm["cubin"])
    halves = re.search(r"tt\.dot .*(f16|bf16)>.* ->", compiled.asm["ttir"]) is not None
    name, ptx = compiled.metadata.name, compiled.asm["ptx"]
    return Code(
        name, compiled.hash, architecture, registers, stack, compiled.metadata.shared, halves,
        has_wgmma="wgmma.mma_async" in ptx and "mma.sync" not in ptx,
        is_narrow=launch.keywords.get(_NARROW.get(name, "")) == 16,
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return int(registers), int(stack)


def cases(op: str) -> dict[str, Callable[[], object]]:
    """The calls of tests/<op>_launches.py, by what they are."""
    return importlib.import_module(f"{op}_launches").code_cases()


def launches_of(call: Callable[[], object], architecture: int, all_plans: bool) -> list[Launch]:
    """What a call launches, or what it would with any of the plans that it can choose."""
    with exploring() as met:
        launches = record(call, architecture)
    for key, plans in met.items() if all_plans else ():
        for plan in plans:
            with preferring(key, plan):
                launches += record(call, architecture)
    return launches


def compile_case(op: str, case: str, architecture: int, all_plans: bool = False) -> list[Code]:
    """The distinct kernels of one call."""
    launches = launches_of(cases(op)[case], architecture, all_plans)
    return list(
        {code.digest: code for code in (compile_launch(each, architecture) for each in launches)}.values()
    )


def all_ops() -> list[str]:
    return sorted(path.name.removesuffix("_launches.py") for path in TESTS.glob("*_launches.py"))


def main() -> None:
    """Compile everything, in as many processes as there are cores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", default=all_ops())
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 89, 90, 100, 120])
    parser.add_argument("--all-plans", action="store_true", help="also those that no call chooses")
    parser.add_argument("--first-case", action="store_true", help="of each operation alone")
    options = parser.parse_args()
    tasks = [
        (op, case, architecture, options.all_plans)
        for op in options.ops
        for case in list(cases(op))[: 1 if options.first_case else None]
        for architecture in options.architectures
    ]
    codes: dict[str, Code] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        for task, found in zip(tasks, pool.map(compile_case, *zip(*tasks, strict=True)), strict=True):
            for code in found:
                if code.digest not in codes:
                    print(f"{task[0]}, {task[1]}: {code}", flush=True)
                codes[code.digest] = code
    faults = [str(code) for code in codes.values() if code.faults()]
    print(f"{len(codes)} kernels, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
