"""conv2d: a convolution with the pointwise work around it fused.

    h = up(a),   a = silu?(GroupNorm(x)) or x,   up = nearest 2x or identity
    y = W * h + bias + time_embedding[:, :, None, None] + residual

A 3x3 convolution after a nearest-2x upsample equals four 2x2 convolutions at the low resolution, so
a kernel never forms `up(a)`; the composite below does. With `stats_groups` the operation also returns
the mean and rstd of y per group, which the next GroupNorm would otherwise read y once more to find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, packing
from sdfast.ops._checks import NO_KERNEL_YET, check_optional, check_tensor, widened
from sdfast.ops._native import requires_grad, unavailable
from sdfast.ops.group_norm import group_norm


class NormPrologue(NamedTuple):
    """GroupNorm (and SiLU) applied to the input while it is loaded.

    Attributes:
        num_groups: G, divides the input channels.
        weight, bias: (C_in,).
        eps: added to the variance.
        silu: whether SiLU follows.
    """

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    silu: bool = True


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
) -> Tensor:
    """The formula, in the dtype of its arguments."""
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
    " Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=1e-5, bool norm_silu=False) -> Tensor",
    conv2d_torch,
)


ALGORITHMS = ("direct", "winograd")


def _pack_fake(weight: Tensor, algorithm: int, upsample: bool) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU; call sdfast::conv2d_forward")


def _output_size(
    x: Tensor, weight_size: tuple[int, int], stride: int, padding: Sequence[int], upsample: bool
) -> tuple[int, int]:
    scale = 2 if upsample else 1
    left, right, top, bottom = padding
    return (
        (x.shape[2] * scale + top + bottom - weight_size[0]) // stride + 1,
        (x.shape[3] * scale + left + right - weight_size[1]) // stride + 1,
    )


def _packed_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: int,
    out_channels: int,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
) -> Tensor:
    size = _output_size(x, (kernel_height, kernel_width), stride, padding, upsample)
    y = x.new_empty((x.shape[0], out_channels, *size))
    return y.to(memory_format=torch.channels_last)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: int,
) -> Tensor:
    more = (algorithm, *weight.shape[:1], *weight.shape[2:], stride, padding, upsample)
    return _packed_fake(x, weight, bias, time_embedding, residual, *more)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    algorithm: int,
) -> Tensor:
    """The compiled kernel, on a packed copy of the weight."""
    kind = f"conv2d_{ALGORITHMS[algorithm]}" + ("_upsample" if upsample and algorithm == 0 else "")
    copy = packing.packed(weight, kind, lambda values: _pack_op(values, algorithm, upsample))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if time_embedding is not None:
        time_embedding = time_embedding.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return cast(
        Tensor,
        _packed_op(
            x, copy, bias, time_embedding, residual, algorithm,
            weight.shape[0], weight.shape[2], weight.shape[3], stride, padding, upsample,
        ),
    )  # fmt: skip


_pack_op = _library.define_native(
    "conv2d_pack(Tensor weight, int algorithm, bool upsample) -> Tensor", _pack_fake
)
_packed_op = _library.define_native(
    "conv2d_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? time_embedding, Tensor? residual,"
    " int algorithm, int out_channels, int kernel_height, int kernel_width, int stride, int[] padding,"
    " bool upsample) -> Tensor",
    _packed_fake,
)
# What torch.compile sees: the packed copy is looked up when it runs.
_forward_op = _library.define_native(
    "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, int stride, int[] padding, bool upsample,"
    " Tensor? time_embedding, Tensor? residual, int algorithm) -> Tensor",
    _forward_fake,
    _forward,
)


# Winograd's copy of a weight is four times the weight (eight, of a bf16 one), and what it saves grows with
# the pixels that share it: these many make it worth the memory.
_WINOGRAD_PIXELS = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 2048}


def _algorithm(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> str:
    """Winograd where it was measured faster, its error is allowed and its memory well spent."""
    channels_out, channels_in, *kernel = weight.shape
    suits = kernel == [3, 3] and stride == 1 and min(channels_in, channels_out) >= 32
    if not suits or dispatch.numerics() != "fast":
        return "direct"
    if upsample and x.dtype == torch.bfloat16 and _library.has_kernel("bf16_pairs", "cpu"):
        return "direct"  # four 2x2 convolutions in pairs of bf16 were measured faster
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    return "winograd" if pixels >= _WINOGRAD_PIXELS[x.dtype] else "direct"


def _suits_torch(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> bool:
    """Where torch was measured faster: few channels, strides, and bf16 between the two algorithms."""
    channels_out, channels_in = weight.shape[:2]
    if min(channels_in, channels_out) < 16 or stride > 1 or not packing.is_lasting(weight):
        return True
    if x.dtype != torch.bfloat16 or upsample or x.shape[0] * x.shape[2] * x.shape[3] < 1024:
        return False
    return _algorithm(x, weight, stride, upsample) == "direct"


def conv2d_cpu(
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
) -> Tensor:
    """The compiled CPU kernels, for inference."""
    if norm_groups:
        activation = "silu" if norm_silu else None
        normed = group_norm(x, norm_groups, norm_weight, norm_bias, norm_eps, activation=activation)
        x = cast(Tensor, normed)
    algorithm = ALGORITHMS.index(_algorithm(x, weight, stride, upsample))
    if algorithm == 0 and upsample and (weight.shape[2:] != (3, 3) or stride != 1 or padding != (1, 1, 1, 1)):
        x, upsample = F.interpolate(x, scale_factor=2.0, mode="nearest"), False
    run = _forward_op if torch.compiler.is_compiling() else _forward
    return cast(
        Tensor,
        run(x, weight, bias, stride, list(padding), upsample, time_embedding, residual, algorithm),
    )


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": conv2d_cpu,
    "reference": cast(Callable[..., Tensor], conv2d_reference),
}


def _unavailable(x: Tensor, weight: Tensor, *others: Tensor | None) -> dict[str, str]:
    """Why each backend that cannot take this call cannot."""
    if not x.numel() or not weight.numel() or any(t is not None and t.dtype != x.dtype for t in others):
        reason = "it takes tensors of one dtype that are not empty"
    elif torch.is_autocast_enabled(x.device.type):
        reason = "under autocast torch decides the dtypes"
    elif not (torch.compiler.is_compiling() or packing.can_pack(weight)):
        reason = "it packs weights that are plain tensors"
    else:
        needs_gradient = requires_grad(x, weight, *others)
        return unavailable("conv2d_packed", "x", x.device.type, x.dtype, needs_gradient=needs_gradient)
    return {**NO_KERNEL_YET, "cpu": reason}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, ...] = 0,
    *,
    norm: NormPrologue | None = None,
    upsample: bool = False,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
    stats_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolution as `torch.nn.functional.conv2d`, with its prologue and epilogue fused.

    Args:
        x: (N, C_in, H, W), fp32, bf16, fp16 or fp64, contiguous or channels_last; other strides are copied.
        weight: (C_out, C_in, kh, kw), same dtype.
        bias: (C_out,) or None.
        stride: of both axes, at least 1.
        padding: zeros on every side; or (vertical, horizontal) as `torch.nn.functional.conv2d` counts; or
            (left, right, top, bottom) as `torch.nn.functional.pad` does.
        norm: GroupNorm and SiLU of the input, before anything else.
        upsample: nearest-2x of the (normalised) input before the convolution.
        time_embedding: (N, C_out), added to every pixel.
        residual: (N, C_out, H_out, W_out), added last.
        stats_groups: also return the statistics of y over this many channel groups.
        stats_eps: added to the variance in the returned rstd.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        y (N, C_out, H_out, W_out) in the dtype of `x`, channels_last where a kernel serves; with
        `stats_groups` the tuple (y, mean, rstd), the last two (N, stats_groups), fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x, rank=4)
    check_tensor("weight", weight, rank=4, like=x)
    batch, channels_in, height, width = x.shape
    channels_out, weight_channels, kernel_height, kernel_width = weight.shape
    if weight_channels != channels_in:
        raise ValueError(f"x: got {channels_in} channels, expected {weight_channels} to fit weight")
    check_optional("bias", bias, shape=(channels_out,), like=x)
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: got {stride}, expected one int, at least 1")
    sides = _sides(padding)
    out_height, out_width = _output_size(x, (kernel_height, kernel_width), stride, sides, upsample)
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"x: {height}x{width} is smaller than the {kernel_height}x{kernel_width} kernel; enlarge padding"
        )
    check_optional("time_embedding", time_embedding, shape=(batch, channels_out), like=x)
    check_optional("residual", residual, shape=(batch, channels_out, out_height, out_width), like=x)
    if norm is not None:
        _check_groups("norm.num_groups", norm.num_groups, channels_in)
        check_tensor("norm.weight", norm.weight, shape=(channels_in,), like=x)
        check_tensor("norm.bias", norm.bias, shape=(channels_in,), like=x)
    if stats_groups is not None:
        _check_groups("stats_groups", stats_groups, channels_out)

    parameters = (norm.weight, norm.bias) if norm else ()
    reasons = _unavailable(x, weight, bias, time_embedding, residual, *parameters)
    order = ("torch",) if x.device.type == "cpu" and _suits_torch(x, weight, stride, upsample) else None
    serve = dispatch.choose("conv2d", x.device.type, reasons, backend, order=order)
    run = _BACKENDS.get(serve, conv2d_torch)
    y = cast(
        Tensor,
        run(
            x,
            weight,
            bias,
            stride,
            sides,
            upsample=upsample,
            time_embedding=time_embedding,
            residual=residual,
            norm_groups=norm.num_groups if norm else 0,
            norm_weight=norm.weight if norm else None,
            norm_bias=norm.bias if norm else None,
            norm_eps=norm.eps if norm else 1e-5,
            norm_silu=norm.silu if norm else False,
        ),
    )
    if stats_groups is None:
        return y
    mean, rstd = group_statistics(y, stats_groups, stats_eps)
    return y, mean, rstd


def group_statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(var + eps) of x (N, C, ...) per group, both (N, num_groups), fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).unflatten(1, (num_groups, -1)).flatten(2)  # (N, G, C/G * pixels)
    mean = grouped.mean(dim=-1)
    var = (grouped - mean[..., None]).square().mean(dim=-1)
    return mean, torch.rsqrt(var + eps)


def _sides(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zeros to the left, right, top and bottom."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(sides) == 2:
        sides = (sides[1], sides[1], sides[0], sides[0])
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"padding: got {padding}, expected an int >= 0, two or (left, right, top, bottom)")
    return cast("tuple[int, int, int, int]", sides)


def _check_groups(name: str, groups: int, channels: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: got {groups}, expected a divisor of the {channels} channels")
