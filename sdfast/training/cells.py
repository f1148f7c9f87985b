"""Generated microscope pictures of cells, whose outlines are known exactly: to try segmentation out."""

from __future__ import annotations

import numpy as np

_RADIUS = (9.0, 17.0)  # pixels
_SPACING = 30  # of the grid that the centres stray from
_DENSITY = 0.8  # of its points that have a cell
_WOBBLE = 0.18  # how far outlines stray from circles
_NOISE = 0.05  # standard deviation, of grey values from 0 to 1


def draw_cells(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of cells, many of which touch, unevenly lit and noisy.

    A cell's outline is r(θ) = r_0 (1 + Σ_k a_k cos(kθ + φ_k)), k = 2, 3, 4; it is a little darker than the
    background at its rim and brighter inside. Where cells would overlap the first one drawn stays whole.

    Args:
        height, width: at least 1.
        seed: of everything random.

    Returns:
        picture (H, W) uint8 and cells (H, W) int32, numbered from 1, 0 is background.
    """
    rng = np.random.default_rng(seed)
    light = np.zeros((height, width), np.float32)
    cells = np.zeros((height, width), np.int32)
    centres = [
        (y, x)
        for y in range(0, height + _SPACING, _SPACING)
        for x in range(0, width + _SPACING, _SPACING)
        if rng.random() < _DENSITY
    ]
    for number, grid_point in enumerate(centres, start=1):
        y, x = grid_point + rng.uniform(-_SPACING / 3, _SPACING / 3, size=2)
        radius = rng.uniform(*_RADIUS)
        amplitudes = _WOBBLE * rng.normal(size=3) / np.arange(1, 4)
        phases = rng.uniform(0, 2 * np.pi, size=3)
        brightness = rng.uniform(0.1, 0.4)  # above the background, in its middle
        reach = 2 * radius
        rows = np.arange(max(0, int(y - reach)), min(height, int(y + reach) + 1))
        columns = np.arange(max(0, int(x - reach)), min(width, int(x + reach) + 1))
        if not (len(rows) and len(columns)):
            continue
        dy, dx = rows[:, None] - y, columns[None, :] - x
        angle = np.arctan2(dy, dx)
        outline = 1 + sum(
            a * np.cos(k * angle + p) for k, a, p in zip((2, 3, 4), amplitudes, phases, strict=True)
        )
        depth = 1 - np.hypot(dy, dx) / (radius * outline.clip(0.5, 1.5))  # 0 on the outline, 1 in the centre
        window = np.ix_(rows, columns)
        inside = (depth > 0) & (cells[window] == 0)
        cells[window] = np.where(inside, number, cells[window])
        shade = np.where(depth < 0.15, -0.12, brightness * (0.7 + 0.3 * np.cos(0.5 * dx) * np.cos(0.4 * dy)))
        light[window] = np.where(inside, shade, light[window])
    slope = rng.uniform(-0.1, 0.1, size=2)
    light += slope[0] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light += slope[1] * np.linspace(-1, 1, width, dtype=np.float32)
    light += _NOISE * rng.standard_normal(light.shape, dtype=np.float32)
    return (255 * (0.4 + light)).clip(0, 255).astype(np.uint8), cells
