"""The ways in which a layer's weight gets other values, for the tests of copies that have to follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _in_place(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        weight += 1


def _data(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    """How PEFT merges a LoRA: no version counter moves."""
    weight.data += torch.randn_like(weight)


def _step(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _load_state_dict(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


def _replaced(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    layer.weight = nn.Parameter(torch.randn_like(weight))


def _to(weight: Tensor, layer: nn.Module, x: Tensor) -> None:
    """The same parameter in another dtype and back, changed meanwhile."""
    layer.double()
    layer.weight.data *= 3
    layer.to(x.dtype)


CHANGES: dict[str, Callable[[Tensor, nn.Module, Tensor], None]] = {
    "in place": _in_place, "data": _data, "step": _step, "load_state_dict": _load_state_dict,
    "replaced": _replaced, "to": _to,
}  # fmt: skip


def change_weight(layer: nn.Module, how: str, x: Tensor) -> None:
    """Give `layer.weight` other values in one of the ways of `CHANGES`; x is an input of the layer."""
    before = layer.weight.detach().clone()
    CHANGES[how](layer.weight, layer, x)
    assert not torch.equal(before, layer.weight)
