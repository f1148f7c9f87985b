"""Pictures are diffusers' pictures, a seed is a picture, and what cannot be drawn is refused first."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from tiny_pipelines import assert_same_pictures, picture

import sdfast
from sdfast import loading
from sdfast.diffusion import SAMPLERS, NoiseSchedule
from sdfast.images import to_pil
from sdfast.models.checkpoint import CheckpointError, load_components
from sdfast.request import REMEMBERING_SAMPLERS, SAMPLER_NAMES

STEPS = 6
# Ours -> diffusers', built from the pipeline's own configuration.
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny_pipelines.sd_pipeline(folder / "sd"),
        "v": tiny_pipelines.sd_pipeline(folder / "v", prediction_type="v_prediction"),
        "grey": tiny_pipelines.sd_pipeline(folder / "grey", channels=1),
        "sdxl": tiny_pipelines.sdxl_pipeline(folder / "sdxl"),
    }


@pytest.fixture(scope="module")
def pipe(folders):
    return sdfast.StableDiffusion.from_pretrained(folders["sd"])


def theirs(folder, *, sampler=None, image_to_image=False):
    kind = diffusers.AutoPipelineForImage2Image if image_to_image else diffusers.AutoPipelineForText2Image
    other = kind.from_pretrained(folder)
    if sampler is not None:
        other.scheduler = SCHEDULERS[sampler].from_config(other.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image_is_diffusers(folders, pipe, sampler):
    prompts = ["a handwritten seven!", "and"]
    ours = pipe.text_to_image(prompts, steps=STEPS, sampler=sampler, seed=3, height=24, width=16)
    other = theirs(folders["sd"], sampler=sampler)(
        prompts, num_inference_steps=STEPS, generator=generators(2, 3), height=24, width=16
    )
    assert_same_pictures(ours.images, other.images)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_is_diffusers(folders, pipe, sampler, strength):
    options = {"strength": strength, "guidance_scale": 3.0}
    ours = pipe.image_to_image("seven", picture(), steps=STEPS, sampler=sampler, seed=5, **options)
    other = theirs(folders["sd"], sampler=sampler, image_to_image=True)(
        "seven", picture(), num_inference_steps=STEPS, generator=generators(1, 5), **options
    )
    assert_same_pictures(ours.images, other.images)


@pytest.mark.parametrize("kind", ["v", "grey", "sdxl"])
@pytest.mark.parametrize("negative_prompt", [None, "", "and an"])
def test_other_models_are_diffusers(folders, kind, negative_prompt):
    options = {"negative_prompt": negative_prompt, "guidance_scale": 5.0, "height": 16, "width": 24}
    ours = sdfast.StableDiffusion.from_pretrained(folders[kind]).text_to_image(
        "seven", steps=STEPS, seed=1, **options
    )
    other = theirs(folders[kind])("seven", num_inference_steps=STEPS, generator=generators(1, 1), **options)
    assert_same_pictures(ours.images, other.images)


def test_sdxl_image_to_image_is_diffusers(folders):
    ours = sdfast.StableDiffusion.from_pretrained(folders["sdxl"]).image_to_image(
        "seven", picture(20, 16), steps=STEPS, seed=1, guidance_scale=5.0, strength=0.7, width=24, height=16
    )
    other = theirs(folders["sdxl"], image_to_image=True)(
        "seven",
        image=picture(20, 16).resize((24, 16), Image.Resampling.LANCZOS),
        num_inference_steps=STEPS,
        generator=generators(1, 1),
        guidance_scale=5.0,
        strength=0.7,
    )
    assert_same_pictures(ours.images, other.images)


def test_sdxl_time_ids_are_diffusers(folders):
    ours = sdfast.StableDiffusion.from_pretrained(folders["sdxl"]).text_to_image(
        "seven", steps=STEPS, seed=1, time_ids=(300, 400, 10, 20, 64, 72)
    )
    other = theirs(folders["sdxl"])(
        "seven",
        num_inference_steps=STEPS,
        generator=generators(1, 1),
        guidance_scale=7.5,
        original_size=(300, 400),
        crops_coords_top_left=(10, 20),
        target_size=(64, 72),
    )
    assert_same_pictures(ours.images, other.images)


def test_guidance_of_one_is_none_and_latents_can_be_given(folders, pipe):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    calls = []
    hook = pipe.unet.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[0]))
    ours = pipe.text_to_image("seven", steps=STEPS, guidance_scale=1.0, num_images=2, latents=latents)
    hook.remove()
    other = theirs(folders["sd"])(
        "seven", num_inference_steps=STEPS, guidance_scale=1.0, num_images_per_prompt=2, latents=latents
    )
    assert_same_pictures(ours.images, other.images)
    assert calls == [2] * STEPS  # not doubled


# The model that ships


@pytest.mark.parametrize("sampler", [None, "euler", "dpm++2m"])
def test_diffusers_loads_the_digits_and_draws_the_same(sampler):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a handwritten seven", "a handwritten zero", "3", "an eight"]
    ours = sdfast.StableDiffusion.digits().text_to_image(prompts, steps=20, latents=latents, sampler=sampler)
    other = diffusers.StableDiffusionPipeline.from_pretrained(loading.digits_folder())
    if sampler is not None:
        other.scheduler = SCHEDULERS[sampler].from_config(other.scheduler.config)
    other.set_progress_bar_config(disable=True)
    pictures = other(prompts, num_inference_steps=20, latents=latents).images
    assert_same_pictures(ours.images, pictures)


# Seeds, batches, results


@pytest.mark.parametrize(
    ("prompts", "options", "rows"),
    [
        pytest.param("seven", {"num_images": 2}, [2], id="images of one prompt share its rows"),
        pytest.param("seven", {"num_images": 3, "batch_size": 1}, [2], id="and so do batches"),
        pytest.param(["seven", "and"], {"num_images": 2}, [4], id="two prompts"),
        pytest.param(
            ["seven", "and"], {"num_images": 2, "batch_size": 3}, [6, 2], id="that end inside a batch"
        ),
        pytest.param("seven", {"guidance_scale": 1.0}, [1], id="no guidance"),
    ],
)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_text_and_time_are_projected_before_the_steps(folders, kind, prompts, options, rows):
    """Rows of text in each call of a cross-attention's `to_k`, and rows of time in each of a ResNet block."""
    pipe = sdfast.StableDiffusion.from_pretrained(folders[kind])
    texts, times = [], []
    block = pipe.unet.mid_block
    watched = [
        (block.attentions[0].transformer_blocks[0].attn2.to_k, texts),
        (block.resnets[0].time_emb_proj, times),
    ]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        for layer, seen in watched
    ]
    pipe.text_to_image(prompts, steps=STEPS, seed=0, **options)
    for hook in hooks:
        hook.remove()
    assert texts == rows
    assert times == [STEPS * (n if kind == "sdxl" else 1) for n in rows]


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_seed_is_a_picture_whatever_the_batch(pipe, sampler):
    def draw(**options):
        return pipe.text_to_image("seven", steps=STEPS, sampler=sampler, **options).images

    whole = draw(seed=10, num_images=5)
    again = draw(seed=10, num_images=5)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(whole, again, strict=True))
    assert_same_pictures(draw(seed=10, num_images=5, batch_size=2), whole, most=1)
    assert_same_pictures(draw(seed=[13, 11], num_images=2), [whole[3], whole[1]], most=1)


