"""Noising in training, beside the operation's composite: torch has no such function.

Least traffic: both inputs and the noised sample once, and the velocity.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec
from sdfast.bench.diffusion_step import SHAPES, latents


def make(shape: tuple[int, ...], velocity: bool, dtype: torch.dtype, device: str) -> Case:
    x0, _, noise, _ = latents(shape, dtype, device)
    level = torch.linspace(0.1, 0.9, shape[0], device=device)

    def run(x0: Tensor, noise: Tensor, backend: str | None) -> Sequence[Tensor]:
        prediction = "v_prediction" if velocity else "epsilon"
        both = ops.add_noise(x0, noise, level, level, prediction=prediction, backend=backend)
        return both if velocity else both[:1]  # the target "epsilon" is the noise itself

    ways = {"eager": lambda: run(x0, noise, "torch"), "sdfast": lambda: run(x0, noise, None)}
    size = x0.numel() * dtype.itemsize
    return Case(
        "x".join(map(str, shape)), dtype, ways, lambda: run(x0.double(), noise.double(), "torch"),
        flops=(6 if velocity else 3) * x0.numel(), nbytes=(4 if velocity else 3) * size, size=size,
        details={"work": "add_noise" + velocity * ", velocity"},
    )  # fmt: skip


SPECS = [
    Spec(
        "add_noise", "training", "x".join(map(str, shape)) + velocity * " velocity",
        functools.partial(make, shape, velocity), quick=shape == SHAPES[3],
    )
    for velocity in (False, True)
    for shape in SHAPES
]  # fmt: skip
