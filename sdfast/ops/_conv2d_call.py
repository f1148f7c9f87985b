"""A call of conv2d, checked: what every backend is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sdfast.ops.group_norm import group_norm


class NormPrologue(NamedTuple):
    """GroupNorm (and SiLU) applied to the input while it is loaded.

    Attributes:
        num_groups: G, divides the input channels.
        weight, bias: (C_in,).
        eps: added to the variance.
        silu: whether SiLU follows.
        statistics: mean and rstd of the input in every group, (N, num_groups) both, fp32 (fp64 for fp64), as
            `conv2d` returned them with `stats_groups` and this eps. It is a promise: CUDA and Triton read the
            input once where they know them, with a 1x1 kernel while the tiles are loaded, and CUDA with a 3x3
            kernel too, to at most 320 channels; others find their own.
    """

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    silu: bool = True
    statistics: tuple[Tensor, Tensor] | None = None


class Call(NamedTuple):
    """The arguments of `conv2d.conv2d` that y depends on; `padding` is (left, right, top, bottom)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int, int, int]
    upsample: bool
    time_embedding: Tensor | None
    residual: Tensor | None
    skip: Tensor | None
    norm: NormPrologue | None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that y depends on and may have a gradient in; x and weight come first."""
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        added = (self.bias, self.time_embedding, self.residual, self.skip, *norm)
        return (self.x, self.weight, *(t for t in added if t is not None))

    def normalised(self, backend: str | None) -> Call:
        """The same call with its norm done, as an operation of its own, which reads `skip` as well."""
        if self.norm is None:
            return self
        groups, weight, bias, eps, silu, statistics = self.norm
        # group_norm takes them of one source alone.
        known = None if statistics is None or self.skip is not None else (statistics[0], statistics[1])
        x = group_norm(
            self.x, groups, weight, bias, eps, activation="silu" if silu else None, skip=self.skip,
            statistics=known, backend=backend,
        )  # fmt: skip
        return self._replace(x=x, skip=None, norm=None)
