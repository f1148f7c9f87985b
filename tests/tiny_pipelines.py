"""Stable Diffusion pipelines of diffusers' own making, with random weights and small enough for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MERGES = [
    ("s", "e"),
    ("se", "v"),
    ("e", "n</w>"),
    ("sev", "en</w>"),
    ("a", "n"),
    ("an", "d</w>"),
    ("!", "!</w>"),
]
TEXT_WIDTH = 32


def write_tokenizer(
    folder: Path, *, pad_token: str = "<|endoftext|>", settings: dict[str, object] | None = None
) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json with every byte and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    words = ["!", *(letter for letter in letters if letter != "!"), *(letter + "</w>" for letter in letters)]
    words += [left + right for left, right in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8"
    )
    merges = "\n".join(" ".join(pair) for pair in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {"model_max_length": 77, "pad_token": pad_token, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (settings or {})), encoding="utf-8")
    return folder


def sd_pipeline(folder: Path, *, prediction_type: str = "epsilon", channels: int = 3) -> Path:
    """A Stable Diffusion 1.x in small, saved by diffusers."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "scratch"))
    pipe = diffusers.StableDiffusionPipeline(
        unet=_unet(TEXT_WIDTH),
        vae=_vae(channels),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipe, folder)


def inpainting_pipeline(folder: Path, *, in_channels: int = 9) -> Path:
    """A Stable Diffusion 1.x for inpainting, whose U-Net takes mask and masked image, in small."""
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        sd_pipeline(folder), unet=_unet(TEXT_WIDTH, in_channels=in_channels), safety_checker=None
    )
    pipe.save_pretrained(folder)
    return folder


def sdxl_pipeline(folder: Path, *, inpainting: bool = False) -> Path:
    """An SDXL in small, saved by diffusers."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "scratch"))
    tokenizer_2 = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "scratch", pad_token="!"))
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    unet_channels = {"in_channels": 9, "out_channels": 4} if inpainting else {}
    kind = diffusers.StableDiffusionXLInpaintPipeline if inpainting else diffusers.StableDiffusionXLPipeline
    pipe = kind(
        unet=_unet(2 * TEXT_WIDTH, **added, **unet_channels),
        vae=_vae(3),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, hidden_act="gelu")).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=_scheduler("epsilon"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return _save(pipe, folder)


def picture(width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    """Random pixels, always the same."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def assert_same_pictures(ours: list[Image.Image], others: list[Image.Image], most: int = 2) -> None:
    """No byte differs by more than `most`."""
    assert len(ours) == len(others)
    for one, other in zip(ours, others, strict=True):
        assert one.size == other.size and one.mode == other.mode
        # int16: the difference of two bytes is no byte
        difference = np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)
        assert np.abs(difference).max() <= most
        assert np.asarray(other).std() > 5  # not a blank


def _save(pipe: diffusers.DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "scratch")
    return folder


def _unet(text_width: int, **settings: object) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        **settings,
    ).eval()


def _vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def _text_config(tokenizer: CLIPTokenizer, **settings: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def _scheduler(prediction_type: str) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
