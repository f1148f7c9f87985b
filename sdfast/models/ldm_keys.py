"""Names in a single-file latent-diffusion checkpoint, and what they are called in the component models.

The single file numbers modules in the order they run (input_blocks.7.1), the models name them by resolution
(down_blocks.2.attentions.0). Which number is what follows from the names alone: a block that holds `op` is a
downsampler and closes its resolution, one that holds `conv` an upsampler. So no configuration is needed, and
any depth and width converts.

    single file                                     component
    model.diffusion_model.*                         unet
    first_stage_model.*                             vae
    cond_stage_model.transformer.*                  text_encoder (SD 1, CLIP)
    cond_stage_model.model.*                        text_encoder (SD 2, OpenCLIP)
    conditioner.embedders.0.transformer.*           text_encoder (SDXL, CLIP)
    conditioner.embedders.1.model.*                 text_encoder_2 (SDXL, OpenCLIP)
    model_ema.*, optimizer, noise schedule          ignored

A name that fits no rule is passed on unchanged, so that the loader reports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor

Form = Literal["same", "matrix", "transposed", "first third", "second third", "last third"]


class Source(NamedTuple):
    """Where a parameter comes from: a tensor of the single file, and what to take of it."""

    key: str
    form: Form = "same"

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter; a view unless it is transposed."""
        if self.form == "same":
            return tensor
        if self.form == "matrix":  # a 1x1 convolution (M, K, 1, 1), or already a matrix (M, K)
            return tensor.flatten(1)
        if self.form == "transposed":
            return tensor.T.contiguous()
        return tensor.chunk(3)[("first third", "second third", "last third").index(self.form)]


Mapping = dict[str, Source]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_MID = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_OUTSIDE_LAYERS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def unet_mapping(keys: Iterable[str]) -> Mapping:
    """Parameter of the U-Net -> its source, for the keys of a single file."""
    names = _without_prefix(keys, UNET_PREFIX)
    modules = dict(_UNET_OUTSIDE_BLOCKS)
    modules.update(_unet_blocks(names, "input_blocks", "down_blocks", "downsamplers", "op"))
    modules.update(_unet_blocks(names, "output_blocks", "up_blocks", "upsamplers", "conv"))
    mapping: Mapping = {}
    for name in names:
        module, rest = _split_module(name, modules)
        new = modules.get(module, module) + rest
        if ".resnets." in new:
            new = _rename_inside(new, r"(.*\.resnets\.\d+\.)(.*)(\.\w+)", _UNET_RESNET)
        mapping[new] = Source(UNET_PREFIX + name)
    return mapping


def _unet_blocks(
    names: Iterable[str], side: str, new_side: str, resamplers: str, resampler: str
) -> dict[str, str]:
    """Module of one side of the U-Net -> its new name.

    `side`.N holds a resnet, perhaps with an attention, perhaps with an upsampler after them; or it is a
    downsampler. A resampler is told by its convolution's name; it ends a resolution.
    """
    held: dict[int, dict[int, str]] = {}  # N -> position in block N -> the name of a layer there
    for name in names:
        match = re.match(rf"{side}\.(\d+)\.(\d+)\.(\w+)", name)
        if match:
            held.setdefault(int(match[1]), {})[int(match[2])] = match[3]
    if side == "input_blocks":
        held.pop(0, None)  # conv_in
    modules: dict[str, str] = {}
    level = layer = 0
    for number in sorted(held):
        closes = False
        for position, layer_name in held[number].items():
            if layer_name == resampler:
                modules[f"{side}.{number}.{position}.{resampler}"] = f"{new_side}.{level}.{resamplers}.0.conv"
                closes = True
            else:
                kind = "resnets" if position == 0 else "attentions"
                modules[f"{side}.{number}.{position}"] = f"{new_side}.{level}.{kind}.{layer}"
        level, layer = (level + 1, 0) if closes else (level, layer + 1)
    return modules


def _split_module(name: str, modules: dict[str, str]) -> tuple[str, str]:
    """The longest beginning that is in `modules`, and the rest: "input_blocks.1.0", ".in_layers.0.weight"."""
    module = name
    while module and module not in modules:
        module = module.rpartition(".")[0]
    return (module, name[len(module) :]) if module else (name, "")


def ldm_names(unet: Any) -> dict[str, str]:
    """Module of a `UNet2DCondition` -> its name in a single file: the other direction."""
    blocks = {ours: theirs for theirs, ours in _UNET_OUTSIDE_BLOCKS.items()}
    number = 0  # input_blocks.0 is conv_in
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            number += 1
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
        number += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for i, up in enumerate(unet.up_blocks):
        for j in range(len(up.resnets)):
            number += 1
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
        position = 1 if up.attentions is None else 2
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{position}.conv"
    inside_resnet = {ours: theirs for theirs, ours in _UNET_RESNET.items()}
    names = {}
    for name, _ in unet.named_modules():
        block, rest = _split_module(name, blocks)
        inner = rest.removeprefix(".")
        if ".resnets." in name and inner in inside_resnet:
            rest = f".{inside_resnet[inner]}"
        names[name] = blocks.get(block, block) + rest
    return names


