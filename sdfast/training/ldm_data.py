"""Which images `train_ldm` reads, what each is cut to, and which of them cannot be read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sdfast.training.buckets import Size, nearest_bucket
from sdfast.training.distributed import Processes
from sdfast.training.hub_data import identity, import_dataset, is_dataset
from sdfast.training.images import CaptionedImage, image_size, read_folder, read_pixels


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images; see `import_dataset` and `read_folder`."""

    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    most_images: int | None = None
    allow_missing_captions: bool = False


def find_images(
    data: str | Path, cache: Path, options: DataOptions, group: Processes, *, progress: bool
) -> list[CaptionedImage]:
    """The images of a folder or a data set; the main process looks, and all learn what it found.

    Raises:
        OSError, ValueError, ImportError: as `read_folder` and `import_dataset`; ValueError also where `split`
            or `image_column` is asked of a folder of images, which has none.
    """

    def find() -> list[CaptionedImage]:
        allow = options.allow_missing_captions
        if is_dataset(data):
            facts = (identity(data), options.split, options.image_column, options.caption_column)
            key = hashlib.sha256(repr((*facts, options.most_images)).encode()).hexdigest()[:16]
            folder = import_dataset(
                data, cache / f"images-{key}", split=options.split, image_column=options.image_column,
                caption_column=options.caption_column, most_images=options.most_images,
                allow_missing_captions=allow, progress=progress,
            )  # fmt: skip
            images = read_folder(folder, allow_missing_captions=allow)
        else:
            for name in ("split", "image_column"):
                if getattr(options, name) != getattr(DataOptions, name):
                    raise ValueError(f"{name}: is of a data set, and {data} is none")
            images = read_folder(data, caption_column=options.caption_column, allow_missing_captions=allow)
        return images[: options.most_images]

    return group.main_first(find)


class TrainingImages:
    """Images with their sizes and buckets. Those that cannot be read drop out, and are named in `skipped`.

    Args:
        images: N of them.
        shapes: what they may be cut to, see `sdfast.training.buckets`.

    Attributes:
        images, own_sizes, sizes, buckets: of those that can be read.
        skipped: name -> why it cannot be read.

    Raises:
        ValueError: none can be read.
    """

    def __init__(self, images: Sequence[CaptionedImage], shapes: Sequence[Size]) -> None:
        self.images: list[CaptionedImage] = []
        self.own_sizes: list[Size] = []
        self.skipped: dict[str, str] = {}
        for image in images:
            try:
                self.own_sizes.append(image_size(image.path))
                self.images.append(image)
            except OSError as error:
                self.skipped[image.name] = str(error)
        self.buckets = [nearest_bucket(size, shapes) for size in self.own_sizes]
        self.sizes = [shapes[bucket] for bucket in self.buckets]
        self._settle()

    def drop(self, unreadable: Mapping[int, str]) -> None:
        """Leave out what could not be read: number of an image -> why."""
        self.skipped |= {self.images[i].name: reason for i, reason in unreadable.items()}
        kept = [i for i in range(len(self.images)) if i not in unreadable]
        self.images = [self.images[i] for i in kept]
        self.own_sizes = [self.own_sizes[i] for i in kept]
        self.buckets = [self.buckets[i] for i in kept]
        self.sizes = [self.sizes[i] for i in kept]
        self._settle()

    def pixels(self, index: int, channels: int) -> Tensor:
        """An image (channels, H, W) in [-1, 1]; in place of one that is damaged the next of its bucket.

        Which that is does not depend on the process that asks.

        Raises:
            ValueError: none of its bucket can be read.
        """
        bucket, at = self._members[self.buckets[index]], self._position[index]
        for i in (*bucket[at:], *bucket[:at]):
            try:
                return read_pixels(self.images[i].path, self.sizes[i], channels)
            except OSError as error:
                self.skipped[self.images[i].name] = str(error)
        raise ValueError(f"data: none of the {len(bucket)} images of size {self.sizes[index]} can be read")

    def _settle(self) -> None:
        if not self.images:
            reason = next(iter(self.skipped.values()))
            raise ValueError(f"data: none of the {len(self.skipped)} images can be read; the first: {reason}")
        self._members: dict[int, list[int]] = {}
        self._position: list[int] = []
        for i, bucket in enumerate(self.buckets):
            members = self._members.setdefault(bucket, [])
            self._position.append(len(members))
            members.append(i)
