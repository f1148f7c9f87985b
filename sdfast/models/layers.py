"""The blocks U-Net, VAE and text encoder are made of. Parameter names are diffusers'.

Every convolution, normalisation, matrix product and attention goes through `sdfast.ops`, so a kernel
that lands there serves all models at once. Images are (N, C, H, W) in any memory format, tokens (N, L, C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast import ops
from sdfast.models.precomputed import Context, TimeEmbedding, each_repeated


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with the fused operands of `ops.conv2d`."""

    def is_served(self) -> bool:
        """Whether `ops.conv2d` computes what its attributes say now.

        They are set on finished models: seamless pictures need `padding_mode` or `_conv_forward`.
        """
        return (
            "_conv_forward" not in self.__dict__
            and self.padding_mode == "zeros"
            and self.groups == 1
            and self.dilation == (1, 1)
            and type(self.padding) is type(self.stride) is tuple
            and self.stride[0] == self.stride[1]
        )

    def forward(
        self,
        input: Tensor,
        *,
        padding: tuple[int, int, int, int] | None = None,
        upsample: bool = False,
        time_embedding: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W').

        `padding` (left, right, top, bottom) replaces its own, and is added to it where `is_served` is False.
        """
        return self.convolve(
            input, self.weight, self.bias, padding=padding, upsample=upsample, time_embedding=time_embedding,
            residual=residual, skip=skip,
        )  # fmt: skip

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        padding: tuple[int, int, int, int] | None = None,
        upsample: bool = False,
        time_embedding: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """`forward` by another weight, of the same kernel."""
        if not self.is_served():
            x = x if skip is None else torch.cat([x, skip], 1)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
            y = self._conv_forward(x if padding is None else F.pad(x, padding), weight, bias)
            y = y if time_embedding is None else y + time_embedding[:, :, None, None]
            return y if residual is None else y + residual
        vertical, horizontal = int(self.padding[0]), int(self.padding[1])
        fused = ops.conv2d(
            x, weight, bias, self.stride[0], padding or (horizontal, horizontal, vertical, vertical),
            upsample=upsample, time_embedding=time_embedding, residual=residual, skip=skip,
        )  # fmt: skip
        assert isinstance(fused, Tensor)  # no statistics were asked for
        return fused


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with SiLU and scale-shift fused."""

    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(N, C, ...) -> (N, C, ...); `scale` and `shift` are (N, C). `skip`'s channels come last."""
        return ops.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=activation,
            scale=scale,
            shift=shift,
            skip=skip,
        )


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` through `ops.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """`nn.Linear` with activation and residual fused."""

    def forward(
        self, input: Tensor, *, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(..., K) -> (..., M)."""
        return ops.linear(input, self.weight, self.bias, activation=activation, residual=residual)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that takes its pixels as tokens: SD 1.x stores `proj_in` and `proj_out` so."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """(N, L, C_in) -> (N, L, C_out)."""
        return ops.linear(input, self.weight, self.bias, residual=residual)


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H*W, C); a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, H*W, C) -> (N, C, H, W), a channels_last view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def timestep_embedding(
    timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Sinusoidal embedding of Vaswani et al. 2017, section 3.5, as Ho et al. 2020 use it for t.

    Args:
        timesteps: (N,), any real dtype.
        dim: width of the result.
        flip_sin_to_cos: cosines first (Stable Diffusion) instead of sines first (DDPM).
        freq_shift: the frequencies are 10000^(-i / (dim/2 - freq_shift)).

    Returns:
        (N, dim) fp32.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None]  # (N, dim/2)
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron behind the sinusoidal embedding."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_channels, time_embed_dim)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """(N, C) -> (N, time_embed_dim); activation and residual are the last layer's."""
        return self.linear_2(self.linear_1(x, activation="silu"), activation=activation, residual=residual)


class ResnetBlock2D(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), the block of Ho et al. 2020, appendix B.

    With `scale_shift` the time embedding modulates norm2 instead (Dhariwal & Nichol 2021, "AdaGN").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.dropout = dropout
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self, x: Tensor, emb: Tensor | TimeEmbedding | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """x (N, C_in, H, W), emb (N, time_channels) already SiLU'd -> (N, C_out, H, W).

        On the way up C_in counts the channels of x, then those of `skip`.
        """
        if skip is not None and (
            self.conv_shortcut is None or not ops.reads_skip(x, self.conv_shortcut.weight)
        ):
            x, skip = torch.cat([x, skip], dim=1), None
        time: Tensor | None = None
        if isinstance(emb, TimeEmbedding):
            time = each_repeated(emb.by_layer[self], x.shape[0])
        elif emb is not None:
            time = self.time_emb_proj(emb)
        scale, shift = time.chunk(2, dim=1) if self.scale_shift and time is not None else (None, None)
        h = self.norm1(x, activation="silu", skip=skip)
        added = None if self.scale_shift else time
        h = self.conv1(h, time_embedding=added)
        h = self.norm2(h, activation="silu", scale=scale, shift=shift)
        h = F.dropout(h, self.dropout, self.training)
        return self.conv2(h, residual=x if self.conv_shortcut is None else self.conv_shortcut(x, skip=skip))


class Attention(nn.Module):
    """Multi-head attention of x (N, L, C) over `context` (B, S, E), or over itself.

    B divides N: the keys of one row serve N/B consecutive rows of x.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=qkv_bias)
        self.to_k = Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = Linear(context_dim, dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(dim, dim)])  # a list, as in checkpoints: index 1 was a dropout

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) -> k and v, (B, heads, S, D) both."""
        k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.to_k(context), self.to_v(context))
        )
        return k, v

    def forward(
        self, x: Tensor, context: Tensor | Context | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """-> (N, L, C), with `residual` (N, L, C) added."""
        if isinstance(context, Context):
            k, v = context.by_layer[self]
        else:
            k, v = self.keys_values(x if context is None else context)
        # Queries do not see each other: rows of x with the same keys are one longer row, no key is repeated.
        q = self.to_q(x).reshape(k.shape[0], -1, self.heads, k.shape[-1]).transpose(1, 2)
        o = ops.attention(q, k, v)  # (B, heads, N/B * L, D)
        return self.to_out[0](o.transpose(1, 2).reshape(x.shape), residual=residual)


class GEGLU(nn.Module):
    """a · gelu(g) with (a, g) = x W + b."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, inner_dim)."""
        return self.proj(x, activation="geglu")


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C), with `residual` added."""
        return self.net[2](self.net[0](x), residual=residual)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normed and residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        """x (N, L, C), context (B, S, E) -> (N, L, C)."""
        x = self.attn1(self.norm1(x), residual=x)
        x = self.attn2(self.norm2(x), context, residual=x)
        return self.ff(self.norm3(x), residual=x)


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of an image (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(
        self, channels: int, context_dim: int, heads: int, depth: int, *, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        projection = Linear if linear_projection else PointwiseConv
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        """x (N, C, H, W), context (B, S, E) -> (N, C, H, W)."""
        h = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        return to_image(self.proj_out(h, residual=to_tokens(x)), *x.shape[2:])


class SelfAttention2D(Attention):
    """Attention among the pixels of an image: the VAE's middle and the unconditional U-Net."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, channels, heads, qkv_bias=True)
        self.group_norm = GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: object = None) -> Tensor:  # type: ignore[override]
        """x (N, C, H, W) -> (N, C, H, W); `context` is ignored, so that it can stand for a Transformer2D."""
        tokens = super().forward(to_tokens(self.group_norm(x)), residual=to_tokens(x))
        return to_image(tokens, *x.shape[2:])


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. Padding 0 means zeros right and below only, as LDM's VAE pads."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = None if padding else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)), floor with padding 0."""
        return self.conv(x, padding=self.pad)


class Upsample2D(nn.Module):
    """Nearest-2x, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), or `size` where an odd size was halved on the way down."""
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(x, upsample=True)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
