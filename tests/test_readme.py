"""The README's Python, run as it stands; the model that it would fetch is the one that ships."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import sdfast
from sdfast.loading import digits_folder

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def block(text):
    (found,) = (block for block in BLOCKS if text in block)
    return found


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """What is fetched is the shipped model, and what is written lands in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    for kind in (diffusers.StableDiffusionPipeline, sdfast.StableDiffusion):
        load = kind.from_pretrained

        def from_pretrained(path_or_id, *, load=load, **keywords):
            return load(digits_folder() if path_or_id == SD15 else path_or_id, **keywords)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)


def test_the_added_line(shipped, capsys):
    names = {}
    lines = block("sdfast.optimize(pipe)")
    assert len(lines.splitlines()) <= 8
    exec(lines.replace("a lighthouse at dusk", "a handwritten two"), names)
    assert "modules by sdfast" in capsys.readouterr().out
    assert isinstance(names["image"], Image.Image)


def test_the_pipeline(shipped, tmp_path):
    names = {}
    exec(block("pipe.image_to_image"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"lighthouse.png", "storm.png"}
    assert names["again"].images[0].size == names["result"].images[0].size


def test_operations():
    pipe = sdfast.StableDiffusion.from_pretrained(digits_folder())
    names = {"x": torch.randn(2, 64, 4, 4), "weight": torch.ones(64), "bias": torch.zeros(64), "pipe": pipe}
    exec(block("ops.group_norm(x, 32"), names)
    assert names["image"].images
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(names["x"], 32))
    assert (names["y"] - expected).abs().max() < 1e-5


def test_tuning_and_tiles():
    pipe = sdfast.StableDiffusion.from_pretrained(digits_folder())
    names = {"pipe": pipe, "vae": pipe.vae, "latents": torch.randn(1, pipe.vae.config.latent_channels, 8, 8)}
    exec(block("tiled_vae.decode"), names)
    assert (names["image"] - pipe.vae.decode(names["latents"])).abs().max() < 1e-4
    assert pipe.text_to_image(
        "a handwritten two", steps=2, seed=0
    ).images  # by vae_memory_bytes, which it set
    exec(block("sdfast.tune("), names)
    assert len(names["report"]) > 0


def test_every_block_is_run_here():
    here = Path(__file__).read_text()
    marks = re.findall(r'block\("(.*?)"\)', here)
    assert all(any(mark in block for mark in marks) for block in BLOCKS)
