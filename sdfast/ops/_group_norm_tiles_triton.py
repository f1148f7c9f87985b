"""What group_norm's Triton kernels share: where tiles lie, channels of a program, sums over their groups.

Channels are summed over pixels first, then to groups, which need not align with the lanes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What images and batches decide: one kernel for all of it. Addresses lose nothing by that: channels last,
# what divides the channels aligns every pixel; channels first, a kernel is given the pixels once more,
# as `channel_stride`, whose divisibility it may know.
SIZES = [
    "pixels", "groups", "scale_row", "shift_row",
    "images", "spans", "chunks", "chunk_pixels", "blocks", "steps",
]  # fmt: skip


@triton.jit
def tile_of(x, n, first, row, channel, pixels, channels, LAST: tl.constexpr):
    """Pointers to pixels first + row, (P, 1), of image n, at channel, (1, C); x: (N, pixels, channels).

    What is large is added to the pointer; channels last, what differs inside a tile is kept in 32 bits.
    """
    if LAST:
        return x + (n * pixels + first) * channels + (row * channels + channel)
    return x + (n * channels * pixels + first) + (channel.to(tl.int64) * pixels + row)


@triton.jit
def affine(weight, bias, scale, shift, n, channel, inside, scale_row, shift_row):
    """What x̂ is multiplied by and what is added, for each channel."""
    factor = tl.zeros_like(channel).to(tl.float32) + 1.0
    offset = factor - 1.0
    if weight is not None:
        factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        s = 1.0 + tl.load(scale + n * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
        factor *= s
        offset *= s
    if shift is not None:
        offset += tl.load(shift + n * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
    return factor, offset


@triton.jit
def span_channels(
    span, group_channels, channels, SPAN: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A span's first group, its channels, which of them there are, and the group of each among the span's."""
    local = tl.arange(0, BLOCK_C)
    if PARTS == 1:
        first_group = span * (SPAN // group_channels)
        channel = span * SPAN + local
        inside = (local < SPAN) & (channel < channels)
    else:
        first_group = span // PARTS
        local += span % PARTS * SPAN
        channel = first_group * group_channels + local
        inside = local < group_channels
    return first_group, channel, inside, local // group_channels


@triton.jit
def to_groups(values, member):
    """(C,) -> (G,): the sum over each group's channels."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def to_channels(values, member):
    """(G,) -> (C,): each group's value at its channels."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def rstd_of(squares, elements, eps):
    """1 / √(squares / elements + eps), rounded well: it is a factor of every result."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, elements) + eps))


@triton.jit
def load_tile(
    x, skip, n, first, row, channel, inside, pixels, channels, skip_channels, LAST: tl.constexpr
):  # fmt: skip
    """A tile of the one source, or of the two, whose channels follow each other, in fp32."""
    at = tile_of(x, n, first, row, channel, pixels, channels, LAST)
    if skip is None:
        value = tl.load(at, mask=inside, other=0.0)
    else:
        # A thread does one of two loads, each of whole vectors; a choice of pointers would halve these.
        of_x = channel < channels
        value = tl.load(at, mask=inside & of_x, other=0.0)
        at = tile_of(skip, n, first, row, channel - channels, pixels, skip_channels, LAST)
        other = tl.load(at, mask=inside & (channel >= channels), other=0.0)
        value = tl.where(of_x, value, other)
    return value.to(tl.float32)


@triton.jit
def store_tile(
    y, z, n, first, row, channel, inside, pixels, channels, SILU: tl.constexpr, LAST: tl.constexpr
):
    """act(z)."""
    if SILU:
        z = z * tl.sigmoid(z)
    at = tile_of(y, n, first, row, channel, pixels, channels, LAST)
    tl.store(at, z.to(y.dtype.element_ty), mask=inside)
