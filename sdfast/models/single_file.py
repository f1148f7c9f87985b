"""Read a whole Stable Diffusion from one LDM file (`.safetensors` or `.ckpt`).

Such a file holds no configuration. Which model it is follows from which text encoders it has; widths and
depths are read off the tensors; what leaves no trace there (head sizes, activations, the noise schedule) is
what every published model of that kind has.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sdfast.models import ldm_keys, weights
from sdfast.models.ldm_keys import UNET_PREFIX, VAE_PREFIX
from sdfast.models.text_encoder import CLIPTextConfig, CLIPTextEncoder
from sdfast.models.unet import UNet2DCondition, UNet2DConditionConfig
from sdfast.models.vae import AutoencoderKL, AutoencoderKLConfig
from sdfast.models.weights import CheckpointError, LazyTensor, Tensors

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_CLIP_HEAD_DIM = 64  # in every CLIP text encoder that Stable Diffusion uses


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A family of Stable Diffusion models and what its files do not say."""

    name: str
    pipeline: str  # diffusers' class, without "Pipeline"
    clip_prefix: str | None
    open_clip_prefix: str | None
    scaling_factor: float
    image_size: int


_KINDS = (
    _Kind(
        "SDXL", "StableDiffusionXL", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.",
        0.13025, 1024,
    ),
    _Kind("SD 2", "StableDiffusion", None, "cond_stage_model.model.", 0.18215, 768),
    _Kind("SD 1", "StableDiffusion", "cond_stage_model.transformer.", None, 0.18215, 512),
)  # fmt: skip


