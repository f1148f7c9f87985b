"""FLOPs of our kernels, for `torch.utils.flop_counter.FlopCounterMode`.

    import sdfast.flops  # `sdfast.optimize` does; without it the mode passes over our kernels
    with FlopCounterMode() as counter:
        model(x)

They are those of the direct algorithms, two a multiplication, as torch counts its own: Winograd and a folded
upsample need less, so that a rate computed from them is an effective one. Causal attention counts whole, as
torch's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sdfast.ops  # defines the operations  # noqa: F401

Shape = Sequence[int]


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _linear_packed(x: Shape, packed: Shape, weight_rows: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight_rows


def _linear_gradients(
    dh: Shape, x: Shape, weight: Shape, split: bool, for_x: bool, for_weight: bool, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(dh) * x[-1] * (for_x + for_weight)


def _linear_gradient(dh: Shape, other: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dh) * other[-1]


def _attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(q) * k[-2]


def _attention_backward(do: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 10 * math.prod(q) * k[-2]


def _conv2d(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _conv2d_kernel(
    x: Shape, weight: Shape, bias: Shape | None, time_embedding: Shape | None, residual: Shape | None,
    algorithm: int, out_channels: int, kernel_height: int, kernel_width: int, *_: Any,
    out_shape: Shape, **__: Any,
) -> int:  # fmt: skip
    return 2 * math.prod(out_shape) * x[1] * kernel_height * kernel_width


def _conv2d_on_gpu(
    x: Shape, weight: Shape, bias: Shape | None, stride: int, padding: Sequence[int], upsample: bool,
    time_embedding: Shape | None, residual: Shape | None, skip: Shape | None, *_: Any,
    out_shape: Any, **__: Any,
) -> int:  # fmt: skip
    y = out_shape if isinstance(out_shape[0], int) else out_shape[0]  # before mean and rstd
    taps = 9 if upsample else weight[2] * weight[3]  # of the kernel that four of 2x2 came from
    return 2 * math.prod(y) * (x[1] + (0 if skip is None else skip[1])) * taps


def _conv2d_input_gradient(dy: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * math.prod(weight[1:])


def _conv2d_weight_gradient(
    dy: Shape, x: Shape, kernel_height: int, kernel_width: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(dy) * x[1] * kernel_height * kernel_width


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_rows": _linear,
    "linear_rows_cuda": _linear,
    "linear_rows_triton": _linear,
    "linear_split": _linear,
    "linear_packed": _linear_packed,
    "linear_gradients": _linear_gradients,
    "linear_input_gradient_triton": _linear_gradient,
    "linear_weight_gradient_triton": _linear_gradient,
    "attention_forward": _attention,
    "attention_forward_cuda": _attention,
    "attention_forward_triton": _attention,
    "attention_with_lse": _attention,
    "attention_with_lse_cuda": _attention,
    "attention_with_lse_triton": _attention,
    "attention_split": _attention,
    "attention_backward": _attention_backward,
    "attention_backward_cuda": _attention_backward,
    "attention_backward_triton": _attention_backward,
    "conv2d_forward": _conv2d,
    "conv2d_kernel": _conv2d_kernel,
    "conv2d_kernel_cuda": _conv2d_on_gpu,
    "conv2d_kernel_triton": _conv2d_on_gpu,
    "conv2d_statistics_cuda": _conv2d_on_gpu,
    "conv2d_statistics_triton": _conv2d_on_gpu,
    "conv2d_input_gradient": _conv2d_input_gradient,
    "conv2d_input_gradient_triton": _conv2d_input_gradient,
    "conv2d_weight_gradient": _conv2d_weight_gradient,
    "conv2d_weight_gradient_triton": _conv2d_weight_gradient,
}
for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.sdfast, _name))(_formula)
