"""Masks: what of an image is painted anew. That is white; in the alpha of the image itself, transparent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdfast.images import as_tensor, eight_bit

Images = Image.Image | Tensor | Sequence[Image.Image]


def images_and_masks(
    image: Images,
    mask: Images | None,
    *,
    height: int | None,
    width: int | None,
    channels: int,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """Images and their masks as tensors of one size.

    Args:
        image, height, width, channels, multiple: as for `sdfast.images.as_tensor`.
        mask: one for all images or one for each, of the images' own size: pictures of any mode, or a tensor
            (P or 1, 1, H, W) in [0, 1]. White, 1, is painted, black is known. None: the images' alpha
            channel, where transparent is painted. Resized as the images are.

    Returns:
        (P, channels, height, width) in [-1, 1] and (P or 1, 1, height, width) in [0, 1], float32.

    Raises:
        TypeError, ValueError: not images, of different sizes, or a mask without anything to paint.
    """
    if mask is None:
        image, mask = _split_alpha(image)
    images = as_tensor(image, height=height, width=width, channels=channels, multiple=multiple)
    _check_sizes(_sizes(image), _sizes(mask))
    size = images.shape[2:]
    if isinstance(mask, Tensor):
        masks = as_tensor(mask, height=None, width=None, channels=1, multiple=1, name="mask")
        masks = torch.nn.functional.interpolate(masks, size=size)
    else:
        pictures = [mask] if isinstance(mask, Image.Image) else list(mask)
        grey = [eight_bit(one).convert("L") for one in pictures]
        masks = as_tensor(grey, height=size[0], width=size[1], channels=1, multiple=1, name="mask")
    masks = masks / 2 + 0.5
    if len(masks) not in (1, len(images)):
        raise ValueError(
            f"mask: got {len(masks)} masks for {len(images)} images, expected 1 or {len(images)}"
        )
    if (masks.amax(dim=(1, 2, 3)) < 0.5).any():
        raise ValueError(
            "mask: has nothing to paint; white is painted, or in an image's alpha what is transparent"
        )
    return images, masks


def _split_alpha(image: Images) -> tuple[list[Image.Image], list[Image.Image]]:
    """Opaque pictures, white where nothing is seen of them, and the masks that their alpha makes."""
    images = [] if isinstance(image, Tensor) else [image] if isinstance(image, Image.Image) else list(image)
    if not images or not all(isinstance(one, Image.Image) and one.has_transparency_data for one in images):
        raise ValueError(
            "mask: got None, and the image has no alpha channel; give a mask, in which white is painted, or"
            " an image that is transparent where it is to be painted"
        )
    opaque, masks = [], []
    for one in images:
        values = np.asarray(one.convert("RGBA"))  # (H, W, 4)
        colours, alpha = values[..., :3].copy(), values[..., 3]
        colours[alpha == 0] = 255
        opaque.append(Image.fromarray(colours))
        masks.append(Image.fromarray(255 - alpha))
    return opaque, masks


def _sizes(image: Images) -> list[tuple[int, int]]:
    """Width and height of each, or of all where it is one tensor."""
    if isinstance(image, Tensor):
        return [(image.shape[-1], image.shape[-2])] if image.dim() >= 2 else []
    images = [image] if isinstance(image, Image.Image) else list(image)
    if not all(isinstance(one, Image.Image) for one in images):
        raise TypeError("mask: expected a PIL image, a list of them, or a tensor (P, 1, H, W)")
    return [one.size for one in images]


def _check_sizes(images: list[tuple[int, int]], masks: list[tuple[int, int]]) -> None:
    """Raise ValueError unless each mask has its image's size."""
    if not masks:
        raise ValueError("mask: got none, expected a PIL image, a list of them, or a tensor (P, 1, H, W)")
    pairs = (
        zip(images, masks, strict=True)
        if len(images) == len(masks)
        else ((i, m) for i in images for m in masks)
    )
    for size, mask_size in pairs:
        if size != mask_size:
            raise ValueError(
                f"mask: is {mask_size[0]}x{mask_size[1]} (width x height), the image {size[0]}x{size[1]};"
                " make them one size"
            )


def latent_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Which latents to paint, (P, 1, h, w), bool: whose first pixel is half white or more, as in diffusers.

    Args:
        masks: (P, 1, H, W) in [0, 1].
        size: h and w.
    """
    return torch.nn.functional.interpolate((masks >= 0.5).float(), size=size) > 0
