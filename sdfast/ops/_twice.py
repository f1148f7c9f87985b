"""Gradients that are to be differentiated again: by torch's own operations instead of the kernels.

Autograd records a backward only under `create_graph=True`: gradient penalties, Hessian-vector products. In
its first derivative already, the operation's formula is evaluated once more, from the inputs that the forward
saved, which keep their place in the graph, and torch differentiates it. What the forward saved of its results
must not be read there.

torch's `once_differentiable` would refuse instead, but by a node that leads to no input: torch.autograd.grad
never runs it, and terms would be missing without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable(by_torch: _Backward) -> Callable[[_Backward], _Backward]:
    """A Function's `backward` by its kernels, and by `by_torch`, of the same arguments, where it is recorded.

    Graphs of torch.compile never are: they refuse a second derivative themselves.
    """

    def decorate(by_kernels: _Backward) -> _Backward:
        @functools.wraps(by_kernels)
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return by_torch(ctx, *gradients)
            return by_kernels(ctx, *gradients)

        return backward

    return decorate


def gradients(
    formula: Callable[..., Any], inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradient of `formula(*inputs)`, which is recorded, by each input that needs one."""
    if not any(needed):
        return [None] * len(needed)
    # Aliases, for one tensor may be several inputs.
    pairs = zip(inputs, needed, strict=True)
    aliases = [t.view_as(t) if wanted and t is not None else t for t, wanted in pairs]
    leaves = [t for t, wanted in zip(aliases, needed, strict=True) if wanted and t is not None]
    with torch.autocast(dy.device.type, enabled=False):
        found = iter(torch.autograd.grad(formula(*aliases), leaves, dy, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]
