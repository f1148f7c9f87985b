"""LoRA (Hu et al. 2021): train, keep, merge low-rank updates of a model's weights.

    W' = W + s B A,    s = scale · α / r,    A (r, K),    B (M, r)

    factors = add_lora(unet, rank=8)             # the rest is frozen; B is zero, so nothing changes yet
    optimizer = torch.optim.AdamW(factors)
    ...
    save_lora("my-lora", {"unet": unet})         # for diffusers, peft and StableDiffusion.load_lora
    remove_lora(unet, merge=True)                # or: the model itself, with W' for W

While it is trained an update runs beside its layer. For inference it is merged into the weight, which costs
nothing and leaves every layer to the kernels that serve it: `merge_lora`, or `StableDiffusion.load_lora`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sdfast.lora_files import read_lora, save_lora
from sdfast.models import CLIPTextEncoder, UNet2D, UNet2DCondition
from sdfast.models.lora_layers import ADAPTED, LoraLayer, adapt, adapted, restore, write_weight
from sdfast.request import check_count

__all__ = [
    "add_lora",
    "load_lora",
    "load_lora_state_dict",
    "lora_state_dict",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_lora_scale",
    "unmerge_lora",
]

_UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[nn.Parameter]:
    """Give layers of a model an update of their weights that can be trained, and freeze everything else.

    Args:
        model: a U-Net or text encoder of `sdfast.models`.
        rank: r.
        alpha: α, the rank when None.
        targets: which linear layers and convolutions, by the ends of their names: "to_q", "ff.net.2",
            "resnets.0.conv1"; when None the projections of every attention.
        dtype: of the factors; the layer's own when None. fp32 ones may stand beside half-precision weights.

    Returns:
        The factors, A and B of each layer in turn: the parameters that are left to train. A is drawn by
        torch's generator, as peft draws it, B is zero.

    Raises:
        TypeError: another kind of model. (The VAE's decoder in bands would not see an update.)
        ValueError: a number out of its range, a target that names no linear layer or convolution, or layers
            that have an update already. Nothing was changed then.
    """
    if not isinstance(model, (UNet2D, UNet2DCondition, CLIPTextEncoder)):
        raise TypeError(f"model: got {type(model).__name__}, expected a U-Net or text encoder of sdfast")
    check_count("rank", rank)
    alpha = rank if alpha is None else alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: got {alpha}, expected a finite number above 0")
    if targets is None:
        targets = _TEXT_TARGETS if isinstance(model, CLIPTextEncoder) else _UNET_TARGETS
    if next(adapted(model), None) is not None:
        raise ValueError("model: has LoRA already; remove_lora it first")
    layers = _targeted(model, targets)
    model.requires_grad_(False)
    for layer in layers:
        adapt(layer, rank, float(alpha), dtype)
    return [factor.weight for _, layer in adapted(model) for factor in (layer.lora_A, layer.lora_B)]


def _targeted(model: nn.Module, targets: Sequence[str]) -> list[nn.Module]:
    """The layers that end in one of these names."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets: got {targets!r}, expected a list of names")
    named = {name: module for name, module in model.named_modules() if type(module) in ADAPTED}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in named):
            ends = sorted({_ending(name) for name in named})
            raise ValueError(
                f"targets: {target!r} names no linear layer or convolution; names end in {', '.join(ends)}"
            )
    return [
        module
        for name, module in named.items()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    ]


def _ending(name: str) -> str:
    """What a target would be called: "to_q", "to_out.0"."""
    rest, _, last = name.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{last}" if last.isdigit() else last


