"""Segmentation: agreement with the truth on pictures that were held out, and one that is large.

    python benchmarks/bench_segmentation.py accuracy [--steps 300] [--pictures DIR]
    python benchmarks/bench_segmentation.py large [--size 16384] [--steps 300]

`accuracy` trains a small U-Net (width 16, three halvings) on each of

    cells   generated pictures, whose outlines are known exactly; 8 to learn from, 4 others to be judged by
    coins   scikit-image's photograph of coins: its left two thirds to learn from, the rest to be judged by
    ihc     scikit-image's stained tissue (colon, immunohistochemistry), in colours; split likewise

The labels of coins and ihc are made by classical methods of scikit-image: watershed from markers on the
gradient, and Otsu's threshold on the blue stain after colour deconvolution. So these two rows say how well a
network learns to do as the method does, not how well either finds coins or nuclei.

`large` segments a generated picture in a memory-mapped file with the network trained on cells, in a process
of its own, and compares all of it with the truth. Its blocks are 16 different ones, mirrored and turned.
Memory is the peak of the process above what it held with the weights loaded; pages of the files count.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from _own_process import PeakMemory, in_own_process
from _record import results_path, write_json

from sdfast.models import SegmentationUNet, SegmentationUNetConfig
from sdfast.models.checkpoint import load_model, save_model
from sdfast.segmentation import check_picture, predict
from sdfast.segmentation_file import predict_to_file
from sdfast.segmentation_scores import overlay, scores
from sdfast.training.cells import draw_cells
from sdfast.training.segmentation import SegmentationTraining, train_segmentation
from sdfast.training.segmentation_data import Annotated, example, instances

Pair = tuple[np.ndarray, np.ndarray]
WIDTH, DEPTH = 16, 3
_BLOCK = 1024
_LARGEST_BYTES = 2 * 10**9


def cells() -> tuple[list[Pair], list[Pair]]:
    """Pictures and their cells, to learn from and to be judged by."""
    pairs = [draw_cells(256, 256, seed) for seed in range(12)]
    return pairs[:8], pairs[8:]


def coins() -> tuple[list[Pair], list[Pair]]:
    """The coins of Pompeii, labelled as scikit-image's gallery does."""
    from scipy import ndimage
    from skimage import data, filters, segmentation

    picture = data.coins()
    markers = np.where(picture < 30, 1, np.where(picture > 150, 2, 0))
    regions = segmentation.watershed(filters.sobel(picture), markers)
    return _split(picture, ndimage.label(ndimage.binary_fill_holes(regions == 2))[0])


def ihc() -> tuple[list[Pair], list[Pair]]:
    """Nuclei in stained tissue."""
    from skimage import color, data, filters, measure, morphology

    picture = data.immunohistochemistry()
    blue = filters.gaussian(color.rgb2hed(picture)[..., 0], 1)
    nuclei = morphology.remove_small_objects(blue > filters.threshold_otsu(blue), max_size=40)
    return _split(picture, measure.label(nuclei))


def _split(picture: np.ndarray, labels: np.ndarray) -> tuple[list[Pair], list[Pair]]:
    at = 2 * picture.shape[1] // 3
    return [(picture[:, :at], labels[:, :at])], [(picture[:, at:], labels[:, at:])]


SETS = {"cells": cells, "coins": coins, "ihc": ihc}


def _trained(name: str, steps: int, folder: pathlib.Path) -> tuple[SegmentationUNet, list[Pair], float]:
    """The network, the pictures to judge it by, and the seconds of its training."""
    learned, held_out = SETS[name]()
    channels = 1 if learned[0][0].ndim == 2 else 3
    data = Annotated([example(f"{name} {i}", *pair, channels=channels) for i, pair in enumerate(learned)])
    config = SegmentationUNetConfig(in_channels=channels, width=WIDTH, depth=DEPTH)
    schedule = dataclasses.replace(SegmentationTraining().schedule, steps=steps, ema_decay=0.98)
    began = time.perf_counter()
    model = train_segmentation(config, data, SegmentationTraining(schedule), folder=folder)
    return model, held_out, time.perf_counter() - began


