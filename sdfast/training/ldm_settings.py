"""The settings of `train_ldm`: what decides its result, and how it is carried out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from sdfast.request import check_count
from sdfast.training.distributed import PARALLEL, PRECISIONS, Processes
from sdfast.training.optimizer import Schedule

PHASES = ("unet", "vae")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclasses.dataclass(frozen=True)
class LDMTraining:
    """What decides the result of `train_ldm`, to rounding.

    Attributes:
        schedule: length, rates and average of the weights.
        phase: "unet" or "vae".
        batch_size: images in a step, over all processes.
        resolution: side of the square, in pixels; None for the model's own.
        aspect_buckets: cut images to the nearest of several shapes of as many pixels, instead of to a square.
        prediction: "epsilon" or "v_prediction"; None for the model's own. Another one has to be learned, by
            all of the U-Net: neither the VAE nor the file of a LoRA would tell of it.
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

    def __post_init__(self) -> None:
        _check_choice("phase", self.phase, PHASES)
        _check_choice("precision", self.precision, PRECISIONS)
        check_count("batch_size", self.batch_size)
        for name in ("resolution", "lora_rank"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.lora_rank is not None and (self.phase, self.from_scratch) != ("unet", False):
            raise ValueError(
                "lora_rank: updates the weights of a U-Net; not in another phase, nor from scratch"
            )
        if self.prediction is not None:
            _check_choice("prediction", self.prediction, PREDICTIONS)
            if self.phase != "unet" or self.lora_rank is not None:
                what = "a LoRA" if self.lora_rank is not None else "the VAE"
                raise ValueError(
                    f"prediction: got {self.prediction!r} with {what}, which keeps the model's; leave it out"
                )
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < math.inf:
            raise ValueError(f"min_snr_gamma: got {self.min_snr_gamma}, expected a number above 0")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: got {self.caption_dropout}, expected 0 to 1")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight: got {self.kl_weight}, expected 0 or more")


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

    def __post_init__(self) -> None:
        if self.parallel is not None:
            _check_choice("parallel", self.parallel, PARALLEL)
        for name in ("micro_batch", "checkpoint_steps", "sample_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not self.checkpoint_seconds > 0:
            raise ValueError(f"checkpoint_seconds: got {self.checkpoint_seconds}, expected a number above 0")


def check_shares(training: LDMTraining, running: Running, group: Processes) -> None:
    """ValueError where the settings do not fit each other, or the processes that there are."""
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


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(choices)}")
