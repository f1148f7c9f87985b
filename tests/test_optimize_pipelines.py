"""Unmodified diffusers scripts with one added line: the same pictures."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import sd_pipeline

import sdfast
from sdfast.loading import digits_folder

LARGEST_MEAN_DIFFERENCE = 1 / 255


def script(pipe, **keywords):
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=6, generator=draw, output_type="np", **keywords).images


def check(pipe, **keywords):
    before = script(pipe, **keywords)
    report = sdfast.optimize(pipe)
    after = script(pipe, **keywords)
    assert before.std() > 0.01 and not report.left, report.summary()
    assert np.abs(after - before).mean() < LARGEST_MEAN_DIFFERENCE
    sdfast.restore(pipe)
    assert np.array_equal(script(pipe, **keywords), before)
    return before, after


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_digits(scheduler):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(digits_folder())
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    before, after = check(pipe, prompt=["a handwritten seven", "a handwritten two"], guidance_scale=4.0)
    assert np.abs(after - before).max() < 0.02
    assert np.abs(before[0] - before[1]).mean() > 0.05  # two pictures, not one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_pipeline(tmp_path_factory.mktemp("pipeline"))


def prepared(folder, kind):
    pipe = kind.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_text_to_image(folder):
    check(prepared(folder, diffusers.StableDiffusionPipeline), prompt="seven", height=64, width=48)


def test_image_to_image(folder):
    image = np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32)
    pipe = prepared(folder, diffusers.StableDiffusionImg2ImgPipeline)
    check(pipe, prompt="seven", image=image, strength=0.7)


def test_inpainting(folder):
    image = np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32)
    mask = np.zeros((1, 64, 64), np.float32)
    mask[:, 16:48, 16:48] = 1
    pipe = prepared(folder, diffusers.StableDiffusionInpaintPipeline)
    check(pipe, prompt="seven", image=image, mask_image=mask, height=64, width=64)


def test_pipeline_is_saved_as_it_was(folder, tmp_path):
    pipe = prepared(folder, diffusers.StableDiffusionPipeline)
    pipe.save_pretrained(tmp_path / "before")
    sdfast.optimize(pipe)
    pipe.save_pretrained(tmp_path / "after")
    for name in (
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text(), name
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "after")
    for (name, a), b in zip(again.unet.named_parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_tiled_vae_of_an_optimized_pipeline(folder):
    """Bands find the blocks of an optimised VAE as they find diffusers'."""
    vae = prepared(folder, diffusers.StableDiffusionPipeline).vae
    latents = torch.randn(1, vae.config.latent_channels, 12, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        sdfast.optimize(vae)
        banded = sdfast.tiled_vae.decode(vae, latents, memory_bytes=10**9)
    assert float((banded - expected).abs().max()) < 1e-4
