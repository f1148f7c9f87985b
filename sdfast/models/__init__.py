"""Thin torch models with diffusers' parameter names."""

from sdfast.models.precomputed import Context, TimeEmbedding, TimeTable
from sdfast.models.segmentation_unet import SegmentationUNet, SegmentationUNetConfig
from sdfast.models.simple_vae import SimpleVAE, SimpleVAEConfig
from sdfast.models.text_encoder import CLIPTextConfig, CLIPTextEncoder
from sdfast.models.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from sdfast.models.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "Context",
    "DiagonalGaussian",
    "SimpleVAE",
    "SimpleVAEConfig",
    "SegmentationUNet",
    "SegmentationUNetConfig",
    "TimeEmbedding",
    "TimeTable",
    "UNet2D",
    "UNet2DCondition",
    "UNet2DConditionConfig",
    "UNet2DConfig",
]
