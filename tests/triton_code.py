"""What the Triton kernels become on a GPU, without one: launches recorded from fake CUDA tensors, compiled.

    calls = record(lambda: ops.group_norm(torch.empty(2, 320, 64, 64, device="cuda"), 32), architecture=90)
    code = compile_launch(calls[0], 90)

Triton's own code turns arguments into what a kernel is specialised for, so that what is compiled is what a
launch with such arguments would compile. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
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
from sdfast.ops._triton import Launch, recording

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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
    """A compiled kernel: its PTX, a thread's registers and stack (what it spills), a block's shared memory."""

    name: str
    ptx: str
    registers: int
    stack_bytes: int
    shared_bytes: int


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
    return Code(compiled.metadata.name, compiled.asm["ptx"], registers, stack, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return int(registers), int(stack)
