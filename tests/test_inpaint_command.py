"""`sdfast inpaint` and `sdfast outpaint`: what they write, and what they refuse before they do anything."""

import numpy as np
import pytest
import tiny_pipelines
from PIL import Image
from test_cli import refused
from tiny_pipelines import picture

from sdfast import cli
from sdfast.images import read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def run(model, tmp_path, capsys, monkeypatch):
    """Runs a command on the tiny model, in a folder with in.png and mask.png; returns status and what was said."""
    monkeypatch.chdir(tmp_path)
    picture(16, 16).save("in.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save("mask.png")

    def call(command, *arguments):
        given = ["a seven", "--model", str(model), "--steps", "2", "-o", "out.png", *map(str, arguments)]
        status = cli.main([command, *given])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def values(path):
    return np.asarray(Image.open(path))


def test_inpaint(run):
    status, out, err = run(
        "inpaint", "--image", "in.png", "--mask", "mask.png", "--seed", 3, "--keep-original"
    )
    assert status == 0 and err == "" and out.startswith("out.png: 1 image, seed 3; ")
    assert np.array_equal(values("out.png")[:, :8], values("in.png")[:, :8])
    assert not np.array_equal(values("out.png")[:, 8:], values("in.png")[:, 8:])
    settings = read_settings("out.png")
    assert settings["keep_original"] and settings["method"] == "blend" and settings["seeds"] == [3]


def test_inpaint_what_is_transparent(run):
    image = Image.open("in.png").convert("RGBA")
    image.putalpha(Image.eval(Image.open("mask.png"), lambda value: 255 - value))
    image.save("transparent.png")
    repaint = ["--method", "repaint", "--jump-length", 1, "--resamplings", 2]
    assert run("inpaint", "--image", "transparent.png", "--seed", 3, *repaint, "-n", 2, "--separate")[0] == 0
    settings = read_settings("out-0001.png")
    assert settings["seeds"] == [4] and settings["jump_length"] == 1 and settings["method"] == "repaint"


def test_outpaint(run):
    status, out, _ = run(
        "outpaint", "--image", "in.png", "--left", 5, "--bottom", 8, "--feather", 4, "--seed", 1
    )
    assert status == 0 and "1 image, seed 1" in out
    assert values("out.png").shape == (24, 21, 3)
    assert np.array_equal(values("out.png")[:12, 9:], values("in.png")[:12, 4:])
    assert run("outpaint", "--image", "in.png", "--left", 8, "--seed", 1, "--no-keep-original")[0] == 0
    assert not read_settings("out.png")["keep_original"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("inpaint", [], "--image"),
        (
            "inpaint",
            ["--image", "in.png"],
            "--mask: got None, and the image has no alpha channel; give a mask",
        ),
        (
            "inpaint",
            ["--image", "in.png", "--mask", "small.png"],
            "--mask: is 8x8 (width x height), the image 16x16",
        ),
        ("inpaint", ["--image", "in.png", "--mask", "absent.png"], "--mask: absent.png is no such file"),
        (
            "inpaint",
            ["--image", "in.png", "--method", "paint"],
            "--method: got 'paint', expected one of auto",
        ),
        ("inpaint", ["--image", "in.png", "--method", "repaint"], "--jump-length: got 10 for 2 steps"),
        ("inpaint", ["--image", "in.png", "--strength", "2"], "--strength: got 2.0"),
        (
            "inpaint",
            ["--image", "in.png", "--method", "repaint", "--jump-length", "1", "--sampler", "dpm++2m"],
            "--sampler: it remembers the step before",
        ),
        (
            "inpaint",
            ["--image", "odd.png", "--keep-original"],
            "--image: a picture of 12x16 would be resized, which --keep-original does not allow",
        ),
        (
            "inpaint",
            ["--image", "in.png", "--mask", "mask.png", "--height", "24", "--keep-original"],
            "which --keep-original does not allow",
        ),
        (
            "inpaint",
            ["--image", "in.png", "--mask", "mask.png", "-o", "./mask.png"],
            "--output: mask.png is --mask, too, and would be overwritten",
        ),
        (
            "outpaint",
            ["--image", "in.png", "--left", "8", "-o", "in.png"],
            "--output: in.png is --image, too",
        ),
        (
            "outpaint",
            ["--image", "a-0001.png", "--left", "8", "-o", "a.png", "-n", "2", "--separate"],
            "--output: a-0001.png is --image, too",
        ),
        ("inpaint", ["--image", "in.png", "-n", "0"], "--num-images: got 0"),
        ("inpaint", ["--image", "in.png", "-o", "out.jpg"], "expected a name that ends in .png"),
        ("outpaint", ["--image", "in.png"], "--left, --right, --top, --bottom: all are 0"),
        ("outpaint", ["--image", "in.png", "--left", "-1"], "--left: got -1"),
        (
            "outpaint",
            ["--image", "in.png", "--top", "8", "--feather", "16"],
            "--feather: 16 pixels from top leave",
        ),
        (
            "outpaint",
            ["--image", "in.png", "--left", "8", "--size", "16x16"],
            "unrecognized arguments: --size",
        ),
    ],
)
def test_bad_input(run, monkeypatch, command, arguments, message):
    monkeypatch.setattr("sdfast.command_line.load_pipeline", None)  # nothing is to be loaded
    Image.new("RGBA", (12, 16)).save("odd.png")
    Image.new("L", (8, 8), 255).save("small.png")
    assert refused(run(command, *arguments), message)


def test_interrupted_while_writing(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    assert run("inpaint", "--image", "in.png", "--mask", "mask.png")[0] == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "mask.png"]
