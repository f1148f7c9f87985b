"""Copies of weights in the layouts that kernels read, made once, dropped when the weight changes.

Most kernels read a weight where it lies. A Winograd convolution needs it transformed, and that copy is
larger than the weight; AMX tiles are faster on one of its own size. Together the copies stay within a
budget, by default 1.0 times the weights that kernels have read, or `FREE_BYTES` where that is more
(`sdfast.dispatch.use_memory`). Where it is used up, a copy that is worth more a byte takes the place of
those worth less, so a model's first two calls settle which layers have one; until then a layer's bits may
change from one call to the next.

A copy belongs to the weight tensor and dies with it. It is made anew when the weight's version counter has
moved (an optimiser's step, `load_state_dict`), its storage is another, or the values at a few places differ:
`weight.data += ...`, the way LoRAs are merged, moves no counter, nor does a write to an inference tensor.
Where such a write touches few elements, call `clear`; on a GPU wherever there was one, as no values are read
there: that would wait for the device, and could not be captured in a graph. Nor are they on a CPU without the
compiled library.

On a GPU a stream waits for a copy that another one made. While a graph is captured none is kept that is made:
its memory would be the graph's, and its values be there only after a replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdfast import _library, dispatch

State = tuple[object, ...]

# Copies of fewer bytes are made in any case: less than the activations of a decoder to 512x512 take.
FREE_BYTES = 1 << 30

_clears = 0
_fingerprint = _library.define_native("fingerprint(Tensor weight) -> int", lambda weight: 0)


@dataclasses.dataclass
class _Copy:
    """A copy, the milliseconds it saves a byte at each call, and on a GPU when it is there, and who knows."""

    values: Tensor
    worth: float
    made: torch.cuda.Event | None = None
    streams: set[torch.cuda.Stream] = dataclasses.field(default_factory=set)

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let the stream's next work read it, and its memory outlast that work."""
        if stream not in self.streams and self.made is not None:
            stream.wait_event(self.made)
            self.values.record_stream(stream)
            self.streams.add(stream)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


@dataclasses.dataclass
class _Copies:
    """The copies of one weight, by kind, and the state of the weight they were made from."""

    state: State
    by_kind: dict[str, _Copy]


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The bytes of every living weight that a kernel has read.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Where a copy was refused, by kind: how many weights were known, and its worth. Not asked again before one of
# them has grown.
_refused: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Held wherever these are changed or gone through: two threads may run two models.
_lock = threading.RLock()


def note(weight: Tensor) -> None:
    """Count a weight that a kernel reads; the budget grows with it."""
    nbytes = weight.numel() * weight.element_size()
    with _lock:
        if _read.get(weight) != nbytes:  # a module's `to` changes the dtype of the same parameter
            _read[weight] = nbytes


def is_known(weight: Tensor) -> bool:
    """Whether a kernel has read this very tensor before."""
    with _lock:
        return weight in _read


def affordable(weight: Tensor, kind: str, nbytes: int, worth: float) -> bool:
    """Whether the budget holds a copy of this size; copies that are worth less a byte make room for it.

    Args:
        worth: the milliseconds it saves a byte at each call, measured or estimated; inf for one that is
            not to be given up.
    """
    if dispatch.memory() != "default":
        return dispatch.memory() == "high"
    with _lock:
        copies = _copies.get(weight)
        if copies is not None and kind in copies.by_kind:
            return True
        note(weight)
        known, refused_worth = _refused.get(weight, {}).get(kind, (-1, -math.inf))
        if known == len(_read) and worth <= refused_worth:
            return False
        if _make_room(packed_bytes() + nbytes - max(FREE_BYTES, sum(_read.values())), worth):
            return True
        _refused[weight] = {**_refused.get(weight, {}), kind: (len(_read), worth)}
        return False


def _make_room(excess: int, worth: float) -> bool:
    """Drop copies that are worth less until `excess` bytes are free, those worth least first; or none."""
    lesser = sorted(
        (copy.worth, -copy.nbytes, id(of), name, of)
        for of, copies in _copies.items()
        for name, copy in copies.by_kind.items()
        if copy.worth < worth
    )
    if excess > -sum(size for _, size, *_ in lesser):
        return False
    for _, size, _, name, of in lesser:
        if excess <= 0:
            break
        del _copies[of].by_kind[name]
        excess += size
    return True


def packed(weight: Tensor, kind: str, pack: Callable[[Tensor], Tensor], worth: float = math.inf) -> Tensor:
    """The copy of `weight` of this kind, made by `pack` where there is none that is current.

    Threads that ask at the same time may both make one; either serves.
    """
    state, stream = state_of(weight), _current_stream(weight)
    # What was made before a capture is there: torch.cuda.graph waits for the device as it begins.
    is_captured = stream is not None and torch.cuda.is_current_stream_capturing()
    with _lock:
        copies = _copies.get(weight)
        if copies is None or copies.state != state:
            copies = _Copies(state, {})
            if not is_captured:
                _copies[weight] = copies
        copy = copies.by_kind.get(kind)
    if copy is None:
        copy = _Copy(pack(weight.detach()), worth)
        if is_captured:
            return copy.values
        if stream is not None:
            copy.made = stream.record_event()
            copy.streams.add(stream)
        with _lock:
            copies.by_kind[kind] = copy
    elif stream is not None and not is_captured:
        copy.wait(stream)
    return copy.values


def _current_stream(weight: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(weight.device) if weight.device.type == "cuda" else None


def is_lasting(weight: Tensor) -> bool:
    """Whether its copy serves again: a view is a new tensor at every call, and would be packed each time.

    While a trace looks on, nothing's does.
    """
    return not weight._is_view() and not is_traced()


def is_traced() -> bool:
    """Whether torch.jit.trace or torch.func looks on, where nothing is kept or found.

    A trace would hold it for good, and neither can take a fingerprint, which is a number.
    """
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def state_of(weight: Tensor) -> State:
    """What changes when a weight is written to, as far as it can be told (see above), and by `clear`."""
    version = 0 if weight.is_inference() else weight._version
    layout = (weight.dtype, weight.shape, weight.stride())
    sampled = weight.device.type == "cpu" and _library.has_kernel("fingerprint", "cpu")
    sample = _fingerprint(weight.detach()) if sampled else None
    return _clears, version, weight.data_ptr(), sample, layout


def copies_of(weights: Iterable[Tensor]) -> list[Tensor]:
    """All copies of these weights, for who reads them by address: as long as it holds them they stay."""
    with _lock:
        known = [_copies[weight] for weight in weights if weight in _copies]
        return [copy.values for copies in known for copy in copies.by_kind.values()]


def packed_bytes() -> int:
    """Memory that copies of living weights hold."""
    with _lock:
        return sum(copy.nbytes for copies in _copies.values() for copy in copies.by_kind.values())


@contextlib.contextmanager
def temporary(weights: Iterable[Tensor]) -> Iterator[None]:
    """Drop at the end the copies of these weights that are made inside: for layers that run one by one."""
    weights = list(weights)
    with _lock:
        before = [set(_copies[weight].by_kind) if weight in _copies else set() for weight in weights]
    try:
        yield
    finally:
        with _lock:
            for weight, kinds in zip(weights, before, strict=True):
                made = set(_copies[weight].by_kind) - kinds if weight in _copies else ()
                for kind in made:
                    del _copies[weight].by_kind[kind]


def clear() -> None:
    """Drop every copy; the next call makes those it needs."""
    global _clears
    with _lock:
        _clears += 1
        _copies.clear()
        _refused.clear()
