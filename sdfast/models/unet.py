"""The denoising U-Nets: text-conditioned (Stable Diffusion 1.x, 2.x, SDXL) and unconditional (DDPM).

Both are Ronneberger's U in ResNet form: halve the size and widen, a middle, then back up, each level
of the way up reading what the same level left on the way down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sdfast.models.layers import (
    BasicTransformerBlock,
    Conv2d,
    GroupNorm,
    ResnetBlock2D,
    SelfAttention2D,
    TimestepEmbedding,
    Transformer2D,
    timestep_embedding,
)
from sdfast.models.precomputed import Context, TimeEmbedding, TimeTable, check_rows, each_repeated
from sdfast.models.unet_blocks import DownBlock2D, MakeAttention, MidBlock2D, Text, Time, UpBlock2D


class _UNet(nn.Module):
    """What both U-Nets share: the blocks and their order."""

    config: UNet2DConditionConfig | UNet2DConfig

    def _build(
        self, config: UNet2DConditionConfig | UNet2DConfig, layers: tuple[int, ...], dropout: float,
        down_attention: list[MakeAttention], mid_attention: MakeAttention, up_attention: list[MakeAttention],
    ) -> None:  # fmt: skip
        widths = config.block_out_channels
        levels = len(widths)
        time_channels = config.time_embedding_dim or 4 * widths[0]
        groups, eps = config.norm_num_groups, config.norm_eps

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels, out_channels, time_channels=time_channels, groups=groups, eps=eps,
                dropout=dropout, scale_shift=config.resnet_time_scale_shift == "scale_shift",
            )  # fmt: skip

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels)
        self.down_blocks = nn.ModuleList()
        skip_channels = [widths[0]]  # what the way down leaves, in order
        for i, width in enumerate(widths):
            padding = None if i == levels - 1 else config.downsample_padding
            self.down_blocks.append(
                DownBlock2D(widths[max(i - 1, 0)], width, layers[i], resnet, down_attention[i], padding)
            )
            skip_channels += [width] * (layers[i] + (padding is not None))
        self.mid_block = MidBlock2D(widths[-1], resnet, mid_attention)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(levels)):
            block_skips = [skip_channels.pop() for _ in range(layers[i] + 1)]
            self.up_blocks.append(
                UpBlock2D(
                    widths[min(i + 1, levels - 1)],
                    block_skips,
                    widths[i],
                    resnet,
                    up_attention[levels - 1 - i],
                    i > 0,
                )
            )
        self.conv_norm_out = GroupNorm(groups, widths[0], eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def encode_time(
        self, timesteps: Tensor | Sequence[float], added_cond: Mapping[str, Tensor] | None = None
    ) -> TimeTable:
        """What every ResNet block adds at each of T timesteps: one matrix product a layer for all of them.

        Args:
            timesteps: (T,), on the training schedule's scale.
            added_cond: as `UNet2DCondition.forward` takes it, B rows; SDXL only.

        Returns:
            T of them, a sequence; the forward takes one in place of its timesteps (and `added_cond`).
        """
        weight = self.conv_in.weight
        steps = torch.as_tensor(timesteps, device=weight.device)  # (T,)
        added = self._added_embedding(added_cond, weight.dtype)  # (B, time_channels)
        batch = 1
        if added is not None:  # each step with each row
            batch, added = len(added), added.repeat(len(steps), 1)
        emb = self._embed(steps.repeat_interleave(batch), weight.dtype, added)
        resnets = [module for module in self.modules() if isinstance(module, ResnetBlock2D)]
        projected = [resnet.time_emb_proj(emb) for resnet in resnets]  # (T B, C)
        widths = [p.shape[1] for p in projected]
        channels: dict[nn.Module, int] = dict(zip(resnets, widths, strict=True))
        rows = torch.cat([p.reshape(len(steps), -1) for p in projected], dim=1)
        return TimeTable(self, batch, weight.dtype, channels, rows)

    def _time(
        self,
        sample: Tensor,
        timesteps: Tensor | float | TimeEmbedding,
        added_cond: Mapping[str, Tensor] | None = None,
    ) -> Time:
        """What the blocks are told of the timesteps, for each of N images."""
        if isinstance(timesteps, TimeEmbedding):
            if added_cond is not None:
                raise ValueError("added_cond: is part of timesteps that were encoded; give it to encode_time")
            timesteps.check("timesteps", self, sample)
            return timesteps
        images = sample.shape[0]
        added = self._added_embedding(added_cond, sample.dtype)
        if added is not None:
            check_rows("added_cond", len(added), sample)
            added = each_repeated(added, images)
        if isinstance(timesteps, (int, float)):  # filled on the device: a copy from the host ends a capture
            steps = torch.full((images,), timesteps, device=sample.device)
        else:
            steps = torch.as_tensor(timesteps, device=sample.device).expand(images)
        return self._embed(steps, sample.dtype, added)

    def _embed(self, timesteps: Tensor, dtype: torch.dtype, added: Tensor | None) -> Tensor:
        """Timesteps (M,) and `added` (M, time_channels) -> (M, time_channels), SiLU'd.

        Every ResNet block projects the SiLU of the embedding: one here instead of one in each.
        """
        sinusoid = timestep_embedding(
            timesteps, self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift,
        ).to(dtype)  # fmt: skip
        return self.time_embedding(sinusoid, activation="silu", residual=added)

    def _added_embedding(self, added_cond: Mapping[str, Tensor] | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the time embedding, (B, time_channels); nothing but in SDXL."""
        return None

    def _denoise(self, sample: Tensor, emb: Time, context: Text) -> Tensor:
        x = self.conv_in(sample)
        skips = [x]
        for down_block in self.down_blocks:
            x, left = down_block(x, emb, context)
            skips += left
        x = self.mid_block(x, emb, context)
        for up_block in self.up_blocks:
            x = up_block(x, skips, emb, context)
        return self.conv_out(self.conv_norm_out(x, activation="silu"))