def test_image_to_image_does_not_depend_on_the_batch(pipe):
    sources = [picture(), picture().rotate(90)]

    def draw(**options):
        return pipe.image_to_image("seven", sources, steps=STEPS, seed=4, num_images=2, **options).images

    whole = draw()
    assert_same_pictures(draw(batch_size=3), whole, most=1)
    alone = pipe.image_to_image("seven", sources[1], steps=STEPS, seed=6, num_images=2)
    assert_same_pictures(alone.images, whole[2:], most=1)


def test_fresh_seeds_are_told(pipe):
    drawn = pipe.text_to_image("seven", steps=2, num_images=2)
    again = pipe.text_to_image("seven", steps=2, num_images=2, seed=drawn.seeds)
    assert_same_pictures(again.images, drawn.images, most=0)
    assert len(set(drawn.seeds)) == 2


def test_result(pipe):
    steps = []
    drawn = pipe.text_to_image(
        ["seven", "and"],
        steps=3,
        seed=0,
        batch_size=1,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i + 1, 6) for i in range(6)]
    assert 0 < drawn.seconds_per_step < drawn.seconds
    assert drawn.peak_memory_bytes > 2**20
    assert drawn.settings["prompt"] == ["seven", "and"] and drawn.settings["seeds"] == [0, 1] == drawn.seeds
    assert (drawn.settings["height"], drawn.settings["width"]) == pipe.default_size == (16, 16)


