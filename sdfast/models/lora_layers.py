"""Layers with a low-rank update beside their weight (Hu et al. 2021, eq. 3): y = W x + b + s B A x.

A is (r, K), B (M, r), s a number. For a convolution A has its kernel, stride and padding, and r channels
come out; B is a 1x1 convolution. `residual` of `ops.linear` and `ops.conv2d` is added before the activation,
so the update is one, and whatever a layer fuses stays fused.

A layer comes to its update by changing its class: its own parameters, names and place stay as they are. What
is added is called `lora_A.weight` and `lora_B.weight`, as in peft's files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sdfast import ops
from sdfast.models import layers


class _Factor(nn.Module):
    """One of the two factors: a weight, whose name in a file is <layer>.lora_A.weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def product(up: Tensor, down: Tensor, shape: torch.Size) -> Tensor:
    """B A as a weight of this shape, in fp32, or in fp64 where they are."""
    wide = torch.promote_types(up.dtype, torch.float32)
    return (up.to(wide).flatten(1) @ down.to(wide).flatten(1)).view(shape)


@torch.no_grad()
def write_weight(weight: Tensor, before: Tensor, update: Tensor) -> None:
    """weight = before + update in place, summed in the wider dtype of these and rounded once."""
    weight.copy_(before.to(update.device) + update)


class LoraLayer(nn.Module):
    """What adapted layers share.

    Attributes:
        lora_A, lora_B: the factors.
        lora_alpha: α; s = scale · α / r.
        lora_scale: of the user, 1 by default.
        lora_before: the weight's values before the update was merged into it; None while it runs beside it.
    """

    weight: Tensor
    lora_A: _Factor
    lora_B: _Factor
    lora_alpha: float
    lora_scale: float
    lora_before: Tensor | None

    @property
    def lora_rank(self) -> int:
        """r."""
        return self.lora_A.weight.shape[0]

    @property
    def lora_factor(self) -> float:
        """s."""
        return self.lora_scale * self.lora_alpha / self.lora_rank

    def lora_update(self) -> Tensor:
        """s B A, of the weight's shape."""
        return self.lora_factor * product(self.lora_B.weight, self.lora_A.weight, self.weight.shape)


def _plus(update: Tensor, residual: Tensor | None, x: Tensor) -> Tensor:
    """update + residual in the dtype of x; under autocast in the dtype that it chose."""
    if update.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        update = update.to(x.dtype)  # of fp32 factors beside half-precision weights
    return update if residual is None else update + residual


def _linear_update(layer: LoraLayer, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """`residual` with s B A x, (..., K) -> (..., M); as it is where the update is in the weight."""
    if layer.lora_before is not None:
        return residual
    down, up = layer.lora_A.weight, layer.lora_B.weight
    hidden = ops.linear(x.to(down.dtype), down) * layer.lora_factor
    return _plus(ops.linear(hidden, up), residual, x)


class LoraLinear(LoraLayer, layers.Linear):
    """A linear layer with its update."""

    def forward(
        self, input: Tensor, *, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(..., K) -> (..., M)."""
        return super().forward(input, activation=activation, residual=_linear_update(self, input, residual))


class LoraPointwiseConv(LoraLayer, layers.PointwiseConv):
    """A 1x1 convolution of tokens with its update."""

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(N, L, C_in) -> (N, L, C_out)."""
        return super().forward(input, residual=_linear_update(self, input, residual))


class LoraConv2d(LoraLayer, layers.Conv2d):
    """A convolution with its update."""

    def forward(
        self,
        input: Tensor,
        *,
        padding: tuple[int, int, int, int] | None = None,
        upsample: bool = False,
        time_embedding: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.lora_before is None:
            residual = self._update(input, residual, padding=padding, upsample=upsample, skip=skip)
        return super().forward(
            input, padding=padding, upsample=upsample, time_embedding=time_embedding, residual=residual,
            skip=skip,
        )  # fmt: skip

    def _update(
        self,
        x: Tensor,
        residual: Tensor | None,
        *,
        padding: tuple[int, int, int, int] | None = None,
        upsample: bool = False,
        skip: Tensor | None = None,
    ) -> Tensor:
        """`residual` with s B A x."""
        down, up = self.lora_A.weight, self.lora_B.weight
        hidden = self.convolve(
            x.to(down.dtype), down, None, padding=padding, upsample=upsample,
            skip=None if skip is None else skip.to(down.dtype),
        )  # fmt: skip
        update = ops.conv2d(hidden * self.lora_factor, up)
        assert isinstance(update, Tensor)
        return _plus(update, residual, x)


ADAPTED: dict[type[nn.Module], type[LoraLayer]] = {
    layers.Linear: LoraLinear,
    layers.Conv2d: LoraConv2d,
    layers.PointwiseConv: LoraPointwiseConv,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def adapt(layer: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None) -> None:
    """Give a layer of a kind in `ADAPTED` an update that is zero: A as peft draws it, B zeros."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    down = torch.empty((rank, *weight.shape[1:]), dtype=dtype or weight.dtype, device="cpu")
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # there, so that a seed means the same on every device
    down = down.to(weight.device)
    up = down.new_zeros((weight.shape[0], rank, *(1 for _ in weight.shape[2:])))
    kind = ADAPTED[type(layer)]
    layer.__class__ = kind
    assert isinstance(layer, LoraLayer)
    layer.lora_A, layer.lora_B = _Factor(down), _Factor(up)
    layer.lora_alpha, layer.lora_scale, layer.lora_before = alpha, 1.0, None


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of a model, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def restore(layer: LoraLayer) -> None:
    """Take the update away; the weight stays as it is."""
    for name in ("lora_A", "lora_B", "lora_alpha", "lora_scale", "lora_before"):
        delattr(layer, name)
    layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]
