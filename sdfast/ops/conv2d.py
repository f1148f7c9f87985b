"""conv2d: a convolution with the pointwise work around it fused.

    h = up(a),   a = silu?(GroupNorm(x')) or x',   x' = cat([x, skip], 1) or x,   up = nearest 2x or identity
    y = W * h + bias + time_embedding[:, :, None, None] + residual

A 3x3 convolution after a nearest-2x upsample equals four 2x2 convolutions at the low resolution, so
a kernel never forms `up(a)`; the composite below does. The concatenation is formed by all backends but
CUDA and Triton, and by Triton where there is a gradient, for which it is read again. With `stats_groups` the
operation also returns the mean and rstd of y per group, as the next GroupNorm would find them; on an H100
that took longer than the pass over y that it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, tuning
from sdfast.ops._checks import (
    NO_KERNEL_YET,
    autocast_dtype,
    can_cast,
    cast_to,
    check_optional,
    check_statistics,
    check_tensor,
    is_autocast,
    is_plain,
    widened,
)
from sdfast.ops._conv2d_arguments import check_groups, sides_of, stride_of
from sdfast.ops._conv2d_call import Call, NormPrologue
from sdfast.ops._conv2d_choice import has_few_outputs, shape_of, suits_torch, times_of
from sdfast.ops._conv2d_cpu import forward, forward_op, output_size
from sdfast.ops._conv2d_cuda import conv2d_cuda, why_not_cuda
from sdfast.ops._conv2d_fused import conv2d_triton, conv2d_triton_training
from sdfast.ops._conv2d_training import conv2d_training, suits_torch_in_training
from sdfast.ops._conv2d_tuning import measure
from sdfast.ops._cuda_order import of_convolution
from sdfast.ops._native import requires_grad, unavailable


def conv2d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_silu: bool = False,
    skip: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its arguments."""
    if skip is not None:
        x = torch.cat([x, skip], 1)
    if norm_groups:
        x = torch.group_norm(x, norm_groups, norm_weight, norm_bias, norm_eps)
        x = F.silu(x) if norm_silu else x
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    left, right, top, bottom = padding
    if left == right and top == bottom:
        y = F.conv2d(x, weight, bias, stride, (top, left))
    else:
        y = F.conv2d(F.pad(x, padding), weight, bias, stride)
    if time_embedding is not None:
        y = y + time_embedding[:, :, None, None]
    return y if residual is None else y + residual


conv2d_reference = widened(conv2d_torch)

_library.define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int[4] padding=[0, 0, 0, 0], *,"
    " bool upsample=False, Tensor? time_embedding=None, Tensor? residual=None, int norm_groups=0,"
    " Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=1e-5, bool norm_silu=False,"
    " Tensor? skip=None) -> Tensor",
    conv2d_torch,
)

tuning.register("conv2d", measure)


def conv2d_cpu(call: Call, or_torch: bool = True) -> Tensor:
    """The compiled CPU kernels, or torch's where `or_torch` and that was measured here to be faster."""
    call = call.normalised(None)
    if requires_grad(*call.tensors()):
        return conv2d_training(call)
    run = forward_op if torch.compiler.is_compiling() else forward
    algorithm = None if or_torch else "compiled"
    x, weight, bias, stride, padding, upsample, time_embedding, residual, *_ = call
    return cast(
        Tensor, run(x, weight, bias, stride, list(padding), upsample, time_embedding, residual, algorithm)
    )


def _composite(call: Call, formula: Callable[..., object]) -> Tensor:
    """`conv2d_torch` or `conv2d_reference` of a call without `skip`."""
    norm: dict[str, Any] = {}
    if call.norm is not None:
        norm = {
            "norm_groups": call.norm.num_groups, "norm_weight": call.norm.weight,
            "norm_bias": call.norm.bias, "norm_eps": call.norm.eps, "norm_silu": call.norm.silu,
        }  # fmt: skip
    x, weight, bias, stride, padding, upsample, time_embedding, residual, *_ = call
    y = formula(
        x, weight, bias, stride, padding, upsample=upsample, time_embedding=time_embedding, residual=residual,
        **norm,
    )  # fmt: skip
    return cast(Tensor, y)


