"""The command line of `sdfast train vae`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from sdfast._arguments import check_counts, check_model_folder
from sdfast.request import check_seed


def add_parser(models: Any) -> None:
    """Add `vae` to the models of `sdfast train`."""
    parser = models.add_parser("vae", help="a small VAE of 8x8 digits; a minute or two on one CPU core")
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("my-vae"), help="folder to write (%(default)s)")
    add("--kind", choices=("fc", "conv"), default="fc", help="fully connected or convolutional (%(default)s)")
    likelihood_help = "of grey values, or of black and white (%(default)s)"
    add("--likelihood", choices=("gaussian", "bernoulli"), default="bernoulli", help=likelihood_help)
    add("--covariance", choices=("diagonal", "full"), default="diagonal", help="of q(z|x) (%(default)s)")
    add("--latent-dim", type=int, default=2, metavar="D", help="numbers in a latent (%(default)s)")
    add("--std", type=float, help="standard deviation of the Gaussian likelihood (0.15)")
    add("--steps", type=int, help="of training (2000)")
    add("--samples", type=int, default=500, metavar="K", help="of z, to estimate ln p(x) (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    plot_help = "write PNGs: reconstructions, samples, a walk between digits; with D = 2 the plane of latents"
    add("--plot", action="store_true", help=plot_help)
    add("--restart", action="store_true", help="forget the checkpoints in the folder and start anew")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Returns:
        0.

    Raises:
        ValueError: bad arguments.
        ImportError: scikit-learn or matplotlib is needed and absent.
    """
    options = {name: getattr(arguments, name) for name in ("latent_dim", "samples", "threads")}
    if arguments.steps is not None:
        options["steps"] = arguments.steps
    check_counts(arguments, *options)
    check_seed("--seed", arguments.seed)
    if arguments.std is not None:
        if arguments.likelihood != "gaussian":
            raise ValueError("--std: needs --likelihood gaussian")
        if not 0 < arguments.std < math.inf:
            raise ValueError(f"--std: got {arguments.std}, expected a number > 0")
        options["std"] = arguments.std
    check_model_folder("--output", arguments.output, "simple_vae", unfinished="checkpoints")
    # What follows imports torch.
    import torch

    from sdfast.training.digit_vae import train_digit_vae

    torch.set_num_threads(options.pop("threads"))
    made = train_digit_vae(
        arguments.output,
        kind=arguments.kind,
        likelihood=arguments.likelihood,
        covariance=arguments.covariance,
        seed=arguments.seed,
        plot=arguments.plot,
        resume=not arguments.restart,
        **options,
    )
    result = made.evaluation
    print(f"{result.pictures} held-out digits, nats a picture:")
    print(f"  ELBO         {result.elbo:9.3f}")
    print(f"    E ln p(x|z)  {result.reconstruction:9.3f}")
    print(f"    -KL          {-result.kl:9.3f}")
    estimate = f"{result.importance_weighted:9.3f} ± {result.importance_weighted_stderr:.3f}"
    print(f"  ln p(x) >=   {estimate}   importance-weighted, {result.samples} samples")
    for path in [arguments.output / "model.safetensors", *made.pictures]:
        print(path)
    return 0
