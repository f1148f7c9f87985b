"""A pipeline by graphs, captured on the CPU: the same pictures, a capture for each shape, a replay for each step."""

import functools

import pytest
import tiny_pipelines
import torch
from on_device import OnTheDevice
from recorded_graphs import Recorder

import sdfast
from sdfast import generation, graphs, pipeline_base
from sdfast.diffusion import plan_from_config, sample_on_device
from sdfast.diffusion.device_loop import repeat_step
from sdfast.dispatch import use_backend

STEPS = 5
NOISE_FREE, NOISY = ("ddim", "euler", "dpm++2m"), ("ddpm", "euler_a")
pytestmark = [pytest.mark.usefixtures("on_cpu")]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny_pipelines.sd_pipeline(folder / "sd"),
        "sdxl": tiny_pipelines.sdxl_pipeline(folder / "sdxl"),
        "inpainting": tiny_pipelines.inpainting_pipeline(folder / "inpainting"),
    }


@pytest.fixture
def pipe(folders):
    return sdfast.StableDiffusion.from_pretrained(folders["sd"])


def both(pipe, prompts="seven", **options):
    """Final latents and pictures without graphs, and with."""
    options = {"steps": STEPS, "seed": 3, **options}
    pairs = []
    for output in ("latent", "tensor"):
        cache, pipe.graphs = pipe.graphs, None
        plain = pipe.text_to_image(prompts, output=output, **options).images
        pipe.graphs = cache
        pairs.append((plain, pipe.text_to_image(prompts, output=output, **options).images))
    return pairs


def assert_equal(pairs):
    for plain, by_graphs in pairs:
        assert torch.equal(plain, by_graphs)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", [*NOISE_FREE, *NOISY])
def test_text_to_image_is_the_same(pipe, sampler, guidance_scale):
    pipe.graphs = Recorder()
    assert_equal(both(pipe, sampler=sampler, guidance_scale=guidance_scale))
    # Of the U-Net, all of a step where no noise comes from the host, and of the VAE.
    assert (pipe.graphs.captured, pipe.graphs.replayed) == (2, 2 * STEPS + 1)


@pytest.mark.parametrize("sampler", NOISY)
def test_all_steps_are_one_graph_where_noise_fits(pipe, sampler, monkeypatch):
    """It is drawn before the first step; where it takes too much, each step is a graph's replay of the U-Net."""
    options = {"sampler": sampler, "num_images": 2}
    pipe.graphs, loops = Recorder(), []
    replayed = graphs.repeat
    monkeypatch.setattr(generation, "repeat", lambda *a, **k: loops.append(a[1]) or replayed(*a, **k))
    assert_equal(both(pipe, **options))
    assert loops == [STEPS] * 2
    monkeypatch.setattr(generation, "_MOST_NOISE_BYTES", 0)
    assert_equal(both(pipe, **options))
    assert loops == [STEPS] * 2 and pipe.graphs.captured == 3


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_rows_of_text_are_shared_as_without(folders, kind):
    pipe = sdfast.StableDiffusion.from_pretrained(folders[kind])
    pipe.graphs = Recorder()
    for prompts, more in ((["seven", "and"], {"num_images": 2}), ("seven", {"num_images": 2})):
        assert_equal(both(pipe, prompts, **more))


def test_the_digits_are_drawn_by_two_graphs():
    pipe = sdfast.StableDiffusion.digits()
    pipe.graphs = Recorder()
    assert_equal(both(pipe, "a handwritten seven"))
    assert (pipe.graphs.captured, pipe.graphs.replayed) == (2, 2 * STEPS + 1)


