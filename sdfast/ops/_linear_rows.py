"""The operations of linear's forward, csrc/linear_cpu.cpp, linear_triton.py and csrc/linear_cuda.cu.

Triton's and CUDA's take matrices. The CPU's also take a dense x and residual of any dimensions and a weight
(M, K, 1, 1): a view made in Python takes about as long as dispatching the operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library

ACTIVATIONS = (None, "silu", "gelu", "quick_gelu", "geglu")


def activate(h: Tensor, activation: str | None) -> Tensor:
    """The formula of y, given x Wᵀ + b + residual."""
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


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each as it is where it lies densely, else a copy."""
    return [None if t is None else t.contiguous() for t in tensors]


def matrices(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What Triton's operations take of a layer: dense matrices, but rows of x may lie apart."""
    tokens = x.reshape(-1, x.shape[-1])
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    if residual is not None:
        residual = residual.reshape(-1, weight.shape[0])
    return tokens, *dense(weight.flatten(1), bias, residual)


def _rows_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    width = weight.shape[0] // 2 if ACTIVATIONS[activation] == "geglu" else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width))


def _packed_fake(
    x: Tensor,
    packed: Tensor,
    weight_rows: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    width = weight_rows // 2 if ACTIVATIONS[activation] == "geglu" else weight_rows
    return x.new_empty((*x.shape[:-1], width))


rows_op = _library.define_native(
    "linear_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation) -> Tensor",
    _rows_fake,
)
# On AMX tiles; see _tiles.py. fp32 as sums of two bf16, on a weight that lies as it is:
split_op = _library.define_native(
    "linear_split(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation) -> Tensor",
    _rows_fake,
)
# and any on a copy for tiles.
packed_op = _library.define_native(
    "linear_packed(Tensor x, Tensor packed, int weight_rows, Tensor? bias, Tensor? residual, int activation)"
    " -> Tensor",
    _packed_fake,
)
rows_triton_op = _library.define_triton("linear_rows", "sdfast.ops.linear_triton")
# On Hopper's own units; activation None or, without a residual, "geglu".
rows_cuda_op = _library.define_cuda("linear_rows")
