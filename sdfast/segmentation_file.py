"""A segmentation into a file: in bounded memory, whole or not at all, and continued where it was stopped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from sdfast.files import write_json
from sdfast.images import save_png
from sdfast.models import SegmentationUNet
from sdfast.segmentation import check_prediction, predict

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
    has come. Called again with the same model, picture and tile it goes on from there,
    whatever stopped it.

    Args:
        model, picture, tile, memory_bytes, progress: as in `sdfast.segmentation.predict`.
        path: .npy gets the classes, uint8 (H, W); anything else is a PNG of them, with 255 for the second of
            two classes, which needs memory for the whole mask.

    Returns:
        The classes, (H, W) uint8 (mapped from the .npy file), and the seconds that this call took.

    Raises:
        TypeError, ValueError: as in `predict`.
        BlockingIOError: another process is writing this file.
        OSError: no room for the result.
        KeyboardInterrupt: Ctrl-C; the text says how to go on.
    """
    began, path = time.monotonic(), Path(path)
    picture, tile = check_prediction(model, picture, tile, memory_bytes)
    with _only_writer(path, path.with_name(f".{path.name}.part.npy")) as part:
        mask = _resume(model, picture, path, part, tile, progress)
    return mask, time.monotonic() - began


def _resume(
    model: SegmentationUNet, picture: np.ndarray, path: Path, part: Path, tile: int, progress: bool
) -> np.ndarray:
    """Go on from what `part` and its note hold, if that is of the same things, and make `path` of it."""
    note = part.with_suffix(".json")
    weights = (tensor.detach().cpu() for tensor in model.state_dict().values())
    bands = (picture[top : top + _HASHED_ROWS] for top in range(0, len(picture), _HASHED_ROWS))
    settings = {
        # As bytes: NumPy has no bfloat16.
        "model": _hash((w.dtype, w.shape, w.flatten().view(torch.uint8).numpy()) for w in weights),
        "picture": _hash((band.dtype, band.shape, band) for band in bands),
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
        write_json(note, {"settings": settings, "tiles": done})
        noted_at = time.monotonic()

    def on_tile(count: int) -> None:
        nonlocal done
        done = count
        if time.monotonic() - noted_at >= _NOTED_SECONDS:
            write_note()

    try:
        predict(
            model, picture, out=mask, tile=tile, progress=progress, first_tile=done, on_tile=on_tile,
        )  # fmt: skip
        mask.flush()
        if path.suffix.lower() != ".npy":
            classes = np.array(mask)
            save_png(Image.fromarray(classes * (255 if model.config.out_channels == 2 else 1)), path)
            _remove(part, note)
            return classes
    except KeyboardInterrupt:
        write_note()
        raise KeyboardInterrupt(
            f"stopped after {done} tiles; nothing is lost. Run the same command again to go on."
        ) from None
    except BaseException:
        if done:
            with contextlib.suppress(OSError):  # what the last note says still holds
                write_note()
        else:
            _remove(part, note)
        raise
    part.replace(path)
    _remove(note)
    return np.load(path, mmap_mode="r")


@contextlib.contextmanager
def _only_writer(path: Path, part: Path) -> Iterator[Path]:
    """`part`, made if absent, which no other process writes meanwhile.

    Two would truncate the file under each other's map, which is fatal, or write into the finished result.

    Raises:
        BlockingIOError: another process writes it.
    """
    try:
        import fcntl
    except ImportError:  # Windows does not let a mapped file be truncated or renamed
        yield part
        return
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_at(file, part)  # or the other one has just finished, and renamed it
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            raise BlockingIOError(errno.EAGAIN, "another process is writing this file", str(path))
        try:
            yield part
        finally:
            if os.fstat(file.fileno()).st_size == 0 and _is_at(file, part):
                _remove(part)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether this open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
        whole = part.stat().st_size > 0 and noted["settings"] == settings
        return int(noted["tiles"]) if whole else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _hash(arrays: Iterable[tuple[object, Sequence[int], np.ndarray]]) -> str:
    """Of arrays with their dtypes and shapes."""
    digest = hashlib.sha256()
    for dtype, shape, array in arrays:
        digest.update(f"{dtype} {tuple(shape)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
