"""Which backends serve a call on a GPU, best first, where the call names none.

As measured on an H100 in bf16 (benchmarks/bench_gpu_calls.py): each call of Stable Diffusion 1.5, SDXL and
their VAE, in a CUDA graph, by every backend. Convolutions are CUDA C++'s, on Hopper's own units where its
library holds them, and so are many keys of narrow heads; so is GEGLU. Norms are Triton's, most products
cuBLAS's, many keys of wider heads torch's. What nobody measured is torch's: other GPUs, fp32, gradients,
heads of more than 512. (fp16 is taken to be as fast as bf16.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _triton
from sdfast.ops._native import requires_grad

_TORCH = ("torch",)
_KERNELS = ("triton", "cuda", "torch")
_KERNELS_OF_TILES = ("cuda", "triton", "torch")
# Without tile products a 3x3 convolution of this many channels and pixels an image is cuDNN's: in 24 of 28
# calls as fast or faster, up to 1.63 times.
_LIBRARY_CHANNELS, _LIBRARY_PIXELS = 512, 1024
# From so many pixels on a convolution of the upsampled image was faster, even with a weight folded anew.
_FOLDED_PIXELS = 4096
_FEW_KEYS = 256
# From so many tokens on tile products were faster than cuBLAS's and a pass that adds, while a block on every
# multiprocessor computes all results, or of so many rows of the weight: 7 us beside 14.
_TILE_TOKENS, _TILE_RESULTS, _TILE_ROWS = 2048, 128 * 160 * 132, 320
# csrc/attention_hopper_cuda.cuh takes wider heads, too, in which cuDNN's is faster: 183 us beside 208.
_TILES_HEAD = 40
# With fewer blocks of so many queries it shares the keys out, as the kernels for every GPU do.
_TILES_QUERIES, _TILES_BLOCKS = 128, 66
_NARROW_HEAD, _WIDEST_HEAD = 256, 512  # torch's fused attention ends at 256


def _measured(x: Tensor, *others: Tensor | None) -> bool:
    half = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    return half and not requires_grad(x, *others) and _is_hopper(x.device.type, x.device.index)


def _is_hopper(kind: str, index: int | None) -> bool:
    return kind == "cuda" and _triton.architecture_there(torch.device(kind, index or 0)) == 90


# torch.compile takes its answer for a constant: it cannot trace what asks the driver.
_is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_hopper_units(x: Tensor, *sizes: int) -> bool:
    """Whether this GPU and the CUDA library have kernels for Hopper's own units that take such channels."""
    half = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    whole = all(size % 8 == 0 for size in sizes)
    return (
        half
        and whole
        and _is_hopper(x.device.type, x.device.index)
        and _library.has_kernel("hopper_units", "cuda")
    )


def of_convolution(
    x: Tensor, weight: Tensor, stride: int, upsample: bool, *others: Tensor, plain: bool = True
) -> tuple[str, ...]:
    """Of `conv2d`; `others` are the tensors it adds. `plain`: it gathers no statistics and is given none."""
    if not _measured(x, weight, *others):
        return _TORCH
    folds_anew = upsample and dispatch.memory() == "low"
    if plain and not folds_anew and has_hopper_units(x, x.shape[1], *weight.shape[:2]):
        return _KERNELS_OF_TILES
    pixels = x.shape[2] * x.shape[3]
    if upsample:  # without copies of weights each call folds
        by_library = pixels < _FOLDED_PIXELS or dispatch.memory() == "low"
    else:
        is_plain = tuple(weight.shape[2:]) == (3, 3) and stride == 1
        by_library = is_plain and pixels >= _LIBRARY_PIXELS and weight.shape[1] >= _LIBRARY_CHANNELS
    return _TORCH if by_library else ("triton", "torch")


def of_linear(
    x: Tensor, weight: Tensor, activation: str | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[str, ...]:
    """Of `linear`: torch's product, but for GEGLU, and residuals of many tokens while results are few."""
    if not _measured(x, weight, bias, residual):
        return _TORCH
    adds = activation is None and residual is not None
    tokens, rows = x.numel() // max(x.shape[-1], 1), weight.shape[0]
    fits = tokens >= _TILE_TOKENS and (rows <= _TILE_ROWS or tokens * rows <= _TILE_RESULTS)
    by_tiles = adds and fits and has_hopper_units(x, *weight.shape[:2])
    return _KERNELS_OF_TILES if activation == "geglu" or by_tiles else _TORCH


def of_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[str, ...]:
    """Of `attention`."""
    blocks = q.shape[0] * q.shape[1] * -(-q.shape[2] // _TILES_QUERIES)
    many = k.shape[2] >= _FEW_KEYS and q.shape[3] <= _TILES_HEAD and blocks >= _TILES_BLOCKS and not is_causal
    if many and has_hopper_units(q, q.shape[3]) and _measured(q, k, v):
        return _KERNELS_OF_TILES
    suits = k.shape[2] < _FEW_KEYS or q.shape[3] > _NARROW_HEAD
    return _KERNELS if suits and q.shape[3] <= _WIDEST_HEAD and _measured(q, k, v) else _TORCH


def of_norm(x: Tensor, *others: Tensor | None) -> tuple[str, ...]:
    """Of `group_norm` and `layer_norm`; `others` may have gradients, too."""
    return _KERNELS if _measured(x, *others) else _TORCH
