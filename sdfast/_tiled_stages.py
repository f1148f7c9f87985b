"""The steps of a VAE's encoder and decoder on an image in bands, each with the ways to do it and their price.

Only GroupNorm looks at the whole image, and needs of it no more than its moments. So a layer goes over the
bands once to find them, and what it computed on the way is kept or computed again:

    ResNet block    h = conv1(silu(norm1(x))), y = x + conv2(silu(norm2(h))): h is kept, or made twice
    upsampling      u = conv(nearest-2x of x), then a block of u: u is kept, or made three times

A band of y takes the place of one of x. A step's peak counts what the bands, the kernels' scratch and their
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
    Upsampled,
    Window,
    convolved,
    joined,
    normalized,
    part,
    spans,
    window,
)

_ROWS = tuple(2**i for i in range(8))  # of a band
_MOST_BAND_BYTES = 128 << 20
_SCRATCH_BYTES = 64 << 20  # of a convolution, at most: see csrc/conv2d_winograd_cpu.h
_BAND_COST = 2**27  # of starting kernels and threads, as multiply-adds


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


def _row_counts(size: Size) -> Iterator[int]:
    """How high a band of such an image may be."""
    for i, rows in enumerate(_ROWS):
        if i == 0 or (rows * size.row_bytes <= _MOST_BAND_BYTES and _ROWS[i - 1] < size.height):
            yield rows


def _copies(*convs: nn.Conv2d | None, upsampler: nn.Conv2d | None = None) -> int:
    """Bytes of the copies of weights: F(4x4, 3x3) has 36 fp32 numbers for 9, upsampling 100."""
    plain = sum(16 * conv.weight.numel() for conv in convs if conv is not None)
    return plain + (0 if upsampler is None else 45 * upsampler.weight.numel())


def _scratch(channels: int, rows: int, width: int) -> int:
    """F(4x4, 3x3) has 36 fp32 numbers for 16 pixels. `channels`: of source and result together."""
    return min(_SCRATCH_BYTES, 9 * channels * (rows + 4) * width)


def _weights(*modules: nn.Module | None) -> list[Tensor]:
    return [module.weight for module in modules if isinstance(module, nn.Conv2d)]


def _sweep(norm: nn.GroupNorm, source: Source, rows: int) -> ops.Moments:
    """The moments of the whole source."""
    moments = None
    for first, last in spans(source.height, rows):
        for piece in source.rows(first, last):
            found = ops.group_norm_moments(piece, norm.num_groups)
            moments = found if moments is None else moments.merged(found)
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
        self.weights = _weights(conv)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x, y = self.source, self.result
        for rows in _row_counts(y):
            read = rows * self.stride + self.kernel
            # Rows joined, and padded once more where torch serves.
            band = 2 * read * x.row_bytes + 2 * rows * y.row_bytes + source_rows * x.row_bytes
            peak = (
                max(x.nbytes, y.nbytes)
                + band
                + _copies(self.conv)
                + _scratch(x.channels + y.channels, rows, y.width)
            )
            cost = self.conv.weight.numel() * y.height * y.width + _BAND_COST * y.height / rows
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


class ResnetStage:
    """A ResNet block, and the upsampler before it where there is one."""

    def __init__(self, block: Any, source: Size, upsampler: nn.Conv2d | None = None) -> None:
        self.block, self.source, self.upsampler = block, source, upsampler
        scale = 1 if upsampler is None else 2
        self.input = Size(
            block.conv1.in_channels, scale * source.height, scale * source.width, source.itemsize
        )
        self.result = self.input._replace(channels=block.conv2.out_channels)
        self.weights = _weights(block.conv1, block.conv2, block.conv_shortcut, upsampler)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        for rows in _row_counts(self.input):
            for keeps_hidden in (True, False):
                for keeps_upsampled in (True, False) if self.upsampler is not None else (True,):
                    peak = self._peak(rows, source_rows, keeps_hidden, keeps_upsampled)
                    cost = self._cost(rows, keeps_hidden, keeps_upsampled)
                    yield Choice(rows, cost, peak, keeps_hidden, keeps_upsampled)

    def _cost(self, rows: int, keeps_hidden: bool, keeps_upsampled: bool) -> float:
        block, x = self.block, self.input
        conv1, conv2 = block.conv1.weight.numel(), block.conv2.weight.numel()
        # Each sweep makes the rows that the next layers read beyond the band again.
        total = conv1 + conv2 + (0 if keeps_hidden else conv1 * (1 + 2 / rows))
        if self.upsampler is not None:
            times = 1 + 4 / rows
            if not keeps_upsampled:
                times += (1 + 6 / rows) + (1 + (4 if keeps_hidden else 8) / rows)
            total += times * self.upsampler.weight.numel() * 4 / 9
        return total * x.height * x.width + _BAND_COST * x.height / rows

    def _peak(self, rows: int, source_rows: int, keeps_hidden: bool, keeps_upsampled: bool) -> int:
        low, x, y, block = self.source, self.input, self.result, self.block
        stored, held, peaks = low.nbytes, source_rows * low.row_bytes, []

        def upsampled(count: int) -> int:
            return (
                0 if self.upsampler is None else (count // 2 + 3) * low.row_bytes + (count + 4) * x.row_bytes
            )

        if self.upsampler is not None and keeps_upsampled:
            # A band is stored with the rows beyond it that its convolution made.
            kept = x.nbytes + -(-x.height // rows) * 4 * x.row_bytes
            peaks.append(max(stored, kept) + held + upsampled(rows))
            stored, held = kept, (rows + 4) * x.row_bytes
        lazy = self.upsampler is not None and not keeps_upsampled
        buffer = max((rows + (2 if keeps_hidden else 4)) * x.row_bytes, (rows + 2) * y.row_bytes)
        results = rows * y.row_bytes * (2 if block.conv_shortcut is not None else 1)
        if keeps_hidden:
            first = (upsampled(rows + 2) if lazy else 0) + buffer
            peaks.append(stored + y.nbytes + first)
            second = (upsampled(rows) if lazy else 0) + buffer + results
            peaks.append(max(stored + y.nbytes, y.nbytes) + held + rows * y.row_bytes + second)
        else:
            hidden = (rows + 2) * y.row_bytes
            second = (upsampled(rows + 4) if lazy else 0) + buffer + max(hidden, results)
            peaks.append(max(stored, y.nbytes) + held + second)
        copies = _copies(block.conv1, block.conv2, block.conv_shortcut, upsampler=self.upsampler)
        return max(peaks) + copies + _scratch(2 * max(x.channels, y.channels), rows, x.width)

    def run(self, source: Bands, choice: Choice) -> Bands:
        rows, x = choice.rows, self._input(source, choice)
        block, height, buffer = self.block, self.input.height, Buffer()
        moments1 = _sweep(block.norm1, x, rows)

        def hidden(pieces: list[Tensor], top: int, first: int, last: int) -> Tensor:
            """Rows of conv1's result, from rows of x of which the first is `top`."""
            read = window(height, first, last)
            pieces = Bands(*pieces).rows(read.first - top, read.last - top)
            return convolved(block.conv1, normalized(block.norm1, moments1, pieces, buffer, "silu"), read)

        kept, moments2 = Bands(), None
        for first, last in spans(height, rows):
            read = window(height, first, last)
            h = hidden(x.rows(read.first, read.last), read.first, first, last)
            found = ops.group_norm_moments(h, block.norm2.num_groups)
            moments2 = found if moments2 is None else moments2.merged(found)
            if choice.keeps_hidden:
                kept.append(h)
            del h
        assert moments2 is not None

        y = Bands()
        for first, last in spans(height, rows):
            read = window(height, first, last)
            if choice.keeps_hidden:
                pieces, top = x.rows(first, last), first
                n = normalized(block.norm2, moments2, kept.rows(read.first, read.last), buffer, "silu")
            else:
                top = max(read.first - 1, 0)
                pieces = x.rows(top, min(read.last + 1, height))
                h = hidden(pieces, top, read.first, read.last)
                n = normalized(block.norm2, moments2, [h], buffer, "silu")
                del h
            y.append(self._added(part(pieces, top, first, last), n, read))
            del pieces
            x.release(max(0, last - 2))
            kept.release(max(0, last - 1))
        return y

    def _input(self, source: Bands, choice: Choice) -> Source:
        """What the block reads."""
        if self.upsampler is None:
            return source
        upsampled = Upsampled(source, self.upsampler)
        if not choice.keeps_upsampled:
            return upsampled
        kept = Bands()
        for first, last in spans(self.input.height, choice.rows):
            kept.append(upsampled.rows(first, last)[0])
            upsampled.release(last)
        return kept

    def _added(self, x: Tensor, n: Tensor, read: Window) -> Tensor:
        """conv2(n) + x, or + conv_shortcut(x)."""
        shortcut = self.block.conv_shortcut
        if shortcut is not None:
            x = convolved(shortcut, x, Window(0, 0, 0, 0), (0, 0))
        return convolved(self.block.conv2, n, read, residual=x)


