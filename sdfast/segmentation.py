"""Segmentation of pictures of any size by the U-Net of 2015, tile by tile (section 4 of the report).

Overlap-tile strategy (Ronneberger et al. 2015, fig. 2): each tile of the result needs a margin of the picture
around it, which overlaps its neighbours' and is mirrored where the picture ends. Tiles lie on the grid that
the network's pooling fixes, so all of them together are what one pass over the whole picture would give, up
to rounding. The picture may be a memory-mapped file: what is held is one tile's.
"""

from __future__ import annotations

import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdfast.images import read_image
from sdfast.models import SegmentationUNet, SegmentationUNetConfig

_MODES = {1: "L", 3: "RGB"}
_STATISTICS_PIXELS = 2**20  # of a band, for mean and standard deviation
# Bytes a pixel of a tile's input for each channel of full resolution, and for the rest. Measured: 5 maps (the
# skip, the up-convolution's result, both concatenated, the next result) and a little.
_BYTES_PER_CHANNEL = 4 * 6
_BYTES_PER_PIXEL = 64
_LARGEST_TILE = 600  # larger ones leave the caches, which costs what they save in margins


def open_picture(path: str | pathlib.Path, channels: int) -> np.ndarray:
    """A picture from a file, as `predict` takes it.

    Args:
        path: .npy, which is mapped into memory rather than read, or whatever Pillow reads.
        channels: 1 makes a coloured picture grey, 3 repeats a grey one. An .npy file is left as it is.

    Returns:
        (H, W), or (H, W, 3) for 3 channels.

    Raises:
        OSError: no such file, or none that can be read.
    """
    if pathlib.Path(path).suffix.lower() == ".npy":
        return open_array(path)
    with warnings.catch_warnings():
        # Large pictures are what this is for; beyond twice the limit Pillow refuses, and .npy serves.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture = read_image(path)
    if picture.mode.startswith(("I", "F")):  # more than 8 bits of grey, which Pillow would cut off
        grey = np.asarray(picture)
        return grey if channels == 1 else np.repeat(grey[:, :, None], channels, axis=2)
    return np.asarray(picture.convert(_MODES[channels]))


