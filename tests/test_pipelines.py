"""Pictures are diffusers' pictures, a seed is a picture, and what cannot be drawn is refused first."""

import json
import shutil

import diffusers
import pytest
import tiny_pipelines
import torch
from PIL import Image
from tiny_pipelines import assert_same_pictures, picture

import sdfast
from sdfast import loading
from sdfast.images import to_pil

STEPS = 6
# Ours -> diffusers', built from the pipeline's own configuration.
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}


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


def test_an_early_scheduler_config_is_read_as_diffusers_does(folders, tmp_path):
    """Of Stable Diffusion 1 and 2: x̂_0 is not clipped, and steps are offset by one."""
    folder = shutil.copytree(folders["sd"], tmp_path / "early")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["clip_sample"], config["steps_offset"]  # whose defaults are True and 0
    file.write_text(json.dumps(config))
    options = {"guidance_scale": 5.0, "height": 24, "width": 16}
    ours = sdfast.StableDiffusion.from_pretrained(folder).text_to_image(
        "seven", steps=STEPS, seed=3, **options
    )
    other = theirs(folder)("seven", num_inference_steps=STEPS, generator=generators(1, 3), **options)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "dtype: got 'fp16', expected torch.float32"),
        ({"dtype": torch.int8}, "dtype: got torch.int8, expected torch.float32"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
    ],
)
def test_where_it_cannot_run(folders, options, message):
    with pytest.raises(ValueError, match=message):
        sdfast.StableDiffusion.from_pretrained(folders["sd"], **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "prompt: got int, expected str or a list of str"),
        (("seven",), {"guidance_scale": "x"}, "guidance_scale: got 'x', expected a number"),
        (("seven", picture()), {"strength": "x"}, "strength: got 'x', expected a number"),
    ],
)
def test_what_is_no_number_or_text_is_named(pipe, arguments, options, message):
    draw = pipe.text_to_image if len(arguments) == 1 else pipe.image_to_image
    with pytest.raises(TypeError, match=message):
        draw(*arguments, steps=STEPS, **options)


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


def test_a_long_prompt_is_cut_and_that_is_told(pipe, folders):
    prompt = "seven " * 75 + "this was too much"
    with pytest.warns(UserWarning, match="'this was too much'"):
        ours = pipe.text_to_image(prompt, steps=2, seed=0)
    other = theirs(folders["sd"])(prompt, num_inference_steps=2, generator=generators(1))
    assert_same_pictures(ours.images, other.images)
