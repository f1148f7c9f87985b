"""conv2d in Triton: an implicit GEMM over channels_last images.

    y[oy P + p, ox P + q, o] = Σ_(i,j) Σ_c x[oy S + y0 + i dy, ox S + x0 + j dx, c] w[o, c, i, j] + ...

Each program keeps a tile of y, pixels of one image by channels, in fp32 registers and walks along K: kernel
position after position, block after block of the channels of x, then of `skip`, whose concatenation nobody
writes. x is gathered where it lies, zeros outside the image, w read where it lies. Bias, time embedding,
residual and the statistics that the next GroupNorm needs follow on the registers. Where tiles are fewer
than multiprocessors K is split: fp32 partials are written, and a second kernel sums them in order.
Bytes: x + w + residual + y once, were it not for L2; the limit is the tensor cores'. Tiles of 8 block rows
follow each other column by column, and the four phases of an upsampled tile together: they share x in L2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import packing
from sdfast.ops._conv2d_choice import folds
from sdfast.ops._conv2d_cpu import output_size, values_of
from sdfast.ops._conv2d_kernels_triton import convolution_kernel, finish_kernel
from sdfast.ops._conv2d_operations import empty_result
from sdfast.ops._conv2d_plan import Convolution, plan_convolution
from sdfast.ops._conv2d_statistics_triton import combine
from sdfast.ops._triton import Config, launch, product_precision


class Axis(NamedTuple):
    """One axis of a convolution.

    Result t of `size` meets x at t · stride + start + i · step, i counting the kernel's positions, and is
    pixel t · place_stride + place of y.
    """

    size: int
    stride: int = 1
    start: int = 0
    step: int = 1
    place_stride: int = 1
    place: int = 0


class Geometry(NamedTuple):
    """The rows and the columns of a convolution."""

    rows: Axis
    columns: Axis


class Norm(NamedTuple):
    """GroupNorm and SiLU of x (and skip) while loaded: mean, rstd (N, groups) fp32, weight, bias (C,)."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    silu: bool


_FINISH = Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4)


