"""A watch over the memory that kernels touch in Triton's interpreter, which itself reads and writes anywhere.

Every address that a load or a store has where its mask is true has to lie in one of the launch's tensors, between
its first element and its last. Atomics are not watched; no kernel here has one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


class _Memory:
    """The bytes of a launch's tensors."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        spans = sorted(_span(t) for t in tensors if t.numel())
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        # Of views of one storage that begin earlier, one may end later.
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Fail where an active lane's element is not in here."""
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if at.size == 0:
            return
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        place = np.searchsorted(self.begins, at, side="right")
        outside = place == 0
        outside |= at + np.uint64(itemsize) > self.ends[np.maximum(place, 1) - 1]
        if outside.any():
            raise AssertionError(
                f"{self.kernel} {what} {np.count_nonzero(outside)} of {at.size} elements outside its tensors, "
                f"one at {int(at[outside][0]):#x}; these lie at "
                + ", ".join(f"{int(b):#x}-{int(e):#x}" for b, e in zip(self.begins, self.ends, strict=True))
            )


def _span(t: Tensor) -> tuple[int, int]:
    """Where its first element begins and its last one ends."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + extent * t.element_size()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Launches fail that read or write outside their tensors, if they are interpreted."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    memory: _Memory | None = None
    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal memory
        tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
        before, memory = memory, _Memory(kernel.fn.__name__, tensors)
        try:
            return run(kernel, *arguments, **keywords)
        finally:
            memory = before

    def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        if memory is not None:
            memory.check("loads", pointers, mask)
        return load(builder, pointers, mask, *rest, **more)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        if memory is not None:
            memory.check("stores", pointers, mask)
        return store(builder, pointers, value, mask, *rest, **more)

    with (
        mock.patch.object(InterpretedFunction, "run", watched),
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield
