"""Gradients of conv2d in Triton against fp64: kernels, strides, paddings, the upsample, splits over pixels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gradients import check_gradients, gradients
from test_conv2d_backward import Call
from torch import Tensor

from sdfast import dispatch, ops
from sdfast.ops import _triton
from sdfast.ops.conv2d import NormPrologue, conv2d_torch
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bf16 wrongly in tl.dot.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
# (N, C_in, H, W, C_out, kernel, stride, padding); images smaller than a block of pixels, and rows longer
CASES = (
    (1, 3, 7, 9, 5, 3, 1, 1),
    (2, 4, 1, 1, 40, 3, 1, 1),
    (1, 32, 5, 4, 48, 1, 1, 0),
    (2, 17, 9, 8, 3, 3, 2, 1),
    (1, 16, 8, 8, 16, 3, 2, (0, 1, 0, 1)),
    (2, 4, 5, 5, 3, 2, 3, 0),  # a stride beyond the kernel: pixels that nothing meets
    (1, 9, 7, 9, 16, 3, 2, (2, 0, 1, 3)),
    (1, 2, 3, 70, 1, 3, 1, 1),
    (9, 1, 2, 3, 6, 3, 1, 1),
)
UPSAMPLED = ((2, 3, 3, 5, 18, 3, 1, 1), (1, 16, 1, 1, 16, 3, 1, 1), (1, 5, 3, 3, 7, 5, 1, 2))
pytestmark = [
    pytest.mark.skipif(_triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))),
]


def triton(case: tuple, dtype: torch.dtype, upsample: bool = False) -> Call:
    return Call(case, dtype, upsample, "triton", DEVICE)


def weight_gradient(dy: Tensor, x: Tensor, kernel: int, stride: int, padding: tuple[int, ...]) -> Tensor:
    op = torch.ops.sdfast.conv2d_weight_gradient_triton
    return op(dy, x, kernel, kernel, stride, padding, False)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype, upsample: bool) -> None:
    for case in UPSAMPLED if upsample else CASES:
        call = triton(case, dtype, upsample)
        check_gradients(call.ours, call.eager, call.tensors, call.dy, str(case))
    bare = [*call.tensors[:2], None, None, None]
    check_gradients(call.ours, call.eager, bare, call.dy, "alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_in_several_parts(dtype: torch.dtype) -> None:
    """A few parts, many parts, and one row of dW by itself."""
    for images, channels, height, width, rows, stride in (
        (1, 16, 33, 34, 24, 1), (2, 16, 33, 65, 16, 2), (3, 2, 19, 20, 1, 1),
    ):  # fmt: skip
        x = torch.randn(images, channels, height, width).to(DEVICE, dtype)
        eager, exact = x.new_empty(rows, channels, 3, 3).requires_grad_(), x.double()
        y = torch.conv2d(x, eager, stride=stride, padding=1)
        dy = torch.randn_like(y)
        (eager_dw,) = torch.autograd.grad(y, eager, dy)
        wide = eager.detach().double().requires_grad_()
        y = torch.conv2d(exact, wide, stride=stride, padding=1)
        (exact_dw,) = torch.autograd.grad(y, wide, dy.double())
        actual = weight_gradient(dy, x, 3, stride, (1, 1, 1, 1))
        assert_within_budget(actual, eager_dw, exact_dw)
        assert torch.equal(actual, weight_gradient(dy, x, 3, stride, (1, 1, 1, 1)))
        with _triton.recording() as launches:
            weight_gradient(dy, x, 3, stride, (1, 1, 1, 1))
        (product, finish), splits = launches, launches[0].grid[1]
        assert splits > 1 and product.arguments[2].shape[0] == splits == finish.arguments[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    call = triton((2, 17, 5, 4, 18, 3, 1, 1), dtype)
    expected = gradients(call.ours, call.tensors, call.dy)
    x, weight, bias, time_embedding, residual = call.tensors

    def strided(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        wider = torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
        return call.ours(wider, weight.contiguous(memory_format=torch.channels_last), *others)

    for run, tensors in (
        (call.ours, (x.contiguous(), weight, bias, time_embedding, residual.contiguous())),
        (strided, (x, weight, bias, time_embedding.t().contiguous().t(), residual)),
    ):
        for actual, wanted in zip(gradients(run, tensors, call.dy), expected, strict=True):
            assert torch.equal(actual, wanted)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    y = call.ours(x.requires_grad_(), weight, bias, time_embedding, residual)
    y.backward(call.dy.contiguous())
    for t in (y, x.grad, weight.grad):
        assert t is not None and t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("chosen", range(5))
def test_only_what_is_asked_for(chosen: int) -> None:
    call = triton((2, 16, 5, 4, 18, 3, 1, 1), torch.float32)
    expected = gradients(call.ours, call.tensors, call.dy)[1 + chosen]
    for t in call.tensors:
        t.requires_grad_(t is call.tensors[chosen])
    call.ours(*call.tensors).backward(call.dy)
    torch.testing.assert_close(call.tensors[chosen].grad, expected)
    assert all(t.grad is None for t in call.tensors if t is not call.tensors[chosen])


def test_norm_prologue() -> None:
    call = triton((2, 32, 4, 6, 48, 3, 1, 1), torch.float32)
    tensors = [*call.tensors[:3], torch.randn(32, device=DEVICE), torch.randn(32, device=DEVICE)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return ops.conv2d(x, weight, bias, padding=1, norm=NormPrologue(4, *norm), backend="triton")

    def eager(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        more = {"norm_groups": 4, "norm_weight": norm[0], "norm_bias": norm[1], "norm_silu": True}
        return conv2d_torch(x, weight, bias, 1, (1, 1, 1, 1), **more)

    check_gradients(ours, eager, tensors, call.dy)


def test_two_sources() -> None:
    """Statistics too: y's gradient is that of all three results."""
    call = triton((2, 16, 4, 6, 8, 3, 1, 1), torch.float32)
    tensors = [
        call.tensors[0],
        torch.randn(2, 5, 4, 6, device=DEVICE),
        torch.randn(8, 21, 3, 3, device=DEVICE),
    ]

    def by(backend: str, x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
        y, mean, rstd = ops.conv2d(x, weight, padding=1, skip=skip, stats_groups=2, backend=backend)
        return y * mean.mean() + rstd.sum()

    check_gradients(partial(by, "triton"), partial(by, "torch"), tensors, call.dy)


def test_nothing_to_sum() -> None:
    dy, x = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(0, 2, 4, 4, device=DEVICE)
    assert torch.equal(weight_gradient(dy, x, 3, 1, (1, 1, 1, 1)), torch.zeros(3, 2, 3, 3, device=DEVICE))
    dx = torch.ops.sdfast.conv2d_input_gradient_triton(dy, torch.ones(3, 2, 3, 3), 4, 4, 1, [1] * 4, False)
    assert dx.shape == (0, 2, 4, 4)


def test_serves_where_it_is_named() -> None:
    call = triton((1, 8, 3, 4, 8, 3, 1, 1), torch.float32)
    expected = gradients(call.ours, call.tensors, call.dy)
    call.backend = None
    with dispatch.use_backend("triton"):
        actual = gradients(call.ours, call.tensors, call.dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("upsample", [False, True])
def test_compiles_whole(upsample: bool) -> None:
    call = triton((2, 16, 4, 5, 16, 3, 1, 1), torch.float32, upsample)
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, call.tensors, call.dy)
    for value, expected in zip(actual, gradients(call.ours, call.tensors, call.dy), strict=True):
        torch.testing.assert_close(value, expected)


def test_opcheck() -> None:
    for case in ((1, 8, 4, 5, 9, 3, 1, 1), (2, 1, 3, 3, 1, 1, 1, 0)):
        call = triton(case, torch.float32)
        x, weight, kernel = *call.tensors[:2], case[5]
        weight = weight.contiguous(memory_format=torch.channels_last)
        more = (1, list(call.padding), False)
        for op, args in (
            ("conv2d_input_gradient", (call.dy, weight, *x.shape[2:], *more)),
            ("conv2d_weight_gradient", (call.dy, x, kernel, kernel, *more)),
        ):
            torch.library.opcheck(getattr(torch.ops.sdfast, f"{op}_triton"), args)
