"""LoRA beside and inside the weights: peft's results and gradients, and no trace when it is gone."""

import copy

import diffusers
import peft
import pytest
import tiny_pipelines
import torch
import transformers

from sdfast import lora
from sdfast.models import CLIPTextEncoder, UNet2DCondition
from sdfast.models.checkpoint import load_model
from sdfast.models.ldm_keys import current_name
from sdfast.models.lora_layers import LoraConv2d, adapted
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less

# Every kind of layer, and all that they fuse: activations, GEGLU, residuals, an upsample, tokens of a 1x1.
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.0.proj", "net.2", "conv", "conv1", "conv_shortcut", "conv_in",
        "time_emb_proj", "linear_1"]  # fmt: skip
TEXT = ["q_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("lora") / "sd")


@pytest.fixture
def unet(folder):
    return load_model(UNet2DCondition, folder, subfolder="unet")


@pytest.fixture
def clip(folder):
    return load_model(CLIPTextEncoder, folder, subfolder="text_encoder")


def call(unet, dtype=torch.float32):
    x, text = torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8), torch.linspace(-2, 1, 5 * 32).view(1, 5, 32)
    y = unet(x.repeat(2, 1, 1, 1).to(dtype), torch.tensor([7, 500]), text.repeat(2, 1, 1).to(dtype))
    return y if isinstance(y, torch.Tensor) else y.sample


