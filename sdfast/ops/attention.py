"""attention: o = softmax(scale · q kᵀ + mask) v, per batch element and head.

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; scale defaults to 1/sqrt(D).
The (L, S) scores are never held in fp32 for the whole batch: torch's SDPA streams over the keys
wherever it can, and so does every kernel that takes its place.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops._checks import NO_KERNEL_YET, check_tensor, widened


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
        (B, heads, L, D) in the dtype of `q`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("q", q, rank=4)
    check_tensor("k", k, rank=4, like=q)
    batch, heads, _, head_dim = q.shape
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, expected ({batch}, {heads}, S, {head_dim}) to fit q"
        )
    check_tensor("v", v, shape=tuple(k.shape), like=q)
    if mask is not None:
        if is_causal:
            raise ValueError(
                "mask: cannot be given together with is_causal=True; fold the causal part into mask"
            )
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            check_tensor("mask", mask, like=q)
        scores = (batch, heads, q.shape[2], k.shape[2])
        if not _broadcasts(mask.shape, scores):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to {scores}")
    serve = dispatch.choose("attention", q.device.type, NO_KERNEL_YET, backend)
    run = attention_reference if serve == "reference" else attention_torch
    return cast(Tensor, run(q, k, v, mask=mask, is_causal=is_causal, scale=scale))


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(shape[::-1], target[::-1], strict=False))
