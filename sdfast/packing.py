"""Packed copies of weights, in the layouts the CPU kernels read, made once, dropped when the weight changes.

A copy belongs to the weight tensor and dies with it. It is made anew when the weight's version counter has
moved (an optimiser's step, `load_state_dict`), its storage is another, or the values at a few places differ:
`weight.data += ...`, the way LoRAs are merged, moves no counter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdfast import _library

State = tuple[int, int, int]

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


def _state_of(weight: Tensor) -> State:
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), _fingerprint(weight.detach())


def packed_bytes() -> int:
    """Memory that packed copies of living weights hold."""
    return sum(
        copy.numel() * copy.element_size() for copies in _copies.values() for copy in copies.by_kind.values()
    )


def clear() -> None:
    """Drop every packed copy; the next call makes those it needs."""
    _copies.clear()
