"""The matrix products of Stable Diffusion 1.5's U-Net.

Least traffic: x, weight, residual and y once; with gradients then x, weight, dy and two gradients, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, Way, gradients, split_limit
from sdfast.ops.linear import linear_torch

# 64x64 latent, guided batch of 2: tokens and channels of each level ...
LEVELS = ((8192, 320), (2048, 640), (512, 1280), (128, 1280))
# ... and tokens, outputs, inputs, activation and whether a residual is added.
SETTINGS = (
    *((tokens, width, width, None, residual) for tokens, width in LEVELS for residual in (False, True)),
    *((tokens, 8 * width, width, "geglu", False) for tokens, width in LEVELS),
    *((tokens, width, 4 * width, None, True) for tokens, width in LEVELS),
    (154, 320, 768, None, False), (154, 1280, 768, None, False),  # the text's keys and values
    (2, 1280, 1280, None, False),  # the time embedding
)  # fmt: skip
# A training step at a 32x32 latent, batch 2.
TRAINING = (
    (2048, 320, 320, None, False), (512, 640, 640, None, False), (128, 1280, 1280, None, False),
    (2048, 2560, 320, "geglu", False), (512, 5120, 640, "geglu", False), (128, 10240, 1280, "geglu", False),
    (2048, 320, 1280, None, False), (128, 1280, 5120, None, False),
    (154, 320, 768, None, False), (154, 1280, 768, None, False),
)  # fmt: skip

Setting = tuple[int, int, int, str | None, bool]


def make(setting: Setting, training: bool, dtype: torch.dtype, device: str) -> Case:
    """The case of a setting, forward or with `training` forward and backward."""
    tokens, rows, k, activation, with_residual = setting
    torch.manual_seed(0)
    x = torch.randn(tokens, k).to(device, dtype)
    weight, bias = (torch.randn(rows, k) / k**0.5).to(device, dtype), torch.randn(rows).to(device, dtype)
    residual = torch.randn(tokens, rows).to(device, dtype) if with_residual else None
    leaves = [t.requires_grad_(training) for t in (x, weight, bias)]
    width = rows // (2 if activation == "geglu" else 1)
    dy = torch.randn(tokens, width).to(device, dtype)
    few = slice(0, tokens if training else 64)  # of the tokens decide for all

    def exact() -> list[Tensor]:
        added = None if residual is None else residual[few].double()
        wide = [t.detach().double().requires_grad_(training) for t in (x[few], weight, bias)]
        return gradients(linear_torch(*wide, activation=activation, residual=added), wide, dy.double())

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        return [results[0][few], *results[1:]]

    def eager() -> list[Tensor]:
        return gradients(linear_torch(x, weight, bias, activation=activation, residual=residual), leaves, dy)

    def ours() -> list[Tensor]:
        return gradients(ops.linear(x, weight, bias, activation=activation, residual=residual), leaves, dy)

    ways: dict[str, Way] = {"eager": eager, "sdfast": ours}
    elements = x.numel() + weight.numel() + tokens * width * (2 if with_residual else 1)
    return Case(
        f"{tokens}x{k} to {rows}", dtype, ways, exact, flops=2 * tokens * rows * k * (3 if training else 1),
        nbytes=(elements + training * (2 * elements - tokens * width)) * dtype.itemsize, part=part,
        limit=split_limit(x), training=training,
        details={"activation": activation or "", "residual": with_residual},
    )  # fmt: skip


def _name(setting: Setting, training: bool) -> str:
    tokens, rows, k, activation, residual = setting
    activated = f" {activation}" if activation else ""
    return f"{tokens}x{k} to {rows}" + activated + residual * " residual" + training * " gradients"


SPECS = [
    Spec(
        "linear", "training" if training else "U-Net", _name(setting, training),
        functools.partial(make, setting, training),
        quick=not training and setting in (SETTINGS[2], SETTINGS[10]),
    )
    for training, settings in ((False, SETTINGS), (True, TRAINING))
    for setting in settings
]  # fmt: skip
