"""Inputs between guard zones: what reads beside them meets NaN, what writes beside them is found out.

What an operation allocates itself is beyond this: `make sanitize` and `poisoned_memory` look after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 64  # elements before and after: more than a vector of any instruction set


class Guards:
    """Copies tensors into guarded memory of their own, and remembers it."""

    def __init__(self) -> None:
        self._memories: list[tuple[Tensor, Tensor]] = []

    def around(self, t: Tensor, offset: int = 0) -> Tensor:
        """The values of t in its strides, `offset` elements off alignment; all else there is NaN."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        memory = t.new_full((2 * GUARD + offset + extent,), float("nan"))
        view = memory.as_strided(t.shape, t.stride(), GUARD + offset)
        view.copy_(t)
        self._memories.append((memory, memory.clone()))
        return view

    def check(self) -> None:
        """Nothing was written, neither to the guards nor to the inputs between them."""
        for memory, before in self._memories:
            assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8))
