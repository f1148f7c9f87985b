"""LoRA after sdfast.optimize: loaded, scaled, switched, fused and unfused, as diffusers and peft do it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from test_optimize import made, predict

import sdfast
from sdfast.testing import relative_error

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj", "conv1", "time_emb_proj"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def add(model, name, seed):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


def pair():
    """An optimised U-Net and the same that is not."""
    theirs, _ = made("unet")
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours)
    return ours, theirs


def check(ours, theirs, **keywords):
    x, text = torch.ones(2, 4, 8, 8), torch.linspace(-1, 1, 2 * 5 * 24).view(2, 5, 24)
    results = [model(x, 7, text, **keywords).sample for model in (ours, theirs)]
    assert relative_error(*results) < 2e-5
    return results[1]


def both(models, function):
    for model in models:
        function(model)


def test_whole_life_of_adapters():
    models = pair()
    plain = check(*models)
    for seed, name in enumerate(("first", "second")):
        both(models, lambda model, name=name, seed=seed: add(model, name, seed))
    seen = [check(*models)]
    both(models, lambda model: model.set_adapter("first"))
    seen.append(check(*models))
    both(models, lambda model: model.set_adapters(["first", "second"], [0.3, 0.8]))
    seen.append(check(*models))
    seen.append(check(*models, cross_attention_kwargs={"scale": 0.5}))
    both(models, lambda model: model.fuse_lora(lora_scale=0.7))
    seen.append(check(*models))
    both(models, lambda model: model.unfuse_lora())
    seen.append(check(*models))
    both(models, lambda model: model.disable_adapters())
    assert relative_error(check(*models), plain) < 1e-6
    both(models, lambda model: model.enable_adapters())
    both(models, lambda model: model.delete_adapters(["first", "second"]))
    # Each state was another one, so that a stale weight would have shown.
    for i, a in enumerate(seen[:5]):
        assert all(relative_error(a, b) > 1e-3 for b in seen[i + 1 : 5])


def test_optimize_after_lora():
    """Wrapped layers are called as they are, what they wrap is served."""
    theirs, _ = made("unet")
    add(theirs, "first", 0)
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours)
    check(ours, theirs)
    wrapped = ours.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(wrapped, peft.tuners.lora.Linear)
    assert type(wrapped.base_layer).__module__.startswith("sdfast.")


def test_restore_under_lora():
    ours, theirs = pair()
    both((ours, theirs), lambda model: add(model, "first", 0))
    expected = check(ours, theirs)
    sdfast.restore(ours)
    assert not any(type(m).__module__.startswith("sdfast.") for m in ours.modules())
    assert torch.equal(check(ours, theirs), expected)


class Louder:
    """An attention processor somebody wrote."""

    def __call__(self, attn, hidden_states, *args, **keywords):
        return 1.5 * AttnProcessor2_0()(attn, hidden_states, *args, **keywords)


def test_custom_processors_stay_in_charge():
    ours, theirs = pair()
    before = check(ours, theirs)
    names = [name for name in ours.attn_processors if "attn2" in name]
    both(
        (ours, theirs),
        lambda model: model.set_attn_processor(
            {n: Louder() if n in names else p for n, p in model.attn_processors.items()}
        ),
    )
    assert relative_error(check(ours, theirs), before) > 1e-3


def test_ip_adapter_processors():
    """Text and image embeddings as diffusers' own processors take them: a tuple instead of a tensor."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    ours, theirs = pair()
    torch.manual_seed(3)
    processors = {}
    for name, processor in theirs.attn_processors.items():
        if "attn2" in name:
            attention = theirs.get_submodule(name.removesuffix(".processor"))
            processor = IPAdapterAttnProcessor2_0(attention.inner_dim, 24, num_tokens=(3,), scale=0.7)
        processors[name] = processor
    x, text, image = torch.ones(2, 4, 8, 8), torch.randn(2, 5, 24), torch.randn(2, 1, 3, 24)
    results = []
    for model in (ours, theirs):
        model.set_attn_processor(dict(processors))
        for attention in (m for m in model.modules() if hasattr(m, "is_cross_attention")):
            if attention.is_cross_attention:
                plain = attention.forward
                attention.forward = lambda h, encoder_hidden_states=None, plain=plain, **k: plain(
                    h, encoder_hidden_states=(encoder_hidden_states, [image]), **k
                )
        results.append(model(x, 7, text).sample)
    assert relative_error(*results) < 2e-5


def test_masks_and_fused_projections():
    ours, theirs = pair()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    plain = check(ours, theirs)
    assert relative_error(check(ours, theirs, encoder_attention_mask=mask), plain) > 1e-3
    both((ours, theirs), lambda model: model.fuse_qkv_projections())
    check(ours, theirs)
    both((ours, theirs), lambda model: model.unfuse_qkv_projections())
    check(ours, theirs)
    assert predict(ours) is not None
