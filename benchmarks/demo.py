"""`make demo`: handwritten digits, drawn by the reference and by sdfast's kernels from the same seeds.

The two take turns, as machines are noisy. Prints the median time of both, their ratio and the largest
difference between the pictures, and writes them as one sheet: ten columns, nought to nine, a row for each
sample.

    python benchmarks/demo.py [--rows 4] [--steps 50] [--passes 3] [-o demo.png]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sdfast
from sdfast.images import grid, save_png
from sdfast.training.captions import WORDS


def main() -> None:
    """Draw in turns, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4, help="samples of each digit (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="reverse steps (%(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="timed runs of each (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="PNG (%(default)s)")
    arguments = parser.parse_args()

    pipe = sdfast.StableDiffusion.digits()
    prompts = [f"a handwritten {word}" for _ in range(arguments.rows) for word in WORDS]

    def reference(steps: int) -> sdfast.GeneratedImages:
        with sdfast.use_backend("reference"):
            return pipe.text_to_image(prompts, steps=steps, seed=0)

    def fast(steps: int) -> sdfast.GeneratedImages:
        return pipe.text_to_image(prompts, steps=steps, seed=0)

    sides = {"reference": reference, "sdfast": fast}
    for draw in sides.values():
        draw(1)  # pays for what happens only once
    runs: dict[str, list[sdfast.GeneratedImages]] = {name: [] for name in sides}
    for _ in tqdm(range(arguments.passes), desc="reference, sdfast", disable=None, leave=False):
        for name, draw in sides.items():
            runs[name].append(draw(arguments.steps))

    drawn = runs["sdfast"][0]
    difference = max(
        int(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max())
        for one, other in zip(drawn.images, runs["reference"][0].images, strict=True)
    )
    save_png(grid(drawn.images, columns=len(WORDS)), arguments.output, drawn.settings)

    seconds = {name: statistics.median(run.seconds for run in both) for name, both in runs.items()}
    width, height = drawn.images[0].size
    print(
        f"{len(prompts)} digits of {width}x{height} pixels, {arguments.steps} steps, median of"
        f" {arguments.passes} passes in turn"
    )
    for name, both in runs.items():
        step = statistics.median(run.seconds_per_step for run in both)
        print(f"{name:9}  {seconds[name]:6.2f} s   {1000 * step:7.1f} ms per step")
    print(f"faster by  {seconds['reference'] / seconds['sdfast']:6.2f} x")
    print(f"largest difference of a pixel: {difference} of 255")
    print(arguments.output.resolve())


if __name__ == "__main__":
    main()
