"""The sampling loop on the device alone: one step of tensors, repeated.

    state = latents, x̂_0, the model's next input, counter          constants = tables, seeds, conditioning
    state = step(state, constants), n times

A step finds its timestep, its coefficients and its noise by a counter that it advances itself. It reads
nothing on the host and takes nothing from it, so that one CUDA graph of a step, replayed n times, is the loop
(`repeat=`), where `sample` would launch some hundred kernels a step from Python. The latents are those of
`sample`, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sdfast.diffusion.plan import SamplingPlan
from sdfast.ops import diffusion_step_from_table
from sdfast.ops._checks import check_optional, check_tensor
from sdfast.ops._native import empty_by_sample
from sdfast.ops.diffusion_step import check_seeds

# Tables have a multiple of so many rows, so that one graph serves different numbers of steps.
_ROWS = 64


class Timesteps(Protocol):
    """What a model made of n timesteps, such as a U-Net's `encode_time`. A pytree of tensors, (n, ...)."""

    def __len__(self) -> int: ...

    def at(self, step: Tensor) -> object:
        """What the denoiser takes at `step`, (), int64, on the device."""


class LoopState(NamedTuple):
    """What a step changes.

    Attributes:
        latents: (N, ...).
        x0: x̂_0 of the step before, (N, ...); None where no step of the plan takes it.
        model_input: what the denoiser is fed, (N, ...), or with guidance (2N, ...).
        counter: the step, (), int64.
    """

    latents: Tensor
    x0: Tensor | None
    model_input: Tensor
    counter: Tensor


class LoopConstants(NamedTuple):
    """What all steps share, on the device; R >= n rows, those after the last step repeat it.

    Attributes:
        coefficients: (R, 7), float64.
        input_scale: (R,), float64.
        guidance_scale: (R,), float64, or None.
        seeds: (N,), int64, or None.
        noise: (R, N, ...), or None.
        timesteps: (R,), or what has R of them.
        conditioning: what the denoiser takes besides.
    """

    coefficients: Tensor
    input_scale: Tensor
    guidance_scale: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    timesteps: Tensor | Timesteps
    conditioning: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class LoopStep:
    """A step; two of the same denoiser and clip are equal, and may share a graph."""

    denoiser: Callable[..., Tensor]
    clip: float | None

    def __call__(self, state: LoopState, constants: LoopConstants) -> LoopState:
        timestep = _at(constants.timesteps, state.counter)
        model_output = self.denoiser(state.model_input, timestep, *constants.conditioning)
        latents, x0, model_input, counter = diffusion_step_from_table(
            state.latents,
            model_output.to(state.latents.dtype),
            constants.coefficients,
            constants.input_scale,
            state.counter,
            guidance_scale=constants.guidance_scale,
            previous_x0=state.x0,
            clip=self.clip,
            seeds=constants.seeds,
            noise=constants.noise,
        )
        return LoopState(latents, None if state.x0 is None else x0, model_input, counter)


Observe = Callable[[int, LoopState], None]


def repeat_step(
    step: Callable[[LoopState, LoopConstants], LoopState],
    times: int,
    state: LoopState,
    constants: LoopConstants,
    observe: Observe | None = None,
) -> LoopState:
    """The step so many times in a row; `observe` sees the state after each."""
    for i in range(times):
        state = step(state, constants)
        if observe is not None:
            observe(i, state)
    return state


