"""Latents of training images on disk: the frozen VAE's encoder reads each image once, not once an epoch.

    cache/3f/3fa0….safetensors   {"moments": (2C, h, w) fp32}, mean and log-variance of q_φ(z|x)

A file is named after all that decides its content: image (path, size, time of change), bucket and VAE.
Images are encoded one by one, so that no bit depends on which others were, nor on how many processes shared
the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sdfast.files import replacing
from sdfast.models import AutoencoderKL
from sdfast.training.buckets import Size
from sdfast.training.distributed import ALONE, Processes
from sdfast.training.images import CaptionedImage, read_pixels


class LatentCache:
    """The latents of one VAE.

    Args:
        folder: where files go.
        vae: encodes, in its own dtype, on its own device.
        vae_fingerprint: what tells it from others.
    """

    def __init__(self, folder: str | Path, vae: AutoencoderKL, vae_fingerprint: str) -> None:
        self.folder = Path(folder)
        self._vae, self._vae_fingerprint = vae, vae_fingerprint

    def fill(
        self,
        images: Sequence[CaptionedImage],
        sizes: Sequence[Size],
        processes: Processes = ALONE,
        *,
        progress: bool = True,
    ) -> dict[int, str]:
        """Encode what is not there yet, each process its share.

        Args:
            images, sizes: N of them, and what each is cut to.

        Returns:
            number of an image that cannot be read -> why, the same on all processes.

        Raises:
            OSError: a file cannot be written.
        """
        unreadable: dict[int, str] = {}
        mine = range(processes.rank, len(images), processes.world)
        for i in tqdm(mine, desc="latents", unit="image", disable=not (progress and processes.is_main)):
            path = self._path(images[i], sizes[i])
            if _read(path) is not None:
                continue
            try:
                pixels = read_pixels(images[i].path, sizes[i], self._vae.config.in_channels)
            except OSError as error:
                unreadable[i] = str(error)
                continue
            self._write(path, pixels)
        return {i: reason for part in processes.gather(unreadable) for i, reason in part.items()}

    def moments(self, image: CaptionedImage, size: Size) -> Tensor:
        """(2C, h, w) fp32 on the CPU. Encoded again where the file was lost since.

        Raises:
            OSError: the image cannot be read.
        """
        path = self._path(image, size)
        found = _read(path)
        if found is None:
            self._write(path, read_pixels(image.path, size, self._vae.config.in_channels))
            found = load_file(path)["moments"]
        return found

    def _path(self, image: CaptionedImage, size: Size) -> Path:
        try:
            facts = image.path.stat()
            version = (facts.st_size, facts.st_mtime_ns)
        except OSError:  # it is reported when it is read
            version = (0, 0)
        key = repr((str(image.path.resolve()), version, size, self._vae_fingerprint))
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @torch.no_grad()
    def _write(self, path: Path, pixels: Tensor) -> None:
        weight = self._vae.encoder.conv_in.weight
        posterior = self._vae.encode(pixels[None].to(weight))
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].float().cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            try:
                save_file({"moments": moments}, temporary)
            except safetensors.SafetensorError as error:
                raise OSError(f"{path}: cannot write these latents: {error}") from error


def _read(path: Path) -> Tensor | None:
    """None where there is no whole file."""
    try:
        return load_file(path)["moments"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
