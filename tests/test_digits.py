"""The digits recipe: data, captions and tokenizer, `train_digits`, and the model that ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sdfast.loading import digits_folder
from sdfast.pipelines import StableDiffusion
from sdfast.tokenizer import CLIPTokenizer
from sdfast.training import data, digits
from sdfast.training.captions import WORDS, caption_ids, captions, write_tokenizer

# Data


def test_digits_split_is_a_partition_that_depends_on_the_seed_alone():
    pytest.importorskip("sklearn")
    train_part, holdout = data.load_digits(3)
    assert (len(train_part), len(holdout)) == (1500, 297)
    again = data.load_digits(3)[0]
    assert torch.equal(again.images, train_part.images) and torch.equal(again.labels, train_part.labels)
    assert not torch.equal(data.load_digits(4)[0].images, train_part.images)
    assert int(torch.cat([train_part.labels, holdout.labels]).bincount().sum()) == 1797


def test_enlarged_digits_shrink_back_and_stay_readable():
    pytest.importorskip("sklearn")
    train_part, holdout = data.load_digits(0)
    pictures = data.enlarge(holdout.images)
    assert pictures.shape == (297, 3, 32, 32) and pictures.abs().max() <= 1
    # Of 16: the interpolation rounds the strokes.
    assert (data.shrink(pictures) - holdout.images).abs().mean() < 1
    reader = data.Reader(train_part)
    direct, through = reader.accuracy(holdout), reader.read(data.shrink(pictures)) == holdout.labels
    assert direct > 0.97 and through.double().mean() > 0.97


def test_augmentation_moves_the_picture_but_not_its_meaning():
    pytest.importorskip("sklearn")
    real = data.load_digits(0)[0]
    pictures, labels = data.training_set(real, copies=1, seed=0)
    assert pictures.shape == (3000, 3, 32, 32) and torch.equal(labels[:1500], labels[1500:])
    assert torch.equal(pictures, data.training_set(real, copies=1, seed=0)[0])
    assert (pictures[:1500] - pictures[1500:]).abs().amax(dim=(1, 2, 3)).min() > 0
    reader = data.Reader(real)
    assert (reader.read(data.shrink(pictures[1500:])) == real.labels).double().mean() > 0.97


def test_missing_sklearn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install sdfast\[train\]"):
        data.load_digits()


# Tokenizer


def test_tokenizer_files_are_the_same_bytes_every_time(tmp_path):
    size = write_tokenizer(tmp_path / "a")
    assert write_tokenizer(tmp_path / "b") == size
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_tokenizer_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = write_tokenizer(tmp_path)
    ours = CLIPTokenizer.from_folder(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [text for digit in range(10) for text in captions(digit)]
    texts += [
        "",
        "A Beautiful  SEVEN, please!",
        "ünïcode 漢字 😀",
        "it's 42nd",
        "\n\t",
        "<|endoftext|> three",
    ]
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(ours(texts), expected.input_ids)
    assert (theirs.model_max_length, ours.bos_id, ours.eos_id) == (77, size - 2, size - 1)
    assert ours.pad_id == theirs.pad_token_id == ours.eos_id


def test_every_word_of_the_captions_is_one_token(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    for digit in range(10):
        for text in captions(digit):
            ids = tokenizer([text])[0]
            assert int((ids == tokenizer.eos_id).int().argmax()) == 1 + len(text.split()), text


def test_caption_table(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    table = caption_ids(tokenizer, 0)
    assert table.shape == (10, 6 * len(captions(0)), 77)
    assert torch.equal(table, caption_ids(tokenizer, 0))
    for digit, word in enumerate(WORDS):  # its own name is in each caption, no other digit's ever is
        names = tokenizer([word])[0, 1], tokenizer([str(digit)])[0, 1]
        assert ((table == names[0]) | (table == names[1])).any(dim=-1).nonzero()[:, 0].unique().tolist() == [
            digit
        ]
        assert ((table[digit] == names[0]) | (table[digit] == names[1])).any(dim=-1).all()


# The recipe


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def few_pictures(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "_COPIES", 0)


def _recipe(tmp_path, **options):
    steps = {"vae_steps": 1, "unet_steps": 2, "threads": 1, "progress": False}
    return digits.train_digits(tmp_path / "out", run_dir=tmp_path / "run", **steps | options)


def test_recipe_writes_a_pipeline_once_and_replaces_it(few_pictures, tmp_path):
    output = _recipe(tmp_path)
    pipe = StableDiffusion.from_pretrained(output)
    image = pipe.text_to_image("seven", steps=1, seed=0).images[0]
    assert image.size == (32, 32)
    index = json.loads((output / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    record = json.loads((output / "training.json").read_text())
    assert record["seconds"] > 0 and (record["vae_steps"], record["unet_steps"]) == (1, 2)
    before = (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (output / "left_over").touch()
    assert _recipe(tmp_path) == output
    assert (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert _names(tmp_path) == ["out", "run"] and "left_over" not in _names(output)
    with pytest.raises(ValueError, match=r"schedule.steps is 2 there and 3 here"):
        _recipe(tmp_path, unet_steps=3)


def test_recipe_touches_no_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").touch()  # somebody else's pipeline
    with pytest.raises(FileExistsError, match="was not written by this command"):
        _recipe(tmp_path)
    assert _names(tmp_path) == ["out"] and _names(tmp_path / "out") == ["model_index.json"]


def test_recipe_leaves_the_number_of_threads_and_the_randomness_alone(few_pictures, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _recipe(tmp_path, threads=2)
    assert torch.get_num_threads() == 1 and torch.equal(torch.rand(3), expected)


# The shipped model; tests/test_pipelines.py compares it with diffusers.


def test_shipped_model_is_small():
    assert sum(file.stat().st_size for file in digits_folder().rglob("*") if file.is_file()) < 8_000_000


def test_shipped_model_is_read_as_what_was_asked_for():
    # 30 pictures here; benchmarks/bench_digits_quality.py draws 200.
    pytest.importorskip("sklearn")
    pipe = StableDiffusion.from_pretrained(digits_folder())
    prompts = [f"a handwritten {word}" for word in WORDS]
    drawn = pipe.text_to_image(prompts, num_images=3, steps=20, seed=0, output="tensor")
    read = data.Reader(data.load_digits()[0]).read(data.shrink(drawn.images * 2 - 1))
    assert (read == torch.arange(10).repeat_interleave(3)).double().mean() >= 0.9


def test_diffusers_loads_the_shipped_model():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(digits_folder())
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a handwritten seven", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert image.images[0].size == (32, 32)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler) and pipe.safety_checker is None
