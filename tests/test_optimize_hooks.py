"""Whoever listens to a module, or moves its weights about, is still served after sdfast.optimize."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from test_optimize import encode_and_decode, made, predict

import sdfast
from sdfast.testing import relative_error


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(name="unet"):
    theirs, run = made(name)
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours)
    return ours, theirs, run


LISTENED = ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
            "mid_block.resnets.0.norm2", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "up_blocks.1.attentions.0.proj_out", "up_blocks.0.upsamplers.0.conv",
            "mid_block.attentions.0.transformer_blocks.0.attn1", "mid_block.attentions.0.transformer_blocks.0.ff",
            "mid_block.resnets.1", "mid_block.attentions.0.transformer_blocks.0")  # fmt: skip


@pytest.mark.parametrize("name", LISTENED)
def test_forward_hooks_see_what_they_saw(name):
    """Inputs and outputs of a child that a block would fuse with others; and what a hook returns counts."""
    ours, theirs, run = pair()
    seen = {}
    for side, model in (("ours", ours), ("theirs", theirs)):
        module, listened = model.get_submodule(name), seen.setdefault(side, [])

        def before(module, inputs, listened=listened):
            listened.extend(inputs)

        def after(module, inputs, output, listened=listened):
            listened.append(output)
            return 2 * output

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    assert relative_error(run(ours), run(theirs)) < 2e-5
    tensors = {side: [t for t in found if isinstance(t, torch.Tensor)] for side, found in seen.items()}
    assert len(tensors["ours"]) == len(tensors["theirs"]) >= 1
    for a, b in zip(tensors["ours"], tensors["theirs"], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 2e-5


def test_cpu_offload():
    """accelerate keeps weights elsewhere, and leaves meta tensors in their place between calls."""
    ours, theirs, run = pair()
    expected = run(theirs)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in ours.parameters())
    assert relative_error(run(ours), expected) < 2e-5
    assert relative_error(run(ours), expected) < 2e-5
    accelerate.hooks.remove_hook_from_module(ours, recurse=True)
    assert not any(p.is_meta for p in ours.parameters())
    assert relative_error(run(ours), expected) < 2e-5


def test_disk_offload(tmp_path):
    ours, theirs, run = pair()
    expected = run(theirs)
    accelerate.disk_offload(ours, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert relative_error(run(ours), expected) < 2e-5


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", ["unet", "vae"])
def test_group_offload(name, kind):
    ours, theirs, run = pair(name)
    expected = run(theirs)
    options = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
    apply_group_offloading(
        ours,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        **options,
    )
    if name == "vae" and kind == "block_level":
        # Its blocks are entered through encode and decode, which group offloading does not see; as in diffusers.
        theirs_too = copy.deepcopy(theirs)
        apply_group_offloading(
            theirs_too, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind,
            **options,
        )  # fmt: skip
        expected = encode_and_decode(theirs_too)
    assert relative_error(run(ours), expected) < 2e-5


def test_offloaded_before_is_named():
    """What offloading has taken over keeps running through it, and the report says so."""
    ours, run = made("unet")
    expected = run(ours)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="its forward was replaced before"):
        report = sdfast.optimize(ours)
    assert report.left and relative_error(run(ours), expected) < 2e-5


def test_layerwise_casting():
    ours, theirs, _ = pair()
    for model in (ours, theirs):
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert relative_error(predict(ours), predict(theirs)) < 2e-5
