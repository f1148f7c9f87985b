"""Gradients of an operation through a compiled kernel, through eager torch and in fp64, on the same values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sdfast.testing import assert_within_budget

Call = Callable[..., Tensor]


def gradients(call: Call, tensors: Sequence[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The result, then the gradient of each tensor that there is."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach()] + [leaf.grad for leaf in leaves if leaf is not None]  # type: ignore[misc]


def check_gradients(
    ours: Call, eager: Call, tensors: Sequence[Tensor | None], dy: Tensor, what: str = "call"
) -> None:
    """`ours` and its gradients within the budget of eager's error.

    Args:
        tensors: what the calls take and are differentiated by.
        dy: the gradient of the result, of the dtype of the tensors.
    """
    wide = [None if t is None else t.double() for t in tensors]
    results = (gradients(f, values, dy) for f, values in ((ours, tensors), (eager, tensors), (eager, wide)))
    for i, (actual, expected, exact) in enumerate(zip(*results, strict=True)):
        # Of a few elements eager's error is chance; what every element may err by is then the floor.
        scale = exact.abs() + (4 * exact.abs().mean() if exact.numel() < 256 else 0)
        assert_within_budget(actual, expected, exact, magnitude=scale, what=f"{what}, result {i}")
