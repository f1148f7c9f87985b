"""Gradients of linear on CPU against fp64: shapes, strides, activations, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
from gradients import check_gradients, gradients
from processes import run_with_library
from test_linear import CROWDED, DTYPES, SHAPES, make, many_tokens, needs_kernel
from torch import Tensor

from sdfast import ops, packing
from sdfast.ops.linear import ACTIVATIONS, linear_torch

pytestmark = [needs_kernel, pytest.mark.usefixtures("exact_numerics")]


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, residual=residual, backend="cpu")


def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return linear_torch(x, weight, bias, residual=residual)


def width_of(rows: int, activation: str | None) -> int:
    return rows // 2 if activation == "geglu" else rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(activation: str | None, dtype: torch.dtype) -> None:
    for tokens, rows, k in (*SHAPES, (2600, 34, 40)):
        tensors = make(tokens, rows, k, dtype)
        dy = torch.randn(tokens, width_of(rows, activation)).to(dtype)
        for given in (tensors, (*tensors[:2], None, None)):

            def ours(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                return ops.linear(x, weight, bias, activation=activation, residual=residual, backend="cpu")

            def eager(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                return linear_torch(x, weight, bias, activation=activation, residual=residual)

            check_gradients(ours, eager, given, dy, f"{tokens, rows, k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_a_way_of_the_cache_apart(dtype: torch.dtype) -> None:
    for tokens, rows, k in CROWDED:
        check_gradients(ours, eager, make(tokens, rows, k, dtype), torch.randn(tokens, rows).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_tokens(dtype: torch.dtype) -> None:
    """So many that the weight is packed for all of them, in two blocks; an odd number of its rows."""
    tokens, k, rows = many_tokens(dtype)
    tensors, dy = make(tokens, rows, k, dtype), torch.randn(tokens, rows).to(dtype)

    check_gradients(ours, eager, tensors, dy)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_large_weight_gradients(dtype: torch.dtype) -> None:
    """As many numbers as are stored past the caches; the last block is not whole."""
    tensors, dy = make(40, 530, 512, dtype), torch.randn(40, 530).to(dtype)

    check_gradients(ours, eager, tensors, dy)


def geglu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, activation="geglu", residual=residual, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    x, weight, bias, residual = make(24, 34, 18, dtype)
    dy = torch.randn(24, 17).to(dtype)
    plain = gradients(geglu, (x, weight, bias, residual), dy)

    def strided(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 2))[:, 1:19]  # misaligned rows, an odd stride apart
        tokens, skip = padded.unflatten(0, (4, 6)).transpose(0, 1), residual.unflatten(0, (4, 6))
        matrix = weight.t().contiguous().t()[:, :, None, None]
        return geglu(tokens, matrix, bias, skip.transpose(0, 1)).transpose(0, 1).flatten(0, 1)

    for actual, expected in zip(gradients(strided, (x, weight, bias, residual), dy), plain, strict=True):
        torch.testing.assert_close(actual, expected)  # the weight's sums run over the tokens in another order


def test_expanded_gradients() -> None:
    tensors = make(24, 34, 18, torch.float32)
    once = gradients(geglu, tensors, torch.ones(24, 17))
    for actual, expected in zip(gradients(geglu, tensors, torch.ones(()).expand(24, 17)), once, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("chosen", range(4))
def test_only_what_is_asked_for(chosen: int) -> None:
    tensors = make(24, 34, 18, torch.float32)
    dy = torch.randn(24, 17)
    expected = gradients(geglu, tensors, dy)[1 + chosen]
    for t in tensors:
        t.requires_grad_(t is tensors[chosen])
    geglu(*tensors).backward(dy)
    assert torch.equal(tensors[chosen].grad, expected)
    assert all(t.grad is None for t in tensors if t is not tensors[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_unwritten(dtype: torch.dtype, poisoned_memory: None) -> None:
    for tokens, rows, k in SHAPES[:5]:
        dy = torch.randn(tokens, rows // 2).to(dtype)
        assert all(t.isfinite().all() for t in gradients(geglu, make(tokens, rows, k, dtype), dy))


def test_slopes_far_from_zero() -> None:
    values = torch.linspace(-30, 30, 20001)[:, None]
    for activation, function in (
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("quick_gelu", lambda v: v * torch.sigmoid(1.702 * v)),
    ):
        ours, exact = values.clone().requires_grad_(), values.double().requires_grad_()
        ops.linear(ours, torch.ones(1, 1), activation=activation, backend="cpu").sum().backward()
        function(exact).sum().backward()
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("activation", ["silu", "gelu", "quick_gelu"])
def test_activations_at_the_ends_of_fp32(activation: str) -> None:
    low, high = [-torch.inf, -3e38, -8.5e37, -1e3], [1e3, 8.5e37, 3e38]
    values = torch.tensor([low + high]).mT.requires_grad_()
    y = ops.linear(values, torch.ones(1, 1), activation=activation, backend="cpu")
    (slope,) = torch.autograd.grad(y.sum(), values)
    for result, expected in ((y, [0.0] * 4 + high), (slope, [0.0] * 4 + [1.0] * 3)):
        torch.testing.assert_close(result.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-30)


def test_training_keeps_no_copy() -> None:
    packing.clear()
    x, weight, _, _ = make(64, 340, 70, torch.float32)
    ops.linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None and packing.packed_bytes() == 0


def test_compiles_whole() -> None:
    tensors = make(64, 340, 70, torch.float32)
    dy = torch.randn(64, 170)
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, tensors, dy), gradients(geglu, tensors, dy), strict=True):
        assert torch.equal(actual, expected)


def test_opcheck() -> None:
    x, weight, bias, residual = make(6, 34, 7, torch.float32)
    h, dy = torch.randn(6, 34), torch.randn(6, 17)
    for op, args in (
        ("linear_gradients", (h, x, weight, False, True, True, True)),
        ("linear_gradients", (h, x, weight[:, :, None, None], False, False, True, False)),
        ("linear_gradients", (h[0], x[0], weight, False, True, False, False)),
        ("linear_gradients", (h.view(2, 3, 34), x.view(2, 3, 7), weight, False, True, True, True)),
        ("linear_gradients", (h, x, weight, False, False, False, False)),
        ("linear_activate", (h.view(2, 3, 34), 4)),
        ("linear_activation_gradient", (dy.view(2, 3, 17), h.view(2, 3, 34), 4)),
        ("linear_activate", (h, 4)),
        ("linear_activation_gradient", (dy, h, 4)),
        ("sum_rows", (h[None],)),
    ):
        torch.library.opcheck(getattr(torch.ops.sdfast, op), args)


def test_gradients_of_what_does_not_fit_are_refused() -> None:
    x, weight, _, h = make(6, 34, 7, torch.float32)
    for changed, message in (
        ((h[:5], x, weight), "dh: the shape"),
        ((h, x, weight[:, :6].contiguous()), "weight: expected"),
        ((h, x, weight.view(34, 1, 7)), "weight: expected"),
        ((h, x.double(), weight), "dh: expected dense"),
        ((h, x, weight.t().contiguous().t()), "weight: expected dense"),
        ((h[0, 0], x, weight), "dh: expected dense"),
        ((h[:0], x[:0], weight), "at least one element"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sdfast.linear_gradients(*changed, False, True, True, True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    for tokens, rows, k in ((300, 96, 64), (7, 320, 2700), (2700, 40, 33), (40, 530, 512)):
        tensors, dy = make(tokens, rows, k, dtype), torch.randn(tokens, rows // 2).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(geglu, tensors, dy))
        torch.set_num_threads(1)
        for one, two, three in zip(*results, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    run_with_library(isa, """
        import test_linear_backward as t
        for dtype in t.DTYPES:
            for activation in t.ACTIVATIONS:
                t.test_shapes(activation, dtype)
            t.test_strides(dtype)
        t.test_slopes_far_from_zero()
        for dtype in (t.torch.float32, t.torch.bfloat16):
            t.test_large_weight_gradients(dtype)
        t.test_many_tokens(t.torch.float32)
    """)  # fmt: skip