def draw(model, seed=0):
    """Factors that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for factor in lora.lora_state_dict(model).values():
        factor.copy_(0.3 * torch.randn(factor.shape, generator=generator, dtype=torch.float32))


def named_factors(model):
    """The factors of ours or of peft's, by our names."""
    return {
        current_name(name.replace(".default", "")): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def like_ours(theirs, ours, rank, alpha, targets):
    """Give a model of diffusers' or transformers' an adapter of peft's with our factors."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), theirs)
    factors, state = named_factors(theirs), lora.lora_state_dict(ours)
    assert factors.keys() == state.keys()
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(state[name])


def run(model, factors, predict):
    """The result, and the gradients of the factors; nothing else may have one."""
    y = predict(model)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == len(factors)
    return {"result": y, **{name: factor.grad for name, factor in factors.items()}}


def judged(ours, theirs, rank, alpha, targets, predict):
    """Our results beside peft's: in fp64 the same, in fp32 as near to fp64's as peft's are.

    Gradients through softmax cancel, so that one parameter's error is a draw of rounding: peft's own moves
    several times with the memory format or the CPU. Its worst is the measure.
    """
    lora.add_lora(ours, rank, alpha, targets)
    draw(ours)
    like_ours(theirs, ours, rank, alpha, targets)
    exact, wide = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    runs = [run(model, named_factors(model), predict) for model in (ours, theirs, wide, exact)]
    worst = max(relative_error(runs[1][name], expected) for name, expected in runs[3].items())
    for name, expected in runs[3].items():
        assert relative_error(runs[0][name], expected) < 2 * worst + 2e-5, name
        assert relative_error(runs[2][name], expected) < 1e-9, name


def test_unet_and_its_gradients_are_pefts(folder, unet):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    judged(unet, theirs, 3, 5, UNET, lambda model: call(model, next(model.parameters()).dtype))


def test_text_encoder_and_its_gradients_are_pefts(folder, clip):
    theirs = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    judged(clip, theirs, 2, 2, TEXT, lambda model: model(torch.arange(14).view(2, 7)).last_hidden_state)


def test_a_new_update_is_zero_and_alone_to_train(unet):
    with torch.no_grad():
        plain = call(unet)
        factors = lora.add_lora(unet, 4)
        assert torch.equal(call(unet), plain)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in factors}
    names = [name for name, _ in adapted(unet)]
    assert names and all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in names)
    before = [factor.clone() for factor in factors]
    optimizer = torch.optim.SGD(factors, lr=1e-3)
    for _ in range(2):  # A has a gradient once B is not zero
        optimizer.zero_grad()
        call(unet).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(factor, old) for factor, old in zip(factors, before, strict=True))


def test_merged_is_the_same_and_comes_out_bit_for_bit(unet):
    plain = copy.deepcopy(unet)
    lora.add_lora(unet, 3, 5, UNET)
    draw(unet)
    with torch.no_grad():
        beside = call(unet)
        assert relative_error(beside, call(plain)) > 1e-2
        lora.merge_lora(unet)
        lora.merge_lora(unet)  # once is enough
        merged = call(unet)
        assert relative_error(merged, beside) < 1e-5
        lora.set_lora_scale(unet, 0.5)
        half = call(unet)
        assert relative_error(half, merged) > 1e-2
        lora.unmerge_lora(unet)
        assert relative_error(call(unet), half) < 1e-5
        lora.set_lora_scale(unet, 0)
        assert torch.equal(call(unet), call(plain))
        lora.merge_lora(unet)
        lora.remove_lora(unet)
        assert_is(unet, plain)
        assert torch.equal(call(unet), call(plain))


def assert_is(model, other):
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_removed_with_its_update_left_in_the_weights(unet):
    kinds = [type(m) for m in unet.modules()]
    lora.add_lora(unet, 3, targets=UNET)
    draw(unet)
    beside = call(unet)
    lora.remove_lora(unet, merge=True)
    assert [type(m) for m in unet.modules()] == kinds
    assert relative_error(call(unet), beside) < 1e-5


def test_fp32_factors_beside_bf16_weights(unet):
    unet.bfloat16()
    lora.add_lora(unet, 3, targets=UNET, dtype=torch.float32)
    draw(unet)
    y = call(unet, torch.bfloat16)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in unet.parameters() if p.requires_grad
    )
    lora.remove_lora(unet, merge=True)
    assert relative_error(call(unet.double(), torch.float64), y) < 0.05


def test_under_autocast(unet):
    """Base and update in the dtype that autocast chose."""
    lora.add_lora(unet, 3, targets=UNET)
    draw(unet)
    exact = call(copy.deepcopy(unet).double(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(unet)
        lora.merge_lora(unet)
        merged = call(unet)
    assert y.dtype == merged.dtype
    assert relative_error(y, exact) < 2 * relative_error(merged, exact) + 2**-8


def test_convolution_with_skip(unet):
    """What may be asked of a convolution on a GPU: two sources and a time embedding."""
    conv = next(layer for name, layer in unet.named_modules() if name.endswith("up_blocks.1.resnets.0.conv1"))
    lora.add_lora(unet, 3, targets=["up_blocks.1.resnets.0.conv1"])
    assert type(conv) is LoraConv2d
    draw(unet)
    x, time = torch.randn(2, conv.in_channels, 6, 5), torch.randn(2, conv.out_channels)
    y = conv(x, time_embedding=time)
    assert relative_error(conv(x[:, :20], skip=x[:, 20:], time_embedding=time), y) < 1e-6
    lora.merge_lora(unet)
    assert relative_error(conv(x, time_embedding=time), y) < 1e-5


def test_state_goes_to_another_model(unet, folder):
    lora.add_lora(unet, 3)
    draw(unet)
    other = load_model(UNet2DCondition, folder, subfolder="unet")
    lora.add_lora(other, 3)
    lora.load_lora_state_dict(other, {name: t.clone() for name, t in lora.lora_state_dict(unet).items()})
    assert torch.equal(call(other), call(unet))
    state = lora.lora_state_dict(unet)
    for wrong in (dict(list(state.items())[1:]), {name: t[:2] for name, t in state.items()}):
        with pytest.raises(ValueError, match="state: is of other layers or another rank"):
            lora.load_lora_state_dict(other, wrong)
    assert torch.equal(call(other), call(unet))
    lora.merge_lora(other)
    with pytest.raises(ValueError, match="unmerge_lora it first"):
        lora.load_lora_state_dict(other, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 2, "alpha": 0.0}, "alpha: got 0.0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha: got nan"),
        ({"rank": 2, "targets": []}, "targets: got"),
        ({"rank": 2, "targets": "to_q"}, "targets: got 'to_q'"),
        ({"rank": 2, "targets": ["to_q", "norm1"]}, "'norm1' names no linear layer or convolution; .* to_out.0, to_q"),
    ],
)  # fmt: skip
def test_bad_arguments(unet, arguments, message):
    plain = copy.deepcopy(unet)
    with pytest.raises(ValueError, match=message):
        lora.add_lora(unet, **arguments)
    assert_is(unet, plain)
    assert all(p.requires_grad for p in unet.parameters())


def test_models_that_cannot(unet):
    with pytest.raises(TypeError, match="model: got Linear, expected a U-Net or text encoder"):
        lora.add_lora(torch.nn.Linear(2, 2), 1)
    for function in (lora.lora_state_dict, lora.merge_lora, lora.unmerge_lora, lora.remove_lora):
        with pytest.raises(ValueError, match="this UNet2DCondition has no LoRA"):
            function(unet)
    lora.add_lora(unet, 1)
    with pytest.raises(ValueError, match="has LoRA already"):
        lora.add_lora(unet, 1)
    with pytest.raises(ValueError, match="scale: got inf"):
        lora.set_lora_scale(unet, float("inf"))
