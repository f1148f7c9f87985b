"""The README's table of the sections of the report that the package implements, and of how each does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sdfast.bench.tables import markdown_table

Row = dict[str, Any]


def _digits(record: Row) -> str:
    row = record["rows"][0]
    return f"{row['accuracy']:.0%} of {row['images']} digits read as asked"


def _inpainting(record: Row) -> str:
    rows = {(row["painted"], row["way"]): row for row in record["rows"]}
    blend, missing = rows["lower", "blend"], rows["lower", "half missing"]
    return (
        f"{blend['accuracy']:.0%} of {blend['images']} digits with the lower half painted read right,"
        f" {missing['accuracy']:.0%} with it missing"
    )


def _repaint(record: Row) -> str:
    seams = [
        next(row["seam"] for row in record["rows"] if (row["painted"], row["way"]) == ("lower", way))
        for way in ("repaint", "blend")
    ]
    return f"its seam is {seams[0]:.2f} times a whole digit's, blending's {seams[1]:.2f}"


def _lora(record: Row) -> str:
    rows = {row["model"]: row["mirrored back"] for row in record["rows"]}
    return f"mirror writing: {rows['with the LoRA']:.1%} read mirrored back, {rows['as shipped']:.1%} without"


def _nats(kind: str, likelihood: str, covariance: str) -> Callable[[Row], str]:
    def text(record: Row) -> str:
        wanted = (kind, likelihood, covariance)
        row = next(r for r in record["rows"] if (r["kind"], r["likelihood"], r["covariance"]) == wanted)
        nats = row["nats_per_picture"]
        evidence = nats["importance_weighted"]
        return f"ELBO {nats['elbo']:.2f}, ln p(x) at least {evidence:.2f} nats a held-out digit"

    return text


def _bound(record: Row) -> str:
    bits = record["latent_bound"]["bits_per_dimension"]["fixed_large"]
    return f"{bits['total']:.2f} ± {bits['stderr']:.2f} bits per dimension of the shipped model's latents"


def _gradients(record: Row) -> str:
    errors = {row["name"]: row["relative_error"] for row in record["rows"]}
    ddp, fsdp = errors["DDP, two processes"], errors["FSDP2, two processes"]
    return f"gradients of two processes are one's to {max(ddp, fsdp):.0e}"


def _training(record: Row) -> str:
    return f"{record['rows'][0]['ratio']:.2f} times as fast as eager"


def _unet(record: Row) -> str:
    row = next(r for r in record["rows"] if "U-Net" in r["work"] and r["dtype"] == "float32")
    return f"{row['ratio']:.2f} times as fast as eager, fp32"


def _segmentation(record: Row) -> str:
    names = {"cells": "generated cells", "coins": "coins", "ihc": "tissue"}
    return "IoU " + ", ".join(f"{row['iou']:.2f} ({names[row['set']]})" for row in record["rows"])


def _large(record: Row) -> str:
    row = record["rows"][0]
    return f"{row['size']}x{row['size']} within {row['peak_bytes'] / 1e9:.2f} GB above the weights"


def _tested(file: str) -> Callable[[Row], str]:
    return lambda _: f"diffusers' result on the same weights (tests/{file})"


# Section, what, what to try, the record that has its figure, "" where a test shows it, and the figure.
_LINES: tuple[tuple[str, str, str, str, Callable[[Row], str]], ...] = (
    ("1", "text to image", '`sdfast generate "a handwritten seven"`', "digits_quality", _digits),
    ("1", "image to image", "`sdfast generate PROMPT --image A.png --strength 0.6`", "",
     _tested("test_pipelines.py")),
    ("1", "inpainting", "`sdfast inpaint PROMPT --image A.png --mask M.png`", "inpainting", _inpainting),
    ("1", "RePaint", "`sdfast inpaint ... --method repaint`", "inpainting", _repaint),
    ("1", "inpainting models, 9 channels",
     "`sdfast inpaint ... --model stable-diffusion-v1-5/stable-diffusion-inpainting`", "",
     _tested("test_inpainting.py")),
    ("1", "outpainting", "`sdfast outpaint PROMPT --image A.png --left 64 --feather 16`", "",
     lambda _: "pixels kept bit for bit, any size (tests/test_outpainting.py)"),
    ("1", "LoRA", "`sdfast generate PROMPT --lora FILE:0.8`", "lora", _lora),
    ("2.2, 2.3", "ELBO, Bernoulli", "`sdfast train vae --kind fc --latent-dim 8 --plot`", "vae_digits",
     _nats("fc", "bernoulli", "diagonal")),
    ("2.4", "full covariance", "`sdfast train vae --covariance full --likelihood gaussian --latent-dim 8`",
     "vae_digits", _nats("fc", "gaussian", "full")),
    ("2.5", "convolutional VAE", "`sdfast train vae --kind conv --latent-dim 8`", "vae_digits",
     _nats("conv", "bernoulli", "diagonal")),
    ("3.1", "the bound, term by term", "`sdfast bound --plot per_t.png`", "vae_digits", _bound),
    ("3.2", "a training step", "`sdfast bench training`", "training", _training),
    ("3.2", "training on several processes",
     "`torchrun --nproc-per-node 2 -m sdfast train ldm --data FOLDER --parallel ddp`", "train_ldm",
     _gradients),
    ("3.3", "the ResNet U-Net of SD 1.5", "`sdfast bench models`", "models", _unet),
    ("4", "segmentation U-Net", "`sdfast segment train DATA -o MODEL`", "segmentation", _segmentation),
    ("4", "overlap-tile prediction", "`sdfast segment predict IMAGE --model MODEL`", "segmentation_large",
     _large),
)  # fmt: skip


def seed_lines(records: dict[str, Row]) -> list[str]:
    """One line for each; the figure links to its record."""
    return markdown_table(("section", "what", "try", "recorded, by the command in the file"), _rows(records))


def _rows(records: dict[str, Row]) -> Iterator[tuple[str, ...]]:
    for section, what, command, kind, figure in _LINES:
        if not kind:
            yield section, what, command, figure({})
            continue
        found = [(name, record) for name, record in records.items() if name.endswith(f"/{kind}.json")]
        if found:
            name, record = max(found, key=lambda item: item[1]["environment"]["date"])
            recorded = f"[{figure(record)}](benchmarks/results/{record.get('file', name)})"
        else:
            recorded = "not recorded"
        yield section, what, command, recorded
