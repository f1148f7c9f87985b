"""What a run shows while it runs: its loss in TensorBoard, and pictures by the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdfast.images import grid, save_png, to_pil
from sdfast.models import AutoencoderKL
from sdfast.pipelines import StableDiffusion
from sdfast.training.trainer import Step

Draw = Callable[[], list[Image.Image]]


class Watcher:
    """The `on_step` of the main process.

    Args:
        folder: pictures go to folder/samples, TensorBoard's events to folder/tensorboard.
        tensorboard: write events.
        draw: makes pictures with the model as it is.
        draw_steps: every so many steps, and at the end; None draws none.
        steps: of the run.

    Raises:
        ImportError: tensorboard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool, draw: Draw, draw_steps: int | None, steps: int
    ) -> None:
        self._folder, self._draw, self._draw_steps, self._steps = folder, draw, draw_steps, steps
        self._summary_writer = _summary_writer() if tensorboard else None
        self._writer: Any = None

    def __call__(self, step: Step) -> None:
        """Write what there is to write after this step."""
        if self._summary_writer is not None:
            if self._writer is None:  # what a run that was killed wrote beyond its checkpoint is struck out
                self._writer = self._summary_writer(self._folder / "tensorboard", purge_step=step.number)
            self._writer.add_scalar("loss", step.loss, step.number)
            self._writer.add_scalar("learning_rate", step.learning_rate, step.number)
        last = step.number == self._steps
        if self._draw_steps is not None and (last or step.number % self._draw_steps == 0):
            with step.averaged():
                sheet = grid(self._draw())
            (self._folder / "samples").mkdir(parents=True, exist_ok=True)
            save_png(sheet, self._folder / "samples" / f"step-{step.number:08d}.png")
            if self._writer is not None:
                self._writer.add_image(
                    "samples", np.asarray(sheet.convert("RGB")), step.number, dataformats="HWC"
                )
        if self._writer is not None:
            self._writer.flush()  # a checkpoint of this step may follow, and a kill
            if last:
                self._writer.close()


def drawer(pipe: StableDiffusion, prompts: Sequence[str], *, side: int | None, steps: int, seed: int) -> Draw:
    """One square picture of each prompt, from the same noise every time; `side` None is the model's own."""

    def draw() -> list[Image.Image]:
        seeds = [seed] * len(prompts)
        return list(pipe.text_to_image(prompts, height=side, width=side, steps=steps, seed=seeds).images)

    return draw


def reconstructor(vae: AutoencoderKL, pictures: Callable[[], torch.Tensor]) -> Draw:
    """Each picture, then what the autoencoder makes of it."""

    @torch.no_grad()
    def draw() -> list[Image.Image]:
        x = pictures().to(vae.encoder.conv_in.weight)
        both = torch.stack([x, vae.decode(vae.encode(x).mode())], dim=1).flatten(0, 1)
        return to_pil((both / 2 + 0.5).clamp(0, 1))

    return draw


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard: TensorBoard is not installed: pip install sdfast[train]") from error
    return SummaryWriter
