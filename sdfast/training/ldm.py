"""The recipe of `sdfast train ldm`: a latent diffusion model goes on learning, from images with captions.

    U-Net: Algorithm 1 on the latents of the frozen VAE, conditioned by the frozen text encoder
    VAE:   the negative ELBO (eq. 8-9) with a small weight on its KL term

In one process or in those that torchrun started; the gradient is the same, to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import __version__
from sdfast.diffusion import NoiseSchedule
from sdfast.lora import save_lora
from sdfast.models import AutoencoderKL
from sdfast.models.checkpoint import save_components
from sdfast.pipelines import StableDiffusion
from sdfast.request import SIZE_MULTIPLE, check_seed
from sdfast.training.buckets import Batches, Size
from sdfast.training.checkpoints import ShardedRunFolder, seconds_of
from sdfast.training.distributed import Parallel, Processes, processes
from sdfast.training.images import CaptionedImage, fingerprint
from sdfast.training.latents import LatentCache
from sdfast.training.ldm_data import DataOptions, TrainingImages, find_images
from sdfast.training.ldm_losses import Autoencoding, Denoising, SharedLoss
from sdfast.training.ldm_parts import (
    choose_trained,
    components_of,
    image_shapes,
    load_parts,
    module_fingerprint,
    texts_of,
    whole,
)
from sdfast.training.ldm_settings import LDMTraining, Running, check_shares
from sdfast.training.output import check_output, write_output
from sdfast.training.trainer import train_steps
from sdfast.training.watching import Watcher, drawer, reconstructor

_SAMPLE_STEPS = 20
_DRAWN = 8
_MEASURED = 500  # pictures are enough to know the latents' variance


@dataclasses.dataclass(frozen=True)
class Trained:
    """
    Attributes:
        output: the diffusers folder that was written.
        images: how many took part.
        skipped: name of an image that could not be read -> why.
        is_main: whether this process is the one that speaks.
    """

    output: Path
    images: int
    skipped: Mapping[str, str]
    is_main: bool


def train_ldm(
    data: str | Path,
    output: str | Path,
    *,
    model: str | Path,
    run_dir: str | Path,
    training: LDMTraining = LDMTraining(),  # noqa: B008
    running: Running = Running(),  # noqa: B008
    options: DataOptions = DataOptions(),  # noqa: B008
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> Trained:
    """Train the U-Net or the VAE of a pipeline, or a LoRA, and write it with the averaged weights.

    May be killed at any moment: called again with the same arguments it goes on from the last checkpoint, to
    the same numbers but for rounding. On the CPU, in one process or again in two, these are the same bits.

    Args:
        data: a folder of images, or a Hugging Face data set.
        output: the folder to write, a pipeline or a LoRA; it appears whole or not at all, and one it wrote
            before is replaced.
        model: a diffusers folder or a hub id.
        run_dir: checkpoints, samples and events go to run_dir/unet or run_dir/vae; all processes reach it.
        training, running, options: what, how, and of which images.
        cache_dir: of latents and streamed images; run_dir/cache when None. Runs may share one.
        seed: of everything random.

    Raises:
        OSError: folders that are not there or cannot be written.
        ValueError: settings that do not fit each other, no usable image, missing captions, or checkpoints of
            another run in `run_dir`.
        CheckpointError: `model` cannot be used.
        ImportError: datasets or tensorboard is needed and not installed.
        TrainingInterrupted, FloatingPointError: as in `sdfast.training.trainer.train`.
    """
    output, run_dir = Path(output), Path(run_dir)
    check_output(output)
    check_seed("seed", seed)
    cache = Path(cache_dir) if cache_dir is not None else run_dir / "cache"
    with processes(running.device) as group:
        # What holds a process group has to be gone before it is.
        return _train(data, output, model, run_dir, training, running, options, cache, seed, group)


def _train(
    data: str | Path,
    output: Path,
    model: str | Path,
    run_dir: Path,
    training: LDMTraining,
    running: Running,
    options: DataOptions,
    cache: Path,
    seed: int,
    group: Processes,
) -> Trained:
    check_shares(training, running, group)
    if training.phase == "vae":  # it learns from pictures alone
        options = dataclasses.replace(options, allow_missing_captions=True)
    listed = find_images(data, cache, options, group, progress=running.progress)
    parts = load_parts(
        model, prediction=training.prediction, device=group.device,
        anew=(training.phase, seed) if training.from_scratch else None,
    )  # fmt: skip
    shapes = image_shapes(
        parts["unet"], parts["vae"], training.resolution, aspect_buckets=training.aspect_buckets
    )
    if training.phase == "unet" and training.resolution is not None and running.sample_steps is not None:
        multiple = math.lcm(SIZE_MULTIPLE, parts["vae"].downsampling)
        if training.resolution % multiple:
            raise ValueError(
                f"sample_steps: pictures are drawn at multiples of {multiple}, got resolution"
                f" {training.resolution}; draw none, or take another one"
            )
    # One process decides for all which images there are: a disk may fail one machine and not the next.
    images, content = group.main_first(lambda: _readable(listed, shapes))
    run = _run_folder(run_dir / training.phase, training, content, parts, group, seed)
    if running.resume:
        run.refuse_other_settings()
    choose_trained(parts, training.phase, training.lora_rank, seed)
    if training.phase == "unet" and training.from_scratch and training.resolution is not None:
        parts["unet"].config = dataclasses.replace(
            parts["unet"].config, sample_size=training.resolution // parts["vae"].downsampling
        )  # what it draws where nobody says a size
    work = _Work(images, parts, training, running, cache, group, seed)
    train_steps(
        work.module,
        work.losses,
        training.schedule,
        run=run,
        processes=group,
        title=training.phase,
        resume=running.resume,
        checkpoint_seconds=running.checkpoint_seconds,
        checkpoint_steps=running.checkpoint_steps,
        progress=running.progress and group.is_main,
        on_step=_watcher(work, run.folder, running, training, seed) if group.is_main else None,
    )
    # Every process has its share of the weights, and of what could not be read.
    module = whole(work.module, parallel=running.parallel, is_main=group.is_main)
    skipped = {name: why for part in group.gather(images.skipped) for name, why in part.items()}

    def write() -> None:
        if training.phase == "vae" and training.from_scratch:
            _measure(module, work)
        record = {
            "steps": training.schedule.steps,
            "images": len(listed) - len(skipped),
            "skipped": sorted(skipped),
            "processes": group.world,
            "seconds": round(seconds_of(run.folder), 1),
            "settings": run.settings,
            "torch": torch.__version__,
            "sdfast": __version__,
        }
        if training.lora_rank is not None:
            write_output(output, lambda folder: save_lora(folder, {"unet": module}), record)
            return
        components = components_of(parts, {training.phase: module})
        write_output(output, lambda folder: save_components(folder, components), record)

    group.main_first(write)
    return Trained(output, len(listed) - len(skipped), skipped, group.is_main)


class _Work:
    """Images, model and loss, ready to step."""

    def __init__(
        self,
        images: TrainingImages,
        parts: dict[str, Any],
        training: LDMTraining,
        running: Running,
        cache: Path,
        group: Processes,
        seed: int,
    ) -> None:
        vae: AutoencoderKL = parts["vae"]
        self.images, self.parts, self.vae, self.texts = images, parts, vae, texts_of(parts)
        self.module: nn.Module = parts[training.phase]
        latents = LatentCache(cache / "latents", vae, module_fingerprint(vae))
        if training.phase == "unet":
            images.drop(latents.fill(images.images, images.sizes, group, progress=running.progress))
        model = Parallel(
            self.module, running.parallel, training.precision, group, recompute=running.recompute
        )
        mean_loss: Denoising | Autoencoding
        if training.phase == "unet":
            mean_loss = Denoising(
                model, images.images, images.own_sizes, images.sizes,
                lambda i: latents.moments(images.images[i], images.sizes[i]), self.texts,
                NoiseSchedule.from_config(parts["scheduler"]), vae.config.scaling_factor,
                training.caption_dropout, training.min_snr_gamma, group.device,
            )  # fmt: skip
        else:
            mean_loss = Autoencoding(model, vae, self.pixels, training.kl_weight, group.device)
        self.losses = SharedLoss(
            model, Batches(images.buckets, training.batch_size, seed), training.batch_size,
            running.micro_batch, mean_loss, group, seed,
        )  # fmt: skip

    def pixels(self, index: int) -> Tensor:
        """(C, H, W) in [-1, 1]."""
        return self.images.pixels(index, self.vae.config.in_channels)


def _readable(listed: Sequence[CaptionedImage], shapes: Sequence[Size]) -> tuple[TrainingImages, str]:
    """The images that can be opened, and what tells them from others."""
    images = TrainingImages(listed, shapes)
    return images, fingerprint(images.images)


def _run_folder(
    folder: Path,
    training: LDMTraining,
    content: str,
    parts: Mapping[str, Any],
    group: Processes,
    seed: int,
) -> ShardedRunFolder:
    weights = {name: module_fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    schedule = {key: value for key, value in parts["scheduler"].items() if not key.startswith("_")}
    settings = {
        **dataclasses.asdict(training),
        "seed": seed,
        "data": content,
        "model": weights,
        "noise": schedule,
    }
    return ShardedRunFolder(folder, settings, group)


def _measure(vae: Any, work: _Work) -> None:
    """A new autoencoder has latents of another size: its scaling factor makes their standard deviation 1.

    As `sdfast.training.vae.scaling_factor`, over pictures that need not have one size.
    """
    weight = vae.encoder.conv_in.weight
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with torch.no_grad():
        for i in range(min(len(work.images.images), _MEASURED)):
            posterior = vae.encode(work.pixels(i)[None].to(weight))
            mean, variance = posterior.mean.double().cpu(), posterior.logvar.double().exp().cpu()
            sums += torch.stack([mean.sum(), mean.square().sum(), variance.sum()])
            count += mean.numel()
    mean, square, variance = sums / count
    factor = float((square - mean**2 + variance).rsqrt())
    vae.config = dataclasses.replace(vae.config, scaling_factor=factor)


def _watcher(work: _Work, folder: Path, running: Running, training: LDMTraining, seed: int) -> Watcher:
    images = work.images
    first = range(min(len(images.images), _DRAWN))
    if training.phase == "vae":
        same = [i for i in first if images.sizes[i] == images.sizes[0]]
        draw = reconstructor(work.vae, lambda: torch.stack([work.pixels(i) for i in same]))
    else:
        prompts = running.sample_prompts or tuple(images.images[i].caption for i in first)
        pipe = StableDiffusion(
            work.parts["unet"], work.vae, work.texts.encoders, work.texts.tokenizers,
            work.parts["scheduler"], zero_empty_negative=work.texts.zero_empty, cuda_graphs=False,
        )  # fmt: skip
        draw = drawer(pipe, prompts, side=training.resolution, steps=_SAMPLE_STEPS, seed=seed)
    return Watcher(
        folder, tensorboard=running.tensorboard, draw=draw, draw_steps=running.sample_steps,
        steps=training.schedule.steps,
    )  # fmt: skip
