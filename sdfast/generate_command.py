"""The command line of `sdfast generate`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdfast import command_line
from sdfast._arguments import check_folder, check_inputs
from sdfast.prompt_lines import read_prompts, share_of
from sdfast.request import check_count, check_strength


def add_parser(commands: Any) -> None:
    """Add `generate` to the commands of an argparse parser."""
    parser = commands.add_parser("generate", help="make images from a prompt, or from an image and a prompt")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help='what to draw, say "a handwritten seven"')
    prompts_help = "draw every line of FILE instead, into the folder -o, and go on where it stopped"
    add("--prompts", type=Path, metavar="FILE", help=prompts_help)
    add("-o", "--output", type=Path, help="PNG to write (sdfast.png); with --prompts a folder")
    add("-n", "--num-images", type=int, default=1, help="how many; more than one become one sheet")
    add(
        "--separate", action="store_true", help="write NAME-0000.png, NAME-0001.png, ... instead of one sheet"
    )
    command_line.add_sampling_options(parser)
    seed_help = "image i gets SEED + i (a fresh one, which is told); line i of --prompts too (0)"
    add("--seed", type=int, help=seed_help)
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
    if arguments.prompts is not None:
        return _draw_list(arguments)
    if arguments.prompt is None:
        raise ValueError("PROMPT: say what to draw, or give --prompts FILE")
    options = _checked_options(arguments)
    output = arguments.output or Path("sdfast.png")
    command_line.check_output(arguments, output, image=arguments.image)
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
    written = command_line.save_images(result, output, separate=arguments.separate)
    print(command_line.summary(result, written))
    return 0


def _draw_list(arguments: argparse.Namespace) -> int:
    """`--prompts`: this process's share of a file."""
    one_prompt_alone = {
        "PROMPT": arguments.prompt is not None,
        "--image": arguments.image is not None,
        "--strength": arguments.strength is not None,
        "--num-images": arguments.num_images != 1,
        "--separate": arguments.separate,
    }
    for name, given in one_prompt_alone.items():
        if given:
            raise ValueError(f"{name}: not with --prompts, which draws each line of its file once")
    if arguments.output is None:
        raise ValueError("--output: --prompts needs a folder to draw into: -o DIR")
    check_folder("--output", arguments.output)
    check_inputs({"--prompts": arguments.prompts})
    options = command_line.sampling_options(arguments)
    seed, batch_size = options.pop("seed") or 0, options.pop("batch_size")
    lines, share = read_prompts(arguments.prompts), share_of()
    if arguments.device == "cuda" and share.processes > 1:
        arguments.device = f"cuda:{share.local_rank}"
    pipe = command_line.load_pipeline(arguments)

    from sdfast.prompt_list import Progress, PromptList

    job = PromptList(pipe, lines, arguments.output, seed, share, batch_size, options)
    progress = Progress()
    process = f", process {share.rank + 1} of {share.processes}" if share.processes > 1 else ""
    with (
        command_line.forced_backend(arguments.backend),
        command_line.step_bar(shown=share.rank == 0) as on_step,
    ):
        try:
            job.draw(progress, on_step)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted{process}: {progress.found + progress.made} images are there, {progress.missing}"
                " to go; the same command goes on from here"
            ) from None
    times = f"; {1000 * progress.seconds / progress.steps:.1f} ms per step" if progress.steps else ""
    made = f"{progress.made} image{'' if progress.made == 1 else 's'} made"
    print(f"{arguments.output}: {made}, {progress.found} there before{process}{times}")
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
    with command_line.named_as_options():
        check_strength(strength, arguments.steps)
    return options | {"strength": strength}
