"""The levels of U-Nets and VAE: ResNet blocks, attention where a level has any, then the change of size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sdfast.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from sdfast.models.precomputed import Context, TimeEmbedding

# What blocks are told of the timestep, (N, time_channels), and of the text, (B, S, E): tensors that their
# layers project, or what these made of them before.
Time = Tensor | TimeEmbedding
Text = Tensor | Context | None
# Makes the attention of one layer at one level, or nothing where the level has none.
MakeAttention = Callable[[], nn.Module] | None
MakeResnet = Callable[[int, int], ResnetBlock2D]


class DownBlock2D(nn.Module):
    """`layers` ResNet blocks, each followed by attention if there is any, then a downsampler."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, resnet: MakeResnet, attention: MakeAttention,
        downsample_padding: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(layers)
        )
        self.attentions = nn.ModuleList(attention() for _ in range(layers)) if attention else None
        self.downsamplers = (
            None
            if downsample_padding is None
            else nn.ModuleList([Downsample2D(out_channels, downsample_padding)])
        )

    def forward(self, x: Tensor, emb: Time, context: Text = None) -> tuple[Tensor, list[Tensor]]:
        """x (N, C, H, W) -> the downsampled image and what each layer leaves for the way up."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, channels: int, resnet: MakeResnet, attention: MakeAttention) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([resnet(channels, channels), resnet(channels, channels)])
        self.attentions = nn.ModuleList([attention()]) if attention else None

    def forward(self, x: Tensor, emb: Time, context: Text = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.resnets[0](x, emb)
        if self.attentions is not None:
            x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpBlock2D(nn.Module):
    """The mirror of `DownBlock2D`: each ResNet block reads a skip beside its input, then an upsampler."""

    def __init__(
        self, in_channels: int, skip_channels: list[int], out_channels: int, resnet: MakeResnet,
        attention: MakeAttention, upsample: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet((in_channels if i == 0 else out_channels) + skip, out_channels)
            for i, skip in enumerate(skip_channels)
        )
        self.attentions = nn.ModuleList(attention() for _ in skip_channels) if attention else None
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], emb: Time, context: Text = None) -> Tensor:
        """Takes its skips off the list's end; (N, C, H, W) -> (N, C', 2H, 2W), or the next skip's size."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, skips.pop())
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        if self.upsamplers is not None:
            height, width = skips[-1].shape[2:]
            x = self.upsamplers[0](x, (height, width))
        return x
