"""How well a segmentation agrees with the truth, in numbers and as a picture."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

_ROWS = 1024  # of memory-mapped masks at a time
_TINT = 0.45
_LARGEST_OVERLAY = 4096
_RIGHT, _FALSE, _MISSED = (60, 200, 90), (230, 70, 50), (60, 120, 240)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Agreement of two masks, A and B.

    The warping error of Jain et al. 2010 (ISBI 2012), which forgives shifted borders but not joined cells, is
    not computed.

    Attributes:
        iou: |A ∩ B| / |A ∪ B|, intersection over union; 1 where both are empty.
        dice: 2 |A ∩ B| / (|A| + |B|); 1 where both are empty.
        pixel_error: the share of pixels in which they differ.
    """

    iou: float
    dice: float
    pixel_error: float


def scores(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    """Compare a mask with the truth.

    Args:
        prediction, truth: (H, W), 0 is background and everything else foreground.

    Raises:
        ValueError: shapes differ, or there are no pixels.
    """
    if prediction.shape != truth.shape or prediction.ndim != 2 or prediction.size == 0:
        raise ValueError(f"truth: got shape {truth.shape}, expected {prediction.shape} as the prediction")
    both = either = 0
    for top in range(0, len(prediction), _ROWS):
        a, b = (mask[top : top + _ROWS] != 0 for mask in (prediction, truth))
        both += np.count_nonzero(a & b)
        either += np.count_nonzero(a | b)
    return Scores(
        iou=both / either if either else 1.0,
        dice=2 * both / (both + either) if either else 1.0,
        pixel_error=(either - both) / prediction.size,
    )


def overlay(picture: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None = None) -> Image.Image:
    """The picture with its foreground tinted green; beside a truth, what is false red, what is missed blue.

    Args:
        picture: (H, W) or (H, W, 3) of any real dtype; shown between its 1st and 99th percentile.
        prediction, truth: (H, W), 0 is background.

    Returns:
        RGB. Of a picture of more than 4096 pixels a side, every second, third, ... pixel.
    """
    stride = -(-max(picture.shape[:2]) // _LARGEST_OVERLAY)
    shown = np.asarray(picture[::stride, ::stride], dtype=np.float32)
    low, high = np.percentile(shown, (1, 99))
    shown = 255 * ((shown - low) / max(float(high - low), 1e-12)).clip(0, 1)
    shown = np.broadcast_to(shown.reshape(*shown.shape[:2], -1), (*shown.shape[:2], 3)).copy()
    found = prediction[::stride, ::stride] != 0
    real = found if truth is None else truth[::stride, ::stride] != 0
    for where, colour in ((found & real, _RIGHT), (found & ~real, _FALSE), (~found & real, _MISSED)):
        shown[where] += _TINT * (np.asarray(colour, np.float32) - shown[where])
    return Image.fromarray(shown.round().astype(np.uint8))
