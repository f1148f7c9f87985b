"""The variational autoencoder: images to latents and back, 8 times smaller in Stable Diffusion.

Kingma & Welling 2014; the network is Rombach et al. 2022's (KL-f8). The encoder gives mean and
log-variance of a diagonal Gaussian; the prior is N(0, I).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdfast import ops, tiled_vae
from sdfast.models.layers import Conv2d, GroupNorm, ResnetBlock2D, SelfAttention2D, Upsample2D
from sdfast.models.unet_blocks import DownBlock2D, MakeResnet, MidBlock2D

_EPS = 1e-6  # of every GroupNorm in the VAE


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Settings of `AutoencoderKL`, named and with the defaults as in diffusers' config.json."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class DiagonalGaussian:
    """q_φ(z|x) = N(mean, diag(exp(logvar))), the encoder's answer.

    Attributes:
        mean, logvar: (N, latent_channels, h, w); logvar is clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + exp(logvar/2) · noise, eq. 10 with a diagonal L; noise ~ N(0, I) of the mean's shape."""
        return ops.reparameterize(self.mean, self.logvar, noise)

    def mode(self) -> Tensor:
        """The most likely z, the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """D_KL(q_φ(z|x) || N(0, I)) in nats, (N,): the second term of eq. 8 (and 9), in fp32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


class UpDecoderBlock2D(nn.Module):
    """`layers` ResNet blocks, then an upsampler."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(groups)(in_channels if i == 0 else out_channels, out_channels) for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', 2H, 2W), the last block's without the doubling."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def _resnet(groups: int) -> MakeResnet:
    return lambda cin, cout: ResnetBlock2D(cin, cout, time_channels=None, groups=groups, eps=_EPS)


def _mid_block(config: AutoencoderKLConfig) -> MidBlock2D:
    channels, groups = config.block_out_channels[-1], config.norm_num_groups
    attention = (
        (lambda: SelfAttention2D(channels, 1, groups=groups, eps=_EPS))
        if config.mid_block_add_attention
        else None
    )
    return MidBlock2D(channels, _resnet(groups), attention)


class Encoder(nn.Module):
    """E_φ: image to the moments of its latent."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(
                widths[max(i - 1, 0)], width, config.layers_per_block, _resnet(groups), None,
                downsample_padding=0 if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )  # fmt: skip
        self.mid_block = _mid_block(config)
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 2 latent_channels, H/f, W/f), f = 2^(levels-1)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x, None)
        x = self.mid_block(x, None)
        return self.conv_out(self.conv_norm_out(x, activation="silu"))


class Decoder(nn.Module):
    """D_θ: latent to image."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _mid_block(config)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                upsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent_channels, h, w) -> (N, out_channels, f h, f w)."""
        x = self.mid_block(self.conv_in(z), None)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, activation="silu"))


class AutoencoderKL(nn.Module):
    """The VAE. Latents as the diffusion model sees them are `z * scaling_factor`."""

    config_class = AutoencoderKLConfig
    diffusers_class = "AutoencoderKL"
    fixed_config: Mapping[str, object] = {"act_fn": "silu"}

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if set(getattr(config, name)) != {kind}:
                raise ValueError(f"{name}: got {getattr(config, name)}, expected {kind} only")
        self.config = config
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @property
    def downsampling(self) -> int:
        """How many pixels one latent pixel is wide."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor, *, memory_bytes: int | None = None) -> DiagonalGaussian:
        """Images (N, in_channels, H, W) in [-1, 1] -> q_φ(z|x), unscaled.

        With `memory_bytes` in bands that take no more than that, for inference: see `sdfast.tiled_vae`.
        """
        if memory_bytes is not None:
            return DiagonalGaussian(tiled_vae.encode(self, x, memory_bytes=memory_bytes))
        moments = self.encoder(x)
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, z: Tensor, *, memory_bytes: int | None = None) -> Tensor:
        """Unscaled latents (N, latent_channels, h, w) -> images (N, out_channels, H, W), about [-1, 1].

        With `memory_bytes` in bands that take no more than that, for inference: see `sdfast.tiled_vae`.
        """
        if memory_bytes is not None:
            return tiled_vae.decode(self, z, memory_bytes=memory_bytes)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, draw z (with `noise`, else fresh), decode: reconstruction and q_φ(z|x), for training."""
        posterior = self.encode(x)
        # Under autocast the mean may be of another dtype than what the caller drew.
        noise = torch.randn_like(posterior.mean) if noise is None else noise.to(posterior.mean.dtype)
        z = posterior.sample(noise)
        return self.decode(z), posterior
