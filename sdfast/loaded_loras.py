"""The LoRAs that are merged into a pipeline's weights: any number, each taken out again without a trace."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdfast.lora_files import LayerUpdate, read_lora
from sdfast.lora_names import Place
from sdfast.models.lora_layers import LoraLayer, write_weight


class LoadedLoras:
    """Weights = what they were + the updates of every loaded LoRA, rounded once, in the order of loading.

    What they were is kept, on the CPU, for each weight that is changed: it comes back bit for bit.
    """

    def __init__(self) -> None:
        self._parts: dict[str, nn.Module] = {}
        self._loaded: dict[str, tuple[float, dict[Place, LayerUpdate]]] = {}
        self._before: dict[Place, Tensor] = {}

    @property
    def scales(self) -> dict[str, float]:
        """How strongly each one counts, by name, in the order of loading."""
        return {name: scale for name, (scale, _) in self._loaded.items()}

    def load(
        self, parts: Mapping[str, nn.Module], path: str | os.PathLike[str], scale: float, name: str | None
    ) -> str:
        """As `StableDiffusion.load_lora`.

        Args:
            parts: the pipeline's "unet", "text_encoder", "text_encoder_2", those that there are.
        """
        if not math.isfinite(scale):
            raise ValueError(f"scale: got {scale}, expected a finite number")
        given = Path(path).expanduser()
        name = name or (given.name if given.is_dir() else given.stem)
        if name in self._loaded:
            raise ValueError(f"name: a LoRA {name!r} is loaded already; unload_lora it, or give another name")
        if self._loaded and any(self._parts[part] is not model for part, model in parts.items()):
            raise ValueError("model: a part was replaced while a LoRA is in the old one; unload_lora first")
        updates = read_lora(given, parts)
        trained = [place for place in updates if isinstance(_layer(parts, place), LoraLayer)]
        if trained:
            raise ValueError(f"model: {trained[0]} has LoRA of add_lora; remove_lora it first")
        self._parts = dict(parts)
        self._loaded[name] = float(scale), updates
        try:
            self._write(updates, self._loaded)
        except BaseException:
            self.unload(name)
            raise
        return name

    def unload(self, name: str | None) -> None:
        """As `StableDiffusion.unload_lora`. One that was interrupted is still loaded; unload it again."""
        if name is not None and name not in self._loaded:
            raise ValueError(f"name: no LoRA {name!r} is loaded, only: {', '.join(self._loaded) or 'none'}")
        for one in [name] if name is not None else list(self._loaded):
            others = {other: loaded for other, loaded in self._loaded.items() if other != one}
            self._write(self._loaded[one][1], others)
            del self._loaded[one]  # last: until then another call finds what is left to do

    def sources(self, parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """What these parts' weights were, and the factors that are merged into them, by name.

        Unlike the weights as they are, whose last bits depend on the machine that merged them.
        """
        for part, model in parts.items():
            for name, tensor in model.state_dict().items():
                yield f"{part}.{name}", self._before.get(Place(part, name.removesuffix(".weight")), tensor)
        for i, (_, updates) in enumerate(self._loaded.values()):
            for place, update in updates.items():
                factor = torch.tensor(update.factor, dtype=torch.float64)
                for which, tensor in (("down", update.down), ("up", update.up), ("factor", factor)):
                    yield f"{i}.{place}.{which}", tensor

    @torch.no_grad()
    def _write(
        self, places: Iterable[Place], loaded: Mapping[str, tuple[float, dict[Place, LayerUpdate]]]
    ) -> None:
        """Set these weights to what these LoRAs make of them."""
        for place in places:
            weight = _layer(self._parts, place).weight
            assert isinstance(weight, Tensor)
            updates = [scale * lora[place].of(weight) for scale, lora in loaded.values() if place in lora]
            if updates:
                if place not in self._before:
                    self._before[place] = weight.detach().to("cpu", copy=True)
                write_weight(weight, self._before[place], sum(updates[1:], updates[0]))
            elif place in self._before:
                weight.copy_(self._before[place])
                del self._before[place]


def _layer(parts: Mapping[str, nn.Module], place: Place) -> nn.Module:
    return parts[place.part].get_submodule(place.layer)
