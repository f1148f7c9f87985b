"""What the operations with compiled kernels share: which calls these cannot take, and how results lie."""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast import _library
from sdfast.ops import _triton
from sdfast.ops._checks import NO_KERNEL_YET, is_transformed


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def unavailable(
    op_name: str, first: str, device_type: str, dtype: torch.dtype, *, needs_gradient: bool = False
) -> dict[str, str]:
    """Why each backend that cannot serve a call cannot.

    Args:
        op_name: a registered operation whose kernel the call needs.
        first: what the caller calls the argument of this device and dtype.
        device_type: "cpu", "cuda", ...
        dtype: its dtype.
        needs_gradient: whether autograd asks for a gradient that the kernel does not give.
    """
    if dtype is torch.float64:
        reason = f"{first} is float64; use torch or reference"
    elif is_transformed():
        reason = "torch.func transforms and forward-mode AD need torch or reference"
    elif needs_gradient:
        reason = "this gradient needs torch or reference"
    else:
        reasons = {}
        if device_type != "cpu":
            reasons["cpu"] = f"{first} is on {device_type}, the kernel runs on cpu"
        elif not _library.has_kernel(op_name, "cpu"):
            reasons["cpu"] = _library.load_cpu_library().detail
        if not _library.has_kernel(op_name, "cuda"):
            status = _library.load_cuda_library()
            reasons["cuda"] = NO_KERNEL_YET["cuda"] if status.loaded else status.detail
        elif device_type != _library.cuda_device_type:
            reasons["cuda"] = f"{first} is on {device_type}, the kernel runs on {_library.cuda_device_type}"
        if not _library.has_kernel(op_name, "triton"):
            reasons["triton"] = NO_KERNEL_YET["triton"]
        elif (why := _triton.why_not(first, device_type)) is not None:
            reasons["triton"] = why
        return reasons
    return dict.fromkeys(NO_KERNEL_YET, reason)


def empty_by_sample(x: Tensor, copies: int = 1) -> Tensor:
    """An empty tensor for `copies` of x, one after the other, as the elementwise kernels lay it out.

    Sample (first axis) after sample, each of them as x's lie where these are dense, else contiguous.
    """
    expected = 1
    inner = [axis for axis in range(x.dim() - 1, 0, -1) if x.shape[axis] > 1]
    for axis in sorted(inner, key=x.stride):
        if x.stride(axis) != expected:
            return x.new_empty((copies * x.shape[0], *x.shape[1:]))
        expected *= x.shape[axis]
    if x.dim() == 0 or (copies == 1 and x.shape[0] <= 1):
        return x.new_empty_strided(x.shape, x.stride())
    return x.new_empty_strided((copies * x.shape[0], *x.shape[1:]), (expected, *x.stride()[1:]))


def empty_by_token(t: Tensor) -> Tensor:
    """An empty (B, heads, rows, D) view of (B, rows, heads, D)."""
    batch, heads, rows, head_dim = t.shape
    return t.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)