@torch.no_grad()
def sample_on_device(
    plan: SamplingPlan,
    denoiser: Callable[..., Tensor],
    latents: Tensor,
    *,
    conditioning: Sequence[Any] = (),
    timesteps: Timesteps | None = None,
    guidance_scale: float | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    repeat: Callable[..., LoopState] = repeat_step,
) -> Tensor:
    """Run a plan as `sample` does, by steps of which the device alone knows the number.

    Args:
        plan: from a function of `sdfast.diffusion.samplers`.
        denoiser: (x, timestep, *conditioning) -> model output, without reading a tensor's values on the host.
            x is (N, ...), already scaled; with guidance (2N, ...), the latents twice, and so is the output,
            the unconditional half first. The timestep is a scalar, int64 or float32, or of `timesteps`.
        latents: where to start, (N, ...), as for `sample`.
        conditioning: tensors, or pytrees of them, that the denoiser takes besides.
        timesteps: n of what the denoiser takes instead of the plan's timesteps (`encode_time`).
        guidance_scale: weight of classifier-free guidance, or None for an output without guidance.
        seeds: what the noise of each sample is drawn from, (N,), int64. A plan that draws noise needs them or
        noise: of each step, (n, N, ...), like `latents`; rows of steps that draw none are not added.
        on_step: called as (i, n, latents) after step i of n, with a copy of the latents. It cannot replace
            them, as that of `sample` can.
        repeat: runs the steps, called as `repeat_step` is: a function that captures the step in a graph.

    Returns:
        (N, ...) in the dtype of `latents`.

    Raises:
        ValueError, TypeError: an argument or what a callback returned has a wrong shape, dtype or value.
    """
    check_tensor("latents", latents)
    n, device = len(plan), latents.device
    draws_noise = bool(plan.draws_noise.any())
    if draws_noise and seeds is None and noise is None:
        raise ValueError("seeds: got None, expected (N,) or noise, as this plan draws some")
    if seeds is not None and noise is not None:
        raise ValueError("seeds: got them beside noise, expected one of the two")
    check_optional("noise", noise, shape=(n, *latents.shape), like=latents)
    if seeds is not None:
        check_seeds(seeds, latents)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number or None")
    if timesteps is not None and len(timesteps) != n:
        raise ValueError(f"timesteps: got {len(timesteps)}, expected {n}, one for each step")
    observe: Observe | None = None
    if on_step is not None:

        def observe(i: int, state: LoopState) -> None:
            if on_step(i, n, state.latents.clone()) is not None:
                raise ValueError("on_step: returned something, expected None; `sample` takes other latents")

    dtype = torch.float32 if plan.timesteps.is_floating_point() else torch.int64
    coefficients = plan.coefficients.clone()
    coefficients[~plan.draws_noise, 6] = 0
    guidance = None if guidance_scale is None else torch.full((n,), guidance_scale, dtype=torch.float64)
    tables = (coefficients, plan.input_scale, guidance, plan.timesteps.to(dtype))
    tables = pytree.tree_map_only(Tensor, lambda t: _padded(t).to(device), tables)
    if timesteps is not None:
        timesteps = pytree.tree_map_only(Tensor, _padded, timesteps)
    constants = LoopConstants(
        coefficients=tables[0],
        input_scale=tables[1],
        guidance_scale=tables[2],
        seeds=seeds.to(device) if seeds is not None and draws_noise else None,
        noise=_padded(_lying_as(noise, latents)) if noise is not None and draws_noise else None,
        timesteps=tables[3] if timesteps is None else timesteps,
        conditioning=tuple(conditioning),
    )
    scale = float(plan.input_scale[0])
    x = latents if scale == 1 else latents * scale
    state = LoopState(
        latents=latents,
        x0=torch.zeros_like(latents) if plan.takes_previous_x0 else None,
        model_input=x if guidance_scale is None else torch.cat([x, x]),
        counter=torch.zeros((), dtype=torch.int64, device=device),
    )
    return repeat(LoopStep(denoiser, plan.clip), n, state, constants, observe).latents


def _padded(table: Tensor) -> Tensor:
    """(n, ...) -> (R, ...): its last row repeated up to a multiple of `_ROWS`."""
    missing = -len(table) % _ROWS
    return torch.cat([table, table[-1:].expand(missing, *table.shape[1:])])


def _lying_as(noise: Tensor, latents: Tensor) -> Tensor:
    """Each row of the noise in the layout of the latents, in which a kernel reads it in place."""
    like = empty_by_sample(latents, len(noise))
    return like.copy_(noise.flatten(0, 1)).unflatten(0, noise.shape[:2])


def _at(timesteps: Tensor | Timesteps, step: Tensor) -> object:
    if isinstance(timesteps, Tensor):
        return timesteps.index_select(0, step[None])[0]
    return timesteps.at(step)
