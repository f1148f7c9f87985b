"""What every elementwise kernel promises, checked on a call that its test describes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdfast.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARRANGEMENTS = ("contiguous", "channels_last", "channel_slice", "strided", "transposed", "misaligned")
SHAPES = ((2, 4, 9, 7), (1, 4, 16, 16), (3, 5, 33), (2, 3, 80, 90), (4, 1, 1), (70, 3), (2, 0, 4), (0, 3))

# A call takes its tensors and a backend; the first tensor gives the results their shape and layout.
Call = Callable[[Sequence[Tensor], "str | None"], Sequence[Tensor]]
# Tensors for one call, for samples of this shape and dtype.
Make = Callable[[tuple[int, ...], torch.dtype], list[Tensor]]


def arranged(t: Tensor, arrangement: str) -> Tensor:
    """The values of t elsewhere in memory; whatever lies between and beside them is NaN."""
    if arrangement == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if arrangement == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if arrangement == "channel_slice":
        box = t.new_full((t.shape[0], 2 * t.shape[1] + 1, *t.shape[2:]), float("nan"))
        view = box[:, 1 : 1 + t.shape[1]]
    elif arrangement == "strided":
        view = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))[..., 1::2]
    elif arrangement == "misaligned":
        view = t.new_full((t.numel() + 2,), float("nan"))[1:-1].view(t.shape)
    else:
        return t.contiguous()
    return view.copy_(t)


def check_results(call: Call, tensors: Sequence[Tensor], backend: str = "cpu") -> Sequence[Tensor]:
    """Every result is within the budget; returns them."""
    results = call(tensors, backend)
    eager, exact = call(tensors, "torch"), call([t.double() for t in tensors], "torch")
    for actual, by_torch, right in zip(results, eager, exact, strict=True):
        assert_within_budget(actual, by_torch, right)
    return results


def check_shapes(call: Call, make: Make) -> None:
    """Every dtype, odd and empty shapes."""
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        check_results(call, make(shape, dtype))


def check_layouts(call: Call, make: Make) -> None:
    """Every layout, alone and mixed with others, gives the same bits; results lie as the first tensor does."""
    for dtype, shape in itertools.product(DTYPES, ((2, 4, 9, 7), (3, 2, 50))):
        tensors = make(shape, dtype)
        expected = call(tensors, "cpu")
        for i, arrangement in enumerate(ARRANGEMENTS):
            mixed = [ARRANGEMENTS[(i + j) % len(ARRANGEMENTS)] for j in range(len(tensors))]
            for each in ([arrangement] * len(tensors), mixed):
                views = [arranged(t, a) for t, a in zip(tensors, each, strict=True)]
                for result, right in zip(call(views, "cpu"), expected, strict=True):
                    assert torch.equal(result, right)
                    if arrangement == "channels_last":
                        assert result.stride() == views[0].stride()
                    else:
                        assert result.is_contiguous()


def check_non_finite(call: Call, make: Make) -> None:
    """NaN and inf come out where they come out of torch, and nowhere else."""
    for dtype, value, position in itertools.product(DTYPES, ("nan", "inf", "-inf"), (0, 37, 62)):
        tensors = make((3, 21), dtype)
        for i in range(len(tensors)):
            changed = [t.clone() for t in tensors]
            changed[i].view(-1)[position] = float(value)
            for actual, by_torch in zip(call(changed, "cpu"), call(changed, "torch"), strict=True):
                assert torch.equal(actual.isnan(), by_torch.isnan())
                assert torch.equal(actual.isinf(), by_torch.isinf())


def check_threads(call: Call, make: Make) -> None:
    """One, two and three threads give the same bits."""
    for shape in ((2, 4, 151, 131), (5, 3, 97, 99)):
        tensors = make(shape, torch.float32)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(tensors, "cpu"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_all(call: Call, make: Make) -> None:
    for check in (check_shapes, check_layouts, check_non_finite, check_threads):
        check(call, make)
