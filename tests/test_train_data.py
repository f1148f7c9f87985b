"""What `train ldm` reads: folders and data sets, aspect buckets, cached latents; and its weights of timesteps."""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sdfast.diffusion import NoiseSchedule, min_snr_weight, simple_loss
from sdfast.models import AutoencoderKL, AutoencoderKLConfig
from sdfast.training import latents
from sdfast.training.buckets import Batches, bucket_sizes, nearest_bucket
from sdfast.training.distributed import ALONE, Processes
from sdfast.training.images import CaptionedImage, image_size, read_folder, read_pixels
from sdfast.training.latents import LatentCache
from sdfast.training.ldm_data import DataOptions, TrainingImages, find_images
from sdfast.training.optimizer import Schedule


def _picture(path, height=16, width=16, **options):
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return values


# Folders


def test_captions_come_from_text_files_and_metadata(tmp_path):
    for name in ("b.png", "a/c.jpg", ".hidden.png", "d.WEBP"):
        _picture(tmp_path / name)
    (tmp_path / "b.txt").write_text("  a bee \n")
    entries = [{"file_name": "a/c.jpg", "text": "a sea"}, {"file_name": "d.WEBP", "text": "Düne", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    found = [(image.name, image.caption) for image in read_folder(tmp_path)]
    assert found == [("a/c.jpg", "a sea"), ("b.png", "a bee"), ("d.WEBP", "Düne")]


def test_captions_that_editors_and_json_allow(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        _picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa bee", encoding="utf-8")
    lines = [
        '{"file_name": "b.png", "text": "one\u2028two\x85three"}',
        '{"file_name": "./c.png", "prompt": "see"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    captions = ["a bee", "one\u2028two\x85three", "see"]
    assert [image.caption for image in read_folder(tmp_path)] == captions
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a.txt: is no UTF-8 text"):
        read_folder(tmp_path)


def test_subfolders_may_have_metadata_and_hidden_ones_do_not_count(tmp_path):
    for name in ("a/x.png", "a/b/y.png", ".ipynb_checkpoints/x-checkpoint.png"):
        _picture(tmp_path / name)
    lines = [{"file_name": "a/x.png", "text": "far"}, {"file_name": "a/b/y.png", "text": "y", "words": "Y"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "x", "words": "X"}')

    def captions(**options):
        return [(image.name, image.caption) for image in read_folder(tmp_path, **options)]

    assert captions() == [("a/b/y.png", "y"), ("a/x.png", "x")]
    assert captions(caption_column="words") == [("a/b/y.png", "Y"), ("a/x.png", "X")]
    with pytest.raises(ValueError, match="2 of 2 images have no caption"):
        captions(caption_column="label")
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "y.png"}')
    with pytest.raises(ValueError, match="a/metadata.jsonl: names files that are not there: a/y.png"):
        captions()


def test_what_only_data_sets_have_is_refused_of_folders(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for name in ("split", "image_column", "caption_column"):
        options = DataOptions(**{name: "other"})
        with pytest.raises(ValueError, match=name.replace("_", ".")):
            find_images(tmp_path, tmp_path, options, ALONE, progress=False)


def test_missing_captions_are_named_and_may_be_allowed(tmp_path):
    for i in range(8):
        _picture(tmp_path / f"{i}.png")
    (tmp_path / "3.txt").write_text("three")
    (tmp_path / "4.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"7 of 8 .* 0.png, 1.png, 2.png, 4.png, 5.png and 2 more.*--allow"):
        read_folder(tmp_path)
    images = read_folder(tmp_path, allow_missing_captions=True)
    assert [image.caption for image in images] == ["", "", "", "three", "", "", "", ""]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"file_name": "absent.png", "text": "x"}', "files that are not there: absent.png"),
        ("[1]", "line 1: got '.1.', expected"),
        ("half a li", "line 1: got 'half a li'"),
    ],
)
def test_bad_metadata(tmp_path, line, text):
    _picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=text):
        read_folder(tmp_path)


def test_images_are_turned_and_cut_about_their_centre(tmp_path):
    values = _picture(tmp_path / "a.png", 12, 30)
    pixels = read_pixels(tmp_path / "a.png", (6, 6), 3)
    middle = Image.fromarray(values[:, 9:21]).resize((6, 6), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1) / 127.5 - 1
    assert pixels.shape == (3, 6, 6) and (pixels - expected).abs().max() < 1e-6
    exif = Image.Exif()
    exif[274] = 6  # on its side
    _picture(tmp_path / "b.jpg", 10, 20, exif=exif)
    assert image_size(tmp_path / "a.png") == (12, 30) and image_size(tmp_path / "b.jpg") == (20, 10)
    assert read_pixels(tmp_path / "b.jpg", (20, 10), 1).shape == (1, 20, 10)
    _picture(tmp_path / "c.png", 1, 400)  # would be 204800 wide if it were resized first
    assert read_pixels(tmp_path / "c.png", (512, 512), 3).shape == (3, 512, 512)


def test_the_next_of_its_bucket_stands_in_for_a_damaged_image(tmp_path):
    sizes = [(8, 8), (8, 16), (8, 8), (8, 8)]
    for i, size in enumerate(sizes):
        _picture(tmp_path / f"{i}.png", *size)
    captioned = [CaptionedImage(tmp_path / f"{i}.png", f"{i}.png", "") for i in range(4)]
    images = TrainingImages(captioned, [(8, 8), (8, 16)])
    whole = [read_pixels(tmp_path / f"{i}.png", sizes[i], 3) for i in range(4)]
    for i in (0, 3):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:60])
    assert torch.equal(images.pixels(0, 3), whole[2]) and torch.equal(images.pixels(3, 3), whole[2])
    assert sorted(images.skipped) == ["0.png", "3.png"]
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images of size .8, 16. can be read"):
        images.pixels(1, 3)


