"""Pictures keep their pixels, files are whole, and a PNG says how it was made."""

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image
from tiny_pipelines import assert_same_pictures, picture

from sdfast.images import as_tensor, grid, read_image, read_settings, save_png, to_pil


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_pictures_survive_a_round_trip(mode):
    source = picture(24, 16, mode)
    tensor = as_tensor(source, height=None, width=None, channels=3, multiple=8)
    assert tensor.shape == (1, 3, 16, 24) and tensor.min() >= -1 and tensor.max() <= 1
    assert_same_pictures(to_pil(tensor / 2 + 0.5), [source.convert("RGB")], most=0)


def assert_resized_as(source, expected):
    """as_tensor at another size gives the pixels of `expected`, resized."""
    tensor = as_tensor(source, height=8, width=16, channels=3, multiple=8)
    resized = expected.resize((16, 8), Image.Resampling.LANCZOS)
    assert_same_pictures(to_pil(tensor / 2 + 0.5), [resized], most=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
def test_resized_as_by_diffusers(mode):
    """Converted first: what lies between numbers 3 and 5 of a palette is not number 4."""
    source = picture(24, 16, mode)
    assert_resized_as(source, load_image(source))


def test_transparency_becomes_white():
    source = picture(24, 16, "RGBA")
    source.paste((255, 0, 0, 0), (0, 0, 12, 16))  # red that nobody sees
    expected = source.convert("RGB")
    expected.paste("white", (0, 0, 12, 16))
    assert_resized_as(source, expected)
    palette = Image.new("P", (24, 16), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 12, 16))
    palette.info["transparency"] = 0
    expected = Image.new("RGB", (24, 16), "blue")
    expected.paste("white", (0, 0, 12, 16))
    assert_resized_as(palette, expected)


def test_sixteen_bits(tmp_path):
    levels = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24) % 256
    Image.fromarray(levels * 257).save(tmp_path / "deep.png")
    deep = read_image(tmp_path / "deep.png")
    assert deep.mode.startswith("I")
    assert_resized_as(deep, Image.fromarray(levels.astype(np.uint8)).convert("RGB"))


def test_grid():
    sheet = grid([picture()] * 5)
    assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
    assert grid([picture(mode="L")] * 4, columns=4).size == (4 * 18 + 2, 18 + 2)
    assert np.asarray(sheet)[:2].min() == 255 and sheet.crop((2, 2, 18, 18)).tobytes() == picture().tobytes()


def test_settings_in_a_file(tmp_path):
    settings = {
        "prompt": "eine Sieben, 七", "negative_prompt": "ink", "steps": 5, "seeds": [3, 4], "sampler": "ddim",
        "guidance_scale": 7.5, "height": 16, "width": 24, "model": "digits",
    }  # fmt: skip
    path = tmp_path / "seven.png"
    save_png(picture(), path, settings)
    assert read_settings(path) == settings
    assert Image.open(path).text["parameters"] == (
        "eine Sieben, 七\nNegative prompt: ink\n"
        "Steps: 5, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 24x16, Model: digits"
    )
    save_png(picture(), path)
    with pytest.raises(ValueError, match="carries no settings"):
        read_settings(path)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "seven.png"
    save_png(picture(), path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(picture().rotate(90), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unreadable_images(tmp_path):
    save_png(picture(64, 64), tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(OSError, match=name):
            read_image(tmp_path / name)
