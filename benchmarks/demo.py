"""`make demo`: handwritten digits, drawn by the reference and by sdfast's kernels from the same seeds.

Prints both times and the largest difference between the pictures, and writes them as one sheet: ten
columns, nought to nine, a row for each sample.

    python benchmarks/demo.py [--rows 4] [--steps 50] [-o demo.png]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sdfast
from sdfast.images import grid, save_png

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def draw(
    pipe: sdfast.StableDiffusion, prompts: list[str], steps: int, title: str
) -> tuple[sdfast.GeneratedImages, float]:
    """The images and the seconds they took, after a run that pays for what happens only once."""
    pipe.text_to_image(prompts, steps=1, seed=0)
    with tqdm(desc=title, unit="step", disable=None, leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        began = time.perf_counter()
        drawn = pipe.text_to_image(prompts, steps=steps, seed=0, on_step=on_step)
    return drawn, time.perf_counter() - began


def main() -> None:
    """Draw twice, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4, help="samples of each digit (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="reverse steps (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="PNG (%(default)s)")
    arguments = parser.parse_args()

    pipe = sdfast.StableDiffusion.digits()
    prompts = [f"a handwritten {word}" for _ in range(arguments.rows) for word in WORDS]
    with sdfast.use_backend("reference"):
        reference, reference_seconds = draw(pipe, prompts, arguments.steps, "reference")
    fast, fast_seconds = draw(pipe, prompts, arguments.steps, "sdfast")
    difference = max(
        int(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max())
        for one, other in zip(fast.images, reference.images, strict=True)
    )
    save_png(grid(fast.images, columns=len(WORDS)), arguments.output, fast.settings)

    count = len(prompts)
    print(f"{count} digits of {fast.images[0].width}x{fast.images[0].height} pixels, {arguments.steps} steps")
    print(f"reference  {reference_seconds:6.2f} s   {1000 * reference.seconds_per_step:7.1f} ms per step")
    print(f"sdfast     {fast_seconds:6.2f} s   {1000 * fast.seconds_per_step:7.1f} ms per step")
    print(f"faster by  {reference_seconds / fast_seconds:6.2f} x")
    print(f"largest difference of a pixel: {difference} of 255")
    print(arguments.output.resolve())


if __name__ == "__main__":
    main()
