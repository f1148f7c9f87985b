"""Between the VAE's tensors, pictures and PNG files that remember how they were made."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdfast.files import replacing
from sdfast.request import check_size

_GRID_BACKGROUND = 255  # white
_MODES = {1: "L", 3: "RGB"}


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of images, rounded as diffusers rounds.

    Args:
        images: (N, C, H, W) in [0, 1], C 1 (grey) or 3 (red, green, blue). NaN becomes black.
    """
    array = (images.float().nan_to_num().permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in array]


def as_tensor(
    image: Image.Image | Tensor | Sequence[Image.Image],
    *,
    height: int | None,
    width: int | None,
    channels: int,
    multiple: int,
    name: str = "image",
) -> Tensor:
    """Images as the VAE reads them.

    Args:
        image: a picture, several (they get one size), or a tensor (P, channels, H, W) in [0, 1].
        height, width: what pictures are resized to, with Lanczos as in diffusers. None: the first one's own,
            cut down to a multiple of `multiple`, with a warning if that changes it.
        channels: 1 or 3; pictures are converted first, what is transparent becoming white.
        name: what errors call it.

    Returns:
        (P, channels, height, width) float32 in [-1, 1].

    Raises:
        TypeError, ValueError: not images, or a tensor of another shape or range.
    """
    if isinstance(image, Tensor):
        return _check_tensor(name, image, height, width, channels)
    images = [image] if isinstance(image, Image.Image) else list(image)
    if not images or not all(isinstance(one, Image.Image) for one in images):
        raise TypeError(f"{name}: expected a PIL image, a list of them, or a tensor (P, C, H, W)")
    own_width, own_height = images[0].size
    size = (
        own_width - own_width % multiple if width is None else width,
        own_height - own_height % multiple if height is None else height,
    )
    if (width is None and size[0] != own_width) or (height is None and size[1] != own_height):
        warnings.warn(f"the {name} is {own_width}x{own_height}; it is resized to {size[0]}x{size[1]}")
    check_size(size[1], size[0], multiple)
    # Converted first: a palette's numbers cannot be averaged, nor colours that nobody sees.
    resized = [
        _opaque(one).convert(_MODES[channels]).resize(size, Image.Resampling.LANCZOS) for one in images
    ]
    array = np.stack(
        [np.asarray(one, dtype=np.float32).reshape(size[1], size[0], channels) for one in resized]
    )
    return torch.from_numpy(2 * (array / 255) - 1).permute(0, 3, 1, 2)


def check_one_size(
    what: str,
    image: Image.Image | Tensor | Sequence[Image.Image],
    height: int | None = None,
    width: int | None = None,
    multiple: int = 1,
) -> None:
    """Raise ValueError, which says that `what` does not allow it, if `as_tensor` would resize a picture."""
    if isinstance(image, Tensor):
        return
    images = [image] if isinstance(image, Image.Image) else list(image)
    sizes = [one.size for one in images if isinstance(one, Image.Image)]
    for size in sizes:
        if (
            size != sizes[0]
            or (width or size[0], height or size[1]) != size
            or any(n % multiple for n in size)
        ):
            others = f", of multiples of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"image: a picture of {size[0]}x{size[1]} would be resized, which {what} does not allow; give"
                f" pictures of one size{others}, and no other height and width"
            )


def eight_bit(image: Image.Image) -> Image.Image:
    """The picture, or its 16 bits of grey, which Pillow would clip at 255, as eight."""
    if not image.mode.startswith("I"):
        return image
    grey = (np.asarray(image) / 257).round().clip(0, 255)  # 65535 becomes 255
    return Image.fromarray(grey.astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """The picture with eight bits a channel, on white."""
    image = eight_bit(image)
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def _check_tensor(name: str, image: Tensor, height: int | None, width: int | None, channels: int) -> Tensor:
    expected = (channels, height or image.shape[-2], width or image.shape[-1])
    if image.dim() != 4 or tuple(image.shape[1:]) != expected or not image.is_floating_point():
        raise ValueError(
            f"{name}: got {image.dtype} of shape {tuple(image.shape)}, expected floating point (P, "
            f"{', '.join(map(str, expected))})"
        )
    if image.numel() and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{name}: has values outside [0, 1]")
    return 2 * image.float() - 1


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, turned as its camera says.

    Raises:
        OSError: no such file, or one that is not an image, or is cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # Pillow's decoders raise all of these for damaged files; a bomb is a picture of absurd size.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        absent_or_forbidden = isinstance(error, OSError) and error.filename is not None
        if absent_or_forbidden:  # the system's message says it all
            raise
        raise OSError(f"{path}: cannot read this image: {error}") from error


def grid(images: Sequence[Image.Image], *, columns: int | None = None) -> Image.Image:
    """The images in rows, on white, a little apart.

    Args:
        images: at least one, all of one size and mode.
        columns: the nearest to a square when None.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    gap = max(2, width // 32)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    background = _GRID_BACKGROUND if images[0].mode == "L" else (_GRID_BACKGROUND,) * 3
    sheet = Image.new(images[0].mode, size, background)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG: whole, or not at all.

    Args:
        image: what to write.
        path: where. The file appears, or is replaced, only when it is complete.
        settings: how the image was made. Goes into the file twice: as JSON under "sdfast", for
            `read_settings`, and as the text under "parameters" that web interfaces show.
    """
    path = Path(path)
    info = PngInfo()
    if settings is not None:
        info.add_itxt("parameters", _parameters_text(settings))
        info.add_itxt("sdfast", json.dumps(settings, ensure_ascii=False))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` wrote into a file.

    Raises:
        ValueError: the file carries none.
    """
    with Image.open(path) as image:
        image.load()  # text may follow the pixels
        text = getattr(image, "text", {}).get("sdfast")
    if text is None:
        raise ValueError(f"{path}: carries no settings of sdfast")
    return json.loads(text)


def _parameters_text(settings: Mapping[str, Any]) -> str:
    """The layout that AUTOMATIC1111's web interface writes, and other programs read."""
    labels = {
        "steps": "Steps",
        "sampler": "Sampler",
        "guidance_scale": "CFG scale",
        "seeds": "Seed",
        "size": "Size",
        "model": "Model",
        "strength": "Denoising strength",
        "version": "Version",
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = dict(settings)
    if "width" in settings and "height" in settings:
        values["size"] = f"{settings['width']}x{settings['height']}"
    if "seeds" in settings:
        # That layout has room for one; the JSON beside it has them all.
        values["seeds"] = settings["seeds"][0]
    known = [f"{label}: {values[key]}" for key, label in labels.items() if values.get(key) is not None]
    lines.append(", ".join(known))
    return "\n".join(lines)