class AttentionStage:
    """Self-attention among the pixels: keys and values of all, queries a band at a time."""

    def __init__(self, attention: Any, size: Size) -> None:
        self.attention, self.source, self.result = attention, size, size
        self.weights: list[Tensor] = []  # of convolutions: the others are read in place

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x = self.source
        # Keys, values, and both as the kernel multiplies them, in fp32 at most.
        tokens = 2 * x.nbytes + 2 * x.nbytes * max(1, 4 // x.itemsize)
        for rows in _row_counts(x):
            work = (source_rows + 5 * rows) * x.row_bytes
            # Every call copies keys and values anew.
            call = _BAND_COST + 64 * x.channels * x.height * x.width
            cost = 4 * x.channels**2 * x.height * x.width + call * x.height / rows
            yield Choice(rows, cost, x.nbytes + tokens + work)

    def run(self, source: Bands, choice: Choice) -> Bands:
        a, size, buffer = self.attention, self.source, Buffer()
        moments = _sweep(a.group_norm, source, choice.rows)

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
        self.weights = _weights(conv)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        x, y = self.source, self.result
        for rows in _row_counts(x):
            # Padded once more where torch serves.
            work = (source_rows + 2 * (rows + 2)) * x.row_bytes + 2 * rows * y.row_bytes
            cost = self.conv.weight.numel() * x.height * x.width + _BAND_COST * x.height / rows
            work += _copies(self.conv) + _scratch(x.channels + y.channels, rows, x.width)
            yield Choice(rows, cost, x.nbytes + y.nbytes + work)

    def run(self, source: Bands, choice: Choice) -> Bands:
        moments, buffer = _sweep(self.norm, source, choice.rows), Buffer()
        like = source.rows(0, 1)[0]
        y = torch.empty((1, *self.result[:3]), dtype=like.dtype, device=like.device)
        del like
        for first, last in spans(self.source.height, choice.rows):
            read = window(self.source.height, first, last)
            n = normalized(self.norm, moments, source.rows(read.first, read.last), buffer, "silu")
            y[:, :, first:last] = convolved(self.conv, n, read)
            source.release(max(0, last - 1))
        return Bands(y)
