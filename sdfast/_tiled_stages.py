"""The steps of a VAE's encoder and decoder on an image in bands, each with the ways to do it and their price.

Here are plain convolutions, attention and the last norm; ResNet blocks are `_tiled_resnet`. A band of the
result takes the place of one of the source. A step's peak counts what bands, the kernels' scratch and their
copies of the weights take; its cost is in multiply-adds of the direct algorithm, Winograd's share of which is
about the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdfast import ops
from sdfast._bands import (
    Bands,
    Buffer,
    Size,
    Source,
    convolved,
    joined,
    normalized,
    spans,
    window,
)

# Of a band. Lower ones would compute most rows twice, and leave the allocator's heap in small pieces.
_ROWS = (8, 16, 32, 64, 128)
_MOST_BAND_BYTES = 128 << 20
_SCRATCH_BYTES = 64 << 20  # of a convolution, at most: see csrc/conv2d_winograd_cpu.h
BAND_COST = 2**27  # of starting kernels and threads, as multiply-adds


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to do a step.

    Attributes:
        rows: of a band of the result.
        cost: multiply-adds.
        peak_bytes: the most that is in memory, source and result included.
        keeps_hidden: whether h is kept (ResNet blocks).
        keeps_upsampled: whether u is (ResNet blocks after an upsampler).
    """

    rows: int
    cost: float
    peak_bytes: int
    keeps_hidden: bool = True
    keeps_upsampled: bool = True


class Stage(Protocol):
    """One step, from an image of size `source` to one of size `result`."""

    source: Size
    result: Size
    weights: list[Tensor]

    def choices(self, source_rows: int) -> Iterator[Choice]:
        """The ways, where the bands of the source have `source_rows` rows."""

    def run(self, source: Bands, choice: Choice) -> Bands:
        """Do it. The source is released."""


def row_counts(size: Size) -> Iterator[int]:
    """How high a band of such an image may be."""
    for i, rows in enumerate(_ROWS):
        if i == 0 or (rows * size.row_bytes <= _MOST_BAND_BYTES and _ROWS[i - 1] < size.height):
            yield rows


def copies_bytes(*convs: nn.Conv2d | None, upsampler: nn.Conv2d | None = None) -> int:
    """Bytes of the copies of weights: F(4x4, 3x3) has 36 fp32 numbers for 9, upsampling 100."""
    plain = sum(16 * conv.weight.numel() for conv in convs if conv is not None)
    return plain + (0 if upsampler is None else 45 * upsampler.weight.numel())


def scratch_bytes(channels: int, rows: int, width: int) -> int:
    """F(4x4, 3x3) has 36 fp32 numbers for 16 pixels. `channels`: of source and result together."""
    return min(_SCRATCH_BYTES, 9 * channels * (rows + 4) * width)


def weights_of(*modules: nn.Module | None) -> list[Tensor]:
    """The weights of those that are convolutions."""
    return [module.weight for module in modules if isinstance(module, nn.Conv2d)]


def sweep(norm: nn.GroupNorm, source: Source, rows: int) -> ops.Moments:
    """The moments of the whole source."""
    moments = None
    for first, last in spans(source.height, rows):
        for piece in source.rows(first, last):
            found = ops.group_norm_moments(piece, norm.num_groups)
            moments = found if moments is None else moments.merged(found)
        del piece  # before the next are made
    assert moments is not None
    return moments


class ConvStage:
    """A convolution alone: the first one, and downsamplers."""

    def __init__(self, conv: nn.Conv2d, source: Size, sides: tuple[int, int, int, int]) -> None:
        """`sides`: of zeros, left, right, top, bottom."""
        self.conv, self.source, self.sides = conv, source, sides
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        left, right, top, bottom = sides
        self.result = Size(
            conv.out_channels,
            (source.height + top + bottom - self.kernel) // self.stride + 1,
            (source.width + left + right - self.kernel) // self.stride + 1,
            source.itemsize,
        )
        self.weights = weights_of(conv)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x, y = self.source, self.result
        for rows in row_counts(y):
            read = rows * self.stride + self.kernel
            # Rows joined, and padded once more where torch serves.
            band = 2 * read * x.row_bytes + 2 * rows * y.row_bytes + source_rows * x.row_bytes
            peak = (
                max(x.nbytes, y.nbytes)
                + band
                + copies_bytes(self.conv)
                + scratch_bytes(x.channels + y.channels, rows, y.width)
            )
            cost = self.conv.weight.numel() * y.height * y.width + BAND_COST * y.height / rows
            yield Choice(rows, cost, peak)

    def run(self, source: Bands, choice: Choice) -> Bands:
        y = Bands()
        left, right, top, _ = self.sides
        for first, last in spans(self.result.height, choice.rows):
            read = window(self.source.height, first, last, kernel=self.kernel, stride=self.stride, above=top)
            x = joined(source.rows(read.first, read.last))
            y.append(convolved(self.conv, x, read, (left, right)))
            del x
            source.release(max(0, last * self.stride - top))
        return y


