"""What the tensors of a LoRA's file are called, by whom it was written.

    unet.down_blocks.0.attentions.0.….to_q.lora_A.weight              diffusers, peft's layout
    base_model.model.down_blocks.0.….to_q.lora_A.weight               peft itself
    unet.….attn1.processor.to_q_lora.down.weight                      diffusers before 0.22, "unet." or not
    unet.….ff.net.2.lora.down.weight
    text_encoder.….self_attn.to_q_lora.down.weight, ….fc1.lora_linear_layer.down.weight
    lora_unet_down_blocks_0_….to_q.lora_down.weight, ….alpha          kohya's scripts, most files of civitai
    lora_unet_input_blocks_1_1_….to_q.lora_down.weight                the same for SDXL

down (A) comes first, up (B) second. Underscores cannot be told from dots, so kohya's names are looked up
among those that the model's layers would have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from sdfast.models import UNet2DCondition
from sdfast.models.ldm_keys import current_name, ldm_names

_KINDS = {
    "down": re.compile(
        r"(.+?)(?:\.lora_A(?:\.\w+)?|\.lora_down|(?:\.lora|_lora|\.lora_linear_layer)\.down)\.weight"
    ),
    "up": re.compile(
        r"(.+?)(?:\.lora_B(?:\.\w+)?|\.lora_up|(?:\.lora|_lora|\.lora_linear_layer)\.up)\.weight"
    ),
    "alpha": re.compile(r"(.+)\.alpha"),
}
_KOHYA_PREFIXES = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
PARTS = tuple(_KOHYA_PREFIXES)  # of a pipeline, its second text encoder last
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Place(NamedTuple):
    """A layer of a pipeline's part: "unet", "text_encoder" or "text_encoder_2"."""

    part: str
    layer: str

    def __str__(self) -> str:
        return f"{self.part}.{self.layer}"


class Names:
    """Reads the names of a file that is for these parts."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.layers: dict[Place, nn.Linear | nn.Conv2d] = {}
        self._kohya: dict[str, Place] = {}
        for part, model in parts.items():
            ldm = ldm_names(model) if isinstance(model, UNet2DCondition) else {}
            for name, module in model.named_modules():
                if not isinstance(module, (nn.Linear, nn.Conv2d)):
                    continue
                place = Place(part, name)
                self.layers[place] = module
                for prefix in _KOHYA_PREFIXES[part]:
                    for dotted in (name, ldm.get(name, name)):
                        self._kohya[f"{prefix}_{dotted.replace('.', '_')}"] = place

    def read(self, key: str) -> tuple[Place, str] | None:
        """The layer a tensor belongs to, and "down", "up" or "alpha"; None for any other name."""
        for kind, pattern in _KINDS.items():
            match = pattern.fullmatch(key)
            if match and (place := self._place(match[1])) is not None:
                return place, kind
        return None

    def _place(self, name: str) -> Place | None:
        if name in self._kohya:
            return self._kohya[name]
        name = name.removeprefix("base_model.model.")
        part, _, layer = name.partition(".")
        if part not in PARTS:  # peft itself and the oldest files do not say
            return next((found for one in PARTS if (found := self._layer(one, name))), None)
        return self._layer(part, layer)

    def _layer(self, part: str, name: str) -> Place | None:
        name = name.replace(".processor.", ".")
        before, _, last = name.rpartition(".")
        if part != "unet":
            name = current_name(f"{before}.{_OLD_TEXT_NAMES.get(last, last)}" if before else name)
        elif last == "to_out":
            name += ".0"
        place = Place(part, name)
        return place if place in self.layers else None
