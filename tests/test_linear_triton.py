"""linear's Triton kernels against fp64, forward and backward: shapes, splits of K, strides, activations."""

from __future__ import annotations

import pytest
import torch
from gradients import check_gradients, gradients
from test_linear import make
from torch import Tensor

from sdfast import ops
from sdfast.ops import _triton
from sdfast.ops.linear import ACTIVATIONS, linear_torch
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bf16 wrongly in tl.dot.
MATRIX_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# tokens, rows of the weight, K; the last two split K.
SHAPES = ((1, 2, 1), (13, 34, 7), (77, 40, 33), (300, 130, 72), (100, 64, 1300), (3, 48, 2100))
pytestmark = pytest.mark.skipif(
    _triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))
)


def values(tokens: int, rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in make(tokens, rows, k, dtype))


def triton(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None):
    return ops.linear(x, weight, bias, activation=activation, residual=residual, backend="triton")


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None):
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = linear_torch(*wide[:3], activation=activation, residual=wide[3])
    eager = linear_torch(x, weight, bias, activation=activation, residual=residual)
    actual = triton(x, weight, bias, residual, activation)
    assert actual.shape == eager.shape and actual.is_contiguous()
    assert_within_budget(actual, eager, exact)
    assert torch.equal(actual, triton(x, weight, bias, residual, activation))


@pytest.mark.parametrize("dtype", MATRIX_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(activation: str | None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensors = values(*shape, dtype)
        check(*tensors, activation)
        check(*tensors[:2], None, None, activation)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    x, weight, bias, residual = values(24, 34, 18, dtype)
    padded = torch.full((24, 21), float("nan"), dtype=dtype, device=DEVICE)
    padded[:, 1:19] = x
    check(padded[:, 1:19], weight, bias, residual, None)
    check(x.t().contiguous().t(), weight.t().contiguous().t(), bias, residual, None)
    check(x.view(2, 3, 4, 18), weight[:, :, None, None], bias, residual.view(2, 3, 4, 34), "silu")
    check(x[:1].expand(24, 18), weight, bias[:1].expand(34), residual[:1].expand(24, 34), "gelu")
    op, expected = torch.ops.sdfast.linear_rows_triton, triton(x, weight, bias, residual, None)
    wide = torch.full((24, 80), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :36:2], wide[:, 40:74] = x, residual  # no unit stride, a row stride
    rows = torch.full((34, 20), float("nan"), dtype=dtype, device=DEVICE)
    rows[:, :18] = weight
    assert torch.equal(op(wide[:, :36:2], rows[:, :18], bias, wide[:, 40:74], 0), expected)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str | None, dtype: torch.dtype) -> None:
    for tokens, rows, k in ((1, 2, 1), (77, 40, 33), (600, 34, 40)):
        tensors = values(tokens, rows, k, dtype)
        dy = torch.randn(tokens, rows // 2 if activation == "geglu" else rows).to(DEVICE, dtype)
        for given in (tensors, (*tensors[:2], None, None)):

            def ours(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                return triton(x, weight, bias, residual, activation)

            def eager(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                return linear_torch(x, weight, bias, activation=activation, residual=residual)

            check_gradients(ours, eager, given, dy, f"{tokens, rows, k}")


def test_gradients_repeat_and_take_strides() -> None:
    x, weight, bias, residual = values(48, 34, 18, torch.float32)
    dy = torch.randn(48, 17).to(DEVICE)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return triton(x, weight, bias, residual, "geglu")

    def strided(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 2))[:, 1:19]
        return plain(padded, weight.t().contiguous().t()[:, :, None, None], bias, residual)

    once = gradients(plain, (x, weight, bias, residual), dy)
    for function in (plain, strided):
        again = gradients(function, (x, weight, bias, residual), dy)
        assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_rows(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (2, 7, 65), (3, 1000, 5), (1, 4100, 70)):
        x = torch.randn(shape).to(DEVICE, dtype)
        actual = torch.ops.sdfast.sum_rows_triton(x)
        assert_within_budget(actual, x.sum(1), x.double().sum(1))
        assert torch.equal(actual, torch.ops.sdfast.sum_rows_triton(x))


def test_sum_rows_has_enough_in_flight() -> None:
    with _triton.recording() as launches:
        torch.ops.sdfast.sum_rows_triton(torch.empty(1, 65536, 320, device=DEVICE))
    assert launches[0].grid[0] > 6 * _triton.multiprocessors(torch.device(DEVICE))


def test_multiprocessors_of_a_cpu_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _triton.multiprocessors.__wrapped__(torch.device("cpu")) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_slopes(dtype: torch.dtype) -> None:
    h = torch.linspace(-30, 30, 4 * 2058).view(4, 2058).flip(1).to(DEVICE, dtype)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    for index, activation in enumerate(ACTIVATIONS[1:], 1):
        dy = torch.randn(4, 1029 if activation == "geglu" else 2058).to(DEVICE, dtype)
        results = []
        for values in (h.clone().requires_grad_(), h.double().requires_grad_()):
            weight = torch.eye(2058, dtype=values.dtype, device=DEVICE) if activation == "geglu" else None
            flat = values if weight is not None else values.view(-1, 1)
            y = linear_torch(flat, one.to(values.dtype) if weight is None else weight, activation=activation)
            y = y.view(dy.shape)
            results.append((y.detach(), torch.autograd.grad(y, values, dy.to(values.dtype))[0]))
        (eager, eager_slope), (exact, exact_slope) = results
        assert_within_budget(torch.ops.sdfast.linear_activate_triton(h, index), eager, exact)
        slope = torch.ops.sdfast.linear_activation_gradient_triton(dy, h, index)
        assert_within_budget(slope, eager_slope, exact_slope)


def test_empty() -> None:
    x, weight = torch.empty(0, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    sdfast = torch.ops.sdfast
    assert sdfast.linear_rows_triton(x, weight, None, None, 4).shape == (0, 2)
    bias = torch.arange(4.0, device=DEVICE)
    no_k = sdfast.linear_rows_triton(weight[:, :0], weight[:, :0], bias, None, 0)
    assert torch.equal(no_k, bias.expand(4, 4))
    assert sdfast.linear_activate_triton(x, 4).shape == (0, 4)
    assert sdfast.linear_activation_gradient_triton(x[:, :4], x, 4).shape == (0, 8)
    assert torch.equal(sdfast.linear_weight_gradient_triton(x[:, :4], x), torch.zeros(4, 8, device=DEVICE))
    assert torch.equal(sdfast.sum_rows_triton(x[None]), torch.zeros(1, 8, device=DEVICE))
    with pytest.raises(ValueError, match="not empty"):
        ops.linear(x, weight, backend="triton")


def test_opcheck() -> None:
    x, weight, bias, residual = values(6, 34, 7, torch.float32)
    h, dy = residual, torch.randn(6, 17, device=DEVICE)
    for op, args in (
        ("linear_rows", (x, weight, bias, residual, 4)),
        ("linear_input_gradient", (h, weight)),
        ("linear_weight_gradient", (h, x)),
        ("linear_activate", (h, 4)),
        ("linear_activation_gradient", (dy, h, 4)),
        ("sum_rows", (h[None],)),
    ):
        torch.library.opcheck(getattr(torch.ops.sdfast, f"{op}_triton"), args)
