"""`sdfast train ldm` in one process; tests/test_train_distributed.py has several."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import ldm_runs  # noqa: E402
import tiny_pipelines  # noqa: E402
from ldm_runs import QUIET, same, weights  # noqa: E402

from sdfast.cli import main  # noqa: E402
from sdfast.models import AutoencoderKLConfig  # noqa: E402
from sdfast.pipelines import StableDiffusion  # noqa: E402
from sdfast.training import watching  # noqa: E402
from sdfast.training.distributed import ALONE, Parallel  # noqa: E402
from sdfast.training.images import read_pixels  # noqa: E402
from sdfast.training.ldm import LDMTraining, _measure, train_ldm  # noqa: E402
from sdfast.training.ldm_losses import Autoencoding  # noqa: E402
from sdfast.training.ldm_parts import choose_trained, load_parts, module_fingerprint  # noqa: E402
from sdfast.training.optimizer import Schedule  # noqa: E402
from sdfast.training.trainer import Step  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return ldm_runs.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def train(model, photos, tmp_path):
    return ldm_runs.trainer(model, photos, tmp_path)


def test_damaged_images_are_skipped_and_named_and_the_pipeline_draws(train, model):
    trained = train()
    assert sorted(trained.skipped) == ["1.png", "2.png"] and trained.images == 7
    assert "truncated" in trained.skipped["1.png"] and "cannot identify" in trained.skipped["2.png"]
    before, after = weights(model), weights(trained.output)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)  # all of the U-Net learns
    assert same(weights(model, "vae"), weights(trained.output, "vae"))
    record = json.loads((trained.output / "training.json").read_text())
    assert record["skipped"] == ["1.png", "2.png"] and record["seconds"] > 0
    ours = StableDiffusion.from_pretrained(trained.output).text_to_image("seven", steps=2, seed=0)
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained.output)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("seven", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    tiny_pipelines.assert_same_pictures(ours.images, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lora_is_trained_instead(train, model, precision):
    trained = train(lora_rank=2, precision=precision, lr=1e-2)
    assert {path.name for path in trained.output.iterdir()} == {
        "pytorch_lora_weights.safetensors", "training.json"
    }  # fmt: skip
    pipe = StableDiffusion.from_pretrained(model)
    before = pipe.text_to_image("seven", steps=2, seed=0).images
    pipe.load_lora(trained.output)
    ours = pipe.text_to_image("seven", steps=2, seed=0).images
    assert np.abs(np.asarray(ours[0], dtype=float) - np.asarray(before[0], dtype=float)).max() > 2
    again = train("again", lora_rank=2, precision=precision, lr=1e-2)  # as in another process
    one, other = (load_file(t.output / "pytorch_lora_weights.safetensors") for t in (trained, again))
    assert same(one, other) and all(factor.any() for factor in one.values())
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(trained.output)
    images = theirs("seven", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    tiny_pipelines.assert_same_pictures(ours, images)


def test_unet_learns_to_see_the_noise(train, model):
    trained = train(steps=30, from_scratch=True, lr=5e-3)
    x, text = torch.randn(8, 4, 8, 8), torch.randn(8, 5, tiny_pipelines.TEXT_WIDTH)
    errors = []
    for folder, anew in ((model, ("unet", 0)), (trained.output, None)):
        unet = load_parts(folder, prediction=None, device=torch.device("cpu"), anew=anew)["unet"]
        with torch.no_grad():  # at the last timestep nearly all of x is noise
            errors.append((unet(x, torch.full((8,), 999), text) - x).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_vae_phase_learns_and_measures_its_latents(train, model, photos):
    trained = train(phase="vae", steps=30, from_scratch=True, lr=5e-3)
    assert sorted(trained.skipped) == ["1.png", "2.png"]
    assert same(weights(model), weights(trained.output))
    x = torch.stack([read_pixels(photos / f"{i}.png", (16, 16), 3) for i in range(9) if i not in (1, 2)])
    errors, spread = [], []
    for folder, anew in ((model, ("vae", 0)), (trained.output, None)):
        vae = load_parts(folder, prediction=None, device=torch.device("cpu"), anew=anew)["vae"]
        with torch.no_grad():
            posterior = vae.encode(x)
            errors.append((vae.decode(posterior.mode()) - x).square().mean().item())
            draws = torch.stack([posterior.sample(torch.randn(posterior.mean.shape)) for _ in range(20)])
            spread.append((draws * vae.config.scaling_factor).std().item())
    assert errors[1] < 0.9 * errors[0]
    assert spread[1] == pytest.approx(1.0, abs=0.02)


def test_scaling_factor_counts_what_differs_between_pictures():
    vae = SimpleNamespace(
        encoder=SimpleNamespace(conv_in=torch.nn.Conv2d(1, 1, 1)),
        encode=lambda x: SimpleNamespace(mean=x, logvar=torch.full_like(x, math.log(0.01))),
        config=AutoencoderKLConfig(),
    )
    flat = [torch.full((1, 4, 6), 1.0), torch.full((1, 4, 6), -1.0), torch.zeros(1, 6, 8)]
    _measure(vae, SimpleNamespace(images=SimpleNamespace(images=flat), pixels=flat.__getitem__))
    assert vae.config.scaling_factor == pytest.approx((0.01 + 48 / 96) ** -0.5, rel=1e-6)


def test_vae_needs_no_captions(train, photos, tmp_path):
    (tmp_path / "plain").mkdir()
    for i in (0, 3):
        (tmp_path / "plain" / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    assert train(phase="vae", data=tmp_path / "plain", steps=1).images == 2
    with pytest.raises(ValueError, match="2 of 2 images have no caption"):
        train("unet", data=tmp_path / "plain")


def test_from_scratch_at_another_resolution_samples_and_pipeline_have_its_size(train, tmp_path):
    running = dataclasses.replace(QUIET, sample_steps=1, sample_prompts=("seven",))
    trained = train(from_scratch=True, resolution=24, steps=1, running=running)  # the model's own is 16
    with Image.open(tmp_path / "out-run" / "unet" / "samples" / "step-00000001.png") as sheet:
        assert sheet.size == (28, 28)  # 2 pixels around it
    pipe = StableDiffusion.from_pretrained(trained.output)
    assert pipe.text_to_image("seven", steps=1, seed=0).images[0].size == (24, 24)
    kept = train("kept", resolution=24, steps=1, running=dataclasses.replace(running, resume=False))
    with Image.open(tmp_path / "kept-run" / "unet" / "samples" / "step-00000001.png") as sheet:
        assert sheet.size == (28, 28)
    assert json.loads((kept.output / "unet" / "config.json").read_text())["sample_size"] == 8


def test_samples_of_a_size_that_cannot_be_drawn_are_refused_before_any_work(train, monkeypatch):
    monkeypatch.setattr("sdfast.training.ldm._Work", None)
    with pytest.raises(
        ValueError, match="sample_steps: pictures are drawn at multiples of 8, got resolution 20"
    ):
        train(resolution=20, running=dataclasses.replace(QUIET, sample_steps=1))


def test_a_lora_begins_alike_on_every_device_and_is_no_part_of_the_model(train, model, tmp_path):
    train(lora_rank=2)
    (state,) = (tmp_path / "out-run" / "unet").glob("*5/state.json")
    settings = json.loads(json.loads(state.read_text())["settings"])
    parts = load_parts(model, prediction=None, device=torch.device("cpu"))
    assert settings["model"]["unet"] == module_fingerprint(parts["unet"])
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda x, a: drawn.append(x.device.type))
        choose_trained({"unet": parts["unet"].to("meta")}, "unet", 2)
    assert set(drawn) == {"cpu"}


def _gradients(model: Path, precision: str = "fp32", *, recompute: bool = False, parts: int = 1):
    loaded = load_parts(model, prediction=None, device=torch.device("cpu"))
    choose_trained(loaded, "unet")
    unet = loaded["unet"].train()
    call = Parallel(unet, None, precision, ALONE, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 5, 32, generator=generator)
    for rows in torch.arange(4).chunk(parts):
        y = call(x[rows].to(call.dtype), torch.full((len(rows),), 7), text[rows].to(call.dtype))
        assert y.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        ((y.float() - x[rows]) ** 2).mean().mul(len(rows) / 4).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in unet.parameters())
    return torch.cat([p.grad.flatten() for p in unet.parameters()]).double()


def test_recomputed_activations_give_the_same_bits_and_micro_batches_the_same_gradient(model):
    expected = _gradients(model)
    assert torch.equal(_gradients(model, recompute=True), expected)
    assert torch.linalg.vector_norm(_gradients(model, parts=2) - expected) < 1e-5 * expected.norm()


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_half_precision_gradients(model, precision):
    exact, found = _gradients(model), _gradients(model, precision)
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert torch.equal(_gradients(model, precision, recompute=True), found)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_the_loss_of_an_autoencoder_in_every_precision(model, precision):
    vae = load_parts(model, prediction=None, device=torch.device("cpu"))["vae"]
    pixels = torch.rand(vae.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def loss(precision):
        call = Parallel(vae, None, precision, ALONE)
        draws = [(0, torch.Generator().manual_seed(0))]
        return Autoencoding(call, vae, lambda _: pixels, 1e-6, torch.device("cpu"))(draws)

    assert torch.isclose(loss(precision), loss("fp32"), rtol=0.05)
    vae.requires_grad_()
    loss(precision).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


class Buffering:
    """A writer of events that, like TensorFlow's files, keeps them until it is told to flush."""

    def __init__(self, *_, **__):
        self.kept, self.on_disk = [], []

    def add_scalar(self, name, value, step):
        self.kept.append((name, step))

    def flush(self):
        self.on_disk += self.kept
        self.kept.clear()


