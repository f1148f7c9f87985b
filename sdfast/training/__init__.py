"""Training, and what each kind of it is told. The command is `sdfast train` (and `sdfast segment train`).

    train_ldm             a latent diffusion model of text and images: U-Net, VAE, or a LoRA
    train_digits          the small model that ships with sdfast
    train_digit_vae       the autoencoders of the report's section 2, on handwritten digits
    train_simple_vae      the same on tensors of your own
    train_ddpm            a DDPM of your own tensors
    train_segmentation    the U-Net of 2015

Names load when they are first used: the command line checks its options without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdfast.training.ddpm import DDPMTraining, train_ddpm
    from sdfast.training.digit_vae import train_digit_vae
    from sdfast.training.digits import train_digits
    from sdfast.training.ldm import Trained, train_ldm
    from sdfast.training.ldm_data import DataOptions
    from sdfast.training.ldm_settings import LDMTraining, Running
    from sdfast.training.optimizer import Schedule
    from sdfast.training.segmentation import SegmentationTraining, train_segmentation
    from sdfast.training.simple_vae import SimpleVAETraining, train_simple_vae

_HOMES = {
    "DDPMTraining": "ddpm",
    "DataOptions": "ldm_data",
    "LDMTraining": "ldm_settings",
    "Running": "ldm_settings",
    "Schedule": "optimizer",
    "SegmentationTraining": "segmentation",
    "SimpleVAETraining": "simple_vae",
    "Trained": "ldm",
    "train_ddpm": "ddpm",
    "train_digit_vae": "digit_vae",
    "train_digits": "digits",
    "train_ldm": "ldm",
    "train_segmentation": "segmentation",
    "train_simple_vae": "simple_vae",
}
__all__ = [  # noqa: F822
    "DDPMTraining",
    "DataOptions",
    "LDMTraining",
    "Running",
    "Schedule",
    "SegmentationTraining",
    "SimpleVAETraining",
    "Trained",
    "train_ddpm",
    "train_digit_vae",
    "train_digits",
    "train_ldm",
    "train_segmentation",
    "train_simple_vae",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdfast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdfast.training.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
