"""linear with GEGLU's gate by the CUDA kernels, against fp64: shapes, strides, gradients, any order of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import thread_order
from gradients import check_gradients, gradients
from test_linear import DTYPES, SHAPES, make
from torch import Tensor

from sdfast import ops
from sdfast.ops.linear import ACTIVATIONS, linear_torch
from sdfast.testing import assert_within_budget

GEGLU = ACTIVATIONS.index("geglu")


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, bias, activation="geglu", residual=residual, backend="cuda")


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return linear_torch(x, weight, bias, activation="geglu", residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, cuda_kernels: str) -> None:
    """The gate of 320 channels, of odd ones, and of a few."""
    for seed, (tokens, rows, k) in enumerate((*SHAPES[:6], (19, 2560, 320), (6, 10240, 16))):
        tensors = [t.to(cuda_kernels) for t in make(tokens, rows, k, dtype)]
        dy = torch.randn(tokens, rows // 2).to(cuda_kernels, dtype)
        for given in (tensors, [*tensors[:2], None, None]):
            check_gradients(geglu, eager, given, dy, f"{tokens, rows, k}")
        plain = geglu(*tensors)
        assert plain.is_contiguous()
        with thread_order(seed):
            assert torch.equal(geglu(*tensors), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, cuda_kernels: str) -> None:
    x, weight, bias, residual = (t.to(cuda_kernels) for t in make(24, 34, 18, dtype))
    expected = geglu(x, weight, bias, residual)
    skip = residual.view(4, 6, 34).transpose(0, 1).contiguous().transpose(0, 1)
    actual = geglu(x.view(4, 6, 18), weight[:, :, None, None], bias, skip)
    torch.testing.assert_close(actual.flatten(0, 1), expected)
    torch.testing.assert_close(geglu(x[0], weight, bias, residual[0]), expected[0])
    dy = torch.ones((), device=cuda_kernels, dtype=dtype).expand(24, 17)
    given = (x, weight, bias, residual)
    for a, b in zip(gradients(geglu, given, dy), gradients(geglu, given, dy.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_far_from_zero(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Where GELU is the identity, and where it is nothing."""
    gate = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, 1e30])]).to(cuda_kernels, dtype)
    value = torch.randn(len(gate), device=cuda_kernels).to(dtype)
    h, dy = torch.stack([value, gate], 1), torch.ones(len(gate), 1, device=cuda_kernels, dtype=dtype)

    def by_torch(h: Tensor) -> Tensor:
        return h[:, :1] * F.gelu(h[:, 1:])

    finite = h[h.isfinite().all(1)]
    y = torch.ops.sdfast.linear_activate_cuda(finite, GEGLU)
    assert_within_budget(y, by_torch(finite), by_torch(finite.double()))
    near = finite[finite[:, 1].abs() <= 30].contiguous()
    dh = torch.ops.sdfast.linear_activation_gradient_cuda(dy[: len(near)], near, GEGLU)
    eager, exact = (
        torch.autograd.grad(by_torch(leaf).sum(), leaf)[0]
        for leaf in (near.clone().requires_grad_(), near.double().requires_grad_())
    )
    assert_within_budget(dh, eager, exact)


def test_views_off_their_alignment(cuda_kernels: str) -> None:
    memory = torch.full((5 * 32 + 2,), float("nan"), device=cuda_kernels)
    h = memory[1:-1].view(5, 32)
    h.copy_(torch.randn(5, 32))
    plain = torch.ops.sdfast.linear_activate_cuda(h.clone(), GEGLU)
    assert torch.equal(torch.ops.sdfast.linear_activate_cuda(h, GEGLU), plain)
    assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_are(value: float, cuda_kernels: str) -> None:
    h = torch.randn(4, 32, device=cuda_kernels)
    h[2, 3] = h[1, 16 + 5] = value
    y = torch.ops.sdfast.linear_activate_cuda(h, GEGLU)
    finite = torch.ones(4, 16, dtype=torch.bool)
    finite[2, 3] = finite[1, 5] = False
    assert torch.equal(y.isfinite().cpu(), finite)


def test_only_what_is_asked_for(cuda_kernels: str) -> None:
    tensors = [t.to(cuda_kernels) for t in make(24, 34, 18, torch.float32)]
    dy = torch.randn(24, 17, device=cuda_kernels)
    expected = gradients(geglu, tensors, dy)
    for chosen, t in enumerate(tensors):
        leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(tensors)]
        geglu(*leaves).backward(dy)
        assert torch.equal(leaves[chosen].grad, expected[1 + chosen])
        assert all(leaf.grad is None for leaf in leaves if leaf is not leaves[chosen])


def test_second_derivatives(cuda_kernels: str) -> None:
    tensors = make(6, 34, 7, torch.float32)

    def hessian_times_gradient(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in (*first, *leaves)), leaves)

    exact = hessian_times_gradient(
        lambda x, w, b, r: linear_torch(x, w, b, activation="geglu", residual=r),
        *(t.double() for t in tensors),
    )
    actual = hessian_times_gradient(geglu, *(t.to(cuda_kernels) for t in tensors))
    for value, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(
            value.cpu().double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max()
        )


def test_other_activations_are_torchs(cuda_kernels: str) -> None:
    x, weight, _, _ = (t.to(cuda_kernels) for t in make(6, 34, 7, torch.float32))
    for activation in ACTIVATIONS[:4]:
        with pytest.raises(ValueError, match="backend 'cuda' cannot run: it takes, beside GEGLU, products"):
            ops.linear(x, weight, activation=activation, backend="cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run: x is float64"):
        geglu(x.double(), weight.double())


def test_opcheck(cuda_kernels: str) -> None:
    h, dy = torch.randn(6, 34, device=cuda_kernels), torch.randn(6, 17, device=cuda_kernels)
    ops = torch.ops.sdfast
    torch.library.opcheck(ops.linear_activate_cuda.default, (h, GEGLU))
    torch.library.opcheck(ops.linear_activation_gradient_cuda.default, (dy, h, GEGLU))
    assert ops.linear_activate_cuda(h[:0], GEGLU).shape == (0, 17)
    assert ops.linear_activation_gradient_cuda(dy[:0], h[:0], GEGLU).shape == (0, 34)


def test_what_is_unsafe_is_refused_by_the_operation_itself(cuda_kernels: str) -> None:
    h, dy = torch.randn(6, 34, device=cuda_kernels), torch.randn(6, 17, device=cuda_kernels)
    op, gradient = (
        torch.ops.sdfast.linear_activate_cuda,
        torch.ops.sdfast.linear_activation_gradient_cuda,
    )
    for args in ((h, 1), (h[:, :33].contiguous(), GEGLU), (h.t(), GEGLU), (h[0], GEGLU), (h.double(), GEGLU)):
        with pytest.raises(RuntimeError):
            op(*args)
    for args in ((dy[:5], h), (dy.half(), h), (dy[:, :16], h)):
        with pytest.raises(RuntimeError):
            gradient(*args, GEGLU)


def test_compiles_whole(cuda_kernels: str) -> None:
    tensors = [t.to(cuda_kernels) for t in make(20, 34, 24, torch.float32)]
    dy = torch.randn(20, 17, device=cuda_kernels)
    torch._dynamo.reset()
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, tensors, dy), gradients(geglu, tensors, dy), strict=True):
        assert torch.equal(a, b)
