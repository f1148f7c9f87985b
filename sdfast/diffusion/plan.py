"""A sampler as data: what to feed the model at each step, and the coefficients of the step that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdfast.ops import add_noise, diffusion_step
from sdfast.ops._checks import check_tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Everything a sampler knows before it starts, n steps of it. All tensors are on the CPU.

    Attributes:
        timesteps: what the model is fed, (n,), descending; int64, or float64 where steps may be fractional.
        input_scale: factor of the latents at the model's input, (n,), float64 (1 but for the Euler samplers).
        coefficients: k of `sdfast.ops.diffusion_step`, (n, 7), float64.
        draws_noise: whether a step takes fresh noise, (n,), bool. It is where diffusers draws, even if the
            coefficient is 0, so that one generator gives the same picture in both.
        initial_sigma: standard deviation of the noise that sampling from nothing starts with.
        noise_alpha, noise_sigma: x = noise_alpha x_0 + noise_sigma ε is x_0 noised to the level at which a
            step begins, (n,), float64: row 0 for image-to-image, row i + 1 for inpainting after step i.
        clip: bound of the predicted |x_0|, or None.
    """

    timesteps: Tensor
    input_scale: Tensor
    coefficients: Tensor
    draws_noise: Tensor
    initial_sigma: float
    noise_alpha: Tensor
    noise_sigma: Tensor
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def takes_previous_x0(self) -> bool:
        """Whether a step reads the x̂_0 of the one before."""
        return bool(self.coefficients[:, 5].any())

    def add_noise(self, x0: Tensor, noise: Tensor, step: int = 0) -> Tensor:
        """`x0` noised to the level at which `step` begins; `step` = n leaves it clean.

        Args:
            x0, noise: (N, ...), the same dtype.
            step: 0 to n.

        Returns:
            (N, ...) in the dtype of `x0`.
        """
        if not 0 <= step <= len(self):
            raise ValueError(f"step: got {step}, expected 0 to {len(self)}")
        if step == len(self):
            return x0
        check_tensor("x0", x0)
        alpha, sigma = (
            c[step].to(x0.device).expand(x0.shape[:1]) for c in (self.noise_alpha, self.noise_sigma)
        )
        return add_noise(x0, noise, alpha, sigma)[0]


@torch.no_grad()
def sample(
    plan: SamplingPlan,
    denoiser: Callable[[Tensor, Any], Tensor],
    latents: Tensor,
    *,
    timesteps: Sequence[object] | None = None,
    guidance_scale: float | None = None,
    draw_noise: Callable[[Tensor], Tensor] | None = None,
    seeds: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Run a plan: Algorithm 2, for any sampler.

    Args:
        plan: from a function of `sdfast.diffusion.samplers`.
        denoiser: (x, timestep) -> model output. x is (N, ...), already scaled; timestep a scalar, int64 or
            float32, on the device of the latents. Returns (N, ...), or with guidance (2N, ...), the
            unconditional half first: the denoiser itself duplicates its batch.
        latents: where to start, (N, ...), fp32, bf16, fp16 or fp64: noise times `plan.initial_sigma`, or
            `plan.add_noise(x0, noise)`.
        timesteps: n of what the denoiser takes instead of the plan's timesteps, such as what a U-Net made of
            them (`encode_time`).
        guidance_scale: weight of classifier-free guidance, or None for an output without guidance.
        draw_noise: latents -> standard normal noise of the same shape, dtype and device; called once in each
            step that `plan.draws_noise`. None: `torch.randn_like`.
        seeds: instead of `draw_noise`, what `diffusion_step` draws each sample's noise from in its own pass,
            (N,), int64: the noise of a sample does not depend on the others in its batch.
        on_step: called as (i, n, latents) after step i of n. A tensor that it returns replaces the latents
            (inpainting puts the known part back); None keeps them.

    Returns:
        (N, ...) in the dtype of `latents`; the arithmetic between model calls is fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument or what a callback returned has a wrong shape, dtype or value.
    """
    check_tensor("latents", latents)
    if seeds is not None and draw_noise is not None:
        raise ValueError("seeds: got them beside draw_noise, expected one of the two")
    draw_noise = draw_noise or torch.randn_like
    if timesteps is None:
        dtype = torch.float32 if plan.timesteps.is_floating_point() else torch.int64
        timesteps = plan.timesteps.to(latents.device, dtype).unbind()
    elif len(timesteps) != len(plan):
        raise ValueError(f"timesteps: got {len(timesteps)}, expected {len(plan)}, one for each step")
    # Read once as Python numbers: nothing in the loop waits for the device.
    input_scale, draws_noise = plan.input_scale.tolist(), plan.draws_noise.tolist()
    x0: Tensor | None = None
    takes_x0 = plan.takes_previous_x0
    for i in range(len(plan)):
        x = latents if input_scale[i] == 1 else latents * input_scale[i]
        latents, x0 = diffusion_step(
            latents,
            denoiser(x, timesteps[i]).to(latents.dtype),
            plan.coefficients[i],
            guidance_scale=guidance_scale,
            previous_x0=x0 if takes_x0 else None,
            noise=draw_noise(latents) if draws_noise[i] and seeds is None else None,
            clip=plan.clip,
            seeds=seeds if draws_noise[i] else None,
            step=i,
        )
        if on_step is not None:
            replacement = on_step(i, len(plan), latents)
            latents = latents if replacement is None else replacement
    return latents
