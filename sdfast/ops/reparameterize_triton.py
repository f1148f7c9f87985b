"""reparameterize in Triton: z = μ + exp(½ logvar) ε with logvar clamped, and dlogvar = ½ dz ε exp(½ logvar).

A program takes a run of elements of one sample as they lie in memory. dμ is dz itself, and dlogvar is 0 where
logvar was clamped.
Bytes: three tensors read once, one written once, each way: 4 * N * size elements.
Limit: the launch for latents of a few images, memory above.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdfast.ops import _native, _triton
from sdfast.ops._elementwise_triton import config, lie_as, sample_stride, sizes
from sdfast.ops.reparameterize import LOGVAR_RANGE


@triton.jit
def _reparameterize_kernel(
    first_ptr, logvar_ptr, noise_ptr, out_ptr,
    size, first_stride, logvar_stride, noise_stride, out_stride, least, most,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z from μ, or with BACKWARD dlogvar from dz, as `first_ptr`."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    first = tl.load(first_ptr + n * first_stride + at, mask, 0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + n * logvar_stride + at, mask, 0.0).to(tl.float32)
    noise = tl.load(noise_ptr + n * noise_stride + at, mask, 0.0).to(tl.float32)
    # Written so that NaN stays NaN.
    clamped = tl.where(logvar < least, least, tl.where(logvar > most, most, logvar))
    std = tl.exp(0.5 * clamped)
    if BACKWARD:
        out = tl.where((logvar >= least) & (logvar <= most), 0.5 * first * noise * std, 0.0)
    else:
        out = first + std * noise
    tl.store(out_ptr + n * out_stride + at, out.to(out_ptr.dtype.element_ty), mask)


def _run(first: Tensor, logvar: Tensor, noise: Tensor, out: Tensor, backward: bool) -> Tensor:
    first, logvar, noise = (lie_as(t, out) for t in (first, logvar, noise))
    samples, size = sizes(out)
    grid, launch_config = config(samples, size)
    _triton.launch(
        _reparameterize_kernel, grid, first, logvar, noise, out, size,
        sample_stride(first), sample_stride(logvar), sample_stride(noise), sample_stride(out), *LOGVAR_RANGE,
        config=launch_config, BACKWARD=backward,
    )  # fmt: skip
    return out


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """sdfast::reparameterize."""
    return _run(mean, logvar, noise, _native.empty_by_sample(mean), backward=False)


def reparameterize_backward(dz: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """sdfast::reparameterize_backward."""
    return _run(dz, logvar, noise, _native.empty_by_sample(logvar), backward=True)
