"""diffusion_step in Triton: guidance, clip, update and noise in one pass.

A program takes a run of elements of one sample as they lie in memory: x, both halves of m, x̂₀ᵖ and z are read
once, x' and x̂₀ (from a table the model's next input, too) written once, 7 coefficients read by each program.
Noise is a function of seed, step and element (`_philox_triton.py`) and costs no memory: in row-major order a
thread draws four elements from one block. Products and sums of the step are fused multiply-adds, so that a
compiler has nothing to choose there; in the noise's polynomials it may fuse as it likes, within 2 units.
Bytes: (4 to 8) * N * size elements. Limit: the launch for latents of one image, memory above.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops import _native, _triton
from sdfast.ops._elementwise_triton import config, lie_as, lies_as, sample_stride, sizes
from sdfast.ops._philox_triton import normals_at, normals_of_row

# Numbers by which nothing is compiled. Strides and `size` are not among them: vectors need their divisors.
_SIZES = ("samples", "middle", "inner", "index_outer", "index_middle", "index_inner")


@triton.jit
def _step(
    x_ptr, m_ptr, k_ptr, previous_ptr, noise_ptr, seeds_ptr,
    samples, n, first, size, x_stride, m_stride, previous_stride, noise_stride, noise_row,
    guidance_scale, clip, step,
    middle, inner, index_outer, index_middle, index_inner,
    GUIDED: tl.constexpr, CLIPPED: tl.constexpr, IN_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' and x̂₀, fp32, of elements `first` to first + BLOCK - 1 of sample n.

    Unless IN_ROWS, element (a * middle + b) * inner + c in memory is
    a * index_outer + b * index_middle + c * index_inner in row-major order.
    """
    at = first + tl.arange(0, BLOCK)
    mask = at < size
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
        z = tl.load(noise_ptr + noise_row + n * noise_stride + at, mask, 0.0).to(tl.float32)
        out = tl.fma(zero + tl.load(k_ptr + 6).to(tl.float32), z, out)
    return out, x0


