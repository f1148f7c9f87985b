"""What a pipeline is asked: numbers of every kind, and what is refused before anything is computed."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import assert_same_pictures, picture

import sdfast
from sdfast import loading
from sdfast.diffusion import SAMPLERS, NoiseSchedule
from sdfast.models.checkpoint import CheckpointError, load_components
from sdfast.request import REMEMBERING_SAMPLERS, SAMPLER_NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture(scope="module")
def pipe(folder):
    return sdfast.StableDiffusion.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height: got 100, expected a multiple of 8; the nearest are 96 and 104"),
        ({"width": 0}, "width: got 0"),
        ({"height": 65536, "width": 65536}, "GiB"),
        ({"steps": 0}, "steps: got 0, expected 1 to 1000"),
        ({"steps": 1001}, "steps: got 1001"),
        ({"steps": 1000}, "steps: got 1000, this model's schedule allows 999 at most"),
        ({"num_images": 0}, "num_images: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"sampler": "plms"}, "sampler: got 'plms'"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": [1, 2]}, "seed: got 2 seeds for 1 images"),
        ({"output": "jpeg"}, "output: got 'jpeg'"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2 for 1 prompts"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "latents: got shape"),
        ({"time_ids": (1, 2, 3, 4, 5, 6)}, "time_ids"),
    ],
)
def test_bad_arguments(pipe, options, message):
    def nothing_is_computed(*_):
        raise AssertionError("a step was run")

    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pipe.text_to_image("seven", on_step=nothing_is_computed, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": 2.5},
        {"steps": 2.5},
        {"batch_size": 1.5},
        {"seed": 2.5},
        {"seed": [0.5]},
        {"height": 16.5},
    ],
)
def test_numbers_that_are_not_whole(pipe, options):
    (name,) = options
    with pytest.raises(TypeError, match=f"{name}: got .*expected a whole number"):
        pipe.text_to_image("seven", **options)


def test_numbers_of_numpy(pipe):
    plain = {"seed": 3, "steps": 2, "num_images": 2, "height": 16, "width": 24, "guidance_scale": 2.0}
    ours = pipe.text_to_image("seven", **plain)
    numpy = {name: np.asarray(value)[()] for name, value in plain.items()}
    theirs = pipe.text_to_image("seven", **numpy)
    assert_same_pictures(theirs.images, ours.images, most=0)
    assert json.dumps(theirs.settings) == json.dumps(ours.settings)
    again = pipe.text_to_image("seven", **numpy | {"seed": np.array([3, 4])})
    assert again.seeds == [3, 4] and json.dumps(again.settings) == json.dumps(ours.settings)


def test_request_knows_the_samplers():
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    plans = {name: sampler(NoiseSchedule.linear(), 4) for name, sampler in SAMPLERS.items()}
    assert tuple(n for n, plan in plans.items() if plan.takes_previous_x0) == REMEMBERING_SAMPLERS


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (picture(), {"strength": 1.2}, ValueError, "strength: got 1.2, expected 0 to 1"),
        (picture(), {"strength": -0.1}, ValueError, "strength"),
        (picture(), {"strength": 0.01, "steps": 10}, ValueError, "leaves none to run"),
        (picture(), {"strength": 0.5, "steps": 0}, ValueError, "steps: got 0"),
        (picture(), {"width": 20}, ValueError, "width: got 20"),
        (picture(4, 4), {}, ValueError, "height: got 0"),
        ([picture()] * 3, {}, ValueError, "got 3 images for 2 prompts"),
        ([], {}, TypeError, "image"),
        ("seven.png", {}, TypeError, "image"),
        (torch.zeros(1, 1, 16, 16), {}, ValueError, "image: got torch.float32 of shape"),
        (torch.full((1, 3, 16, 16), 2.0), {}, ValueError, r"outside \[0, 1\]"),
    ],
)
def test_bad_images(pipe, image, options, error, message):
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore")
        pipe.image_to_image(["seven", "and"], image, **options)


def test_an_image_of_odd_size_is_cut_and_that_is_told(pipe):
    with pytest.warns(UserWarning, match="the image is 21x16; it is resized to 16x16"):
        assert pipe.image_to_image("seven", picture(21, 16), steps=2).images[0].size == (16, 16)


def test_what_digits_means(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = sdfast.StableDiffusion.digits().unet.config
    assert sdfast.StableDiffusion.from_pretrained("digits").unet.config == shipped
    shutil.copytree(folder, "digits")
    assert sdfast.StableDiffusion.digits().unet.config == shipped
    for path in ("./digits", Path("digits"), tmp_path / "digits"):
        assert sdfast.StableDiffusion.from_pretrained(path).unet.config != shipped
    with pytest.raises(CheckpointError, match=r"digits: .*\./digits for yours"):
        sdfast.StableDiffusion.from_pretrained("digits")


def test_arguments_that_would_change_nothing(folder, tmp_path):
    with pytest.raises(ValueError, match="^tokenizer: "):
        sdfast.StableDiffusion.from_pretrained(folder, tokenizer=folder / "tokenizer")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="^variant: "):
        sdfast.StableDiffusion.from_pretrained(tmp_path / "model.safetensors", variant="fp16")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_part_that_is_no_part(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "broken")
    index = tmp_path / "broken" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: 5}))
    with pytest.raises(CheckpointError, match=f"broken.*{part}"):
        sdfast.StableDiffusion.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("lost", ["unet", "tokenizer/tokenizer.json", "model_index.json"])
def test_incomplete_folder(folder, tmp_path, lost):
    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="broken"):
        sdfast.StableDiffusion.from_pretrained(tmp_path / "broken")


def test_models_that_do_not_draw_from_text(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="DDPMPipeline without vae, text_encoder"):
        sdfast.StableDiffusion.from_pretrained(tmp_path)


def test_single_file_takes_its_tokenizer_from_elsewhere(folder, tmp_path, monkeypatch):
    import huggingface_hub

    components = load_components(folder)
    file = tmp_path / "model.safetensors"
    file.touch()
    monkeypatch.setattr(loading, "load_single_file", lambda *_, **__: dict(components))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="a single file holds no tokenizer.*--tokenizer"):
        sdfast.StableDiffusion.from_pretrained(file)
    drawn = sdfast.StableDiffusion.from_pretrained(file, tokenizer=folder / "tokenizer")
    whole = sdfast.StableDiffusion.from_pretrained(folder)
    options = {"steps": 2, "seed": 0}
    assert_same_pictures(
        drawn.text_to_image("seven", **options).images, whole.text_to_image("seven", **options).images, most=0
    )
