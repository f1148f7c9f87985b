"""Training the segmentation U-Net from few annotated pictures (Ronneberger et al. 2015, section 3).

    minimise the mean over pixels of w(x) · (-ln p_{l(x)}(x)),   p = softmax of the network's scores

l(x) is a pixel's class and w(x) its weight (`sdfast.training.segmentation_data`). Every step draws tiles
of the pictures anew, moved and recoloured (`sdfast.training.deformation`). AdamW replaces the paper's
gradient descent with momentum 0.99.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast.models import SegmentationUNet, SegmentationUNetConfig
from sdfast.request import check_count
from sdfast.training.deformation import Augmentation, points, recolour, sample
from sdfast.training.segmentation_data import Annotated
from sdfast.training.trainer import Schedule, seeded, train


@dataclasses.dataclass(frozen=True)
class SegmentationTraining:
    """Settings of `train_segmentation`.

    Attributes:
        schedule: length, rates and the average of the weights that is kept in the end.
        batch_size: tiles in a step; the paper prefers one large tile to several.
        tile: side of the result of a tile in pixels, see `SegmentationUNetConfig.check_tile`.
        augmentation: how tiles are changed.
    """

    schedule: Schedule = Schedule(steps=1000, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99)
    batch_size: int = 1
    tile: int = 196
    augmentation: Augmentation = Augmentation()


def weighted_cross_entropy(scores: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """The mean over pixels of w(x) · (-ln p_{l(x)}(x)), eq. 1 of Ronneberger et al. 2015 over their number.

    Args:
        scores: (N, K, H, W), before the softmax.
        classes: (N, H, W) int64 in 0 … K-1.
        weights: (N, H, W).

    Returns:
        A scalar.
    """
    return (weights * F.cross_entropy(scores, classes, reduction="none")).mean()


def draw_tiles(
    data: Annotated,
    config: SegmentationUNetConfig,
    settings: SegmentationTraining,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random tiles of the pictures.

    Returns:
        x (N, C, n, n) float32, and of its middle, without the margin: classes (N, tile, tile) int64 and
        weights (N, tile, tile) float32.
    """
    margin, balance = config.margin, data.balance
    pictures, classes, weights = [], [], []
    for index in torch.randint(len(data.examples), (settings.batch_size,), generator=generator).tolist():
        one = data.examples[index]
        height, width = one.foreground.shape
        side = settings.tile + 2 * margin
        where = points(height, width, side, settings.tile, settings.augmentation, generator)
        middle = where[margin:-margin, margin:-margin]
        picture = sample(one.picture, where, "bilinear")
        pictures.append(recolour(picture, settings.augmentation, generator))
        # Classes are not averaged; the weight between cells is smooth.
        classes.append(sample(one.foreground[None].float(), middle, "nearest")[0].long())
        weights.append(balance[classes[-1]] + sample(one.border[None], middle, "bilinear")[0])
    return torch.stack(pictures), torch.stack(classes), torch.stack(weights)


def train_segmentation(
    config: SegmentationUNetConfig,
    data: Annotated,
    settings: SegmentationTraining,
    *,
    folder: str | Path,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> SegmentationUNet:
    """Train a network that tells cells from background.

    Args:
        config: its sizes.
        data: what is learned.
        settings: how.
        folder, resume, progress, checkpoint_seconds: as in `sdfast.training.trainer.train`.
        seed: of the first weights, the tiles and dropout.

    Returns:
        The model with averaged weights, in eval mode.

    Raises:
        ValueError: an inadmissible tile, another number of classes than 2, masks of one class only.
        ValueError, TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    try:
        config.check_tile(settings.tile)
    except ValueError as error:
        raise ValueError(f"tile: {error}") from None
    if config.out_channels != 2:
        raise ValueError(f"out_channels: got {config.out_channels}, expected 2, background and cells")
    check_count("batch_size", settings.batch_size)
    data.balance  # noqa: B018, raises before any work
    with seeded(seed):
        model = SegmentationUNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(generator: torch.Generator) -> Tensor:
        x, classes, weights = draw_tiles(data, config, settings, generator)
        # Dropout knows no generator but the global one.
        with seeded(int(torch.randint(2**62, (), generator=generator))):
            return weighted_cross_entropy(model(x), classes, weights)

    train(
        model,
        loss,
        settings.schedule,
        folder=folder,
        settings={
            "model": dataclasses.asdict(config),
            "batch_size": settings.batch_size,
            "tile": settings.tile,
            "augmentation": dataclasses.asdict(settings.augmentation),
            "data": data.fingerprint,
        },
        seed=seed,
        title="segmentation",
        resume=resume,
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )
    return model
