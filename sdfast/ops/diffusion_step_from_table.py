"""diffusion_step_from_table: the step that a counter on the device says, and what the model is fed next.

    i  = counter, from 0 to n - 1
    x', x̂₀ = diffusion_step(x, m, coefficients[i], ...), noise[i] its noise, or drawn from seeds and i
    y  = input_scale[i + 1] x', twice with guidance, for both halves of the model's batch

Nothing here depends on a number of the host, so that one CUDA graph of a step, replayed n times, is the whole
sampling loop. Arithmetic and bits are those of `diffusion_step`; x' is rounded before it is scaled. A term
that some step does not have (x̂₀ᵖ in the first one, noise in the last) is there with a coefficient of 0.

The kernels are in diffusion_step_triton.py and csrc/diffusion_step_cuda.cuh. The counter is not changed in
place, which other programs of the kernel may not have read yet: i + 1 goes to a tensor of its own. On the
CPU, where nothing waits for a device, the kernel of `diffusion_step` is called with the row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_optional, check_tensor
from sdfast.ops.diffusion_step import (
    check_clip,
    check_model_output,
    check_seeds,
    diffusion_step_torch,
)

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def diffusion_step_from_table_torch(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, input_scale: Tensor, counter: Tensor, *,
    guidance_scale: Tensor | None = None, previous_x0: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, noise: Tensor | None = None,
) -> Results:  # fmt: skip
    """The formula, in fp32 or fp64, without a transfer between host and device."""
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    last = len(coefficients) - 1
    step = counter.clamp(0, last)

    def row(table: Tensor, i: Tensor) -> Tensor:
        return table.index_select(0, i[None])[0]

    out, x0 = diffusion_step_torch(
        sample, model_output, row(coefficients, step), previous_x0=previous_x0, clip=clip, seeds=seeds,
        guidance_scale=None if guidance_scale is None else row(guidance_scale, step).to(wide), step=step,
        noise=None if noise is None else row(noise, step),
    )  # fmt: skip
    model_input = (out.to(wide) * row(input_scale, (step + 1).clamp(max=last)).to(wide)).to(sample.dtype)
    if guidance_scale is not None:
        model_input = torch.cat([model_input, model_input])
    return out, x0, model_input, counter + 1


# The composite widens by itself, so it is the reference as well.
diffusion_step_from_table_reference = diffusion_step_from_table_torch


def _empty_results(sample: Tensor, counter: Tensor, guidance_scale: Tensor | None) -> Results:
    out, x0 = _native.empty_by_sample(sample), _native.empty_by_sample(sample)
    copies = 1 if guidance_scale is None else 2
    return out, x0, _native.empty_by_sample(out, copies), torch.empty_like(counter)


def _fake(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, input_scale: Tensor, counter: Tensor, *,
    guidance_scale: Tensor | None = None, previous_x0: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, noise: Tensor | None = None,
) -> Results:  # fmt: skip
    return _empty_results(sample, counter, guidance_scale)


def _by_row(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, input_scale: Tensor, counter: Tensor, *,
    guidance_scale: Tensor | None = None, previous_x0: Tensor | None = None, clip: float | None = None,
    seeds: Tensor | None = None, noise: Tensor | None = None,
) -> Results:  # fmt: skip
    """On the CPU: the compiled kernel of `diffusion_step`, with what the tables hold for this step."""
    last = len(coefficients) - 1
    step = min(max(int(counter), 0), last)
    out, x0 = torch.ops.sdfast.diffusion_step(
        sample, model_output, coefficients[step], previous_x0=previous_x0, clip=clip, seeds=seeds,
        guidance_scale=None if guidance_scale is None else float(guidance_scale[step]), step=step,
        noise=None if noise is None else noise[step],
    )  # fmt: skip
    copies = 1 if guidance_scale is None else 2
    model_input = _native.empty_by_sample(out, copies)
    scaled = out * float(input_scale[min(step + 1, last)])
    model_input.unflatten(0, (copies, len(out))).copy_(scaled)
    return out, x0, model_input, counter + 1


_on_cpu = _library.define_native(
    "diffusion_step_from_table(Tensor sample, Tensor model_output, Tensor coefficients, Tensor input_scale, "
    "Tensor counter, *, Tensor? guidance_scale=None, Tensor? previous_x0=None, float? clip=None, "
    "Tensor? seeds=None, Tensor? noise=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _by_row,
)
_by_triton = _library.define_triton("diffusion_step_from_table", "sdfast.ops.diffusion_step_triton")
_by_cuda = _library.define_cuda("diffusion_step_from_table")
_BACKENDS: dict[str, Callable[..., Results]] = {"cpu": _on_cpu, "triton": _by_triton, "cuda": _by_cuda}


def _check_table(name: str, table: object, shape: tuple[int, ...], sample: Tensor) -> None:
    check_tensor(name, table, shape=shape)
    assert isinstance(table, Tensor)
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got dtype {table.dtype}, expected float32 or float64")
    _check_device(name, table, sample)


def _check_device(name: str, t: Tensor, sample: Tensor) -> None:
    if t.device != sample.device:
        raise ValueError(f"{name}: is on {t.device}, expected {sample.device} as the sample")


def diffusion_step_from_table(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    input_scale: Tensor,
    counter: Tensor,
    *,
    guidance_scale: Tensor | None = None,
    previous_x0: Tensor | None = None,
    clip: float | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reverse step that `counter` says, and the model's next input. All tensors are on one device.

    Args:
        sample: x_i, (N, ...), fp32, bf16, fp16 or fp64, any strides.
        model_output: m, same dtype: (N, ...), or with guidance (2N, ...), the unconditional half first.
        coefficients: k₀ to k₆ of each of n steps, (n, 7), fp32 or fp64: `SamplingPlan.coefficients`.
        input_scale: factor of the latents at the model's input, (n,), fp32 or fp64.
        counter: i, (), int64. What lies outside of 0 to n - 1 takes the nearest row.
        guidance_scale: g of each step, (n,), fp32 or fp64, or None for an output without guidance.
        previous_x0: x̂₀ of the step before, (N, ...), same dtype; None leaves its term out.
        clip: bound of |x̂₀|, > 0, or None.
        seeds: what z is drawn from, with i, one for each sample, (N,), int64; None leaves its term out.
        noise: z of each step instead, (n, N, ...), same dtype; rows that lie as it does are not copied.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        x' and x̂₀, each (N, ...); the model's next input, (N, ...), or with guidance (2N, ...) for both halves
        (after the last step scaled as for it), in the dtype of `sample`; and i + 1, (), int64.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_model_output(sample, model_output, guided=guidance_scale is not None)
    check_tensor("coefficients", coefficients, rank=2)
    steps = len(coefficients)
    if steps == 0:
        raise ValueError("coefficients: got no steps, expected (n, 7)")
    _check_table("coefficients", coefficients, (steps, 7), sample)
    _check_table("input_scale", input_scale, (steps,), sample)
    if guidance_scale is not None:
        _check_table("guidance_scale", guidance_scale, (steps,), sample)
    if not isinstance(counter, Tensor):
        raise TypeError(f"counter: got {type(counter).__name__}, expected a torch.Tensor")
    if counter.dtype is not torch.int64:
        raise TypeError(f"counter: got dtype {counter.dtype}, expected torch.int64")
    if counter.dim():
        raise ValueError(f"counter: got shape {tuple(counter.shape)}, expected ()")
    _check_device("counter", counter, sample)
    check_optional("previous_x0", previous_x0, shape=tuple(sample.shape), like=sample)
    check_clip(clip)
    if seeds is not None:
        check_seeds(seeds, sample)
        _check_device("seeds", seeds, sample)
    check_optional("noise", noise, shape=(steps, *sample.shape), like=sample)
    if seeds is not None and noise is not None:
        raise ValueError("seeds: got them beside noise, expected one of the two")
    device_type = sample.device.type
    unavailable = _native.unavailable(
        "diffusion_step", "sample", device_type, sample.dtype,
        needs_gradient=_native.requires_grad(sample, model_output, coefficients, previous_x0, noise),
    )  # fmt: skip
    serve = dispatch.choose("diffusion_step_from_table", device_type, unavailable, backend)
    run = _BACKENDS.get(serve, diffusion_step_from_table_torch)
    return run(
        sample, model_output, coefficients, input_scale, counter, guidance_scale=guidance_scale,
        previous_x0=previous_x0, clip=clip, seeds=seeds, noise=noise,
    )  # fmt: skip
