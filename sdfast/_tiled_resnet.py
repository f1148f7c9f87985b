"""A ResNet block of a VAE on an image in bands, with the upsampler before it where there is one.

    u = x, or conv(nearest-2x of x)
    h = conv1(silu(norm1(u)))
    y = u + conv2(silu(norm2(h))), or conv_shortcut(u) + ...

Only GroupNorm looks at the whole image, and needs of it no more than its moments. So u and h are gone over
band by band to find them, and what was computed on the way is kept, or computed again: h is then made twice,
u three times. With neither kept there is one image in memory, x turning into y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    normalized,
    part,
    spans,
    window,
)
from sdfast._tiled_stages import BAND_COST, Choice, copies_bytes, row_counts, scratch_bytes, sweep, weights_of


class ResnetStage:
    """A ResNet block, and the upsampler before it where there is one."""

    def __init__(self, block: Any, source: Size, upsampler: nn.Conv2d | None = None) -> None:
        self.block, self.source, self.upsampler = block, source, upsampler
        scale = 1 if upsampler is None else 2
        self.input = Size(
            block.conv1.in_channels, scale * source.height, scale * source.width, source.itemsize
        )
        self.result = self.input._replace(channels=block.conv2.out_channels)
        self.weights = weights_of(block.conv1, block.conv2, block.conv_shortcut, upsampler)

    def choices(self, source_rows: int) -> Iterator[Choice]:
        for rows in row_counts(self.input):
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
        return total * x.height * x.width + BAND_COST * x.height / rows

    def _peak(self, rows: int, source_rows: int, keeps_hidden: bool, keeps_upsampled: bool) -> int:
        low, x, y, block = self.source, self.input, self.result, self.block
        stored, held, peaks = low.nbytes, source_rows * low.row_bytes, []

        def upsampled(count: int) -> int:
            """With the rows that they are made of, joined."""
            return (count // 2 + 3) * low.row_bytes + (count + 4) * x.row_bytes

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
        copies = copies_bytes(block.conv1, block.conv2, block.conv_shortcut, upsampler=self.upsampler)
        return max(peaks) + copies + scratch_bytes(2 * max(x.channels, y.channels), rows, x.width)

    def run(self, source: Bands, choice: Choice) -> Bands:
        rows, x = choice.rows, self._input(source, choice)
        block, height, buffer = self.block, self.input.height, Buffer()
        moments1 = sweep(block.norm1, x, rows)

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
