"""The U-Net's blocks by Triton against fp64: forward and gradients, as they are and compiled."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from gradients import check_gradients, gradients
from torch import Tensor, nn

from sdfast import dispatch
from sdfast.models.layers import BasicTransformerBlock, ResnetBlock2D
from sdfast.ops import _triton
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bf16 wrongly in tl.dot.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
pytestmark = [
    pytest.mark.skipif(_triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))),
]


class Case:
    """A block with its inputs and the gradient of its result, as a function of inputs and parameters."""

    def __init__(self, block: nn.Module, inputs: list[Tensor], dy: Tensor, dtype: torch.dtype) -> None:
        self.block = block.to(DEVICE, dtype)
        self.inputs = [t.to(DEVICE, dtype) for t in inputs]
        self.dy = dy.to(DEVICE, dtype)
        self.tensors = [*self.inputs, *(p.detach() for p in block.parameters())]

    def by(self, backend: str) -> Callable[..., Tensor]:
        """The function, served by this backend."""
        names = [name for name, _ in self.block.named_parameters()]

        def call(*tensors: Tensor) -> Tensor:
            inputs, parameters = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
            with dispatch.use_backend(backend):
                named = dict(zip(names, parameters, strict=True))
                return torch.func.functional_call(self.block, named, inputs)

        return call


def resnet(dtype: torch.dtype) -> Case:
    """An image and a time embedding; the number of channels changes."""
    block = ResnetBlock2D(16, 32, time_channels=24, groups=4, eps=1e-5)
    return Case(block, [torch.randn(2, 16, 5, 6), torch.randn(2, 24)], torch.randn(2, 32, 5, 6), dtype)


def transformer(dtype: torch.dtype) -> Case:
    """Tokens and a text."""
    block = BasicTransformerBlock(32, 24, heads=2)
    return Case(block, [torch.randn(2, 12, 32), torch.randn(2, 7, 24)], torch.randn(2, 12, 32), dtype)


blocks = pytest.mark.parametrize("make", [resnet, transformer])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@blocks
def test_gradients(make: Callable[[torch.dtype], Case], dtype: torch.dtype) -> None:
    case = make(dtype)
    check_gradients(case.by("triton"), case.by("torch"), case.tensors, case.dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_two_sources(dtype: torch.dtype) -> None:
    """On the way up, without a gradient: nobody concatenates."""
    block = ResnetBlock2D(24, 32, time_channels=24, groups=4, eps=1e-5)
    inputs = [torch.randn(2, 16, 5, 6), torch.randn(2, 24), torch.randn(2, 8, 5, 6)]
    case = Case(block, inputs, torch.empty(0), dtype)
    exact = case.by("torch")(*(t.double() for t in case.tensors))
    with mock.patch.object(torch, "cat", side_effect=AssertionError("a concatenation")):
        actual = case.by("triton")(*case.tensors)
    assert_within_budget(actual, case.by("torch")(*case.tensors), exact)


@blocks
def test_repeats(make: Callable[[torch.dtype], Case]) -> None:
    case = make(torch.float32)
    first, second = (gradients(case.by("triton"), case.tensors, case.dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("make", "files"),
    [
        (resnet, "_conv2d_kernels conv2d_backward group_norm group_norm_backward linear linear_backward"),
        (transformer, "attention attention_backward layer_norm linear linear_backward"),
    ],
)
def test_kernels_serve(make: Callable[[torch.dtype], Case], files: str) -> None:
    """Of every operation and its gradient: torch would give the same results."""
    case = make(torch.float32)
    with _triton.recording() as launches:
        gradients(case.by("triton"), case.tensors, case.dy)
    launched = {launch.kernel.fn.__module__ for launch in launches}
    assert {f"sdfast.ops.{file}_triton" for file in files.split()} <= launched


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@blocks
def test_compiles_whole(make: Callable[[torch.dtype], Case], backend: str) -> None:
    case = make(torch.float32)
    leaves = [*(t.requires_grad_() for t in case.inputs), *case.block.parameters()]

    def train(block: Callable[..., Tensor]) -> list[Tensor]:
        with dispatch.use_backend("triton"):
            y = block(*case.inputs)
        return [y, *torch.autograd.grad(y, leaves, case.dy)]

    compiled = train(torch.compile(case.block, fullgraph=True, backend=backend))
    for actual, expected in zip(compiled, train(case.block), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
