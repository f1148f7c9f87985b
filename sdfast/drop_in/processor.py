"""sdfast's attention as a processor of diffusers', for who wants that and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

try:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
except ImportError as error:
    raise ImportError(
        f"{error}; SdfastAttnProcessor is for diffusers' models: pip install diffusers"
    ) from error

from sdfast.drop_in import blocks
from sdfast.drop_in.layers import is_enabled


class SdfastAttnProcessor:
    """`model.set_attn_processor(SdfastAttnProcessor())`: softmax(q kᵀ / √D) v by `sdfast.ops.attention`.

    Masks, and attention that is scaled or normalised in another way, go through diffusers' own
    `AttnProcessor2_0`, with one warning of why.
    """

    def __init__(self) -> None:
        self._stock = AttnProcessor2_0()
        self._warned = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        reason = "it is given a mask" if attention_mask is not None else blocks.Attention.why_not(attn)
        if reason is None and is_enabled() and not args and not kwargs:
            return blocks.Attention.attend(attn, hidden_states, encoder_hidden_states, None)
        if reason is not None and not self._warned:
            warnings.warn(f"SdfastAttnProcessor: an attention is left to AttnProcessor2_0, as {reason}")
            self._warned = True
        return self._stock(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )  # fmt: skip
