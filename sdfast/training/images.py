"""Images with captions: a folder of files, each with its text, in one fixed order.

folder/cat.jpg + folder/cat.txt                            a text file beside each image, or
folder/metadata.jsonl: {"file_name": "cat.jpg", "text": …}   Hugging Face's "imagefolder"

A metadata.jsonl in a subfolder names its files from there. Hidden files and folders do not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from sdfast._listed import listed
from sdfast.images import as_tensor, read_image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
CAPTION_COLUMNS = ("text", "caption", "prompt")
_METADATA = "metadata.jsonl"
_TAIL_BYTES = 4096
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # of Exif: those that swap width and height


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """A file and what it shows.

    Attributes:
        path: of the image.
        name: relative to its folder, as the user knows it.
        caption: "" where there is none.
    """

    path: Path
    name: str
    caption: str


def read_folder(
    folder: str | Path, *, caption_column: str | None = None, allow_missing_captions: bool = False
) -> list[CaptionedImage]:
    """The images of a folder and its subfolders with their captions, by name. No image is opened.

    Args:
        folder: of images.
        caption_column: of metadata.jsonl; None for "text", "caption" or "prompt", whichever there is.
        allow_missing_captions: an image without one gets "".

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it holds no image, a metadata.jsonl cannot be used, there is none to have
            `caption_column`, or images lack a caption and that is not allowed; the text names them.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"data: {folder}: no such folder, nor a hub id of the form owner/name")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is no folder of images")
    visible = visible_names(folder)
    names = [name for name in visible if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if not names:
        raise ValueError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
    tables = [folder / name for name in visible if PurePosixPath(name).name == _METADATA]
    if caption_column is not None and not tables:
        raise ValueError(f"caption column: got {caption_column!r}, but {folder} has no {_METADATA}")
    columns = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    captions: dict[str, str] = {}
    for table in sorted(tables, key=lambda path: len(path.parts)):  # the nearest to an image has its caption
        captions |= _read_metadata(table, folder, columns)
    images = [
        CaptionedImage(folder / name, name, _caption(folder / name, captions.get(name))) for name in names
    ]
    without = [image.name for image in images if not image.caption]
    if without and not allow_missing_captions:
        raise ValueError(
            f"{folder}: {len(without)} of {len(images)} images have no caption: {listed(without)}. Put a"
            f" .txt beside each or a line into {_METADATA}, or allow them (--allow-missing-captions): they"
            " are then trained with the empty caption"
        )
    return images


def visible_names(folder: Path) -> list[str]:
    """What a folder and its subfolders hold, named from there, in order; nothing hidden or in hidden ones."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, turned as the camera says, from the head of the file.

    Raises:
        OSError: it is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: cannot read this image: {error}") from error
    return (width, height) if turned else (height, width)


def read_pixels(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """An image, cut about its centre to the shape of (H, W) and resized to it with Lanczos.

    Returns:
        (channels, H, W) float32 in [-1, 1].

    Raises:
        OSError: it cannot be read.
    """
    image = read_image(path)
    height, width = size
    top, left = cut_away((image.height, image.width), size)
    part = image.crop((left, top, image.width - left, image.height - top))
    return as_tensor(part, height=height, width=width, channels=channels, multiple=1)[0]


def cut_away(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns to the left that an image of size `own` loses to get the shape of `size`."""
    scale = min(own[0] / size[0], own[1] / size[1])
    kept = [max(1, round(side * scale)) for side in size]
    return (own[0] - kept[0]) // 2, (own[1] - kept[1]) // 2


def fingerprint(images: Sequence[CaptionedImage]) -> str:
    """What tells these images and captions from others: names, captions, and of each file length and tail.

    A copy of a file is the same image, whenever it was made. (What is compressed differs in its last bytes.)

    Raises:
        OSError: a file cannot be read.
    """
    text = json.dumps([(image.name, image.caption, *_length_and_tail(image.path)) for image in images])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _length_and_tail(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - _TAIL_BYTES))
        return length, zlib.crc32(file.read())


def _caption(path: Path, given: str | None) -> str:
    if given is not None:
        return given.strip()
    beside = path.with_suffix(".txt")
    return _read_text(beside).strip() if beside.is_file() else ""


def _read_metadata(path: Path, folder: Path, columns: Sequence[str]) -> dict[str, str]:
    """Name of an image from `folder` on -> its caption."""
    captions: dict[str, str] = {}
    below = path.parent.relative_to(folder).as_posix()
    # Not splitlines, which also cuts at characters that JSON allows within a text.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = posixpath.normpath(posixpath.join(below, entry["file_name"]))
            text = next((entry[column] for column in columns if entry.get(column)), "")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: got {line[:80]!r}, expected"
                f' {{"file_name": ..., "{columns[0]}": ...}}'
            ) from error
        captions[name] = str(text)
    absent = [name for name in captions if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{path}: names files that are not there: {listed(absent)}")
    return captions


def _read_text(path: Path) -> str:
    """UTF-8, with or without the byte order mark that Windows writes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text: {error}") from error
