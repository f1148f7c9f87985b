"""conv2d on CPU: which compiled algorithm serves a shape, and its call on a packed copy of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, packing
from sdfast.ops._conv2d_training import conv2d_training
from sdfast.ops._native import requires_grad
from sdfast.ops.group_norm import group_norm

ALGORITHMS = ("direct", "winograd")


def _pack_fake(weight: Tensor, algorithm: int, upsample: bool) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU; call sdfast::conv2d_forward")


def output_size(
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
    size = output_size(x, (kernel_height, kernel_width), stride, padding, upsample)
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


def algorithm_for(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> str:
    """Winograd where it was measured faster, its error is allowed and its memory well spent."""
    channels_out, channels_in, *kernel = weight.shape
    suits = kernel == [3, 3] and stride == 1 and min(channels_in, channels_out) >= 32
    if not suits or dispatch.numerics() != "fast":
        return "direct"
    if upsample and x.dtype == torch.bfloat16 and _library.has_kernel("bf16_pairs", "cpu"):
        return "direct"  # four 2x2 convolutions in pairs of bf16 were measured faster
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    return "winograd" if pixels >= _WINOGRAD_PIXELS[x.dtype] else "direct"


def suits_torch(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> bool:
    """Where torch was measured faster: few channels, strides, and bf16 between the two algorithms."""
    channels_out, channels_in = weight.shape[:2]
    if min(channels_in, channels_out) < 16 or stride > 1 or not packing.is_lasting(weight):
        return True
    if x.dtype != torch.bfloat16 or upsample or x.shape[0] * x.shape[2] * x.shape[3] < 1024:
        return False
    return algorithm_for(x, weight, stride, upsample) == "direct"


def suits_torch_in_training(x: Tensor, weight: Tensor, stride: int, upsample: bool) -> bool:
    """Where torch's gradients were measured faster: few channels, little work, half precision."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3] * (4 if upsample else 1)
    few = min(weight.shape[:2]) < 16 or weight.numel() * pixels < 2**22
    return few or x.dtype != torch.float32


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
    """The compiled CPU kernels. Their gradient cannot be differentiated again; torch's can."""
    if norm_groups:
        activation = "silu" if norm_silu else None
        normed = group_norm(x, norm_groups, norm_weight, norm_bias, norm_eps, activation=activation)
        x = cast(Tensor, normed)
    training = requires_grad(x, weight, bias, time_embedding, residual)
    algorithm = 0 if training else ALGORITHMS.index(algorithm_for(x, weight, stride, upsample))
    if algorithm == 0 and upsample and (weight.shape[2:] != (3, 3) or stride != 1 or padding != (1, 1, 1, 1)):
        x, upsample = F.interpolate(x, scale_factor=2.0, mode="nearest"), False
    if training:
        return conv2d_training(x, weight, bias, stride, padding, upsample, time_embedding, residual)
    run = _forward_op if torch.compiler.is_compiling() else _forward
    return cast(
        Tensor,
        run(x, weight, bias, stride, list(padding), upsample, time_embedding, residual, algorithm),
    )
