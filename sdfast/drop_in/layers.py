"""torch's layers by our operations: how a module comes to them, and how a block calls its children.

A module is optimised by changing its class to a subclass that computes the same; its parameters, names and
hooks stay as they are. So a block's children may be anything: a layer of ours, one that LoRA has wrapped, one
with a hook or with offloaded weights. A block fuses what it may, child by child, and calls the others as they
are: `convolve`, `normalize` and `project` decide per call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sdfast import dispatch
from sdfast.models import layers

# Plain globals, so that torch.compile guards on them.
_enabled = True


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """`with sdfast.disabled():` runs optimised models as before `sdfast.optimize`, by torch's kernels.

    Process-wide: other threads' models too. Weights keep the layout that they were given.
    """
    global _enabled
    previous, _enabled = _enabled, False
    try:
        with dispatch.use_backend("torch"):
            yield
    finally:
        _enabled = previous


@dataclasses.dataclass(frozen=True)
class Replaced:
    """What an optimised module keeps under `_sdfast`.

    Attributes:
        original: its class before.
        relaid: whether its weight was contiguous, and is channels_last now.
    """

    original: type[nn.Module]
    relaid: bool


def is_enabled() -> bool:
    """Whether blocks are to fuse."""
    return _enabled


def is_plain(module: object, kind: type[nn.Module]) -> bool:
    """Whether a block may compute what `module`, a `kind`, computes: nobody listens to calls of it."""
    if type(module) is not kind:
        return False
    assert isinstance(module, nn.Module)
    listens = (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return not listens and not torch_module._has_any_global_hook()


def convolve(
    conv: Any, x: Tensor, *, time_embedding: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """conv(x), with `time_embedding` (N, C) and `residual` (N, C, H, W) added."""
    if is_plain(conv, layers.Conv2d):
        return layers.Conv2d.forward(conv, x, time_embedding=time_embedding, residual=residual)
    y = conv(x)
    if time_embedding is not None:
        y = y + time_embedding[:, :, None, None]
    return y if residual is None else y + residual


def normalize(
    norm: Any,
    x: Tensor,
    *,
    activation: Any = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """norm(x) · (1 + scale) + shift with `scale` and `shift` (N, C), then an activation, a module or None."""
    if is_plain(norm, layers.GroupNorm):
        fused = "silu" if is_plain(activation, nn.SiLU) else None
        y = layers.GroupNorm.forward(norm, x, activation=fused, scale=scale, shift=shift)
        return y if fused or activation is None else activation(y)
    y = norm(x)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y if activation is None else activation(y)


def project(
    linear: Any, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """linear(x), then the activation, None or "geglu", with `residual` added."""
    if is_plain(linear, layers.Linear):
        return layers.Linear.forward(linear, x, activation=activation, residual=residual)
    y = linear(x)
    if activation == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    if "_conv_forward" in conv.__dict__:
        return "its _conv_forward was replaced"
    if conv.groups != 1:
        return f"{conv.groups} groups of channels"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding_mode} {conv.padding}"
    if conv.stride[0] != conv.stride[1] or conv.kernel_size[0] != conv.kernel_size[1]:
        return f"kernel {conv.kernel_size}, stride {conv.stride}"
    return None


_SERVED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: layers.Conv2d,
    nn.Linear: layers.Linear,
    nn.GroupNorm: layers.GroupNorm,
    nn.LayerNorm: layers.LayerNorm,
}
ORIGINALS = {ours: theirs for theirs, ours in _SERVED.items()}


def layer_kind(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """What serves a layer of torch's instead, or None, and why not."""
    reason = _why_not_conv(module) if type(module) is nn.Conv2d else None
    return (None, reason) if reason else (_SERVED.get(type(module)), "")


def computes(module: nn.Module) -> bool:
    """Whether a module computes with parameters of its own; a table of embeddings is only looked up."""
    return not isinstance(module, nn.Embedding) and next(module.parameters(recurse=False), None) is not None
