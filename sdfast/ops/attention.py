"""attention: o = softmax(scale · q kᵀ + mask) v, per batch element and head.

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; scale defaults to 1/sqrt(D).
The (L, S) scores are never held in fp32 for the whole batch: torch's SDPA streams over the keys
wherever it can, and so do the CPU kernels, csrc/attention_cpu.cpp and csrc/attention_backward_cpu.cpp,
those of CUDA, csrc/attention_cuda.cuh and csrc/attention_backward_cuda.cuh, and those of Triton. A mask is
torch's to serve.

q: (B, heads, L, D). k, v: (B, heads, S, D). o: (B, heads, L, D), from a kernel a transposed view of
(B, L, heads, D), so that the heads of a token are side by side for what follows; so are dq, dk and dv.
lse, the base-2 logarithm of each query's sum of exponentials, which are powers of two: (B, heads, L), fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _tiles, _twice
from sdfast.ops._checks import NO_KERNEL_YET, autocast_dtype, can_cast, cast_to, check_tensor, widened
from sdfast.ops._cuda_order import of_attention
from sdfast.ops._native import empty_by_token, requires_grad, unavailable


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The formula, through torch's scaled_dot_product_attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


attention_reference = widened(attention_torch)

_library.define(
    "attention(Tensor q, Tensor k, Tensor v, *, Tensor? mask=None, bool is_causal=False,"
    " float? scale=None) -> Tensor",
    attention_torch,
)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    return empty_by_token(q)


def _with_lse_fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return empty_by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_token(q), empty_by_token(k), empty_by_token(v)


_forward_op = _library.define_native(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool is_causal, float scale) -> Tensor", _forward_fake
)
# In fp32 on AMX tiles; see _tiles.py.
_split_op = _library.define_native(
    "attention_split(Tensor q, Tensor k, Tensor v, bool is_causal, float scale) -> Tensor", _forward_fake
)
_with_lse_op = _library.define_native(
    "attention_with_lse(Tensor q, Tensor k, Tensor v, bool is_causal, float scale) -> (Tensor, Tensor lse)",
    _with_lse_fake,
)
_backward_op = _library.define_native(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool is_causal, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _Operations(NamedTuple):
    """What computes attention and its gradient."""

    forward: Callable[..., Tensor]
    with_lse: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_CPU = _Operations(_forward_op, _with_lse_op, _backward_op)
_TRITON = _Operations(
    _library.define_triton("attention_forward", "sdfast.ops.attention_triton"),
    _library.define_triton("attention_with_lse", "sdfast.ops.attention_triton"),
    _library.define_triton("attention_backward", "sdfast.ops.attention_backward_triton"),
)
_CUDA = _Operations(
    _library.define_cuda("attention_forward"),
    _library.define_cuda("attention_with_lse"),
    _library.define_cuda("attention_backward"),
)


# Of fewer keys queries are split for too little: 77 were up to a seventh slower, 256 faster.
_LEAST_SPLIT_KEYS = 128
_WIDEST_CUDA = 512  # elements of a head


def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The formula without streaming: torch's kernels that stream have no second derivative."""
    scores = scale * q @ k.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def _gradients_by_torch(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *_ = ctx.saved_tensors
    formula = functools.partial(widened(_plain), is_causal=ctx.is_causal, scale=ctx.scale)
    return None, *_twice.gradients(formula, (q, k, v), ctx.needs_input_grad[1:4], do), None, None


class _Attention(torch.autograd.Function):
    """A kernel's forward with its backward, which computes the weights again from q, k and lse."""

    @staticmethod
    def forward(
        ctx: Any, operations: _Operations, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
    ) -> Tensor:
        o, lse = operations.with_lse(q, k, v, is_causal, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.operations, ctx.is_causal, ctx.scale = operations, is_causal, scale
        return o

    @staticmethod
    @_twice.differentiable(_gradients_by_torch)
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.operations.backward(do, *ctx.saved_tensors, ctx.is_causal, ctx.scale)
        return (None, *gradients, None, None)


def _by_kernels(
    operations: _Operations,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """By these kernels; no mask."""
    assert mask is None
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if requires_grad(q, k, v):
        return cast(Tensor, _Attention.apply(operations, q, k, v, is_causal, scale))
    splits = operations is _CPU and _tiles.split(q.dtype) and k.shape[2] >= _LEAST_SPLIT_KEYS
    run = _split_op if splits else operations.forward
    return cast(Tensor, run(q, k, v, is_causal, scale))


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": functools.partial(_by_kernels, _CPU),
    "triton": functools.partial(_by_kernels, _TRITON),
    "cuda": functools.partial(_by_kernels, _CUDA),
    "reference": cast(Callable[..., Tensor], attention_reference),
}


def _unavailable_cuda(q: Tensor) -> str | None:
    if q.dtype is torch.float32:  # tensor cores would round its factors to tf32
        return "it takes bfloat16 or float16; use triton, torch or reference"
    if q.shape[3] > _WIDEST_CUDA:
        return f"it takes heads of at most {_WIDEST_CUDA} elements; use triton, torch or reference"
    return None


def _unavailable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, str]:
    """Why each backend that cannot take this call cannot."""
    if q.dtype is torch.float64 or k.dtype is not q.dtype or v.dtype is not q.dtype:
        reason = "it takes float32, bfloat16 or float16, the same for all; use torch or reference"
    elif mask is not None:
        reason = "it takes no mask; use torch or reference"
    elif q.numel() == 0 or k.numel() == 0:
        reason = "q or k is empty"
    else:
        reasons = unavailable("attention_forward", "q", q.device.type, q.dtype)
        if "cuda" not in reasons and (why := _unavailable_cuda(q)):
            reasons["cuda"] = why
        return reasons
    return dict.fromkeys(NO_KERNEL_YET, reason)


def _is_faster_in_torch(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """As measured: gradients of so little that Python decides."""
    return q.numel() * k.shape[2] < 2**16 and requires_grad(q, k, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (B, heads, L, D), fp32, bf16, fp16 or fp64, any strides: mostly a transposed (B, L, heads, D).
        k: (B, heads, S, D), same dtype.
        v: (B, heads, S, D), same dtype.
        mask: broadcastable to (B, heads, L, S), bool (False hides a key) or of `q`'s dtype (added to scores).
        is_causal: hide the keys after the query's own position; not together with `mask`.
        scale: factor of the scores; None means 1/sqrt(D).
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        (B, heads, L, D) in the dtype of `q`, or autocast's; from a kernel a transposed view of
        (B, L, heads, D). Torch's own streaming kernels refuse second derivatives; those here
        hold all scores in memory.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("q", q, rank=4)
    check_tensor("k", k, rank=4, like=q, casts=True)
    batch, heads, _, head_dim = q.shape
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, expected ({batch}, {heads}, S, {head_dim}) to fit q"
        )
    check_tensor("v", v, shape=tuple(k.shape), like=q, casts=True)
    if mask is not None:
        if is_causal:
            raise ValueError(
                "mask: cannot be given together with is_causal=True; fold the causal part into mask"
            )
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            check_tensor("mask", mask, like=q, casts=True)
        elif mask.device != q.device:
            raise ValueError(f"mask: is on {mask.device}, expected {q.device} as the input")
        scores = (batch, heads, q.shape[2], k.shape[2])
        if not _broadcasts(mask.shape, scores):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to {scores}")
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and can_cast(q, k, v, mask):
        q, k, v = (cast_to(dtype, t) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return attention(
                q, k, v, mask=cast_to(dtype, mask), is_causal=is_causal, scale=scale, backend=backend
            )
    reasons = _unavailable(q, k, v, mask)
    order = None
    if q.device.type == "cuda" and not dispatch.is_named(backend):
        order = of_attention(q, k, v, is_causal)
    elif _is_faster_in_torch(q, k, v):
        order = ("torch",)
    serve = dispatch.choose("attention", q.device.type, reasons, backend, order=order)
    run = _BACKENDS.get(serve, attention_torch)
    return run(q, k, v, mask=mask, is_causal=is_causal, scale=scale)


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(shape[::-1], target[::-1], strict=False))