def _as_levels(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """One number for each level, from one for all or a tuple."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise ValueError(f"got {values}, expected {levels} numbers as there are block_out_channels")
    return values


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """Settings of `UNet2DCondition`, named and with the defaults as in diffusers' config.json."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads: a misnomer that checkpoints keep
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    addition_embed_type: str | None = None  # "text_time" for SDXL
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None


class UNet2DCondition(_UNet):
    """ε_θ(x_t, t, text): the U-Net of Stable Diffusion (Rombach et al. 2022; SDXL: Podell et al. 2023)."""

    config: UNet2DConditionConfig
    config_class = UNet2DConditionConfig
    diffusers_class = "UNet2DConditionModel"
    fixed_config: Mapping[str, object] = {
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "attention_type": "default",
    }
    # Scores are fp32 whatever upcast_attention says; the other belongs to an embedding type we do not have.
    ignored_config = frozenset({"upcast_attention", "addition_embed_type_num_heads"})

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.block_out_channels)
        heads = _as_levels(config.num_attention_heads or config.attention_head_dim, levels)
        depths = _as_levels(config.transformer_layers_per_block, levels)

        def attention(i: int) -> MakeAttention:
            return lambda: Transformer2D(
                config.block_out_channels[i], config.cross_attention_dim, heads[i], depths[i],
                groups=config.norm_num_groups, linear_projection=config.use_linear_projection,
            )  # fmt: skip

        down = _attention_by_level(config.down_block_types, "DownBlock2D", "CrossAttnDownBlock2D", attention)
        up = _attention_by_level(
            config.up_block_types, "UpBlock2D", "CrossAttnUpBlock2D", lambda i: attention(levels - 1 - i)
        )
        self._build(config, _as_levels(config.layers_per_block, levels), 0.0, down, attention(levels - 1), up)
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim
            if width is None or config.addition_time_embed_dim is None:
                raise ValueError(
                    "addition_embed_type 'text_time' needs projection_class_embeddings_input_dim and"
                    " addition_time_embed_dim"
                )
            self.add_embedding = TimestepEmbedding(
                width, config.time_embedding_dim or 4 * config.block_out_channels[0]
            )
        elif config.addition_embed_type is not None:
            raise ValueError(
                f"addition_embed_type: got {config.addition_embed_type!r}, expected None or 'text_time'"
            )

    def encode_context(self, encoder_hidden_states: Tensor) -> Context:
        """The text (B, S, cross_attention_dim) as every cross-attention reads it, for the forward."""
        blocks = [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]
        return Context(
            self, encoder_hidden_states.shape[0], encoder_hidden_states.dtype,
            {block.attn2: block.attn2.keys_values(encoder_hidden_states) for block in blocks},
        )  # fmt: skip

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor | float | TimeEmbedding,
        encoder_hidden_states: Tensor | Context,
        added_cond: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise (or v, or x_0, as trained) in a batch of noisy latents.

        Of what has B rows, B a divisor of N, each row serves N/B consecutive images.

        Args:
            sample: (N, in_channels, H, W), in the model's dtype.
            timesteps: (N,) or one number, on the training schedule's scale (0 … T-1); or from `encode_time`.
            encoder_hidden_states: (B, S, cross_attention_dim), the text; or from `encode_context`.
            added_cond: SDXL only: "text_embeds" (B, E) and "time_ids" (B, 6); not beside encoded timesteps.

        Returns:
            (N, out_channels, H, W).

        Raises:
            ValueError: `added_cond` is absent where the model needs it, something was encoded by another
                model or in another dtype, or B does not divide N.
        """
        emb, text = self._time(sample, timesteps, added_cond), encoder_hidden_states
        if isinstance(text, Context):
            text.check("encoder_hidden_states", self, sample)
        else:
            check_rows("encoder_hidden_states", text.shape[0], sample)
        return self._denoise(sample, emb, text)

    def _added_embedding(self, added_cond: Mapping[str, Tensor] | None, dtype: torch.dtype) -> Tensor | None:
        """SDXL's pooled text and picture sizes, (B, time_channels)."""
        if self.config.addition_embed_type is None:
            return None
        if added_cond is None or not {"text_embeds", "time_ids"} <= added_cond.keys():
            raise ValueError("added_cond: this U-Net needs 'text_embeds' (B, E) and 'time_ids' (B, 6)")
        time_ids = added_cond["time_ids"]
        sizes = timestep_embedding(
            time_ids.flatten(), self.config.addition_time_embed_dim or 0,
            flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift,
        ).reshape(time_ids.shape[0], -1)  # fmt: skip
        return self.add_embedding(torch.cat([added_cond["text_embeds"], sizes.to(dtype)], dim=-1))


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """Settings of `UNet2D`, named and with the defaults as in diffusers' config.json."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8  # channels per head here, unlike in UNet2DConditionConfig
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    attn_norm_num_groups: int | None = None  # of the middle's attention; None means norm_num_groups
    add_attention: bool = True
    time_embedding_dim: int | None = None


class UNet2D(_UNet):
    """ε_θ(x_t, t): the unconditional U-Net of Ho et al. 2020."""

    config: UNet2DConfig
    config_class = UNet2DConfig
    diffusers_class = "UNet2DModel"
    fixed_config: Mapping[str, object] = {
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "time_embedding_type": "positional",
        "downsample_type": "conv",
        "upsample_type": "conv",
    }
    ignored_config = frozenset({"num_train_timesteps"})

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = len(widths)

        def attention(i: int, groups: int = config.norm_num_groups) -> MakeAttention:
            heads = widths[i] // (config.attention_head_dim or widths[i])
            return lambda: SelfAttention2D(widths[i], heads, groups=groups, eps=config.norm_eps)

        down = _attention_by_level(config.down_block_types, "DownBlock2D", "AttnDownBlock2D", attention)
        up = _attention_by_level(
            config.up_block_types, "UpBlock2D", "AttnUpBlock2D", lambda i: attention(levels - 1 - i)
        )
        mid_groups = config.attn_norm_num_groups or config.norm_num_groups
        mid = attention(levels - 1, mid_groups) if config.add_attention else None
        self._build(config, _as_levels(config.layers_per_block, levels), config.dropout, down, mid, up)

    def forward(self, sample: Tensor, timesteps: Tensor | float | TimeEmbedding) -> Tensor:
        """sample (N, in_channels, H, W), timesteps (N,), one number or one of `encode_time` -> its shape."""
        return self._denoise(sample, self._time(sample, timesteps), None)


def _attention_by_level(
    block_types: tuple[str, ...], plain: str, attentive: str, attention: Callable[[int], MakeAttention]
) -> list[MakeAttention]:
    """For each named block its maker of attention, or None for the plain kind."""
    unknown = set(block_types) - {plain, attentive}
    if unknown:
        raise ValueError(f"block types: got {', '.join(sorted(unknown))}, expected {plain} or {attentive}")
    return [attention(i) if name == attentive else None for i, name in enumerate(block_types)]
