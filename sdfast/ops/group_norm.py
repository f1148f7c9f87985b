"""group_norm: GroupNorm with what follows it in a diffusion model, a scale-shift and SiLU.

    mean_ng, var_ng = mean and variance of x[n, i] over the channels i of group g and all pixels
    x̂  = (x − mean) / √(var + eps)                    Wu & He 2018, "Group Normalization", eq. 1-5
    z  = (x̂ · weight + bias) · (1 + scale) + shift    time embedding as "scale_shift": Nichol & Dhariwal 2021
    y  = z · sigmoid(z) with activation="silu", else z

x, y: (N, C, *). weight, bias: (C,). scale, shift: (N, C). mean, rstd = 1/√(var + eps): (N, num_groups), fp32.
y lies in memory as x does: channels first, or channels last (the channel's stride is 1, as in an NHWC image
or a transposed (N, L, C) sequence); any other strides give channels first.

The CPU kernels are csrc/group_norm_cpu.h. Statistics and arithmetic are fp32; fp64 goes through torch.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdfast import _library, dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_tensor, widened


def group_norm_torch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its arguments."""
    if x.device.type != "cpu":  # only there does torch take fp32 parameters with a half-precision x
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    z = torch.group_norm(x, num_groups, weight, bias, eps)
    per_pixel = (..., *(None,) * (x.dim() - 2))
    if scale is not None:
        z = z * (1 + scale[per_pixel])
    if shift is not None:
        z = z + shift[per_pixel]
    z = z.to(x.dtype)
    return F.silu(z) if silu else z


group_norm_reference = widened(group_norm_torch)


def _has_layout(x: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether x is dense, its axes in this order, fastest first. An axis of size 1 fits any stride."""
    expected = 1
    for axis in axes:
        if x.shape[axis] > 1 and x.stride(axis) != expected:
            return False
        expected *= max(x.shape[axis], 1)
    return True


def _empty_in_layout(x: Tensor) -> Tensor:
    """An empty tensor with the strides that the kernels give to y and dx."""
    pixels = tuple(range(x.dim() - 1, 1, -1))
    if _has_layout(x, (1, *pixels, 0)) or _has_layout(x, (*pixels, 1, 0)):
        return x.new_empty_strided(x.shape, x.stride())
    return x.new_empty(x.shape)


def _forward_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _empty_in_layout(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


def _inference_fake(x: Tensor, *_: object) -> Tensor:
    return _empty_in_layout(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, ...]:
    dx = _empty_in_layout(x)
    absent = x.new_empty(0)
    return (
        dx,
        *(absent.clone() if p is None else p.new_empty(p.shape) for p in (weight, bias, scale, shift)),
    )


_library.define_native(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, "
    "Tensor? scale, Tensor? shift) -> Tensor",
    _inference_fake,
)
_library.define_native(
    "group_norm_forward(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, "
    "Tensor? scale, Tensor? shift) -> (Tensor, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_library.define_native(
    "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, bool silu, Tensor? scale, Tensor? shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


# Looked up once: at 8x8 the lookup costs as much as a check.
_group_norm_op: Callable[..., Tensor] = torch.ops.sdfast.group_norm.default


class _GroupNorm(torch.autograd.Function):
    """The native forward with the native backward, which recomputes z from x and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        y, mean, rstd = torch.ops.sdfast.group_norm_forward(
            x, num_groups, weight, bias, eps, silu, scale, shift
        )
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.num_groups, ctx.silu = num_groups, silu
        return cast(Tensor, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        dx, dweight, dbias, dscale, dshift = torch.ops.sdfast.group_norm_backward(
            dy, x, mean, rstd, ctx.num_groups, weight, bias, ctx.silu, scale, shift
        )
        return (
            dx,
            None,
            None if weight is None else dweight,
            None if bias is None else dbias,
            None,
            None,
            None if scale is None else dscale,
            None if shift is None else dshift,
        )


def group_norm_cpu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The compiled CPU kernels. Its gradient cannot be differentiated again; torch's can."""
    if _native.requires_grad(x, weight, bias, scale, shift):
        return cast(Tensor, _GroupNorm.apply(x, num_groups, weight, bias, eps, silu, scale, shift))
    return _group_norm_op(x, num_groups, weight, bias, eps, silu, scale, shift)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": group_norm_cpu,
    "reference": cast(Callable[..., Tensor], group_norm_reference),
}


def _check_parameter(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A parameter is of x's dtype, or fp32 where x is of half precision."""
    check_tensor(name, value, shape=shape)
    if value.device != x.device:
        raise ValueError(f"{name}: is on {value.device}, expected {x.device} as x")
    if value.dtype != x.dtype and (value.dtype != torch.float32 or x.dtype == torch.float64):
        allowed = x.dtype if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {allowed} for x of {x.dtype}")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm as `torch.nn.functional.group_norm`, with a scale-shift and SiLU fused.

    Args:
        x: (N, C, *), fp32, bf16, fp16 or fp64, any strides.
        num_groups: number of groups; divides C.
        weight: (C,) or None, in the dtype of `x`, or fp32 where `x` is bf16 or fp16. So are the others:
        bias: (C,) or None.
        eps: added to the variance.
        activation: None or "silu".
        scale: (N, C) or None; the normalized values are multiplied by 1 + scale.
        shift: (N, C) or None; added after the scale.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        (N, C, *), in the dtype of `x` and in its memory format.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, *)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups or channels == 0:
        raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {channels} channels of x")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    # What nearly every call passes is let through first: at 8x8 the checks are a tenth of the time.
    dtype, device, per_image = x.dtype, x.device, (x.shape[0], channels)
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, per_image),
        ("shift", shift, per_image),
    ):
        if value is None:
            continue
        same_kind = isinstance(value, Tensor) and value.dtype is dtype and value.device == device
        if not same_kind or value.shape != shape:
            _check_parameter(name, value, shape, x)
    # With nothing to fuse, torch's fp32 kernel was measured as fast or faster (benchmarks/RESULTS.md).
    plain = dtype is torch.float32 and activation is None and scale is None and shift is None
    device_type = device.type
    order = ("torch",) if plain and device_type == "cpu" else None
    unavailable = _native.unavailable("group_norm_forward", "x", device_type, dtype)
    serve = dispatch.choose("group_norm", device_type, unavailable, backend, order=order)
    run = _BACKENDS.get(serve, group_norm_torch)
    return run(x, num_groups, weight, bias, eps, silu=activation == "silu", scale=scale, shift=shift)