def test_outputs(pipe):
    options = {"steps": 2, "seed": 0, "num_images": 2, "height": 16, "width": 24}
    tensor = pipe.text_to_image("seven", output="tensor", **options).images
    assert tensor.shape == (2, 3, 16, 24) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1 and not tensor.requires_grad
    assert_same_pictures(to_pil(tensor), pipe.text_to_image("seven", **options).images, most=0)
    latents = pipe.text_to_image("seven", output="latent", **options).images
    assert latents.shape == (2, 4, 8, 12)


def test_an_exception_in_the_callback_ends_the_run(pipe):
    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.text_to_image("seven", steps=5, on_step=stop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(folders, pipe, dtype):
    narrow = sdfast.StableDiffusion.from_pretrained(folders["sd"], dtype=dtype)
    assert narrow.dtype == dtype and narrow.vae.decoder.conv_in.weight.dtype == dtype
    drawn = narrow.text_to_image("seven", steps=2, seed=0, output="tensor").images
    latents = narrow.text_to_image("seven", steps=2, seed=0, output="latent").images
    assert latents.dtype == dtype and drawn.isfinite().all() and drawn.std() > 0.02


def test_the_vae_of_sdxl_stays_wide_where_it_says_so(folders):
    narrow = sdfast.StableDiffusion.from_pretrained(folders["sdxl"], dtype=torch.float16)
    assert narrow.vae.config.force_upcast and narrow.vae.decoder.conv_in.weight.dtype == torch.float32
    assert narrow.text_to_image("seven", steps=1, seed=0, output="tensor").images.isfinite().all()
    redrawn = narrow.image_to_image("seven", picture(), steps=2, seed=0, output="latent").images
    assert redrawn.dtype == torch.float16


def test_overflow_is_told(pipe):
    with pytest.warns(UserWarning, match="not numbers"):
        pipe.text_to_image("seven", steps=1, latents=torch.full((1, 4, 8, 8), float("nan")))


# What is refused


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


def test_a_long_prompt_is_cut_and_that_is_told(pipe, folders):
    prompt = "seven " * 75 + "this was too much"
    with pytest.warns(UserWarning, match="'this was too much'"):
        ours = pipe.text_to_image(prompt, steps=2, seed=0)
    other = theirs(folders["sd"])(prompt, num_inference_steps=2, generator=generators(1))
    assert_same_pictures(ours.images, other.images)


def test_what_digits_means(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = sdfast.StableDiffusion.digits().unet.config
    assert sdfast.StableDiffusion.from_pretrained("digits").unet.config == shipped
    shutil.copytree(folders["sd"], "digits")
    assert sdfast.StableDiffusion.digits().unet.config == shipped
    for path in ("./digits", Path("digits"), tmp_path / "digits"):
        assert sdfast.StableDiffusion.from_pretrained(path).unet.config != shipped
    with pytest.raises(CheckpointError, match=r"digits: .*\./digits for yours"):
        sdfast.StableDiffusion.from_pretrained("digits")


def test_arguments_that_would_change_nothing(folders, tmp_path):
    with pytest.raises(ValueError, match="^tokenizer: "):
        sdfast.StableDiffusion.from_pretrained(folders["sd"], tokenizer=folders["sd"] / "tokenizer")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="^variant: "):
        sdfast.StableDiffusion.from_pretrained(tmp_path / "model.safetensors", variant="fp16")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_part_that_is_no_part(folders, tmp_path, part):
    shutil.copytree(folders["sd"], tmp_path / "broken")
    index = tmp_path / "broken" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: 5}))
    with pytest.raises(CheckpointError, match=f"broken.*{part}"):
        sdfast.StableDiffusion.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("lost", ["unet", "tokenizer/tokenizer.json", "model_index.json"])
def test_incomplete_folders(folders, tmp_path, lost):
    shutil.copytree(folders["sd"], tmp_path / "broken")
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


def test_single_file_takes_its_tokenizer_from_elsewhere(folders, tmp_path, monkeypatch):
    import huggingface_hub

    components = load_components(folders["sd"])
    file = tmp_path / "model.safetensors"
    file.touch()
    monkeypatch.setattr(loading, "load_single_file", lambda *_, **__: dict(components))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="a single file holds no tokenizer.*--tokenizer"):
        sdfast.StableDiffusion.from_pretrained(file)
    drawn = sdfast.StableDiffusion.from_pretrained(file, tokenizer=folders["sd"] / "tokenizer")
    whole = sdfast.StableDiffusion.from_pretrained(folders["sd"])
    options = {"steps": 2, "seed": 0}
    assert_same_pictures(
        drawn.text_to_image("seven", **options).images, whole.text_to_image("seven", **options).images, most=0
    )
