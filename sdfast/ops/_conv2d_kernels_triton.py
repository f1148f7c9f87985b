"""The kernels of conv2d_triton.py, which says what they compute and how."""

from __future__ import annotations

import triton
import triton.language as tl

from sdfast.ops._conv2d_statistics_triton import store_tile_statistics


@triton.jit
def _normalised(
    tile, c, image, mean_at, rstd_at, norm_weight, norm_bias, groups, size, inside, SILU: tl.constexpr
):
    """silu?(GroupNorm) of a tile of x, at channels `c`; zero where there is no pixel or no channel.

    A 1x1 kernel loads a pixel once for each block of y's channels. A 3x3 one would load it nine times and
    evaluate SiLU as often, which takes longer than the pass of group_norm that it would save.
    """
    group = image * groups + c // size
    has_channel = c < groups * size
    mean = tl.load(mean_at + group, mask=has_channel, other=0.0)
    scale = tl.load(rstd_at + group, mask=has_channel, other=0.0)
    scale *= tl.load(norm_weight + c, mask=has_channel, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c, mask=has_channel, other=0.0).to(tl.float32)
    h = (tile.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        h = h * tl.sigmoid(h)
    return tl.where(inside, h, 0.0).to(tile.dtype)


@triton.jit
def _accumulate(
    h, x, channels, w, first, last, image, iy, ix, column, height, width, out_channels,
    step_y, step_x, taps_x, w_o, w_c, w_row, w_column,
    mean_at, rstd_at, norm_weight, norm_bias, groups, size, first_channel,
    SILU: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h + the products of the steps [first, last) along the K of one source, from its channel 0 on.

    Args:
        image: which, as int64; iy, ix: (rows,), the pixel that meets the kernel's first position.
        first_channel: of this source among those that the norm counts.
    """
    k = tl.arange(0, BLOCK_K)
    x_at = x + ((image * height + iy) * width + ix)[:, None] * channels + k[None, :]
    w_at = w + k[:, None].to(tl.int64) * w_c + column * w_o
    w_inside = column < out_channels
    blocks = tl.cdiv(channels, BLOCK_K)
    c = first % blocks * BLOCK_K
    i = first // blocks // taps_x
    j = first // blocks % taps_x
    for _ in range(first, last):
        y_in = iy + i * step_y
        x_in = ix + j * step_x
        x_inside = ((y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width))[:, None]
        b_inside = w_inside
        if not EVEN:
            x_inside = x_inside & (k < channels - c)[None, :]
            b_inside = w_inside & (k < channels - c)[:, None]
        c_wide = c.to(tl.int64)
        pixel = (i * step_y).to(tl.int64) * width + j * step_x
        tile = tl.load(x_at + (pixel * channels + c_wide), mask=x_inside, other=0.0)
        if mean_at is not None:
            tile = _normalised(
                tile, first_channel + c + k, image, mean_at, rstd_at, norm_weight, norm_bias, groups, size,
                x_inside, SILU,
            )  # fmt: skip
        w_offset = i.to(tl.int64) * w_row + j.to(tl.int64) * w_column + c_wide * w_c
        b = tl.load(w_at + w_offset, mask=b_inside, other=0.0)
        h = tl.dot(tile, b, h, input_precision=PRECISION)
        # Carried along: divisions by numbers that are no constants would cost as much as a small product.
        c += BLOCK_K
        next_tap = c >= channels
        c = tl.where(next_tap, 0, c)
        j = tl.where(next_tap, j + 1, j)
        next_row = j >= taps_x
        j = tl.where(next_row, 0, j)
        i = tl.where(next_row, i + 1, i)
    return h


@triton.jit
def _store(
    h, y, bias, time_embedding, residual, statistics, image, row, column, pixels, out_channels, place,
    tile, tiles,
):  # fmt: skip
    """h + bias + time_embedding + residual, rounded once, to y, and the statistics of what was rounded.

    Args:
        row, column: (rows, 1), of the pixels of one phase of one image, and (1, columns).
        place: (rows, 1), the pixel's place in y and residual.
        tile: which of `tiles` of this image.
    """
    row_inside = row < pixels
    column_inside = column < out_channels
    inside = row_inside & column_inside
    at = place * out_channels + column
    if bias is not None:
        h += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)
    if time_embedding is not None:
        time_at = time_embedding + image * out_channels + column
        h += tl.load(time_at, mask=column_inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    rounded = h.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside)
    if statistics is not None:
        count = tl.sum(row_inside.to(tl.float32))
        tile_at = statistics + (image * tiles + tile) * 3 * out_channels
        store_tile_statistics(
            rounded.to(tl.float32), count, row_inside, tile_at, out_channels, column, column_inside
        )


@triton.jit
def _place(image, row, out_width, height, width, stride_y, stride_x, start_y, start_x):
    """Where the pixels `row` of the computed grid lie in y, whose images are height x width."""
    oy = row // out_width * stride_y + start_y
    ox = row % out_width * stride_x + start_x
    return (image * height + oy) * width + ox


# A kernel for every image, whatever divides its size.
_SIZES = [
    "height", "width", "out_width", "pixels", "y_height", "y_width", "images", "tiles", "steps", "steps_x",
    "steps_all", "start_y", "place_y", "start_x", "place_x", "splits",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def convolution_kernel(
    x,  # (N, height, width, channels)
    skip,  # (N, height, width, skip_channels), or None
    w,  # strides w_phase, w_o, w_c, w_row, w_column
    bias, time_embedding, residual,  # (out_channels,), (N, out_channels), as y; or None
    statistics,  # (N, tiles, 3, out_channels), or None
    y,  # (N, y_height, y_width, out_channels), or where K is split (splits, phases, N, pixels, out_channels)
    mean_at, rstd_at, norm_weight, norm_bias,  # (N, groups) and (groups * size,), or None
    channels, skip_channels, out_channels, groups, size,
    height, width, out_width, pixels, y_height, y_width, images, phases, tiles, steps, steps_x, steps_all,
    stride_y, start_y, step_y, place_stride_y, place_y, stride_x, start_x, step_x, place_stride_x, place_x,
    taps_x, w_phase, w_o, w_c, w_row, w_column,
    SPLIT: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of all images, phases and channels; splits).

    `pixels` are those of one phase of one image, in rows of out_width, `tiles` the blocks of them. Phase
    2 a + b begins a rows and b columns further, in x as in y, and has its own kernel in w. Each split takes
    `steps` of `steps_all`, the first `steps_x` of which are those of x.
    """
    program = tl.program_id(0)
    phase = program % phases
    program = program // phases
    rows = images * tiles
    columns = tl.cdiv(out_channels, BLOCK_N)
    first_row = program // (GROUP * columns) * GROUP
    group_height = tl.minimum(rows - first_row, GROUP)
    in_group = program % (GROUP * columns)
    block = first_row + in_group % group_height
    image = (block // tiles).to(tl.int64)
    tile = block % tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (in_group // group_height * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]

    down = phase // 2
    right = phase % 2
    iy = row // out_width * stride_y + start_y + down
    iy = tl.where(row < pixels, iy, -1073741824)  # beyond the last pixel all is outside the image
    ix = row % out_width * stride_x + start_x + right
    w += phase.to(tl.int64) * w_phase
    split = tl.program_id(1)
    first = split * steps
    last = tl.minimum(first + steps, steps_all)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = _accumulate(
        h, x, channels, w, first, tl.minimum(last, steps_x),
        image, iy, ix, column, height, width, out_channels, step_y, step_x, taps_x, w_o, w_c, w_row, w_column,
        mean_at, rstd_at, norm_weight, norm_bias, groups, size, 0, SILU, EVEN, PRECISION, BLOCK_K,
    )  # fmt: skip
    if skip is not None:
        h = _accumulate(
            h, skip, skip_channels, w + channels * w_c, tl.maximum(first - steps_x, 0), last - steps_x,
            image, iy, ix, column, height, width, out_channels,
            step_y, step_x, taps_x, w_o, w_c, w_row, w_column,
            mean_at, rstd_at, norm_weight, norm_bias, groups, size, channels, SILU, EVEN, PRECISION, BLOCK_K,
        )  # fmt: skip

    row = row[:, None]
    if SPLIT:
        part = (split.to(tl.int64) * phases + phase) * images + image
        _store(
            h, y, None, None, None, None, image, row, column, pixels, out_channels, part * pixels + row, 0, 1
        )
    else:
        place = _place(
            image, row, out_width, y_height, y_width, place_stride_y, place_stride_x, place_y + down,
            place_x + right,
        )  # fmt: skip
        _store(
            h, y, bias, time_embedding, residual, statistics, image, row, column, pixels, out_channels, place,
            phase * tiles + tile, tiles * phases,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def finish_kernel(
    partials,  # (splits, phases, N, pixels, out_channels), fp32
    bias, time_embedding, residual, statistics, y,  # as those of convolution_kernel
    out_channels, out_width, pixels, y_height, y_width, images, phases, tiles, splits,
    place_stride_y, place_y, place_stride_x, place_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ partials, and what follows it. Grid: (blocks of columns, `tiles` of each phase of each image)."""
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    block = tl.program_id(1)
    tile = block % tiles
    part = (block // tiles).to(tl.int64)  # phase * images + image
    image = part % images
    phase = part // images
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    inside = (row < pixels) & (column < out_channels)
    at = partials + (part * pixels + row) * out_channels + column
    # Out of out_channels, which are known to be a multiple of 16: loads of 16 bytes need that.
    partial_size = images.to(tl.int64) * phases * pixels * out_channels
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, splits):
        h += tl.load(at, mask=inside, other=0.0)
        at += partial_size
    place = _place(
        image, row, out_width, y_height, y_width, place_stride_y, place_stride_x, place_y + phase // 2,
        place_x + phase % 2,
    )  # fmt: skip
    _store(
        h, y, bias, time_embedding, residual, statistics, image, row, column, pixels, out_channels, place,
        phase * tiles + tile, tiles * phases,
    )  # fmt: skip
