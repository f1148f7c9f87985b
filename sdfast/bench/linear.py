"""The matrix products of Stable Diffusion 1.5's U-Net. Least traffic: x, weight, residual and y once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, Way
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

Setting = tuple[int, int, int, str | None, bool]


def make(setting: Setting, dtype: torch.dtype, device: str) -> Case:
    tokens, rows, k, activation, with_residual = setting
    torch.manual_seed(0)
    x = torch.randn(tokens, k).to(device, dtype)
    weight, bias = (torch.randn(rows, k) / k**0.5).to(device, dtype), torch.randn(rows).to(device, dtype)
    residual = torch.randn(tokens, rows).to(device, dtype) if with_residual else None
    few = slice(0, 64)  # of the tokens decide for all

    def exact() -> list[Tensor]:
        added = None if residual is None else residual[few].double()
        wide = (x[few].double(), weight.double(), bias.double())
        return [linear_torch(*wide, activation=activation, residual=added)]

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        return [results[0][few]]

    ways: dict[str, Way] = {
        "eager": lambda: [linear_torch(x, weight, bias, activation=activation, residual=residual)],
        "sdfast": lambda: [ops.linear(x, weight, bias, activation=activation, residual=residual)],
    }
    results = tokens * rows // (2 if activation == "geglu" else 1)
    elements = x.numel() + weight.numel() + results * (2 if with_residual else 1)
    return Case(
        f"{tokens}x{k} to {rows}", dtype, ways, exact, flops=2 * tokens * rows * k,
        nbytes=elements * dtype.itemsize, part=part,
        details={"activation": activation or "", "residual": with_residual},
    )  # fmt: skip


def _name(setting: Setting) -> str:
    tokens, rows, k, activation, residual = setting
    return f"{tokens}x{k} to {rows}" + (f" {activation}" if activation else "") + residual * " residual"


SPECS = [
    Spec(
        "linear", "U-Net", _name(setting), functools.partial(make, setting),
        quick=setting in (SETTINGS[2], SETTINGS[10]),
    )
    for setting in SETTINGS
]  # fmt: skip
