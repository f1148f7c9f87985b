"""Every attention of Stable Diffusion 1.5; q, k, v are transposed views, as in a model.

Rates count 4 L S D operations a head, of forward and backward 14 L S D; a causal one counts whole, though
half of it is skipped. Least traffic: q, k, v and the result once; with gradients also theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import sdfast.ops as ops
from sdfast.bench.case import Case, Spec, Way, gradients, split_limit

# (B, heads, L, S, D): the U-Net at 512x512 with a guided batch of 2, the VAE, and the causal text encoder.
UNET = tuple(
    (2, 8, length, keys, head_dim)
    for length, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for keys in (length, 77)
)
VAE = ((1, 1, 4096, 4096, 512),)
TEXT = ((1, 12, 77, 77, 64),)

Setting = tuple[int, int, int, int, int]


def make(setting: Setting, causal: bool, training: bool, dtype: torch.dtype, device: str) -> Case:
    """The case of a setting (B, heads, L, S, D), forward or with `training` forward and backward."""
    batch, heads, length, keys, head_dim = setting
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, rows, heads, head_dim).to(device, dtype).transpose(1, 2)
        for rows in (length, keys, keys)
    )
    leaves = [t.requires_grad_(training) for t in (q, k, v)]
    do = torch.randn_like(q)

    # The first queries of one head decide for all; gradients need all of its queries.
    queries = length if training else max(1, min(length, 2**22 // (keys * head_dim)))

    def part(results: Sequence[Tensor]) -> list[Tensor]:
        return [t[:1, -1:] if training else t[:1, -1:, :queries] for t in results]

    def wide() -> list[Tensor]:
        cut = [q[:1, -1:, :queries], k[:1, -1:], v[:1, -1:]]
        return [t.detach().double().requires_grad_(training) for t in cut]

    def exact() -> list[Tensor]:
        a, b, c = wide()
        y = F.scaled_dot_product_attention(a, b, c, is_causal=causal)
        return gradients(y, (a, b, c), do[:1, -1:, :queries].double())

    def magnitude() -> list[Tensor]:
        a, b, c = wide()
        return [F.scaled_dot_product_attention(a, b, c.abs(), is_causal=causal)]

    ways: dict[str, Way] = {
        "eager": lambda: gradients(
            F.scaled_dot_product_attention(q, k, v, is_causal=causal), leaves, do
        ),
        "sdfast": lambda: gradients(ops.attention(q, k, v, is_causal=causal), leaves, do),
    }  # fmt: skip
    flops = 4 * batch * heads * length * keys * head_dim
    nbytes = 2 * (q.numel() + k.numel()) * dtype.itemsize
    return Case(
        "x".join(map(str, setting)), dtype, ways, exact,
        flops=flops // 2 * 7 if training else flops,  # two products forward, five backward
        nbytes=nbytes * (2 if training else 1), part=part, magnitude=None if training else magnitude,
        limit=split_limit(q), training=training, details={"is_causal": causal},
    )  # fmt: skip


def _specs(model: str, settings: Sequence[Setting], causal: bool, training: bool) -> list[Spec]:
    return [
        Spec(
            "attention", model + training * ", forward and backward",
            "x".join(map(str, setting)) + causal * " causal" + training * " gradients",
            functools.partial(make, setting, causal, training),
            quick=not training and setting in (UNET[2], UNET[3], TEXT[0]),
        )
        for setting in settings
    ]  # fmt: skip


SPECS = [
    spec
    for training in (False, True)
    for model, settings, causal in (("U-Net", UNET, False), ("VAE", VAE, False), ("text encoder", TEXT, True))
    for spec in _specs(model, settings, causal, training)
]
