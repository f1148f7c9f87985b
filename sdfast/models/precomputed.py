"""What a U-Net's layers make of the text and of a timestep, computed before the loop over the steps.

Every step would project the same text to keys and values in each cross-attention; what a ResNet block adds
for the time depends on the step alone. `encode_context` and `encode_time` of a U-Net compute both once, and
its forward takes the results in place of text and timestep. They hold for the weights as they were: whoever
changes weights makes them anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Values = TypeVar("Values")


@dataclasses.dataclass(frozen=True, eq=False)
class _Precomputed(Generic[Values]):
    """
    Attributes:
        model: whose layers these are; no other takes them.
        batch: B, rows of what was encoded. N images take them if B divides N, N/B consecutive images each.
        dtype: of the values.
        by_layer: what each layer made.
    """

    model: nn.Module
    batch: int
    dtype: torch.dtype
    by_layer: Mapping[nn.Module, Values]

    def check(self, name: str, model: nn.Module, sample: Tensor) -> None:
        """Raise ValueError unless `model` can take it as its argument `name` beside `sample`."""
        if self.model is not model:
            raise ValueError(f"{name}: was encoded by another {type(self.model).__name__}, not by this one")
        if self.dtype != sample.dtype:
            raise ValueError(f"{name}: was encoded in {self.dtype}, but sample is {sample.dtype}")
        check_rows(name, self.batch, sample)


class Context(_Precomputed[tuple[Tensor, Tensor]]):
    """A text as each cross-attention reads it: keys and values, (B, heads, S, D) both."""


class TimeEmbedding(_Precomputed[Tensor]):
    """One timestep as each ResNet block adds it, (B, C)."""


@dataclasses.dataclass(frozen=True, eq=False)
class TimeTable:
    """T timesteps, each as a `TimeEmbedding`, in one matrix: a counter on the device picks one by one gather.

    Attributes:
        model, batch, dtype: those of each `TimeEmbedding`.
        channels: C of each layer.
        rows: (T, B ΣC), of every layer in turn (B, C).
    """

    model: nn.Module
    batch: int
    dtype: torch.dtype
    channels: Mapping[nn.Module, int]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> TimeEmbedding:
        return self._embedding(self.rows[step])

    def at(self, step: Tensor) -> TimeEmbedding:
        """The one that `step`, (), int64, says, which is not read on the host."""
        return self._embedding(self.rows.index_select(0, step[None])[0])

    def _embedding(self, row: Tensor) -> TimeEmbedding:
        parts = row.split([self.batch * channels for channels in self.channels.values()])
        by_layer = {
            layer: part.view(self.batch, -1) for layer, part in zip(self.channels, parts, strict=True)
        }
        return TimeEmbedding(self.model, self.batch, self.dtype, by_layer)


def _register(kind: type[_Precomputed]) -> None:
    """Let graph capture and export see the tensors inside."""

    def flatten(value: _Precomputed) -> tuple[list[object], tuple[object, ...]]:
        return list(value.by_layer.values()), (value.model, value.batch, value.dtype, *value.by_layer)

    def unflatten(values: Iterable[object], context: tuple) -> _Precomputed:
        model, batch, dtype, *layers = context
        return kind(model, batch, dtype, dict(zip(layers, values, strict=True)))

    pytree.register_pytree_node(kind, flatten, unflatten)


def _flatten_table(table: TimeTable) -> tuple[list[object], tuple[object, ...]]:
    return [table.rows], (table.model, table.batch, table.dtype, tuple(table.channels.items()))


def _unflatten_table(rows: Iterable[Any], context: tuple) -> TimeTable:
    model, batch, dtype, channels = context
    return TimeTable(model, batch, dtype, dict(channels), *rows)


_register(Context)
_register(TimeEmbedding)
pytree.register_pytree_node(TimeTable, _flatten_table, _unflatten_table)


def check_rows(name: str, rows: int, sample: Tensor) -> None:
    """Raise ValueError unless each row can serve as many consecutive images of `sample`."""
    images = sample.shape[0]
    if rows == 0 or images % rows:
        raise ValueError(f"{name}: got {rows} rows for {images} images, expected a number that divides these")


def each_repeated(rows: Tensor, images: int) -> Tensor:
    """(B, C) -> (N, C), each row for N/B consecutive images; a view where B is 1 or N."""
    return rows[:, None].expand(-1, images // len(rows), -1).flatten(0, 1)