def _unavailable(x: Tensor, weight: Tensor, *others: Tensor) -> dict[str, str]:
    """Why each backend that cannot take this call cannot."""
    if not x.numel() or not weight.numel() or any(t.dtype != x.dtype for t in others):
        reason = "it takes tensors of one dtype that are not empty"
    elif is_autocast(x.device.type):
        reason = "under autocast torch decides the dtypes"
    elif not is_plain(weight):
        reason = "it reads weights that are plain tensors"
    else:
        return unavailable("conv2d_kernel", "x", x.device.type, x.dtype)
    return dict.fromkeys(NO_KERNEL_YET, reason)


def reads_skip(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x by this weight, of stride 1, that is given `skip` reads both where they lie.

    Elsewhere, and in training, which reads the concatenation again, it saves nothing.
    """
    if torch.is_grad_enabled():
        return False
    order = None
    if not dispatch.is_named(None):
        order = of_convolution(x, weight, 1, False) if x.device.type == "cuda" else ("torch",)
    serve = dispatch.choose("conv2d", x.device.type, _unavailable(x, weight), None, order=order)
    return serve in ("cuda", "triton")


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    *,
    norm: NormPrologue | None = None,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    stats_groups: int | None = None,
    stats_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolution as `torch.nn.functional.conv2d`, with its prologue and epilogue fused.

    Args:
        x: (N, C_in, H, W), fp32, bf16, fp16 or fp64, contiguous or channels_last; other strides are copied.
        weight: (C_out, C_in, kh, kw), same dtype; with `skip` (C_out, C_in + C_skip, kh, kw).
        bias: (C_out,) or None.
        stride: of both axes, at least 1; a pair of equal ints will also do.
        padding: zeros on every side; or (vertical, horizontal) as `torch.nn.functional.conv2d` counts; or
            (left, right, top, bottom) as `torch.nn.functional.pad` does.
        norm: GroupNorm and SiLU of the input, before anything else.
        upsample: nearest-2x of the (normalised) input before the convolution.
        time_embedding: (N, C_out), added to every pixel.
        residual: (N, C_out, H_out, W_out), added last.
        skip: (N, C_skip, H, W): channels that follow those of x, as if x were `torch.cat([x, skip], 1)`.
            CUDA and Triton read both where they lie; the others, and Triton for a gradient, concatenate.
        stats_groups: also return the statistics of y over this many channel groups.
        stats_eps: added to the variance in the returned rstd.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        y (N, C_out, H_out, W_out) in the dtype of `x`, or autocast's, channels_last where a kernel serves;
        with `stats_groups` the tuple (y, mean, rstd), the last two (N, stats_groups), fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x, rank=4)
    check_tensor("weight", weight, rank=4, like=x, casts=True)
    batch, channels_in, height, width = x.shape
    channels_out, weight_channels, kernel_height, kernel_width = weight.shape
    if skip is not None:
        check_tensor("skip", skip, rank=4, like=x, casts=True)
        if (skip.shape[0], *skip.shape[2:]) != (batch, height, width):
            expected = f"({batch}, C, {height}, {width})"
            raise ValueError(f"skip: got shape {tuple(skip.shape)}, expected {expected} as the input")
        channels_in += skip.shape[1]
    if weight_channels != channels_in:
        what = "x" if skip is None else "x and skip"
        raise ValueError(f"{what}: got {channels_in} channels, expected {weight_channels} to fit weight")
    check_optional("bias", bias, shape=(channels_out,), like=x, casts=True)
    stride = stride_of(stride)
    sides = sides_of(padding)
    out_height, out_width = output_size(x, (kernel_height, kernel_width), stride, sides, upsample)
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"x: {height}x{width} is smaller than the {kernel_height}x{kernel_width} kernel; enlarge padding"
        )
    check_optional("time_embedding", time_embedding, shape=(batch, channels_out), like=x, casts=True)
    check_optional(
        "residual", residual, shape=(batch, channels_out, out_height, out_width), like=x, casts=True
    )
    if norm is not None:
        if not isinstance(norm, NormPrologue):
            raise TypeError(f"norm: got {type(norm).__name__}, expected a NormPrologue")
        check_groups("norm.num_groups", norm.num_groups, channels_in)
        check_tensor("norm.weight", norm.weight, shape=(channels_in,), like=x, casts=True)
        check_tensor("norm.bias", norm.bias, shape=(channels_in,), like=x, casts=True)
        if norm.statistics is not None:
            check_statistics("norm.statistics", norm.statistics, x, (batch, norm.num_groups))
    if stats_groups is not None:
        check_groups("stats_groups", stats_groups, channels_out)

    call = Call(x, weight, bias, stride, sides, upsample, time_embedding, residual, skip, norm)
    statistics = None if stats_groups is None else (stats_groups, stats_eps)
    dtype = autocast_dtype(x.device.type)
    if dtype is None or not _follows_autocast(call, dtype, backend):
        return _served(call, statistics, backend)
    call = call.normalised(backend)  # the norm's parameters keep their dtype
    call = call._replace(
        x=cast_to(dtype, call.x), weight=cast_to(dtype, weight), bias=cast_to(dtype, bias),
        skip=cast_to(dtype, call.skip),
    )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        return _served(call, statistics, backend)


def _follows_autocast(call: Call, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether the call is one of tensors in autocast's dtype, when they are cast.

    What else is added decides the sum's dtype, and must be of it. A norm comes first, of tensors that
    `group_norm` takes together. Inference keeps copies of weights, which would be made anew from each cast
    weight: unless a backend is named, torch serves.
    """
    x, weight, norm = call.x, call.weight, call.norm
    added = (call.time_embedding, call.residual)
    fit = norm is None or (
        (call.skip is None or call.skip.dtype is x.dtype)
        and all(t.dtype in (x.dtype, torch.float32) for t in (norm.weight, norm.bias))
    )
    inference = not requires_grad(*call.tensors())
    return (
        fit
        and is_plain(weight)
        and can_cast(x, weight, call.bias, call.skip)
        and all(t is None or t.dtype is dtype for t in added)
        and not (inference and weight.dtype is not dtype and not dispatch.is_named(backend))
    )


def _served(
    call: Call, statistics: tuple[int, float] | None, backend: str | None
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """y, and its mean and rstd over so many groups where `statistics`, groups and eps, are asked for."""
    x, weight = call.x, call.weight
    reasons = _unavailable(*call.tensors())
    named, trains = dispatch.is_named(backend), requires_grad(*call.tensors())
    if "cuda" not in reasons and (why := why_not_cuda(weight, call.stride, trains)) is not None:
        reasons["cuda"] = why
    order, fused_by = None, None
    if x.device.type == "cuda" or named:  # a CPU's own kernels are `_unfused`'s
        if not named:
            plain = statistics is None and (call.norm is None or call.norm.statistics is None)
            added = call.tensors()[2:]
            order = of_convolution(x, weight, call.stride, call.upsample, *added, plain=plain)
        fused_by = dispatch.choose("conv2d", x.device.type, reasons, backend, order=order)
    if fused_by in ("cuda", "triton") and not trains:
        fusing = conv2d_cuda if fused_by == "cuda" else conv2d_triton
        return fusing(call, statistics)
    y = conv2d_triton_training(call) if fused_by == "triton" else _unfused(call, reasons, backend, order)
    return y if statistics is None else (y, *group_statistics(y, *statistics))


def _unfused(
    call: Call, reasons: dict[str, str], backend: str | None, order: tuple[str, ...] | None
) -> Tensor:
    """By a backend that concatenates `skip` and gathers no statistics; `order` is the GPU's."""
    if call.skip is not None:
        call = call._replace(x=torch.cat([call.x, call.skip], 1), skip=None)
    named = dispatch.is_named(backend)
    if "cpu" not in reasons and not named:
        trains = requires_grad(*call.tensors())
        to_torch = suits_torch_in_training(call) if trains else _suits_torch(call)
        order = ("torch",) if to_torch else None
    serve = dispatch.choose("conv2d", call.x.device.type, reasons, backend, order=order)
    if serve == "cpu":
        return conv2d_cpu(call, or_torch=not named)
    return _composite(call, conv2d_reference if serve == "reference" else conv2d_torch)


def _suits_torch(call: Call) -> bool:
    """Whether the built-in rule leaves the whole call to torch. Measured times have precedence, where asked.

    A compiled model cannot ask while it is traced, and is served by the rule.
    """
    x, weight, _, stride, padding, upsample, time_embedding, residual, *_ = call
    if has_few_outputs(weight, upsample) or not suits_torch(x, weight, upsample):
        return False
    if torch.compiler.is_compiling():
        return True
    added = (time_embedding is not None) + (residual is not None)
    return times_of(shape_of(x, weight, stride, padding, upsample, added)) is None


def group_statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(var + eps) of x (N, C, ...) per group, both (N, num_groups), fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).unflatten(1, (num_groups, -1)).flatten(2)  # (N, G, C/G * pixels)
    mean = grouped.mean(dim=-1)
    var = (grouped - mean[..., None]).square().mean(dim=-1)
    return mean, torch.rsqrt(var + eps)
