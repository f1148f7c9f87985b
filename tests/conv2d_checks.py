"""What every kernel of conv2d has to do. `run` is the operation by one backend; `repeat` is it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from guarded import Guards
from torch import Tensor

from sdfast import _library, ops, packing
from sdfast.ops._conv2d_arguments import sides_of
from sdfast.ops.conv2d import conv2d_torch, group_statistics
from sdfast.testing import assert_within_budget

LAYOUT = torch.channels_last
Case = tuple  # (N, C_in, H, W, C_out, kernel, stride, padding)
Run = Callable[..., Tensor]
References = Callable[[tuple, dict[str, object]], tuple[Tensor, Tensor]]


def by(backend: str) -> Run:
    """The operation by this backend."""
    return lambda *args, **keywords: ops.conv2d(*args, **keywords, backend=backend)


def make(
    case: Case, dtype: torch.dtype, upsample: bool = False, where: str = "cpu"
) -> tuple[tuple, dict[str, object]]:
    """Positional and keyword arguments of a call with everything fused."""
    images, channels, height, width, out_channels, kernel, stride, padding = case
    x = torch.randn(images, channels, height, width).to(dtype).contiguous(memory_format=LAYOUT)
    weight = (torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5).to(dtype)
    args = (x, weight, torch.randn(out_channels).to(dtype), stride, sides_of(padding))
    keywords = {"upsample": upsample, "time_embedding": torch.randn(images, out_channels).to(dtype)}
    keywords["residual"] = torch.randn_like(conv2d_torch(*args, **keywords))
    args = tuple(a.to(where) if isinstance(a, Tensor) else a for a in args)
    return args, {name: v.to(where) if isinstance(v, Tensor) else v for name, v in keywords.items()}


def references(args: tuple, keywords: dict[str, object]) -> tuple[Tensor, Tensor]:
    """Eager, and in fp64."""

    def wide(value: object) -> object:
        return value.double() if isinstance(value, Tensor) else value

    exact = conv2d_torch(*map(wide, args), **{name: wide(value) for name, value in keywords.items()})
    return conv2d_torch(*args, **keywords), exact


def within_budget(
    run: Run, repeat: Run, references: References, args: tuple, keywords: dict[str, object], what: str
) -> None:
    """Right, in the layout that the next one reads, and the same bits again."""
    actual = run(*args, **keywords)
    assert actual.is_contiguous(memory_format=LAYOUT)
    assert_within_budget(actual, *references(args, keywords), what=what)
    assert torch.equal(actual, repeat(*args, **keywords))


def two_sources(
    run: Run, references: References, cases: Iterable[tuple[Case, int, bool]], dtype: torch.dtype, where: str
) -> None:
    """The channels of skip follow those of x, `first` of them, an odd number too."""
    for case, first, upsample in cases:
        (x, *args), keywords = make(case, dtype, upsample, where)
        sources = x[:, :first].contiguous(), x[:, first:].contiguous(memory_format=LAYOUT)
        actual = run(sources[0], *args, **keywords, skip=sources[1])
        assert_within_budget(actual, *references((x, *args), keywords), what=f"{case}, {first} channels")


def statistics(
    run: Run,
    repeat: Run,
    cases: Iterable[tuple[Case, int, bool]],
    dtype: torch.dtype,
    where: str,
    offset: float,
) -> None:
    """Of each group of the rounded result, whose mean is about `offset`; the result is as without them."""
    for case, groups, upsample in cases:
        (x, weight, bias, *more), keywords = make(case, dtype, upsample, where)
        args = (x, weight, bias + offset, *more)
        named = {**keywords, "stats_groups": groups, "stats_eps": 1e-3}
        y, mean, rstd = run(*args, **named)
        plain = run(*args, **keywords)
        half = y.dtype is not torch.float32
        if half and _library.has_kernel("hopper_units", "cuda"):  # then another kernel may serve it
            torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(y, plain)
        eager, exact = (group_statistics(t, groups, 1e-3) for t in (y, y.double()))
        terms = group_statistics(y.double().abs(), groups, 1e-3)[0]  # a mean near zero cancels
        assert_within_budget(mean, eager[0], exact[0], magnitude=terms, what=f"mean of {case}")
        assert_within_budget(rstd, eager[1], exact[1], what=f"rstd of {case}")
        again = repeat(*args, **named)
        assert torch.equal(again[1], mean) and torch.equal(again[2], rstd)


def layouts_and_strides(run: Run, case: Case, dtype: torch.dtype, where: str) -> None:
    """Each argument laid out otherwise gives the same bits."""
    args, keywords = make(case, dtype, where=where)
    x, weight, bias, stride, padding = args
    expected = run(*args, **keywords)
    batch, channels, height, width = x.shape
    wider = torch.full((batch, channels + 3, height + 2, width + 2), float("nan"), dtype=dtype, device=where)
    view = wider[:, 2:-1, 1:-1, 1:-1]
    view.copy_(x)
    spread = torch.empty(2 * len(bias), dtype=dtype, device=where)[::2].copy_(bias)
    for other in (x.contiguous(), view):
        assert torch.equal(run(other, weight, spread, stride, padding, **keywords), expected)
    for other in (weight.contiguous(memory_format=LAYOUT), weight.flip(0).flip(0)):
        assert torch.equal(run(x, other, bias, stride, padding, **keywords), expected)
    strided = {
        "residual": keywords["residual"].contiguous(),
        "time_embedding": keywords["time_embedding"].t().contiguous().t(),
    }
    assert torch.equal(run(*args, **strided), expected)
    rows = keywords["time_embedding"]
    channels = rows.shape[1]
    wide = torch.full((batch, 2 * channels + 8), float("nan"), dtype=dtype, device=where)
    wide[:, :channels] = rows
    for time in (rows[:1].expand(batch, -1), wide[:, :channels]):  # one row of all images, rows further apart
        y, dense = (run(*args, **{**keywords, "time_embedding": t}) for t in (time, time.contiguous()))
        assert torch.equal(y, dense)


def stays_within_its_tensors(run: Run, case: Case, groups: int, dtype: torch.dtype, where: str) -> None:
    """Misaligned, and what lies around them is NaN."""
    args, keywords = make(case, dtype, where=where)
    expected = run(*args, **keywords, stats_groups=groups)
    guards = Guards()

    def around(value: object) -> object:
        return guards.around(value, offset=1) if isinstance(value, Tensor) else value

    surrounded = [around(a) for a in args], {name: around(value) for name, value in keywords.items()}
    y = run(*surrounded[0], **surrounded[1], stats_groups=groups)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(y, expected, strict=True))
    guards.check()


def a_nan_reaches_only_its_neighbours(run: Run, dtype: torch.dtype, where: str) -> None:
    args, _ = make((1, 32, 12, 12, 32, 3, 1, 1), dtype, where=where)
    args[0][0, 5, 8, 9] = float("nan")
    y = run(*args)
    assert y[0, :, 7:10, 8:11].isnan().all()
    y[0, :, 7:10, 8:11] = 0
    assert y.isfinite().all()


def weights_are_read_where_they_lie(run: Run, case: Case, dtype: torch.dtype, where: str) -> None:
    """Of one that lies otherwise the rows are copied, and for an upsample four kernels are made of it."""
    packing.clear()
    args, keywords = make(case, dtype, where=where)
    weight = args[1].contiguous(memory_format=LAYOUT)
    expected = run(args[0], weight, *args[2:], **keywords)
    assert packing.packed_bytes() == 0
    assert torch.equal(run(*args, **keywords), expected)
    assert packing.packed_bytes() == weight.nbytes
    run(args[0], weight, *args[2:], upsample=True)
    assert packing.packed_bytes() == weight.nbytes + weight.nbytes * 16 // 9
    packing.clear()
