"""The pipeline that `train_ldm` starts from, what of it is trained, and the one that comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdfast.lora import add_lora
from sdfast.models import AutoencoderKL, UNet2DCondition
from sdfast.models.checkpoint import CheckpointError, load_components, resolve
from sdfast.tokenizer import CLIPTokenizer
from sdfast.training.buckets import Size, bucket_sizes
from sdfast.training.distributed import full_state
from sdfast.training.ldm_losses import Texts
from sdfast.training.trainer import seeded


def load_parts(
    model: str | Path,
    *,
    prediction: str | None,
    device: torch.device,
    anew: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """The components of a pipeline, their weights in fp32.

    Args:
        model: a diffusers folder or a hub id.
        prediction: replaces the scheduler's; None keeps it.
        anew: a component that gets fresh weights, and their seed.

    Returns:
        As `sdfast.models.checkpoint.load_components`.

    Raises:
        CheckpointError: it cannot be read, or is no text-to-image Stable Diffusion.
    """
    folder = resolve(model)
    if not folder.is_dir():
        raise CheckpointError(f"{model}: is a single file; training needs a diffusers folder or a hub id")
    parts = load_components(folder, dtype=torch.float32, device=device)
    missing = [
        name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if name not in parts
    ]
    if missing or not isinstance(parts["unet"], UNet2DCondition):
        raise CheckpointError(
            f"{model}: expected a text-to-image Stable Diffusion, got a {parts.get('_class_name')}"
            + (f" without {', '.join(missing)}" if missing else "")
        )
    takes, latents = parts["unet"].config.in_channels, parts["vae"].config.latent_channels
    if takes != latents:
        raise CheckpointError(f"{model}: its U-Net takes {takes} channels, but the latents have {latents}")
    if prediction is not None:
        parts["scheduler"] = {**parts["scheduler"], "prediction_type": prediction}
    if anew is not None:
        name, seed = anew
        with seeded(seed):
            fresh = type(parts[name])(parts[name].config)
        parts[name] = fresh.to(device, memory_format=torch.channels_last)
    return parts


def choose_trained(parts: Mapping[str, Any], phase: str, lora_rank: int | None = None, seed: int = 0) -> None:
    """Let the parameters that are trained ask for gradients, and no others: one component's, or its LoRA's.

    What asks for gradients is what the optimizer steps, the average follows and checkpoints hold.
    """
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if lora_rank is None:
        parts[phase].requires_grad_(True)
        return
    with seeded(seed):  # alike in every process
        add_lora(parts[phase], lora_rank)


def module_fingerprint(module: nn.Module) -> str:
    """What tells these weights from others."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def texts_of(parts: Mapping[str, Any]) -> Texts:
    """The text encoders of the pipeline with their tokenizers."""
    folders = [parts[name] for name in ("tokenizer", "tokenizer_2") if name in parts]
    return Texts(
        encoders=[parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts],
        tokenizers=[CLIPTokenizer.from_folder(folder) for folder in folders],
        is_xl=parts["unet"].config.addition_embed_type == "text_time",
        zero_empty=bool(parts.get("force_zeros_for_empty_prompt", False)),
    )


def image_shapes(
    unet: UNet2DCondition, vae: AutoencoderKL, resolution: int | None, *, aspect_buckets: bool
) -> list[Size]:
    """What images are cut to: the square of `resolution` (the model's own when None), or that many pixels.

    Raises:
        ValueError: the resolution is no multiple of what the VAE, or with buckets the U-Net too, divides by.
    """
    own = unet.config.sample_size or 64
    side = resolution or max([own] if isinstance(own, int) else own) * vae.downsampling
    if aspect_buckets:  # sides that every level of the U-Net halves without a rest
        return bucket_sizes(side, vae.downsampling * 2 ** (len(unet.config.block_out_channels) - 1))
    bucket_sizes(side, vae.downsampling)
    return [(side, side)]


def whole(module: nn.Module, *, parallel: str | None, is_main: bool) -> nn.Module:
    """The trained module with all of its weights, on the main process; every process has to call this."""
    if parallel != "fsdp":
        return module
    state = full_state(module)
    if not is_main:
        return module
    model_class = UNet2DCondition if isinstance(module, UNet2DCondition) else AutoencoderKL
    complete = model_class(module.config)  # type: ignore[arg-type]
    complete.load_state_dict(state)
    return complete.eval()


def components_of(parts: Mapping[str, Any], trained: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What `save_components` writes: the pipeline with what was trained in it."""
    components = {**parts, **trained}
    if components["_class_name"] == "StableDiffusionPipeline":  # which names parts that were never loaded
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        components |= {**absent, "requires_safety_checker": False}
    return components
