"""What every kernel of group_norm for a GPU has to do, `backend` on the device `where`."""

from __future__ import annotations

import dataclasses

import torch
from test_group_norm import NAMES, Case, in_layout, make_case, terms
from torch import Tensor

from sdfast.ops import group_norm
from sdfast.testing import assert_within_budget

OPS = torch.ops.sdfast


def on_device(case: Case, where: str) -> Case:
    """The same values, in the same strides; itself where it is there, with what lies around it."""
    if case.x.device.type == where:
        return case
    moved = {n: None if (t := getattr(case, n)) is None else t.to(where) for n in NAMES}
    moved["x"] = torch.empty_strided(
        case.x.shape, case.x.stride(), dtype=case.x.dtype, device=where
    ).copy_(case.x)  # fmt: skip
    return dataclasses.replace(case, **moved)


def statistics_of(x: Tensor, groups: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and rstd, (N, groups), from fp64."""
    grouped = x.reshape(x.shape[0], groups, -1).double()
    variance = grouped.var(-1, correction=0)
    return grouped.mean(-1).float(), (variance + eps).rsqrt().float()


def skip(
    backend: str, channels: int, skip_channels: int, groups: int, size: tuple[int, int], dtype: torch.dtype, where: str
) -> None:  # fmt: skip
    """Two sources as if they were concatenated, whatever the layout of each."""
    x = (torch.randn(2, channels, *size) * 2 + 0.7).to(dtype)
    other = torch.randn(2, skip_channels, *size).to(dtype)
    total = channels + skip_channels
    weight, bias = (1 + torch.randn(total) * 0.3).to(dtype), torch.randn(total).to(dtype)
    both = Case(torch.cat([x, other], 1), groups, weight, bias)
    exact = both.converted(torch.float64).run("torch")
    sizes = terms(both, torch.zeros_like(both.x))
    for layouts in (("last", "last"), ("first", "first"), ("last", "strided")):
        sources = (in_layout(t, layout) for t, layout in zip((x, other), layouts, strict=True))
        first, second, *parameters = (t.to(where) for t in (*sources, weight, bias))
        y = group_norm(first, groups, *parameters, activation="silu", skip=second, backend=backend).cpu()
        assert_within_budget(y, both.run("torch"), exact, magnitude=sizes["y"])
        assert y.is_contiguous(memory_format=torch.channels_last) == (layouts == ("last", "last"))


def gradients_reach_the_skip(backend: str, where: str) -> None:
    """Those of both sources, and of the second alone."""
    x, other, dy = torch.randn(2, 7, 4, 3), torch.randn(2, 5, 4, 3), torch.randn(2, 12, 4, 3)

    def gradients(backend: str, dtype: torch.dtype, *requires: bool) -> list[Tensor]:
        leaves = [t.to(where, dtype).requires_grad_(r) for t, r in zip((x, other), requires, strict=True)]
        y = group_norm(leaves[0], 4, skip=leaves[1], activation="silu", backend=backend)
        return list(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy.to(y)))

    for requires in ((True, True), (False, True)):
        results = [
            gradients(name, dtype, *requires)
            for name, dtype in ((backend, torch.float32), ("torch", torch.float32), ("torch", torch.float64))
        ]
        for actual, eager, exact in zip(*results, strict=True):
            assert_within_budget(actual, eager, exact, magnitude=3 * exact.abs().mean() + exact.abs())


def known_statistics(
    backend: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, where: str
) -> None:
    """Taken for granted, and strided ones give the same bits."""
    case = make_case(shape, groups, dtype, layout)
    given, exact = on_device(case, where), case.converted(torch.float64).run("torch")
    more = {"activation": "silu", "scale": given.scale, "shift": given.shift, "backend": backend}
    statistics = statistics_of(given.x, groups)
    y = group_norm(given.x, groups, given.weight, given.bias, statistics=statistics, **more)
    sizes = terms(case, torch.zeros(shape))
    assert_within_budget(y.cpu(), case.run("torch"), exact, magnitude=sizes["y"])
    strided = tuple(torch.stack([t, t], -1)[..., 0] for t in statistics)
    again = group_norm(given.x, groups, given.weight, given.bias, statistics=strided, **more)
    assert torch.equal(y, again)


def gradients_with_statistics(backend: str, where: str) -> None:
    """As without: the gradient is that of a normalisation by x's own statistics."""
    x, weight = torch.randn(2, 6, 4, 3, device=where), torch.randn(6, device=where)
    dy = torch.randn_like(x)
    forward = getattr(OPS, f"group_norm_forward_{backend}")
    mean, rstd = forward(x, 2, weight, None, 1e-5, False, None, None)[1:]
    results = []
    for statistics in (None, (mean, rstd)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = group_norm(leaves[0], 2, leaves[1], statistics=statistics, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def empty(backend: str, shape: tuple[int, ...], where: str) -> None:
    """Empty results, and gradients of zero; of two sources and with known statistics, too."""
    case = on_device(make_case(shape, 2, torch.float32, "first"), where)
    gradients = case.gradients(backend, torch.empty(shape, device=where))
    assert case.run(backend).shape == gradients["x"].shape == shape
    assert all(not gradients[name].any() for name in NAMES)
    y = group_norm(case.x, 2, skip=case.x, backend=backend)
    assert y.shape == (shape[0], 8, *shape[2:])
    zeros = torch.zeros(shape[0], 2, device=where)
    assert group_norm(case.x, 2, statistics=(zeros, zeros), backend=backend).shape == shape


def opcheck(backend: str, layout: str, where: str) -> None:
    """Every operator of it by torch.library.opcheck; training's forward gives the same y, and right statistics."""
    for dtype, optional in [(torch.float32, True), (torch.bfloat16, False)][layout != "last" :]:
        case = make_case((2, 9, 2, 3), 3, dtype, layout, affine=optional, scale_shift=optional)
        case = on_device(case, where)
        affine, last = (case.weight, case.bias), (case.scale, case.shift)
        operators = {
            name: getattr(OPS, f"group_norm{name}_{backend}") for name in ("", "_forward", "_backward", "_apply", "_pair")
        }  # fmt: skip
        forward = (case.x, 3, *affine, 1e-5, True, *last)
        y, mean, rstd = operators["_forward"](*forward)
        assert torch.equal(operators[""](*forward), y)
        for actual, right in zip((mean, rstd), statistics_of(case.x, 3), strict=True):
            torch.testing.assert_close(actual, right)
        for name, arguments in (
            ("", forward),
            ("_forward", forward),
            ("_backward", (torch.randn_like(y), case.x, mean, rstd, 3, *affine, True, *last)),
            ("_apply", (case.x, mean, rstd, 3, *affine, True, *last)),
            ("_pair", (case.x[:, :7], case.x[:, 7:], 3, *affine, 1e-5, True, *last)),
        ):
            torch.library.opcheck(operators[name], arguments)
