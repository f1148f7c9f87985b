"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimensions.

Ba et al. 2016, "Layer Normalization", eq. 3 and 4; the variance is the biased one.

x, y: (..., *normalized_shape). weight, bias: normalized_shape. mean, rstd = 1/√(var + eps): (rows,), fp32, a
row being what is normalised together. The CPU kernels are csrc/layer_norm_cpu.cpp, CUDA's
csrc/layer_norm_cuda.cuh, Triton's layer_norm_triton.py: statistics and arithmetic are fp32, y and dx
contiguous; fp64 goes through torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native, _twice
from sdfast.ops._checks import check_optional, check_tensor, widened
from sdfast.ops._cuda_order import of_norm


def layer_norm_torch(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula, through torch's kernel (fp32 statistics)."""
    if weight is None and bias is not None:  # alone torch does not always differentiate it
        weight = torch.ones_like(bias)
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    if x.device.type != "cpu" or len(dtypes) > 1:  # only there does torch take fp32 parameters, and only both
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


layer_norm_reference = widened(layer_norm_torch)


def _forward_fake(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((math.prod(x.shape[: x.dim() - axes]),), dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _inference_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    parameters = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), *parameters


class Operations(NamedTuple):
    """What computes layer_norm and its gradient."""

    inference: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]


CPU = Operations(
    _library.define_native(
        "layer_norm(Tensor x, int axes, Tensor? weight, Tensor? bias, float eps) -> Tensor", _inference_fake
    ),
    _library.define_native(
        "layer_norm_forward(Tensor x, int axes, Tensor? weight, Tensor? bias, float eps) "
        "-> (Tensor, Tensor mean, Tensor rstd)",
        _forward_fake,
    ),
    _library.define_native(
        "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int axes, Tensor? weight, "
        "Tensor? bias) -> (Tensor, Tensor, Tensor)",
        _backward_fake,
    ),
)
TRITON = Operations(
    *(
        _library.define_triton(name, "sdfast.ops.layer_norm_triton")
        for name in ("layer_norm", "layer_norm_forward", "layer_norm_backward")
    )
)
CUDA = Operations(
    *(_library.define_cuda(name) for name in ("layer_norm", "layer_norm_forward", "layer_norm_backward"))
)


def _gradients_by_torch(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, _, _, weight, bias = ctx.saved_tensors
    _, for_x, _, for_weight, for_bias, _ = ctx.needs_input_grad

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> object:
        return layer_norm_reference(x, x.shape[-ctx.axes :], weight, bias, ctx.eps)

    dx, dweight, dbias = _twice.gradients(formula, (x, weight, bias), (for_x, for_weight, for_bias), dy)
    return None, dx, None, dweight, dbias, None


class _LayerNorm(torch.autograd.Function):
    """The forward with the backward of the same kernels, which recomputes x̂ from x and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        axes: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = operations.forward(x, axes, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.operations, ctx.axes, ctx.eps = operations, axes, eps
        return y

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = ctx.operations.backward(dy, x, mean, rstd, ctx.axes, weight, bias)
        return None, dx, None, None if weight is None else dweight, None if bias is None else dbias, None


def _by_kernels(
    operations: Operations,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """By these kernels."""
    axes = len(normalized_shape)
    if _native.requires_grad(x, weight, bias):
        return cast(Tensor, _LayerNorm.apply(operations, x, axes, weight, bias, eps))
    return operations.inference(x, axes, weight, bias, eps)


def _is_faster_in_torch(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """As measured: rows of few or ragged vectors, and gradients of so little that Python decides."""
    width = math.prod(shape)
    if width < 64 or (width % 16 != 0 and width < 1024):
        return True
    few = 2**18 if x.dtype is torch.float32 else 2**15
    return x.numel() < few and _native.requires_grad(x, weight, bias)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(_by_kernels, CPU),
    "triton": functools.partial(_by_kernels, TRITON),
    "cuda": functools.partial(_by_kernels, CUDA),
    "reference": cast(Callable[..., Tensor], layer_norm_reference),
}


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation as `torch.nn.functional.layer_norm`.

    Args:
        x: (..., *normalized_shape), fp32, bf16, fp16 or fp64, any strides.
        normalized_shape: the trailing sizes that are normalised together.
        weight, bias: normalized_shape, in the dtype of `x`, or fp32 where `x` is bf16 or fp16; or None.
        eps: added to the variance.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        The shape and dtype of `x`, contiguous.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape: got {shape}, expected the last sizes of x, which has shape {tuple(x.shape)}"
        )
    check_optional("weight", weight, shape=shape, like=x, casts=True, or_fp32=True)
    check_optional("bias", bias, shape=shape, like=x, casts=True, or_fp32=True)
    device_type = x.device.type
    unavailable = _native.unavailable("layer_norm_forward", "x", device_type, x.dtype)
    order: tuple[str, ...] | None = (
        ("torch",) if device_type == "cpu" and _is_faster_in_torch(x, shape, weight, bias) else None
    )
    if device_type == "cuda" and not dispatch.is_named(backend):
        order = of_norm(x, weight, bias)
    serve = dispatch.choose("layer_norm", device_type, unavailable, backend, order=order)
    return _BACKENDS.get(serve, layer_norm_torch)(x, shape, weight, bias, eps)
