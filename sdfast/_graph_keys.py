"""What a captured call's launches depend on: its arguments, the settings of the process, the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import dispatch


def call_key(function: Callable[..., Any], leaves: Sequence[object], structure: object) -> Hashable:
    """All that the launches of a call depend on but the model. Holds the function: its id might be reused."""
    return function, structure, tuple(_kind(leaf) for leaf in leaves), _switches()


def _kind(leaf: object) -> Hashable:
    """All that launches depend on: of a tensor what it is, of anything else its value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    if not isinstance(leaf, Hashable):
        raise TypeError(f"argument: got {type(leaf).__name__}, expected tensors, numbers, or lists of these")
    return type(leaf), leaf


def _switches() -> tuple[Hashable, ...]:
    """The process-wide settings by which kernels are chosen, ours and torch's.

    Those of TF32 by their new names: the old ones raise once the new ones were set.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    products = (
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_accumulation,
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        cuda.preferred_blas_library(),
    )
    convolutions = (
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
    )
    attention = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(torch._C._get_sdp_priority_order()),
    )
    modes = (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
    return *dispatch.switches(), *products, *convolutions, *attention, *modes


def modules_of(owner: nn.Module) -> Iterator[nn.Module]:
    """It and all below it. A U-Net has a thousand, and `nn.Module.modules` takes long for a step."""
    pending: list[nn.Module | None] = [owner]
    while pending:
        module = pending.pop()
        if module is not None:
            yield module
            pending.extend(module._modules.values())


def weights_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters and buffers that these modules hold themselves."""
    return [
        weight
        for module in modules
        for weight in (*module._parameters.values(), *module._buffers.values())
        if weight is not None
    ]


def model_identity(modules: Sequence[nn.Module], weights: Sequence[Tensor]) -> Hashable:
    """The modules themselves, as ids might be reused, and their modes; where each weight lies, its version.

    Inference tensors have no version.
    """
    states = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
    return tuple(modules), tuple(module.training for module in modules), states
