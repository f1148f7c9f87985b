"""diffusion_step in Triton: guidance, clip, update and noise in one pass.

A program takes a run of elements of one sample as they lie in memory: x, both halves of m, x̂₀ᵖ and z are read
once, x' and x̂₀ (and the model's next input) written once, 7 coefficients read by each program. Noise is a
function of seed, step and element (`_philox_triton.py`) and costs no memory: in row-major order a thread
draws four elements from one block. Products and sums are written as fused multiply-adds, so that a compiler
has nothing to choose and the two operations give the same bits.
Bytes: (4 to 7) * N * size elements. Limit: the launch for latents of one image, memory above.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops import _native, _triton
from sdfast.ops._elementwise_triton import config, lie_as, sample_stride, sizes
from sdfast.ops._philox_triton import normals_at, normals_of_row


@triton.jit(do_not_specialize=["step", "steps"])
def _diffusion_step_kernel(
    x_ptr, m_ptr, k_ptr, previous_ptr, noise_ptr, seeds_ptr,
    counter_ptr, scales_ptr, out_ptr, x0_ptr, input_ptr, next_counter_ptr,
    samples, size, x_stride, m_stride, previous_stride, noise_stride, out_stride, input_stride,
    guidance_scale, clip, step, steps,
    middle, inner, index_outer, index_middle, index_inner,
    GUIDED: tl.constexpr, CLIPPED: tl.constexpr, IN_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x', x̂₀ and, with `input_ptr`, the model's next input.

    With `counter_ptr` the step is what it holds, and `k_ptr` a table of `steps` rows. Unless IN_ROWS, element
    (a * middle + b) * inner + c in memory is a * index_outer + b * index_middle + c * index_inner in
    row-major order.
    """
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    first = program % blocks * BLOCK
    at = first + tl.arange(0, BLOCK)
    mask = at < size

    step = step.to(tl.int64)
    if counter_ptr is not None:
        step = tl.load(counter_ptr)
        k_ptr += 7 * tl.minimum(step, steps.to(tl.int64) - 1)
        if program == 0:
            tl.store(next_counter_ptr, step + 1)
    k0 = tl.load(k_ptr).to(tl.float32)
    k1 = tl.load(k_ptr + 1).to(tl.float32)
    k2 = tl.load(k_ptr + 2).to(tl.float32)
    k3 = tl.load(k_ptr + 3).to(tl.float32)
    k4 = tl.load(k_ptr + 4).to(tl.float32)

    x = tl.load(x_ptr + n * x_stride + at, mask, 0.0).to(tl.float32)
    m = tl.load(m_ptr + n * m_stride + at, mask, 0.0).to(tl.float32)
    if GUIDED:
        conditional = tl.load(m_ptr + (n + samples) * m_stride + at, mask, 0.0).to(tl.float32)
        m = tl.fma(tl.zeros_like(m) + guidance_scale, conditional - m, m)
    zero = tl.zeros_like(x)
    x0 = tl.fma(zero + k1, m, k0 * x)
    if CLIPPED:
        x0 = tl.minimum(x0, zero + clip, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.maximum(x0, zero - clip, propagate_nan=tl.PropagateNan.ALL)
    out = tl.fma(zero + k4, m, tl.fma(zero + k3, x, k2 * x0))
    if previous_ptr is not None:
        previous = tl.load(previous_ptr + n * previous_stride + at, mask, 0.0).to(tl.float32)
        out = tl.fma(zero + tl.load(k_ptr + 5).to(tl.float32), previous, out)
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + n)
        if IN_ROWS:
            z = normals_of_row(seed, first, step, BLOCK)
        else:
            rest = at // inner
            element = rest // middle * index_outer + rest % middle * index_middle + at % inner * index_inner
            z = normals_at(seed, element, step)
        out = tl.fma(zero + tl.load(k_ptr + 6).to(tl.float32), z, out)
    if noise_ptr is not None:
        z = tl.load(noise_ptr + n * noise_stride + at, mask, 0.0).to(tl.float32)
        out = tl.fma(zero + tl.load(k_ptr + 6).to(tl.float32), z, out)

    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * out_stride + at, rounded, mask)
    tl.store(x0_ptr + n * out_stride + at, x0.to(x0_ptr.dtype.element_ty), mask)
    if input_ptr is not None:
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + step + 1, step + 1 < steps.to(tl.int64), 1.0).to(tl.float32)
            rounded = (rounded.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
        tl.store(input_ptr + n * input_stride + at, rounded, mask)
        if GUIDED:
            tl.store(input_ptr + (n + samples) * input_stride + at, rounded, mask)


def _places(out: Tensor) -> tuple[int, ...] | None:
    """The kernel's middle to index_inner, or None where memory's order is no permutation of three axes."""
    axes: list[list[int]] = []  # size and row-major stride, from memory's outermost to its innermost
    in_memory = [axis for axis in range(1, out.dim()) if out.shape[axis] > 1]
    for axis in sorted(in_memory, key=out.stride, reverse=True):
        size, index = out.shape[axis], math.prod(out.shape[axis + 1 :])
        if axes and axes[-1][1] == index * size:
            axes[-1] = [axes[-1][0] * size, index]
        else:
            axes.append([size, index])
    if len(axes) > 3:
        return None
    axes = [[1, 0]] * (3 - len(axes)) + axes
    return axes[1][0], axes[2][0], axes[0][1], axes[1][1], axes[2][1]


def _step(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, guidance_scale: float | None,
    previous_x0: Tensor | None, noise: Tensor | None, clip: float | None, seeds: Tensor | None, step: int,
    counter: Tensor | None = None, input_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = _native.empty_by_sample(sample)
    places = _places(wanted)
    # Noise cannot be placed in such a layout; no model has latents of five axes in disorder.
    out = wanted if places is not None or seeds is None else torch.empty_like(
        wanted, memory_format=torch.contiguous_format
    )  # fmt: skip
    places = places if out is wanted and places is not None else (1, 1, 0, 0, 1)
    x0, x, m = torch.empty_like(out), lie_as(sample, out), lie_as(model_output, out)
    if out.shape[0] <= 1 or x0.stride() != out.stride():
        x0 = out.new_empty_strided(out.shape, out.stride())
    previous = None if previous_x0 is None else lie_as(previous_x0, out)
    z = None if noise is None else lie_as(noise, out)
    device = sample.device
    # A transfer waits for nothing where it comes from pinned memory; a table on the device costs none.
    k = coefficients.to(device, non_blocking=True).contiguous()
    drawn = None if seeds is None else seeds.to(device, non_blocking=True).contiguous()
    following, next_counter = None, None
    if counter is not None:
        batch = model_output.shape[0]
        following = out.new_empty_strided((batch, *out.shape[1:]), (sizes(out)[1], *out.stride()[1:]))
        next_counter = torch.empty_like(counter)
    samples, size = sizes(out)
    grid, launch_config = config(samples, size, device)
    _triton.launch(
        _diffusion_step_kernel, grid, x, m, k, previous, z, drawn,
        counter, input_scale if input_scale is None else input_scale.contiguous(), out, x0, following,
        next_counter, samples, size, sample_stride(x), sample_stride(m),
        0 if previous is None else sample_stride(previous), 0 if z is None else sample_stride(z),
        sample_stride(out), 0 if following is None else sample_stride(following),
        0.0 if guidance_scale is None else float(guidance_scale), 0.0 if clip is None else float(clip),
        step, 1 if counter is None else coefficients.shape[0], *places,
        config=launch_config, GUIDED=guidance_scale is not None, CLIPPED=clip is not None,
        IN_ROWS=size == 1 or places[2:] == (0, 0, 1),
    )  # fmt: skip
    if out is not wanted:
        out, x0 = wanted.copy_(out), torch.empty_like(wanted).copy_(x0)
    if following is None or next_counter is None:
        return out, x0
    return out, x0, following, next_counter


def diffusion_step(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, *, guidance_scale: float | None = None,
    previous_x0: Tensor | None = None, noise: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, step: int = 0,
) -> Any:  # fmt: skip
    """sdfast::diffusion_step."""
    return _step(sample, model_output, coefficients, guidance_scale, previous_x0, noise, clip, seeds, step)
