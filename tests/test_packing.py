"""Copies of weights: they follow the weight, die with it, and stay within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from weight_changes import CHANGES, change_weight

from sdfast import _library, dispatch, ops, packing
from sdfast.testing import relative_error

needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("conv2d_kernel", "cpu"), reason=_library.load_cpu_library().detail
)
pytestmark = needs_kernel


@pytest.fixture(autouse=True)
def no_copies() -> Iterator[None]:
    packing.clear()
    yield
    packing.clear()


def copy(weight: Tensor, kind: str = "twice", worth: float = 1.0) -> Tensor:
    return packing.packed(weight, kind, lambda values: torch.cat([values, values]), worth)


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_the_weight(change: str) -> None:
    layer = torch.nn.Conv2d(32, 40, 3, padding=1)
    x = torch.randn(1, 32, 32, 32)

    def run() -> Tensor:
        with torch.no_grad():
            return ops.conv2d(x, layer.weight, layer.bias, padding=1)

    before = run()
    assert "winograd4x4" in packing._copies[layer.weight].by_kind
    change_weight(layer, change, x)
    assert not torch.allclose(before, run())
    assert relative_error(run(), layer(x).detach()) <= 2e-5  # F(4x4)'s


def test_copies_die_with_the_weight() -> None:
    weight = torch.randn(64, 32)
    assert copy(weight).shape == (128, 32) and copy(weight) is copy(weight)
    copy(weight, "again")
    assert packing.packed_bytes() == 2 * 2 * weight.nbytes
    del weight
    assert packing.packed_bytes() == 0


def test_values_on_a_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them would wait for it, and cannot be captured in a graph: version and storage have to do."""
    monkeypatch.setattr(packing, "_fingerprint", lambda weight: pytest.fail("it was read"))
    weight = torch.empty(64, 32, device="meta")
    first = copy(weight)
    assert first is copy(weight)
    weight.add_(1)
    assert first is not copy(weight)


def test_values_are_not_read_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of Triton's, interpreted, has copies on the CPU where none was built."""
    monkeypatch.setattr(packing, "_fingerprint", lambda weight: pytest.fail("there is no kernel"))
    monkeypatch.setattr(_library, "_kernels", _library._kernels - {("fingerprint", "cpu")})
    weight = torch.zeros(64, 32)
    first = copy(weight)
    assert first is copy(weight)
    weight.add_(1)
    assert copy(weight)[0, 0] == 1


class Stream:
    """Stands in for a CUDA stream: notes what it waited for."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return self, "event"

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stream]]:
    """Makes a stream the current one, capturing or not; the memory that it reads notes so."""

    def make_current(stream: Stream, *, capturing: bool = False) -> Stream:
        monkeypatch.setattr(packing, "_current_stream", lambda weight: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return stream

    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: stream.waited.append(t))
    yield make_current


def test_another_stream_waits_for_the_copy(stream: Callable[..., Stream]) -> None:
    weight, one, other = torch.ones(64, 32), Stream(), Stream()
    stream(one)
    first = copy(weight)
    assert copy(weight) is first and one.waited == []
    stream(other)
    for _ in range(2):  # once it has, its work is in order
        assert copy(weight) is first
        event, memory = other.waited
        assert event == (one, "event") and memory is first


def test_nothing_that_a_capture_makes_is_kept(stream: Callable[..., Stream]) -> None:
    weight, one, other = torch.ones(64, 32), Stream(), Stream()
    stream(other, capturing=True)
    assert copy(weight) is not copy(weight) and packing.packed_bytes() == 0
    stream(one)
    kept = copy(weight)
    stream(other, capturing=True)
    assert copy(weight) is kept  # it was made before
    assert other.waited == []  # on what lies outside of a capture nothing in it may wait
    weight.add_(1)
    assert copy(weight)[0, 0] == 2 and packing.packed_bytes() == kept.nbytes


def test_what_is_worth_more_takes_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FREE_BYTES", 0)
    weights = [torch.randn(1000) for _ in range(4)]
    for weight in weights:
        packing.note(weight)
    budget = sum(packing._read.values())
    low, middle, high, most = weights
    assert packing.affordable(low, "twice", budget, 1.0)
    packing.packed(low, "twice", lambda values: torch.empty(budget // 4), 1.0)
    assert not packing.affordable(middle, "twice", 1, 1.0)  # no more is there, and none is worth less
    assert packing.affordable(high, "twice", budget, 2.0)
    assert packing.packed_bytes() == 0
    packing.packed(high, "twice", lambda values: torch.empty(budget // 4), 2.0)
    assert not packing.affordable(most, "twice", budget + 1, 3.0)  # more than all of it
    assert packing.packed_bytes() == budget  # nothing was dropped in vain
    assert packing.affordable(high, "twice", budget, 2.0)


def test_more_weights_are_a_larger_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FREE_BYTES", 0)
    weight, other = torch.randn(1000), torch.randn(10**6)
    nbytes = sum(packing._read.values()) + 2 * weight.nbytes
    assert not packing.affordable(weight, "twice", nbytes, 1.0)
    packing.note(other)
    assert packing.affordable(weight, "twice", nbytes, 1.0)


def test_temporary_copies_go_and_earlier_ones_stay() -> None:
    weight, other = torch.randn(4, 4), torch.randn(4, 4)
    kept = packing.packed(weight, "once", torch.clone)
    outside = packing.packed(other, "once", torch.clone)
    with pytest.raises(RuntimeError, match="out of luck"), packing.temporary([weight]):
        packing.packed(weight, "twice", lambda values: 2 * values)
        raise RuntimeError("out of luck")
    assert packing.packed(weight, "once", torch.zeros_like) is kept
    assert packing.packed(other, "once", torch.zeros_like) is outside
    assert packing.packed_bytes() == kept.nbytes + outside.nbytes


@pytest.mark.parametrize(("memory", "algorithm"), [("low", False), ("default", True), ("high", True)])
def test_use_memory(memory: str, algorithm: bool) -> None:
    x, weight = torch.randn(1, 32, 48, 48), torch.randn(32, 32, 3, 3).to(memory_format=torch.channels_last)
    with dispatch.use_memory(memory):
        y = ops.conv2d(x, weight, padding=1, backend="cpu")
    assert (packing.packed_bytes() > 0) == algorithm
    torch.testing.assert_close(y, torch.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-3)


def test_memory_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="memory: got 'tiny', expected one of low, default, high"):
        dispatch.use_memory("tiny")
    assert dispatch.memory() == "default"
