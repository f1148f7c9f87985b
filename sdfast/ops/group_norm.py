"""group_norm: GroupNorm with what follows it in a diffusion model, a scale-shift and SiLU.

    mean_ng, var_ng = mean and variance of x[n, i] over the channels i of group g and all pixels
    x̂  = (x − mean) / √(var + eps)                    Wu & He 2018, "Group Normalization", eq. 1-5
    z  = (x̂ · weight + bias) · (1 + scale) + shift    time embedding as "scale_shift": Nichol & Dhariwal 2021
    y  = z · sigmoid(z) with activation="silu", else z

x, y: (N, C, *). weight, bias: (C,). scale, shift: (N, C). mean, rstd = 1/√(var + eps): (N, num_groups), fp32.
y lies in memory as x does: channels first, or channels last (the channel's stride is 1, as in an NHWC image
or a transposed (N, L, C) sequence); any other strides give channels first. With `skip` the formula is that of
`cat([x, skip], 1)`, which the kernels for GPUs do not form.

The kernels are csrc/group_norm_cpu.h, csrc/group_norm_cuda.cuh and, in Triton, group_norm_triton.py.
Statistics and arithmetic are fp32; fp64 goes through torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_statistics, check_tensor, is_transformed, widened
from sdfast.ops._cuda_order import of_norm
from sdfast.ops._group_norm_operations import CPU, CUDA, TRITON, Operations, group_norm_training


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
    skip: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its arguments."""
    x = x if skip is None else torch.cat([x, skip], 1)
    if weight is None and bias is not None:  # alone torch does not always differentiate it
        weight = torch.ones_like(bias)
    # Only on a CPU does torch take fp32 parameters with a half-precision x, and only of one dtype.
    if x.device.type != "cpu" or (weight is not None and bias is not None and weight.dtype != bias.dtype):
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    # vmap knows no other layout; on a CPU torch crashes where another is differentiated by parameters alone.
    crashes = x.device.type == "cpu" and not x.requires_grad and _native.requires_grad(weight, bias)
    if crashes or is_transformed():
        x = x.contiguous()
    z = torch.group_norm(x, num_groups, weight, bias, eps)
    per_pixel = (..., *(None,) * (x.dim() - 2))
    if scale is not None:
        z = z * (1 + scale[per_pixel])
    if shift is not None:
        z = z + shift[per_pixel]
    z = z.to(x.dtype)
    return F.silu(z) if silu else z


group_norm_reference = widened(group_norm_torch)


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
    skip: Tensor | None = None,
) -> Tensor:
    """The compiled CPU kernels."""
    x = x if skip is None else torch.cat([x, skip], 1)
    if _native.requires_grad(x, weight, bias, scale, shift):
        return group_norm_training(x, num_groups, weight, bias, eps, silu, scale, shift)
    return CPU.inference(x, num_groups, weight, bias, eps, silu, scale, shift)


def _group_norm_on_gpu(
    operations: Operations,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Kernels that have `pair` and `apply`. Their gradient is that of the concatenation."""
    if _native.requires_grad(x, weight, bias, scale, shift, skip):
        x = x if skip is None else torch.cat([x, skip], 1)
        return group_norm_training(
            x, num_groups, weight, bias, eps, silu, scale, shift, statistics, operations
        )
    if skip is not None:
        assert operations.pair is not None
        return operations.pair(x, skip, num_groups, weight, bias, eps, silu, scale, shift)
    if statistics is not None:
        assert operations.apply is not None
        return operations.apply(x, *statistics, num_groups, weight, bias, silu, scale, shift)
    return operations.inference(x, num_groups, weight, bias, eps, silu, scale, shift)


# The Triton kernels and the compiled CUDA kernels.
group_norm_triton = functools.partial(_group_norm_on_gpu, TRITON)
group_norm_cuda = functools.partial(_group_norm_on_gpu, CUDA)

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": group_norm_cpu,
    "triton": group_norm_triton,
    "cuda": group_norm_cuda,
    "reference": cast(Callable[..., Tensor], group_norm_reference),
}


def _check_skip(skip: Tensor, x: Tensor) -> None:
    check_tensor("skip", skip, rank=x.dim(), like=x)
    expected = (x.shape[0], "C2", *x.shape[2:])
    if skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"skip: got shape {tuple(skip.shape)}, expected {expected} for x of {tuple(x.shape)}"
        )


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
    skip: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm as `torch.nn.functional.group_norm`, with a scale-shift and SiLU fused.

    Args:
        x: (N, C, *), fp32, bf16, fp16 or fp64, any strides.
        num_groups: number of groups; divides C, with `skip` C + C2.
        weight: (C,) or None, in the dtype of `x`, or fp32 where `x` is bf16 or fp16. So are the others:
        bias: (C,) or None.
        eps: added to the variance.
        activation: None or "silu".
        scale: (N, C) or None; the normalized values are multiplied by 1 + scale.
        shift: (N, C) or None; added after the scale.
        skip: (N, C2, *) or None, in the dtype of `x`: channels that follow those of x, as if x were
            `torch.cat([x, skip], 1)`. C is then C + C2 in the other arguments. Triton and CUDA read both
            where they lie, unless a gradient is asked for; other backends concatenate.
        statistics: mean and rstd of x in every group, (N, num_groups) each, fp32 (fp64 for fp64), as
            `conv2d` returns them with `stats_groups` and `stats_eps=eps`; or None. A promise about x and no
            operand: Triton and CUDA read x once instead of twice, other backends compute their own, and no
            gradient goes through them. Not together with `skip`.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        (N, C, *), in the dtype of `x` and in its memory format; with `skip` channels last where both are.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, *)")
    channels = x.shape[1]
    if skip is not None:
        _check_skip(skip, x)
        channels += skip.shape[1]
    if not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"num_groups: got {type(num_groups).__name__}, expected an int")
    if num_groups < 1 or channels % num_groups or channels == 0:
        raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {channels} channels")
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
            check_tensor(name, value, shape=shape, like=x, or_fp32=True)
    if statistics is not None:
        if skip is not None:
            raise ValueError("statistics: got them with skip, expected one of the two")
        check_statistics("statistics", statistics, x, (x.shape[0], num_groups))
    # With nothing to fuse, torch's fp32 kernel was measured as fast or faster (benchmarks/RESULTS.md); not in
    # training, and its gradient of the parameters alone may crash.
    plain = dtype is torch.float32 and activation is None and scale is None and shift is None
    plain = plain and not _native.requires_grad(x, weight, bias)
    device_type = device.type
    order: tuple[str, ...] | None = ("torch",) if plain and device_type == "cpu" else None
    if device_type == "cuda" and not dispatch.is_named(backend):
        order = of_norm(x, weight, bias, scale, shift, skip)
    unavailable = _native.unavailable("group_norm_forward", "x", device_type, dtype)
    serve = dispatch.choose("group_norm", device_type, unavailable, backend, order=order)
    run = _BACKENDS.get(serve, group_norm_torch)
    if serve in ("triton", "cuda"):
        run = functools.partial(run, statistics=statistics)
    silu = activation == "silu"
    return run(x, num_groups, weight, bias, eps, silu=silu, scale=scale, shift=shift, skip=skip)