# Buckets


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (48, 8)])
def test_bucket_sizes(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    assert set(sizes) == {(width, height) for height, width in sizes}
    for height, width in sizes:
        assert height % step == width % step == 0 and height * width <= resolution**2
        assert 0.5 <= width / height <= 2
        assert max(height, width) + step > resolution**2 / min(height, width)  # as large as it may be
    assert sizes[nearest_bucket((300, 300), sizes)] == (resolution, resolution)
    assert nearest_bucket((100, 1000), sizes) == len(sizes) - 1 and nearest_bucket((1000, 100), sizes) == 0
    with pytest.raises(ValueError, match=f"multiple of {step}; the nearest are {resolution} and"):
        bucket_sizes(resolution + 1, step)


def test_batches_are_of_one_bucket_fair_and_a_function_of_the_seed():
    buckets = [0] * 10 + [1] * 5 + [2] * 2
    batches = Batches(buckets, 4, seed=3)
    drawn = [batches.at(step) for step in range(17 * 20 // 4)]
    assert all(len({buckets[i] for i in batch}) == 1 and len(batch) == 4 for batch in drawn)
    counts = Counter(i for batch in drawn for i in batch)
    assert min(counts.values()) >= 18 and max(counts.values()) <= 21
    again = Batches(buckets, 4, seed=3)
    assert [again.at(step) for step in (30, 31, 7)] == [drawn[step] for step in (30, 31, 7)]
    assert Batches(buckets, 4, seed=4).at(0) != drawn[0]


# Latents


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4,
    )  # fmt: skip
    return AutoencoderKL(config).requires_grad_(False).eval()


def test_latents_are_encoded_once_and_again_when_something_changes(tmp_path, vae, monkeypatch):
    for i in range(4):
        _picture(tmp_path / f"{i}.png", 8 + i, 8)
    images = [CaptionedImage(tmp_path / f"{i}.png", f"{i}.png", "") for i in range(4)]
    (tmp_path / "2.png").write_bytes(b"damaged")
    sizes = [(8, 8), (8, 16), (8, 8), (8, 8)]
    cache = LatentCache(tmp_path / "cache", vae, "one")
    read: list[str] = []
    read_pixels_ = latents.read_pixels
    monkeypatch.setattr(
        latents, "read_pixels", lambda path, *a: (read.append(path.name), read_pixels_(path, *a))[1]
    )
    for rank in range(2):  # two processes share the work; what each cannot read is gathered
        unreadable = _Alone(rank, 2)
        found = cache.fill(images, sizes, unreadable, progress=False)
        assert list(found) == ([2] if rank == 0 else [])
    assert sorted(read) == ["0.png", "1.png", "2.png", "3.png"]
    read.clear()
    posterior = vae.encode(read_pixels_(images[1].path, (8, 16), 3)[None])
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
    assert torch.equal(cache.moments(images[1], (8, 16)), expected) and expected.shape == (4, 4, 8)
    assert read == []

    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(cache.moments(images[1], (8, 16)), expected) and read == ["1.png"]
    os.utime(images[1].path, ns=(0, 0))
    cache.moments(images[1], (8, 16))
    LatentCache(tmp_path / "cache", vae, "other").moments(images[1], (8, 16))
    assert read == ["1.png"] * 3


class _Alone(Processes):
    """One of two processes whose other one keeps silent."""

    def gather(self, value):
        return [value]


# What a step weighs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_x0(prediction):
    schedule = NoiseSchedule.scaled_linear(prediction=prediction)
    t = torch.tensor([0, 10, 200, 500, 999])
    x0, noise, output = (torch.randn(5, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    x_t, target = schedule.training_pair(x0, t, noise)
    loss = simple_loss(output, target, min_snr_weight(schedule, t, 5.0))
    error = (schedule.convert(output, x_t, t, to="sample") - x0).square().mean(dim=(1, 2, 3))
    expected = (schedule.snr(t).clamp(max=5.0) * error).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_min_snr_at_zero_snr():
    schedule = NoiseSchedule.linear().zero_terminal_snr()
    assert min_snr_weight(schedule, torch.tensor([999])).item() == 1
    with pytest.raises(ValueError, match="gamma: got 0"):
        min_snr_weight(schedule, torch.tensor([1]), 0)


def test_learning_rates():
    def rates(decay):
        schedule = Schedule(steps=10, learning_rate=3.0, warmup_steps=2, decay=decay)
        return [schedule.rate(step) for step in range(10)]

    warmup = [min(1.0, (step + 1) / 3) for step in range(10)]
    assert rates("constant") == pytest.approx([3 * w for w in warmup])
    assert rates("linear") == pytest.approx([3 * w * (1 - k / 10) for k, w in enumerate(warmup)])
    cosine = [1.5 * w * (1 + math.cos(math.pi * k / 10)) for k, w in enumerate(warmup)]
    assert rates("cosine") == pytest.approx(cosine)
    with pytest.raises(ValueError, match="decay: got 'steps'"):
        Schedule(steps=1, learning_rate=1.0, decay="steps")
