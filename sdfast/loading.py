"""From a path, a hub id or "digits" to the parts of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdfast.models import AutoencoderKL, CLIPTextEncoder, UNet2DCondition
from sdfast.models.checkpoint import CheckpointError, load_components, load_single_file, resolve
from sdfast.tokenizer import CLIPTokenizer

DIGITS = "digits"
# Stability AI's files hold no tokenizer. All of them use this one's vocabulary.
_CLIP_ID = "openai/clip-vit-large-patch14"
# OpenCLIP, the text encoder of SD 2.x and the second of SDXL, was trained with id 0 as padding.
_OPEN_CLIP_PADDING = "!"


def load_pipeline_parts(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """The arguments of `StableDiffusion.__init__`; those here are `from_pretrained`'s.

    Raises:
        CheckpointError, ValueError: as `StableDiffusion.from_pretrained`.
    """
    name = str(path_or_id)
    if isinstance(path_or_id, str) and name == DIGITS:
        path = _shipped_digits()
    else:
        path = resolve(path_or_id, variant=variant, revision=revision)
    if path.is_file():
        if variant is not None:
            raise ValueError(f"variant: got {variant!r}, but {path} is a single file, which has no variants")
        components = load_single_file(path, dtype=dtype, device=device)
        tokenizers = _single_file_tokenizers(components, tokenizer, path)
    else:
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer: got {str(tokenizer)!r}, but {name} is a folder, which brings its own;"
                " only a single file needs one"
            )
        components = load_components(path, dtype=dtype, device=device, variant=variant)
        folders = [components.get(part) for part in ("tokenizer", "tokenizer_2")]
        tokenizers = [_read_tokenizer(folder) for folder in folders if isinstance(folder, Path)]
    _check_complete(components, path)
    unet, vae = components["unet"], components["vae"]
    # fp16 overflows in SDXL's VAE, which says so; in SD 1.x the same flag is only an old default.
    if dtype == torch.float16 and vae.config.force_upcast and unet.config.addition_embed_type is not None:
        vae = vae.float()
    encoders = [components[part] for part in ("text_encoder", "text_encoder_2") if part in components]
    for model in (unet, vae, *encoders):
        model.requires_grad_(False)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoders": encoders,
        "tokenizers": tokenizers,
        "scheduler_config": components["scheduler"],
        "name": path.resolve().name if Path(name).expanduser().exists() else name,
        "zero_empty_negative": bool(components.get("force_zeros_for_empty_prompt", False)),
    }


def digits_folder() -> Path:
    """Where the small model that ships with sdfast lies: a diffusers folder.

    Raises:
        CheckpointError: this installation lacks it.
    """
    folder = Path(__file__).parent / "assets" / "digits"
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder}: the digits model is missing; reinstall sdfast")
    return folder


def _shipped_digits() -> Path:
    if Path(DIGITS).exists():
        raise CheckpointError(
            f"{DIGITS}: is the model that ships with sdfast, but here is a file or folder of that name;"
            f" write ./{DIGITS} for yours, or name no model (StableDiffusion.digits()) for the one that ships"
        )
    return digits_folder()


def _check_complete(components: Mapping[str, Any], path: Path) -> None:
    kinds = {"unet": nn.Module, "vae": AutoencoderKL, "text_encoder": CLIPTextEncoder, "scheduler": Mapping}
    missing = [part for part, kind in kinds.items() if not isinstance(components.get(part), kind)]
    if missing:
        raise CheckpointError(
            f"{path}: is a {components.get('_class_name', 'pipeline')} without {', '.join(missing)};"
            " expected a text-to-image Stable Diffusion"
        )
    if not isinstance(components["unet"], UNet2DCondition):
        raise CheckpointError(f"{path}: its U-Net takes no text; expected a text-to-image Stable Diffusion")


def _single_file_tokenizers(
    components: Mapping[str, Any], tokenizer: str | Path | None, path: Path
) -> list[CLIPTokenizer]:
    try:
        folder = resolve(_CLIP_ID if tokenizer is None else tokenizer)
    except CheckpointError as error:
        if tokenizer is not None:
            raise
        raise CheckpointError(
            f"{path}: a single file holds no tokenizer, and CLIP's could not be fetched ({error});"
            " give the folder of one: tokenizer=... or --tokenizer"
        ) from error
    clip, open_clip = (_read_tokenizer(folder, pad_token=pad) for pad in (None, _OPEN_CLIP_PADDING))
    if "text_encoder_2" in components:
        return [clip, open_clip]
    return [open_clip if components["text_encoder"].config.hidden_act == "gelu" else clip]


def _read_tokenizer(folder: Path, *, pad_token: str | None = None) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_folder(folder, pad_token=pad_token)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot read this tokenizer: {error}") from error
