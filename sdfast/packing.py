"""Packed copies of weights, in the layouts the CPU kernels read, made once, dropped when the weight changes.

A copy belongs to the weight tensor and dies with it. It is made anew when the weight's version counter has
moved (an optimiser's step, `load_state_dict`), its storage is another, or the values at a few places differ:
`weight.data += ...`, the way LoRAs are merged, moves no counter, nor does a write to an inference tensor.
Where such a write touches few elements, call `clear`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdfast import _library

State = tuple[object, ...]

_fingerprint = _library.define_native("fingerprint(Tensor weight) -> int", lambda weight: 0)


@dataclasses.dataclass
class _Copies:
    """The copies of one weight, by kind, and the state of the weight they were made from."""

    state: State
    by_kind: dict[str, Tensor]


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(weight: Tensor, kind: str, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The copy of `weight` of this kind, made by `pack` where there is none that is current.

    Threads that ask at the same time may both make one; either serves.
    """
    state = _state_of(weight)
    copies = _copies.get(weight)
    if copies is None or copies.state != state:
        copies = _Copies(state, {})
        _copies[weight] = copies
    copy = copies.by_kind.get(kind)
    if copy is None:
        copy = pack(weight.detach())
        copies.by_kind[kind] = copy
    return copy


def can_pack(weight: Tensor) -> bool:
    """Whether the weight has values to copy: a subclass or a fake tensor may have none."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided


def is_lasting(weight: Tensor) -> bool:
    """Whether its copy serves again: a view is a new tensor at every call, and would be packed each time."""
    return torch.compiler.is_compiling() or not weight._is_view()


def _state_of(weight: Tensor) -> State:
    version = 0 if weight.is_inference() else weight._version
    layout = (weight.dtype, weight.shape, weight.stride())
    return version, weight.data_ptr(), _fingerprint(weight.detach()), layout


def packed_bytes() -> int:
    """Memory that packed copies of living weights hold."""
    return sum(
        copy.numel() * copy.element_size()
        for copies in list(_copies.values())
        for copy in list(copies.by_kind.values())
    )


def clear() -> None:
    """Drop every packed copy; the next call makes those it needs."""
    _copies.clear()
