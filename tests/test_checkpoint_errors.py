"""What is wrong with a checkpoint is said at once, and a malicious one gets nowhere."""

import json
import os
import pathlib
import pickle

import pytest
import safetensors.torch
import torch
from tiny_models import assert_same_tensors, make_unet

from sdfast.models import UNet2DCondition, weights
from sdfast.models import checkpoint as ckpt


def test_unsupported_configuration_is_named_whole(tmp_path):
    make_unet().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"act_fn": "gelu", "class_embed_type": "timestep", "_note": "ignored", "new_option": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ckpt.CheckpointError, match="act_fn='gelu'.*class_embed_type='timestep'") as error:
        ckpt.load_model(UNet2DCondition, tmp_path)
    assert "note" not in str(error.value) and "new_option" not in str(error.value)


@pytest.mark.parametrize(
    "entry", ["../stolen.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", ""]
)
def test_index_may_not_lead_elsewhere(entry, tmp_path):
    folder = tmp_path / "unet"
    theirs = make_unet()
    theirs.save_pretrained(folder, max_shard_size="200KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["conv_in.weight"] = entry
    index.write_text(json.dumps(values))
    safetensors.torch.save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "stolen.safetensors")
    with pytest.raises(ckpt.CheckpointError, match="only a .safetensors file beside it"):
        ckpt.load_model(UNet2DCondition, folder)


def test_shard_links(tmp_path):
    """A link out of the folder is refused; the Hugging Face cache's links to its own blobs are not."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "unet"
    theirs = make_unet()
    theirs.save_pretrained(snapshot, max_shard_size="200KB")
    elsewhere, blobs = tmp_path / "elsewhere", tmp_path / "models--a--b" / "blobs"
    elsewhere.mkdir()
    blobs.mkdir()
    for shard in sorted(snapshot.glob("*.safetensors")):
        shard.rename(blobs / shard.name)
        shard.symlink_to(os.path.relpath(blobs / shard.name, snapshot))
    assert_same_tensors(ckpt.load_model(UNet2DCondition, snapshot), theirs)
    (blobs / shard.name).rename(elsewhere / shard.name)
    shard.unlink()
    shard.symlink_to(elsewhere / shard.name)
    with pytest.raises(ckpt.CheckpointError, match="outside this checkpoint"):
        ckpt.load_model(UNet2DCondition, snapshot)


@pytest.mark.parametrize("kept", [0, 5, 1000, -10])
def test_damaged_file(kept, tmp_path):
    make_unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ckpt.CheckpointError, match=f"{path}.*damaged or cut short.*again"):
        ckpt.load_model(UNet2DCondition, tmp_path)


def test_other_unusable_files(tmp_path):
    make_unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ckpt.CheckpointError, match="git lfs pull"):
        ckpt.load_model(UNet2DCondition, tmp_path)
    path.unlink()
    with pytest.raises(ckpt.CheckpointError, match="no weights"):
        ckpt.load_model(UNet2DCondition, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ckpt.CheckpointError, match="not readable as JSON"):
        ckpt.load_model(UNet2DCondition, tmp_path)


def test_all_misfits_in_one_error(tmp_path):
    theirs = make_unet()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["conv_in.weight"], state["conv_in.bias"]
    state["lora.up"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    safetensors.torch.save_file(state, path)
    with pytest.raises(ckpt.CheckpointError) as error:
        ckpt.load_model(UNet2DCondition, tmp_path)
    message = str(error.value)
    assert "2 missing: conv_in.bias, conv_in.weight" in message
    assert "1 unexpected: lora.up" in message
    assert "1 of another shape: conv_out.bias (7,) for (4,)" in message
    safetensors.torch.save_file({"conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(ckpt.CheckpointError, match=f"and {len(state) + 2 - 2 - 20} more"):
        ckpt.load_model(UNet2DCondition, tmp_path)
    state = theirs.state_dict() | {"conv_out.bias": torch.zeros(4, dtype=torch.int8)}
    safetensors.torch.save_file(state, path)
    with pytest.raises(ckpt.CheckpointError, match="conv_out.bias has dtype torch.int8"):
        ckpt.load_model(UNet2DCondition, tmp_path)


class _RunsCode:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("pwned"),)


def test_bin_files_hold_tensors_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = make_unet()
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    assert path.exists()
    assert_same_tensors(ckpt.load_model(UNet2DCondition, tmp_path), theirs)
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)
    assert_same_tensors(ckpt.load_model(UNet2DCondition, tmp_path), theirs)
    for content in (theirs.state_dict() | {"callback": _RunsCode()}, _RunsCode()):
        torch.save(content, path)
        with pytest.raises(ckpt.CheckpointError, match="safetensors"):
            ckpt.load_model(UNet2DCondition, tmp_path)
    path.write_bytes(pickle.dumps(_RunsCode()))
    with pytest.raises(ckpt.CheckpointError):
        ckpt.load_model(UNet2DCondition, tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_damaged_pickle_is_not_accused(tmp_path):
    """Only a file that asks for a Python object is told off for it."""
    path = tmp_path / "model.ckpt"
    state = {f"layers.{i}.weight": torch.ones(2, 2) for i in range(4)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    pages = [b"<!DOCTYPE html><html>Not found</html>", b"", b"\0" * 100]
    for content in [*(whole[: len(whole) * i // 50] for i in range(50)), *pages]:
        path.write_bytes(content)
        with pytest.raises(ckpt.CheckpointError, match="model.ckpt") as error:
            weights.read_file(path)
        refused_a_global = "GLOBAL" in str(error.value.__cause__)  # a cut within a name leaves another name
        assert ("damaged or cut short" in str(error.value)) is not refused_a_global
        assert not (refused_a_global and content in pages)
    torch.save({"callback": _RunsCode()}, path)
    with pytest.raises(ckpt.CheckpointError, match=r"objects besides tensors \(getattr\).*refused"):
        weights.read_file(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_out_channels": 48},
        {"norm_num_groups": 7},
        {"norm_num_groups": 0},
        {"block_out_channels": [-16, 32]},
        {"block_out_channels": []},
        {"layers_per_block": "two"},
    ],
)
def test_a_configuration_that_makes_no_model(settings, tmp_path):
    make_unet().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ckpt.CheckpointError, match="config.json"):
        ckpt.load_model(UNet2DCondition, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"unet": ["diffusers", "FluxTransformer2DModel"]}, "unet is a FluxTransformer2DModel"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, r"'\.\./unet'"),
        ({"unet": ["diffusers"]}, "expected"),
        ({"unet": ["diffusers", 5]}, "'unet': got .*expected"),
        ({"unet": ["diffusers", ["UNet2DConditionModel"]]}, "'unet': got .*expected"),
    ],
)
def test_unusable_model_index(entry, message, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(entry))
    with pytest.raises(ckpt.CheckpointError, match=message):
        ckpt.load_components(tmp_path)
