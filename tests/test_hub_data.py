"""Data sets of Hugging Face's, streamed once into a folder of images."""

from __future__ import annotations

import json
import threading
import zipfile

import pytest
from test_train_data import _picture

from sdfast.training.distributed import ALONE
from sdfast.training.images import read_folder
from sdfast.training.ldm_data import DataOptions, find_images


@pytest.fixture
def hub_data(monkeypatch):
    pytest.importorskip("datasets")
    from sdfast.training import hub_data

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return hub_data


def _parquet(folder, files, column="caption"):
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"photo": datasets.Image(), column: datasets.Value("string")})
    rows = {
        "photo": [{"bytes": file, "path": None} for file in files],
        column: [f"number {i}" for i in range(len(files))],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def test_data_set_is_streamed_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch, hub_data):
    files = []
    for i in range(4):
        _picture(tmp_path / "pictures" / f"{i}.png", 8 + i, 8)
        files.append((tmp_path / "pictures" / f"{i}.png").read_bytes())
    files[2] = b"damaged"
    _parquet(tmp_path / "source", files)
    assert hub_data.is_dataset(tmp_path / "source") and hub_data.is_dataset("owner/name")
    assert not hub_data.is_dataset(tmp_path / "pictures")

    whole = hub_data.import_dataset(tmp_path / "source", tmp_path / "whole", progress=False)
    images = read_folder(whole)
    assert [image.caption for image in images] == [f"number {i}" for i in range(4)]
    assert [image.path.read_bytes() for image in images] == files

    part = tmp_path / "part"  # stopped in the middle of the third line
    part.mkdir()
    lines = (whole / "metadata.jsonl").read_text().splitlines(keepends=True)
    (part / "metadata.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    for image in images[:2]:
        (part / image.name).write_bytes(image.path.read_bytes())
    resumed = read_folder(hub_data.import_dataset(tmp_path / "source", part, progress=False))
    assert [(i.name, i.caption) for i in resumed] == [(i.name, i.caption) for i in images]
    few = hub_data.import_dataset(tmp_path / "source", tmp_path / "few", most_images=2, progress=False)
    assert len(read_folder(few)) == 2
    with pytest.raises(ValueError, match="caption column: got 'words', expected one of photo, caption"):
        hub_data.import_dataset(tmp_path / "source", tmp_path / "x", caption_column="words")
    monkeypatch.setattr(hub_data, "_open", None)  # what is complete is not opened again
    assert hub_data.import_dataset(tmp_path / "source", whole) == whole


def test_two_runs_may_stream_into_one_folder(tmp_path, monkeypatch, hub_data):
    files = [bytes([i]) for i in range(4)]
    _parquet(tmp_path / "source", files)
    inside, go_on, read = threading.Event(), threading.Event(), hub_data._bytes

    def stopping(image):
        if threading.current_thread() is first and image["bytes"] == files[2]:
            inside.set()
            assert go_on.wait(60)
        return read(image)

    def run():
        hub_data.import_dataset(tmp_path / "source", tmp_path / "shared", progress=False)

    monkeypatch.setattr(hub_data, "_bytes", stopping)
    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert inside.wait(60)
    second.start()
    second.join(1)
    go_on.set()
    first.join()
    second.join()
    images = read_folder(tmp_path / "shared")
    assert [image.caption for image in images] == [f"number {i}" for i in range(4)]
    assert [image.path.read_bytes() for image in images] == files
    assert (tmp_path / "shared" / "metadata.jsonl").read_text().count("\n") == 4


def test_archive_of_images_is_a_data_set(tmp_path, hub_data):
    (tmp_path / "source").mkdir()
    with zipfile.ZipFile(tmp_path / "source" / "train.zip", "w") as archive:
        for i in range(2):
            _picture(tmp_path / f"{i}.png", 8 + i, 8)
            archive.write(tmp_path / f"{i}.png", f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(2)]
        archive.writestr("metadata.jsonl", "\n".join(lines))
    assert hub_data.is_dataset(tmp_path / "source")
    images = read_folder(hub_data.import_dataset(tmp_path / "source", tmp_path / "out", progress=False))
    assert [image.caption for image in images] == ["number 0", "number 1"]
    assert [image.path.read_bytes() for image in images] == [
        (tmp_path / f"{i}.png").read_bytes() for i in range(2)
    ]


def test_data_set_without_captions_is_refused_before_it_is_streamed(tmp_path, hub_data):
    _parquet(tmp_path / "source", [b"a"], column="words")
    with pytest.raises(ValueError, match="no column of captions .* only photo, words; .*--allow-missing"):
        hub_data.import_dataset(tmp_path / "source", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    options = DataOptions(allow_missing_captions=True)
    (image,) = find_images(tmp_path / "source", tmp_path, options, ALONE, progress=False)
    assert image.caption == "" and image.path.read_bytes() == b"a"


def test_local_data_set_that_changed_is_streamed_again(tmp_path, monkeypatch, hub_data):
    def found(data):
        images = find_images(data, tmp_path / "cache", DataOptions(), ALONE, progress=False)
        return [image.path.read_bytes() for image in images]

    _parquet(tmp_path / "source", [b"old"])
    assert found(tmp_path / "source") == [b"old"]
    _parquet(tmp_path / "source", [b"new"])
    assert found(tmp_path / "source") == [b"new"]
    _parquet(tmp_path / "elsewhere" / "source", [b"other"])
    for folder, content in ((tmp_path, b"new"), (tmp_path / "elsewhere", b"other")):
        monkeypatch.chdir(folder)
        assert found("source") == [content]
