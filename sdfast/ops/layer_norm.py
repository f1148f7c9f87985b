"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimensions.

Ba et al. 2016, "Layer Normalization", eq. 3 and 4; the variance is the biased one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops._checks import NO_KERNEL_YET, check_optional, check_tensor, widened


def layer_norm_torch(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula, through torch's kernel (fp32 statistics)."""
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


layer_norm_reference = widened(layer_norm_torch)

_library.define(
    "layer_norm(Tensor x, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None,"
    " float eps=1e-5) -> Tensor",
    layer_norm_torch,
)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation as `torch.nn.functional.layer_norm`.

    Args:
        x: (..., *normalized_shape), fp32, bf16, fp16 or fp64, any strides.
        normalized_shape: the trailing sizes that are normalised together.
        weight, bias: normalized_shape, same dtype as `x`, or None.
        eps: added to the variance.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_tensor("x", x)
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape: got {shape}, expected the last sizes of x, which has shape {tuple(x.shape)}"
        )
    check_optional("weight", weight, shape=shape, like=x)
    check_optional("bias", bias, shape=shape, like=x)
    serve = dispatch.choose("layer_norm", x.device.type, NO_KERNEL_YET, backend)
    run = layer_norm_reference if serve == "reference" else layer_norm_torch
    return cast(Tensor, run(x, shape, weight, bias, eps))
