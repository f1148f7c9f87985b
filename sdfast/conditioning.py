"""What the U-Net is told about the text: CLIP's hidden states, and for SDXL pooled text and picture sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.models import CLIPTextEncoder
from sdfast.tokenizer import CLIPTokenizer


@dataclasses.dataclass(frozen=True)
class TextCondition:
    """What one prompt, or a batch of them, becomes. B is 1, N, or with guidance 2N."""

    hidden_states: Tensor  # (B, L, C)
    pooled: Tensor | None  # (B, E), SDXL only


class TextConditioner:
    """The text side of one run of a pipeline. Each distinct text goes through the encoders once, alone.

    Alone, so that what a prompt becomes does not depend, not even in its last bit, on the prompts beside it.
    """

    def __init__(
        self,
        encoders: Sequence[CLIPTextEncoder],
        tokenizers: Sequence[CLIPTokenizer],
        *,
        is_xl: bool,
        zero_empty_negative: bool,
    ) -> None:
        """
        Args:
            encoders, tokenizers: one of each, two for SDXL.
            is_xl: SDXL reads the penultimate states of both encoders, side by side, and the second's pooled
                text.
            zero_empty_negative: an absent negative prompt is zeros, not the empty text.
        """
        self._parts = list(zip(tokenizers, encoders, strict=True))
        self._is_xl = is_xl
        self._zero_empty_negative = zero_empty_negative
        self._seen: dict[str, TextCondition] = {}

    def batch(
        self, prompts: Sequence[str], negatives: Sequence[str | None], *, guided: bool
    ) -> TextCondition:
        """The condition of N images: (N, ...), or if `guided` (2N, ...) with the negative half first."""
        positive = [self._encode(prompt) for prompt in prompts]
        negative: list[TextCondition] = []
        if guided:
            negative = [self._negative(text, like) for text, like in zip(negatives, positive, strict=True)]
        rows = [*negative, *positive]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextCondition(
            torch.cat([row.hidden_states for row in rows]), torch.cat(pooled) if pooled else None
        )

    def _negative(self, text: str | None, like: TextCondition) -> TextCondition:
        if text is None and self._zero_empty_negative:
            pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
            return TextCondition(torch.zeros_like(like.hidden_states), pooled)
        return self._encode(text or "")

    def _encode(self, text: str) -> TextCondition:
        if text not in self._seen:
            self._seen[text] = self._encode_anew(text)
        return self._seen[text]

    def _encode_anew(self, text: str) -> TextCondition:
        states, pooled = [], None
        for tokenizer, encoder in self._parts:
            longest = min(tokenizer.max_length, encoder.config.max_position_embeddings)
            ids = tokenizer([text], max_length=longest)
            device = encoder.text_model.final_layer_norm.weight.device
            encoding = encoder(ids.to(device))
            if self._is_xl:
                states.append(encoding.hidden_states[-2])
                pooled = encoding.pooled
            else:
                states.append(encoding.last_hidden_state)
        return TextCondition(torch.cat(states, dim=-1), pooled)
