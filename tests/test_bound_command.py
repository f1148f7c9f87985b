"""`sdfast bound`: models and pictures on disk, against diffusers' networks in the same bound."""

import json
import sys

import pytest
import tiny_models
import tiny_pipelines
import torch
from PIL import Image

from sdfast import cli, diffusion
from sdfast.bound import bound_of_data, read_pictures

diffusers = pytest.importorskip("diffusers")

SCHEDULE = {"num_train_timesteps": 5, "beta_start": 0.01, "beta_end": 0.6, "beta_schedule": "linear"}


def pixel_model(folder, *, channels=1, out_channels=None):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out_channels or channels, **tiny_models.DDPM
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**SCHEDULE, prediction_type="v_prediction"))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return pixel_model(tmp_path_factory.mktemp("bound") / "pixels")


def latent_model(folder):
    tiny_pipelines.sd_pipeline(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SCHEDULE))
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latent_model(tmp_path_factory.mktemp("bound") / "latents")


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them below, of several sizes and modes, a damaged one and a text."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    tiny_pipelines.picture(8, 8).save(data / "a.png")
    (data / "b.png").write_bytes((data / "a.png").read_bytes()[:60])
    tiny_pipelines.picture(40, 20, "RGBA").save(data / "c.png")
    (data / "notes.txt").write_text("no picture")
    tiny_pipelines.picture(16, 16).convert("L").save(data / "more" / "d.jpeg")
    return data


def assert_same(ours, theirs):
    for name in diffusion.Bound.__dataclass_fields__:
        # fp32 networks of two makers, whose outputs differ in the last digits.
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-4, atol=1e-6)


def test_pixel_model_equals_diffusers_network(pixels, folder):
    with pytest.warns(UserWarning, match=r"1 of 4 files cannot be read and are left out: \S+b\.png"):
        found = bound_of_data(pixels, folder, batch_size=2, seed=3)
    assert (found.latent, found.shape) == (False, (1, 8, 8))
    unet = diffusers.UNet2DModel.from_pretrained(pixels, subfolder="unet")
    schedule = diffusion.NoiseSchedule.from_config(SCHEDULE | {"prediction_type": "v_prediction"})
    with pytest.warns(UserWarning):
        images = read_pictures(folder, 1, 8).images
    assert images.shape == (3, 1, 8, 8)
    theirs = diffusion.variational_bound(
        schedule,
        lambda x_t, _, t: unet(x_t, t).sample,
        images,
        variance=tuple(found.bounds),
        clip=True,
        seed=3,
    )
    for name, ours in found.bounds.items():
        assert_same(ours, theirs[name])
    with pytest.warns(UserWarning):
        free = bound_of_data(pixels, folder, clip=False, seed=3)
    assert (free.bounds["fixed_large"].x0_mse > found.bounds["fixed_large"].x0_mse).any()


def test_latent_model_equals_diffusers_networks(latents, folder):
    with pytest.warns(UserWarning, match="cannot be read"):
        found = bound_of_data(latents, folder, prompt="a seven", batch_size=2, seed=3)
    assert found.latent and found.record()["of"] == "latents"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(latents)
    with pytest.warns(UserWarning):
        images = read_pictures(folder, 3, pipe.unet.config.sample_size * pipe.vae_scale_factor).images
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        codes = [pipe.vae.encode(one[None]).latent_dist.sample(generator) for one in images]
        text, _ = pipe.encode_prompt("a seven", "cpu", 1, False)
    x0 = torch.cat(codes) * pipe.vae.config.scaling_factor
    theirs = diffusion.variational_bound(
        diffusion.NoiseSchedule.from_config(pipe.scheduler.config),
        lambda x_t, _, t: pipe.unet(x_t, t, text.expand(len(x_t), -1, -1)).sample,
        x0, variance=tuple(found.bounds), discrete=False, seed=3,
    )  # fmt: skip
    assert found.shape == tuple(x0.shape[1:])
    for name, ours in found.bounds.items():
        assert_same(ours, theirs[name])
    with pytest.warns(UserWarning):
        silent = bound_of_data(latents, folder, seed=3)
    assert (silent.bounds["fixed_large"].total - found.bounds["fixed_large"].total).abs().min() > 0


