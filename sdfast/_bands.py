"""An image in horizontal bands: layers read some rows at a time and give back what they need no more.

One image, (1, C, H, W), channels last. Nothing here holds more than the bands that are there and the rows
that were asked for; a band is freed when no row of it is needed, its last rows being copied where few are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from sdfast import ops


class Size(NamedTuple):
    """Of an image: channels, rows, columns, and bytes of an element."""

    channels: int
    height: int
    width: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        return self.channels * self.width * self.itemsize

    @property
    def nbytes(self) -> int:
        return self.height * self.row_bytes


class Source(Protocol):
    """Something whose rows can be read."""

    height: int

    def rows(self, first: int, last: int) -> list[Tensor]:
        """Rows [first, last) as (1, C, h, W) pieces, from the top."""

    def release(self, before: int) -> None:
        """No row above this one will be asked for again."""


class Bands:
    """The bands that were appended and not released.

    Attributes:
        height: rows appended so far.
    """

    def __init__(self, *bands: Tensor) -> None:
        self.height = 0
        self._bands: list[tuple[int, Tensor]] = []  # first row and rows
        for band in bands:
            self.append(band)

    def append(self, band: Tensor) -> None:
        """Add rows below the last. The band is the caller's no more."""
        self._bands.append((self.height, band))
        self.height += band.shape[2]

    def rows(self, first: int, last: int) -> list[Tensor]:
        pieces = []
        for top, band in self._bands:
            begin, end = max(first, top), min(last, top + band.shape[2])
            if begin < end:
                pieces.append(band[:, :, begin - top : end - top])
        return pieces

    def release(self, before: int) -> None:
        kept = []
        for top, band in self._bands:
            below = top + band.shape[2] - before
            if 0 < below <= band.shape[2] // 4:
                top, band = before, band[:, :, -below:].clone()
            if below > 0:
                kept.append((top, band))
        self._bands = kept


class Upsampled:
    """The rows of conv(nearest-2x of low), computed whenever they are asked for."""

    def __init__(self, low: Bands, conv: nn.Conv2d) -> None:
        self.low, self.conv = low, conv
        self.height = 2 * low.height

    def rows(self, first: int, last: int) -> list[Tensor]:
        # A row of the result reads those beside it before the convolution: one more row of `low` at each end,
        # whose own outermost results are wrong and left out.
        begin, end = max(0, (first - 1) // 2), min(self.low.height, last // 2 + 1)
        x = joined(self.low.rows(begin, end))
        y = ops.conv2d(x, self.conv.weight, self.conv.bias, padding=1, upsample=True)
        return [by_pixel(cast(Tensor, y)[:, :, first - 2 * begin : last - 2 * begin])]

    def release(self, before: int) -> None:
        self.low.release(max(0, (before - 1) // 2))


class Buffer:
    """Memory for one band at a time, kept from one to the next: new pages would have to be zeroed."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def band(self, channels: int, height: int, width: int, like: Tensor) -> Tensor:
        """(1, channels, height, width), channels last, uninitialised; the band before it is lost."""
        count = channels * height * width
        if self._memory is None or self._memory.numel() < count:
            self._memory = None  # before the larger one is there
            self._memory = like.new_empty(count)
        return self._memory[:count].view(1, height, width, channels).permute(0, 3, 1, 2)


def by_pixel(x: Tensor) -> Tensor:
    """x channels last; itself where it is so already."""
    return x.contiguous(memory_format=torch.channels_last)


def joined(pieces: list[Tensor]) -> Tensor:
    """Pieces from the top as one tensor; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def part(pieces: list[Tensor], top: int, first: int, last: int) -> Tensor:
    """Rows [first, last) of pieces whose first row is `top`."""
    return joined(Bands(*pieces).rows(first - top, last - top))


def spans(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """The first row and the one after the last of every band of so many rows."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def normalized(
    norm: nn.GroupNorm, moments: ops.Moments, pieces: list[Tensor], buffer: Buffer, activation: str | None
) -> Tensor:
    """GroupNorm of the pieces, as one band in the buffer."""
    _, channels, _, width = pieces[0].shape
    out = buffer.band(channels, sum(piece.shape[2] for piece in pieces), width, pieces[0])
    top = 0
    for piece in pieces:
        ops.group_norm_apply(
            piece, moments, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=activation,
            out=out[:, :, top : top + piece.shape[2]],
        )  # fmt: skip
        top += piece.shape[2]
    return out


class Window(NamedTuple):
    """The rows of its input that a convolution reads for some rows of its result, and the zeros beyond.

    Attributes:
        first, last: [first, last), all of them in the image.
        above, below: rows of zeros to add.
    """

    first: int
    last: int
    above: int
    below: int


def window(height: int, first: int, last: int, *, kernel: int = 3, stride: int = 1, above: int = 1) -> Window:
    """What rows [first, last) of the result read of an image of this height, padded with `above` rows."""
    begin, end = first * stride - above, (last - 1) * stride - above + kernel
    return Window(max(begin, 0), min(end, height), max(-begin, 0), max(end - height, 0))


def convolved(
    conv: nn.Conv2d,
    x: Tensor,
    rows: Window,
    sides: tuple[int, int] = (1, 1),
    residual: Tensor | None = None,
) -> Tensor:
    """The rows of conv's result that read exactly x, which holds `rows`; channels last."""
    padding = (*sides, rows.above, rows.below)
    y = ops.conv2d(x, conv.weight, conv.bias, conv.stride[0], padding, residual=residual)
    return by_pixel(cast(Tensor, y))
