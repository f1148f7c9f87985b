"""The recipe of `sdfast train ldm`: a latent diffusion model goes on learning, from images with captions.

    U-Net: Algorithm 1 on the latents of the frozen VAE, conditioned by the frozen text encoder
    VAE:   the negative ELBO (eq. 8-9) with a small weight on its KL term

In one process or in those that torchrun started; the gradient is the same, to rounding.
"""

from __future__ import annotations

import dataclasses
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
from sdfast.training.buckets import Batches
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
from sdfast.training.optimizer import Schedule
from sdfast.training.output import check_output, write_output
from sdfast.training.trainer import train_steps
from sdfast.training.vae import scaling_factor
from sdfast.training.watching import Watcher, drawer, reconstructor

_SAMPLE_STEPS = 20
_DRAWN = 8
_MEASURED = 500  # pictures are enough to know the latents' variance


@dataclasses.dataclass(frozen=True)
class LDMTraining:
    """What decides the result of `train_ldm`, to rounding.

    Attributes:
        schedule: length, rates and average of the weights.
        phase: "unet" or "vae".
        batch_size: images in a step, over all processes.
        resolution: side of the square, in pixels; None for the model's own.
        aspect_buckets: cut images to the nearest of several shapes of as many pixels, instead of to a square.
        prediction: "epsilon" or "v_prediction"; None for the model's own. Another one has to be learned.
        min_snr_gamma: γ of Hang et al. 2023; None weighs all timesteps 1.
        caption_dropout: the share of captions replaced by the empty one, for guidance.
        kl_weight: of the KL term in the phase "vae".
        precision: see `sdfast.training.distributed.Parallel`.
        from_scratch: forget the weights of what is trained, and keep its sizes.
        lora_rank: train updates of this rank of the U-Net's attention instead of its weights (`sdfast.lora`).
    """

    schedule: Schedule = Schedule(steps=1000, learning_rate=1e-5, decay="constant", ema_decay=0.9999)
    phase: str = "unet"
    batch_size: int = 16
    resolution: int | None = None
    aspect_buckets: bool = False
    prediction: str | None = None
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.1
    kl_weight: float = 1e-6
    precision: str = "fp32"
    from_scratch: bool = False
    lora_rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Running:
    """How `train_ldm` is carried out; changes no more than rounding, and may differ from start to start.

    Attributes:
        micro_batch: images in one forward; None takes a process's whole share of the batch.
        recompute: activations are computed twice instead of kept.
        parallel: "ddp" or "fsdp" over the processes of torchrun; None in one.
        device: "cpu" or "cuda".
        checkpoint_seconds, checkpoint_steps: as in `sdfast.training.trainer.train`.
        tensorboard: write events into the run folder.
        sample_steps: draw pictures every so many steps; None draws none.
        sample_prompts: what is drawn; the captions of the first images when empty.
        resume: False deletes the run's checkpoints and starts anew.
        progress: show progress bars.
    """

    micro_batch: int | None = None
    recompute: bool = False
    parallel: str | None = None
    device: str = "cpu"
    checkpoint_seconds: float = 300.0
    checkpoint_steps: int | None = None
    tensorboard: bool = False
    sample_steps: int | None = None
    sample_prompts: tuple[str, ...] = ()
    resume: bool = True
    progress: bool = True


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

    May be killed at any moment: called again with the same arguments it goes on from the last checkpoint, on
    the same number of processes to the same bits, on another to the same numbers but for rounding.

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
    _check_shares(training, running, group)
    if training.phase == "vae":  # it learns from pictures alone
        options = dataclasses.replace(options, allow_missing_captions=True)
    listed = find_images(data, cache, options, group, progress=running.progress)
    parts = load_parts(
        model, prediction=training.prediction, device=group.device,
        anew=(training.phase, seed) if training.from_scratch else None,
    )  # fmt: skip
    choose_trained(parts, training.phase, training.lora_rank, seed)
    shapes = image_shapes(
        parts["unet"], parts["vae"], training.resolution, aspect_buckets=training.aspect_buckets
    )
    run = _run_folder(run_dir / training.phase, training, listed, parts, group, seed)
    if running.resume:
        run.refuse_other_settings()
    images = TrainingImages(listed, shapes)
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


def _check_shares(training: LDMTraining, running: Running, group: Processes) -> None:
    if training.phase not in ("unet", "vae"):
        raise ValueError(f"phase: got {training.phase!r}, expected unet or vae")
    if training.lora_rank is not None and (training.phase, training.from_scratch) != ("unet", False):
        raise ValueError("lora_rank: updates the weights of a U-Net; not in another phase, nor from scratch")
    if training.lora_rank is not None and running.parallel == "fsdp":
        raise ValueError("lora_rank: not under fsdp; what ddp keeps of a LoRA in every process is small")
    if group.world > 1 and running.parallel is None:
        raise ValueError(f"parallel: {group.world} processes were started, expected ddp or fsdp")
    if group.world == 1 and running.parallel is not None:
        raise ValueError(
            f"parallel: {running.parallel!r} needs several processes: torchrun --nproc-per-node N -m sdfast"
            " train ldm ..."
        )
    if running.parallel == "fsdp" and running.sample_steps is not None:
        raise ValueError("sample_steps: not under fsdp, whose weights are spread over the processes")
    if training.batch_size % group.world:
        raise ValueError(
            f"batch_size: got {training.batch_size}, expected a multiple of {group.world}, one share for each"
            " process"
        )


def _run_folder(
    folder: Path,
    training: LDMTraining,
    images: Sequence[CaptionedImage],
    parts: Mapping[str, Any],
    group: Processes,
    seed: int,
) -> ShardedRunFolder:
    weights = {name: module_fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    schedule = {key: value for key, value in parts["scheduler"].items() if not key.startswith("_")}
    settings = {
        **dataclasses.asdict(training),
        "seed": seed,
        "data": fingerprint(images),
        "model": weights,
        "noise": schedule,
    }
    return ShardedRunFolder(folder, settings, group)


def _measure(vae: Any, work: _Work) -> None:
    """A new autoencoder has latents of another size, which its scaling factor makes 1."""
    weight = vae.encoder.conv_in.weight
    with torch.no_grad():
        squares = [
            scaling_factor(vae.encode(work.pixels(i)[None].to(weight))) ** -2
            for i in range(min(len(work.images.images), _MEASURED))
        ]
    vae.config = dataclasses.replace(vae.config, scaling_factor=(sum(squares) / len(squares)) ** -0.5)


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
        draw = drawer(pipe, prompts, steps=_SAMPLE_STEPS, seed=seed)
    return Watcher(
        folder, tensorboard=running.tensorboard, draw=draw, draw_steps=running.sample_steps,
        steps=training.schedule.steps,
    )  # fmt: skip
