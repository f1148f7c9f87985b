"""Drawing a latent, beside the operation's composite: torch has no such function.

Least traffic: mean, log variance, noise and the latent once; with gradients as much again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec
from sdfast.bench.diffusion_step import SHAPES, latents


def make(shape: tuple[int, ...], training: bool, dtype: torch.dtype, device: str) -> Case:
    mean, _, noise, logvar = latents(shape, dtype, device)

    def run(mean: Tensor, logvar: Tensor, noise: Tensor, backend: str | None) -> Sequence[Tensor]:
        mean, logvar = (t.detach().requires_grad_(training) for t in (mean, logvar))
        z = ops.reparameterize(mean, logvar, noise, backend=backend)
        return [z, *torch.autograd.grad(z, (mean, logvar), noise)] if training else [z]

    ways = {
        "eager": lambda: run(mean, logvar, noise, "torch"),
        "sdfast": lambda: run(mean, logvar, noise, None),
    }
    size = mean.numel() * dtype.itemsize
    return Case(
        "x".join(map(str, shape)), dtype, ways,
        lambda: run(mean.double(), logvar.double(), noise.double(), "torch"),
        flops=(8 if training else 5) * mean.numel(), nbytes=(8 if training else 4) * size, size=size,
        training=training, details={"work": "reparameterize" + training * ", gradients"},
    )  # fmt: skip


SPECS = [
    Spec(
        "reparameterize", "VAE", "x".join(map(str, shape)) + training * " gradients",
        functools.partial(make, shape, training), quick=shape == SHAPES[3] and not training,
    )
    for training in (False, True)
    for shape in SHAPES
]  # fmt: skip
