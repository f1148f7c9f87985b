"""The command line of `sdfast bound`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdfast._arguments import check_counts, check_file
from sdfast.command_line import step_bar
from sdfast.request import check_seed

_DESCRIPTION = """\
-ln p(x) of a diffusion model is bounded by L_T + L_{T-1} + ... + L_0 (Ho et al. 2020). This evaluates every
term on every picture and prints their sum in bits per dimension, with both fixed variances of the reverse
process. Of a latent model it is the bound of its latents' density, not of pictures."""


def add_parser(commands: Any) -> None:
    """Add `bound` to the commands of an argparse parser."""
    parser = commands.add_parser(
        "bound", help="a model's variational bound over a data set, in bits per dimension",
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    model_help = "diffusers folder of a pixel or a latent model, file, or hub id (the shipped digits)"
    add("--model", default="digits", metavar="DIR|FILE|ID", help=model_help)
    data_help = "folder of pictures, or digits for scikit-learn's held-out ones (%(default)s)"
    add("--data", default="digits", metavar="FOLDER|digits", help=data_help)
    add("-n", "--images", type=int, help="how many pictures (all)")
    add(
        "--prompt",
        metavar="TEXT",
        help="what a text model is told of every picture (nothing; of a digit its name)",
    )
    add("--no-clip", action="store_true", help="do not clamp a pixel model's predicted x_0 to [-1, 1]")
    add("--batch-size", type=int, default=128, help="pictures to run at once (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("-o", "--output", type=Path, metavar="FILE.json", help="write means and every term as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw terms and errors at each t")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Returns:
        0.

    Raises:
        ValueError, OSError: bad arguments, model or data.
        ImportError: matplotlib or scikit-learn is needed and absent.
    """
    check_counts(arguments, "images", "batch_size", "threads")
    check_seed("--seed", arguments.seed)
    for option, path, suffix in (("--output", arguments.output, ".json"), ("--plot", arguments.plot, ".png")):
        if path is not None:
            check_file(option, path, suffix)
    if arguments.data != "digits" and not Path(arguments.data).is_dir():
        raise ValueError(f"--data: {arguments.data} is no folder; expected one of pictures, or digits")
    if arguments.plot is not None:
        from sdfast.figures import check_matplotlib

        check_matplotlib()
    # What follows imports torch.
    import torch

    from sdfast.bound import bound_of_data, plot
    from sdfast.files import write_json

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with step_bar() as on_step:
        result = bound_of_data(
            arguments.model,
            arguments.data,
            images=arguments.images,
            prompt=arguments.prompt,
            clip=False if arguments.no_clip else None,
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            on_step=on_step,
        )
    record = result.record()
    shape = "x".join(map(str, record["shape"]))
    print(f"{record['samples']} {record['of']} of {shape}, bits per dimension:")
    for name, part in record["bits_per_dimension"].items():
        error = "" if part["stderr"] is None else f" ± {part['stderr']:.4f}"
        terms = f"L_T {part['prior']:.2e} + transitions {part['transitions']:.4f}"
        print(f"  {name}: {part['total']:.4f}{error}  =  {terms} + L_0 {part['reconstruction']:.4f}")
    if arguments.output is not None:
        settings = {key: getattr(arguments, key) for key in ("model", "data", "prompt", "seed", "no_clip")}
        write_json(arguments.output, settings | record)
        print(arguments.output)
    if arguments.plot is not None:
        plot(result, arguments.plot)
        print(arguments.plot)
    return 0