def vae_mapping(keys: Iterable[str]) -> Mapping:
    """Parameter of the VAE -> its source. Its training losses and averages are left out."""
    names = [n for n in _without_prefix(keys, VAE_PREFIX) if not n.startswith(("loss.", "model_ema."))]
    levels = 1 + max(
        (int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", n) for n in names) if m), default=0
    )
    mapping: Mapping = {}
    for name in names:
        new = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
        new = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", new)
        # The decoder's levels are numbered by resolution there and in running order here.
        for old_part, new_part in (("block", "resnets"), ("upsample", "upsamplers.0")):
            new = re.sub(
                rf"^decoder\.up\.(\d+)\.{old_part}\.",
                lambda m, part=new_part: f"decoder.up_blocks.{levels - 1 - int(m[1])}.{part}.",  # type: ignore[misc]
                new,
            )
        new = new.replace(".nin_shortcut.", ".conv_shortcut.").replace(
            "coder.norm_out.", "coder.conv_norm_out."
        )
        new = re.sub(r"\.mid\.(block_1|block_2|attn_1)\.", lambda m: f".mid_block.{_VAE_MID[m[1]]}.", new)
        form: Form = "same"
        if ".attentions.0." in new:
            new = _rename_inside(new, r"(.*\.attentions\.0\.)(.*)(\.\w+)", _VAE_ATTENTION)
            if new.endswith(".weight") and "group_norm" not in new:
                form = "matrix"
        mapping[new] = Source(VAE_PREFIX + name, form)
    return mapping


def clip_mapping(keys: Iterable[str], prefix: str) -> Mapping:
    """Parameter of a text encoder stored by transformers -> its source, for the keys below `prefix`."""
    names = _without_prefix(keys, prefix)
    return {current_name(name): Source(prefix + name) for name in names if not name.endswith(".position_ids")}


def open_clip_mapping(
    keys: Iterable[str], prefix: str, *, with_projection: bool, drop_last_layers: int = 0
) -> Mapping:
    """Parameter of a text encoder stored by OpenCLIP -> its source, for the keys below `prefix`.

    Args:
        with_projection: keep text_projection; OpenCLIP multiplies by it from the right, so it is transposed.
        drop_last_layers: leave these out. SD 2 was trained on the state before the last layer.
    """
    names = _without_prefix(keys, prefix)
    layer_of = {name: re.match(r"transformer\.resblocks\.(\d+)\.(.*)", name) for name in names}
    layers = 1 + max((int(match[1]) for match in layer_of.values() if match), default=-1) - drop_last_layers
    mapping: Mapping = {}
    for name, match in layer_of.items():
        if match is None:
            if name == "text_projection":
                if with_projection:
                    mapping["text_projection.weight"] = Source(prefix + name, "transposed")
            elif name not in ("logit_scale", "attn_mask"):  # of the contrastive training, and a constant
                mapping[_OPEN_CLIP_OUTSIDE_LAYERS.get(name, name)] = Source(prefix + name)
            continue
        if int(match[1]) >= layers:
            continue
        layer, inner = f"text_model.encoder.layers.{match[1]}", match[2]
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = inner.removeprefix("attn.in_proj_")
            mapping[f"{layer}.self_attn.q_proj.{kind}"] = Source(prefix + name, "first third")
            mapping[f"{layer}.self_attn.k_proj.{kind}"] = Source(prefix + name, "second third")
            mapping[f"{layer}.self_attn.v_proj.{kind}"] = Source(prefix + name, "last third")
        else:
            module, _, kind = inner.rpartition(".")
            mapping[f"{layer}.{_OPEN_CLIP_LAYER.get(module, module)}.{kind}"] = Source(prefix + name)
    return mapping


def current_name(name: str) -> str:
    """A parameter's name as our models have it, for the names that component files have used over the years.

    diffusers before 0.13 called the VAE's attention query, key, value and proj_attn; transformers from 5 on
    drops "text_model." from a text encoder without projection.
    """
    name = re.sub(r"\.(query|key|value)\.", lambda m: f".to_{m[1][0]}.", name).replace(
        ".proj_attn.", ".to_out.0."
    )
    if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name


def _without_prefix(keys: Iterable[str], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _rename_inside(name: str, pattern: str, table: dict[str, str]) -> str:
    """Rename the middle of the three parts that `pattern` cuts `name` into."""
    match = re.fullmatch(pattern, name)
    return match[1] + table.get(match[2], match[2]) + match[3] if match else name
