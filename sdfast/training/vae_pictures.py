"""What a trained VAE of digits looks like: reconstructions, samples, a walk, and the plane of two latents."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdfast.figures import new_figure, save_figure
from sdfast.images import grid, save_png, to_pil
from sdfast.models import SimpleVAE

_SCALE = 6  # screen pixels for one of a digit's
_COLUMNS = 10
_PLANE_STEPS = 16


@torch.no_grad()
def write_pictures(
    vae: SimpleVAE, pictures: Tensor, labels: Tensor, folder: Path, *, seed: int = 0
) -> list[Path]:
    """Write the PNGs of a VAE.

        reconstructions.png   ten of the pictures, one of each class, above what the decoder makes of them
        samples.png           the decoder at z ~ N(0, I)
        walk.png              from one digit's code to another's in nine steps, five times
        latents.png           two latents only: the codes of all pictures, coloured by class
        plane.png             two latents only: the decoder at the quantiles of the prior

    Args:
        pictures: (N, 1, H, W) that were not trained on, at least one of each of the ten classes.
        labels: (N,) int64 in 0..9.
        folder: exists.
        seed: of the samples.

    Returns:
        what was written.

    Raises:
        ImportError: latents.png needs matplotlib, which is not installed.
    """
    of_class = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    shown = pictures[of_class]
    codes = vae.encode(shown)[0]
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(_COLUMNS**2, vae.config.latent_dim, generator=generator)
    share = torch.linspace(0, 1, _COLUMNS)[None, :, None]
    walk = torch.lerp(codes[0::2, None], codes[1::2, None], share).flatten(0, 1)  # (5 * 10, D)
    sheets = {
        "reconstructions": torch.cat([shown, vae.picture(codes)]),
        "samples": vae.picture(z),
        "walk": vae.picture(walk),
    }
    written = [_write_sheet(images, folder / f"{name}.png") for name, images in sheets.items()]
    if vae.config.latent_dim == 2:
        written.append(_write_sheet(vae.picture(_plane()), folder / "plane.png", _PLANE_STEPS))
        written.append(_write_latents(vae.encode(pictures)[0], labels, folder / "latents.png"))
    return written


def _write_sheet(images: Tensor, path: Path, columns: int = _COLUMNS) -> Path:
    height, width = images.shape[2:]
    size = (width * _SCALE, height * _SCALE)
    enlarged = [one.resize(size, Image.Resampling.NEAREST) for one in to_pil(images)]
    save_png(grid(enlarged, columns=columns), path)
    return path


def _plane() -> Tensor:
    """Points (steps², 2) that divide the mass of N(0, I) evenly; the second latent rises upwards."""
    share = (torch.arange(_PLANE_STEPS) + 0.5) / _PLANE_STEPS
    quantiles = torch.special.ndtri(share)
    up, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([right, up], dim=-1).flatten(0, 1)


def _write_latents(codes: Tensor, labels: Tensor, path: Path) -> Path:
    figure = new_figure(6.4, 5.4)
    axes = figure.add_subplot(xlabel="$z_1$", ylabel="$z_2$", title="Means of q(z|x), held-out digits")
    for digit in range(10):
        z = codes[labels == digit]
        # A digit is its own mark: colours alone are not told apart by everyone.
        axes.scatter(z[:, 0], z[:, 1], marker=f"${digit}$", s=36, linewidths=0.3, color=f"C{digit}")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.25)
    save_figure(figure, path)
    return path
