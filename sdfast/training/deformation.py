"""Pictures moved as tissue is: elastic deformation, rotation and reflection in one resampling.

    p(u) = c + R F (u - u_0) + d(u)

c is where in the picture the tile lies, R a rotation, F a reflection or none, and d a smooth displacement:
random vectors on a coarse 3x3 grid, of a Gaussian with a standard deviation of 10 pixels, between which
bicubic interpolation fills in (Ronneberger et al. 2015, section 3.1).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far training tiles stray from the pictures they are drawn from.

    Attributes:
        displacement: σ of the displacement vectors, in pixels; 0 leaves shapes alone.
        grid: displacement vectors along a side of the tile.
        rotation: the largest angle to either side, in degrees.
        flip: whether half of the tiles are reflected.
        gain: the largest change of contrast, 0.2 for factors from 0.8 to 1.2.
        shift: the largest change of brightness, in standard deviations of the picture's grey values.
    """

    displacement: float = 10.0
    grid: int = 3
    rotation: float = 180.0
    flip: bool = True
    gain: float = 0.2
    shift: float = 0.2

    def __post_init__(self) -> None:
        for name in ("displacement", "rotation", "gain", "shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number from 0 on")
        if self.grid < 2:
            raise ValueError(f"grid: got {self.grid}, expected at least 2")


def displacements(side: int, sigma: float, grid: int, generator: torch.Generator) -> Tensor:
    """A smooth random field of vectors (side, side, 2), in pixels, x before y.

    The vectors of the coarse grid, whose corners are the tile's, are independent and of standard deviation
    `sigma` in each direction.
    """
    coarse = sigma * torch.randn(1, 2, grid, grid, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def points(
    height: int, width: int, side: int, core: int, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """Where in a picture the pixels of a random tile come from.

    Args:
        height, width: of the picture.
        side: of the tile.
        core: of its middle part, even where `side` is. It lies inside the picture where that is large
            enough, but for what rotation and displacement do; the margin may reach over the border.
        augmentation: how it is moved.
        generator: where the movements come from.

    Returns:
        (side, side, 2) float32: x and y of each pixel of the tile in pixels of the picture.
    """
    place, turn, mirror = torch.rand(4, generator=generator).split([2, 1, 1])
    # The middle part begins at a whole pixel: without movement nothing is resampled.
    room = torch.tensor([width - core, height - core])
    begin = torch.where(room > 0, place * (room + 1), room / 2).floor()
    centre = begin + (core - 1) / 2
    angle = math.radians(augmentation.rotation) * (2 * turn - 1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if augmentation.flip else torch.ones(1)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.cat([cos * sign, -sin]), torch.cat([sin * sign, cos])])
    axis = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    moved = torch.stack([x, y], dim=-1) @ matrix.T + centre
    return moved + displacements(side, augmentation.displacement, augmentation.grid, generator)


def sample(values: Tensor, where: Tensor, mode: str) -> Tensor:
    """Values (C, H, W) at points (h, w, 2), mirrored at the borders as in prediction: (C, h, w).

    Args:
        mode: "bilinear" or "nearest".
    """
    size = torch.tensor([values.shape[2], values.shape[1]])
    unit = 2 * where / (size - 1).clamp(min=1) - 1  # -1 and 1 are the centres of the outermost pixels
    grid = unit[None]
    return F.grid_sample(values[None], grid, mode=mode, padding_mode="reflection", align_corners=True)[0]


def recolour(picture: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """The standardised picture with its contrast and brightness changed at random."""
    gain, shift = 2 * torch.rand(2, generator=generator) - 1
    return picture * (1 + augmentation.gain * gain) + augmentation.shift * shift
