"""Do the pictures of the shipped model show what was asked for?

200 digits are drawn, twenty of each, from "a handwritten zero" to "a handwritten nine". A support vector
machine that learned from real digits only reads them; how well it reads real digits it never saw stands
beside. The spread (standard deviation of a pixel among pictures of one digit) says whether they still differ
as real ones do.

    python benchmarks/bench_digits_quality.py [--model DIR] [--per-digit 20] [--no-record]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import torch
from _record import results_path, write_json
from torch import Tensor

from sdfast.loading import digits_folder
from sdfast.pipelines import StableDiffusion
from sdfast.training.captions import WORDS
from sdfast.training.data import Digits, Reader, enlarge, load_digits, shrink
from sdfast.training.digits import RECORD

# (guidance scale, steps); the first are the defaults of `sdfast generate`.
SETTINGS = ((7.5, 50), (7.5, 20), (3.0, 50), (3.0, 20), (1.0, 50))
REQUIRED = 0.9  # of the first


def measure(
    pipe: StableDiffusion, reader: Reader, per_digit: int, guidance_scale: float, steps: int
) -> dict[str, Any]:
    """Draw, read, count."""
    began = time.perf_counter()
    prompts = [f"a handwritten {word}" for word in WORDS]
    drawn = pipe.text_to_image(
        prompts, num_images=per_digit, steps=steps, guidance_scale=guidance_scale, seed=0, output="tensor"
    )
    assert isinstance(drawn.images, Tensor)
    pictures = drawn.images * 2 - 1  # (10 * per_digit, 3, 32, 32), the same prompt's next to each other
    asked = torch.arange(10).repeat_interleave(per_digit)
    right = (reader.read(shrink(pictures)) == asked).double().unflatten(0, (10, per_digit))
    return {
        "guidance_scale": guidance_scale,
        "steps": steps,
        "images": len(asked),
        "accuracy": right.mean().item(),
        "accuracy_by_digit": [round(share, 4) for share in right.mean(dim=1).tolist()],
        "spread": _spread(pictures, asked),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _spread(pictures: Tensor, labels: Tensor) -> float:
    return torch.stack([pictures[labels == digit].std(dim=0).mean() for digit in range(10)]).mean().item()


def _real_spread(digits: Digits) -> float:
    return _spread(enlarge(digits.images), digits.labels)


def main() -> int:
    """Print a table, write results/<device>/digits_quality.json; 1 if too few are read as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", help="pipeline folder (the shipped model)")
    parser.add_argument("--per-digit", type=int, default=20, help="pictures of each digit (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="write no file")
    arguments = parser.parse_args()

    train_part, holdout = load_digits()
    reader = Reader(train_part)
    real = {"accuracy": reader.accuracy(holdout), "spread": _real_spread(train_part)}
    print(f"real digits, held out: {real['accuracy']:.1%} read as labelled, spread {real['spread']:.3f}")
    pipe = StableDiffusion.from_pretrained(arguments.model)
    rows = []
    for guidance_scale, steps in SETTINGS:
        row = measure(pipe, reader, arguments.per_digit, guidance_scale, steps)
        rows.append(row)
        print(
            f"guidance {guidance_scale:3}, {steps} steps: {row['accuracy']:.1%} of {row['images']} read as"
            f" asked, spread {row['spread']:.3f}, {row['seconds']} s"
        )
    if not arguments.no_record:
        path = results_path("digits_quality")
        write_json(path, rows, training=_training(arguments.model), real=real)
        print(path)
    return 0 if rows[0]["accuracy"] >= REQUIRED else 1


def _training(model: str) -> dict[str, Any] | None:
    """How the model was trained, from the file that the training left beside it."""
    path = (digits_folder() if model == "digits" else pathlib.Path(model)) / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    options = ("seed", "vae_steps", "unet_steps", "threads")
    arguments = [f"--{name.replace('_', '-')} {record[name]}" for name in options]
    return {"command": " ".join(["sdfast train digits", *arguments]), **record}


if __name__ == "__main__":
    sys.exit(main())