def test_pictures_are_cut_and_have_256_levels(folder):
    Image.new("L", (30, 10), 255).save(folder / "a.png")
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste((255, 0, 0), (10, 0, 20, 10))  # the square in the middle
    wide.save(folder / "c.png")
    with pytest.warns(UserWarning):
        pictures = read_pictures(folder, 3, 10, prompt="red")
    assert pictures.prompts == ["red"] * 3 and [path.name for path in pictures.skipped] == ["b.png"]
    assert (pictures.images[0] == 1).all()
    assert pictures.images[1].mean((1, 2)).tolist() == [1, -1, -1]
    assert len(read_pictures(folder, 3, 10, images=1).images) == 1


def test_digits_are_told_by_name():
    pytest.importorskip("sklearn")
    pictures = read_pictures("digits", 3, 32, images=5)
    assert pictures.images.shape == (5, 3, 32, 32)
    levels = (pictures.images + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert all(prompt.startswith("a handwritten ") for prompt in pictures.prompts)
    assert len(set(pictures.prompts)) > 1
    assert read_pictures("digits", 1, 8, images=2, prompt="ink").prompts == ["ink", "ink"]


def test_command_writes_json_and_plot(pixels, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = tmp_path / "bound.json", tmp_path / "per_t.png"
    command = ["bound", "--model", str(pixels), "--data", str(folder), "--threads", "1"]
    assert cli.main([*command, "-o", str(files[0]), "--plot", str(files[1])]) == 0
    captured = capsys.readouterr()
    assert "3 pictures of 1x8x8, bits per dimension:" in captured.out
    assert "sdfast: warning: data: 1 of 4 files cannot be read" in captured.err
    record = json.loads(files[0].read_text())
    assert (record["of"], record["samples"], record["shape"]) == ("pictures", 3, [1, 8, 8])
    assert [path.rpartition("/")[2] for path in record["skipped"]] == ["b.png"]
    for name, part in record["bits_per_dimension"].items():
        assert f"{name}: {part['total']:.4f} ± " in captured.out
        assert len(part["terms"]) == 5 == len(record["x0_mse"]) == len(record["epsilon_mse"])
        assert part["total"] == pytest.approx(part["prior"] + sum(part["terms"]))
        assert sum(part["terms"]) == pytest.approx(part["transitions"] + part["reconstruction"])
    with Image.open(files[1]) as picture:
        assert picture.size == (960, 960) and len(picture.getcolors(1 << 20)) > 50  # curves, not a blank


@pytest.mark.parametrize("images", [0, -1])
def test_so_many_pictures_are_none(images, folder):
    for call in (
        lambda: read_pictures("digits", 1, 8, images=images),
        lambda: read_pictures(folder, 1, 8, images=images),
        lambda: bound_of_data("/nowhere", folder, images=images),  # before the model is looked for
    ):
        with pytest.raises(ValueError, match=f"^images: got {images}, expected at least 1"):
            call()


def test_models_whose_bound_is_another_are_refused(tmp_path, latents):
    with pytest.raises(ValueError, match="predicts its variances too"):
        bound_of_data(pixel_model(tmp_path / "learned", channels=3, out_channels=6), tmp_path)
    with pytest.raises(ValueError, match="the bound of SDXL is not implemented"):
        bound_of_data(tiny_pipelines.sdxl_pipeline(tmp_path / "xl"), tmp_path)
    with pytest.raises(ValueError, match="clip: is for pixel models"):
        bound_of_data(latents, tmp_path, clip=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images: got 0, expected at least 1"),
        (["--output", "bound.txt"], "--output: got bound.txt, expected a name that ends in .json"),
        (["--plot", "/nowhere/x.png"], "--plot: the folder /nowhere does not exist"),
        (["--data", "/nowhere"], "--data: /nowhere is no folder; expected one of pictures, or digits"),
        (["--model", "/nowhere"], "/nowhere: no such file or folder"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bound", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_an_empty_folder_and_absent_packages(pixels, tmp_path, monkeypatch, capsys):
    command = ["bound", "--model", str(pixels), "--data", str(tmp_path)]
    assert cli.main(command) == 2
    assert "holds no picture that can be read" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*command, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install sdfast[plot]" in capsys.readouterr().err