def accuracy(options: argparse.Namespace) -> None:
    """Print and record a row for each set."""
    rows = []
    for name in SETS:
        with tempfile.TemporaryDirectory() as folder:
            model, held_out, seconds = _trained(name, options.steps, pathlib.Path(folder))
        found = [predict(model, picture) for picture, _ in held_out]
        truth = [instances(labels) > 0 for _, labels in held_out]
        joined = scores(np.hstack(found), np.hstack(truth))
        rows.append({
            "set": name, "steps": options.steps, "width": WIDTH, "depth": DEPTH,
            "pixels": sum(mask.size for mask in truth), "train_seconds": round(seconds, 1),
            **dataclasses.asdict(joined),
        })  # fmt: skip
        print(f"{name}: IoU {joined.iou:.3f}, Dice {joined.dice:.3f}, pixel error {joined.pixel_error:.3f}")
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            shown = overlay(held_out[0][0], found[0], truth[0])
            shown.save(options.pictures / f"segmentation-{name}.png")
    if not options.no_record:
        write_json(results_path("segmentation"), rows)


def draw_large(size: int, folder: pathlib.Path) -> tuple[pathlib.Path, np.ndarray]:
    """A picture and its truth, in memory-mapped files."""
    rng = np.random.default_rng(0)
    blocks = [draw_cells(_BLOCK, _BLOCK, 1000 + seed) for seed in range(16)]
    known = [(picture, (instances(labels) > 0).astype(np.uint8)) for picture, labels in blocks]
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(size, size))
        for name in ("picture", "truth")
    ]
    for top in range(0, size, _BLOCK):
        for left in range(0, size, _BLOCK):
            which, turns, mirror = rng.integers((16, 4, 2))
            for file, block in zip(files, known[which], strict=True):
                moved = np.rot90(block[:, ::-1] if mirror else block, turns)
                part = file[top : top + _BLOCK, left : left + _BLOCK]
                part[:] = moved[: part.shape[0], : part.shape[1]]
    for file in files:
        file.flush()
    return folder / "picture.npy", files[1]


def segment(folder: str, threads: int) -> dict[str, Any]:
    """Write the mask of the picture there; in the measured process."""
    torch.set_num_threads(threads)
    model = load_model(SegmentationUNet, folder)
    picture = check_picture("picture", np.load(f"{folder}/picture.npy", mmap_mode="r"), 1)
    memory = PeakMemory()
    _, seconds = predict_to_file(model, picture, f"{folder}/mask.npy", progress=True)
    return {"seconds": round(seconds, 1), "peak_bytes": memory.above()}


def large(options: argparse.Namespace) -> int:
    """Print and record time, memory and agreement; 1 if it took more than 2 GB."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, _, _ = _trained("cells", options.steps, folder / "run")
        save_model(model, folder)
        _, truth = draw_large(options.size, folder)
        measured = in_own_process("the prediction", segment, name, torch.get_num_threads())
        agreement = scores(np.load(folder / "mask.npy", mmap_mode="r"), truth)
    row = {"size": options.size, "width": WIDTH, "depth": DEPTH, "steps": options.steps, **measured}
    row |= dataclasses.asdict(agreement)
    memory = f"{row['peak_bytes'] / 1e9:.2f} GB above the weights"
    print(f"{options.size}x{options.size}: {row['seconds']} s, {memory}, IoU {agreement.iou:.3f}")
    if not options.no_record:
        write_json(results_path("segmentation_large"), [row])
    return 0 if row["peak_bytes"] < _LARGEST_BYTES else 1


def main() -> int:
    """Print and write results/<device>/segmentation.json or segmentation_large.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("accuracy", "large"))
    parser.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    parser.add_argument("--size", type=int, default=16384, help="of the large picture (%(default)s)")
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for what was found, in colours")
    parser.add_argument("--no-record", action="store_true", help="write no file")
    options = parser.parse_args()
    if options.part == "large":
        return large(options)
    accuracy(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