@triton.jit(do_not_specialize=[*_SIZES, "step"])
def _diffusion_step_kernel(
    x_ptr, m_ptr, k_ptr, previous_ptr, noise_ptr, seeds_ptr, out_ptr, x0_ptr,
    samples, size, x_stride, m_stride, previous_stride, noise_stride, out_stride,
    guidance_scale, clip, step,
    middle, inner, index_outer, index_middle, index_inner,
    GUIDED: tl.constexpr, CLIPPED: tl.constexpr, IN_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' and x̂₀ of the step that the host says."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    first = program % blocks * BLOCK
    out, x0 = _step(
        x_ptr, m_ptr, k_ptr, previous_ptr, noise_ptr, seeds_ptr,
        samples, n, first, size, x_stride, m_stride, previous_stride, noise_stride, 0,
        guidance_scale, clip, step.to(tl.int64), middle, inner, index_outer, index_middle, index_inner,
        GUIDED, CLIPPED, IN_ROWS, BLOCK,
    )  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(out_ptr + n * out_stride + at, out.to(out_ptr.dtype.element_ty), mask)
    tl.store(x0_ptr + n * out_stride + at, x0.to(x0_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=[*_SIZES, "steps"])
def _table_step_kernel(
    x_ptr, m_ptr, k_ptr, scale_ptr, guidance_ptr, counter_ptr, previous_ptr, noise_ptr, seeds_ptr,
    out_ptr, x0_ptr, input_ptr, next_counter_ptr,
    samples, size, x_stride, m_stride, previous_stride, noise_stride, noise_step,
    out_stride, input_stride, clip, steps,
    middle, inner, index_outer, index_middle, index_inner,
    GUIDED: tl.constexpr, CLIPPED: tl.constexpr, IN_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x', x̂₀ and the model's next input of the step that `counter_ptr` holds; tables have `steps` rows."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    first = program % blocks * BLOCK

    counter = tl.load(counter_ptr)
    if program == 0:
        tl.store(next_counter_ptr, counter + 1)
    last = steps.to(tl.int64) - 1
    step = tl.minimum(tl.maximum(counter, 0), last)
    guidance_scale = 0.0
    if GUIDED:
        guidance_scale = tl.load(guidance_ptr + step).to(tl.float32)
    out, x0 = _step(
        x_ptr, m_ptr, k_ptr + 7 * step, previous_ptr, noise_ptr, seeds_ptr,
        samples, n, first, size, x_stride, m_stride, previous_stride, noise_stride, step * noise_step,
        guidance_scale, clip, step, middle, inner, index_outer, index_middle, index_inner,
        GUIDED, CLIPPED, IN_ROWS, BLOCK,
    )  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    mask = at < size
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * out_stride + at, rounded, mask)
    tl.store(x0_ptr + n * out_stride + at, x0.to(x0_ptr.dtype.element_ty), mask)
    scale = tl.load(scale_ptr + tl.minimum(step + 1, last)).to(tl.float32)
    scaled = (rounded.to(tl.float32) * scale).to(input_ptr.dtype.element_ty)
    tl.store(input_ptr + n * input_stride + at, scaled, mask)
    if GUIDED:
        tl.store(input_ptr + (n + samples) * input_stride + at, scaled, mask)


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


class _Operands(NamedTuple):
    """What both kernels take, lying as their results do.

    Attributes:
        out, x0: in which the kernel writes.
        places: the kernel's middle to index_inner.
        in_rows: its IN_ROWS.
        is_moved: the results do not lie as the operation promises.
    """

    out: Tensor
    x0: Tensor
    x: Tensor
    m: Tensor
    previous: Tensor | None
    places: tuple[int, ...]
    in_rows: bool
    is_moved: bool


def _operands(sample: Tensor, model_output: Tensor, previous_x0: Tensor | None, drawn: bool) -> _Operands:
    out = _native.empty_by_sample(sample)
    places = _places(out)
    # Noise cannot be placed in such a layout; no model has latents of five axes in disorder.
    is_moved = places is None and drawn
    if is_moved:
        out = torch.empty_like(out, memory_format=torch.contiguous_format)
    places = places or (1, 1, 0, 0, 1)
    return _Operands(
        out,
        out.new_empty_strided(out.shape, out.stride()),
        lie_as(sample, out),
        lie_as(model_output, out),
        None if previous_x0 is None else lie_as(previous_x0, out),
        places,
        sizes(out)[1] == 1 or places[2:] == (0, 0, 1),
        is_moved,
    )


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else sample_stride(t)


def _noise_of(noise: Tensor, counter: Tensor, out: Tensor) -> tuple[Tensor, int, int]:
    """The table, if its rows lie as `out`, else a copy of one; the strides of samples and of rows."""
    first = noise.select(0, 0)
    if lies_as(first, out):
        return noise, sample_stride(first), noise.stride(0)
    step = counter.clamp(0, len(noise) - 1)
    row = lie_as(noise.index_select(0, step[None]).squeeze(0), out)
    return row, sample_stride(row), 0


def _moved(t: Tensor, sample: Tensor, copies: int = 1) -> Tensor:
    return _native.empty_by_sample(sample, copies).copy_(t)


def diffusion_step(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, *, guidance_scale: float | None = None,
    previous_x0: Tensor | None = None, noise: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, step: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sdfast::diffusion_step."""
    o = _operands(sample, model_output, previous_x0, seeds is not None)
    z = None if noise is None else lie_as(noise, o.out)
    # A transfer waits for nothing where it comes from pinned memory; a table on the device costs none.
    k = coefficients.to(sample.device, non_blocking=True).contiguous()
    drawn = None if seeds is None else seeds.to(sample.device, non_blocking=True).contiguous()
    samples, size = sizes(o.out)
    grid, launch_config = config(samples, size)
    _triton.launch(
        _diffusion_step_kernel, grid, o.x, o.m, k, o.previous, z, drawn, o.out, o.x0, samples, size,
        _stride(o.x), _stride(o.m), _stride(o.previous), _stride(z), _stride(o.out),
        0.0 if guidance_scale is None else float(guidance_scale), 0.0 if clip is None else float(clip),
        step, *o.places, config=launch_config,
        GUIDED=guidance_scale is not None, CLIPPED=clip is not None, IN_ROWS=o.in_rows,
    )  # fmt: skip
    if o.is_moved:
        return _moved(o.out, sample), _moved(o.x0, sample)
    return o.out, o.x0


def diffusion_step_from_table(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, input_scale: Tensor, counter: Tensor, *,
    guidance_scale: Tensor | None = None, previous_x0: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sdfast::diffusion_step_from_table."""
    o = _operands(sample, model_output, previous_x0, seeds is not None)
    copies = 1 if guidance_scale is None else 2
    model_input = _native.empty_by_sample(o.out, copies)
    if o.out.numel() == 0:
        return o.out, o.x0, model_input, counter + 1
    next_counter = torch.empty_like(counter)
    z, noise_stride, noise_step = (None, 0, 0) if noise is None else _noise_of(noise, counter, o.out)
    samples, size = sizes(o.out)
    grid, launch_config = config(samples, size)
    _triton.launch(
        _table_step_kernel, grid, o.x, o.m, coefficients.contiguous(), input_scale.contiguous(),
        None if guidance_scale is None else guidance_scale.contiguous(), counter, o.previous, z,
        None if seeds is None else seeds.contiguous(), o.out, o.x0, model_input, next_counter, samples, size,
        _stride(o.x), _stride(o.m), _stride(o.previous), noise_stride, noise_step,
        _stride(o.out), _stride(model_input),
        0.0 if clip is None else float(clip), len(coefficients), *o.places,
        config=launch_config,
        GUIDED=guidance_scale is not None, CLIPPED=clip is not None, IN_ROWS=o.in_rows,
    )  # fmt: skip
    if o.is_moved:
        moved = _moved(o.out, sample), _moved(o.x0, sample), _moved(model_input, sample, copies)
        return *moved, next_counter
    return o.out, o.x0, model_input, next_counter
