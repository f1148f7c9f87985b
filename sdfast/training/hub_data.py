"""A Hugging Face data set as a folder of images: streamed once, file by file, then read like any other.

    folder/00000000.jpg …, metadata.jsonl, and complete.json when all of it is there

The bytes are kept as they come: a JPEG of 512x512 takes about as much room as its latents. Stopped at any
moment, it goes on after the last image. Runs may share the folder: one streams while the others wait.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdfast.files import replacing
from sdfast.training.images import CAPTION_COLUMNS, SUFFIXES, visible_names

_COMPLETE = "complete.json"
_METADATA = "metadata.jsonl"
_LOCK = ".lock"
_TABLES = frozenset({".parquet", ".arrow", ".tar", ".zip"})
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def is_dataset(data: str | Path) -> bool:
    """Whether this is for `datasets`: a hub id, or a folder that holds its files and no images."""
    path = Path(data)
    if not path.exists():
        return str(data).count("/") == 1 and not str(data).startswith((".", "/"))
    if not path.is_dir():
        return False
    suffixes = {Path(name).suffix.lower() for name in visible_names(path)}
    return not suffixes & SUFFIXES and bool(suffixes & _TABLES)


def identity(data: str | Path) -> list[Any]:
    """What tells a data set from others, and one on disk from what it was before its files changed.

    One of the hub is taken as it was when it was streamed.
    """
    path = Path(data)
    if not path.exists():
        return [str(data)]
    facts = ((name, (path / name).stat()) for name in visible_names(path))
    return [str(path.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in facts)]


def import_dataset(
    name: str | Path,
    folder: Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    most_images: int | None = None,
    allow_missing_captions: bool = False,
    progress: bool = True,
) -> Path:
    """Stream a data set into `folder`.

    Args:
        name: a hub id, or a folder that `datasets` reads.
        folder: where to; one that is complete is left as it is.
        split: of the data set.
        image_column, caption_column: None for the first column of images, and for "text", "caption" or
            "prompt", whichever there is.
        most_images: stop after so many; None takes all.
        allow_missing_captions: there need be no column of captions.
        progress: show a bar.

    Returns:
        `folder`, for `sdfast.training.images.read_folder`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such data set, split or column.
    """
    if (folder / _COMPLETE).is_file():
        return folder
    rows, image_column, caption_column = _open(name, split, image_column, caption_column)
    if caption_column is None and not allow_missing_captions:
        raise ValueError(
            f"{name}: has no column of captions ({', '.join(CAPTION_COLUMNS)}), only"
            f" {', '.join(rows.features)}; name it (--caption-column), or do without"
            " (--allow-missing-captions)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, progress):
        if not (folder / _COMPLETE).is_file():
            _stream(rows, folder, image_column, caption_column, most_images, progress)
            with replacing(folder / _COMPLETE) as temporary:
                temporary.write_text(json.dumps({"data": str(name), "split": split}) + "\n")
    return folder


@contextlib.contextmanager
def _alone(folder: Path, progress: bool) -> Iterator[None]:
    """Wait for other runs that stream into this folder; a lock that a kill left holds nobody up."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"images: another run streams into {folder}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _stream(
    rows: Any, folder: Path, image_column: str, caption_column: str | None, most: int | None, progress: bool
) -> None:
    done = _whole_lines(folder / _METADATA)
    with (folder / _METADATA).open("a", encoding="utf-8") as metadata:
        bar = tqdm(rows.skip(done), desc="images", unit="image", initial=done, disable=not progress)
        for number, row in enumerate(bar, start=done):
            if most is not None and number >= most:
                break
            content = _bytes(row[image_column])
            suffix = next((end for start, end in _MAGIC.items() if content.startswith(start)), ".png")
            file = folder / f"{number:08d}{suffix}"
            with replacing(file) as temporary:
                temporary.write_bytes(content)
            caption = row[caption_column] if caption_column else ""
            metadata.write(json.dumps({"file_name": file.name, "text": caption or ""}) + "\n")
            metadata.flush()


def _open(
    name: str | Path, split: str, image: str | None, caption: str | None
) -> tuple[Any, str, str | None]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: is no folder of images; to read it as a data set: pip install sdfast[train]"
        ) from error
    try:
        rows = datasets.load_dataset(str(name), split=split, streaming=True)
        features = rows.features or {}
    # Its errors, its HTTP library's and its file readers' have no common class.
    except Exception as error:
        raise ValueError(
            f"{name}: is no folder of images, and datasets cannot read it, split {split!r}"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
        ) from error
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    column = _column("image column", image, images[:1], features)
    if column is None:
        raise ValueError(
            f"{name}: has no column of images, only {', '.join(features)}; name it (--image-column)"
        )
    text = _column("caption column", caption, [c for c in CAPTION_COLUMNS if c in features], features)
    return rows.cast_column(column, datasets.Image(decode=False)), column, text


def _column(role: str, asked: str | None, found: list[str], features: Iterable[str]) -> str | None:
    if asked is not None and asked not in features:
        raise ValueError(f"{role}: got {asked!r}, expected one of {', '.join(features)}")
    return asked or (found[0] if found else None)


def _bytes(image: Mapping[str, Any] | None) -> bytes:
    """As they are; nothing where there is nothing, which is counted among the damaged ones."""
    if image is None:
        return b""
    if image.get("bytes") is not None:
        return image["bytes"]
    if not image.get("path"):
        return b""
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:  # a file on disk, on the hub or within an archive
        return file.read()


def _whole_lines(path: Path) -> int:
    """How many lines there are; one that was cut short is removed."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with replacing(path) as temporary:
            temporary.write_bytes(whole)
    return whole.count(b"\n")
