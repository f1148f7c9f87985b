"""add_noise in Triton: x_t = α x₀ + σ ε, and with it v = α ε - σ x₀.

A program takes a run of elements of one sample as they lie in memory, and its sample's α and σ.
Bytes: x₀ and ε read once, each result written once: 3 or 4 * N * size elements.
Limit: the launch for latents of a few images, memory above.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops import _native, _triton
from sdfast.ops._elementwise_triton import config, lie_as, sample_stride, sizes


@triton.jit
def _add_noise_kernel(
    x_ptr, noise_ptr, alpha_ptr, sigma_ptr, out_ptr, velocity_ptr,
    size, x_stride, noise_stride, alpha_stride, sigma_stride, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_t and, with `velocity_ptr`, v."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    alpha = tl.load(alpha_ptr + n * alpha_stride).to(tl.float32)
    sigma = tl.load(sigma_ptr + n * sigma_stride).to(tl.float32)
    x = tl.load(x_ptr + n * x_stride + at, mask, 0.0).to(tl.float32)
    noise = tl.load(noise_ptr + n * noise_stride + at, mask, 0.0).to(tl.float32)
    # Which product a compiler would fuse into the sum depends on strides; the bits are not to.
    out = tl.fma(alpha, x, sigma * noise)
    tl.store(out_ptr + n * out_stride + at, out.to(out_ptr.dtype.element_ty), mask)
    if velocity_ptr is not None:
        velocity = tl.fma(alpha, noise, -(sigma * x))
        tl.store(velocity_ptr + n * out_stride + at, velocity.to(out_ptr.dtype.element_ty), mask)


def _run(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, out: Tensor, v: Tensor | None) -> None:
    x, e = lie_as(x0, out), lie_as(noise, out)
    samples, size = sizes(out)
    grid, launch_config = config(samples, size)
    _triton.launch(
        _add_noise_kernel, grid, x, e, alpha, sigma, out, v,
        size, sample_stride(x), sample_stride(e), alpha.stride(0), sigma.stride(0), sample_stride(out),
        config=launch_config,
    )  # fmt: skip


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """sdfast::add_noise."""
    out = _native.empty_by_sample(x0)
    _run(x0, noise, alpha, sigma, out, None)
    return out


def add_noise_velocity(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """sdfast::add_noise_velocity."""
    out, velocity = _native.empty_by_sample(x0), _native.empty_by_sample(x0)
    _run(x0, noise, alpha, sigma, out, velocity)
    return out, velocity