def _all_adapted(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    layers = list(adapted(model))
    if not layers:
        raise ValueError(f"model: this {type(model).__name__} has no LoRA; add_lora gives it one")
    return layers


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors by peft's names, "<layer>.lora_A.weight" and "<layer>.lora_B.weight". No copies.

    Raises:
        ValueError: the model has no LoRA.
    """
    return {
        f"{name}.{which}.weight": getattr(layer, which).weight.detach()
        for name, layer in _all_adapted(model)
        for which in ("lora_A", "lora_B")
    }


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the factors of a model to what `lora_state_dict` of one like it returned; α is the model's.

    For a file, whose B holds α / r already, there is `load_lora`.

    Raises:
        ValueError: names or shapes differ, or the update is merged; nothing was changed then.
    """
    _check_fits(model, state, "state")
    for name, factor in lora_state_dict(model).items():
        factor.copy_(state[name])


def load_lora(path: str | os.PathLike[str], parts: Mapping[str, nn.Module]) -> None:
    """Set the factors of models to those of a file, to go on training: B A α / r is then what the file says.

    Args:
        path: of `save_lora`, or as diffusers, peft or kohya's scripts write it.
        parts: "unet", "text_encoder", "text_encoder_2", all that the file is for; `add_lora` has given each
            the file's layers and rank. α may be another one.

    Raises:
        CheckpointError: as `StableDiffusion.load_lora`.
        ValueError: layers or ranks differ, or an update is merged. Nothing was changed in either case.
    """
    updates = read_lora(path, parts)
    states: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for place, update in updates.items():
        layer, down, up = parts[place.part].get_submodule(place.layer), update.down, update.up
        if isinstance(layer, LoraLayer):
            down = down.reshape(-1, *layer.lora_A.weight.shape[1:])  # files may leave out a 1x1 kernel
            up = up.reshape(len(up), -1, *layer.lora_B.weight.shape[2:])
            wide = torch.promote_types(up.dtype, torch.float32)
            up = up.to(wide) * (update.factor * layer.lora_rank / layer.lora_alpha)
        for which, factor in (("lora_A", down), ("lora_B", up)):
            states[place.part][f"{place.layer}.{which}.weight"] = factor
    for part, state in states.items():
        _check_fits(parts[part], state, f"{path}: {part}")
    for part, state in states.items():
        load_lora_state_dict(parts[part], state)


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    if any(layer.lora_before is not None for _, layer in _all_adapted(model)):
        raise ValueError("model: its LoRA is merged; unmerge_lora it first")
    ours = lora_state_dict(model)
    differ = sorted(ours.keys() ^ state.keys())
    differ += [name for name in ours.keys() & state.keys() if ours[name].shape != state[name].shape]
    if differ:
        raise ValueError(
            f"{what}: is of other layers or another rank: {len(differ)} names or shapes differ, the first is"
            f" {differ[0]}"
        )


def set_lora_scale(model: nn.Module, scale: float) -> None:
    """How strongly the update counts: 0 switches it off, 1 is as trained. Merged ones are merged anew.

    A CUDA graph that was captured while the update ran beside its layers keeps the scale it saw.

    Raises:
        ValueError: the model has no LoRA, or the scale is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    for _, layer in _all_adapted(model):
        layer.lora_scale = float(scale)
        if layer.lora_before is not None:
            write_weight(layer.weight, layer.lora_before, layer.lora_update())


def merge_lora(model: nn.Module) -> None:
    """Add the update to the weights, in place: layers are plain from now on. Keeps a copy of each weight.

    Raises:
        ValueError: the model has no LoRA.
    """
    for _, layer in _all_adapted(model):
        if layer.lora_before is None:
            before = layer.weight.detach().clone()
            write_weight(layer.weight, before, layer.lora_update())
            layer.lora_before = before


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the weights are, bit for bit, what they were, and the update runs beside them.

    Raises:
        ValueError: the model has no LoRA.
    """
    for _, layer in _all_adapted(model):
        if layer.lora_before is not None:
            layer.weight.copy_(layer.lora_before)
            layer.lora_before = None


def remove_lora(model: nn.Module, *, merge: bool = False) -> None:
    """Make the layers what they were before `add_lora`. What was frozen stays frozen.

    Args:
        merge: leave the update in the weights, for good, instead of taking it out of them.

    Raises:
        ValueError: the model has no LoRA.
    """
    (merge_lora if merge else unmerge_lora)(model)
    for _, layer in _all_adapted(model):
        restore(layer)
