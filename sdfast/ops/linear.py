"""linear: y = act(x Wᵀ + b + residual).

    act: identity, "silu" (h σ(h)), "gelu" (h Φ(h)), "quick_gelu" (h σ(1.702 h)), or
    "geglu": a · gelu(g), (a, g) = split(h)                          Shazeer 2020, "GLU Variants", eq. 5

GELU is the exact one, through erf: checkpoints were trained with it and the tanh form moves images.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops._checks import NO_KERNEL_YET, check_optional, check_tensor, widened

ACTIVATIONS = (None, "silu", "gelu", "quick_gelu", "geglu")


def linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its arguments."""
    h = F.linear(x, weight, bias)
    h = h if residual is None else h + residual
    if activation == "silu":
        return F.silu(h)
    if activation == "gelu":
        return F.gelu(h)
    if activation == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    if activation == "geglu":
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)
    return h


linear_reference = widened(linear_torch)

_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str? activation=None,"
    " Tensor? residual=None) -> Tensor",
    linear_torch,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer as `torch.nn.functional.linear`, with what follows it fused.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64, any strides.
        weight: (M, K), same dtype. With "geglu" its first M/2 rows give the value, the others the gate.
        bias: (M,) or None.
        activation: one of `ACTIVATIONS`.
        residual: (..., M), added before the activation.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        (..., M), or with "geglu" (..., M/2), in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    check_tensor("weight", weight, rank=2, like=x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {weight.shape[1]}) to fit weight")
    width = weight.shape[0]
    check_optional("bias", bias, shape=(width,), like=x)
    check_optional("residual", residual, shape=(*x.shape[:-1], width), like=x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {ACTIVATIONS}")
    if activation == "geglu" and width % 2:
        raise ValueError(f"weight: got {width} rows, expected an even number for 'geglu'")
    serve = dispatch.choose("linear", x.device.type, NO_KERNEL_YET, backend)
    run = linear_reference if serve == "reference" else linear_torch
    return cast(Tensor, run(x, weight, bias, activation=activation, residual=residual))