def load_single_file(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """Load SD 1.x, SD 2.x or SDXL, text-to-image or inpainting (9 input channels), from one file.

    Averaged weights (`model_ema.`) are left alone: they are not in most files, and where they are the plain
    ones are what other programs load.

    Args:
        dtype: what the weights become; None keeps what the file has.
        prediction_type: what the U-Net predicts: "epsilon", "v_prediction" or "sample". None guesses, and
            for SD 2 that can fail: its 512-pixel models predict epsilon, its 768-pixel ones v, with the same
            tensors. The guess is v unless the model is for inpainting or the file says its training step
            (875000: SD 2.0-base). Other kinds are taken for epsilon, unless the file has the marker `v_pred`.

    Returns:
        What `load_components` returns, without tokenizers: "unet", "vae", "text_encoder", for SDXL
        "text_encoder_2", "scheduler" (a configuration with the prediction_type) and "_class_name".

    Raises:
        CheckpointError: absent, damaged or pickled code; another kind of model; tensors that do not fit.
        ValueError: an unknown `prediction_type`.
    """
    if prediction_type not in (None, *_PREDICTION_TYPES):
        raise ValueError(
            f"prediction_type: got {prediction_type!r}, expected one of {', '.join(_PREDICTION_TYPES)}"
        )
    path = pathlib.Path(path).expanduser()
    tensors = weights.read_file(path)
    kind = _sniff(tensors, path)
    try:
        unet_config = _unet_config(tensors, kind)
        vae_config = _vae_config(tensors, kind)
        inpainting = unet_config.in_channels == 9
        prediction = prediction_type or _guess_prediction_type(tensors, kind, inpainting)
        components: dict[str, Any] = {
            "_class_name": f"{kind.pipeline}{'Inpaint' if inpainting else ''}Pipeline",
            "unet": (UNet2DCondition, unet_config, ldm_keys.unet_mapping(tensors)),
            "vae": (AutoencoderKL, vae_config, ldm_keys.vae_mapping(tensors)),
            **_text_encoders(tensors, kind),
        }
    except KeyError as error:  # a tensor that a size is read off
        raise CheckpointError(f"{path}: looks like {kind.name} but lacks {error.args[0]}") from error
    for part, value in components.items():
        if isinstance(value, tuple):
            model_class, config, mapping = value
            source = f"{path} ({part})"
            model = weights.build(model_class, config, source)
            weights.fill(model, _mapped(tensors, mapping), source, dtype=dtype, device=device)
            components[part] = model.eval()
    components["scheduler"] = _scheduler(kind, prediction)
    if "ztsnr" in tensors:  # a marker beside v_pred: trained on a schedule that ends in pure noise
        components["scheduler"]["rescale_betas_zero_snr"] = True
    return components


def _sniff(tensors: Tensors, path: pathlib.Path) -> _Kind:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    if not has(UNET_PREFIX):
        raise CheckpointError(f"{path}: no {UNET_PREFIX}*; expected a whole Stable Diffusion in LDM's names")
    for kind in _KINDS:
        if all(has(prefix) for prefix in (kind.clip_prefix, kind.open_clip_prefix) if prefix is not None):
            break
    else:
        raise CheckpointError(
            f"{path}: has a U-Net but not the text encoders of SD 1.x, SD 2.x or SDXL (the SDXL refiner, SD 3"
            " and later are not supported)"
        )
    if "edm_mean" in tensors or "edm_vpred.sigma_max" in tensors:
        raise CheckpointError(f"{path}: was trained on the EDM schedule, which is not supported")
    return kind


def _guess_prediction_type(tensors: Tensors, kind: _Kind, inpainting: bool) -> str:
    if "v_pred" in tensors:
        return "v_prediction"
    if kind.name != "SD 2" or inpainting:
        return "epsilon"
    step = tensors.get("global_step")
    return "epsilon" if step is not None and int(step.read()) == 875000 else "v_prediction"


def _scheduler(kind: _Kind, prediction_type: str) -> dict[str, Any]:
    """The noise schedule all were trained on, for the sampler each was published with (DDIM for PNDM)."""
    config = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if kind.name == "SDXL":
        return {"_class_name": "EulerDiscreteScheduler", **config}
    return {"_class_name": "DDIMScheduler", **config, "clip_sample": False, "set_alpha_to_one": False}


def _mapped(tensors: Tensors, mapping: ldm_keys.Mapping) -> Tensors:
    """The tensors of one component under its own names, still unread."""

    def lazy(source: ldm_keys.Source) -> LazyTensor:
        stored = tensors[source.key]
        shape = source.take(torch.empty(stored.shape, device="meta")).shape
        return LazyTensor(tuple(shape), lambda: source.take(stored.read()), stored.mapped)

    return {name: lazy(source) for name, source in mapping.items()}


def _unet_config(tensors: Tensors, kind: _Kind) -> UNet2DConditionConfig:
    mapping = ldm_keys.unet_mapping(tensors)

    def shape(name: str) -> tuple[int, ...]:
        return tensors[mapping[name].key].shape

    levels = _count(mapping, r"down_blocks\.(\d+)\.")
    widths = tuple(shape(f"down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels))
    depths = tuple(
        _count(mapping, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.")
        for i in range(levels)
    )
    attentive = next((i for i, depth in enumerate(depths) if depth), None)
    if attentive is None:
        raise KeyError(f"{UNET_PREFIX}input_blocks.*.attn2")
    first_attention = f"down_blocks.{attentive}.attentions.0"
    extra: dict[str, Any] = {}
    if kind.name == "SDXL":
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape("add_embedding.linear_1.weight")[1],
        }
    return UNet2DConditionConfig(
        sample_size=kind.image_size // 8,
        in_channels=shape("conv_in.weight")[1],
        out_channels=shape("conv_out.weight")[0],
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        layers_per_block=_count(mapping, r"down_blocks\.0\.resnets\.(\d+)\."),
        # Where a level has no attention its depth is not used; the middle takes the last level's.
        transformer_layers_per_block=1 if max(depths) == 1 else tuple(max(depth, 1) for depth in depths),
        cross_attention_dim=shape(f"{first_attention}.transformer_blocks.0.attn2.to_k.weight")[1],
        # The number of heads: eight in SD 1, later as many as make them 64 wide.
        attention_head_dim=8 if kind.name == "SD 1" else tuple(width // 64 for width in widths),
        use_linear_projection=len(shape(f"{first_attention}.proj_in.weight")) == 2,
        **extra,
    )


def _vae_config(tensors: Tensors, kind: _Kind) -> AutoencoderKLConfig:
    def shape(name: str) -> tuple[int, ...]:
        return tensors[VAE_PREFIX + name].shape

    levels = _count(tensors, rf"{re.escape(VAE_PREFIX)}encoder\.down\.(\d+)\.")
    return AutoencoderKLConfig(
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        latent_channels=shape("decoder.conv_in.weight")[1],
        block_out_channels=tuple(shape(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=_count(tensors, rf"{re.escape(VAE_PREFIX)}encoder\.down\.0\.block\.(\d+)\."),
        sample_size=kind.image_size,
        scaling_factor=kind.scaling_factor,
    )


def _text_encoders(tensors: Tensors, kind: _Kind) -> dict[str, tuple[type[nn.Module], CLIPTextConfig, Any]]:
    encoders = []
    if kind.clip_prefix is not None:
        encoders.append((ldm_keys.clip_mapping(tensors, kind.clip_prefix), "quick_gelu"))
    if kind.open_clip_prefix is not None:
        sdxl = kind.name == "SDXL"
        mapping = ldm_keys.open_clip_mapping(
            tensors, kind.open_clip_prefix, with_projection=sdxl, drop_last_layers=0 if sdxl else 1
        )
        encoders.append((mapping, "gelu"))
    return {
        part: (CLIPTextEncoder, _text_config(_mapped(tensors, mapping), activation), mapping)
        for part, (mapping, activation) in zip(("text_encoder", "text_encoder_2"), encoders, strict=False)
    }


def _text_config(tensors: Tensors, activation: str) -> CLIPTextConfig:
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=width // _CLIP_HEAD_DIM,
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        projection_dim=width if projection is None else projection.shape[0],
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        architectures=("CLIPTextModel" if projection is None else "CLIPTextModelWithProjection",),
    )


def _count(names: Iterable[str] | Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name; 0 where it finds none."""
    return 1 + max(
        (int(match[1]) for match in (re.match(pattern, name) for name in names) if match), default=-1
    )
