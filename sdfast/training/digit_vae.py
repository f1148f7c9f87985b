"""The recipe of `sdfast train vae`: a small VAE of scikit-learn's 8x8 handwritten digits.

With the Gaussian likelihood a picture is its grey values in [0, 1] and ln p(x) a density. With the Bernoulli
one it is black and white, grey values from the middle up being white, so that ln p(x) is the logarithm of a
probability. The two are not to be compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfast import __version__
from sdfast.figures import check_matplotlib
from sdfast.files import write_json
from sdfast.models import SimpleVAE, SimpleVAEConfig
from sdfast.models.checkpoint import save_model
from sdfast.training.data import Digits, load_digits
from sdfast.training.simple_vae import Evaluation, SimpleVAETraining, evaluate, train_simple_vae
from sdfast.training.vae_pictures import write_pictures

STEPS = 2000
STD = 0.15  # near the error of the decoder's means, so that neither term of the bound drowns the other
RECORD = "evaluation.json"
_CHECKPOINTS = "checkpoints"
_GREY_LEVELS = 16.0


@dataclasses.dataclass(frozen=True)
class DigitVAE:
    """What `train_digit_vae` made: the model, how good it is on held-out digits, and the pictures' files."""

    vae: SimpleVAE
    evaluation: Evaluation
    pictures: list[Path]


def train_digit_vae(
    output: str | Path,
    *,
    kind: str = "fc",
    likelihood: str = "bernoulli",
    covariance: str = "diagonal",
    latent_dim: int = 2,
    std: float = STD,
    steps: int = STEPS,
    samples: int = 500,
    seed: int = 0,
    plot: bool = False,
    resume: bool = True,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> DigitVAE:
    """Train on 1500 digits, evaluate on the other 297, and write both.

    `output` gets config.json and model.safetensors (`sdfast.models.checkpoint.load_model` with `SimpleVAE`),
    evaluation.json, the PNGs of `write_pictures` if asked for, and checkpoints/, from which a run that was
    stopped goes on, bit for bit.

    Args:
        kind, likelihood, covariance, latent_dim, std: as in `SimpleVAEConfig`; std is the Gaussian's alone.
        steps: of training.
        samples: K of the importance-weighted estimate.
        seed: of the split of the data, the first weights and everything drawn.
        resume: False forgets the checkpoints and starts anew.

    Raises:
        ImportError: scikit-learn, or for the latents' plane matplotlib, is not installed.
        ValueError: an argument is out of range, or `output` holds the run of other settings.
        TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    if plot and latent_dim == 2:
        check_matplotlib()
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    config = SimpleVAEConfig(
        kind=kind, covariance=covariance, likelihood=likelihood, latent_dim=latent_dim,
        std=std if likelihood == "gaussian" else 1.0,
    )  # fmt: skip
    defaults = SimpleVAETraining()
    training = dataclasses.replace(defaults, schedule=dataclasses.replace(defaults.schedule, steps=steps))
    output = Path(output)
    digits, holdout = load_digits(seed)
    vae = train_simple_vae(
        config, as_pictures(digits, likelihood), training, folder=output / _CHECKPOINTS,
        data_settings={"pictures": "scikit-learn digits"}, seed=seed, resume=resume, progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    held_out = as_pictures(holdout, likelihood)
    result = evaluate(vae, held_out, samples=samples, seed=seed)
    save_model(vae, output)
    record: dict[str, Any] = {"nats_per_picture": dataclasses.asdict(result), "steps": steps, "seed": seed}
    record |= {"torch": torch.__version__, "sdfast": __version__}
    write_json(output / RECORD, record)
    pictures = write_pictures(vae, held_out, holdout.labels, output, seed=seed) if plot else []
    return DigitVAE(vae, result, pictures)


def as_pictures(digits: Digits, likelihood: str) -> Tensor:
    """(N, 1, 8, 8) float32: grey in [0, 1] for "gaussian", 0 or 1 for "bernoulli"."""
    grey = digits.images[:, None] / _GREY_LEVELS
    return (grey >= 0.5).float() if likelihood == "bernoulli" else grey
