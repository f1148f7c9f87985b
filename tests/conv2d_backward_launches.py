"""Gradients of conv2d at the sizes of Stable Diffusion 1.5's training, whose Triton launches can be recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# images, channels of x, height, width, channels of y, kernel, stride, padding
_CASES = {
    "sd15 64x64": (4, 320, 64, 64, 320, 3, 1, (1, 1, 1, 1)),
    "sd15 8x8": (4, 2560, 8, 8, 1280, 3, 1, (1, 1, 1, 1)),
    "sd15 32x32 down": (4, 640, 32, 32, 640, 3, 2, (1, 1, 1, 1)),
    "sd15 16x16 up, transposed": (4, 1280, 32, 32, 1280, 4, 2, (1, 1, 1, 1)),
    "sd15 shortcut": (4, 960, 64, 64, 320, 1, 1, (0, 0, 0, 0)),
    "sd15 conv_in": (4, 4, 64, 64, 320, 3, 1, (1, 1, 1, 1)),
    "sd15 conv_out": (4, 320, 64, 64, 4, 3, 1, (1, 1, 1, 1)),
    "vae 256x256": (1, 128, 256, 256, 128, 3, 1, (1, 1, 1, 1)),
    "vae down": (1, 128, 256, 256, 128, 3, 2, (0, 1, 0, 1)),
    "odd": (3, 33, 17, 23, 65, 3, 1, (1, 1, 1, 1)),
    "latent 4 to 4": (4, 4, 64, 64, 4, 3, 1, (1, 1, 1, 1)),
    "latent 8 to 8": (4, 8, 64, 64, 8, 1, 1, (0, 0, 0, 0)),
    "inpainting 9 to 16": (4, 9, 64, 64, 16, 3, 1, (1, 1, 1, 1)),
    "picture 3 to 128": (1, 3, 256, 256, 128, 3, 1, (1, 1, 1, 1)),
    "one pixel": (2, 64, 1, 1, 64, 3, 1, (1, 1, 1, 1)),
}
# by tensor cores where that is allowed, which is torch's default for convolutions
_DTYPES = {
    "fp16": (torch.float16, True), "bf16": (torch.bfloat16, True),
    "tf32": (torch.float32, True), "fp32": (torch.float32, False),
}  # fmt: skip


def _call(
    images: int, channels: int, height: int, width: int, out_channels: int, kernel: int, stride: int,
    padding: tuple[int, ...], dtype: torch.dtype, allow_tf32: bool,
) -> Callable[[], object]:  # fmt: skip
    def image(channels: int, height: int, width: int) -> Tensor:
        size = (images, channels, height, width)
        return torch.empty(size, device="cuda", dtype=dtype, memory_format=torch.channels_last)

    left, right, top, bottom = padding
    y_height = (height + top + bottom - kernel) // stride + 1
    y_width = (width + left + right - kernel) // stride + 1

    def call() -> object:
        dy, x = image(out_channels, y_height, y_width), image(channels, height, width)
        weight = torch.empty(out_channels, channels, kernel, kernel, device="cuda", dtype=dtype)
        weight = weight.to(memory_format=torch.channels_last)
        more = (stride, padding, False)
        with torch.backends.cudnn.flags(allow_tf32=allow_tf32):
            return (
                torch.ops.sdfast.conv2d_weight_gradient_triton(dy, x, kernel, kernel, *more),
                torch.ops.sdfast.conv2d_input_gradient_triton(dy, weight, height, width, *more),
            )

    return call


def code_cases() -> dict[str, Callable[[], object]]:
    """Calls on CUDA tensors by name; a name ends with the dtype."""
    return {
        f"conv2d backward {what} {name}": _call(*case, *dtype)
        for name, dtype in _DTYPES.items()
        for what, case in _CASES.items()
    }