def test_events_are_on_disk_before_a_checkpoint_can_be(tmp_path, monkeypatch):
    writer = Buffering()
    monkeypatch.setattr(watching, "_summary_writer", lambda: lambda *_, **__: writer)
    watcher = watching.Watcher(tmp_path, tensorboard=True, draw=list, draw_steps=None, steps=9)
    for number in (1, 2):
        watcher(Step(number, 0.5, 1e-3, contextlib.nullcontext))
        assert ("loss", number) in writer.on_disk and not writer.kept


def test_tensorboard_and_samples(train, tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    running = dataclasses.replace(QUIET, tensorboard=True, sample_steps=3, sample_prompts=("seven",))
    watched = train("a", running=running)
    events = tensorboard.EventAccumulator(str(tmp_path / "a-run" / "unet" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(event.value) for event in events.Scalars("loss"))
    assert [event.step for event in events.Images("samples")] == [3, 5]
    with Image.open(tmp_path / "a-run" / "unet" / "samples" / "step-00000005.png") as sheet:
        drawn = np.asarray(sheet)
    pipe = StableDiffusion.from_pretrained(watched.output)
    picture = pipe.text_to_image("seven", steps=20, seed=0).images[0]
    assert np.abs(drawn[2:18, 2:18].astype(int) - np.asarray(picture).astype(int)).max() <= 1
    assert same(weights(watched.output), weights(train("b").output))  # looking on changes nothing


def test_sdxl_trains(tmp_path, photos):
    xl = tiny_pipelines.sdxl_pipeline(tmp_path / "xl")
    schedule = Schedule(steps=2, learning_rate=1e-3, decay="constant")
    trained = train_ldm(
        photos, tmp_path / "out", model=xl, run_dir=tmp_path / "run", running=QUIET,
        training=LDMTraining(
            schedule=schedule, batch_size=2, caption_dropout=0.5, aspect_buckets=True, min_snr_gamma=5.0,
            prediction="v_prediction",
        ),
    )  # fmt: skip
    pipe = StableDiffusion.from_pretrained(trained.output)
    assert pipe.is_xl and pipe.scheduler_config["prediction_type"] == "v_prediction"
    before, after = weights(xl), weights(trained.output)
    assert not any(torch.equal(before[name], after[name]) for name in before)  # all of the U-Net learns


def test_command_line_refuses_bad_arguments(capsys, photos, model, tmp_path):
    def refused(*arguments, data=photos):
        command = ["train", "ldm", "--data", str(data), "--model", str(model), "-o", str(tmp_path / "out")]
        assert main([*command, *arguments]) == 2
        return capsys.readouterr().err

    assert "--batch-size: got 0" in refused("--batch-size", "0")
    assert "--lr: got -1.0" in refused("--lr", "-1")
    assert "no such folder" in refused(data=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(data=tmp_path / "empty")
    assert "multiple of 2; the nearest are 16 and 18" in refused("--resolution", "17")
    assert "torchrun" in refused("--parallel", "ddp")
    assert "--caption-dropout: got 2.0" in refused("--caption-dropout", "2")
    assert "--kl-weight: got nan" in refused("--phase", "vae", "--kl-weight", "nan")
    assert "--kl-weight: is for --phase vae" in refused("--kl-weight", "1")
    for option in (("--min-snr-gamma", "5"), ("--caption-dropout", "0.1"), ("--prediction", "epsilon")):
        assert f"{option[0]}: is for --phase unet" in refused("--phase", "vae", *option)
    assert "--sample-every steps, which is missing" in refused("--sample-prompt", "seven")
    assert "split: is of a data set" in refused("--split", "test")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "choose another output" in refused()
