"""Runs of `sdfast train ldm` that were stopped: by a kill, a full disk, damaged files, other settings."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import PACKAGE
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import ldm_runs  # noqa: E402
import tiny_pipelines  # noqa: E402
from ldm_runs import QUIET, same, weights  # noqa: E402

from sdfast.cli import main  # noqa: E402
from sdfast.training import checkpoints  # noqa: E402
from sdfast.training.checkpoints import ShardedRunFolder  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return ldm_runs.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def train(model, photos, tmp_path):
    return ldm_runs.trainer(model, photos, tmp_path)


def test_a_lora_goes_on_to_the_same_bits(train, monkeypatch):
    def factors(name, **more):
        return load_file(train(name, lora_rank=2, **more).output / "pytorch_lora_weights.safetensors")

    reference, save = factors("whole"), ShardedRunFolder.save

    def save_and_stop(self, *arguments, **keywords):
        save(self, *arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardedRunFolder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            factors("stopped", running=dataclasses.replace(QUIET, checkpoint_steps=2))
    assert same(reference, factors("stopped"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 6}, "schedule.steps is 5 there and 6 here"),
        ({"prediction": "v_prediction"}, "noise.prediction_type is epsilon there and v_prediction here"),
        ({"data": "swapped"}, r"data is \w+ there and \w+ here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
)
def test_checkpoints_of_other_settings_are_refused_before_any_work(
    train, photos, tmp_path, monkeypatch, settings, text
):
    train()
    monkeypatch.setattr("sdfast.training.ldm._Work", None)  # what would begin to work
    if "data" in settings:  # another picture under the name of one
        settings = {"data": Path(shutil.copytree(photos, tmp_path / settings["data"]))}
        (settings["data"] / "4.png").write_bytes((photos / "5.png").read_bytes())
    with pytest.raises(ValueError, match=text):
        train(**settings)


def test_a_copy_of_the_images_is_the_same_data(train, photos, tmp_path):
    first = train()
    copy = shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)  # times are new
    assert same(weights(first.output), weights(train(data=copy).output))


def test_checkpoint_of_another_model_is_refused(train, tmp_path):
    output = train().output
    output.rename(tmp_path / "learned")
    with pytest.raises(ValueError, match=r"model.unet is \w+ there and \w+ here"):
        train(model=tmp_path / "learned")
    train(model=tmp_path / "learned", running=dataclasses.replace(QUIET, resume=False))


KILLED = """
import sys, torch
torch.set_num_threads(1)
from sdfast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_at_any_moment_it_ends_with_the_same_bits(model, photos, tmp_path):
    def arguments(name):
        return [
            "train", "ldm", "--data", photos, "--model", model, "-o", tmp_path / name, "--steps", "12", "--lr",
            "1e-3", "--batch-size", "4", "--ema-decay", "0.9", "--cache-dir", tmp_path / "cache",
            "--checkpoint-seconds", "1e-9", "--aspect-buckets", "--micro-batch", "3",
        ]  # fmt: skip

    reference = [*arguments("a")]
    reference[reference.index("1e-9")] = "1e9"
    assert main([str(a) for a in reference]) == 0
    checkpoints = tmp_path / "b-run" / "unet"
    command = [sys.executable, "-c", KILLED, *map(str, arguments("b"))]
    process = subprocess.Popen(command, cwd=PACKAGE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*[3-9]")):
        assert process.poll() is None and time.monotonic() < deadline, "wrote no checkpoint"
        time.sleep(0.003)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    assert main([str(a) for a in arguments("b")]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.fixture
def small_disk():
    """A function that lets files grow to so many bytes and no further, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_older_checkpoint_whole(train, small_disk, tmp_path):
    reference = train("a", steps=6)
    calls = 0
    save = ShardedRunFolder.save

    def fills(run, step, state):
        nonlocal calls
        calls += 1
        if calls == 2:
            small_disk(100_000)
        return save(run, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedRunFolder, "save", fills)
        running = dataclasses.replace(QUIET, checkpoint_steps=2)
        with (
            pytest.warns(UserWarning, match="step 4 could not be written.*training goes on"),
            pytest.raises(OSError, match="step 6 could not be written.*run the same command again"),
        ):
            train("b", steps=6, running=running)
    assert [path.name for path in (tmp_path / "b-run" / "unet").iterdir()] == ["checkpoint-00000002"]
    small_disk(resource.RLIM_INFINITY)
    assert same(weights(reference.output), weights(train("b", steps=6).output))


def test_damaged_checkpoint_is_passed_over(train, tmp_path):
    reference = train("a")
    train("b", running=dataclasses.replace(QUIET, checkpoint_steps=3))
    (shard,) = (tmp_path / "b-run" / "unet" / "checkpoint-00000005").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="00000005: damaged .the checksum"):
        assert same(weights(reference.output), weights(train("b").output))


def test_checkpoints_keep_strides_and_copy_only_what_they_must(tmp_path, monkeypatch):
    x = torch.randn(3, 4, 5, 6)
    run = ShardedRunFolder(tmp_path, {})
    run.save(7, {"last": x.to(memory_format=torch.channels_last), "first": x, "moments": {"step": 2.0}})
    last, first = torch.zeros(3, 4, 5, 6).to(memory_format=torch.channels_last), torch.zeros(3, 4, 5, 6)
    load, into = checkpoints.dcp.load, {}
    monkeypatch.setattr(checkpoints.dcp, "load", lambda state, **o: (into.update(state), load(state, **o)))
    found = run.latest({"last": last, "first": first, "moments": {"step": 0.0}})
    assert found["step"] == 7 and found["moments"] == {"step": 2.0}
    assert torch.equal(last, x) and torch.equal(first, x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert into["first"].data_ptr() == first.data_ptr()
