"""Argument checks and the fp32 wrapper shared by the operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TensorOrNone = TypeVar("_TensorOrNone", Tensor, Tensor | None)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_KERNEL_YET = dict.fromkeys(("cpu", "triton", "cuda"), "no such kernel for this operation")


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD looks on, which would not see through a compiled kernel."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_autocast(device_type: str) -> bool:
    """Whether autocast would cast what an operation on such a device is given; torch raises for "meta"."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts the tensors of a product to on such a device, or None where it is off."""
    return torch.get_autocast_dtype(device_type) if is_autocast(device_type) else None


def cast_to(dtype: torch.dtype, t: _TensorOrNone) -> _TensorOrNone:
    """A floating tensor in this dtype; another, or None, as it is."""
    return t.to(dtype) if t is not None and t.is_floating_point() else t


def can_cast(*tensors: Tensor | None) -> bool:
    """Whether autocast would cast all of them: it leaves fp64 alone."""
    return all(t is None or t.dtype is not torch.float64 for t in tensors)


def is_plain(weight: Tensor) -> bool:
    """Whether a kernel may read it, and a cast mean what it says: no subclass, such as a quantised weight."""
    return torch.compiler.is_compiling() or type(weight) in (Tensor, torch.nn.Parameter)


def check_tensor(
    name: str,
    value: object,
    *,
    rank: int | None = None,
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
    or_fp32: bool = False,
    casts: bool = False,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless it is the tensor asked for.

    Args:
        rank: the number of dimensions it must have.
        shape: the exact shape it must have.
        like: a tensor whose device and dtype it must share.
        or_fp32: fp32 will also do where `like` is of half precision.
        casts: any dtype will do under autocast, which the operation follows.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {rank} dimensions")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, expected {like.device} as the input")
    if like is not None and value.dtype != like.dtype and not (casts and is_autocast(like.device.type)):
        or_fp32 = or_fp32 and like.dtype in (torch.bfloat16, torch.float16)
        if or_fp32 and value.dtype is torch.float32:
            return
        allowed = f"{like.dtype} or torch.float32" if or_fp32 else str(like.dtype)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {allowed} as the input")


def check_optional(name: str, value: object, **expected: object) -> None:
    """`check_tensor` unless the argument is None."""
    if value is not None:
        check_tensor(name, value, **expected)  # type: ignore[arg-type]


def check_statistics(name: str, statistics: object, x: Tensor, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless these are a mean and an rstd, in fp32, or fp64 as x is."""
    if not isinstance(statistics, (tuple, list)) or len(statistics) != 2:
        is_pair = isinstance(statistics, (tuple, list))
        got = f"{len(statistics)} values" if is_pair else type(statistics).__name__  # type: ignore[arg-type]
        raise TypeError(f"{name}: got {got}, expected a tuple of two tensors, mean and rstd")
    dtype = torch.promote_types(x.dtype, torch.float32)
    for part, value in zip(("mean", "rstd"), statistics, strict=True):
        check_tensor(f"{name}, {part}", value, shape=shape)
        if value.device != x.device:
            raise ValueError(f"{name}, {part}: is on {value.device}, expected {x.device} as the input")
        if value.dtype != dtype:
            raise TypeError(
                f"{name}, {part}: got dtype {value.dtype}, expected {dtype} for an input of {x.dtype}"
            )


def widened(composite: Callable[..., object]) -> Callable[..., object]:
    """The reference of an operation: its formula evaluated in fp32 (fp64 where an input is fp64).

    Floating tensors are widened on the way in and the results rounded once on the way out, to the
    dtype of the first argument.
    """

    def cast(value: object, dtype: torch.dtype) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, tuple):
            return tuple(cast(item, dtype) for item in value)
        return value

    @functools.wraps(composite)
    def reference(x: Tensor, *args: object, **kwargs: object) -> object:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            result = composite(
                cast(x, wide), *(cast(a, wide) for a in args), **{k: cast(a, wide) for k, a in kwargs.items()}
            )
        return cast(result, x.dtype)

    return reference
