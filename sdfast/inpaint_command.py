"""The commands `sdfast inpaint` and `sdfast outpaint`; arguments are checked before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdfast import command_line
from sdfast.request import (
    INPAINTING_METHODS,
    SIZE_MULTIPLE,
    check_count,
    check_inpainting,
    check_outpainting,
    check_strength,
)

_SIDES = ("left", "right", "top", "bottom")


def add_parsers(commands: Any) -> None:
    """Add `inpaint` and `outpaint` to the commands of an argparse parser."""
    inpaint = commands.add_parser("inpaint", help="paint anew what a mask shows white")
    _add_picture_options(inpaint)
    mask_help = "white is painted, black is kept; of the image's size (what the image has transparent)"
    inpaint.add_argument("--mask", type=Path, metavar="FILE", help=mask_help)
    _add_painting_options(inpaint, size=True, keep_original=False)
    inpaint.set_defaults(run=_inpaint)

    outpaint = commands.add_parser("outpaint", help="let an image grow on some of its sides")
    _add_picture_options(outpaint)
    for side in _SIDES:
        outpaint.add_argument(f"--{side}", type=int, default=0, metavar="PIXELS", help="to add (%(default)s)")
    feather_help = "over how many of its pixels the image fades into what is new (%(default)s)"
    outpaint.add_argument("--feather", type=int, default=8, metavar="PIXELS", help=feather_help)
    _add_painting_options(outpaint, size=False, keep_original=True)
    outpaint.set_defaults(run=_outpaint)


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what the image is to show")
    add("--image", type=Path, required=True, metavar="FILE", help="image to start from")
    add("-o", "--output", type=Path, default=Path("sdfast.png"), help="PNG to write (%(default)s)")
    add("-n", "--num-images", type=int, default=1, help="how many; more than one become one sheet")
    add(
        "--separate", action="store_true", help="write NAME-0000.png, NAME-0001.png, ... instead of one sheet"
    )


def _add_painting_options(parser: argparse.ArgumentParser, *, size: bool, keep_original: bool) -> None:
    add = parser.add_argument
    keep_help = "put what is not painted back, to the bit"
    add("--keep-original", action=argparse.BooleanOptionalAction, default=keep_original, help=keep_help)
    method_help = f"{', '.join(INPAINTING_METHODS)} (%(default)s: the model's mask input, or blend)"
    add("--method", default="auto", help=method_help)
    add("--strength", type=float, default=1.0, help="less starts from the noised image (%(default)s)")
    jump_help = "of repaint: steps that are taken back at once (%(default)s)"
    add("--jump-length", type=int, default=10, metavar="J", help=jump_help)
    times_help = "of repaint: how often each step is taken (%(default)s)"
    add("--resamplings", type=int, default=10, metavar="R", help=times_help)
    command_line.add_sampling_options(parser, size=size)
    add("--seed", type=int, help="image i gets SEED + i (a fresh one, which is told)")
    command_line.add_model_options(parser)


def _inpaint(arguments: argparse.Namespace) -> int:
    options = _checked_options(arguments)
    from sdfast.images import check_one_size, read_image
    from sdfast.masks import images_and_masks

    image = read_image(arguments.image)
    mask = None if arguments.mask is None else read_image(arguments.mask)
    # What is wrong with them is told before a model is loaded.
    with command_line.named_as_options():
        if arguments.keep_original:
            check_one_size("--keep-original", image, options["height"], options["width"], SIZE_MULTIPLE)
        images_and_masks(image, mask, height=None, width=None, channels=3, multiple=1)
    return _paint(arguments, lambda pipe: pipe.inpaint, image, mask=mask, **options)


def _outpaint(arguments: argparse.Namespace) -> int:
    options = _checked_options(arguments)
    del options["height"], options["width"]
    sides = {name: getattr(arguments, name) for name in (*_SIDES, "feather")}
    with command_line.named_as_options():
        check_outpainting(**sides)
    from sdfast.images import read_image

    image = read_image(arguments.image)
    with command_line.named_as_options():
        check_outpainting(**sides, height=image.height, width=image.width)
    return _paint(arguments, lambda pipe: pipe.outpaint, image, **sides, **options)


def _checked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `inpaint` and `outpaint` both take; all that can be checked without the model is."""
    check_count("--num-images", arguments.num_images)
    options = command_line.sampling_options(arguments)
    with command_line.named_as_options():
        check_strength(arguments.strength, arguments.steps)
        check_inpainting(
            arguments.method,
            int(arguments.steps * arguments.strength),
            arguments.jump_length,
            arguments.resamplings,
            arguments.sampler,
        )
    read = {"image": arguments.image, "mask": getattr(arguments, "mask", None)}
    command_line.check_output(arguments, arguments.output, **read)
    own = ("num_images", "keep_original", "method", "strength", "jump_length", "resamplings")
    return options | {name: getattr(arguments, name) for name in own}


def _paint(
    arguments: argparse.Namespace, method_of: Callable[[Any], Callable[..., Any]], image: Any, **options: Any
) -> int:
    pipe = command_line.load_pipeline(arguments)
    with command_line.forced_backend(arguments.backend), command_line.step_bar() as on_step:
        result = method_of(pipe)(arguments.prompt, image, on_step=on_step, **options)
    written = command_line.save_images(result, arguments.output, separate=arguments.separate)
    print(command_line.summary(result, written))
    return 0
