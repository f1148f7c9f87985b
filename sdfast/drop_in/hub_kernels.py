"""sdfast's layers for Hugging Face's `kernels`: a mapping from layer names to forwards that run ours.

    import kernels, torch
    from sdfast.drop_in import hub_kernels

    kernels.replace_kernel_forward_from_hub(torch.nn.GroupNorm, "GroupNorm")
    kernels.register_kernel_mapping(hub_kernels.mapping())
    model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cuda")

Nothing is downloaded: the layers are this package's. `kernels` takes a layer's forward alone, so each is
stateless and reads the attributes of torch's layer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from sdfast import ops


class Linear(nn.Module):
    """`nn.Linear`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., M)."""
        return ops.linear(input, self.weight, self.bias)


class LayerNorm(nn.Module):
    """`nn.LayerNorm`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor | None
    bias: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(nn.Module):
    """`nn.GroupNorm`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        return ops.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


@dataclasses.dataclass(frozen=True)
class Repository:
    """Where `kernels` finds a layer: here."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """The layer."""
        return _LAYERS[self.layer_name]


_LAYERS: dict[str, type[nn.Module]] = {layer.__name__: layer for layer in (Linear, LayerNorm, GroupNorm)}


def mapping() -> dict[str, dict[str, Repository]]:
    """What `kernels.register_kernel_mapping` takes: the layers for the devices that this torch has."""
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    return {name: dict.fromkeys(devices, Repository(name)) for name in _LAYERS}
