"""The GroupNorms of Stable Diffusion 1.5, channels last.

Least traffic: forward x and y once; forward and backward, that and then x, dy and dx. Copy writes to memory
it has; eager and sdfast allocate their result, as in a model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, gradients

# (N, C, H, W), eps and whether SiLU follows: the calls of diffusers' UNet2DConditionModel in its SD 1.5
# configuration (64x64 latent, guided batch of 2) ...
UNET = (
    *((shape, 1e-5, True) for shape in (
        (2, 320, 64, 64), (2, 640, 64, 64), (2, 960, 64, 64),
        (2, 320, 32, 32), (2, 640, 32, 32), (2, 960, 32, 32), (2, 1280, 32, 32), (2, 1920, 32, 32),
        (2, 640, 16, 16), (2, 1280, 16, 16), (2, 1920, 16, 16), (2, 2560, 16, 16),
        (2, 1280, 8, 8), (2, 2560, 8, 8),
    )),
    *((shape, 1e-6, False) for shape in (
        (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8),
    )),
)  # fmt: skip
# ... and of its AutoencoderKL, encoding and decoding 512x512. The last is the attention's.
VAE = (
    *((shape, 1e-6, True) for shape in (
        (1, 128, 512, 512), (1, 256, 512, 512), (1, 128, 256, 256), (1, 256, 256, 256), (1, 512, 256, 256),
        (1, 256, 128, 128), (1, 512, 128, 128), (1, 512, 64, 64),
    )),
    ((1, 512, 64, 64), 1e-6, False),
)  # fmt: skip
TRAINING = tuple((shape, 1e-5, True) for shape in ((2, 320, 64, 64), (2, 1280, 16, 16), (1, 256, 256, 256)))
GROUPS = 32
# An element's sum, its squared distance from the mean and their sum, its normalisation; SiLU.
_FLOPS, _SILU_FLOPS = 6, 4

Setting = tuple[tuple[int, ...], float, bool]


def make(setting: Setting, training: bool, dtype: torch.dtype, device: str) -> Case:
    """The case of a setting ((N, C, H, W), eps, SiLU), forward or with `training` forward and backward."""
    shape, eps, silu = setting
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.5).to(device, dtype).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1]).to(device, dtype) for _ in range(2))
    leaves = [t.requires_grad_(training) for t in (x, weight, bias)]
    dy = torch.randn_like(x)

    def eager() -> list[Tensor]:
        y = F.group_norm(x, GROUPS, weight, bias, eps)
        return gradients(F.silu(y) if silu else y, leaves, dy)

    def ours() -> list[Tensor]:
        activation = "silu" if silu else None
        return gradients(ops.group_norm(x, GROUPS, weight, bias, eps, activation=activation), leaves, dy)

    # A few whole groups of one image decide for all.
    channels = shape[1] // GROUPS
    groups = max(1, min(GROUPS, 2**21 // (channels * shape[2] * shape[3])))
    few = slice(0, groups * channels)

    def exact() -> list[Tensor]:
        images = slice(None) if training else slice(0, 1)  # weight's gradient is a sum over images
        wide = [t.detach().double() for t in (x[images, few], weight[few], bias[few])]
        wide = [t.requires_grad_(training) for t in wide]
        y = F.group_norm(wide[0], groups, wide[1], wide[2], eps)
        return gradients(F.silu(y) if silu else y, wide, dy[images, few].double())

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        if training:
            return [results[0][:, few], results[1][few], results[2][few]]
        return [results[0][:1, few]]

    size = x.numel() * x.element_size()
    flops = (_FLOPS + silu * _SILU_FLOPS) * x.numel()
    return Case(
        "x".join(map(str, shape)), dtype, {"eager": eager, "sdfast": ours}, exact,
        flops=flops * (3 if training else 1), nbytes=size * (5 if training else 2), part=part, size=size,
        training=training, details={"silu": silu},
    )  # fmt: skip


def _spec(model: str, setting: Setting, training: bool, quick: bool) -> Spec:
    shape, _, silu = setting
    name = "x".join(map(str, shape)) + (" SiLU" if silu else "") + (" gradients" if training else "")
    return Spec("group_norm", model, name, functools.partial(make, setting, training), quick)


SPECS = [
    *(_spec("U-Net", setting, False, setting in (UNET[0], UNET[9])) for setting in UNET),
    *(_spec("VAE", setting, False, setting == VAE[3]) for setting in VAE),
    *(_spec("training", setting, True, setting == TRAINING[1]) for setting in TRAINING),
]
