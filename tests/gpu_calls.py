"""Calls of the operations as models make them, on the device there is: for the tests on a GPU.

Real sizes are those of Stable Diffusion 1.5 and its VAE; tiny ones let the same code run in the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast import _library, ops

Run = Callable[..., Tensor]


class Call(NamedTuple):
    """An operation's call.

    Attributes:
        kernel: the operation that a Triton kernel has to serve.
        shapes: of its tensors; the second is the weight of a product.
        run: takes the tensors and the backend.
        channels_last: how its images and weights lie.
    """

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    run: Run
    channels_last: bool = False

    def tensors(self, dtype: torch.dtype, device: str, *, gradients: bool = False) -> list[Tensor]:
        """Values of about one; of a product's weight so that the result has the size of x."""
        product = self.kernel in ("linear_rows", "conv2d_kernel")
        made = []
        for i, shape in enumerate(self.shapes):
            size = 1 / math.sqrt(math.prod(shape[1:])) if product and i == 1 else 1.0
            t = (size * torch.randn(shape, device=device)).to(dtype)
            if self.channels_last and t.dim() == 4:
                t = t.to(memory_format=torch.channels_last)
            made.append(t.requires_grad_(gradients))
        return made

    def missing(self) -> bool:
        return not _library.has_kernel(self.kernel, "triton")


def group_norm(n: int, c: int, size: int, channels_last: bool = True) -> Call:
    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.group_norm(x, 32, weight, bias, activation="silu", backend=backend)

    return Call("group_norm_forward", ((n, c, size, size), (c,), (c,)), run, channels_last)


def layer_norm(rows: int, c: int) -> Call:
    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.layer_norm(x, (c,), weight, bias, backend=backend)

    return Call("layer_norm_forward", ((rows, c), (c,), (c,)), run)


def linear(rows: int, k: int, m: int, activation: str | None = None) -> Call:
    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.linear(x, weight, bias, activation=activation, backend=backend)

    return Call("linear_rows", ((rows, k), (m, k), (m,)), run)


def attention(batch: int, heads: int, queries: int, keys: int, dim: int) -> Call:
    def run(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend)

    q, kv = (batch, queries, heads, dim), (batch, keys, heads, dim)
    return Call("attention_forward", (q, kv, kv), run)


def conv2d(n: int, c: int, size: int, out: int, *, stride: int = 1, upsample: bool = False) -> Call:
    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        y: Any = ops.conv2d(x, weight, bias, stride, 1, upsample=upsample, backend=backend)
        return y

    return Call("conv2d_kernel", ((n, c, size, size), (out, c, 3, 3), (out,)), run, channels_last=True)


REAL = {
    "group_norm 64x64": group_norm(2, 320, 64), "group_norm 8x8": group_norm(2, 2560, 8),
    "group_norm contiguous": group_norm(2, 640, 32, False), "group_norm vae": group_norm(1, 128, 512),
    "layer_norm": layer_norm(8192, 320), "linear": linear(8192, 320, 320),
    "linear split": linear(128, 5120, 1280), "linear geglu": linear(2048, 640, 5120, "geglu"),
    "linear odd": linear(77, 771, 514, "gelu"), "attention 64x64": attention(2, 8, 4096, 4096, 40),
    "attention of text": attention(2, 8, 4096, 77, 40), "attention D 160": attention(2, 8, 64, 64, 160),
    "attention vae": attention(1, 1, 4096, 4096, 512), "conv2d 64x64": conv2d(2, 320, 64, 320),
    "conv2d 8x8": conv2d(2, 1280, 8, 1280), "conv2d down": conv2d(2, 320, 64, 320, stride=2),
    "conv2d up": conv2d(2, 640, 16, 640, upsample=True), "conv2d in": conv2d(2, 4, 64, 320),
}  # fmt: skip
TINY = {
    "group_norm": group_norm(2, 64, 4), "layer_norm": layer_norm(9, 40), "linear": linear(9, 40, 24, "geglu"),
    "attention": attention(1, 2, 9, 7, 16), "conv2d": conv2d(1, 32, 4, 32),
}  # fmt: skip
