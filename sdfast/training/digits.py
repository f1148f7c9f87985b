"""The recipe of `sdfast train digits`: a latent diffusion model of handwritten digits, in a diffusers folder.

Autoencoder first (3x32x32 to 4x8x8), then U-Net and text encoder on its latents. Everything is Stable
Diffusion's architecture with small numbers; both phases together take some twenty minutes on two CPU cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sdfast import __version__
from sdfast.diffusion import NoiseSchedule
from sdfast.models import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig
from sdfast.models.checkpoint import save_components
from sdfast.tokenizer import CLIPTokenizer
from sdfast.training.captions import caption_ids, write_tokenizer
from sdfast.training.data import IMAGE_SIZE, load_digits, training_set
from sdfast.training.ddpm import CaptionedLatents, DDPMTraining, train_ddpm
from sdfast.training.output import check_output, write_output
from sdfast.training.run_folder import seconds_spent
from sdfast.training.trainer import Schedule
from sdfast.training.vae import VAETraining, encode, train_vae

VAE_STEPS = 1000
UNET_STEPS = 4500
_COPIES = 7  # augmented versions of each training picture
_WIDTH = 64  # of the text

VAE_CONFIG = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 48),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=IMAGE_SIZE,
    force_upcast=False,
)
UNET_CONFIG = UNet2DConditionConfig(
    sample_size=IMAGE_SIZE // 4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(48, 64),
    layers_per_block=1,
    norm_num_groups=16,
    cross_attention_dim=_WIDTH,
    attention_head_dim=2,
)
# The paper's schedule (§3.3). It ends in almost pure noise, so sampling starts where training ended.
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def train_digits(
    output: str | Path,
    *,
    run_dir: str | Path,
    seed: int = 0,
    vae_steps: int = VAE_STEPS,
    unet_steps: int = UNET_STEPS,
    resume: bool = True,
    threads: int | None = 2,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> Path:
    """Train on scikit-learn's digits and write a pipeline that sdfast and diffusers load.

    May be killed at any moment: called again with the same arguments it goes on from the last checkpoint
    and gives the same weights, bit for bit, as a run that was left alone.

    Args:
        output: the folder to write. It appears whole or not at all; one it wrote before is replaced.
            Beside the pipeline it holds training.json: options, seconds, versions.
        run_dir: where checkpoints go (some 50 MB).
        seed: of everything random: the data split, the first weights, the steps.
        vae_steps, unet_steps: length of the two phases.
        resume: False forgets the checkpoints in `run_dir` and starts anew.
        threads: CPU threads; the networks are too small for many, and 1 is faster where other programs keep
            the cores busy. None leaves torch's setting alone.
        progress: show progress bars.
        checkpoint_seconds: the age at which a checkpoint is replaced.

    Returns:
        `output` as a path.

    Raises:
        FileExistsError: `output` exists and is no pipeline that this function wrote.
        ImportError: scikit-learn is not installed.
        ValueError: a step count below 1, or `run_dir` holds a run of other settings.
        TrainingInterrupted: Ctrl-C; the text says how to go on.
    """
    output, run_dir = Path(output), Path(run_dir)
    check_output(output)
    if not resume:  # both phases at once: the second belongs to the first that led to it
        shutil.rmtree(run_dir / "unet", ignore_errors=True)
    common: dict[str, Any] = {
        "seed": seed,
        "resume": resume,
        "progress": progress,
        "checkpoint_seconds": checkpoint_seconds,
    }
    with _threads(threads), tempfile.TemporaryDirectory() as scratch:
        vocabulary = write_tokenizer(scratch)
        tokenizer = CLIPTokenizer.from_folder(scratch)
        pictures, labels = training_set(load_digits(seed)[0], copies=_COPIES, seed=seed)

        vae_training = _with_steps(VAETraining(), vae_steps)
        unet_training = _with_steps(DDPMTraining(), unet_steps)
        source = {"pictures": "scikit-learn digits", "copies": _COPIES}
        vae = train_vae(
            VAE_CONFIG, pictures, vae_training, folder=run_dir / "vae", data_settings=source, **common
        )

        captions = caption_ids(tokenizer, seed)
        posterior = encode(vae, pictures)
        data = CaptionedLatents(
            posterior=posterior,
            scaling_factor=vae.config.scaling_factor,
            labels=labels,
            captions=captions,
            empty_caption=tokenizer([""])[0],
            settings={
                **source,
                "autoencoder": dataclasses.asdict(vae_training),
                "captions": _fingerprint(captions),
                "latents": _fingerprint(posterior.mean),  # a U-Net of another autoencoder is refused
            },
        )
        model = train_ddpm(
            UNET_CONFIG,
            text_config(vocabulary),
            data,
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            unet_training,
            folder=run_dir / "unet",
            **common,
        )
        record = {
            "seed": seed,
            "vae_steps": vae_steps,
            "unet_steps": unet_steps,
            "threads": torch.get_num_threads(),
            "seconds": round(sum(seconds_spent(run_dir / phase) for phase in ("vae", "unet")), 1),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "sdfast": __version__,
        }
        components = {
            "_class_name": "StableDiffusionPipeline",
            "vae": vae,
            "text_encoder": model.text_encoder,
            "tokenizer": Path(scratch),
            "unet": model.unet,
            "scheduler": SCHEDULER_CONFIG,
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        }
        write_output(output, lambda folder: save_components(folder, components), record)
    return output


def _fingerprint(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def text_config(vocabulary: int) -> CLIPTextConfig:
    """The text encoder's sizes; the last two ids of the vocabulary are begin and end of text."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=_WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _with_steps(training: Any, steps: int) -> Any:
    schedule: Schedule = training.schedule
    return dataclasses.replace(training, schedule=dataclasses.replace(schedule, steps=steps))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
