"""The segmentation U-Net against its formula in plain torch, and its arithmetic of sides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sdfast
from sdfast.models import SegmentationUNet, SegmentationUNetConfig
from sdfast.models.checkpoint import CheckpointError, load_model, save_model

PAPER = SegmentationUNetConfig()


def formula(model, x):
    """Fig. 1 of Ronneberger et al. 2015 from the parameters alone."""
    p = dict(model.named_parameters())

    def double(x, name):
        for conv in ("conv1", "conv2"):
            x = F.relu(F.conv2d(x, p[f"{name}.{conv}.weight"], p[f"{name}.{conv}.bias"]))
        return x

    skips = []
    for level in range(model.config.depth):
        skips.append(double(x, f"down_blocks.{level}"))
        x = F.max_pool2d(skips[-1], 2)
    x = double(x, f"down_blocks.{model.config.depth}")
    for level, skip in enumerate(reversed(skips)):
        x = F.conv_transpose2d(x, p[f"up_convs.{level}.weight"], p[f"up_convs.{level}.bias"], stride=2)
        cut = (skip.shape[-1] - x.shape[-1]) // 2
        x = double(torch.cat([x, skip[:, :, cut:-cut, cut:-cut]], 1), f"up_blocks.{level}")
    return F.conv2d(x, p["conv_out.weight"], p["conv_out.bias"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_result_and_gradients_are_the_formula_s(depth):
    config = SegmentationUNetConfig(in_channels=3, out_channels=4, width=4, depth=depth, dropout=0.0)
    model = SegmentationUNet(config).double()
    side = config.output_at_least(10) + 2 * config.margin
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    results = []
    for network in (model, lambda x: formula(model, x)):
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_fp32_is_within_the_kernels_tolerance():
    """The wide layers are Winograd's, which is allowed 5e-5 a layer and 1e-4 over a network."""
    model = SegmentationUNet(SegmentationUNetConfig(width=32, depth=2)).eval()
    x = torch.randn(1, 1, 140, 140)
    with torch.no_grad():
        y, expected = model(x), formula(model.double(), x.double())
    assert (y - expected).norm() < 1e-4 * expected.norm()


def test_the_paper_s_numbers():
    assert PAPER.output_side(572) == 388 and PAPER.margin == 92
    model = SegmentationUNet(SegmentationUNetConfig(width=1)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 572, 188)).shape == (1, 2, 388, 4)
    model = SegmentationUNet(PAPER)
    assert [block.conv2.out_channels for block in model.down_blocks] == [64, 128, 256, 512, 1024]
    assert sum(p.numel() for p in model.parameters()) == 31_030_658


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_sides_that_pooling_halves_are_admitted_and_no_others(depth):
    config = SegmentationUNetConfig(width=1, depth=depth)

    def by_steps(side):
        for _ in range(depth):
            side -= 4
            if side <= 0 or side % 2:
                return None
            side //= 2
        side -= 4
        for _ in range(depth):
            side = 2 * side - 4
        return side if side > 0 else None

    admitted = {side: by_steps(side) for side in range(1, 700) if by_steps(side)}
    for side in range(1, 650):
        if side in admitted:
            assert config.output_side(side) == admitted[side]
            continue
        around = [max((s for s in admitted if s < side), default=None), min(s for s in admitted if s > side)]
        with pytest.raises(ValueError, match=" and ".join(str(s) for s in around if s) + "$"):
            config.output_side(side)


def test_tiles_are_refused_with_the_nearest():
    for side in (20, 388, 900):
        PAPER.check_tile(side)
    with pytest.raises(ValueError, match=r"got 380, .* 20 \+ 16 k pixels; .* 372 and 388$"):
        PAPER.check_tile(380)
    with pytest.raises(ValueError, match="the least is 20"):
        PAPER.check_tile(4)  # a result may have 4 pixels, but tiles of 4 would lie beside the pooling's grid


def test_input_of_another_side_is_refused():
    model = SegmentationUNet(SegmentationUNetConfig(width=1, depth=1))
    with pytest.raises(ValueError, match="x: width: got 41 pixels, the nearest that fit are 40 and 42"):
        model(torch.zeros(1, 1, 40, 41))


def test_weights_start_as_he_et_al_say():
    model = SegmentationUNet(SegmentationUNetConfig(width=16, depth=2))
    for name, fan_in in (("down_blocks.2.conv2", 64 * 9), ("up_convs.0", 64), ("up_blocks.0.conv1", 64 * 9)):
        module = model.get_submodule(name)
        deviation = module.weight.std().item()
        # The relative error of n samples' standard deviation is 1/√(2n).
        assert deviation == pytest.approx(math.sqrt(2 / fan_in), rel=4 / math.sqrt(2 * module.weight.numel()))
        assert not module.bias.any()


def test_dropout_is_training_s_alone():
    model = SegmentationUNet(SegmentationUNetConfig(width=4, depth=1))
    x = torch.randn(1, 1, 40, 40)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_saved_and_loaded(tmp_path):
    model = SegmentationUNet(SegmentationUNetConfig(in_channels=3, width=4, depth=2)).eval()
    save_model(model, tmp_path)
    loaded = load_model(SegmentationUNet, tmp_path)
    x = torch.randn(1, 3, 60, 60)
    with torch.no_grad():
        assert loaded.config == model.config and torch.equal(loaded(x), model(x))


def test_checkpoint_of_another_model_is_refused():
    folder = Path(sdfast.__file__).parent / "assets" / "digits" / "vae"
    with pytest.raises(CheckpointError, match="latent_channels=4"):
        load_model(SegmentationUNet, folder)


@pytest.mark.parametrize(
    "setting", [{"width": 0}, {"depth": 0}, {"in_channels": 0}, {"dropout": 1.0}, {"out_channels": 257}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SegmentationUNetConfig(**setting)
