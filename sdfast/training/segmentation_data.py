"""Annotated pictures in a folder, and how much each of their pixels counts.

    DATA/images/a.png ...   what is seen
    DATA/masks/a.png ...    what it is: 0 is background, every other number a cell of its own; or 0 and one
                            number only, in which case cells are what is connected

    w(x) = w_c(x) + w_0 exp(-(d_1(x) + d_2(x))² / 2σ²)

w_c balances the classes, d_1 and d_2 are the distances to the nearest and the second nearest cell: a network
that joins two touching cells pays for the few pixels between them (Ronneberger et al. 2015, eq. 2).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdfast._listed import listed
from sdfast.images import read_image
from sdfast.segmentation import check_picture, open_array, open_picture, statistics

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp", ".npy")
_LOSSY = (".jpg", ".jpeg", ".webp")
_REACH = 5  # in σ: from there on the border's weight is below w_0 e^-12.5


@dataclasses.dataclass(frozen=True)
class Example:
    """An annotated picture.

    Attributes:
        name: of its file.
        picture: (C, H, W) float32, standardised.
        foreground: (H, W) bool.
        border: (H, W) float32, the second term of w(x).
    """

    name: str
    picture: Tensor
    foreground: Tensor
    border: Tensor


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Pictures to learn from.

    Attributes:
        examples: at least one.
        skipped: what could not be read, with the reason.
    """

    examples: Sequence[Example]
    skipped: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("examples: got none, expected at least one")

    @functools.cached_property
    def balance(self) -> Tensor:
        """w_c of background and foreground, (2,): each class weighs half of all, 1 a pixel on average."""
        share = sum(float(e.foreground.sum()) for e in self.examples) / sum(
            e.foreground.numel() for e in self.examples
        )
        if not 0 < share < 1:
            raise ValueError(f"masks: all pixels are {'cells' if share else 'background'}, expected both")
        return torch.tensor([0.5 / (1 - share), 0.5 / share])

    @property
    def fingerprint(self) -> str:
        """Tells these pictures and masks from others."""
        digest = hashlib.sha256()
        for example in self.examples:
            for tensor in (example.picture, example.foreground, example.border):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def example(
    name: str, picture: np.ndarray, mask: np.ndarray, *, channels: int, w0: float = 10.0, sigma: float = 5.0
) -> Example:
    """An annotated picture from arrays.

    Args:
        name: for messages.
        picture: (H, W) or (H, W, C) of any real dtype.
        mask: (H, W): numbers of cells with 0 for background, or 0 and one number.
        channels: C.
        w0, sigma: height, and width in pixels, of the border's weight.

    Raises:
        TypeError, ValueError: wrong shapes, or a mask of fractions.
        ImportError: SciPy is not installed.
    """
    pixels = check_picture(name, picture, channels)
    if mask.shape != pixels.shape[:2]:
        raise ValueError(
            f"{name}: the mask has shape {mask.shape}, expected {pixels.shape[:2]} as the picture"
        )
    try:
        mean, std = statistics(pixels)
        cells = instances(mask)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    standardised = (pixels.astype(np.float32) - mean) / std
    return Example(
        name,
        torch.from_numpy(standardised).permute(2, 0, 1).contiguous(),
        torch.from_numpy(cells > 0),
        torch.from_numpy(border_weight(cells, w0, sigma)),
    )


def instances(mask: np.ndarray) -> np.ndarray:
    """Cells by number, int64 (H, W), with background between those that touch.

    Args:
        mask: (H, W) of whole numbers or bool, 0 is background. With one other number or none, cells are what
            is connected by sides.
    """
    if mask.dtype.kind not in "uib" or mask.ndim != 2:
        raise ValueError(f"mask: got {mask.dtype} of shape {mask.shape}, expected whole numbers (H, W)")
    cells = np.zeros(mask.shape, np.int64)
    if np.count_nonzero(np.unique(mask)) <= 1:
        cells[:] = _ndimage().label(mask != 0)[0]
        return cells
    cells[:] = mask
    apart = np.zeros(mask.shape, bool)
    for first, second in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        a, b = cells[first], cells[second]
        apart[first] |= (a != b) & (a != 0) & (b != 0)
    cells[apart] = 0
    return cells


