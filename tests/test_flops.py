"""What FlopCounterMode counts of our kernels is what it counts of torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sdfast
import sdfast.flops
from sdfast import _library

needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("linear_rows", "cpu"), reason="needs the CPU kernels"
)


@pytest.fixture
def net() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=48,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def count(net: torch.nn.Module, train: bool) -> FlopCounterMode:
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 48)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(train),
    ):
        y = net(x, torch.tensor(5), text).sample
        if train:
            y.square().mean().backward()
    return counter


def of_kernels(counter: FlopCounterMode, name: str) -> int:
    """Of our operations whose names begin so: which of them serve depends on the machine."""
    counted = counter.get_flop_counts()["Global"].items()
    return sum(flops for op, flops in counted if str(op).startswith(f"sdfast.{name}"))


@needs_kernel
def test_a_unet_has_the_flops_of_eager(net: torch.nn.Module) -> None:
    expected = count(net, train=False).get_total_flops()
    sdfast.optimize(net)
    counter = count(net, train=False)
    for name in ("linear", "conv2d", "attention"):
        assert of_kernels(counter, name) > 0, name
    assert counter.get_total_flops() == expected


@needs_kernel
def test_training_has_the_flops_of_eager_and_the_scores_again(net: torch.nn.Module) -> None:
    expected = count(net, train=True).get_total_flops()
    sdfast.optimize(net, mode="training")
    counter = count(net, train=True)
    attention = of_kernels(counter, "attention")  # four parts of the forward, ten of the gradient
    assert attention > 0 and counter.get_total_flops() == expected + attention // 7


def test_gpu_kernels_have_the_flops_of_eager() -> None:
    """Their shapes alone: fake tensors. A folded upsample counts as the 3x3 kernel, `skip` as more channels."""
    from torch._subclasses import FakeTensorMode

    def conv(op: torch._ops.OpOverloadPacket, *weight: int, upsample: bool, skip: bool) -> int:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            x, w = torch.empty(2, 16, 8, 6), torch.empty(weight)
            other = torch.empty(2, 8, 8, 6) if skip else None
            extra = (32, 1e-5) if "statistics" in str(op) else ()
            op(x, w, None, 1, [1, 1, 1, 1], upsample, None, None, other, [], False, *extra)
        return counter.get_total_flops()

    for library in ("cuda", "triton"):
        for kind in ("kernel", "statistics"):
            op = getattr(torch.ops.sdfast, f"conv2d_{kind}_{library}")
            pixels = 2 * 8 * 6
            assert conv(op, 32, 24, 3, 3, upsample=False, skip=True) == 2 * pixels * 32 * 24 * 9
            folded = (4, 32, 2, 2, 16) if library == "cuda" else (32, 16, 3, 3)
            assert conv(op, *folded, upsample=True, skip=False) == 2 * 4 * pixels * 32 * 16 * 9
