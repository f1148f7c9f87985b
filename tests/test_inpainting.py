"""Inpainting is diffusers' inpainting; masks say what is painted; what is not can be kept to the bit."""

import warnings

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers_runs import TOLERANCE
from PIL import Image
from tiny_pipelines import assert_same_pictures, picture

import sdfast
from sdfast import loading
from sdfast.images import as_tensor
from sdfast.masks import images_and_masks, latent_mask
from sdfast.models.checkpoint import CheckpointError

STEPS = 6
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpainting")
    return {
        "blend": tiny_pipelines.sd_pipeline(folder / "sd"),
        "channels": tiny_pipelines.inpainting_pipeline(folder / "inpainting"),
        "xl blend": tiny_pipelines.sdxl_pipeline(folder / "sdxl"),
        "xl channels": tiny_pipelines.sdxl_pipeline(folder / "sdxl-inpainting", inpainting=True),
    }


@pytest.fixture(scope="module")
def pipes(folders):
    return {kind: sdfast.StableDiffusion.from_pretrained(folder) for kind, folder in folders.items()}


def theirs(folder, *, sampler=None):
    other = diffusers.AutoPipelineForInpainting.from_pretrained(folder, safety_checker=None)
    if sampler is not None:
        other.scheduler = SCHEDULERS[sampler].from_config(other.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def mask_of(width=16, height=16, box=(5, 2, 13, 11)):
    """White in a box whose edges are not those of latents."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def assert_same_latents(ours, others):
    assert ours.shape == others.shape
    error = (ours - others).abs().max() / others.abs().max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


# diffusers


@pytest.fixture
def exact():
    """No Winograd, so that rounding is all that is between us and diffusers."""
    with sdfast.use_numerics("exact"):
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["blend", "channels"])
def test_latents_are_diffusers(folders, pipes, kind, sampler, strength):
    options = {"strength": strength, "guidance_scale": 3.0, "negative_prompt": "an"}
    ours = pipes[kind].inpaint(
        "seven", picture(), mask_of(), steps=STEPS, sampler=sampler, seed=5, output="latent", **options
    )
    other = theirs(folders[kind], sampler=sampler)(
        "seven", image=picture(), mask_image=mask_of(), num_inference_steps=STEPS, height=16, width=16,
        generator=generators(1, 5), output_type="latent", **options,
    )  # fmt: skip
    assert_same_latents(ours.images, other.images)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["xl blend", "xl channels"])
def test_latents_of_sdxl_are_diffusers(folders, pipes, kind):
    options = {"strength": 0.7, "guidance_scale": 3.0}
    ours = pipes[kind].inpaint(
        "seven", picture(24, 16), mask_of(24), steps=STEPS, seed=5, output="latent", **options
    )
    other = theirs(folders[kind])(
        "seven", image=picture(24, 16), mask_image=mask_of(24), num_inference_steps=STEPS, height=16,
        width=24, generator=generators(1, 5), output_type="latent", **options,
    )  # fmt: skip
    assert_same_latents(ours.images, other.images)


@pytest.mark.parametrize("kind", ["blend", "channels"])
def test_pictures_are_diffusers(folders, pipes, kind):
    """Two prompts, images and masks; pictures that have to be resized."""
    prompts, sources = ["a handwritten seven!", "and"], [picture(20, 16), picture(20, 16).rotate(180)]
    masks = [mask_of(20), mask_of(20, box=(0, 0, 9, 16))]
    ours = pipes[kind].inpaint(prompts, sources, masks, steps=STEPS, seed=3, width=24, height=16)
    other = theirs(folders[kind])(
        prompts, image=sources, mask_image=masks, num_inference_steps=STEPS, height=16, width=24,
        generator=generators(2, 3),
    )  # fmt: skip
    assert_same_pictures(ours.images, other.images)


def test_the_digits_are_diffusers():
    pipe = sdfast.StableDiffusion.digits()
    source, mask = pipe.text_to_image("a seven", steps=10, seed=0).images[0], mask_of(32, 32, (0, 0, 32, 16))
    ours = pipe.inpaint("a three", source, mask, steps=20, seed=1)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(loading.digits_folder())
    plain.set_progress_bar_config(disable=True)
    inpainting = diffusers.StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False)
    other = inpainting(
        "a three", image=source, mask_image=mask, num_inference_steps=20, height=32, width=32, strength=1.0,
        generator=generators(1, 1),
    )  # fmt: skip
    assert_same_pictures(ours.images, other.images)


# Seeds, batches, results


@pytest.mark.parametrize("method", ["blend", "repaint", "channels"])
def test_a_seed_is_a_picture_whatever_the_batch(pipes, method):
    options = {"steps": 4, "seed": 4, "num_images": 2, "sampler": "ddpm"}
    if method == "repaint":
        options |= {"method": method, "jump_length": 2, "resamplings": 2}
    pipe = pipes["channels" if method == "channels" else "blend"]
    sources, masks = [picture(), picture().rotate(90)], [mask_of(), mask_of(box=(0, 0, 7, 16))]

    def draw(**more):
        return pipe.inpaint("seven", sources, masks, keep_original=True, **options | more).images

    whole = draw()
    assert_same_pictures(draw(batch_size=3), whole, most=1)
    sources, masks = sources[1], masks[1]
    assert_same_pictures(draw(seed=6), whole[2:], most=1)


def test_what_is_not_painted_is_kept_to_the_bit(pipes):
    source, mask = picture(24, 16), np.array(mask_of(24))
    mask[0, :8] = np.arange(8) * 32  # grey: in proportion
    options = {"steps": 2, "seed": 0}
    for pipe in (pipes["blend"], pipes["channels"]):
        (kept,) = pipe.inpaint("seven", source, Image.fromarray(mask), keep_original=True, **options).images
        (plain,) = pipe.inpaint("seven", source, Image.fromarray(mask), **options).images
        values, original, painted = (np.asarray(one, dtype=np.float64) for one in (kept, source, plain))
        weight = mask[..., None] / 255
        assert np.array_equal(values[mask == 0], original[mask == 0])
        assert np.array_equal(values[mask == 255], painted[mask == 255])
        assert np.abs(values - (weight * painted + (1 - weight) * original)).max() <= 1
        assert not np.array_equal(original[mask == 255], painted[mask == 255])


def test_the_known_part_is_the_images_latents(pipes):
    """In the end blending and RePaint leave what is known as the encoder made it."""
    mask = mask_of(box=(0, 0, 8, 16))
    known = ~latent_mask(torch.from_numpy(np.array(mask))[None, None] / 255, (8, 8)).expand(1, 4, 8, 8)
    run = {"steps": 4, "seed": 0, "output": "latent"}
    drawn = [
        pipes["blend"].inpaint("seven", picture(), mask, method=method, jump_length=2, **run).images[known]
        for method in ("blend", "repaint")
    ]
    vae = pipes["blend"].vae
    generator = torch.Generator().manual_seed(run["seed"])  # the encoder draws first
    with torch.no_grad():
        q = vae.encode(as_tensor(picture(), height=16, width=16, channels=3, multiple=1))
    encoded = q.sample(torch.randn(q.mean.shape, generator=generator)) * vae.config.scaling_factor
    for latents in drawn:
        torch.testing.assert_close(latents, encoded[known])
    assert torch.equal(*drawn)
    everything = Image.new("L", (16, 16), 255)
    free = pipes["blend"].inpaint("seven", picture(), everything, **run).images[known]
    assert not torch.allclose(free, drawn[0])


def test_result(pipes):
    steps = []
    drawn = pipes["blend"].inpaint(
        ["seven", "and"], picture(), mask_of(), method="repaint", steps=4, jump_length=2, resamplings=3, seed=0,
        batch_size=1, on_step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(i + 1, 16) for i in range(16)]  # 4 steps, and twice 2 more
    expected = {
        "method": "repaint", "jump_length": 2, "resamplings": 3, "sampler": "ddpm", "strength": 1.0,
        "keep_original": False, "seeds": [0, 1],
    }  # fmt: skip
    assert drawn.settings.items() >= expected.items()
    assert pipes["channels"].inpaint("7", picture(), mask_of(), steps=1).settings["method"] == "auto"


@pytest.mark.parametrize("kind", ["blend", "channels"])
def test_narrow_dtypes(folders, kind):
    narrow = sdfast.StableDiffusion.from_pretrained(folders[kind], dtype=torch.bfloat16)
    drawn = narrow.inpaint("seven", picture(), mask_of(), steps=2, seed=0, output="latent").images
    assert drawn.dtype == torch.bfloat16 and drawn.isfinite().all()


# Masks


def masks_of(image, mask=None, **options):
    sizes = {"height": None, "width": None, "channels": 3, "multiple": 8}
    return images_and_masks(image, mask, **sizes | options)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16", "tensor"])
def test_modes_of_masks(mode):
    white = np.array(mask_of()) / 255
    if mode == "tensor":
        mask = torch.from_numpy(white).float()[None, None]
    elif mode == "I;16":
        mask = Image.fromarray((white * 65535).astype(np.uint16))
    else:
        mask = mask_of().convert(mode)
    images, masks = masks_of(picture(), mask)
    assert images.shape == (1, 3, 16, 16) and masks.dtype == torch.float32
    assert torch.equal(masks[0, 0], torch.from_numpy(white).float())


def test_a_mask_from_alpha():
    """Transparent is painted; colours are those of the file, however transparent, but white where all is."""
    values = np.array(picture().convert("RGBA"))
    values[:, :8, 3] = 0
    values[:, 8, 3] = 51
    images, masks = masks_of(Image.fromarray(values))
    assert torch.equal(masks[0, 0, 0], torch.tensor([1.0] * 8 + [0.8] + [0] * 7))
    assert (images[..., :8] == 1).all()
    expected = torch.from_numpy(values[:, 8:, :3].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(images[0, :, :, 8:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(), mask_of(8, 16), r"mask: is 8x16 \(width x height\), the image 16x16; make them one size"),
        (picture(), torch.ones(1, 1, 16, 8), "mask: is 8x16"),
        ([picture(), picture()], [mask_of(), mask_of(8)], "mask: is 8x16"),
        ([picture(), picture(8)], mask_of(), "mask: is 16x16"),
        (torch.zeros(1, 3, 16, 16), mask_of(8, 8), "mask: is 8x8"),
        ([picture()] * 3, [mask_of()] * 2, "mask: got 2 masks for 3 images"),
        (picture(), Image.new("L", (16, 16), 127), "mask: has nothing to paint"),
        (picture(), torch.full((1, 1, 16, 16), 2.0), r"mask: has values outside \[0, 1\]"),
        (picture(), torch.ones(1, 3, 16, 16), "mask: got torch.float32 of shape"),
        (picture(), [], "mask: got none"),
        (picture(), "mask.png", "mask: expected a PIL image"),
        (picture(), None, "mask: got None, and the image has no alpha channel"),
        (torch.zeros(1, 3, 16, 16), None, "mask: got None"),
        (picture().convert("RGBA"), None, "nothing to paint"),
    ],
)
def test_bad_masks(image, mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        masks_of(image, mask)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "paint"}, "method: got 'paint', expected one of auto, blend, repaint"),
        ({"strength": 1.5}, "strength: got 1.5"),
        ({"steps": 0}, "steps: got 0"),
        ({"method": "repaint", "steps": 10}, "jump_length: got 10 for 10 steps"),
        ({"method": "repaint", "jump_length": 0}, "jump_length: got 0"),
        ({"method": "repaint", "resamplings": 0}, "resamplings: got 0"),
        ({"method": "repaint", "sampler": "dpm++2m"}, "sampler: it remembers the step before"),
        ({"prompt": ["7", "8"], "image": [picture()] * 3}, "image: got 3 images for 2 prompts"),
        ({"keep_original": True, "output": "latent"}, "keep_original: puts pixels back"),
        ({"keep_original": True, "width": 24}, "a picture of 16x16 would be resized, which keep_original"),
        ({"keep_original": True, "image": picture(20), "mask": mask_of(20)}, "20x16 would be resized"),
        ({"sampler": "plms"}, "sampler: got 'plms'"),
        ({"mask": mask_of(box=(1, 1, 2, 16))}, "mask: has nothing to paint once it is reduced to latents"),
        (
            {"image": [picture()] * 2, "mask": [mask_of(), mask_of(box=(3, 3, 4, 4))]},
            "its 2x2 pixels is white",
        ),
        ({"time_ids": (1, 2, 3, 4, 5, 6)}, "time_ids"),
    ],
)
def test_bad_arguments(pipes, options, message):
    def nothing_is_computed(*_):
        raise AssertionError("a step was run")

    arguments = {"prompt": "seven", "image": picture(), "mask": mask_of()} | options
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("error")
        pipes["blend"].inpaint(on_step=nothing_is_computed, **arguments)


def test_unknown_options(pipes):
    with pytest.raises(TypeError, match="unexpected option stepz, expected negative_prompt, steps"):
        pipes["blend"].inpaint("seven", picture(), mask_of(), stepz=3)


def test_an_inpainting_model_cannot_draw_without_a_mask(pipes):
    for draw, image in (("text_to_image", ()), ("image_to_image", (picture(),))):
        with pytest.raises(
            ValueError, match=f"{draw}: this U-Net takes 9 channels.* use inpaint or outpaint"
        ):
            getattr(pipes["channels"], draw)("seven", *image)
    for method in ("blend", "repaint"):
        with pytest.raises(ValueError, match=f"method: got '{method}', but this U-Net takes the mask"):
            pipes["channels"].inpaint("seven", picture(), mask_of(), method=method)


def test_an_upscaling_model_cannot_draw_at_all(folders, tmp_path):
    folder = tiny_pipelines.inpainting_pipeline(tmp_path / "upscaling", in_channels=7)
    with pytest.raises(CheckpointError, match="takes 7 channels, expected the 4 of the latents, or 9"):
        sdfast.StableDiffusion.from_pretrained(folder)
