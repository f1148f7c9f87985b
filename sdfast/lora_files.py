"""Files that hold LoRAs: read whoever wrote them (`lora_names.py`), written as diffusers writes them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdfast._listed import listed
from sdfast.files import replacing
from sdfast.lora_names import PARTS, Names, Place
from sdfast.models.checkpoint import CheckpointError
from sdfast.models.lora_layers import adapted, product
from sdfast.models.weights import LazyTensor, read_file, read_json

# What diffusers, and then peft, call the file in a folder of its own.
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_FILES_IN_FOLDER = (
    _DIFFUSERS_FILE,
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid": "Tucker-decomposed LoCon", "oft_": "OFT",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """What a LoRA adds to one weight: factor · B A."""

    down: Tensor  # A, (r, ...)
    up: Tensor  # B, (M, r, ...)
    factor: float  # α / r

    def is_finite(self) -> bool:
        """Whether all of it are numbers."""
        return all(bool(t.float().isfinite().all()) for t in (self.down, self.up)) and math.isfinite(
            self.factor
        )

    def of(self, weight: Tensor) -> Tensor:
        """The update in fp32 (fp64 for fp64), where the weight is and in its shape."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = (factor.to(weight.device, wide) for factor in (self.down, self.up))
        return self.factor * product(up, down, weight.shape)


def lora_file(path: str | os.PathLike[str]) -> Path:
    """The file itself: `path`, or if that is a folder the one in it that diffusers or peft wrote.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or folder")
        return path
    for name in _FILES_IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds none of {', '.join(_FILES_IN_FOLDER)}; name the file itself")


def read_lora(path: str | os.PathLike[str], parts: Mapping[str, nn.Module]) -> dict[Place, LayerUpdate]:
    """The updates that a file holds for these models.

    Args:
        path: `.safetensors`, or a pickle without code in it; or the folder that diffusers or peft wrote.
        parts: "unet", "text_encoder", "text_encoder_2", those that there are.

    Raises:
        CheckpointError: the file is absent, damaged, of another kind of adapter, or for another model; the
            message names what does not fit.
    """
    path = lora_file(path)
    tensors = read_file(path)
    names = Names(parts)
    found: dict[Place, dict[str, LazyTensor]] = collections.defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        read = names.read(key)
        if read is None or read[1] in found[read[0]]:
            unknown.append(key)
        else:
            found[read[0]][read[1]] = tensor
    if unknown or not tensors:
        raise CheckpointError(f"{path}: {_why_unknown(unknown, len(tensors))}")
    lacking = [
        f"{place} ({which})" for place, one in found.items() for which in ("down", "up") if which not in one
    ]
    if lacking:
        raise CheckpointError(f"{path}: is incomplete: lacks a factor of {listed(lacking)}")
    misfits = []
    for place, one in found.items():
        down, up, weight = one["down"].shape, one["up"].shape, names.layers[place].weight.shape
        if not _fits(down, up, weight) or ("alpha" in one and math.prod(one["alpha"].shape) != 1):
            misfits.append(f"{place} ({up} times {down} for a weight of {tuple(weight)})")
    if misfits:
        raise CheckpointError(f"{path}: is for another model: shapes differ at {listed(misfits)}")
    configs = _configs(path)
    updates = {place: _update(path, place, one, configs.get(place.part, {})) for place, one in found.items()}
    broken = [str(place) for place, update in updates.items() if not update.is_finite()]
    if broken:
        raise CheckpointError(f"{path}: has values that are not numbers at {listed(broken)}")
    return updates


def _why_unknown(unknown: list[str], count: int) -> str:
    if not count:
        return "holds no tensors"
    for sign, kind in _OTHER_KINDS.items():
        if any(sign in key for key in unknown):
            return f"is a {kind}, of which sdfast knows nothing; it takes LoRAs (found {listed(unknown)})"
    return (
        f"is for another model, or no LoRA: {len(unknown)} of its {count} names are of no layer here:"
        f" {listed(unknown)}"
    )


def _fits(down: tuple[int, ...], up: tuple[int, ...], weight: torch.Size) -> bool:
    """Whether B A has the weight's shape; a 1x1 kernel may be left out."""
    if min(len(down), len(up)) < 2 or down[0] == 0:
        return False
    return up[1] == down[0] and _bare((up[0], *down[1:])) == _bare(weight) and len(_bare(up)) == 2


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without a 1x1 kernel."""
    return tuple(shape[:2]) if math.prod(shape[2:]) == 1 else tuple(shape)


def _update(
    path: Path, place: Place, one: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> LayerUpdate:
    # Copies: the file may be gone when they are needed again.
    down, up = one["down"].read().clone(), one["up"].read().clone()
    rank = down.shape[0]
    if config.get("use_dora") or config.get("use_qalora"):
        raise CheckpointError(f"{path}: is no plain LoRA (DoRA or QALoRA), which sdfast does not know")
    if "alpha" in one:
        return LayerUpdate(down, up, float(one["alpha"].read()) / rank)
    try:
        alpha = _configured_alpha(config, place.layer)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path}: its configuration of peft cannot be read: {error}") from error
    if alpha is None:
        return LayerUpdate(down, up, 1.0)
    return LayerUpdate(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _configured_alpha(config: Mapping[str, Any], layer: str) -> float | None:
    """α of a layer as peft finds it."""
    if config.get("lora_alpha") is None:
        return None
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    return float(next(matching, config["lora_alpha"]))


def _configs(path: Path) -> dict[str, dict[str, Any]]:
    """peft's LoraConfig of each part: in the header as diffusers keeps it, or beside the file."""
    beside = path.parent / _PEFT_CONFIG
    if path.stem == "adapter_model" and beside.is_file():
        config = read_json(beside)
        return dict.fromkeys(PARTS, config)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_DIFFUSERS_METADATA)
    try:
        flat = json.loads(text) if text else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: its {_DIFFUSERS_METADATA} is no JSON: {error}") from error
    if not isinstance(flat, dict):
        raise CheckpointError(f"{path}: its {_DIFFUSERS_METADATA} is no JSON object")
    configs: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs[part][name] = value
    return configs


