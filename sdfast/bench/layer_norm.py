"""The LayerNorms of Stable Diffusion 1.5. Least traffic: x and y once; with gradients x, dy and dx, too."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, Way, gradients

# (N, L, C): the transformer blocks of the U-Net (64x64 latent, guided batch of 2) and of the text encoder.
SHAPES = ((2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 64, 1280), (2, 77, 768))
# An element's sum, its squared distance from the mean and their sum, its normalisation.
_FLOPS = 6


def make(shape: tuple[int, ...], training: bool, dtype: torch.dtype, device: str) -> Case:
    """The case of x (N, L, C), forward or with `training` forward and backward."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 0.5).to(device, dtype)
    weight, bias = (torch.randn(shape[-1]).to(device, dtype) for _ in range(2))
    leaves = [t.requires_grad_(training) for t in (x, weight, bias)]
    dy = torch.randn_like(x)

    def exact() -> list[Tensor]:
        wide = [t.detach().double().requires_grad_(training) for t in leaves]
        return gradients(F.layer_norm(wide[0], shape[-1:], wide[1], wide[2]), wide, dy.double())

    ways: dict[str, Way] = {
        "eager": lambda: gradients(F.layer_norm(x, shape[-1:], weight, bias), leaves, dy),
        "sdfast": lambda: gradients(ops.layer_norm(x, shape[-1:], weight, bias), leaves, dy),
    }
    size = x.numel() * x.element_size()
    return Case(
        "x".join(map(str, shape)), dtype, ways, exact,
        flops=_FLOPS * x.numel() * (3 if training else 1), nbytes=size * (5 if training else 2), size=size,
        training=training,
    )  # fmt: skip


SPECS = [
    Spec(
        "layer_norm", "training" if training else "U-Net",
        "x".join(map(str, shape)) + (" gradients" if training else ""),
        functools.partial(make, shape, training), quick=not training and shape in (SHAPES[0], SHAPES[2]),
    )
    for training in (False, True)
    for shape in SHAPES
]  # fmt: skip
