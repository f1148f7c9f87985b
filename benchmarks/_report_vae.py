"""The VAEs of handwritten digits, and the bound of the shipped model's latents."""

from __future__ import annotations

from typing import Any

from sdfast.bench.tables import markdown_table


def vae_digits_lines(record: dict[str, Any]) -> list[str]:
    """A table of the VAEs, and a line on the latents."""
    first = record["rows"][0]["nats_per_picture"]
    lines = [
        f"Nats a picture, means over {first['pictures']} held-out digits; ln p(x) by {first['samples']}"
        " importance-weighted samples, with its standard error. Of the Gaussian likelihood these are"
        " densities of grey values, of the Bernoulli one probabilities of pictures in black and white:"
        " the two are not to be compared.",
        "",
    ]
    rows = []
    for row in record["rows"]:
        nats = row["nats_per_picture"]
        covariance = f"{row['covariance']} covariance"
        rows.append(
            (
                f"{row['kind']}, {row['likelihood']}, {covariance}, {row['latent_dim']} latents",
                f"{nats['elbo']:.2f}",
                f"{nats['reconstruction']:.2f}",
                f"{nats['kl']:.2f}",
                f"{nats['importance_weighted']:.2f} ± {nats['importance_weighted_stderr']:.2f}",
            )
        )
    lines += markdown_table(("VAE", "ELBO", "E ln p(x\\|z)", "KL", "ln p(x) at least"), rows)
    bound = record["latent_bound"]
    parts = [
        f"{part['total']:.3f} ± {part['stderr']:.3f} ({name.replace('_', ' ')})"
        for name, part in bound["bits_per_dimension"].items()
    ]
    shape = "x".join(map(str, bound["shape"]))
    return [
        *lines,
        "",
        f"The bound of the shipped model's latents, {bound['samples']} of {shape} from held-out digits, in"
        f" bits per dimension of a latent: {', '.join(parts)} (`{bound['command']}`).",
    ]
