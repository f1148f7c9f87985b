"""The reverse step of diffusion at latents of 512x512 and 1024x1024, and of batches.

Eager is the operation's own composite: torch has no such function. The step that draws its noise is beside
torch.randn and the composite; each draws numbers of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec

# (N, C, H, W).
SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (8, 4, 64, 64), (16, 4, 128, 128))
COEFFICIENTS = torch.tensor([1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5], dtype=torch.float64)

Tensors = Sequence[Tensor]
Work = Callable[[Tensors, "str | None"], Sequence[Tensor]]


def guided(t: Tensors, backend: str | None) -> Sequence[Tensor]:
    """DDIM: no noise, no previous x0."""
    return ops.diffusion_step(t[0], t[1], COEFFICIENTS, guidance_scale=7.5, backend=backend)


def full(t: Tensors, backend: str | None) -> Sequence[Tensor]:
    """Every term there is."""
    return ops.diffusion_step(
        t[0], t[1], COEFFICIENTS, guidance_scale=7.5, noise=t[2], previous_x0=t[3], clip=1.0, backend=backend
    )


def drawn(t: Tensors, backend: str | None) -> Sequence[Tensor]:
    """Ancestral sampling: fresh noise, drawn in the same pass."""
    seeds = torch.arange(len(t[0]), device=t[0].device)
    return ops.diffusion_step(
        t[0], t[1], COEFFICIENTS, guidance_scale=7.5, seeds=seeds, step=3, backend=backend
    )


def of_randn(t: Tensors) -> Sequence[Tensor]:
    noise = torch.randn_like(t[0])
    return ops.diffusion_step(t[0], t[1], COEFFICIENTS, guidance_scale=7.5, noise=noise, backend="torch")


# What is done, how often it reads or writes as much as the sample holds, and its operations an element.
WORKS: dict[str, tuple[Work, int, int]] = {
    "guided step": (guided, 5, 9),
    "guided step, every term": (full, 7, 17),
    "guided step, noise drawn": (drawn, 5, 11),  # the generator's integers are not counted
}


def latents(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The sample, a guided model output, noise, and another sample."""
    torch.manual_seed(0)
    return [torch.randn(n * shape[0], *shape[1:]).to(device, dtype) for n in (1, 2, 1, 1)]


def make(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    work, passes, flops = WORKS[name]
    t = latents(shape, dtype, device)
    size = t[0].numel() * dtype.itemsize

    def eager() -> Sequence[Tensor]:
        return of_randn(t) if work is drawn else work(t, "torch")

    return Case(
        "x".join(map(str, shape)), dtype, {"eager": eager, "sdfast": lambda: work(t, None)},
        lambda: work([one.double() for one in t], "torch"), flops=flops * t[0].numel(),
        nbytes=passes * size, size=size, details={"work": name},
        eager_result=(lambda: work(t, "torch")) if work is drawn else None,
    )  # fmt: skip


SPECS = [
    Spec(
        "diffusion_step", "sampling", f"{'x'.join(map(str, shape))} {name}",
        functools.partial(make, name, shape), quick=shape == SHAPES[1],
    )
    for name in WORKS
    for shape in SHAPES
]  # fmt: skip
