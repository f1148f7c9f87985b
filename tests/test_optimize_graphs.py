"""optimize(cuda_graphs=True), captured on the CPU: the same results, and no replay of what it would not see."""

from __future__ import annotations

import copy
import pickle

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from recorded_graphs import Recorder
from test_optimize import MODELS, made
from test_optimize_changes import wrap_around
from test_optimize_pipelines import script

import sdfast
from sdfast import graphs
from sdfast.drop_in import graphed
from sdfast.loading import digits_folder
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(graphed, "GraphCache", Recorder)

    def can_capture(owner, tensors):  # all but the device
        return not any(module._forward_hooks for module in owner.modules())

    monkeypatch.setattr(graphs, "_can_capture", can_capture)
    with torch.no_grad():
        yield


def pair(name="unet"):
    """The model as it was, and replayed; its cache."""
    theirs, run = made(name)
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours, cuda_graphs=True)
    found = [module for module in ours.modules() if graphed.is_replaced(module)]
    return ours, theirs, run, found[0].forward.cache


@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_the_model(name):
    ours, theirs, run, cache = pair(name)
    for _ in range(2):
        assert relative_error(run(ours), run(theirs)) < 2e-5
    assert cache.captured == (2 if name == "vae" else 1) and cache.replayed == 2 * cache.captured
    assert "by CUDA graphs" in str(sdfast.explain(ours))
    with sdfast.disabled():
        assert relative_error(run(ours), run(theirs)) < 2e-5
    sdfast.restore(ours)
    assert cache.replayed == 2 * cache.captured and "forward" not in ours.__dict__
    assert torch.equal(run(ours), run(theirs)) and "by CUDA graphs" not in str(sdfast.explain(ours))


def test_a_pipeline_captures_once_for_all_steps_and_prompts():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(digits_folder())
    sdfast.optimize(pipe)
    texts = ["a handwritten seven"], ["a handwritten two"]
    before = [script(pipe, prompt=text, guidance_scale=4.0) for text in texts]
    sdfast.optimize(pipe, cuda_graphs=True)
    cache = pipe.unet.forward.cache
    assert pipe.vae.decoder.forward.cache is cache
    for expected, text in zip(before, texts, strict=True):  # the second is another text in the same tensor
        assert np.abs(script(pipe, prompt=text, guidance_scale=4.0) - expected).max() < 1e-3
    assert np.abs(before[0] - before[1]).mean() > 0.05
    steps = pipe.scheduler.num_inference_steps
    assert (cache.captured, cache.replayed) == (2, 2 * (steps + 1))


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7])])
def test_timesteps_share_a_graph_whatever_their_values(timestep):
    ours, theirs, _, cache = pair()
    x, text = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 24)
    for t in (timestep, timestep * 3):
        assert relative_error(ours(x, t, text).sample, theirs(x, t, text).sample) < 2e-5
        assert (
            relative_error(ours(x, timestep=t, encoder_hidden_states=text)[0], theirs(x, t, text)[0]) < 2e-5
        )
    assert cache.captured == 2  # positional, named


class Louder(AttnProcessor2_0):
    scale = 2.0

    def __call__(self, *arguments, **keywords):
        return self.scale * super().__call__(*arguments, **keywords)


class LouderModule(torch.nn.Module):
    """As IP-Adapter's, which has weights."""

    def __init__(self):
        super().__init__()
        self.scale, self.processor = 2.0, AttnProcessor2_0()

    def forward(self, *arguments, **keywords):
        return self.scale * self.processor(*arguments, **keywords)


class Doubling(diffusers.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def hook_of_diffusers(model):
    block = model.mid_block.resnets[0]
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "doubling")


def add_lora(model):
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))


UNSEEN = {
    "attention processors": lambda model: model.set_attn_processor(Louder()),
    "attention processors that are modules": lambda model: model.set_attn_processor(LouderModule()),
    "hooks of diffusers'": hook_of_diffusers,
    "LoRA": add_lora,
    "convolutions that wrap around": wrap_around,
    "FreeU": lambda model: model.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "hooks": lambda model: model.mid_block.register_forward_hook(lambda module, inputs, output: 2 * output),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_a_replay_would_not_see_runs_without(what):
    ours, theirs, run, cache = pair()
    before = run(ours)
    for model in (ours, theirs):
        UNSEEN[what](model)
    replayed = cache.replayed
    after = run(ours)
    assert relative_error(after, run(theirs)) < 2e-5 < relative_error(after, before)
    assert cache.replayed == replayed


def test_copies_and_pickles_have_graphs_of_their_own():
    ours, theirs, run, cache = pair()
    run(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.forward.model is other and other.forward.cache is not cache
        assert relative_error(run(other), run(theirs)) < 2e-5
        assert other.forward.cache.captured == 1
    assert cache.captured == 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_nothing_to_replay_is_said():
    theirs, _ = made("unet")
    with pytest.warns(UserWarning, match="cuda_graphs=True.: found no U-Net"):
        sdfast.optimize(theirs, include="mid_block.*", cuda_graphs=True)


def test_twice_is_once():
    ours, theirs, run, cache = pair()
    sdfast.optimize(ours, cuda_graphs=True)
    assert ours.forward.cache is cache
    assert relative_error(run(ours), run(theirs)) < 2e-5 and cache.captured == 1