def open_array(path: str | pathlib.Path) -> np.ndarray:
    """The array in an .npy file, mapped into memory and not to be written to.

    Raises:
        OSError: no such file, or none that can be mapped.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # what NumPy says of damaged files
        raise OSError(f"{path}: cannot be mapped into memory: {error}") from error


def check_picture(name: str, picture: np.ndarray, channels: int) -> np.ndarray:
    """The picture as (H, W, channels), a view.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: another shape, or no pixels.
    """
    if not isinstance(picture, np.ndarray) or picture.dtype.kind not in "uifb":
        got = getattr(picture, "dtype", type(picture).__name__)
        raise TypeError(f"{name}: got {got}, expected an array of whole or floating-point numbers")
    shape = picture.shape
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim != 3 or picture.shape[2] != channels or 0 in picture.shape:
        expected = "(H, W)" if channels == 1 else f"(H, W, {channels})"
        raise ValueError(f"{name}: got shape {shape}, expected {expected} with at least one pixel")
    return picture


def statistics(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, which networks see pictures relative to.

    So it makes no difference how many bits a picture has or how long it was exposed.

    Args:
        picture: (H, W, C) of any real dtype; read once, in bands.

    Returns:
        mean (C,) and std (C,) float32; 1 for the std of a channel that is constant.

    Raises:
        ValueError: it holds values that are not finite.
    """
    rows = max(1, _STATISTICS_PIXELS // picture.shape[1])
    count, mean, squares = 0, np.zeros(picture.shape[2]), np.zeros(picture.shape[2])
    for top in range(0, len(picture), rows):
        # Chan, Golub & LeVeque 1983: bands are combined without cancellation.
        band = np.asarray(picture[top : top + rows], dtype=np.float64).reshape(-1, picture.shape[2])
        total = count + len(band)
        with np.errstate(invalid="ignore"):  # refused below
            band_mean = band.mean(axis=0)
            delta = band_mean - mean
            squares += np.square(band - band_mean).sum(axis=0) + delta**2 * count * len(band) / total
            mean += delta * len(band) / total
        count = total
    if not np.isfinite(squares).all():
        raise ValueError("the picture holds values that are not finite")
    std = np.sqrt(squares / count)
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def mirrored(first: int, count: int, length: int) -> np.ndarray:
    """The indices that stand for first, first + 1, ... in an axis mirrored at its ends, as often as need be.

    The outermost pixel is not repeated, as in `numpy.pad(mode="reflect")`.
    """
    period = max(1, 2 * (length - 1))
    index = np.arange(first, first + count) % period
    return np.minimum(index, period - index) if length > 1 else np.zeros(count, dtype=np.int64)


def window(picture: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A copy of a part of (H, W, C) that may reach over its borders, where it is mirrored."""
    rows = mirrored(top, height, picture.shape[0])
    columns = mirrored(left, width, picture.shape[1])
    # A slice first: of a memory-mapped file, only what is needed is read, in order.
    part = np.asarray(picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return part[(rows - rows.min())[:, None], columns - columns.min()]


def default_tile(config: SegmentationUNetConfig, memory_bytes: int) -> int:
    """The side of the largest tile of the result that fits the memory.

    Raises:
        ValueError: not even the smallest does.
    """
    least = least_memory_bytes(config)
    if memory_bytes < least:
        raise ValueError(f"memory_bytes: got {memory_bytes}, expected at least {least} for the smallest tile")
    side = int((memory_bytes / _bytes_per_pixel(config)) ** 0.5) - 2 * config.margin
    side = min(side, max(_LARGEST_TILE, config.smallest_tile))
    above = config.output_at_least(side)
    return above if above == side else above - config.multiple


def least_memory_bytes(config: SegmentationUNetConfig) -> int:
    """What the smallest tile takes."""
    return _bytes_per_pixel(config) * (config.smallest_tile + 2 * config.margin) ** 2


def _bytes_per_pixel(config: SegmentationUNetConfig) -> int:
    return _BYTES_PER_CHANNEL * config.width + _BYTES_PER_PIXEL


def predict(
    model: SegmentationUNet,
    picture: np.ndarray,
    *,
    out: np.ndarray | None = None,
    probabilities: bool = False,
    tile: int | None = None,
    memory_bytes: int = 10**9,
    progress: bool = False,
    first_tile: int = 0,
    on_tile: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The class of every pixel, or the probability of every class.

    Args:
        model: in eval mode, on any device.
        picture: (H, W) or (H, W, C) with the model's channels, of any size and real dtype; a
            `numpy.memmap` is read as it is needed.
        out: where to write, of the returned shape and dtype; a `numpy.memmap` keeps memory bounded for
            results of any size. Made if None.
        probabilities: the softmax of the scores instead of the highest one's class.
        tile: side of a tile of the result; None takes the largest for which `memory_bytes` suffice.
        memory_bytes: what a tile may take beside the weights, `picture` and `out`.
        progress: show a bar over the tiles.
        first_tile: how many tiles `out` already holds, of a call that was stopped.
        on_tile: is told after each tile how many are done.

    Returns:
        (H, W) uint8, or with `probabilities` (out_channels, H, W) float32: `out` if given.

    Raises:
        TypeError, ValueError: an argument of a wrong shape, dtype or value; a tile that the network cannot
            make is refused with the nearest that it can.
    """
    config = model.config
    picture, tile = check_prediction(model, picture, tile, memory_bytes)
    height, width = picture.shape[:2]
    expected: tuple[int, ...] = (config.out_channels, height, width) if probabilities else (height, width)
    dtype = np.dtype(np.float32 if probabilities else np.uint8)
    if out is None:
        out = np.empty(expected, dtype)
    elif out.shape != expected or out.dtype != dtype:
        raise ValueError(f"out: got {out.dtype} of shape {out.shape}, expected {dtype} of shape {expected}")
    mean, std = statistics(picture)
    tiles = list(_tiles(config, height, width, tile))
    bar = tqdm(
        tiles[first_tile:], "segmenting", len(tiles), initial=first_tile, unit="tile", disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 20.0,  # in a log file every refresh is a line
    )  # fmt: skip
    for done, (top, left, rows, columns) in enumerate(bar, start=first_tile + 1):
        margin = config.margin
        part = window(picture, top - margin, left - margin, rows + 2 * margin, columns + 2 * margin)
        scores = _scores(model, (part.astype(np.float32) - mean) / std)
        scores = scores[:, : height - top, : width - left]
        result = scores.float().softmax(dim=0) if probabilities else scores.argmax(dim=0).to(torch.uint8)
        bottom, right = top + result.shape[-2], left + result.shape[-1]
        out[..., top:bottom, left:right] = result.cpu().numpy()
        if on_tile is not None:
            on_tile(done)
    return out


def check_prediction(
    model: SegmentationUNet, picture: np.ndarray, tile: int | None, memory_bytes: int
) -> tuple[np.ndarray, int]:
    """The picture as (H, W, C), a view, and the side of a tile, of the arguments of `predict`.

    Raises:
        TypeError, ValueError: as in `predict`.
    """
    picture = check_picture("picture", picture, model.config.in_channels)
    if tile is None:
        tile = default_tile(model.config, memory_bytes)
    try:
        model.config.check_tile(tile)
    except ValueError as error:
        raise ValueError(f"tile: {error}") from None
    if model.training:
        raise ValueError("model: is in training mode; call model.eval() first")
    return picture, tile


def _tiles(
    config: SegmentationUNetConfig, height: int, width: int, tile: int
) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of results that cover the picture; the last ones reach over its end.

    Tiles begin at multiples of what becomes one pixel at the bottom, lest pooling pair other pixels than in
    one pass over the whole. Their sides are none such (388 = 24 * 16 + 4), so they overlap by a few pixels.
    """
    overlap = tile % config.multiple
    step = tile - overlap
    for top in range(0, max(1, height - overlap), step):
        rows = min(tile, config.output_at_least(height - top))
        for left in range(0, max(1, width - overlap), step):
            yield top, left, rows, min(tile, config.output_at_least(width - left))


@torch.inference_mode()
def _scores(model: SegmentationUNet, part: np.ndarray) -> Tensor:
    """(H, W, C) float32 -> (classes, H', W')."""
    weight: Any = model.conv_out.weight
    x = torch.from_numpy(part).permute(2, 0, 1)[None]
    return model(x.to(weight.device, weight.dtype))[0]
