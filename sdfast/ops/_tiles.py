"""Copies of bf16 weights in the order in which AMX tiles read them (csrc/cpu_tiles.h).

Without one a weight is transposed at each call, a tenth to a half of the time where tokens are few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sdfast import _library, packing

# The milliseconds that a copy saves a byte at each call, about.
_SAVED_MS = 1e-7


def _pack_fake(weight: Tensor, gated: bool) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU")


_pack_op = _library.define_native("pack_tiles(Tensor weight, bool gated) -> Tensor", _pack_fake)


def serve(dtype: torch.dtype) -> bool:
    """Whether values of this type are multiplied on tiles here."""
    return dtype is torch.bfloat16 and _library.has_kernel("bf16_tiles", "cpu")


def kept(
    weight: Tensor, kind: str, elements: int, kernels: Callable[[Tensor], Tensor], gated: bool = False
) -> Tensor | None:
    """The copy of a weight, or None where there is none to be kept.

    Args:
        weight: of any layout.
        kind: of `packing.packed`.
        elements: of the copy, about.
        kernels: gives the weight as (phases, rows, kernel_height, kernel_width, channels).
        gated: for GEGLU.
    """
    if not serve(weight.dtype) or not packing.is_lasting(weight):
        return None
    if not packing.affordable(weight, kind, 2 * elements, _SAVED_MS):
        return None

    def pack(weight: Tensor) -> Tensor:
        return cast(Tensor, _pack_op(kernels(weight).contiguous(), gated))

    return packing.packed(weight, kind, pack, _SAVED_MS)