def border_weight(cells: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """w_0 exp(-(d_1 + d_2)² / 2σ²) on the background, 0 on the cells.

    Args:
        cells: (H, W) whole numbers, 0 is background.
        w0, sigma: height and width, the latter in pixels.

    Returns:
        (H, W) float32; 0 where the second cell is more than 5σ away.
    """
    ndimage = _ndimage()
    reach = int(np.ceil(_REACH * sigma))
    nearest = np.full((2, *cells.shape), np.inf)
    numbers, compact = np.unique(cells, return_inverse=True)
    compact = compact.reshape(cells.shape)  # boxes are made for every number up to the largest
    for index, box in enumerate(ndimage.find_objects(compact + 1)):
        if numbers[index] == 0:
            continue
        around = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
        distance = ndimage.distance_transform_edt(compact[around] != index)
        first, second = (kept[around] for kept in nearest)
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    weight = w0 * np.exp(-(nearest.sum(axis=0) ** 2) / (2 * sigma**2))
    return np.where((cells == 0) & (nearest[1] <= reach), weight, 0).astype(np.float32)


def load_folder(
    folder: str | Path, *, channels: int, w0: float = 10.0, sigma: float = 5.0, progress: bool = False
) -> Annotated:
    """Read `folder`/images and `folder`/masks; a picture and its mask differ in their endings at most.

    What is damaged is skipped, and named in one warning.

    Raises:
        ValueError: no such folders, no pictures, pictures without masks, a mask of another size, or one in
            colours.
        ImportError: SciPy is not installed.
    """
    pictures, masks = (_files(Path(folder), kind) for kind in ("images", "masks"))
    if not pictures:
        raise ValueError(f"{folder}/images: no pictures, expected files ending in {', '.join(SUFFIXES)}")
    missing = sorted(pictures.keys() - masks.keys())
    if missing:
        raise ValueError(f"{folder}/masks: no mask for {listed(missing)}")
    _ndimage()  # before the pictures are read
    examples, skipped = [], []
    for stem in tqdm(sorted(pictures), desc="reading", unit="picture", disable=not progress):
        try:
            picture, mask = open_picture(pictures[stem], channels), read_mask(masks[stem])
        except OSError as error:
            skipped.append(f"{error}")
            continue
        examples.append(example(pictures[stem].name, picture, mask, channels=channels, w0=w0, sigma=sigma))
    if not examples:
        raise ValueError(f"{folder}: none of {len(skipped)} pictures can be read: {listed(skipped)}")
    if skipped:
        warnings.warn(f"{len(skipped)} of {len(pictures)} pictures are skipped: {listed(skipped)}")
    return Annotated(examples, skipped)


def read_mask(path: str | Path) -> np.ndarray:
    """Numbers of cells, (H, W): grey values or indices of a palette from a picture, or an .npy file.

    Raises:
        OSError: no such file, or none that can be read.
        ValueError: a coloured picture, or a format that changes numbers to make files small.
    """
    path = Path(path)
    if path.suffix.lower() in _LOSSY:
        raise ValueError(f"{path}: this format changes values; store masks as PNG, TIFF or .npy")
    if path.suffix.lower() == ".npy":
        return open_array(path)
    picture: Image.Image = read_image(path)
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise ValueError(f"{path}: a mask of mode {picture.mode}, expected grey values or a palette")
    return np.asarray(picture)


def _files(folder: Path, kind: str) -> dict[str, Path]:
    if not (folder / kind).is_dir():
        raise ValueError(f"{folder}: holds no folder {kind!r}; expected images/ and masks/ in it")
    paths = (path for path in sorted((folder / kind).iterdir()) if not path.name.startswith("."))
    found = [path for path in paths if path.suffix.lower() in SUFFIXES]
    by_stem: dict[str, Path] = {}
    for path in found:
        if path.stem in by_stem:
            raise ValueError(f"{path}: {by_stem[path.stem].name} beside it has the same name")
        by_stem[path.stem] = path
    return by_stem


def _ndimage() -> Any:
    try:
        import scipy.ndimage
    except ImportError as error:
        raise ImportError("distances between cells are SciPy's: pip install sdfast[segment]") from error
    return scipy.ndimage
