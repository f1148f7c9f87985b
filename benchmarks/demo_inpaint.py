"""Inpainting and outpainting with the shipped model: a sheet of pictures, and how many can be read.

Of handwritten digits that the model has not seen the lower half, or the right one, is painted anew, with the
digit's name as the prompt: by blending, and by RePaint; what is known is put back. A support vector machine
that learned from real digits only reads what came of it; how it reads them whole, and with the half missing,
stands beside. The seam is how far the two rows of pixels that meet at the edge of the mask differ, relative
to those of the whole digits.

The sheet has a row for each digit. Its columns: whole, what is known, blending, RePaint, for the lower half;
the same for the right half; and outpainted with RePaint from the upper half alone.

    python benchmarks/demo_inpaint.py [--per-digit 10] [--steps 50] [-o inpaint.png] [--no-record]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _record import results_path, write_json
from torch import Tensor

import sdfast
from sdfast.images import grid, save_png, to_pil
from sdfast.training.captions import WORDS
from sdfast.training.data import IMAGE_SIZE, Digits, Reader, enlarge, load_digits, shrink

HALF = IMAGE_SIZE // 2
_GREY = 0.5
# RePaint at jumps of 5 and 5 resamplings: 230 model calls for 50 steps.
METHODS: dict[str, dict[str, Any]] = {
    "blend": {"method": "blend"},
    "repaint": {"method": "repaint", "jump_length": 5, "resamplings": 5},
}


def some_of_each(digits: Digits, count: int) -> Digits:
    """The first `count` of each digit, those of one next to each other."""
    rows = torch.cat([(digits.labels == digit).nonzero()[:count, 0] for digit in range(10)])
    return Digits(digits.images[rows], digits.labels[rows])


def first_of_each(labels: Tensor) -> Tensor:
    """Where each digit stands first among the labels (N,), of which some may be fewer than others."""
    return torch.stack([(labels == digit).nonzero()[0, 0] for digit in labels.unique()])


def mask_of(side: str) -> Tensor:
    """(1, 1, 32, 32): white in the lower or the right half."""
    mask = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    (mask[:, :, HALF:] if side == "lower" else mask[..., HALF:]).fill_(1)
    return mask


def seam(pictures: Tensor, side: str) -> float:
    """The mean difference of the two rows, or columns, of pixels that meet at the edge of the mask."""
    rows = pictures if side == "lower" else pictures.transpose(2, 3)
    return (rows[:, :, HALF] - rows[:, :, HALF - 1]).abs().mean().item()


def measure(
    pipe: sdfast.StableDiffusion, reader: Reader, digits: Digits, side: str, steps: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A row for each way, and its pictures, (N, 3, 32, 32) in [0, 1]."""
    whole = (enlarge(digits.images) + 1) / 2
    mask = mask_of(side)
    prompts = [f"a handwritten {WORDS[label]}" for label in digits.labels.tolist()]
    pictures = {"whole": whole, "half missing": whole * (1 - mask)}
    seconds = {}
    for name, options in METHODS.items():
        began = time.perf_counter()
        drawn = pipe.inpaint(
            prompts, whole, mask, steps=steps, seed=0, output="tensor", keep_original=True, **options
        )
        assert isinstance(drawn.images, Tensor)
        pictures[name], seconds[name] = drawn.images, round(time.perf_counter() - began, 2)
    rows = []
    for name, one in pictures.items():
        read = reader.read(shrink(one * 2 - 1))
        rows.append(
            {
                "painted": side,
                "way": name,
                **METHODS.get(name, {}),
                "images": len(one),
                "steps": steps,
                "accuracy": (read == digits.labels).double().mean().item(),
                "seam": seam(one, side) / seam(whole, side),
                "seconds": seconds.get(name),
            }
        )
    return rows, pictures


def outpainted(pipe: sdfast.StableDiffusion, digits: Digits, steps: int) -> Tensor:
    """Digits whose lower half was cut off, grown again, (N, 3, 32, 32)."""
    prompts = [f"a handwritten {WORDS[label]}" for label in digits.labels.tolist()]
    upper = (enlarge(digits.images)[:, :, :HALF] + 1) / 2
    drawn = pipe.outpaint(
        prompts, upper, bottom=HALF, feather=2, steps=steps, seed=0, output="tensor", **METHODS["repaint"]
    )
    assert isinstance(drawn.images, Tensor)
    return drawn.images


def main() -> None:
    """Paint, print, write the sheet and results/<device>/inpainting.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-digit", type=int, default=10, help="at most, of each digit (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="reverse steps (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("inpaint.png"), help="PNG (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="write no JSON file")
    arguments = parser.parse_args()

    pipe = sdfast.StableDiffusion.digits()
    train_part, holdout = load_digits()
    digits, reader = some_of_each(holdout, arguments.per_digit), Reader(train_part)
    rows, columns = [], []
    for side in ("lower", "right"):
        measured, pictures = measure(pipe, reader, digits, side, arguments.steps)
        rows += measured
        known = torch.where(mask_of(side) > 0, torch.tensor(_GREY), pictures["whole"])
        columns += [pictures["whole"], known, pictures["blend"], pictures["repaint"]]
        for row in measured:
            took = "" if row["seconds"] is None else f", {row['seconds']} s"
            print(
                f"{side} half, {row['way']:12}: {row['accuracy']:6.1%} of {row['images']} read right, "
                f"seam {row['seam']:.2f} of a whole digit's{took}"
            )
    columns.append(outpainted(pipe, digits, arguments.steps))
    first = first_of_each(digits.labels)
    sheet = torch.stack([column[first] for column in columns], dim=1).flatten(0, 1)
    save_png(grid(to_pil(sheet), columns=len(columns)), arguments.output)
    print(arguments.output)
    if not arguments.no_record:
        path = results_path("inpainting")
        write_json(path, rows)
        print(path)


if __name__ == "__main__":
    main()
