"""sdfast.optimize on diffusers' own models: the same results, everything where it was, and back again."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import sdfast
from sdfast import packing
from sdfast.drop_in import blocks, text
from sdfast.testing import relative_error

TEXT_DIM = 24
LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}


def unet(**config):
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        **LEVELS,
        **config,
    )


def vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **LEVELS
    )


def unconditional(**config):
    return diffusers.UNet2DModel(
        in_channels=3, out_channels=3, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **LEVELS, **config,
    )  # fmt: skip


def control_net():
    return diffusers.ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=TEXT_DIM,
        attention_head_dim=4, conditioning_embedding_out_channels=(8, 16), **LEVELS,
    )  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predict(model, height=8, width=8, batch=2):
    return model(randn(batch, 4, height, width), 7, randn(batch, 5, TEXT_DIM, seed=1)).sample


def predict_unconditional(model):
    return model(randn(2, 3, 16, 16), 7).sample


def encode_and_decode(model):
    moments = model.encode(randn(1, 3, 16, 18)).latent_dist.parameters
    return torch.cat([moments.flatten(), model.decode(randn(1, 4, 8, 9)).sample.flatten()])


def control(model):
    outputs = model(randn(2, 4, 8, 8), 7, randn(2, 5, TEXT_DIM, seed=1), randn(2, 3, 16, 16, seed=2))
    return torch.cat([t.flatten() for t in (*outputs.down_block_res_samples, outputs.mid_block_res_sample)])


MODELS = {
    "unet": (unet, predict),
    "unet, linear projections": (lambda: unet(use_linear_projection=True), predict),
    "unet, scale-shift": (lambda: unet(resnet_time_scale_shift="scale_shift"), predict),
    "unet, two transformer blocks": (lambda: unet(transformer_layers_per_block=2), predict),
    "unet, upcast attention": (lambda: unet(upcast_attention=True), predict),
    "unconditional": (unconditional, predict_unconditional),
    "unconditional, resnets that resample": (
        lambda: unconditional(downsample_type="resnet", upsample_type="resnet"),
        predict_unconditional,
    ),
    "vae": (vae, encode_and_decode),
    "control net": (control_net, control),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def made(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():  # some start as zeros, which would hide what follows them
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model, MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:sdfast.optimize left")
def test_same_results_and_back(name):
    model, run = made(name)
    exact = run(model)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    parameters = list(model.parameters())

    report = sdfast.optimize(model)
    assert relative_error(run(model), exact) < 2e-5
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert bool(report.left) == ("resample" in name), report.summary()
    with sdfast.disabled():
        assert relative_error(run(model), exact) < 2e-5

    sdfast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.stride() for p in model.parameters()] == strides
    assert not any("_sdfast" in m.__dict__ for m in model.modules())
    assert torch.equal(run(model), exact)


def test_blocks_are_served():
    """Not only layers: every block of a U-Net and of a VAE is one of ours."""
    for name in ("unet", "vae"):
        model, _ = made(name)
        sdfast.optimize(model, strict=True)
        for kind in (diffusers.models.resnet.ResnetBlock2D, diffusers.models.attention_processor.Attention):
            found = [m for m in model.modules() if isinstance(m, kind)]
            assert found and all(type(m).__module__ == blocks.__name__ for m in found)


def test_every_resolution_and_batch():
    model, run = made("unet")
    theirs = copy.deepcopy(model)
    sdfast.optimize(model)
    for height, width, batch in ((8, 8, 2), (9, 7, 1), (16, 6, 3), (8, 8, 2)):
        assert relative_error(run(model, height, width, batch), run(theirs, height, width, batch)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    model, _ = made("unet")
    exact = copy.deepcopy(model).double()
    model.to(dtype)
    x, words = randn(2, 4, 8, 8).to(dtype), randn(2, 5, TEXT_DIM).to(dtype)
    right = exact(x.double(), 7, words.double()).sample
    eager = relative_error(model(x, 7, words).sample.double(), right)
    sdfast.optimize(model)
    assert relative_error(model(x, 7, words).sample.double(), right) < 1.5 * eager + 1e-9


def test_twice_and_copies():
    model, run = made("unet")
    sdfast.optimize(model)
    expected, kinds = run(model), [type(m) for m in model.modules()]
    sdfast.optimize(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (model, *copies):
        assert [type(m) for m in other.modules()] == kinds
        assert torch.equal(run(other), expected)
    sdfast.restore(copies[0])
    assert type(copies[0].conv_in) is nn.Conv2d and type(model.conv_in) is not nn.Conv2d


def test_include_and_exclude():
    model, run = made("unet")
    expected = run(model)
    sdfast.optimize(model, include="mid_block.*", exclude=["*.attn2*"])
    touched = {name for name, m in model.named_modules() if "_sdfast" in m.__dict__}
    assert touched and all(name.startswith("mid_block.") and ".attn2" not in name for name in touched)
    assert relative_error(run(model), expected) < 2e-5


def test_training_mode_leaves_memory_alone():
    model, _ = made("unet")
    strides, addresses = [p.stride() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    sdfast.optimize(model, mode="training")
    assert [p.stride() for p in model.parameters()] == strides
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_switches():
    model, _ = made("unet")
    with sdfast.use_numerics("fast"), sdfast.use_memory("default"):
        report = sdfast.optimize(model, numerics="exact", memory="low")
        assert any("numerics exact, memory low" in note for note in report.notes)


def test_strict_changes_nothing():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 8), nn.Bilinear(2, 2, 2))
    with pytest.raises(RuntimeError, match=r"(?s)0 \(Conv2d\): 2 groups.*2 \(Bilinear\): Bilinear is none"):
        sdfast.optimize(model, strict=True)
    assert type(model[1]) is nn.Linear
    with pytest.warns(UserWarning, match="left 2 modules"):
        report = sdfast.optimize(model)
    assert type(model[1]) is not nn.Linear
    assert [row.name for row in report.left] == ["0", "2"]
    assert "2 groups" in str(report) and "Bilinear" in str(sdfast.explain(model))


def test_patterns_may_name_an_absent_component_or_an_alias():
    shared = nn.Sequential(nn.Linear(32, 32))
    shared.alias = shared[0]
    pipe = SimpleNamespace(components={"unet": shared, "safety_checker": None})
    report = sdfast.optimize(pipe, exclude=["safety_checker.*", "unet.alias"])
    assert "unet.0" in str(report)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "target: got str"),
        ((nn.ReLU(),), ValueError, "target: holds no module"),
        ((nn.Linear(2, 2), {"include": "x"}), ValueError, "include: 'x' matches no module"),
        (
            (nn.Sequential(nn.Linear(2, 2)), {"exclude": ["0", "1.*"]}),
            ValueError,
            "exclude: '1.*' matches no module, such as '0'",
        ),
        ((nn.Linear(2, 2), {"include": 3}), TypeError, "include: got 3"),
        ((nn.Linear(2, 2), {"mode": "fast"}), ValueError, "mode: got 'fast'"),
        (
            (nn.Linear(2, 2), {"numerics": "good"}),
            ValueError,
            "numerics: got 'good', expected one of exact, fast",
        ),
        ((nn.Linear(2, 2), {"memory": "all"}), ValueError, "memory: got 'all'"),
    ],
)
def test_errors(arguments, error, message):
    *target, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        sdfast.optimize(*target, **keywords)
    assert not isinstance(target[0], nn.Linear) or type(target[0]) is nn.Linear


def test_forward_replaced_before_is_left():
    model, run = made("unet")
    conv = model.conv_in
    conv.forward = conv.forward
    with pytest.warns(UserWarning, match="its forward was replaced before"):
        sdfast.optimize(model)
    assert type(conv) is nn.Conv2d


class TestText:
    """Keys and values of a text are computed once, while nothing of it changed."""

    @pytest.fixture
    def projected(self, monkeypatch):
        count = []
        linear = blocks.project

        def counted(module, *args, **keywords):
            count.append(module)
            return linear(module, *args, **keywords)

        monkeypatch.setattr(blocks, "project", counted)
        return count

    def calls(self, projected, model):
        projected.clear()
        result = model(randn(2, 4, 8, 8), 7, self.text).sample
        keys = {m.to_k for m in model.modules() if isinstance(m, blocks.Attention) and m.is_cross_attention}
        return result, sum(module in keys for module in projected)

    def test_once(self, projected):
        model, _ = made("unet")
        theirs = copy.deepcopy(model)
        sdfast.optimize(model)
        self.text = randn(2, 5, TEXT_DIM)
        first, count = self.calls(projected, model)
        assert count > 0
        again, none = self.calls(projected, model)
        assert none == 0 and torch.equal(first, again)

        self.text.mul_(2)
        changed, seen = self.calls(projected, model)
        assert seen == count
        assert relative_error(changed, theirs(randn(2, 4, 8, 8), 7, self.text).sample) < 2e-5

        for side in (model, theirs):
            for name, parameter in side.named_parameters():
                if "attn2.to_v" in name:
                    parameter.mul_(0.5)
        changed, seen = self.calls(projected, model)
        assert seen == count
        assert relative_error(changed, theirs(randn(2, 4, 8, 8), 7, self.text).sample) < 2e-5

        for side in (model, theirs):  # as an average of weights is swapped in: no counter moves
            for name, parameter in side.named_parameters():
                if "attn2.to_k" in name:
                    parameter.data.mul_(0.5)
        changed, seen = self.calls(projected, model)
        assert seen == count
        assert relative_error(changed, theirs(randn(2, 4, 8, 8), 7, self.text).sample) < 2e-5
        packing.clear()
        assert self.calls(projected, model)[1] == count

        with torch.autocast("cpu", torch.bfloat16):  # in another dtype, and back
            assert self.calls(projected, model)[1] == count
        again, seen = self.calls(projected, model)
        assert seen == count and torch.equal(again, changed)
        with sdfast.use_backend("reference"):
            assert self.calls(projected, model)[1] == count

        with torch.enable_grad():
            assert self.calls(projected, model)[1] == count
        with torch.inference_mode():
            self.text = randn(2, 5, TEXT_DIM)
            assert self.calls(projected, model)[1] == self.calls(projected, model)[1] == count

    def test_is_dropped_with_the_text(self):
        model, _ = made("unet")
        sdfast.optimize(model)
        words = randn(2, 5, TEXT_DIM)
        model(randn(2, 4, 8, 8), 7, words)
        kept = [m for m in model.modules() if m in text._kept]
        assert kept
        del words
        gc.collect()
        assert not any(m in text._kept for m in model.modules())
