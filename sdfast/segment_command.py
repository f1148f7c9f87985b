"""The command line of `sdfast segment`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

from sdfast._arguments import (
    check_counts,
    check_file,
    check_folder,
    check_inputs,
    check_model_folder,
    check_not_input,
    usable_device,
)
from sdfast.request import check_seed

_TRAIN = """\
Trains the U-Net of Ronneberger et al. 2015 on annotated pictures. DATA holds two folders, with files of the
same names but for their endings:

  DATA/images   what is seen
  DATA/masks    0 is background, every other number a cell; or 0 and one number only, in which case
                cells are what is connected

It may be stopped at any moment: the same command goes on."""
_LEAST_MEMORY_MB = 10


def add_parser(commands: Any) -> None:
    """Add `segment` to the commands of an argparse parser."""
    segment = commands.add_parser("segment", help="tell cells from background in pictures of any size")
    actions = segment.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_train(actions)
    _add_predict(actions)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train", help="learn from a folder of pictures and masks", description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="folder that holds images/ and masks/")
    add("-o", "--output", metavar="MODEL", type=Path, required=True, help="folder to write")
    add("--run-dir", type=Path, help="where checkpoints go (runs/ and the name of MODEL)")
    add("--steps", type=int, default=1000, help="optimizer steps (%(default)s)")
    add("--width", type=int, default=16, help="channels at full resolution; 64 in the paper (%(default)s)")
    add("--depth", type=int, default=4, help="how often the resolution is halved (%(default)s)")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for colours (%(default)s)")
    add("--tile", type=int, default=196, help="side of what a step learns from, in pixels (%(default)s)")
    add("--batch-size", type=int, default=1, help="tiles in a step (%(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="the highest (%(default)s)")
    add("--border-weight", type=float, default=10.0, metavar="W0", help="between cells (%(default)s)")
    add("--border-sigma", type=float, default=5.0, metavar="PX", help="its width in pixels (%(default)s)")
    add("--displacement", type=float, default=10.0, metavar="PX", help="of elastic deformation (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--restart", action="store_true", help="forget the checkpoints in --run-dir and start anew")
    parser.set_defaults(run=_train)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser("predict", help="segment a picture, tile by tile")
    add = parser.add_argument
    add("image", metavar="IMAGE", type=Path, help="a picture; an .npy file is mapped, not read into memory")
    add("-o", "--output", metavar="MASK", type=Path, default=Path("mask.png"),
        help="PNG to write, 255 for cells, or .npy, 1 for cells, for pictures larger than memory"
        " (%(default)s)")  # fmt: skip
    add("--model", metavar="MODEL", type=Path, required=True, help="folder that `segment train` wrote")
    add("--overlay", metavar="PNG", type=Path, help="also write the picture with its cells in colour")
    add("--truth", metavar="MASK", type=Path, help="the right mask: tells IoU, Dice and pixel error")
    add("--tile", type=int, help="side of a tile of the result (the largest that fits --memory)")
    add("--memory", type=int, default=1000, metavar="MB", help="what a tile may take (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    parser.set_defaults(run=_predict)


def _train(arguments: argparse.Namespace) -> int:
    check_counts(arguments, "steps", "width", "depth", "tile", "batch_size", "threads")
    for name in ("learning_rate", "border_sigma"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise ValueError(
                f"--{name.replace('_', '-')}: got {getattr(arguments, name)}, expected more than 0"
            )
    for name in ("border_weight", "displacement"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise ValueError(
                f"--{name.replace('_', '-')}: got {getattr(arguments, name)}, expected a number from 0 on"
            )
    check_seed("--seed", arguments.seed)
    check_model_folder("--output", arguments.output, "segmentation_unet")
    run_dir = arguments.run_dir or Path("runs") / arguments.output.resolve().name
    check_folder("--run-dir", run_dir)
    import torch

    from sdfast.models import SegmentationUNetConfig
    from sdfast.models.checkpoint import save_model
    from sdfast.training.deformation import Augmentation
    from sdfast.training.segmentation import SegmentationTraining, train_segmentation
    from sdfast.training.segmentation_data import load_folder

    config = SegmentationUNetConfig(
        in_channels=arguments.channels, width=arguments.width, depth=arguments.depth
    )
    try:
        config.check_tile(arguments.tile)
    except ValueError as error:
        raise ValueError(f"--tile: {error}") from None
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = load_folder(
        arguments.data, channels=arguments.channels, w0=arguments.border_weight,
        sigma=arguments.border_sigma, progress=True,
    )  # fmt: skip
    default = SegmentationTraining()
    schedule = dataclasses.replace(
        default.schedule, steps=arguments.steps, learning_rate=arguments.learning_rate
    )
    settings = SegmentationTraining(
        schedule, arguments.batch_size, arguments.tile, Augmentation(displacement=arguments.displacement)
    )
    model = train_segmentation(
        config, data, settings, folder=run_dir, seed=arguments.seed, resume=not arguments.restart
    )
    save_model(model, arguments.output)
    pictures = f"{len(data.examples)} picture{'s' if len(data.examples) > 1 else ''}"
    print(
        f"{arguments.output}: trained on {pictures}; try:"
        f" sdfast segment predict IMAGE --model {shlex.quote(str(arguments.output))}"
    )
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    check_counts(arguments, "tile", "threads")
    if arguments.memory < _LEAST_MEMORY_MB:
        raise ValueError(f"--memory: got {arguments.memory}, expected at least {_LEAST_MEMORY_MB} MB")
    check_file("--output", arguments.output, ".png", ".npy")
    read = {"IMAGE": arguments.image, "--truth": arguments.truth}
    check_inputs(read)
    check_not_input("--output", arguments.output, read)
    if arguments.overlay is not None:
        check_file("--overlay", arguments.overlay, ".png")
        check_not_input("--overlay", arguments.overlay, {"--output": arguments.output, **read})
    import torch

    from sdfast.models import SegmentationUNet
    from sdfast.models.checkpoint import load_model
    from sdfast.segmentation import check_picture, least_memory_bytes, open_picture
    from sdfast.segmentation_file import predict_to_file
    from sdfast.segmentation_scores import overlay, scores

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(SegmentationUNet, arguments.model, device=usable_device("--device", arguments.device))
    least = math.ceil(least_memory_bytes(model.config) / 10**6)
    if arguments.tile is not None:
        try:
            model.config.check_tile(arguments.tile)
        except ValueError as error:
            raise ValueError(f"--tile: {error}") from None
    elif arguments.memory < least:
        raise ValueError(f"--memory: got {arguments.memory}, expected at least {least} MB for this model")
    picture = open_picture(arguments.image, model.config.in_channels)
    picture = check_picture(str(arguments.image), picture, model.config.in_channels)
    truth = None
    if arguments.truth is not None:
        from sdfast.training.segmentation_data import read_mask

        truth = read_mask(arguments.truth)
        if truth.shape != picture.shape[:2]:
            raise ValueError(
                f"--truth: {arguments.truth} has shape {truth.shape}, the picture {picture.shape[:2]}"
            )
    mask, seconds = predict_to_file(
        model, picture, arguments.output, tile=arguments.tile, memory_bytes=arguments.memory * 10**6,
        progress=True,
    )  # fmt: skip
    share = sum(int((mask[top : top + 1024] != 0).sum()) for top in range(0, len(mask), 1024)) / mask.size
    told = f"{arguments.output}: {mask.shape[0]}x{mask.shape[1]}, {share:.1%} cells; {seconds:.2f} s"
    if truth is not None:
        found = scores(mask, truth)
        told += f"; IoU {found.iou:.4f}, Dice {found.dice:.4f}, pixel error {found.pixel_error:.4f}"
    print(told)
    if arguments.overlay is not None:
        from sdfast.images import save_png

        save_png(overlay(picture, mask, truth), arguments.overlay)
        print(f"{arguments.overlay}: green is found{', red false, blue missed' if truth is not None else ''}")
    return 0
