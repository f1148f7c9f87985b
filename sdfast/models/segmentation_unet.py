"""The U-Net of 2015: valid 3x3 convolutions, so what it says of a pixel rests on real pixels alone.

    down:  (conv 3x3, ReLU) twice, keep as skip, 2x2 max pooling, twice the channels
    up:    2x2 up-convolution to half the channels, concatenate the cropped skip, (conv 3x3, ReLU) twice
    out:   conv 1x1 to a score for each class

Ronneberger, Fischer & Brox 2015, fig. 1 (section 4 of the report): 64 to 1024 channels, 572x572 pixels in,
388x388 out. Nothing is padded, so the result lacks a margin of the input on every side, which
`sdfast.segmentation` takes from the neighbourhood or mirrors at the picture's border.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfast.models.layers import Conv2d

_BLOCK = 4  # pixels that two valid 3x3 convolutions take off a side


@dataclasses.dataclass(frozen=True)
class SegmentationUNetConfig:
    """Settings of `SegmentationUNet`; the defaults are the paper's network.

    Attributes:
        in_channels: 1 for grey pictures, 3 for coloured ones.
        out_channels: classes.
        width: channels at full resolution; each level below has twice as many.
        depth: how often the resolution is halved.
        dropout: after the two deepest blocks on the way down, in training. The paper has "drop-out layers at
            the end of the contracting path" and does not say how much.

    Raises:
        ValueError: a number out of range.
    """

    in_channels: int = 1
    out_channels: int = 2
    width: int = 64
    depth: int = 4
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.out_channels > 256:
            raise ValueError(
                f"out_channels: got {self.out_channels}, expected at most 256: classes are uint8"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected a number in [0, 1)")

    @property
    def multiple(self) -> int:
        """Pixels of a side of the input that become one at the bottom; the grid that pooling fixes."""
        return 2**self.depth

    @property
    def margin(self) -> int:
        """Pixels that the result lacks on each side: 92 in the paper."""
        return (_BLOCK * self.multiple + 2 * _BLOCK * (self.multiple - 1)) // 2

    @property
    def smallest_output(self) -> int:
        """The least side of a result, of 4 pixels from two halvings on."""
        return self.output_at_least(1)

    def output_at_least(self, side: int) -> int:
        """The least admissible side of a result that is no smaller than `side`."""
        # At the bottom s pixels come out of the last block, and every level up makes 2s - 4 of them.
        taken = _BLOCK * (self.multiple - 1)
        return math.ceil((side + taken) / self.multiple) * self.multiple - taken

    def output_side(self, side: int) -> int:
        """The side of the result for an input's.

        Raises:
            ValueError: pooling would meet an odd side, or nothing would be left; names the nearest that fit.
        """
        output = side - 2 * self.margin
        above = self.output_at_least(max(output, 1))
        if output != above:
            below = above - self.multiple
            sides = [one + 2 * self.margin for one in (below, above) if one >= self.smallest_output]
            raise ValueError(f"got {side} pixels, {_nearest(sides)}")
        return output

    @property
    def smallest_tile(self) -> int:
        """The least side of a tile of a larger result: tiles begin at multiples of `multiple`."""
        return self.output_at_least(self.multiple)

    def check_tile(self, side: int) -> None:
        """Raises ValueError, with the nearest that fit, unless a tile of a result can have this side."""
        above = self.output_at_least(max(side, self.multiple))
        if side != above:
            sides = [one for one in (above - self.multiple, above) if one >= self.smallest_tile]
            raise ValueError(
                f"got {side}, but tiles of a network that halves {self.depth} times have sides of"
                f" {self.smallest_tile} + {self.multiple} k pixels; {_nearest(sides)}"
            )


def _nearest(sides: list[int]) -> str:
    listed = " and ".join(map(str, sides))
    return f"the nearest that fit are {listed}" if len(sides) > 1 else f"the least is {listed}"


class DoubleConv(nn.Module):
    """Two valid 3x3 convolutions, each followed by ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, out_channels, 3)
        self.conv2 = Conv2d(out_channels, out_channels, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', H-4, W-4); the channels of `skip` follow those of x."""
        # In place: a convolution's gradient needs its input, and ReLU's its result.
        return F.relu_(self.conv2(F.relu_(self.conv1(x, skip=skip))))


class SegmentationUNet(nn.Module):
    """Pictures to a score for each class and pixel.

    Weights start from N(0, 2/N), N the incoming values of a neuron (He et al. 2015), biases from 0.
    """

    config_class = SegmentationUNetConfig
    fixed_config: Mapping[str, object] = {"model_type": "segmentation_unet", "act_fn": "relu"}

    def __init__(self, config: SegmentationUNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * 2**level for level in range(config.depth + 1)]
        inputs = [config.in_channels, *widths[:-1]]
        self.down_blocks = nn.ModuleList(map(DoubleConv, inputs, widths))
        upwards = widths[-2::-1]
        self.up_convs = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in upwards)
        self.up_blocks = nn.ModuleList(DoubleConv(2 * width, width) for width in upwards)
        self.conv_out = Conv2d(config.width, config.out_channels, 1)
        self.apply(_he)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) standardised -> logits (N, out_channels, H - 2 margin, W - 2 margin).

        Raises:
            ValueError: a side at which pooling would meet an odd number; names the nearest that fit.
        """
        for name, side in zip(("height", "width"), x.shape[-2:], strict=True):
            try:
                self.config.output_side(side)
            except ValueError as error:
                raise ValueError(f"x: {name}: {error}") from None
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for level, block in enumerate(self.down_blocks):
            x = block(x)
            if level >= self.config.depth - 1:
                x = F.dropout(x, self.config.dropout, self.training)
            if level < self.config.depth:
                skips.append(x)
                x = F.max_pool2d(x, 2)
        for up_conv, block in zip(self.up_convs, self.up_blocks, strict=True):
            x = up_conv(x)
            x = block(x, _centre(skips.pop(), x))
        return self.conv_out(x)


def _centre(skip: Tensor, like: Tensor) -> Tensor:
    """The middle of `skip` (N, C, H, W), of the height and width of `like`; a view."""
    height, width = like.shape[-2:]
    top, left = (skip.shape[-2] - height) // 2, (skip.shape[-1] - width) // 2
    return skip[..., top : top + height, left : left + width]


def _he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # An up-convolution's kernels do not overlap: a pixel comes from one.
        taps = math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1
        nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * taps)))
        assert module.bias is not None
        nn.init.zeros_(module.bias)
