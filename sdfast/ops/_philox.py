"""Noise as a function of seed, step and element alone: Philox4x32-10 and Box-Muller, in torch.

Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". Nothing is kept between
draws, so the noise of a sample depends on neither its batch, its layout in memory nor the number of threads.
This module is the definition; kernels give the same uniforms, bit for bit, and normals within 2 units in the
last place of fp32.

    i        counts the elements of one sample in row-major order
    key      low and high 32 bits of the seed
    counter  low and high 32 bits of i // 4, low and high 32 bits of the step; gives the words r_0 to r_3
    u_j      = fp32(r_j) 2^-32 + 2^-33 in fp32, from 2^-33 to 1; conversion and sum each round to nearest even
    z        = ρ(u_0) (cos 2π u_1, sin 2π u_1), ρ(u_2) (cos 2π u_3, sin 2π u_3), ρ(u) = √(-2 ln u):
             elements 4 (i // 4) to 4 (i // 4) + 3

The kernels' form is csrc/cpu_philox.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers; int64 holds it only in parts."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _WORD


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four words, int64 from 0 to 2^32 - 1, of shapes that broadcast.
        key: two words, likewise.

    Returns:
        Four words, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def philox_uniforms(seeds: Tensor, size: int, step: int | Tensor = 0) -> Tensor:
    """Uniforms in (0, 1]: u of the formula above.

    Args:
        seeds: (N,), int64.
        size: elements of one sample.
        step: >= 0; a tensor, (), int64, is not read on the host.

    Returns:
        (N, blocks, 4), fp32, for blocks of four elements, the last one whole.
    """
    block = torch.arange((size + 3) // 4, device=seeds.device)  # (blocks,)
    counter = block & _WORD, block >> 32, *(torch.zeros_like(block) + w for w in (step & _WORD, step >> 32))
    key = [word[:, None] for word in (seeds & _WORD, (seeds >> 32) & _WORD)]
    words = torch.stack(philox4x32(counter, key), -1)  # (N, blocks, 4)
    return words.to(torch.float32) * 2**-32 + 2**-33


def philox_normals(seeds: Tensor, shape: Sequence[int], step: int | Tensor = 0) -> Tensor:
    """Standard normal noise: z of the formula above, in fp64.

    Args:
        seeds: (N,), int64.
        shape: (N, ...).
        step: as for `philox_uniforms`.

    Returns:
        (N, ...), fp64.
    """
    size = math.prod(shape[1:])
    u = philox_uniforms(seeds, size, step).double()
    radius, angle = torch.sqrt(-2 * torch.log(u[..., 0::2])), 2 * math.pi * u[..., 1::2]
    z = radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)  # (N, blocks, 2, 2)
    return z.reshape(len(seeds), 4 * u.shape[1])[:, :size].reshape(tuple(shape))
