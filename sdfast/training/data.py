"""scikit-learn's handwritten digits as training pictures, and the classifier that reads generated ones.

1797 pictures of 8x8 with values 0 to 16 (Alpaydin & Kaynak 1998) are enlarged to 32x32 by bicubic
interpolation. They come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
_SMALL = 8  # the data set's own size
_MAX = 16.0  # and its highest value
_HOLDOUT = 297

# Augmentation stays below what could turn one digit into another; lengths are in half pictures.
_ROTATION = math.radians(8.0)
_SCALE = 0.06
_SHIFT = 0.08  # 1.3 of 32 pixels


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pictures with the digits they show.

    Attributes:
        images: (N, 8, 8) float32 in 0..16, 0 is background.
        labels: (N,) int64 in 0..9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the holdout part, 1500 and 297 pictures; the split depends on `seed` alone.

    Raises:
        ImportError: scikit-learn is not installed; the text says how to get it.
    """
    bunch = _sklearn("datasets").load_digits()
    images = torch.from_numpy(bunch.images).float()
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, holdout = order[:-_HOLDOUT], order[-_HOLDOUT:]
    return Digits(images[train], labels[train]), Digits(images[holdout], labels[holdout])


def enlarge(digits: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """(N, 8, 8) in 0..16 -> (N, 3, size, size) in [-1, 1], three equal channels."""
    return _as_pictures(F.interpolate(digits[:, None], size=(size, size), mode="bicubic"))


def shrink(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) about [-1, 1] -> (N, 8, 8) in 0..16: averages over the area of each small pixel."""
    grey = pictures.float().mean(dim=1, keepdim=True).clamp(-1, 1)
    return (F.interpolate(grey, size=(_SMALL, _SMALL), mode="area")[:, 0] + 1) * (_MAX / 2)


def augment(digits: Tensor, generator: torch.Generator, size: int = IMAGE_SIZE) -> Tensor:
    """`enlarge` with each picture turned, scaled and shifted a little.

    One resampling does both, so a turned picture is as sharp as an upright one.

    Args:
        digits: (N, 8, 8) in 0..16.
        generator: where the movements come from.

    Returns:
        (N, 3, size, size) in [-1, 1].
    """
    count = len(digits)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale, x, y = uniform(_ROTATION), 1 + uniform(_SCALE), uniform(_SHIFT), uniform(_SHIFT)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 1, size, size], align_corners=False)
    # "border" is what F.interpolate does too: without movement this is `enlarge`.
    moved = F.grid_sample(digits[:, None], grid, mode="bicubic", padding_mode="border", align_corners=False)
    return _as_pictures(moved)


def training_set(digits: Digits, *, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """The pictures as they are, followed by `copies` augmented versions of all of them.

    Returns:
        pictures ((1 + copies) N, 3, 32, 32) and labels ((1 + copies) N,).
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = [enlarge(digits.images), *(augment(digits.images, generator) for _ in range(copies))]
    return torch.cat(pictures), digits.labels.repeat(1 + copies)


class Reader:
    """A support vector machine trained on the real digits: the judge of generated ones.

    Args:
        digits: what it learns from.

    Raises:
        ImportError: scikit-learn is not installed; the text says how to get it.
    """

    def __init__(self, digits: Digits) -> None:
        # This gamma is scikit-learn's own choice for this data set.
        self._machine = _sklearn("svm").SVC(gamma=0.001, C=10.0)
        self._machine.fit(digits.images.flatten(1).numpy(), digits.labels.numpy())

    def read(self, images: Tensor) -> Tensor:
        """The digit in each of (N, 8, 8) in 0..16, see `shrink`: (N,) int64."""
        return torch.from_numpy(self._machine.predict(images.flatten(1).numpy())).long()

    def accuracy(self, digits: Digits) -> float:
        """The share that is read as its label."""
        return float((self.read(digits.images) == digits.labels).double().mean())


def _as_pictures(grey: Tensor) -> Tensor:
    """(N, 1, H, W) about 0..16 -> (N, 3, H, W) in [-1, 1]."""
    return (grey / (_MAX / 2) - 1).clamp(-1, 1).repeat(1, 3, 1, 1)


def _sklearn(module: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "the handwritten digits and their classifier come with scikit-learn: pip install sdfast[train]"
        ) from error
