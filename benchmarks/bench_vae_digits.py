"""How well the VAEs of §2.5 and the shipped diffusion model know handwritten digits they never saw.

Eight VAEs, fully connected or convolutional, with the Gaussian or the Bernoulli likelihood, with a diagonal
or a full covariance, are trained on 1500 of scikit-learn's digits: the bound, its two terms and the
importance-weighted estimate of ln p(x) on the other 297, in nats a picture. Of the Gaussian likelihood these
are densities of grey values, of the Bernoulli one probabilities of black and white pictures.

Then the bound of the shipped model's latents of held-out digits, in bits per dimension of a latent.

    python benchmarks/bench_vae_digits.py [--latent-dim 8] [--samples 500] [--images 50] [--no-record]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from typing import Any

import torch
from _record import results_path, write_json
from tqdm import tqdm

from sdfast.bound import bound_of_data
from sdfast.models.simple_vae import COVARIANCES, KINDS
from sdfast.training.digit_vae import STEPS, train_digit_vae


def measure(kind: str, likelihood: str, covariance: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one VAE in a folder that is then deleted."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = train_digit_vae(
            folder, kind=kind, likelihood=likelihood, covariance=covariance, latent_dim=options.latent_dim,
            steps=options.steps, samples=options.samples, progress=False,
        )  # fmt: skip
    return {
        "kind": kind,
        "likelihood": likelihood,
        "covariance": covariance,
        "latent_dim": options.latent_dim,
        "std": made.vae.config.std if likelihood == "gaussian" else None,
        "steps": options.steps,
        "parameters": sum(p.numel() for p in made.vae.parameters()),
        "nats_per_picture": dataclasses.asdict(made.evaluation),
        "seconds": round(time.perf_counter() - began, 1),
    }


def latent_bound(images: int) -> dict[str, Any]:
    """The bound of the shipped model's latents."""
    began = time.perf_counter()
    with tqdm(unit="step", unit_scale=True, desc="bound", mininterval=10) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        record = bound_of_data("digits", "digits", images=images, on_step=on_step).record()
    command = f"sdfast bound -n {images} --threads 1"
    return {"command": command, **record, "seconds": round(time.perf_counter() - began, 1)}


def main() -> int:
    """Print a table, write results/<device>/vae_digits.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent-dim", type=int, default=8, help="numbers in a latent (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (%(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="of z for each picture (%(default)s)")
    parser.add_argument("--images", type=int, default=50, help="digits for the bound (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.images < 2:
        parser.error(f"--images: got {options.images}, expected at least 2, for there to be a standard error")
    torch.set_num_threads(1)

    rows = []
    for kind, likelihood, covariance in itertools.product(KINDS, ("gaussian", "bernoulli"), COVARIANCES):
        row = measure(kind, likelihood, covariance, options)
        rows.append(row)
        nats = row["nats_per_picture"]
        terms = f"ELBO {nats['elbo']:8.3f} = {nats['reconstruction']:8.3f} - {nats['kl']:6.3f}"
        evidence = f"{nats['importance_weighted']:8.3f} ± {nats['importance_weighted_stderr']:.3f}"
        name = f"{kind:4} {likelihood:9} {covariance:8}"
        print(f"{name}  {terms}   ln p(x) >= {evidence}   {row['seconds']} s", flush=True)
    bound = latent_bound(options.images)
    for name, part in bound["bits_per_dimension"].items():
        print(f"latents of the shipped model, {name}: {part['total']:.4f} ± {part['stderr']:.4f} bits/dim")
    if not options.no_record:
        path = results_path("vae_digits")
        write_json(path, rows, latent_bound=bound)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
