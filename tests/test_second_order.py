"""Gradients of gradients through every operation with a kernel, against fp64 composites."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_linear import needs_kernel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdfast
from sdfast import ops
from sdfast.ops import _triton
from sdfast.ops.add_noise import add_noise_torch
from sdfast.ops.attention import attention_torch
from sdfast.ops.conv2d import conv2d_torch
from sdfast.ops.group_norm import group_norm_torch
from sdfast.ops.layer_norm import layer_norm_torch
from sdfast.ops.linear import ACTIVATIONS, linear_torch
from sdfast.ops.reparameterize import reparameterize_torch

pytestmark = needs_kernel
# What "fast" numerics allow a layer, and of what torch rounds to bf16 on the way.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}
Formula = Callable[..., Any]
Case = tuple[Formula, Formula, Sequence[Tensor | None]]


def in_one_call(call: Formula, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a penalty of the gradients, and of the leaves themselves, which reach the result in any case."""
    first = torch.autograd.grad(penalised(call(*leaves)), leaves, create_graph=True)
    return torch.autograd.grad(sum(map(penalised, (*first, *leaves))), leaves)


def accumulated(call: Formula, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    first = torch.autograd.grad(penalised(call(*leaves)), leaves, create_graph=True)
    sum(map(penalised, (*first, *leaves))).backward()
    return [t.grad for t in leaves]  # type: ignore[misc]


def from_both(call: Formula, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    """The result has a part in the second loss, too."""
    y = call(*leaves)
    first = torch.autograd.grad(penalised(y), leaves, create_graph=True)
    return torch.autograd.grad(sum(map(penalised, (*first, y))), leaves)


def penalised(t: Tensor) -> Tensor:
    """No power alone, lest a wrong factor or sign stay unseen; the weights keep a norm's sums from vanishing."""
    weights = torch.linspace(0.2, 1, t.numel(), dtype=t.dtype).view(t.shape)
    return (weights * (t.square() + t.sin())).sum()


def check(case: Case, asked: Callable[..., Sequence[Tensor]], backend: str | None = "cpu") -> None:
    ours, exact, tensors = case
    present = [i for i, t in enumerate(tensors) if t is not None]

    def evaluated(call: Formula, dtype: torch.dtype | None) -> Sequence[Tensor]:
        leaves = [tensors[i].to(dtype, copy=True).requires_grad_() for i in present]  # type: ignore[union-attr]

        def with_absent(*leaves: Tensor) -> Tensor:
            given = dict(zip(present, leaves, strict=True))
            return call(*(given.get(i) for i in range(len(tensors))))

        return asked(with_absent, leaves)

    with sdfast.use_backend(backend):
        results = (evaluated(ours, None), evaluated(exact, torch.float64))
    for i, actual, expected in zip(present, *results, strict=True):
        assert actual.dtype is tensors[i].dtype  # type: ignore[union-attr]
        error = (actual - expected).norm() / expected.norm()
        assert error < TOLERANCE[tensors[0].dtype], f"input {i}: {error}"  # type: ignore[union-attr]


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape)


def convolution(
    x: tuple[int, ...], weight: tuple[int, ...], stride: int = 1, padding: int = 0, upsample: bool = False
) -> Case:
    size = [((2 if upsample else 1) * n + 2 * padding - weight[2]) // stride + 1 for n in x[2:]]
    tensors = (
        randn(*x), randn(*weight, scale=0.1), randn(weight[0]), randn(x[0], weight[0]),
        randn(x[0], weight[0], *size),
    )  # fmt: skip

    def ours(x: Tensor, weight: Tensor, bias: Tensor, time: Tensor, residual: Tensor) -> object:
        added = {"time_embedding": time, "residual": residual}
        return ops.conv2d(x, weight, bias, stride, padding, upsample=upsample, **added)

    def exact(x: Tensor, weight: Tensor, bias: Tensor, time: Tensor, residual: Tensor) -> object:
        added = {"time_embedding": time, "residual": residual}
        return conv2d_torch(x, weight, bias, stride, (padding,) * 4, upsample=upsample, **added)

    return ours, exact, tensors


def product(activation: str | None, dtype: torch.dtype = torch.float32, added: bool = True) -> Case:
    rows = 24 if activation == "geglu" else 12
    tensors = [randn(2, 5, 16), randn(rows, 16, scale=0.3)]
    tensors += [randn(rows), randn(2, 5, rows)] if added else []

    def ours(x: Tensor, weight: Tensor, bias: Any = None, residual: Any = None) -> Tensor:
        return ops.linear(x, weight, bias, activation=activation, residual=residual)

    def exact(x: Tensor, weight: Tensor, bias: Any = None, residual: Any = None) -> Tensor:
        return linear_torch(x, weight, bias, activation=activation, residual=residual)

    return ours, exact, [t.to(dtype) for t in tensors]


def attended(head_dim: int, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    tensors = [randn(1, 2, n, head_dim).to(dtype) for n in (6, 9, 9)]
    ours = functools.partial(ops.attention, **more)
    return ours, functools.partial(attention_of_two_orders, **more), tensors


def attention_of_two_orders(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    """Those of torch's kernels that stream have one derivative alone."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return attention_torch(q, k, v, **more)


def itself(x: Tensor, **more: Any) -> Tensor:
    return ops.attention(x, x, x, backend="cpu", **more)


def grouped(
    silu: bool, weight: bool, fused: bool, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Case:
    tensors = [
        randn(2, 8, 3, 4).to(dtype),
        randn(8) if weight else None,
        randn(8) if bias else None,
        *([randn(2, 8), randn(2, 8)] if fused else [None, None]),
    ]

    def ours(x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any) -> Tensor:
        more = {"scale": scale, "shift": shift, "activation": "silu" if silu else None}
        return ops.group_norm(x, 2, weight, bias, **more)

    def exact(x: Tensor, weight: Any, bias: Any, scale: Any, shift: Any) -> Tensor:
        return group_norm_torch(x, 2, weight, bias, silu=silu, scale=scale, shift=shift)

    return ours, exact, tensors


def normalised(weight: bool, bias: bool, dtype: torch.dtype = torch.float32) -> Case:
    tensors = [randn(3, 5, 8).to(dtype), randn(5, 8) if weight else None, randn(5, 8) if bias else None]

    def ours(x: Tensor, weight: Any, bias: Any) -> Tensor:
        return ops.layer_norm(x, (5, 8), weight, bias)

    return ours, lambda x, weight, bias: layer_norm_torch(x, (5, 8), weight, bias), tensors


def sampled() -> Case:
    noise = randn(2, 4, 5)
    logvar = randn(2, 4, 5)
    logvar[0, 0, :2] = -40.0  # clamped

    def ours(mean: Tensor, logvar: Tensor) -> Tensor:
        return ops.reparameterize(mean, logvar, noise)

    def exact(mean: Tensor, logvar: Tensor) -> Tensor:
        return reparameterize_torch(mean, logvar, noise.double())

    return ours, exact, (randn(2, 4, 5), logvar)


def noised() -> Case:
    def ours(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat(ops.add_noise(x0, noise, alpha, sigma, prediction="v_prediction"))

    def exact(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat(add_noise_torch(x0, noise, alpha, sigma, velocity=True))

    return ours, exact, (randn(2, 4, 40), randn(2, 4, 40), randn(2), randn(2))


def in_half(case: Case) -> Case:
    ours, exact, tensors = case
    return ours, exact, [None if t is None else t.bfloat16() for t in tensors]


CASES: dict[str, Callable[[], Case]] = {
    "conv2d winograd": lambda: convolution((1, 64, 16, 16), (64, 64, 3, 3), padding=1),
    "conv2d direct": lambda: convolution((2, 5, 6, 7), (6, 5, 3, 3), padding=1),
    "conv2d 1x1": lambda: convolution((2, 8, 5, 4), (12, 8, 1, 1)),
    "conv2d upsample": lambda: convolution((1, 8, 5, 4), (6, 8, 3, 3), padding=1, upsample=True),
    "conv2d stride": lambda: convolution((1, 8, 8, 6), (6, 8, 3, 3), stride=2, padding=1),
    "conv2d bf16": lambda: in_half(convolution((1, 8, 8, 6), (6, 8, 3, 3), padding=1)),
    **{f"linear {name}": functools.partial(product, name) for name in ACTIVATIONS},
    "linear plain": lambda: product(None, added=False),
    "linear silu alone": lambda: product("silu", added=False),
    "linear bf16": lambda: product("geglu", torch.bfloat16),
    "attention 40": lambda: attended(40),
    "attention causal": lambda: attended(16, is_causal=True),
    "attention scale": lambda: attended(16, scale=0.7),
    "attention bf16": lambda: attended(40, torch.bfloat16),
    "attention of itself": lambda: (itself, lambda x: attention_of_two_orders(x, x, x), [randn(1, 2, 6, 16)]),
    "group_norm": lambda: grouped(False, True, False),
    "group_norm silu": lambda: grouped(True, True, False),
    "group_norm scale, shift": lambda: grouped(True, True, True),
    "group_norm of x": lambda: grouped(True, False, False, bias=False),
    "group_norm bias": lambda: grouped(True, False, True),
    "group_norm bf16": lambda: grouped(True, True, True, torch.bfloat16),
    "layer_norm": lambda: normalised(True, True),
    "layer_norm of x": lambda: normalised(False, False),
    "layer_norm bias": lambda: normalised(False, True),
    "layer_norm bf16": lambda: normalised(True, True, torch.bfloat16),
    "reparameterize": sampled,
}


@pytest.mark.parametrize("asked", [in_one_call, accumulated, from_both])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str, asked: Callable[..., Sequence[Tensor]]) -> None:
    check(CASES[name](), asked)


@pytest.mark.parametrize("asked", [in_one_call, accumulated])
def test_add_noise(asked: Callable[..., Sequence[Tensor]]) -> None:
    """Torch serves where it is differentiated at all."""
    check(noised(), asked, None)


@pytest.mark.parametrize("name", ["conv2d direct", "linear silu", "attention 40", "group_norm silu"])
def test_checkpointed(name: str) -> None:
    ours, exact, tensors = CASES[name]()
    check((lambda *inputs: checkpoint(ours, *inputs, use_reentrant=False), exact, tensors), in_one_call)


def test_some_inputs_alone() -> None:
    """A frozen weight needs no gradient, nor does the image of a layer that is trained."""
    for name, chosen in (("conv2d 1x1", 0), ("conv2d 1x1", 1), ("linear gelu", 0), ("linear gelu", 3)):
        ours, exact, tensors = CASES[name]()

        def of_one(call: Formula, t: Tensor, chosen: int = chosen, tensors: Any = tensors) -> Tensor:
            return call(*(t if i == chosen else other.to(t.dtype) for i, other in enumerate(tensors)))

        one = (functools.partial(of_one, ours), functools.partial(of_one, exact), [tensors[chosen]])
        check(one, in_one_call)


@pytest.mark.parametrize("trained", [1, 2])
def test_a_norm_of_a_frozen_image(trained: int) -> None:
    """In channels_last torch's kernel crashes without a gradient of x."""
    tensors = [randn(2, 64, 4, 3).to(memory_format=torch.channels_last), randn(64), randn(64)]

    def of_one(norm: Callable[..., Tensor], p: Tensor, **more: Any) -> Tensor:
        x, *parameters = [p if i == trained else t.to(p.dtype) for i, t in enumerate(tensors)]
        return norm(x, 2, *parameters, **more)

    ours = functools.partial(of_one, ops.group_norm, activation="silu")
    check((ours, functools.partial(of_one, group_norm_torch, silu=True), [tensors[trained]]), in_one_call)


def test_third_derivatives() -> None:
    def thrice(call: Formula, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        first = torch.autograd.grad(penalised(call(*leaves)), leaves, create_graph=True)
        second = torch.autograd.grad(sum(map(penalised, first)), leaves, create_graph=True)
        return torch.autograd.grad(sum(map(penalised, (*second, *leaves))), leaves)

    for name in ("conv2d direct", "linear gelu"):
        check(CASES[name](), thrice)


def test_autocast() -> None:
    x, weight = torch.randn(2, 16, 16), torch.randn(24, 16)

    def hessian_times_x(x: Tensor, weight: Tensor, enabled: bool) -> Sequence[Tensor]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ops.linear(x, weight, activation="silu", backend="cpu" if enabled else "torch")
            (dx,) = torch.autograd.grad(y.double().square().sum(), x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), (x, weight))

    exact = hessian_times_x(x.double(), weight.double(), False)
    for actual, expected in zip(hessian_times_x(x, weight, True), exact, strict=True):
        assert actual.dtype is torch.float32
        assert (actual - expected).norm() < 3e-2 * expected.norm()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_optimized_module() -> None:
    x = torch.randn(1, 64, 16, 16)
    module = Residual()
    wide = copy.deepcopy(module).double()
    sdfast.optimize(module, mode="training")

    def penalty(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
        x.requires_grad_()
        (g,) = torch.autograd.grad(penalised(module(x)), x, create_graph=True)
        return torch.autograd.grad(g.square().sum() + x.sum(), (x, *module.parameters()))

    for actual, expected in zip(penalty(module, x), penalty(wide, x.double().detach()), strict=True):
        assert (actual - expected).norm() < 2e-5 * expected.norm()


def test_compiled_graphs_refuse() -> None:
    x, weight = torch.randn(2, 16, requires_grad=True), torch.randn(24, 16)
    compiled = torch.compile(
        lambda x: ops.linear(x, weight, activation="silu", backend="cpu"), backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="double backward"):
        in_one_call(compiled, [x])


@pytest.mark.skipif(_triton.why_not("x", "cpu") is not None, reason=str(_triton.why_not("x", "cpu")))
@pytest.mark.parametrize("name", ["linear gelu", "group_norm silu"])
def test_triton(name: str) -> None:
    check(CASES[name](), in_one_call, "triton")