class AttentionStage:
    """Self-attention among the pixels: keys and values of all, queries a band at a time."""

    def __init__(self, attention: Any, size: Size) -> None:
        self.attention, self.source, self.result = attention, size, size
        self.weights: list[Tensor] = []  # of convolutions: the others are read in place

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x = self.source
        # Keys, values, and both as the kernel multiplies them, in fp32 at most; split ones take five halves.
        tokens = 2 * x.nbytes + (5 * x.nbytes // 2 if x.itemsize == 4 else 4 * x.nbytes)
        for rows in row_counts(x):
            work = (source_rows + 5 * rows) * x.row_bytes
            # Every call copies keys and values anew.
            call = BAND_COST + 64 * x.channels * x.height * x.width
            cost = 4 * x.channels**2 * x.height * x.width + call * x.height / rows
            yield Choice(rows, cost, x.nbytes + tokens + work)

    def run(self, source: Bands, choice: Choice) -> Bands:
        a, size, buffer = self.attention, self.source, Buffer()
        moments = sweep(a.group_norm, source, choice.rows)

        def tokens(first: int, last: int) -> Tensor:
            """Normalised rows as (1, L, C)."""
            n = normalized(a.group_norm, moments, source.rows(first, last), buffer, None)
            return n.permute(0, 2, 3, 1).flatten(1, 2)

        def by_head(t: Tensor) -> Tensor:
            return t.unflatten(-1, (a.heads, -1)).transpose(1, 2)  # (1, heads, L, D)

        first_piece = source.rows(0, 1)[0]
        pixels = size.height * size.width
        k, v = (first_piece.new_empty((1, pixels, linear.out_features)) for linear in (a.to_k, a.to_v))
        del first_piece
        for first, last in spans(size.height, choice.rows):
            n = tokens(first, last)
            for linear, into in ((a.to_k, k), (a.to_v, v)):
                into[:, first * size.width : last * size.width] = ops.linear(n, linear.weight, linear.bias)
        y = Bands()
        to_out = a.to_out[0]
        for first, last in spans(size.height, choice.rows):
            q = ops.linear(tokens(first, last), a.to_q.weight, a.to_q.bias)
            o = ops.attention(by_head(q), by_head(k), by_head(v)).transpose(1, 2).flatten(2)
            x = joined(source.rows(first, last)).permute(0, 2, 3, 1).flatten(1, 2)
            band = ops.linear(o, to_out.weight, to_out.bias, residual=x)
            y.append(band.unflatten(1, (last - first, size.width)).permute(0, 3, 1, 2))
            del x
            source.release(last)
        return y


class HeadStage:
    """The last norm, SiLU and convolution, into one tensor."""

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv2d, source: Size) -> None:
        self.norm, self.conv, self.source = norm, conv, source
        self.result = source._replace(channels=conv.out_channels)
        self.weights = weights_of(conv)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x, y = self.source, self.result
        for rows in row_counts(x):
            # Padded once more where torch serves.
            work = (source_rows + 2 * (rows + 2)) * x.row_bytes + 2 * rows * y.row_bytes
            cost = self.conv.weight.numel() * x.height * x.width + BAND_COST * x.height / rows
            work += copies_bytes(self.conv) + scratch_bytes(x.channels + y.channels, rows, x.width)
            yield Choice(rows, cost, x.nbytes + y.nbytes + work)

    def run(self, source: Bands, choice: Choice) -> Bands:
        moments, buffer = sweep(self.norm, source, choice.rows), Buffer()
        like = source.rows(0, 1)[0]
        y = torch.empty((1, *self.result[:3]), dtype=like.dtype, device=like.device)
        del like
        for first, last in spans(self.source.height, choice.rows):
            read = window(self.source.height, first, last)
            n = normalized(self.norm, moments, source.rows(read.first, read.last), buffer, "silu")
            y[:, :, first:last] = convolved(self.conv, n, read)
            source.release(max(0, last - 1))
        return Bands(y)
