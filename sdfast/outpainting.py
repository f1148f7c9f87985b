"""Outpainting: a picture grows on some of its sides, and inpainting fills what is new.

The canvas is the picture, grown, with its borders' pixels repeated into what is new. The model paints every
latent that has a new pixel. Then the picture is put back, fading into what was painted over `feather` pixels
inside of it: what was painted shows there what the VAE makes of the picture itself, so that no seam is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast.inpainting import Canvas
from sdfast.request import check_outpainting


def grown_canvas(
    images: Tensor,
    *,
    left: int,
    right: int,
    top: int,
    bottom: int,
    feather: int,
    keep_original: bool,
    multiple: int,
    downsampling: int,
) -> Canvas:
    """
    Args:
        images: (P, C, H, W) in [-1, 1], of any size.
        left, right, top, bottom: how many pixels to add on each side, at least one of them more than 0.
        feather: over how many pixels the images fade at each side that grows; 0 to less than they have.
        keep_original: whether the images are put back at all.
        multiple: what the canvas' sides have to be multiples of. Where they would not be, the canvas grows
            further, to the right and down, and what was not asked for is cut off the result.
        downsampling: pixels to a latent.

    Returns:
        A canvas of the images' number, with one mask for all.

    Raises:
        TypeError, ValueError: a number is out of its range.
    """
    height, width = images.shape[2:]
    check_outpainting(left, right, top, bottom, feather, height, width)
    size = (top + height + bottom, left + width + right)
    more = [-side % multiple for side in size]
    padding = (left, right + more[1], top, bottom + more[0])
    canvas = torch.nn.functional.pad(images, padding, mode="replicate")
    inside = torch.zeros(1, 1, height, width)
    new = torch.nn.functional.pad(inside, padding, value=1.0)
    cells = torch.nn.functional.max_pool2d(new, downsampling)
    masks = cells.repeat_interleave(downsampling, dim=2).repeat_interleave(downsampling, dim=3)
    weights = None
    if keep_original:
        fading = torch.maximum(
            _fade(height, top, bottom, feather)[:, None], _fade(width, left, right, feather)[None]
        )
        weights = torch.nn.functional.pad(fading[None, None], padding, value=1.0)
    return Canvas(canvas, masks, weights, size if any(more) else None)


def _fade(length: int, before: int, after: int, feather: int) -> Tensor:
    """How much is painted of each pixel along a side, (length,): none, but near an end that grows."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)  # to what is new, in pixels
    fade = torch.zeros(length)
    if before:
        fade = torch.maximum(fade, 1 - distance / (feather + 1))
    if after:
        fade = torch.maximum(fade, 1 - distance.flip(0) / (feather + 1))
    return fade
