"""A segmentation into a file: in bounded memory, whole or not at all, and continued where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from sdfast.images import save_png
from sdfast.models import SegmentationUNet
from sdfast.segmentation import default_tile, predict

_NOTED_SECONDS = 10.0
_HASHED_ROWS = 256


def predict_to_file(
    model: SegmentationUNet,
    picture: np.ndarray,
    path: str | Path,
    *,
    tile: int | None = None,
    memory_bytes: int = 10**9,
    progress: bool = False,
) -> tuple[np.ndarray, float]:
    """`predict`, written to a file.

    Until it is complete the result lies beside `path` in a hidden .part.npy file with a note of how far it
    has come. Called again with the same model, picture and tile it goes on from there.

    Args:
        model, picture, tile, memory_bytes, progress: as in `sdfast.segmentation.predict`.
        path: .npy gets the classes, uint8 (H, W); anything else is a PNG of them, with 255 for the second of
            two classes, which needs memory for the whole mask.

    Returns:
        The classes, (H, W) uint8 (mapped from the .npy file), and the seconds that this call took.

    Raises:
        TypeError, ValueError: as in `predict`.
        KeyboardInterrupt: Ctrl-C; the text says how to go on.
    """
    began, path = time.monotonic(), Path(path)
    part = path.with_name(f".{path.name}.part.npy")
    note = part.with_suffix(".json")
    tile = default_tile(model.config, memory_bytes) if tile is None else tile
    settings = {
        "model": _hash(tensor.detach().cpu().numpy() for tensor in model.state_dict().values()),
        "picture": _hash(picture[top : top + _HASHED_ROWS] for top in range(0, len(picture), _HASHED_ROWS)),
        "shape": list(picture.shape),
        "tile": tile,
    }
    done = _done(part, note, settings)
    if not done:
        _remove(note)  # it would be taken for this one's
        _reserve(part, picture.shape[:2])
    mask = np.lib.format.open_memmap(part, mode="r+")
    noted_at = time.monotonic()

    def write_note() -> None:
        nonlocal noted_at
        mask.flush()  # the pixels are on the disk before the note says so
        _replace(note, json.dumps({"settings": settings, "tiles": done}))
        noted_at = time.monotonic()

    def on_tile(count: int) -> None:
        nonlocal done
        done = count
        if time.monotonic() - noted_at >= _NOTED_SECONDS:
            write_note()

    try:
        predict(
            model, picture, out=mask, tile=tile, memory_bytes=memory_bytes, progress=progress,
            first_tile=done, on_tile=on_tile,
        )  # fmt: skip
    except KeyboardInterrupt:
        write_note()
        raise KeyboardInterrupt(
            f"stopped after {done} tiles; nothing is lost. Run the same command again to go on."
        ) from None
    except BaseException:
        _remove(part, note)
        raise
    mask.flush()
    if path.suffix.lower() == ".npy":
        part.replace(path)
        _remove(note)
        return np.load(path, mmap_mode="r"), time.monotonic() - began
    classes = np.array(mask)
    save_png(Image.fromarray(classes * (255 if model.config.out_channels == 2 else 1)), path)
    _remove(part, note)
    return classes, time.monotonic() - began


def _reserve(path: Path, shape: tuple[int, int]) -> None:
    """Make an .npy file of zeros that has its room on the disk: writing to a map of a full disk is fatal."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        _remove(path)
        raise OSError(error.errno, f"no room for {shape[0]}x{shape[1]} pixels", str(path)) from None


def _done(part: Path, note: Path, settings: object) -> int:
    """How many tiles are in the unfinished file; 0 where there is none, or one of something else."""
    try:
        noted = json.loads(note.read_text())
        whole = part.is_file() and noted["settings"] == settings
        return int(noted["tiles"]) if whole else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _hash(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