def convolve(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: Geometry,
    *,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    time_embedding: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    statistics: tuple[int, float] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Write a convolution's results, those that `geometry` places, to y.

    Args:
        x: (N, C, H, W), channels_last, fp32, bf16 or fp16.
        weight: (O, C + C2, kh, kw), any strides, read where it lies; or (4, O, C + C2, kh, kw), four kernels,
            of which the one of phase 2 a + b meets x, and places its results, a rows and b columns further.
        y: (N, O, H', W'), channels_last, to be written.
        skip: (N, C2, H, W), channels_last: its channels follow those of x.
        bias, time_embedding: (O,) and (N, O), contiguous.
        residual: as y.
        statistics: groups and eps; only where `geometry` places every pixel of y.

    Returns:
        With `statistics`, the mean and rstd of y, (N, groups) both, fp32; else None.
    """
    images, channels, height, width = x.shape
    sources = (channels,) if skip is None else (channels, skip.shape[1])
    rows, columns = geometry
    pixels = rows.size * columns.size
    weights = weight if weight.dim() == 5 else weight.unsqueeze(0)
    phases, out_channels, _, taps_y, taps_x = weights.shape
    precision = product_precision(x.dtype, "conv")
    call = Convolution(
        weight.shape, weight.stride(), weight.dtype, sources, images, pixels, phases, precision,
        normalised=norm is not None, statistics=statistics is not None,
    )  # fmt: skip
    plan = plan_convolution(call, x.device)
    block_m, block_k = plan.config.constants["BLOCK_M"], plan.config.constants["BLOCK_K"]
    steps = [taps_y * taps_x * -(-c // block_k) for c in sources]
    split = plan.splits > 1
    if split:
        block_m = _FINISH.constants["BLOCK_M"]
    tiles = -(-pixels // block_m)  # of those that store y
    partial_statistics = None
    if statistics is not None:
        partial_statistics = x.new_empty((images, phases * tiles, 3, out_channels), dtype=torch.float32)
    shape = (plan.splits, phases, images, pixels, out_channels)
    target = x.new_empty(shape, dtype=torch.float32) if split else y
    added: tuple[Any, ...] = (bias, time_embedding, residual, partial_statistics)
    normed = (None, None, None, None) if norm is None else norm[:4]
    groups = 1 if norm is None else norm.mean.shape[1]
    y_size = (y.shape[2], y.shape[3])
    launch(
        convolution_kernel, (phases * images * plan.tiles[0] * plan.tiles[1], plan.splits),
        x, skip, weights, *((None,) * 4 if split else added), target, *normed,
        channels, sum(sources[1:]), out_channels, groups, sum(sources) // groups,
        height, width, columns.size, pixels, *y_size, images, phases, plan.tiles[0],
        plan.steps, steps[0], sum(steps), *rows[1:], *columns[1:], max(taps_x, 1), *weights.stride(),
        config=plan.config, SPLIT=split, SILU=norm is not None and norm.silu,
        EVEN=all(c % block_k == 0 for c in sources), PRECISION=precision,
    )  # fmt: skip
    if split:
        grid = (-(-out_channels // _FINISH.constants["BLOCK_N"]), phases * images * tiles)
        launch(
            finish_kernel, grid, target, *added, y, out_channels, columns.size, pixels, *y_size, images,
            phases, tiles, plan.splits, *rows[4:], *columns[4:], config=_FINISH,
        )  # fmt: skip
    if statistics is None or partial_statistics is None:
        return None
    return combine(partial_statistics, *statistics, pixels=pixels, rows=block_m, phases=phases)


def forward_geometry(x: Tensor, kernel: tuple[int, int], stride: int, padding: Sequence[int]) -> Geometry:
    """Of a convolution of x with zeros to the left, right, top and bottom."""
    left, _, top, _ = padding
    height, width = output_size(x, kernel, stride, padding, upsample=False)
    return Geometry(Axis(height, stride, -top), Axis(width, stride, -left))


def upsampled_geometry(x: Tensor) -> Geometry:
    """Of a 3x3 convolution, padded by 1, of x upsampled twofold, with the four kernels of `fold`."""
    return Geometry(Axis(x.shape[2], 1, -1, 1, 2, 0), Axis(x.shape[3], 1, -1, 1, 2, 0))


def gradient_geometries(
    weight: Tensor, size: tuple[int, int], stride: int, padding: Sequence[int]
) -> Iterator[tuple[Tensor, Geometry]]:
    """What `convolve` takes to turn dy into dx, (N, C, *size): weight and geometry of each of its launches.

    Pixels of dx whose row and column leave the same remainders divided by the stride meet the same positions
    of the kernel, every stride-th of them, in reverse.

    Args:
        weight: (O, C, kh, kw), any strides.
        stride, padding: the convolution's.
    """
    left, _, top, _ = padding

    def axis(size: int, before: int, place: int) -> Axis:
        count = max(0, -((place - size) // stride))
        return Axis(count, 1, (place + before) // stride, -1, stride, place)

    for row, column in itertools.product(range(stride), repeat=2):
        part = torch.ops.aten.slice(weight.transpose(0, 1), 2, (row + top) % stride, None, stride)
        part = torch.ops.aten.slice(part, 3, (column + left) % stride, None, stride)
        yield part, Geometry(axis(size[0], top, row), axis(size[1], left, column))


def _images(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def _norm(tensors: Sequence[Tensor], silu: bool) -> Norm | None:
    if not tensors:
        return None
    mean, rstd, weight, bias = (t.contiguous() for t in tensors)
    return Norm(mean, rstd, weight, bias, silu)


def _run(
    statistics: tuple[int, float] | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    upsample: bool,
    time_embedding: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    norm: Sequence[Tensor],
    norm_silu: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    y = empty_result(x, weight, stride, padding, upsample)
    if weight.dim() == 4:
        packing.note(weight)
        if upsample and not folds(weight.shape[2:], stride, padding):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            skip = None if skip is None else F.interpolate(skip, scale_factor=2.0, mode="nearest")
            upsample = False
        weight = values_of(weight, "direct", upsample)
    weight = weight.movedim(-1, -3)  # (4?, O, C, kh, kw), its channels still contiguous
    kernel = (weight.shape[-2], weight.shape[-1])
    geometry = upsampled_geometry(x) if upsample else forward_geometry(x, kernel, stride, padding)
    found = convolve(
        x.contiguous(memory_format=torch.channels_last), weight, y, geometry,
        skip=_images(skip),
        bias=None if bias is None else bias.contiguous(),
        time_embedding=None if time_embedding is None else time_embedding.contiguous(),
        residual=_images(residual),
        norm=_norm(norm, norm_silu),
        statistics=statistics,
    )  # fmt: skip
    return y, found


def conv2d_kernel(*arguments: Any) -> Tensor:
    """sdfast::conv2d_kernel_triton."""
    return _run(None, *arguments)[0]


def conv2d_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """sdfast::conv2d_statistics_triton."""
    *operands, stats_groups, stats_eps = arguments
    y, found = _run((stats_groups, stats_eps), *operands)
    assert found is not None
    return y, *found
