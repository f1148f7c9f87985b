"""linear: y = act(x Wᵀ + b + residual).

    act: identity, "silu" (h σ(h)), "gelu" (h Φ(h)), "quick_gelu" (h σ(1.702 h)), or
    "geglu": a · gelu(g), (a, g) = split(h)                          Shazeer 2020, "GLU Variants", eq. 5

GELU is the exact one, through erf: checkpoints were trained with it and the tanh form moves images.

On CUDA the compiled kernels take products on Hopper, and everywhere GEGLU's gate behind torch's product
(`_linear_gate.py`); Triton fuses all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch, packing
from sdfast.ops import _tiles
from sdfast.ops._checks import (
    NO_KERNEL_YET,
    autocast_dtype,
    can_cast,
    cast_to,
    check_optional,
    check_tensor,
    is_autocast,
    is_plain,
    widened,
)
from sdfast.ops._cuda_order import of_linear
from sdfast.ops._linear_gate import linear_cuda, multiplies_tiles
from sdfast.ops._linear_rows import (
    ACTIVATIONS,
    activate,
    dense,
    matrices,
    packed_op,
    rows_op,
    rows_triton_op,
    split_op,
)
from sdfast.ops._linear_training import linear_training, linear_training_triton
from sdfast.ops._native import requires_grad, unavailable

# Of fewer tokens the product is as fast on the weight as it lies.
_LEAST_TOKENS = 16
_ONLY_ON_HOPPER = (
    "it takes, beside GEGLU, products without activation and gradient on compute capability 9.0 in a library"
    " built for 9.0a, in bfloat16 or float16, of multiples of 8"
)


def linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its arguments."""
    h = F.linear(x, weight.flatten(1), bias)
    return activate(h if residual is None else h + residual, activation)


linear_reference = widened(linear_torch)

_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str? activation=None,"
    " Tensor? residual=None) -> Tensor",
    linear_torch,
)


def linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The compiled CPU kernels."""
    if requires_grad(x, weight, bias, residual):
        return linear_training(x, weight, bias, residual, ACTIVATIONS.index(activation))
    run = split_op if _tiles.split(x.dtype) else rows_op
    if not torch.compiler.is_compiling():
        run = _on_tiles(x, weight, activation) or run
        packing.note(weight)
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    return run(x, *dense(weight, bias, residual), ACTIVATIONS.index(activation))


def _on_tiles(x: Tensor, weight: Tensor, activation: str | None) -> Callable[..., Tensor] | None:
    """The operation on a copy of the weight for AMX tiles, where it is to be kept."""
    if not _tiles.serve(x.dtype) or x.numel() < _LEAST_TOKENS * x.shape[-1]:
        return None
    gated = activation == "geglu"
    kind = "tiles_gated" if gated else "tiles"
    packed = _tiles.kept(weight, kind, lambda w: w.flatten(1)[None, :, None, None], taps=1, gated=gated)
    if packed is None:
        return None
    rows = weight.shape[0]
    return lambda tokens, _, *others: packed_op(tokens, packed, rows, *others)


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The Triton kernels."""
    if requires_grad(x, weight, bias, residual):
        return linear_training_triton(x, weight, bias, residual, ACTIVATIONS.index(activation))
    y = rows_triton_op(*matrices(x, weight, bias, residual), ACTIVATIONS.index(activation))
    return cast(Tensor, y).view(*x.shape[:-1], y.shape[-1])


def _is_faster_in_torch(activation: str | None, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Gradients of so little that Python decides, and in bf16 those of small weights.

    Measured, forward and backward: fp32 is faster here from about 2^19.6 products on, fp16 many times faster
    than torch's. bf16 is from 2^22 products on, on AMX, and in pairs of 2^20 weights or where GEGLU is fused;
    widened to fp32 it was not.
    """
    if not requires_grad(x, weight, *others):
        return False
    small = activation != "geglu" and weight.numel() < 2**20
    for_torch = small or not _library.has_kernel("bf16_pairs", "cpu")
    if x.dtype == torch.bfloat16 and for_torch and not _tiles.serve(x.dtype):
        return True
    return x.numel() * weight.shape[0] < (2**22 if x.dtype == torch.bfloat16 else 3 * 2**18)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "cpu": linear_cpu,
    "triton": linear_triton,
    "cuda": linear_cuda,
    "reference": cast(Callable[..., Tensor], linear_reference),
}


def _unavailable(
    activation: str | None, x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None
) -> dict[str, str]:
    """Why each backend that cannot take this call cannot."""
    others = (residual, bias)
    if not x.numel() or not weight.numel() or any(t is not None and t.dtype != x.dtype for t in others):
        reason = "it takes tensors of one dtype that are not empty"
    elif is_autocast(x.device.type):
        reason = "under autocast torch decides the dtypes"
    elif not is_plain(weight):
        reason = "it reads weights that are plain tensors"
    else:
        reasons = unavailable("linear_rows", "x", x.device.type, x.dtype)
        if "cuda" not in reasons and multiplies_tiles(x, weight, activation, residual, bias):
            return reasons
        if activation != "geglu":
            return {"cuda": _ONLY_ON_HOPPER, **reasons}
        reasons.pop("cuda", None)
        of_gate = unavailable("linear_activate", "x", x.device.type, x.dtype)
        return reasons | {name: why for name, why in of_gate.items() if name == "cuda"}
    return {**NO_KERNEL_YET, "cpu": reason, "triton": reason, "cuda": reason}


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
        weight: (M, K), same dtype, or (M, K, 1, 1) as a 1x1 convolution keeps it. With "geglu" its
            first M/2 rows give the value, the others the gate.
        bias: (M,) or None.
        activation: one of `ACTIVATIONS`.
        residual: (..., M), added before the activation.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        (..., M), or with "geglu" (..., M/2), in the dtype of `x`, or autocast's.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        check_tensor("weight", weight, like=x, casts=True)
    else:
        check_tensor("weight", weight, rank=2, like=x, casts=True)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {weight.shape[1]}) to fit weight")
    width = weight.shape[0]
    check_optional("bias", bias, shape=(width,), like=x, casts=True)
    check_optional("residual", residual, shape=(*x.shape[:-1], width), like=x, casts=True)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {ACTIVATIONS}")
    if activation == "geglu" and width % 2:
        raise ValueError(f"weight: got {width} rows, expected an even number for 'geglu'")
    dtype = autocast_dtype(x.device.type)
    # Another residual's dtype would be that of the sum.
    same = residual is None or residual.dtype is dtype
    if dtype is not None and same and is_plain(weight) and can_cast(x, weight, bias):
        x, weight, bias = cast_to(dtype, x), cast_to(dtype, weight), cast_to(dtype, bias)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, weight, bias, activation=activation, residual=residual, backend=backend)
    reasons = _unavailable(activation, x, weight, residual, bias)
    order = None
    if x.device.type == "cuda" and not dispatch.is_named(backend):
        order = of_linear(x, weight, activation, bias, residual)
    elif _is_faster_in_torch(activation, x, weight, bias, residual):
        order = ("torch",)
    serve = dispatch.choose("linear", x.device.type, reasons, backend, order=order)
    run = _BACKENDS.get(serve, linear_torch)
    return run(x, weight, bias, activation=activation, residual=residual)
