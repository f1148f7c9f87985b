"""GroupNorm of an image that is never in memory as a whole: moments of its parts, the formula on each part.

    n, mean, M2 = Σ(x − mean)² of a group in two parts:      Chan, Golub & LeVeque 1979, eq. 2.1
    n = n_a + n_b,   δ = mean_b − mean_a,   mean = mean_a + δ n_b/n,   M2 = M2_a + M2_b + δ² n_a n_b/n
    y = act((x − mean) · rstd · weight + bias),   rstd = 1/√(M2/n + eps)      group_norm's formula

A part x is (N, C, *), any of the pixels. mean, M2, rstd: (N, num_groups), fp64, so that the result is that of
`group_norm` on the whole image to rounding, however it was cut. For inference: no gradient.
The CPU kernels are steps 1 and 2, and step 3, of group_norm's: csrc/group_norm_forward_cpu.h.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import _native
from sdfast.ops._checks import check_optional, check_tensor
from sdfast.ops._group_norm_layout import empty_in_layout, is_first, is_last


@dataclasses.dataclass(frozen=True)
class Moments:
    """What is known of the pixels seen so far.

    Attributes:
        count: elements of each group.
        mean: (N, num_groups), fp64.
        squares: Σ(x − mean)², likewise.
    """

    count: int
    mean: Tensor
    squares: Tensor

    def merged(self, other: Moments) -> Moments:
        """Those of both parts together."""
        count = self.count + other.count
        if count == 0:
            return self
        delta, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + delta.square() * (self.count * share)
        return Moments(count, self.mean + delta * share, squares)

    def rstd(self, eps: float) -> Tensor:
        """1/√(variance + eps), (N, num_groups), fp64."""
        return torch.rsqrt(self.squares / max(self.count, 1) + eps)


def _moments_fake(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float64)
    return mean, torch.empty_like(mean)


def _apply_fake(x: Tensor, *_: object) -> None:
    return None


_moments_op = _library.define_native(
    "group_norm_moments(Tensor x, int num_groups) -> (Tensor mean, Tensor squares)", _moments_fake
)
_apply_op = _library.define_native(
    "group_norm_apply_out(Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, "
    "bool silu, Tensor(a!) out) -> ()",
    _apply_fake,
)


def _moments_torch(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    grouped = x.unflatten(1, (num_groups, -1)).flatten(3)  # (N, G, C/G, pixels)
    mean = grouped.mean((2, 3), dtype=torch.float64)
    center = mean.to(torch.promote_types(x.dtype, torch.float32))
    squares = (grouped - center[..., None, None]).square_().sum((2, 3), dtype=torch.float64)
    return mean, squares - math.prod(grouped.shape[2:]) * (mean - center).square()


def _apply_torch(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """The formula in fp32, in fp64 where x is of that."""
    wide = torch.promote_types(x.dtype, torch.float32)
    per_channel = (slice(None), slice(None), *(None,) * (x.dim() - 2))
    repeats = x.shape[1] // num_groups
    mean, rstd = (t.to(wide).repeat_interleave(repeats, 1)[per_channel] for t in (mean, rstd))
    z = (x.to(wide) - mean) * rstd
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            z = combine(z, parameter.to(wide)[None][per_channel])
    out.copy_(F.silu(z) if silu else z)


def _served_by_kernel(op_name: str, x: Tensor, backend: str | None) -> bool:
    reasons = _native.unavailable(op_name, "x", x.device.type, x.dtype)
    return dispatch.choose(op_name, x.device.type, reasons, backend) == "cpu"


def _check(x: Tensor, num_groups: int) -> None:
    check_tensor("x", x)
    if x.dim() < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, *)")
    if num_groups < 1 or x.shape[1] % num_groups or x.shape[1] == 0:
        raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {x.shape[1]} channels")


@torch.no_grad()
def group_norm_moments(x: Tensor, num_groups: int, *, backend: str | None = None) -> Moments:
    """Mean and sum of squares about it of every group in one part of an image.

    Args:
        x: (N, C, *), fp32, bf16, fp16 or fp64, any strides.
        num_groups: number of groups; divides C.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    _check(x, num_groups)
    run = _moments_op if x.numel() and _served_by_kernel("group_norm_moments", x, backend) else _moments_torch
    count = math.prod(x.shape[1:]) // num_groups
    if count == 0:
        nothing = x.new_zeros((x.shape[0], num_groups), dtype=torch.float64)
        return Moments(0, nothing, nothing)
    return Moments(count, *run(x, num_groups))


@torch.no_grad()
def group_norm_apply(
    x: Tensor,
    moments: Moments,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm, and SiLU, of one part of an image whose moments are known.

    Args:
        x: (N, C, *), fp32, bf16, fp16 or fp64, any strides.
        moments: of the whole image.
        num_groups: number of groups; divides C.
        weight: (C,) or None, in the dtype of `x`, or fp32 where `x` is bf16 or fp16.
        bias: (C,) or None, likewise.
        eps: added to the variance.
        activation: None or "silu".
        out: where the result goes: of the shape, dtype and device of `x`, dense, channels first or last,
            not overlapping `x`. A new tensor when None.
        backend: see `sdfast.dispatch`; None takes the best that can run.

    Returns:
        `out`, or (N, C, *) in the dtype and memory format of `x`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    _check(x, num_groups)
    for name, value in (("weight", weight), ("bias", bias)):
        check_optional(name, value, shape=(x.shape[1],), like=x, or_fp32=True)
    for name, value in (("moments.mean", moments.mean), ("moments.squares", moments.squares)):
        check_tensor(name, value, shape=(x.shape[0], num_groups))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    if out is None:
        out = empty_in_layout(x)
    else:
        check_tensor("out", out, shape=tuple(x.shape), like=x)
        if not (is_first(out) or is_last(out)):
            raise ValueError(
                f"out: got strides {out.stride()}, expected a dense tensor, channels first or last"
            )
    run = _apply_op if _served_by_kernel("group_norm_apply_out", x, backend) else _apply_torch
    run(x, moments.mean, moments.rstd(eps), num_groups, weight, bias, activation == "silu", out)
    return cast(Tensor, out)
