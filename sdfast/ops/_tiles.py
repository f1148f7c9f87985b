"""What AMX tiles multiply, and copies of weights in the order in which they read them (csrc/cpu_tiles.h).

Tiles multiply bf16. Where `use_numerics` allows it fp32 values are sums of two bf16 there, three products
for one ("bf16x3"): about 16 bits of 24, and still several times as many products as fp32 has in that time.

Without a copy a weight is transposed at each call. Inside `torch.compile` linear layers use none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sdfast import _library, dispatch, packing

# The milliseconds that a copy saves a byte at each call, about: it only makes these copies and Winograd's
# comparable.
_SAVED_MS = 1e-7


def _pack_fake(weight: Tensor, gated: bool) -> Tensor:
    raise NotImplementedError("the size of a packed weight depends on the CPU")


_pack_op = _library.define_native("pack_tiles(Tensor weight, bool gated) -> Tensor", _pack_fake)


def are_there() -> bool:
    """Whether the CPU has AMX and its library is loaded."""
    return _library.has_kernel("bf16_tiles", "cpu")


def serve(dtype: torch.dtype) -> bool:
    """Whether values of this type are multiplied on tiles here."""
    return are_there() and (dtype is torch.bfloat16 or split(dtype))


def split(dtype: torch.dtype) -> bool:
    """Whether they are multiplied there as sums of two bf16."""
    return are_there() and dtype is torch.float32 and dispatch.numerics() == "fast"


def kept(
    weight: Tensor, kind: str, kernels: Callable[[Tensor], Tensor], *, taps: int, gated: bool = False
) -> Tensor | None:
    """The copy of a weight, or None where there is none to be kept.

    Args:
        weight: (rows, channels, ...), of any layout. Not of its first call: what is made anew for each call,
            as by a parametrization or autocast, would be copied each time.
        kind: of `packing.packed`.
        kernels: gives it as (phases, rows, kernel_height, kernel_width, channels).
        taps: phases x kernel_height x kernel_width.
        gated: for GEGLU.
    """
    multiplied = weight.dtype in (torch.bfloat16, torch.float32) and are_there()
    if not multiplied or not packing.is_lasting(weight) or not packing.is_known(weight):
        return None
    halves = 2 if gated else 1
    rows, channels = halves * _whole(weight.shape[0] // halves, 64), _whole(weight.shape[1], 32)
    nbytes = weight.element_size() * taps * rows * channels  # two bf16 for one of fp32
    if not packing.affordable(weight, kind, nbytes, _SAVED_MS):
        return None

    def pack(weight: Tensor) -> Tensor:
        return cast(Tensor, _pack_op(kernels(weight).contiguous(), gated))

    return packing.packed(weight, kind, pack, _SAVED_MS)


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step
