"""sdfast inside other libraries: an attention processor, layers for `kernels`, a node for ComfyUI."""

from __future__ import annotations

import copy
import importlib.util
import pathlib

import kernels
import pytest
import torch
import torch.nn.functional as F
from test_optimize import TEXT_DIM, made, randn
from torch import nn

import sdfast
from sdfast.drop_in import hub_kernels, processor
from sdfast.testing import relative_error

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_processor(name, monkeypatch):
    model, run = made(name)
    expected, calls = run(model), []
    attention = processor.blocks.ops.attention
    monkeypatch.setattr(
        processor.blocks.ops, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    model.set_attn_processor(sdfast.SdfastAttnProcessor())
    assert relative_error(run(model), expected) < 2e-5
    assert calls
    calls.clear()
    with sdfast.disabled():
        assert torch.equal(run(model), expected)
    assert not calls


def test_processor_and_masks():
    model, _ = made("unet")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    arguments = (randn(2, 4, 8, 8), 7, randn(2, 5, TEXT_DIM))
    expected = model(*arguments, encoder_attention_mask=mask).sample
    model.set_attn_processor(sdfast.SdfastAttnProcessor())
    with pytest.warns(UserWarning, match="it is given a mask"):
        result = model(*arguments, encoder_attention_mask=mask).sample
    assert relative_error(result, expected) < 2e-5


def test_layers_for_kernels(monkeypatch):
    for kind in (nn.Linear, nn.LayerNorm, nn.GroupNorm):
        own = type(kind.__name__, (kind,), {"forward": kind.forward})  # torch's own classes stay as they are
        kernels.replace_kernel_forward_from_hub(own, kind.__name__)
        monkeypatch.setitem(globals(), kind.__name__, own)
    model = nn.Sequential(
        globals()["Linear"](12, 16),
        globals()["LayerNorm"](16),
        nn.Unflatten(1, (4, 4)),
        globals()["GroupNorm"](2, 4),
    )
    x = randn(3, 12)
    expected, calls = model(x), []
    for name in ("linear", "layer_norm", "group_norm"):
        operation = getattr(hub_kernels.ops, name)
        monkeypatch.setattr(
            hub_kernels.ops, name, lambda *a, f=operation, n=name, **k: calls.append(n) or f(*a, **k)
        )
    with kernels.use_kernel_mapping(hub_kernels.mapping()):
        model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=False)
    assert relative_error(model(x), expected) < 1e-5
    assert calls == ["linear", "layer_norm", "group_norm"]


class Patcher:
    """What a node sees of ComfyUI's model: `clone` and `model_options`."""

    def __init__(self, options=None):
        self.model_options = options or {}

    def clone(self):
        return Patcher(copy.deepcopy(self.model_options))


@pytest.fixture(scope="module")
def node():
    path = ROOT / "integrations" / "comfyui" / "sdfast_attention.py"
    spec = importlib.util.spec_from_file_location("sdfast_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def comfy_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
                    **keywords):  # fmt: skip
    """As the attention functions of comfy.ldm.modules.attention take their arguments."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=keywords.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def test_comfyui_node(node):
    model = Patcher({"transformer_options": {"patches": {"a": 1}}})
    (patched,) = getattr(node.NODE_CLASS_MAPPINGS["SdfastAttention"](), node.SdfastAttention.FUNCTION)(model)
    assert node.OVERRIDE not in model.model_options["transformer_options"]
    options = patched.model_options["transformer_options"]
    assert options["patches"] == {"a": 1}
    q, k = randn(2, 9, 24), randn(2, 5, 24, seed=1)
    reached = []

    def original(*arguments, **keywords):
        reached.append(keywords)
        return comfy_attention(*arguments, **keywords)

    def call(*arguments, **keywords):
        return options[node.OVERRIDE](original, *arguments, transformer_options=options, **keywords)

    assert relative_error(call(q, k, k, 3), comfy_attention(q, k, k, 3)) < 1e-5
    heads = [t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k, k)]
    for flags in ({"skip_reshape": True}, {"skip_reshape": True, "skip_output_reshape": True}):
        assert relative_error(call(*heads, 3, **flags), comfy_attention(*heads, 3, **flags)) < 1e-5
    assert not reached
    mask = torch.zeros(9, 5).masked_fill(torch.arange(5) > 2, float("-inf"))
    for further in ({"mask": mask}, {"scale": 0.3}, {"attn_precision": torch.float32}):
        assert torch.equal(call(q, k, k, 3, **further), comfy_attention(q, k, k, 3, **further))
    assert len(reached) == 3


def test_comfyui_node_delegates(node):
    """To the override that another node put there."""
    asked = []

    def previous(original, *arguments, **keywords):
        asked.append(keywords["mask"])
        return original(*arguments, **keywords)

    (patched,) = node.SdfastAttention().patch(Patcher({"transformer_options": {node.OVERRIDE: previous}}))
    override = patched.model_options["transformer_options"][node.OVERRIDE]
    q, mask = randn(2, 9, 24), torch.zeros(9, 9)
    override(comfy_attention, q, q, q, 3)
    assert not asked
    override(comfy_attention, q, q, q, 3, mask=mask)
    assert len(asked) == 1 and asked[0] is mask