def save_lora(path: str | os.PathLike[str], parts: Mapping[str, nn.Module]) -> Path:
    """Write what `add_lora` added, for `StableDiffusion.load_lora` and diffusers' `load_lora_weights`.

    α / r goes into B: programs differ in where they look for α, and all take what says nothing as s = 1. So
    the file's factors are not the model's: `load_lora` reads them back, `load_lora_state_dict` would count
    α / r twice. Where the product could be rounded, half-precision factors are written in fp32. The scale of
    `set_lora_scale` is the user's and not in the file; `StableDiffusion.load_lora` takes one.

    Args:
        path: a name that ends in .safetensors, or a folder, made if need be. The file appears, or is
            replaced, only when it is complete.
        parts: "unet", "text_encoder", "text_encoder_2", those that have LoRA.

    Returns:
        The file.

    Raises:
        ValueError: another name of a part, or a model without LoRA.
    """
    state = {}
    for part, model in parts.items():
        if part not in PARTS:
            raise ValueError(f"parts: got {part!r}, expected one of {', '.join(PARTS)}")
        layers = list(adapted(model))
        if not layers:
            raise ValueError(f"parts: {part} has no LoRA; add_lora gives it one")
        for name, layer in layers:
            factor = layer.lora_alpha / layer.lora_rank
            down, up = (one.weight.detach().cpu() for one in (layer.lora_A, layer.lora_B))
            if math.frexp(factor)[0] != 0.5:  # no power of two
                down, up = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (down, up))
            state[f"{part}.{name}.lora_A.weight"] = down.contiguous()
            state[f"{part}.{name}.lora_B.weight"] = (up * factor).contiguous()
    if not state:
        raise ValueError("parts: got none, expected a model with LoRA")
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / _DIFFUSERS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return path
