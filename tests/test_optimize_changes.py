"""What somebody sets on a model's modules counts as it does in diffusers, before sdfast.optimize and after."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from test_optimize import made
from torch import nn

import sdfast
from sdfast.models import layers, lora_layers
from sdfast.testing import relative_error


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def wrap_around(model):
    for conv in convolutions(model):
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = [conv.padding[1]] * 2 + [conv.padding[0]] * 2


def replace_conv_forward(model):
    def wrapped(self, x, weight, bias):
        x = F.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2, mode="circular")
        return 1.1 * F.conv2d(x, weight, bias, self.stride)

    for conv in convolutions(model):
        conv._conv_forward = wrapped.__get__(conv)


def dilate(model):
    for conv in convolutions(model):
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            conv.dilation = conv.padding = (2, 2)


def pad_by_number(model):
    for conv in convolutions(model):
        conv.padding = conv.padding[0]


def of_kind(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def other_activations(model):
    for block in of_kind(model, ResnetBlock2D):
        block.nonlinearity = nn.GELU()


def listen_to_activations(model):
    for block in of_kind(model, ResnetBlock2D):
        block.nonlinearity.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def rescale_attention(model):
    for attention in of_kind(model, Attention):
        attention.rescale_output_factor = 1.7


def sharpen_attention(model):
    """AttnProcessor looks at `scale`, the default one does not."""
    for attention in of_kind(model, Attention):
        attention.set_processor(AttnProcessor())
        attention.scale *= 9
        attention.to_q.weight *= 4


CHANGES = {
    f.__name__: f
    for f in (
        wrap_around,
        replace_conv_forward,
        dilate,
        pad_by_number,
        other_activations,
        listen_to_activations,
        rescale_attention,
        sharpen_attention,
    )
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["unet", "vae", "unet, scale-shift"])
@pytest.mark.filterwarnings("ignore:sdfast.optimize left")
def test_models_that_were_changed(name, change):
    theirs, run = made(name)
    ours, changed_before = copy.deepcopy(theirs), copy.deepcopy(theirs)
    sdfast.optimize(ours)
    original = run(theirs)
    assert relative_error(run(ours), original) < 2e-5
    for model in (theirs, ours, changed_before):
        CHANGES[change](model)
    sdfast.optimize(changed_before)
    expected = run(theirs)
    assert relative_error(run(ours), expected) < 2e-5
    assert relative_error(run(changed_before), expected) < 2e-5
    assert change == "pad_by_number" or relative_error(expected, original) > 1e-2


def test_groups_that_are_set():
    theirs = nn.Conv2d(8, 8, 3, padding=1)
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours)
    for conv in (theirs, ours):
        conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, :4].clone())
    x = torch.randn(1, 8, 5, 5)
    assert relative_error(ours(x), theirs(x)) < 1e-6


def test_operands_of_a_convolution_that_wraps_around():
    """Those that blocks fuse, by the layer itself."""
    conv = layers.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
    x, skip, time, residual = (torch.randn(2, c, 10, 8) for c in (2, 4, 4, 4))
    y = conv(
        x[..., ::2, ::2], upsample=False, skip=skip[..., ::2, ::2], residual=residual[..., ::2, ::2],
        time_embedding=time[..., 0, 0],
    )  # fmt: skip
    plain = nn.Conv2d.forward(conv, torch.cat([x, skip], 1)[..., ::2, ::2])
    assert relative_error(y, plain + time[..., :1, :1] + residual[..., ::2, ::2]) < 1e-6
    doubled = nn.Conv2d.forward(conv, F.interpolate(torch.cat([x, skip], 1), scale_factor=2.0))
    assert relative_error(conv(torch.cat([x, skip], 1), upsample=True), doubled) < 1e-6


def test_update_of_a_convolution_that_wraps_around():
    conv = layers.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
    lora_layers.adapt(conv, 2, 2.0, None)
    conv.lora_B.weight.normal_()
    x = torch.randn(2, 6, 5, 4)
    expected = nn.Conv2d.forward(conv, x) + conv._conv_forward(x, conv.lora_update(), None)
    assert relative_error(conv(x), expected) < 1e-5


def test_arguments_by_name():
    """As torch's layers call theirs: UNetMotionModel calls `proj_in(input=...)`."""
    for theirs, shape in (
        (nn.Conv2d(4, 4, 3), (1, 4, 5, 5)), (nn.Linear(4, 3), (2, 4)), (nn.GroupNorm(2, 4), (1, 4, 5, 5)),
        (nn.LayerNorm(4), (2, 4)),
    ):  # fmt: skip
        ours, x = copy.deepcopy(theirs), torch.randn(shape)
        sdfast.optimize(ours)
        assert relative_error(ours(input=x), theirs(input=x)) < 1e-5
