"""The command line of `sdfast train ldm`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from sdfast._arguments import check_counts, check_folder
from sdfast.request import check_seed
from sdfast.training.output import check_output

_DESCRIPTION = """\
Trains the U-Net, or the VAE, of a latent diffusion model on images with captions: a folder with a .txt beside
each image or a metadata.jsonl, or a Hugging Face data set. Stopped at any moment, the same command goes on.
On several GPUs or machines: torchrun --nproc-per-node N -m sdfast train ldm ... --parallel ddp"""


def add_parser(models: Any) -> None:
    """Add `ldm` to what `sdfast train` can train."""
    parser = models.add_parser(
        "ldm", help="a latent diffusion model, on images with captions",
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    _add_running(parser.add_argument_group("running"))
    parser.set_defaults(run=run)


def _add_data(group: Any) -> None:
    add = group.add_argument
    add("--data", required=True, metavar="FOLDER|ID", help="images with captions, or a data set's hub id")
    add("--model", metavar="DIR|ID", help="diffusers folder or hub id to start from (the shipped digits)")
    add("-o", "--output", type=Path, default=Path("my-ldm"), help="pipeline folder to write (%(default)s)")
    add("--run-dir", type=Path, help="where checkpoints go (OUTPUT-run)")
    add("--cache-dir", type=Path, help="where latents and streamed images go (RUN_DIR/cache)")
    add("--split", help="of a data set (train)")
    add("--image-column", help="of a data set (its first column of images)")
    add("--caption-column", help="of a data set or metadata.jsonl (text, caption or prompt)")
    add("--max-images", type=int, help="take only so many")
    add("--allow-missing-captions", action="store_true", help="train images without one as if it were empty")


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--phase", choices=("unet", "vae"), default="unet", help="what is trained (%(default)s)")
    add("--from-scratch", action="store_true", help="begin with fresh weights of the same sizes")
    add("--lora", type=int, metavar="RANK", help="train a LoRA of this rank for the U-Net instead")
    add("--steps", type=int, default=1000, help="optimizer steps of the whole run (%(default)s)")
    add("--batch-size", type=int, default=16, help="images in a step, over all processes (%(default)s)")
    add("--resolution", type=int, help="side of the square, in pixels (the model's own)")
    add("--aspect-buckets", action="store_true", help="shapes of as many pixels instead of the square alone")
    add("--lr", type=float, default=1e-5, help="highest learning rate (%(default)s)")
    add("--lr-schedule", choices=("constant", "linear", "cosine"), default="constant", help="(%(default)s)")
    add("--warmup", type=int, default=100, metavar="STEPS", help="in which the rate rises (%(default)s)")
    add("--ema-decay", type=float, default=0.9999, help="of the averaged weights, 0: none (%(default)s)")
    add("--prediction", choices=("epsilon", "v_prediction"), help="what the U-Net learns (the model's own)")
    add("--min-snr-gamma", type=float, metavar="G", help="weigh timesteps by min(SNR, G); 5 is usual")
    add("--caption-dropout", type=float, metavar="P", help="share left out (0.1)")
    add("--kl-weight", type=float, help="with --phase vae (1e-6)")
    precisions = "bf16: of weights and all; autocast: where torch.autocast has it (%(default)s)"
    add("--precision", choices=("fp32", "bf16", "autocast"), default="fp32", help=precisions)
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")


def _add_running(group: Any) -> None:
    add = group.add_argument
    add("--micro-batch", type=int, help="images in one forward; gradients accumulate (a process's share)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more arithmetic")
    add("--parallel", choices=("ddp", "fsdp"), help="under torchrun: copies of the model, or shards")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--checkpoint-seconds", type=float, default=300.0, help="age at which one is replaced (%(default)s)")
    add("--checkpoint-steps", type=int, help="also every so many steps")
    add("--tensorboard", action="store_true", help="loss and samples in RUN_DIR/PHASE/tensorboard")
    add("--sample-every", type=int, metavar="STEPS", help="draw pictures into RUN_DIR/PHASE/samples")
    add("--sample-prompt", action="append", default=[], metavar="TEXT", help="drawn (the first captions)")
    add("--restart", action="store_true", help="forget the run's checkpoints and start anew")


def run(arguments: argparse.Namespace) -> int:
    """
    Returns:
        0.

    Raises:
        ValueError, OSError, ImportError: bad arguments or data, see `sdfast.training.ldm.train_ldm`.
    """
    _check(arguments)
    import torch

    from sdfast.loading import digits_folder
    from sdfast.training.ldm import DataOptions, LDMTraining, Running, train_ldm
    from sdfast.training.optimizer import Schedule

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch finds no CUDA device here")
    schedule = Schedule(
        steps=arguments.steps, learning_rate=arguments.lr, warmup_steps=arguments.warmup,
        decay=arguments.lr_schedule, ema_decay=arguments.ema_decay,
    )  # fmt: skip
    training = LDMTraining(
        schedule=schedule,
        lora_rank=arguments.lora,
        **_taken(
            arguments, "phase", "batch_size", "resolution", "aspect_buckets", "prediction", "min_snr_gamma",
            "caption_dropout", "kl_weight", "precision", "from_scratch",
        ),
    )  # fmt: skip
    running = Running(
        recompute=arguments.gradient_checkpointing,
        sample_steps=arguments.sample_every,
        sample_prompts=tuple(arguments.sample_prompt),
        resume=not arguments.restart,
        **_taken(
            arguments, "micro_batch", "parallel", "device", "checkpoint_seconds", "checkpoint_steps",
            "tensorboard",
        ),
    )  # fmt: skip
    options = DataOptions(
        most_images=arguments.max_images,
        **_taken(arguments, "split", "image_column", "caption_column", "allow_missing_captions"),
    )
    trained = train_ldm(
        arguments.data, arguments.output, model=arguments.model or digits_folder(),
        run_dir=_run_dir(arguments), training=training, running=running, options=options,
        cache_dir=arguments.cache_dir, seed=arguments.seed,
    )  # fmt: skip
    if trained.is_main:
        for name, reason in sorted(trained.skipped.items()):
            print(f"skipped: {name}: {reason}")
        skipped = f"; {len(trained.skipped)} could not be read" if trained.skipped else ""
        model = shlex.quote(os.path.join(os.curdir, trained.output))
        use = f"sdfast generate PROMPT --model {model}"
        if arguments.lora is not None:
            base = f"--model {shlex.quote(arguments.model)} " if arguments.model else ""
            use = f"sdfast generate PROMPT {base}--lora {model}"
        print(f"{trained.output}: trained on {trained.images} images{skipped}; try: {use}")
    return 0


def _taken(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was given; of the rest `train_ldm` has the defaults."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _run_dir(arguments: argparse.Namespace) -> Path:
    output: Path = arguments.output
    return arguments.run_dir or output.with_name(f"{output.name}-run")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before torch is imported."""
    counts = ("steps", "batch_size", "resolution", "max_images", "micro_batch", "threads", "lora")
    check_counts(arguments, *counts, "checkpoint_steps", "sample_every")
    check_seed("--seed", arguments.seed)
    for name in ("lr", "min_snr_gamma", "checkpoint_seconds"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected a number above 0")
    for name in ("warmup", "kl_weight"):
        value = getattr(arguments, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 0 or more")
    if not 0 <= arguments.ema_decay < 1:
        raise ValueError(f"--ema-decay: got {arguments.ema_decay}, expected a number in [0, 1)")
    if arguments.caption_dropout is not None and not 0 <= arguments.caption_dropout <= 1:
        raise ValueError(f"--caption-dropout: got {arguments.caption_dropout}, expected 0 to 1")
    _refuse_unread(arguments)
    check_output(arguments.output)
    check_folder("--output", arguments.output.absolute().parent)
    check_folder("--run-dir", _run_dir(arguments))
    if arguments.cache_dir is not None:
        check_folder("--cache-dir", arguments.cache_dir)


def _refuse_unread(arguments: argparse.Namespace) -> None:
    """What would have no effect is a mistake."""
    of_phase = {
        "unet": ("prediction", "min_snr_gamma", "caption_dropout", "sample_prompt"),
        "vae": ("kl_weight",),
    }
    for phase, names in of_phase.items():
        for name in names:
            if phase != arguments.phase and getattr(arguments, name) not in (None, []):
                raise ValueError(f"--{name.replace('_', '-')}: is for --phase {phase}; leave it out")
    if arguments.sample_prompt and arguments.sample_every is None:
        raise ValueError("--sample-prompt: is drawn every --sample-every steps, which is missing")
