"""diffusion_step: guidance and one reverse step x_t -> x_{t-1} of any linear sampler.

    m  = u + g (c - u)                              Ho & Salimans 2022, "Classifier-free guidance", eq. 6
    x̂₀ = clamp(k₀ x + k₁ m, ±clip)                  eq. 15 solved for x₀
    x' = k₂ x̂₀ + k₃ x + k₄ m + k₅ x̂₀ᵖ + k₆ z        eq. 22 and its relatives (DDIM, Euler, DPM-Solver++ 2M)

x is the sample x_t, m the model's output, x̂₀ᵖ the x̂₀ of the step before, z the step's noise. A sampler is a
table of the seven k, one row a step (`sdfast.diffusion.samplers`), so that one kernel serves them all.
The arithmetic is fp32 whatever the dtype of the latents (fp64 for fp64); each result is rounded once.

z is given, or drawn from a seed for each sample and the number of the step, as a function of these and of
the element's place in its sample alone (`_philox.py` defines it). It is rounded to the arithmetic's fp32,
never to half precision; kernels are within 2 units in the last place of fp32 of the definition.

The kernels, one pass over memory, are csrc/diffusion_step_cpu.cpp, csrc/diffusion_step_cuda.cuh and
diffusion_step_triton.py. They have no gradient: sampling takes none, and where one is asked for, torch
serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_optional, check_tensor
from sdfast.ops._philox import philox_normals


def diffusion_step_torch(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, *,
    guidance_scale: float | Tensor | None = None,
    previous_x0: Tensor | None = None, noise: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, step: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula, in fp32 or fp64. `diffusion_step_from_table` gives guidance and step as tensors, ()."""
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    k = coefficients.to(wide).unbind()
    x, m = sample.to(wide), model_output.to(wide)
    if guidance_scale is not None:
        unconditional, conditional = m.chunk(2)
        m = unconditional + guidance_scale * (conditional - unconditional)
    x0 = k[0] * x + k[1] * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    previous = k[2] * x0 + k[3] * x + k[4] * m
    if previous_x0 is not None:
        previous = previous + k[5] * previous_x0.to(wide)
    if seeds is not None:
        noise = philox_normals(seeds.to(x.device), x.shape, step)
    if noise is not None:
        previous = previous + k[6] * noise.to(wide)
    return previous.to(sample.dtype), x0.to(sample.dtype)


# The composite widens by itself, so it is the reference as well.
diffusion_step_reference = diffusion_step_torch


def _fake(sample: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _native.empty_by_sample(sample), _native.empty_by_sample(sample)


_library.define_native(
    "diffusion_step(Tensor sample, Tensor model_output, Tensor coefficients, *, float? guidance_scale=None, "
    "Tensor? previous_x0=None, Tensor? noise=None, float? clip=None, Tensor? seeds=None, SymInt step=0) "
    "-> (Tensor, Tensor)",
    _fake,
)
_diffusion_step_triton = _library.define_triton("diffusion_step", "sdfast.ops.diffusion_step_triton")
_diffusion_step_cuda = _library.define_cuda("diffusion_step")

# Looked up once: a step of small latents takes microseconds.
_diffusion_step_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.sdfast.diffusion_step.default
_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": _diffusion_step_op,
    "triton": _diffusion_step_triton,
    "cuda": _diffusion_step_cuda,
}


def _check_step(step: object) -> None:
    if not isinstance(step, int):
        raise TypeError(f"step: got {type(step).__name__}, expected an int")
    if not 0 <= step < 2**63:
        raise ValueError(f"step: got {step}, expected a number from 0 to 2^63 - 1")


def check_model_output(sample: object, model_output: object, *, guided: bool) -> None:
    """Raise TypeError or ValueError unless they are (N, ...) and its model output, one or two for each."""
    check_tensor("sample", sample)
    assert isinstance(sample, Tensor)
    if sample.dim() == 0:
        raise ValueError("sample: got a scalar, expected shape (N, ...)")
    batch = len(sample) * (1 + guided)
    check_tensor("model_output", model_output, shape=(batch, *sample.shape[1:]), like=sample)


def check_seeds(seeds: object, sample: Tensor) -> None:
    """Raise TypeError or ValueError unless they are (N,), int64; any device."""
    if not isinstance(seeds, Tensor):
        raise TypeError(f"seeds: got {type(seeds).__name__}, expected a torch.Tensor")
    if seeds.dtype is not torch.int64:
        raise TypeError(f"seeds: got dtype {seeds.dtype}, expected torch.int64")
    if tuple(seeds.shape) != (len(sample),):
        raise ValueError(f"seeds: got shape {tuple(seeds.shape)}, expected ({len(sample)},)")


def check_clip(clip: float | None) -> None:
    """Raise ValueError unless it is positive or None."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}, expected a positive number or None")


def _check_near(name: str, t: Tensor, sample: Tensor) -> None:
    if t.device.type != "cpu" and t.device != sample.device:
        raise ValueError(f"{name}: is on {t.device}, expected the CPU or {sample.device}")


def diffusion_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    guidance_scale: float | None = None,
    previous_x0: Tensor | None = None,
    noise: Tensor | None = None,
    clip: float | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step, with classifier-free guidance in front of it.

    Args:
        sample: x_t, (N, ...), fp32, bf16, fp16 or fp64, any strides.
        model_output: m, same dtype: (N, ...), or with guidance (2N, ...), the unconditional half first.
        coefficients: k₀ to k₆, (7,), fp32 or fp64, on the CPU or on the device of `sample`: a row of
            `SamplingPlan.coefficients`.
        guidance_scale: g, or None for an output without guidance.
        previous_x0: x̂₀ of the step before, (N, ...), same dtype; None leaves its term out.
        noise: z, (N, ...), same dtype; None leaves its term out.
        clip: bound of |x̂₀|, > 0, or None.
        seeds: what z is drawn from instead of `noise`, one for each sample, (N,), int64, on the CPU or on the
            device of `sample`. The same seed and step draw the same z for a sample, whatever its batch and
            its layout in memory.
        step: what else z is drawn from, 0 to 2^63 - 1; not looked at without `seeds`.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        x' and x̂₀, each (N, ...) in the dtype of `sample`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_model_output(sample, model_output, guided=guidance_scale is not None)
    check_tensor("coefficients", coefficients, shape=(7,))
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"coefficients: got dtype {coefficients.dtype}, expected float32 or float64")
    _check_near("coefficients", coefficients, sample)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number or None")
    shape = tuple(sample.shape)
    check_optional("previous_x0", previous_x0, shape=shape, like=sample)
    check_optional("noise", noise, shape=shape, like=sample)
    check_clip(clip)
    drawn: dict[str, Any] = {}  # without seeds nothing is passed: a step of small latents takes microseconds
    if seeds is not None:
        _check_step(step)
        if noise is not None:
            raise ValueError("seeds: got them beside noise, expected one of the two")
        check_seeds(seeds, sample)
        _check_near("seeds", seeds, sample)
        drawn = {"seeds": seeds, "step": step}
    device_type = sample.device.type
    unavailable = _native.unavailable(
        "diffusion_step", "sample", device_type, sample.dtype,
        needs_gradient=_native.requires_grad(sample, model_output, coefficients, previous_x0, noise),
    )  # fmt: skip
    serve = dispatch.choose("diffusion_step", device_type, unavailable, backend)
    run = _BACKENDS.get(serve, diffusion_step_torch)
    return run(
        sample, model_output, coefficients, guidance_scale=guidance_scale,
        previous_x0=previous_x0, noise=noise, clip=clip, **drawn,
    )  # fmt: skip
