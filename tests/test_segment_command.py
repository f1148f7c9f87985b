"""`sdfast segment`: what it makes, what it says, and what it refuses before it does anything."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sdfast import cli
from sdfast.models import SegmentationUNet, SegmentationUNetConfig
from sdfast.models.checkpoint import save_model
from sdfast.segmentation import default_tile, least_memory_bytes
from sdfast.segmentation_scores import scores
from sdfast.training.cells import draw_cells


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Holds data/, and the model that a short training made of it."""
    folder = tmp_path_factory.mktemp("segment")
    for kind in ("images", "masks"):
        (folder / "data" / kind).mkdir(parents=True)
    for seed in range(2):
        picture, labels = draw_cells(60, 70, seed)
        Image.fromarray(picture).save(folder / "data" / "images" / f"{seed}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "data" / "masks" / f"{seed}.png")
    assert cli.main(training(folder)) == 0
    return folder


def training(folder, *more, output="model"):
    return [
        "segment", "train", str(folder / "data"), "-o", str(folder / output), "--run-dir", str(folder / "run"),
        "--steps", "3", "--width", "4", "--depth", "1", "--tile", "20", *more,
    ]  # fmt: skip


def refused(status, capsys, message):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("sdfast:")]
    return status == 2 and len(lines) == 1 and re.search(message, lines[0]) is not None


def test_predicts_what_was_trained(place, capsys):
    status = cli.main([
        "segment", "predict", str(place / "data/images/0.png"), "--model", str(place / "model"),
        "-o", str(place / "mask.png"), "--overlay", str(place / "overlay.png"), "--truth",
        str(place / "data/masks/0.png"),
    ])  # fmt: skip
    out = capsys.readouterr().out
    mask = np.asarray(Image.open(place / "mask.png"))
    assert status == 0 and mask.shape == (60, 70) and set(np.unique(mask)) <= {0, 255}
    found = scores(mask, np.asarray(Image.open(place / "data/masks/0.png")))
    told = f"IoU {found.iou:.4f}, Dice {found.dice:.4f}, pixel error {found.pixel_error:.4f}\n"
    assert re.match(rf"\S+mask\.png: 60x70, [\d.]+% cells; [\d.]+ s; {re.escape(told)}", out)
    assert Image.open(place / "overlay.png").size == (70, 60)


def test_arrays_from_file_to_file(place):
    np.save(place / "picture.npy", draw_cells(60, 70, 0)[0])
    for name in ("picture.npy", "data/images/0.png"):
        arguments = ["--model", str(place / "model"), "-o", str(place / "mask.npy"), "--tile", "20"]
        assert cli.main(["segment", "predict", str(place / name), *arguments]) == 0
        mask = np.load(place / "mask.npy")
        assert mask.shape == (60, 70) and mask.max() <= 1
        if name == "picture.npy":
            first = mask
    assert np.array_equal(first, mask)


def test_finished_training_is_not_done_again(place, capsys):
    before = (place / "model" / "model.safetensors").read_bytes()
    assert cli.main(training(place)) == 0
    assert (place / "model" / "model.safetensors").read_bytes() == before
    assert refused(cli.main(training(place, "--seed", "1")), capsys, r"seed is 0 there and 1 here.*--restart")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tile", "21"], r"--tile: got 21, .* nearest that fit are 20 and 22"),
        (["--steps", "0"], r"--steps: got 0, expected at least 1"),
        (["--learning-rate", "0"], r"--learning-rate: got 0.0, expected more than 0"),
        (["--displacement", "-1"], r"--displacement: got -1.0"),
        (["-o", "{place}/data"], r"--output: \S+data holds something else than such a model"),
        (["--run-dir", "{place}/data/images/0.png"], r"--run-dir: \S+0\.png is no folder"),
    ],
)
def test_bad_training_is_refused(place, capsys, more, message):
    more = [one.format(place=place) for one in more]
    assert refused(cli.main(training(place, *more)), capsys, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "mask.jpg"], r"--output: got mask\.jpg, expected a name that ends in \.png or \.npy"),
        (["--overlay", "nowhere/a.png"], r"--overlay: the folder nowhere does not exist"),
        (
            ["-o", "{place}/data/masks/0.png", "--truth", "data/masks/../masks/0.png"],
            r"--output: \S+0\.png is --truth, too, and would be overwritten",
        ),
        (["-o", "data/images/0.png"], r"--output: data/images/0\.png is IMAGE, too"),
        (["-o", "m.png", "--overlay", "./m.png"], r"--overlay: m\.png is --output, too"),
        (["-o", "m.png", "--overlay", "{place}/data/images/0.png"], r"--overlay: \S+ is IMAGE, too"),
        (["--memory", "1"], r"--memory: got 1, expected at least 10 MB"),
        (["--tile", "21"], r"--tile: got 21, .* 20 and 22"),
        (
            ["--truth", "{place}/small.png"],
            r"--truth: \S+small\.png has shape \(5, 4\), the picture \(60, 70\)",
        ),
        (["--model", "{place}/data"], r"config\.json"),
        (["--device", "nowhere"], r"--device: 'nowhere' cannot be used"),
    ],
)
def test_bad_prediction_is_refused(place, capsys, monkeypatch, more, message):
    monkeypatch.chdir(place)
    Image.new("L", (4, 5)).save(place / "small.png")
    more = [one.format(place=place) for one in more]
    base = ["segment", "predict", str(place / "data/images/0.png"), "--model", str(place / "model")]
    assert refused(cli.main([*base, *more]), capsys, message)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_memory_is_told_in_megabytes(place, tmp_path, capsys):
    model = SegmentationUNet(SegmentationUNetConfig(width=8))
    save_model(model, tmp_path)
    least = math.ceil(least_memory_bytes(model.config) / 10**6)
    assert default_tile(model.config, least * 10**6) == model.config.smallest_tile and least == 11
    base = ["segment", "predict", str(place / "data/images/0.png"), "--model", str(tmp_path)]
    status = cli.main([*base, "-o", str(tmp_path / "m.png"), "--memory", "10"])
    assert refused(status, capsys, r"--memory: got 10, expected at least 11 MB for this model")


def test_absent_picture_is_refused(place, capsys):
    status = cli.main(
        [
            "segment",
            "predict",
            str(place / "none.png"),
            "--model",
            str(place / "model"),
            "-o",
            str(place / "m.png"),
        ]
    )
    assert refused(status, capsys, "IMAGE: .*none.png is no such file")


def test_refused_without_torch():
    code = (
        "import sys; from sdfast import cli;"
        "assert cli.main(['segment', 'predict', 'a.png', '--model', 'm', '-o', 'a.jpg']) == 2;"
        "assert cli.main(['segment', 'train', 'd', '-o', 'm', '--steps', '0']) == 2;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
