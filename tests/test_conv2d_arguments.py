"""What conv2d refuses names the argument and what is allowed, whoever would serve it."""

from __future__ import annotations

import pytest
import torch

from sdfast import ops
from sdfast.ops.conv2d import NormPrologue

X, WEIGHT = torch.randn(2, 8, 4, 4), torch.randn(6, 8, 3, 3)
ONES = torch.ones(8)
FOUND = torch.ones(2, 4)


def norm(statistics: object = None, groups: object = 4) -> NormPrologue:
    return NormPrologue(groups, ONES, ONES, statistics=statistics)


WRONG = {
    "padding by name": ({"padding": "same"}, TypeError, "padding: got 'same', expected an int >= 0"),
    "padding of a float": ({"padding": 1.0}, TypeError, "padding: got 1.0, expected an int >= 0"),
    "paddings of floats": ({"padding": (1.0, 1.0)}, TypeError, r"padding: got \(1.0, 1.0\), expected an int"),
    "padding of a bool": ({"padding": True}, TypeError, "padding: got True"),
    "three paddings": ({"padding": (1, 1, 1)}, ValueError, r"padding: got \(1, 1, 1\)"),
    "a negative padding": ({"padding": -1}, ValueError, "padding: got -1"),
    "two strides": ({"stride": (1, 2)}, ValueError, r"stride: got \(1, 2\), expected .* two that are equal"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, r"stride: got \(1, 1, 1\), expected an int >= 1"),
    "stride of a bool": ({"stride": True}, TypeError, "stride: got True, expected an int >= 1"),
    "stride of a float": ({"stride": 1.0}, TypeError, "stride: got 1.0, expected an int >= 1"),
    "stride 0": ({"stride": 0}, ValueError, "stride: got 0, expected an int >= 1"),
    "norm": ({"norm": (4, ONES, ONES)}, TypeError, "norm: got tuple, expected a NormPrologue"),
    "groups of a norm": ({"norm": norm(groups=4.0)}, TypeError, "norm.num_groups: got 4.0, expected an int"),
    "groups of y": ({"stats_groups": 2.0}, TypeError, "stats_groups: got 2.0, expected an int, a divisor"),
    "groups that leave a rest": ({"stats_groups": 4}, ValueError, "stats_groups: got 4, expected a divisor"),
    "one statistic": ({"norm": norm((FOUND,))}, TypeError, "norm.statistics: got 1 values, expected a tuple"),
    "three": ({"norm": norm((FOUND,) * 3)}, TypeError, "norm.statistics: got 3 values, expected a tuple of two"),
    "a tensor": ({"norm": norm(FOUND)}, TypeError, "norm.statistics: got Tensor, expected a tuple of two"),
    "a number": ({"norm": norm((FOUND, 1.0))}, TypeError, "norm.statistics, rstd: got float, expected a torch"),
    "shape": ({"norm": norm((FOUND.t(), FOUND))}, ValueError, r"norm.statistics, mean: got shape \(4, 2\)"),
    "dtype": ({"norm": norm((FOUND, FOUND.half()))}, TypeError, "norm.statistics, rstd: got dtype torch.float16"),
    "device": ({"norm": norm((FOUND.to("meta"), FOUND))}, ValueError, "norm.statistics, mean: is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(wrong: str) -> None:
    keywords, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        ops.conv2d(X, WEIGHT, **keywords)


def test_what_is_allowed() -> None:
    expected = torch.nn.functional.conv2d(X, WEIGHT, None, 2, 1)
    for stride in (2, (2, 2), [2, 2]):
        for padding in (1, (1, 1), [1, 1], (1, 1, 1, 1)):
            y = ops.conv2d(X, WEIGHT, None, stride, padding, backend="torch")
            assert torch.equal(y, expected)


def test_statistics_are_as_wide_as_the_sums() -> None:
    wide = NormPrologue(4, ONES.double(), ONES.double(), statistics=(FOUND, FOUND))
    with pytest.raises(TypeError, match="mean: got dtype torch.float32, expected torch.float64"):
        ops.conv2d(X.double(), WEIGHT.double(), norm=wide)


def test_a_mask_of_attention_elsewhere() -> None:
    q = torch.randn(1, 2, 4, 8)
    for mask in (torch.ones(4, 4, dtype=torch.bool, device="meta"), torch.ones(4, 4, device="meta")):
        with pytest.raises(ValueError, match="mask: is on meta, expected cpu as the input"):
            ops.attention(q, q, q, mask=mask)
