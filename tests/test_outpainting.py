"""Outpainting: the canvas, the seam, what is kept."""

import json

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import assert_same_pictures, picture

import sdfast
from sdfast.outpainting import grown_canvas

RUN = {"steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("outpainting") / "sd")
    return sdfast.StableDiffusion.from_pretrained(folder)


def canvas_of(height, width, *, left=0, right=0, top=0, bottom=0, feather=0, keep_original=True):
    images = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    return grown_canvas(
        images, left=left, right=right, top=top, bottom=bottom, feather=feather, keep_original=keep_original,
        multiple=8, downsampling=4,
    )  # fmt: skip


def test_canvas_of_whole_latents():
    canvas = canvas_of(8, 8, left=8, bottom=16)
    assert canvas.size is None and canvas.images.shape == (1, 1, 24, 16)
    values = torch.arange(64.0).view(8, 8)
    assert torch.equal(canvas.images[0, 0, :8, 8:], values)
    assert torch.equal(canvas.images[0, 0, :8, :8], values[:, :1].expand(8, 8))  # the border, repeated
    assert torch.equal(canvas.images[0, 0, 8:, 8:], values[-1:].expand(16, 8))
    new = torch.ones(24, 16)
    new[:8, 8:] = 0
    assert torch.equal(canvas.masks[0, 0], new) and torch.equal(canvas.weights[0, 0], new)


def test_canvas_of_other_sizes():
    """A latent with a new pixel is painted; the canvas ends at the next multiple."""
    canvas = canvas_of(9, 8, left=3, top=1)
    assert canvas.size == (10, 11) and canvas.images.shape == (1, 1, 16, 16)
    # Latents are 4 pixels wide: those of columns 0 to 3 and 8 on (the image ends at 11), of rows 0 to 3 and 8 on.
    kept = torch.zeros(16, 16)
    kept[4:8, 4:8] = 1
    assert torch.equal(canvas.masks[0, 0], 1 - kept)
    weights = torch.ones(16, 16)
    weights[1:10, 3:11] = 0
    assert torch.equal(canvas.weights[0, 0], weights)


def test_feather():
    canvas = canvas_of(8, 16, left=8, right=8, feather=3)
    row = canvas.weights[0, 0, 4]
    expected = [1] * 8 + [0.75, 0.5, 0.25] + [0] * 10 + [0.25, 0.5, 0.75] + [1] * 8
    assert row.tolist() == expected
    corner = canvas_of(16, 16, left=8, top=8, feather=3).weights[0, 0, 8:, 8:]
    assert torch.equal(corner, torch.maximum(corner[-1:], corner[:, -1:]))
    assert canvas_of(8, 8, left=8, keep_original=False).weights is None


def test_the_picture_is_kept_to_the_bit_but_where_it_fades(pipe):
    source = picture(19, 13)
    drawn = pipe.outpaint("seven", source, left=6, bottom=11, feather=2, **RUN)
    assert drawn.images[0].size == (25, 24)
    values, original = np.asarray(drawn.images[0]), np.asarray(source)
    assert np.array_equal(values[:11, 8:], original[:11, 2:])
    assert not np.array_equal(values[11:13, 8:], original[11:, 2:])
    assert {"height": 24, "width": 25, "left": 6, "right": 0, "feather": 2}.items() <= drawn.settings.items()
    hard = pipe.outpaint("seven", source, left=6, bottom=11, feather=0, **RUN).images[0]
    assert np.array_equal(np.asarray(hard)[:13, 6:], original)
    tensor = pipe.outpaint("seven", source, left=6, bottom=11, feather=2, output="tensor", **RUN).images
    assert tensor.shape == (1, 3, 24, 25)


def test_outpainting_is_inpainting_of_the_canvas(pipe):
    """On whole latents, where nothing is put back."""
    source = picture(16, 16)
    ours = pipe.outpaint("seven", source, right=8, keep_original=False, **RUN)
    canvas, mask = (
        np.pad(np.asarray(source), ((0, 0), (0, 8), (0, 0)), mode="edge"),
        np.zeros((16, 24), np.uint8),
    )
    mask[:, 16:] = 255
    images = torch.from_numpy(canvas / 255).float().permute(2, 0, 1)[None]
    masks = torch.from_numpy(mask / 255).float()[None, None]
    assert_same_pictures(ours.images, pipe.inpaint("seven", images, masks, **RUN).images, most=0)


def test_repaint_and_several_images(pipe):
    options = {"method": "repaint", "jump_length": 1, "resamplings": 2, "top": 8, "steps": 3, "seed": 0}
    sources = [picture(), picture().rotate(90)]
    drawn = pipe.outpaint(["seven", "and"], sources, num_images=2, **options)
    assert len(drawn.images) == 4 and drawn.images[0].size == (16, 24)
    alone = pipe.outpaint("and", sources[1], num_images=2, **options | {"seed": 2})
    assert_same_pictures(alone.images, drawn.images[2:], most=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "left, right, top, bottom: all are 0"),
        ({"left": -8}, "left: got -8, expected 0 to 65536 pixels"),
        ({"left": 8, "feather": -1}, "feather: got -1"),
        (
            {"left": 8, "right": 8},
            "feather: 8 pixels from left and right leave nothing whole of 16; take at most 7",
        ),
        ({"top": 8, "feather": 16}, "feather: 16 pixels from top leave nothing whole of 16; take at most 15"),
        ({"left": 2**16}, "width: got 65552"),
        ({"left": 3, "output": "latent", "keep_original": False}, "output: 'latent' cannot be cut to 16x19"),
        ({"left": 8, "output": "latent"}, "keep_original: puts pixels back"),
        (
            {"left": 8, "image": [picture(), picture(8)]},
            "a picture of 8x16 would be resized, which outpaint",
        ),
        ({"left": 8, "method": "paint"}, "method: got 'paint'"),
    ],
)
def test_bad_arguments(pipe, options, message):
    def nothing_is_computed(*_):
        raise AssertionError("a step was run")

    arguments = {"prompt": "seven", "image": picture(), "steps": 2, "on_step": nothing_is_computed} | options
    with pytest.raises(ValueError, match=message):
        pipe.outpaint(**arguments)


def test_numbers_of_numpy(pipe):
    numbers = {"left": 8, "feather": 2, "jump_length": 1, "resamplings": 2, "steps": 2, "seed": 3}
    plain = pipe.outpaint("seven", picture(), method="repaint", **numbers).settings
    numpy = {name: np.int64(value) for name, value in numbers.items()}
    assert json.dumps(pipe.outpaint("seven", picture(), method="repaint", **numpy).settings) == json.dumps(
        plain
    )


def test_sides_are_whole_numbers(pipe):
    with pytest.raises(TypeError, match=r"left: got 8\.5, expected a whole number"):
        pipe.outpaint("seven", picture(), left=8.5)
