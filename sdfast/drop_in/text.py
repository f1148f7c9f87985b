"""Keys and values of a text, computed once: a pipeline gives every step the very same tensor.

Kept for each cross-attention while the text's tensor lives, neither it nor a weight was written to, as far as
`packing.state_of` can tell, and the switches of dispatch and autocast say the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdfast import dispatch, packing


class _Kept(NamedTuple):
    text: weakref.ref[Tensor]
    stamp: tuple[object, ...]
    keys_values: tuple[Tensor, Tensor]


# Beside the modules and not in them: a copied or pickled module starts without.
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_anew = contextvars.ContextVar("sdfast_text_anew", default=False)


@contextlib.contextmanager
def computed_anew() -> Iterator[None]:
    """Nothing is kept, nor what was kept used, meanwhile: a graph reads the tensors it was captured with."""
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


def keys_values(
    attention: nn.Module, text: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What `compute` gives for this text, which it is asked for once.

    Where a gradient or a trace is recorded, or versions are not counted (torch.inference_mode), it is asked
    each time.
    """
    if torch.compiler.is_compiling() or packing.is_traced() or _anew.get():
        return compute()
    if torch.is_grad_enabled() or text.is_inference():
        return compute()
    projections = (attention.get_submodule(name) for name in ("to_k", "to_v"))
    weights = [weight for module in projections for weight in module.parameters(recurse=False)]
    device = text.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stamp = (dispatch.switches(), autocast, *(packing.state_of(t) for t in (text, *weights)))
    kept = _kept.get(attention)
    if kept is not None and kept.text() is text and kept.stamp == stamp:
        return kept.keys_values
    computed = compute()
    holder = weakref.ref(attention)

    def drop(_: object) -> None:
        module = holder()
        if module is not None:
            _kept.pop(module, None)

    _kept[attention] = _Kept(weakref.ref(text, drop), stamp, computed)
    return computed


def forget(attention: nn.Module) -> None:
    """Drop what is kept for a module."""
    _kept.pop(attention, None)