def test_a_shape_is_captured_once_and_other_values_never(pipe):
    pipe.graphs = Recorder()
    for options in (
        {},
        {"guidance_scale": 3.0},
        {"steps": 9},
        {"sampler": "euler"},
        {"negative_prompt": "and", "seed": 5},
    ):
        assert_equal(both(pipe, **options))
        assert pipe.graphs.captured == 2
    assert_equal(both(pipe, height=24, width=32))
    assert pipe.graphs.captured == 4 == len(pipe.graphs)
    assert_equal(both(pipe, height=16, width=16))
    assert pipe.graphs.captured == 4
    assert_equal(both(pipe, sampler="dpm++2m"))  # its step reads the x_0 of the one before
    assert pipe.graphs.captured == 5


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_weights_that_changed_or_moved_are_captured_anew(pipe, sampler):
    pipe.graphs = Recorder()
    assert_equal(both(pipe, sampler=sampler))
    weight = pipe.unet.up_blocks[0].resnets[0].conv1.weight
    with torch.no_grad():
        weight.mul_(1.5)
    changed = both(pipe, sampler=sampler)
    assert_equal(changed)
    assert pipe.graphs.captured == 3
    old = weight.data  # kept, so that the new one cannot lie in its place
    weight.data = old / 1.5
    assert_equal(both(pipe, sampler=sampler))
    assert pipe.graphs.captured == 4
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.1)
    assert_equal(both(pipe, sampler=sampler))
    assert pipe.graphs.captured == 5 and len(pipe.graphs) == 2


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_the_callback_is_told_of_each_step_and_may_end_the_run(pipe, sampler):
    pipe.graphs = Recorder()
    told = []
    options = {"steps": 3, "seed": 0, "sampler": sampler, "num_images": 2, "batch_size": 1}
    pipe.text_to_image("seven", on_step=lambda *now: told.append(now), **options)
    assert told == [(i + 1, 6) for i in range(6)]

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    replayed = pipe.graphs.replayed
    with pytest.raises(KeyboardInterrupt):
        pipe.text_to_image("seven", on_step=stop, **options)
    assert pipe.graphs.replayed == replayed + 2
    assert_equal(both(pipe, sampler=sampler))


def test_image_to_image_is_the_same(pipe):
    options = {"steps": STEPS, "seed": 1, "strength": 0.7, "output": "tensor"}
    plain = pipe.image_to_image("seven", tiny_pipelines.picture(), **options).images
    pipe.graphs = Recorder()
    assert torch.equal(pipe.image_to_image("seven", tiny_pipelines.picture(), **options).images, plain)
    assert (pipe.graphs.captured, pipe.graphs.replayed) == (2, 3 + 1)


@pytest.mark.parametrize("kind", ["sd", "inpainting"])
def test_inpainting_runs_the_unet_by_a_graph(folders, kind):
    """What is known is put back between the steps, so that they are a loop on the host."""
    pipe = sdfast.StableDiffusion.from_pretrained(folders[kind])
    mask = tiny_pipelines.picture(mode="L")
    options = {"steps": STEPS, "seed": 1, "sampler": "ddpm", "output": "tensor"}
    plain = pipe.inpaint("seven", tiny_pipelines.picture(), mask, **options).images
    pipe.graphs = Recorder()
    assert torch.equal(pipe.inpaint("seven", tiny_pipelines.picture(), mask, **options).images, plain)
    assert (pipe.graphs.captured, pipe.graphs.replayed) == (2, STEPS + 1)


def test_a_step_of_the_unet_reads_nothing_on_the_host(pipe):
    plan = plan_from_config(pipe.scheduler_config, 3)

    def watched(*arguments):
        with OnTheDevice():
            return repeat_step(*arguments)

    run = functools.partial(
        sample_on_device, plan, pipe.unet, torch.randn(1, 4, 8, 8), guidance_scale=7.5,
        conditioning=[pipe.unet.encode_context(torch.randn(2, 5, tiny_pipelines.TEXT_WIDTH))],
        timesteps=pipe.unet.encode_time(plan.timesteps),
    )  # fmt: skip
    with use_backend("torch"):
        assert torch.equal(run(repeat=watched), run())


def test_large_images_are_decoded_without(pipe, monkeypatch):
    monkeypatch.setattr(generation, "_MOST_PIXELS_BY_GRAPH", 16 * 16)
    pipe.graphs = Recorder()
    assert_equal(both(pipe, height=16, width=16))
    assert pipe.graphs.captured == 2
    assert_equal(both(pipe, height=16, width=24))
    assert pipe.graphs.captured == 3


def test_where_there_are_graphs(pipe, monkeypatch):
    parts = (pipe.unet, pipe.vae, pipe.text_encoders, pipe.tokenizers, pipe.scheduler_config)
    assert pipe.graphs is None
    monkeypatch.setattr(sdfast.StableDiffusion, "device", torch.device("cuda"))
    for total, budget in ((None, 4 << 30), (8 << 30, 4 << 30), (80 << 30, 20 << 30)):
        monkeypatch.setattr(pipeline_base, "total_memory_bytes", lambda device, total=total: total)
        assert sdfast.StableDiffusion(*parts).graphs.budget_bytes == budget
    assert sdfast.StableDiffusion(*parts, cuda_graphs=False).graphs is None
