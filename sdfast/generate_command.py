"""The command line of `sdfast generate`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdfast import command_line
from sdfast.request import check_count, check_strength


def add_parser(commands: Any) -> None:
    """Add `generate` to the commands of an argparse parser."""
    parser = commands.add_parser("generate", help="make images from a prompt, or from an image and a prompt")
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help='what to draw, say "a handwritten seven"')
    add("-o", "--output", type=Path, default=Path("sdfast.png"), help="PNG to write (%(default)s)")
    add("-n", "--num-images", type=int, default=1, help="how many; more than one become one sheet")
    add(
        "--separate", action="store_true", help="write NAME-0000.png, NAME-0001.png, ... instead of one sheet"
    )
    command_line.add_sampling_options(parser)
    add("--seed", type=int, help="image i gets SEED + i (a fresh one, which is told)")
    add("--image", type=Path, help="image to start from")
    add("--strength", type=float, help="with --image: how much to change it, 0 to 1 (0.8)")
    command_line.add_model_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: bad arguments, or a model that cannot be used.
        OSError: a file that cannot be read or written.
    """
    options = _checked_options(arguments)
    command_line.check_png_output(arguments.output)
    image = None
    if arguments.image is not None:
        from sdfast.images import read_image

        image = read_image(arguments.image)
    pipe = command_line.load_pipeline(arguments)
    with command_line.forced_backend(arguments.backend), command_line.step_bar() as on_step:
        if image is None:
            result = pipe.text_to_image(arguments.prompt, on_step=on_step, **options)
        else:
            result = pipe.image_to_image(arguments.prompt, image, on_step=on_step, **options)
    written = command_line.save_images(result, arguments.output, separate=arguments.separate)
    print(command_line.summary(result, written))
    return 0


def _checked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `text_to_image` or `image_to_image`; all that can be checked without the model is."""
    check_count("--num-images", arguments.num_images)
    options = command_line.sampling_options(arguments) | {"num_images": arguments.num_images}
    if arguments.image is None:
        if arguments.strength is not None:
            raise ValueError("--strength: needs --image")
        return options
    strength = 0.8 if arguments.strength is None else arguments.strength
    check_strength(strength, arguments.steps)
    return options | {"strength": strength}
